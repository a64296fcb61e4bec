// Quantized weights times column tiles whose inputs have an int8 scale for each 32 features: nearly as exact as two
// terms, with half of the products. Sums of 32 products are exact; scaled, they are added up in fp32.
//
// A tile of inputs: signed codes in lanes, in whole blocks of 16; behind them for each 8 lanes the scales of the
// columns, and what the offset of the weights adds to the sums, negated. Weights are stored as codes + 128 in blocks,
// see dense_gemm.hpp; those whose zero points have a fraction as codes in eighths, whose offset is the zero point.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dense_gemm.hpp"
#include "kernel_table.h"
#include "simd.hpp"
#include "tile_ops.hpp"
#include "weight_decompress.hpp"

namespace {

constexpr int64_t PARTS = 2, PART_LANES = DENSE_LANES / PARTS, PART_FEATURES = 4 * PART_LANES;  // of a block
constexpr int64_t HEADER = 2 * TILE_COLS;  // words of a part that are no codes

constexpr int64_t BLOCKED_IN_L1 = 4;  // blocks whose inputs and weights stay in the L1 cache for all rows

// Four features of a column as signed codes in a lane; `sum` grows by the codes.
inline u32_vec signed_lane(const float* x, int64_t features, f32_vec inverse, u32_vec& sum) {
  u32_vec lane{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    const u32_vec code = rounded_bits(i < features ? load_vec(x + i * TILE_COLS) * inverse : f32_vec{}) -
                         __builtin_bit_cast(uint32_t, ROUND_TO_INTEGER);
    sum += code;
    lane |= (code & 255u) << uint32_t(8 * i);
  }
  return lane;
}

void quantize_blocks(const float* x, int64_t features, int64_t columns, uint32_t* out) {
  const int64_t parts = (features + 63) / 64 * PARTS;
  uint32_t* header = out + parts * PART_LANES * TILE_COLS;
  for (int64_t p = 0; p < parts; ++p, x += PART_FEATURES * TILE_COLS, header += HEADER) {
    const int64_t here = std::min(PART_FEATURES, features - p * PART_FEATURES);  // may be negative
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
      i32_vec max{};
      for (int64_t f = 0; f < here; ++f) max = larger_magnitude(max, load_vec(x + f * TILE_COLS + n));
      f32_vec scale = f32_vec(max) * (1.0f / 127.0f);
      scale = scale < MIN_INPUT_SCALE ? f32_vec{} + MIN_INPUT_SCALE : scale + (scale - scale);  // infinity becomes NaN
      const f32_vec inverse = 1.0f / scale;
      u32_vec sum{};
      for (int64_t l = 0; l < PART_LANES; ++l)
        store_raw(out + (p * PART_LANES + l) * TILE_COLS + n,
                  raw_vec(signed_lane(x + 4 * l * TILE_COLS + n, here - 4 * l, inverse, sum)));
      store_vec(reinterpret_cast<float*>(header) + n, scale);
      store_raw(header + TILE_COLS + n, raw_vec(sum * -128u));
    }
  }
}

