// What the steps of a plan have in common.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

constexpr int64_t ROWS = 64;    // features of a part of an addition
constexpr int64_t PART = 32;    // rows of a part of a product of few tokens

inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(sequence, token, column, how many) for the tokens that lie in a tile.
template <class F>
inline void tokens_in(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * NT, end = std::min(at + NT, s.columns); at < end;) {
    const int64_t b = at / s.apart, token = at % s.apart, left = std::min(s.apart - token, end - at);
    if (token < s.tokens) f(b, token, at % NT, std::min(left, s.tokens - token));
    at += left;
  }
}

// Sums [rows][NT] of `columns` of a tile of inputs times lanes `lane`..`lane` + `some` of a weight as it is, from `row` on.
inline void multiply(const rarefy_table& t, const float* values, int64_t lanes, int64_t row, int64_t rows, int64_t lane,
              int64_t some, const uint32_t* x, int64_t columns, uint32_t* out) {
  const auto* from = reinterpret_cast<const uint32_t*>(values + row * lanes + lane * R4);
  t.dense[0](from, lanes * R4, over(rows, R4), some, x, out, columns, lane > 0);
}

inline rarefy_end end_of(const rarefy_sums& w, int64_t row, int64_t rows, const float* steps, const float* more) {
  return {w.bias ? w.bias + row : nullptr, more, rows, w.act, w.scales ? w.scales + row : nullptr, steps,
          w.sums ? w.sums + row : nullptr};
}

inline void settle(const rarefy_table& t, const rarefy_end& end, bool bytes, float* out) {
  if (bytes)
    t.settle_bytes(end, out);
  else
    t.put(out, end.rows, NT, end.bias, end.more, end.act, out, NT, false);
}

// Tells how large outputs are: of a tile, some rows of them, from whole slabs on.
inline void tell_ranges(const rarefy_table& t, const rarefy_step& s, int64_t tile, int64_t row, int64_t rows) {
  for (int64_t done = 0; s.range.at && done < rows; done += SLAB)
    t.ranges(s.out.at + tile * s.out.tile + (row + done) * NT, std::min(SLAB, rows - done),
             s.range.at + tile * s.range.tile + (row + done) / SLAB * NT);
}

}  // namespace
