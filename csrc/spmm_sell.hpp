// Multiplication of column tiles by SELL-C-sigma weights (Kreutzer et al. 2014): slices of two rows, sorted within
// slabs; column blocks whose inputs stay in the L1 cache. Consecutive slices have about the same length, so that branch
// prediction finds the ends of the loops. Mispredictions there bound the row tiles whose rows share few columns.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// The pairs of rows of a slab in one column block, on VECS vectors of inputs; `out` is [SLAB_ROWS][TILE_COLS].
// `accumulate`: add to what is there. `epilogue`: this is the last block, apply it; or null.
template <int DTYPE, int VECS>
void sell_pairs(const uint16_t* counts, const uint8_t* order, const uint16_t* column, const uint32_t* value,
                int64_t pairs, bool accumulate, const uint32_t* x, uint32_t* out, const rarefy_tile_epilogue* epilogue,
                int64_t first_column) {
  using L = LaneOps<DTYPE>;
  constexpr int ROWS = VECS > 4 ? 1 : 2;  // processed together
  for (int64_t p = 0; p < pairs; column += 2 * counts[p], value += 2 * counts[p], ++p, order += 2)
    for (int first = 0; first < 2; first += ROWS) {
      const uint8_t* row = order + first;
      typename L::acc acc[ROWS][VECS];
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < VECS; ++t)
          acc[r][t] = accumulate ? L::load_acc(out + row[r] * TILE_COLS + t * SIMD_WIDTH) : L::zero();
      const uint16_t* c = column + first;
      const uint32_t* v = value + first;
      for (int64_t i = counts[p]; i > 0; --i, c += 2, v += 2)
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; ++r) {
          const uint32_t* lane = x + int64_t(c[r]) * TILE_COLS;
          const auto w = L::broadcast(v[r]);
#pragma GCC unroll 8
          for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], L::load(lane + t * SIMD_WIDTH), w);
        }
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r)
        if (epilogue) {
          tile_row_epilogue<DTYPE>(acc[r], *epilogue, row[r], first_column,
                                   reinterpret_cast<float*>(out + row[r] * TILE_COLS));
        } else {
#pragma GCC unroll 8
          for (int t = 0; t < VECS; ++t) L::store_acc(out + row[r] * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
        }
    }
}

// One slab in one column block, on whole vectors of the first `columns` of the column tile.
template <int DTYPE>
void sell_slab_block(const rarefy_sell& w, int64_t slab, int64_t block, const uint32_t* x, uint32_t* out,
                     int64_t columns, const rarefy_tile_epilogue* epilogue) {
  const int64_t pairs = (std::min(SLAB_ROWS, w.rows - slab * SLAB_ROWS) + 1) / 2;
  const int64_t index = slab * ((w.lanes + w.block - 1) / w.block) + block, start = w.starts[index] * 2;
  int64_t left = (columns + SIMD_WIDTH - 1) / SIMD_WIDTH, v = 0;
  auto take = [&](auto vectors) {
    constexpr int VECS = decltype(vectors)::value;
    sell_pairs<DTYPE, VECS>(w.counts + index * (SLAB_ROWS / 2), w.order + index * SLAB_ROWS, w.columns + start,
                            w.values + start, pairs, block > 0, x + v * SIMD_WIDTH, out + v * SIMD_WIDTH, epilogue,
                            v * SIMD_WIDTH);
    left -= VECS;
    v += VECS;
  };
  if constexpr (MAX_VECS == 2)
    while (left >= 8) take(std::integral_constant<int, 8>{});
  while (left >= 4) take(std::integral_constant<int, 4>{});
  if (left >= 2) take(std::integral_constant<int, 2>{});
  if (left >= 1) take(std::integral_constant<int, 1>{});
}

template <int DTYPE>
void sell_spmm(const rarefy_sell& w, int64_t slab, const uint32_t* x, uint32_t* out, int64_t columns,
               const rarefy_tile_epilogue* epilogue) {
  for (int64_t block = 0; block * w.block < w.lanes; ++block)
    sell_slab_block<DTYPE>(w, slab, block, x + block * w.block * TILE_COLS, out, columns,
                           (block + 1) * w.block >= w.lanes ? epilogue : nullptr);
}

// Slabs `from`..`to` in one column block; the epilogue describes the first of them.
template <int DTYPE>
void sell_spmm_block(const rarefy_sell& w, int64_t block, int64_t from, int64_t to, const uint32_t* x, uint32_t* out,
                     int64_t columns, const rarefy_tile_epilogue* epilogue) {
  rarefy_tile_epilogue slab_epilogue{};
  if (epilogue) slab_epilogue = *epilogue;
  for (int64_t slab = from; slab < to; ++slab, out += SLAB_ROWS * TILE_COLS) {
    sell_slab_block<DTYPE>(w, slab, block, x, out, columns, epilogue ? &slab_epilogue : nullptr);
    slab_epilogue.bias += slab_epilogue.bias ? SLAB_ROWS : 0;
    slab_epilogue.residual += slab_epilogue.residual ? SLAB_ROWS * TILE_COLS : 0;
    slab_epilogue.row_scales += slab_epilogue.row_scales ? SLAB_ROWS : 0;
    slab_epilogue.row_sums += slab_epilogue.row_sums ? SLAB_ROWS : 0;
    slab_epilogue.rows -= SLAB_ROWS;
  }
}

}  // namespace
