// Single values, larger batches: SELL-C-sigma (Kreutzer et al. 2014) with slices of two rows, sorted within slabs, and
// columns cut into blocks whose inputs stay in the first cache. A value is multiplied by vectors that lie there, and
// loops end where the one before did, mostly: that is what bounds tiles whose columns share few rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#include "tile_ops.hpp"

namespace {

// One block of columns for the rows of a slab on T vectors of inputs; `out` is [SLAB][NT] sums. `end`: they are whole
// now, and become outputs.
template <int KIND, int T>
void sell_part(const uint16_t* counts, const uint8_t* order, const uint16_t* column, const uint32_t* value, int64_t pairs,
               bool begun, const uint32_t* x, uint32_t* out, const rarefy_end* end, int64_t lane) {
  using L = Lanes<KIND>;
  constexpr int R = T > 4 ? 1 : 2;  // rows at a time
  for (int64_t p = 0; p < pairs; column += 2 * counts[p], value += 2 * counts[p], ++p, order += 2)
    for (int first = 0; first < 2; first += R) {
      const uint8_t* row = order + first;
      typename L::sum c[R][T];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) c[r][t] = begun ? L::sum_at(out + row[r] * NT + t * W) : L::zero();
      const uint16_t* from = column + first;
      const uint32_t* by = value + first;
      for (int64_t i = counts[p]; i > 0; --i, from += 2, by += 2)
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const uint32_t* at = x + int64_t(from[r]) * NT;
          const auto w = L::spread(by[r]);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) c[r][t] = L::step(c[r][t], L::load(at + t * W), w);
        }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
        if (end) {
          finish_row<KIND>(c[r], *end, row[r], lane, reinterpret_cast<float*>(out + row[r] * NT));
        } else {
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) L::store(out + row[r] * NT + t * W, c[r][t]);
        }
    }
}

// The rows of a slab on one block of `columns` of inputs, whole vectors of them.
template <int KIND>
void sell_block(const rarefy_sell& w, int64_t slab, int64_t b, const uint32_t* x, uint32_t* out, int64_t columns,
                const rarefy_end* end) {
  const int64_t pairs = (std::min(SLAB, w.rows - slab * SLAB) + 1) / 2;
  const int64_t at = slab * ((w.cols + w.block - 1) / w.block) + b, from = w.starts[at] * 2;
  int64_t left = (columns + W - 1) / W, v = 0;
  auto part = [&](auto size) {
    constexpr int T = decltype(size)::value;
    sell_part<KIND, T>(w.counts + at * (SLAB / 2), w.order + at * SLAB, w.columns + from, w.values + from, pairs, b > 0,
                       x + v * W, out + v * W, end, v * W);
    left -= T;
    v += T;
  };
  if constexpr (MOST == 2)
    while (left >= 8) part(std::integral_constant<int, 8>{});
  while (left >= 4) part(std::integral_constant<int, 4>{});
  if (left >= 2) part(std::integral_constant<int, 2>{});
  if (left >= 1) part(std::integral_constant<int, 1>{});
}

template <int KIND>
void sell_any(const rarefy_sell& w, int64_t slab, const uint32_t* x, uint32_t* out, int64_t columns,
              const rarefy_end* end) {
  for (int64_t b = 0; b * w.block < w.cols; ++b)
    sell_block<KIND>(w, slab, b, x + b * w.block * NT, out, columns, (b + 1) * w.block >= w.cols ? end : nullptr);
}

template <int KIND>
void sell_one(const rarefy_sell& w, int64_t b, int64_t from, int64_t to, const uint32_t* x, uint32_t* out,
              int64_t columns, const rarefy_end* end) {
  rarefy_end here{};
  if (end) here = *end;
  for (int64_t s = from; s < to; ++s, out += SLAB * NT) {
    sell_block<KIND>(w, s, b, x, out, columns, end ? &here : nullptr);
    here.bias += here.bias ? SLAB : 0;
    here.more += here.more ? SLAB * NT : 0;
    here.scales += here.scales ? SLAB : 0;
    here.sums += here.sums ? SLAB : 0;
    here.rows -= SLAB;
  }
}

}  // namespace
