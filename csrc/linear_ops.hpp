// Steps that multiply tiles of inputs by a weight.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t UNFOLDED = 32;  // rows that are unfolded at a time
constexpr int64_t TILES = 4;    // of inputs that unfolded rows are multiplied by

// What of a product is the same whatever its format is.
struct Product {
  explicit Product(const rarefy_step& s) {
    switch (s.flag) {
      case RAREFY_TILES: take(*static_cast<const rarefy_tiles*>(s.w)); break;
      case RAREFY_SELL: take(*static_cast<const rarefy_sell*>(s.w)); break;
      case RAREFY_DENSE: {
        const auto& w = *static_cast<const rarefy_dense*>(s.w);
        rows = w.rows;
        kind = w.kind;
        cols = w.cols;
        sums = {nullptr, nullptr, w.bias, w.act};
        break;
      }
      case RAREFY_BITMASK: {
        const auto& w = *static_cast<const rarefy_bitmask*>(s.w);
        rows = w.rows;
        kind = w.kind;
        words = w.words;
        cols = w.cols;
        const bool bytes = kind == RAREFY_I8;
        sums = {bytes ? static_cast<const float*>(w.scales) : nullptr,
                bytes ? static_cast<const int32_t*>(w.sums) : nullptr, w.bias, w.act};
        break;
      }
      default: {
        const auto& w = *static_cast<const rarefy_panels*>(s.w);
        rows = w.rows;
        kind = !w.parts && !w.exact ? RAREFY_I8 : RAREFY_F32;
        words = w.words;
        cols = w.cols;
        sums = {w.whole, s.sums, w.bias, w.act};
      }
    }
  }
  template <class T>
  void take(const T& w) {
    rows = w.rows;
    kind = w.kind;
    sums = {w.scales, w.sums, w.bias, w.act};
  }
  int64_t rows, words = 0, cols = 0;
  int32_t kind;
  rarefy_sums sums;
};

inline bool unfolds(const rarefy_step& s) { return s.flag == RAREFY_BITMASK || s.flag == RAREFY_PANELS; }

// Some rows of a weight for few inputs, unfolded once and multiplied by several tiles.
inline int run_unfolded(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const Product p(s);
  const int64_t chunks = over(p.rows, UNFOLDED), row = i % chunks * UNFOLDED, first = i / chunks * TILES;
  const int64_t rows = std::min(UNFOLDED, p.rows - row), fours = over(rows, R4);
  const bool bytes = p.kind == RAREFY_I8;
  const int64_t lanes = bytes ? over(p.cols, 4) : p.cols, apart = p.words * (bytes ? 16 : 64) * R4;
  const Scratch<1> near(size_t(fours * apart) * 4);
  uint32_t* values = static_cast<uint32_t*>(near.from);
  if (!values) return RAREFY_MEMORY;
  for (int64_t f = 0; f < fours; ++f)
    if (s.flag == RAREFY_PANELS)
      t.unfold_panels(*static_cast<const rarefy_panels*>(s.w), row + f * R4, bytes, values + f * apart);
    else
      t.unfold[p.kind](*static_cast<const rarefy_bitmask*>(s.w), row + f * R4, values + f * apart);
  for (int64_t tile = first; tile < std::min(first + TILES, over(s.columns, NT)); ++tile) {
    float* out = s.out.at + tile * s.out.tile + row * NT;
    const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
    t.dense[bytes](values, apart, fours, lanes, reinterpret_cast<const uint32_t*>(s.x.at + tile * s.x.tile),
                   reinterpret_cast<uint32_t*>(out), std::min(NT, s.columns - tile * NT), false);
    settle(t, end_of(p.sums, row, rows, s.sum.at ? s.sum.at + tile * NT : nullptr, more), bytes, out);
  }
  return RAREFY_OK;
}

inline int run_linear(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  if (unfolds(s)) return run_unfolded(t, s, i);
  const Product p(s);
  const int64_t chunks = over(p.rows, SLAB), tile = i / chunks, chunk = i % chunks, row = chunk * SLAB;
  const int64_t rows = std::min(SLAB, s.features - row), columns = std::min(NT, s.columns - tile * NT);
  float* out = s.out.at + tile * s.out.tile + row * NT;
  const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
  const auto* x = reinterpret_cast<const uint32_t*>(s.x.at + tile * s.x.tile);
  auto* sums = reinterpret_cast<uint32_t*>(out);
  const rarefy_end end = end_of(p.sums, row, rows, s.sum.at ? s.sum.at + tile * NT : nullptr, more);
  if (s.flag == RAREFY_DENSE)
    multiply(t, static_cast<const rarefy_dense*>(s.w)->values, p.cols, row, rows, 0, p.cols, x, columns, sums);
  else if (s.flag == RAREFY_SELL)
    t.sell[p.kind](*static_cast<const rarefy_sell*>(s.w), chunk, x, sums, columns, &end);
  else
    t.tiles[p.kind](*static_cast<const rarefy_tiles*>(s.w), row / R4, over(row + rows, R4), x, sums, columns);
  if (s.flag != RAREFY_SELL) settle(t, end, p.kind == RAREFY_I8, out);
  tell_ranges(t, s, tile, row, rows);
  return RAREFY_OK;
}

}  // namespace
