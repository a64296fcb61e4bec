// Dense weights of bf16, int8 and int16 on column tiles: blocks of 16 rows by 16 lanes, 32 rows at a time, and the
// epilogue that turns their sums into outputs. amx.cpp has the same multiplication on AMX tiles.
#pragma once
#include <algorithm>
#include <cstdint>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

constexpr int64_t DENSE_ROWS = 16, DENSE_LANES = 16;  // of a block
constexpr int64_t DENSE_BLOCK = DENSE_ROWS * DENSE_LANES;
constexpr int64_t BLOCKS_IN_L1 = 6;  // blocks whose inputs, 4 KB each, stay in the L1 cache for all rows

// Four rows times VECS vectors of inputs, for some blocks; `values` points to the first row in the first block. `next`:
// where the same rows of the next sixteen begin, which are prefetched.
template <int DTYPE, int VECS>
inline void dense_rows(const uint32_t* values, int64_t blocks, int64_t next, bool accumulate, const uint32_t* x,
                       uint32_t* out) {
  using L = LaneOps<DTYPE>;
  typename L::acc acc[TILE_ROWS][VECS];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t)
      acc[r][t] = accumulate ? L::load_acc(out + r * TILE_COLS + t * SIMD_WIDTH) : L::zero();
  for (int64_t b = 0; b < blocks; ++b, values += DENSE_BLOCK) {
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r) __builtin_prefetch(values + next + r * DENSE_LANES, 0, 3);
    for (int64_t l = 0; l < DENSE_LANES; ++l, x += TILE_COLS) {
      typename L::input in[VECS];
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) in[t] = L::load(x + t * SIMD_WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < TILE_ROWS; ++r) {
        const auto w = L::broadcast(values[r * DENSE_LANES + l]);
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], in[t], w);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) L::store_acc(out + r * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
}

template <int DTYPE>
void dense_lanes(const uint32_t* values, int64_t lane_blocks, int64_t rows, const uint32_t* x, uint32_t* acc,
                 int64_t columns) {
  for (int64_t b = 0; b < lane_blocks; b += BLOCKS_IN_L1)
    for_each_vector_group<DTYPE == RAREFY_I16 ? 2 : 3>(columns, [&](auto vectors, int64_t column) {
      for (int64_t r = 0; r < rows; r += TILE_ROWS)
        dense_rows<DTYPE, vectors>(
            values + (r / DENSE_ROWS * lane_blocks + b) * DENSE_BLOCK + r % DENSE_ROWS * DENSE_LANES,
            std::min(BLOCKS_IN_L1, lane_blocks - b), lane_blocks * DENSE_BLOCK, b > 0,
            x + b * DENSE_LANES * TILE_COLS + column, acc + r * TILE_COLS + column);
    });
}

// Outputs of one vector of a row from its accumulators.
template <int DTYPE, int ACT>
inline f32_vec dense_output(const rarefy_tile_epilogue& e, const uint32_t* acc, int64_t row, int64_t n,
                            f32_vec col_scale) {
  const int64_t at = row * TILE_COLS + n;
  f32_vec v = load_vec(reinterpret_cast<const float*>(acc) + at);
  if constexpr (DTYPE == RAREFY_I8) {
    const uint32_t zero_point_term = uint32_t(e.row_sums[row]) * uint32_t(INPUT_ZERO_POINT + e.zero);
    v = __builtin_convertvector(i32_vec(u32_vec(v) - zero_point_term), f32_vec) * (col_scale * e.row_scales[row]);
  } else if constexpr (DTYPE != RAREFY_BF16) {
    if constexpr (DTYPE == RAREFY_I16) v = __builtin_convertvector(i32_vec(v), f32_vec);
    v = v * col_scale * e.row_scales[row];  // the product of scales may be denormal
  }
  if (e.bias) v += e.bias[row];
  if (e.residual) v += load_vec(e.residual + at);
  return activate_fast(v, ACT);
}

template <int DTYPE, int ACT>
void store_dense_outputs(const rarefy_tile_epilogue& e, const uint32_t* acc, const rarefy_tile_outputs& o) {
  for (int64_t r = 0; r < e.rows; r += TILE_ROWS)
    for (int64_t n = 0; n < e.columns; n += SIMD_WIDTH) {
      const f32_vec col_scale = DTYPE == RAREFY_BF16 ? f32_vec{} : load_vec(e.col_scales + n);
      f32_vec out[TILE_ROWS];
#pragma GCC unroll 4
      for (int64_t i = 0; i < TILE_ROWS; ++i)  // rows that do not exist repeat the last one
        out[i] = dense_output<DTYPE, ACT>(e, acc, std::min(r + i, e.rows - 1), n, col_scale);
      if (o.out)
#pragma GCC unroll 4
        for (int64_t i = 0; i < TILE_ROWS; ++i) store_vec(o.out + std::min(r + i, e.rows - 1) * TILE_COLS + n, out[i]);
      if (o.absmax) {
        i32_vec max = i32_vec(load_vec(o.absmax + n));
#pragma GCC unroll 4
        for (int64_t i = 0; i < TILE_ROWS; ++i) max = larger_magnitude(max, out[i]);
        store_vec(o.absmax + n, f32_vec(max));
      }
      if (o.codes) {
        u32_vec bits[TILE_ROWS];
#pragma GCC unroll 4
        for (int64_t i = 0; i < TILE_ROWS; ++i) bits[i] = static_code(out[i], o.inverse_scale, o.zero);
        store_raw(o.codes + r / 4 * TILE_COLS + n, pack_codes(bits[0], bits[1], bits[2], bits[3]));
      }
      if (o.bf16)
#pragma GCC unroll 2
        for (int64_t i = 0; i < TILE_ROWS; i += 2) {
          const f32_vec low = r + i < e.rows ? out[i] : f32_vec{}, high = r + i + 1 < e.rows ? out[i + 1] : f32_vec{};
          store_raw(o.bf16 + (r + i) / 2 * TILE_COLS + n, pack_bf16(low, high));
        }
    }
}

// Outputs from accumulators [rows][TILE_COLS] of bf16 (sums in fp32), int8 or int16; of fp32, sums of codes.
template <int DTYPE>
void store_outputs(const rarefy_tile_epilogue& e, const uint32_t* acc, const rarefy_tile_outputs& o) {
  with_activation(e.act, [&](auto act) { store_dense_outputs<DTYPE, act>(e, acc, o); });
}

void add_sums(const uint32_t* sums, int64_t count, bool add, float* out) {
  for (int64_t i = 0; i < count; i += SIMD_WIDTH) {
    const f32_vec v = __builtin_convertvector(i32_vec(load_raw(sums + i)), f32_vec);
    store_vec(out + i, add ? load_vec(out + i) + v : v);
  }
}

void begin_dense(rarefy_dense_state*) {}
void end_dense(const rarefy_dense_state*) {}

}  // namespace
