// Multiplication by sparse weights: bitmasks and CSR for few inputs, row tiles sorted by pattern for column tiles.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// ---- bitmask, few inputs -------------------------------------------------------------------------------------------
// Four rows by 64 columns at a time: their values are contiguous, so that memory is read in one stream. The position of
// each cell's values follows from a popcount of the mask alone, so cells do not depend on each other.

template <int DTYPE, int INPUTS>
inline void bitmask_rows(const rarefy_bitmask& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  using B = BitmaskOps<DTYPE>;
  typename B::acc acc[TILE_ROWS][INPUTS];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = B::zero();
  const uint64_t* mask = w.masks + row * w.col_blocks;
  const auto* value = static_cast<const typename B::value*>(w.values) + w.starts[row / TILE_ROWS];
  const auto zeros = B::zeros();
  const auto* in = static_cast<const typename B::input*>(x);
  for (int64_t block = 0; block < w.col_blocks; ++block, in += 64, mask += TILE_ROWS) {
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 4
      for (int column = 0; column < 64; column += B::CELL) {
        const auto* cell = column ? value + __builtin_popcountll(mask[r] << (64 - column)) : value;
        const auto dense = B::expand(zeros, reinterpret_cast<const char*>(mask + r) + column / 8, cell);
#pragma GCC unroll 4
        for (int m = 0; m < INPUTS; ++m) acc[r][m] = B::multiply_add(acc[r][m], dense, in + m * ldx + column);
      }
      value += __builtin_popcountll(mask[r]);
      prefetch_ahead(value);
    }
    prefetch_ahead(mask);
  }
  for (int r = 0; r < TILE_ROWS && row + r < w.rows; ++r)
    for (int m = 0; m < INPUTS; ++m) y[m * ldy + row + r] = B::reduce(acc[r][m]);
}

// int4: the 64 values of a row in a block become int8 in a register; the scale is applied to their integer dot product.
template <int INPUTS>
inline void int4_bitmask_rows(const rarefy_bitmask& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  F32Accumulator::acc acc[TILE_ROWS][INPUTS];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = F32Accumulator::zero();
  const uint64_t* mask = w.masks + row * w.col_blocks;
  const uint8_t* value = static_cast<const uint8_t*>(w.values) + w.starts[row / TILE_ROWS];
  const uint16_t* scale = static_cast<const uint16_t*>(w.scales) + row * w.col_blocks;
  const auto zeros = Int4BitmaskOps::zeros();
  const uint8_t* in = static_cast<const uint8_t*>(x);
  for (int64_t block = 0; block < w.col_blocks; ++block, in += 64, mask += TILE_ROWS, scale += TILE_ROWS) {
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r) {
      const auto dense = Int4BitmaskOps::expand(zeros, mask + r, value);
      const float s = from_bf16(scale[r]);
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) acc[r][m] = Int4BitmaskOps::multiply_add(acc[r][m], dense, in + m * ldx, s);
      value += (__builtin_popcountll(mask[r]) + 1) / 2;
    }
    prefetch_ahead(value);
    prefetch_ahead(mask);
  }
  for (int r = 0; r < TILE_ROWS && row + r < w.rows; ++r)
    for (int m = 0; m < INPUTS; ++m) y[m * ldy + row + r] = F32Accumulator::reduce(acc[r][m]);
}

template <int DTYPE, int INPUTS>
void bitmask_row_range(const rarefy_bitmask& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                       int64_t ldy) {
  for (int64_t row = from; row < to; row += TILE_ROWS)
    if constexpr (DTYPE == RAREFY_I4)
      int4_bitmask_rows<INPUTS>(w, row, x, ldx, y, ldy);
    else
      bitmask_rows<DTYPE, INPUTS>(w, row, x, ldx, y, ldy);
}