// ROWS rows, four or eight, times VECS vectors of inputs, for some blocks. `next`: where the next sixteen rows begin.
// `scales`: of the weights, GROUPS for each row of a block, those of the next four rows `stride` behind. `zeros`: with
// EIGHTHS, likewise.
template <int ROWS, int VECS, int GROUPS, bool EIGHTHS>
inline void blocked_rows(const uint32_t* values, const uint16_t* scales, const uint8_t* zeros, int64_t stride,
                         int64_t blocks, int64_t next, bool accumulate, const uint32_t* x, const uint32_t* header,
                         float* out) {
  using L = LaneOps<RAREFY_I8>;
  const auto cell = [&](int r, int64_t part) { return r / 4 * stride + r % 4 * GROUPS + (GROUPS == 2 ? part : 0); };
  for (int64_t b = 0; b < blocks; ++b, values += DENSE_BLOCK, scales += TILE_ROWS * GROUPS) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(values + next + r * DENSE_LANES, 0, 3);
    for (int64_t part = 0; part < PARTS; ++part, header += HEADER) {
      L::acc acc[ROWS][VECS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) {
          acc[r][t] = L::load_acc(header + TILE_COLS + t * SIMD_WIDTH);
          if constexpr (EIGHTHS) acc[r][t] = L::acc((i32_vec(acc[r][t]) >> 7) * int32_t(zeros[cell(r, part)]));
        }
#pragma GCC unroll 8
      for (int64_t l = 0; l < PART_LANES; ++l, x += TILE_COLS) {
        L::input in[VECS];
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) in[t] = L::load(x + t * SIMD_WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const auto w = L::broadcast(values[r * DENSE_LANES + part * PART_LANES + l]);
#pragma GCC unroll 4
          for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], w, in[t]);  // w is the unsigned one
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const float scale = GROUPS ? from_bf16(scales[cell(r, part)]) : 1.0f;
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) {
          float* sums = out + r * TILE_COLS + t * SIMD_WIDTH;
          f32_vec v = __builtin_convertvector(i32_vec(acc[r][t]), f32_vec);
          if constexpr (GROUPS != 0) v *= scale;
          v *= load_vec(reinterpret_cast<const float*>(header) + t * SIMD_WIDTH);
          store_vec(sums, accumulate || b + part > 0 ? load_vec(sums) + v : v);
        }
      }
    }
    if constexpr (EIGHTHS) zeros += TILE_ROWS * GROUPS;
  }
}

template <int GROUPS, bool EIGHTHS = false>
void blocked_sums(const rarefy_quantized& w, int64_t row, const uint32_t* values, int64_t rows, const uint32_t* x,
                  int64_t columns, float* out) {
  const int64_t blocks = w.col_blocks;
  const uint32_t* headers = x + blocks * DENSE_LANES * TILE_COLS;
  for (int64_t b = 0; b < blocks; b += BLOCKED_IN_L1)
    for_each_vector_group(columns, [&](auto vectors, int64_t column) {
      const auto multiply = [&](auto count, int64_t r) {
        const int64_t first = ((row + r) * blocks + b * TILE_ROWS) * GROUPS;
        blocked_rows<count, vectors, GROUPS, EIGHTHS>(
            values + (r / DENSE_ROWS * blocks + b) * DENSE_BLOCK + r % DENSE_ROWS * DENSE_LANES, w.scales + first,
            EIGHTHS ? w.zeros + first : nullptr, blocks * TILE_ROWS * GROUPS, std::min(BLOCKED_IN_L1, blocks - b),
            blocks * DENSE_BLOCK, b > 0, x + b * DENSE_LANES * TILE_COLS + column,
            headers + b * PARTS * HEADER + column, out + r * TILE_COLS + column);
      };
      constexpr int TOGETHER = vectors == 1 ? 8 : TILE_ROWS;  // sums enough to hide the latency of products
      int64_t r = 0;
      for (; r + TOGETHER <= rows; r += TOGETHER) multiply(std::integral_constant<int, TOGETHER>{}, r);
      if (r < rows) multiply(std::integral_constant<int, TILE_ROWS>{}, r);
    });
}

// Rows `row` on, whose codes `values` are decompressed, times a tile of inputs: sums [rows][TILE_COLS], without the
// weight's scales of rows.
void multiply_blocked(const rarefy_quantized& w, int64_t row, const uint32_t* values, int64_t rows, const uint32_t* x,
                      int64_t columns, float* out) {
  switch (w.scale_groups) {
    case 0: return blocked_sums<0>(w, row, values, rows, x, columns, out);
    case 1: return blocked_sums<1>(w, row, values, rows, x, columns, out);
    default:
      if (w.zero_bits) return blocked_sums<2, true>(w, row, values, rows, x, columns, out);
      return blocked_sums<2>(w, row, values, rows, x, columns, out);
  }
}

}  // namespace
