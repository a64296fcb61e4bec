// Dense weights times few columns of a column tile, in whole vectors of weights: of fp32 each is read once for all
// columns, of bf16 and int8 once for each.
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

constexpr int LANE_GEMV_ROWS = SIMD_WIDTH == 16 ? 16 : 8;  // of a block, whose sums are kept in registers
constexpr int64_t LANE_GEMV_AHEAD = 512;  // lanes beyond PREFETCH_BYTES: few instructions work on each byte

// out = the sum of vectors.
template <class V>
inline void store_sum(const raw_vec (&vectors)[SIMD_WIDTH], uint32_t* out) {
  V sums[2] = {__builtin_bit_cast(V, vectors[0]), __builtin_bit_cast(V, vectors[1])};
  for (int i = 2; i < SIMD_WIDTH; ++i) sums[i % 2] += __builtin_bit_cast(V, vectors[i]);
  store_raw(out, __builtin_bit_cast(raw_vec, sums[0] + sums[1]));
}

// One row of lanes [lane_blocks][16] times `rows` rows of blocks of 16 rows by 16 lanes: acc[row * TILE_COLS].
template <int DTYPE>
void lanes_gemv(const uint32_t* values, int64_t lane_blocks, int64_t rows, const uint32_t* x, uint32_t* acc) {
  using L = LaneOps<DTYPE>;
  using weight = decltype(L::broadcast(0u));
  for (int64_t first = 0; first < rows; first += LANE_GEMV_ROWS) {
    const uint32_t* block = values + first / 16 * lane_blocks * 256 + first % 16 * 16;
    typename L::acc sums[LANE_GEMV_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < LANE_GEMV_ROWS; ++r) sums[r] = L::zero();
    for (int64_t b = 0; b < lane_blocks; ++b, block += 256)
      for (int l = 0; l < 16; l += SIMD_WIDTH) {
        const auto in = typename L::input(L::load(x + b * 16 + l));
#pragma GCC unroll 16
        for (int r = 0; r < LANE_GEMV_ROWS; ++r) {
          if (l == 0) prefetch_ahead(block + r * 16 + LANE_GEMV_AHEAD);
          sums[r] = L::multiply_add(sums[r], in, weight(L::load(block + r * 16 + l)));
        }
      }
    for (int r = 0; r < LANE_GEMV_ROWS; r += SIMD_WIDTH) {
      raw_vec square[SIMD_WIDTH];
      for (int i = 0; i < SIMD_WIDTH; ++i) square[i] = __builtin_bit_cast(raw_vec, sums[r + i]);
      transpose(square);
      alignas(64) uint32_t totals[SIMD_WIDTH];
      if constexpr (DTYPE == RAREFY_I8 || DTYPE == RAREFY_I16)
        store_sum<u32_vec>(square, totals);
      else
        store_sum<f32_vec>(square, totals);
      for (int i = 0; i < SIMD_WIDTH; ++i) acc[(first + r + i) * TILE_COLS] = totals[i];
    }
  }
}

}  // namespace