// Rows `from` (a multiple of four) to `to` on n inputs, four of them at a time.
template <int DTYPE>
void bitmask_gemv(const rarefy_bitmask& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy,
                  int64_t n) {
  const auto* in = static_cast<const typename BitmaskOps<DTYPE == RAREFY_I4 ? int(RAREFY_I8) : DTYPE>::input*>(x);
  for (; n > 0; n -= 4, in += 4 * ldx, y += 4 * ldy) {
    if (n >= 4)
      bitmask_row_range<DTYPE, 4>(w, from, to, in, ldx, y, ldy);
    else if (n == 3)
      bitmask_row_range<DTYPE, 3>(w, from, to, in, ldx, y, ldy);
    else if (n == 2)
      bitmask_row_range<DTYPE, 2>(w, from, to, in, ldx, y, ldy);
    else
      bitmask_row_range<DTYPE, 1>(w, from, to, in, ldx, y, ldy);
  }
}

// ---- CSR, high sparsity --------------------------------------------------------------------------------------------
// Row by row, each value times INPUTS interleaved inputs. Eight accumulators hide the latency of the multiply-adds;
// scalar loads are faster than gathering a vector of inputs.

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) { return from_bf16(v); }
inline float to_float(int8_t v) { return v; }

template <int INPUTS>
struct interleaved {
  typedef float type __attribute__((vector_size(INPUTS * 4)));
};
template <>
struct interleaved<1> {
  typedef float type;
};

// y[input][row] for rows `from`..`to` and the first `count` of the inputs x[column][INPUTS].
template <class T, int INPUTS>
void csr_rows(const rarefy_csr& w, int64_t from, int64_t to, const float* x, float* y, int64_t ldy, int64_t count) {
  using V = typename interleaved<INPUTS>::type;
  constexpr int ACCUMULATORS = 8;
  for (int64_t row = from; row < to; ++row) {
    const int64_t size = w.starts[row + 1] - w.starts[row];
    const T* value = static_cast<const T*>(w.values) + w.starts[row];
    const uint16_t* column = w.columns + w.starts[row];
    V acc[ACCUMULATORS] = {}, in;
    int64_t k = 0;
    for (; k + ACCUMULATORS <= size; k += ACCUMULATORS) {
      prefetch_ahead(value + k);
      prefetch_ahead(column + k);
#pragma GCC unroll 8
      for (int s = 0; s < ACCUMULATORS; ++s) {
        std::memcpy(&in, x + column[k + s] * int64_t(INPUTS), sizeof in);
        acc[s] += in * to_float(value[k + s]);
      }
    }
    for (; k < size; ++k) {
      std::memcpy(&in, x + column[k] * int64_t(INPUTS), sizeof in);
      acc[0] += in * to_float(value[k]);
    }
    V total = ((acc[0] + acc[1]) + (acc[2] + acc[3])) + ((acc[4] + acc[5]) + (acc[6] + acc[7]));
    if (w.scales) total *= w.scales[row];
    float out[INPUTS];
    std::memcpy(out, &total, sizeof out);
    for (int64_t m = 0; m < count; ++m) y[m * ldy + row] = out[m];
  }
}

template <int INPUTS>
void csr_spmm(const rarefy_csr& w, int64_t from, int64_t to, const float* x, float* y, int64_t ldy, int64_t count) {
  switch (w.dtype) {
    case RAREFY_F32: return csr_rows<float, INPUTS>(w, from, to, x, y, ldy, count);
    case RAREFY_BF16: return csr_rows<uint16_t, INPUTS>(w, from, to, x, y, ldy, count);
    default: return csr_rows<int8_t, INPUTS>(w, from, to, x, y, ldy, count);
  }
}

// ---- row tiles, column tiles of inputs -----------------------------------------------------------------------------
// The columns of a row tile are sorted by pattern (which of the four rows are nonzero there): fifteen loops without a
// branch. Each loads VECS vectors of inputs once and uses them for every row of the pattern.

