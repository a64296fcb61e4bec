// Dense fp32 weights times few columns of a column tile: weights are read in whole vectors, each once for all columns.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "simd.hpp"

namespace {

constexpr int GEMV_LANES = SIMD_WIDTH / TILE_ROWS;  // of a vector of weights

// out[l * TILE_ROWS + r] = x[l * TILE_COLS] for the four rows r that are multiplied by lane l.
void repeat_column(const float* x, int64_t lanes, float* out) {
  for (int64_t l = 0; l < lanes; ++l)
    for (int r = 0; r < TILE_ROWS; ++r) out[l * TILE_ROWS + r] = x[l * TILE_COLS];
}

// TILES row tiles times COLUMNS columns; `x` are repeated columns, x_stride floats apart.
template <int TILES, int COLUMNS>
inline void gemv_tiles(const float* values, int64_t tile_stride, int64_t lanes, const float* x, int64_t x_stride,
                       uint32_t* acc) {
  f32_vec sums[TILES][COLUMNS] = {};
  auto add = [&](int64_t l, int64_t n) {
    f32_vec in[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) in[c] = load_partial(x + c * x_stride + l * TILE_ROWS, n);
#pragma GCC unroll 8
    for (int t = 0; t < TILES; ++t) {
      const f32_vec w = load_partial(values + t * tile_stride + l * TILE_ROWS, n);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sums[t][c] += w * in[c];
    }
  };
  int64_t l = 0;
  for (; l + GEMV_LANES <= lanes; l += GEMV_LANES) add(l, SIMD_WIDTH);
  if (l < lanes) add(l, (lanes - l) * TILE_ROWS);
  for (int t = 0; t < TILES; ++t)
    for (int c = 0; c < COLUMNS; ++c) {
      float each[SIMD_WIDTH];
      store_vec(each, sums[t][c]);
      for (int r = 0; r < TILE_ROWS; ++r) {
        float sum = 0.0f;
        for (int i = 0; i < GEMV_LANES; ++i) sum += each[i * TILE_ROWS + r];
        acc[(t * TILE_ROWS + r) * TILE_COLS + c] = __builtin_bit_cast(uint32_t, sum);
      }
    }
}

template <int COLUMNS>
inline void gemv_columns(const float* values, int64_t tile_stride, int64_t row_tiles, int64_t lanes, const float* x,
                         int64_t x_stride, uint32_t* acc) {
  constexpr int TILES = SIMD_WIDTH == 16 ? 4 : 2;
  int64_t t = 0;
  for (; t + TILES <= row_tiles; t += TILES)
    gemv_tiles<TILES, COLUMNS>(values + t * tile_stride, tile_stride, lanes, x, x_stride,
                               acc + t * TILE_ROWS * TILE_COLS);
  for (; t < row_tiles; ++t)
    gemv_tiles<1, COLUMNS>(values + t * tile_stride, tile_stride, lanes, x, x_stride, acc + t * TILE_ROWS * TILE_COLS);
}

// Accumulators [rows][TILE_COLS] of up to MAX_GEMV_COLUMNS columns, which `x` repeats.
void dense_gemv(const float* values, int64_t tile_stride, int64_t row_tiles, int64_t lanes, const float* x,
                int64_t x_stride, int64_t columns, uint32_t* acc) {
  for (; columns >= 4; columns -= 4, x += 4 * x_stride, acc += 4)
    gemv_columns<4>(values, tile_stride, row_tiles, lanes, x, x_stride, acc);
  if (columns == 3) gemv_columns<3>(values, tile_stride, row_tiles, lanes, x, x_stride, acc);
  if (columns == 2) gemv_columns<2>(values, tile_stride, row_tiles, lanes, x, x_stride, acc);
  if (columns == 1) gemv_columns<1>(values, tile_stride, row_tiles, lanes, x, x_stride, acc);
}

}  // namespace