template <int DTYPE, int VECS, int PATTERN>
inline void pattern_columns(typename LaneOps<DTYPE>::acc (&acc)[TILE_ROWS][VECS], const uint32_t* x, int64_t count,
                            const uint16_t*& column, const uint32_t*& value) {
  using L = LaneOps<DTYPE>;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* lane = x + int64_t(*column++) * TILE_COLS;
    typename L::input in[VECS];
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) in[t] = L::load(lane + t * SIMD_WIDTH);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r)
      if (PATTERN >> r & 1) {
        const auto w = L::broadcast(*value++);
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], in[t], w);
      }
  }
}

template <int DTYPE, int VECS>
inline void row_tile(typename LaneOps<DTYPE>::acc (&acc)[TILE_ROWS][VECS], const uint32_t* x, const uint16_t* counts,
                     const uint16_t*& column, const uint32_t*& value) {
  pattern_columns<DTYPE, VECS, 1>(acc, x, counts[1], column, value);
  pattern_columns<DTYPE, VECS, 2>(acc, x, counts[2], column, value);
  pattern_columns<DTYPE, VECS, 3>(acc, x, counts[3], column, value);
  pattern_columns<DTYPE, VECS, 4>(acc, x, counts[4], column, value);
  pattern_columns<DTYPE, VECS, 5>(acc, x, counts[5], column, value);
  pattern_columns<DTYPE, VECS, 6>(acc, x, counts[6], column, value);
  pattern_columns<DTYPE, VECS, 7>(acc, x, counts[7], column, value);
  pattern_columns<DTYPE, VECS, 8>(acc, x, counts[8], column, value);
  pattern_columns<DTYPE, VECS, 9>(acc, x, counts[9], column, value);
  pattern_columns<DTYPE, VECS, 10>(acc, x, counts[10], column, value);
  pattern_columns<DTYPE, VECS, 11>(acc, x, counts[11], column, value);
  pattern_columns<DTYPE, VECS, 12>(acc, x, counts[12], column, value);
  pattern_columns<DTYPE, VECS, 13>(acc, x, counts[13], column, value);
  pattern_columns<DTYPE, VECS, 14>(acc, x, counts[14], column, value);
  pattern_columns<DTYPE, VECS, 15>(acc, x, counts[15], column, value);
}

// Row tiles `from`..`to` on VECS vectors of the inputs of column block `block`; `out` is [4 (to - from)][TILE_COLS].
// The first block starts the accumulators, the others add to them.
template <int DTYPE, int VECS>
void row_tiles(const rarefy_tiles& w, int64_t block, int64_t from, int64_t to, const uint32_t* x, uint32_t* out) {
  using L = LaneOps<DTYPE>;
  const int64_t blocks = (w.lanes + w.block - 1) / w.block;
  for (int64_t tile = from; tile < to; ++tile, out += TILE_ROWS * TILE_COLS) {
    const int64_t index = tile * blocks + block;
    const uint16_t* column = w.columns + w.starts[2 * index];
    const uint32_t* value = w.values + w.starts[2 * index + 1];
    typename L::acc acc[TILE_ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) acc[r][t] = block ? L::load_acc(out + r * TILE_COLS + t * SIMD_WIDTH) : L::zero();
    row_tile<DTYPE, VECS>(acc, x, w.counts + index * 16, column, value);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) L::store_acc(out + r * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
  }
}

// `columns` of the column tile are in use.
template <int DTYPE>
void tiles_spmm_block(const rarefy_tiles& w, int64_t block, int64_t from, int64_t to, const uint32_t* x, uint32_t* out,
                      int64_t columns) {
  for_each_vector_group(columns, [&](auto vectors, int64_t column) {
    row_tiles<DTYPE, vectors>(w, block, from, to, x + column, out + column);
  });
}

// The loop over column blocks is the outer one: the inputs of a block stay in the L1 cache for all row tiles.
template <int DTYPE>
void tiles_spmm(const rarefy_tiles& w, int64_t from, int64_t to, const uint32_t* x, uint32_t* out, int64_t columns) {
  for (int64_t block = 0; block * w.block < w.lanes; ++block)
    tiles_spmm_block<DTYPE>(w, block, from, to, x + block * w.block * TILE_COLS, out, columns);
}

}  // namespace
