// Decompression of bitmask and quantized weights into dense fp32 row tiles [lanes][4], and the dense GEMM that
// multiplies column tiles by them; int8 into the blocks of dense_gemm.hpp. So one stored copy of a weight serves single
// tokens and long prompts.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dense_gemm.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

constexpr int64_t GEMM_BLOCK = 128;  // lanes of inputs that stay in the L1 cache

// 64 values of one row as fp32 lanes; `out` is that row's element of the first lane.
template <class T, class F>
inline void store_f32_lanes(const T (&values)[64], uint32_t* out, F&& to_f32) {
  for (int64_t c = 0; c < 64; ++c) out[c * TILE_ROWS] = __builtin_bit_cast(uint32_t, float(to_f32(values[c])));
}

// 64 values of the r-th of four rows; `out` is the first row's place in a block.
inline void store_int8_lanes(const void* values, int64_t r, uint32_t* out) {
  std::memcpy(out + r * DENSE_LANES, values, 4 * DENSE_LANES);
}

// As store_int8_lanes, widened to 16 bits, in two blocks.
inline void store_wide_lanes(const int8_t (&values)[64], int64_t r, uint32_t* out) {
  int16_t wide[64];
  for (int64_t c = 0; c < 64; ++c) wide[c] = values[c];
  for (int64_t half = 0; half < 2; ++half)
    std::memcpy(out + half * DENSE_BLOCK + r * DENSE_LANES, wide + 32 * half, 4 * DENSE_LANES);
}

// A number that is finite, rounded to the nearest even bf16.
inline uint32_t round_bits_to_bf16(float f) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, f);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// Four rows from `row` on. int8 stays int8, in blocks; all other types become fp32.
template <int DTYPE>
void decompress_bitmask(const rarefy_bitmask& w, int64_t row, uint32_t* out) {
  const uint64_t* mask = w.masks + row * w.col_blocks;
  if constexpr (DTYPE == RAREFY_I4) {
    const uint8_t* value = static_cast<const uint8_t*>(w.values) + w.starts[row / TILE_ROWS];
    const uint16_t* scale = static_cast<const uint16_t*>(w.scales) + row * w.col_blocks;
    const auto zeros = Int4BitmaskOps::zeros();
    for (int64_t block = 0; block < w.col_blocks; ++block, out += 64 * TILE_ROWS)
      for (int r = 0; r < TILE_ROWS; ++r, ++mask, ++scale) {
        alignas(64) int8_t values[64];
        const auto dense = Int4BitmaskOps::expand(zeros, mask, value);
        std::memcpy(values, &dense, 64);
        const float s = from_bf16(*scale);
        store_f32_lanes(values, out + r, [&](int8_t v) { return v * s; });
        value += (__builtin_popcountll(*mask) + 1) / 2;
      }
  } else {
    using B = BitmaskOps<DTYPE>;
    using T = typename B::value;
    const T* value = static_cast<const T*>(w.values) + w.starts[row / TILE_ROWS];
    const auto zeros = B::zeros();
    for (int64_t block = 0; block < w.col_blocks; ++block, out += DTYPE == RAREFY_I8 ? DENSE_BLOCK : 64 * TILE_ROWS)
      for (int r = 0; r < TILE_ROWS; ++r, ++mask) {
        alignas(64) T values[64];
        for (int column = 0; column < 64; column += B::CELL) {
          const T* cell = column ? value + __builtin_popcountll(*mask << (64 - column)) : value;
          const auto dense = B::expand(zeros, reinterpret_cast<const char*>(mask) + column / 8, cell);
          std::memcpy(values + column, &dense, sizeof(T) * B::CELL);
        }
        value += __builtin_popcountll(*mask);
        if constexpr (DTYPE == RAREFY_F32)
          store_f32_lanes(values, out + r, [](float v) { return v; });
        else if constexpr (DTYPE == RAREFY_BF16)
          store_f32_lanes(values, out + r, [](uint16_t v) { return from_bf16(v); });
        else
          store_int8_lanes(values, r, out);
      }
  }
}

// 64 dequantized values as bf16, of the r-th of four rows; `out` is the first row's place in the first of two blocks.
inline void store_bf16_lanes(const float (&values)[64], int64_t r, uint32_t* out) {
  for (int64_t half = 0; half < 2; ++half) {
    uint32_t lanes[DENSE_LANES];
    for (int64_t l = 0; l < DENSE_LANES; ++l)
      lanes[l] = round_bits_to_bf16(values[32 * half + 2 * l]) | round_bits_to_bf16(values[32 * half + 2 * l + 1])
                                                                     << 16;
    std::memcpy(out + half * DENSE_BLOCK + r * DENSE_LANES, lanes, sizeof lanes);
  }
}

// As decompress_quantized, of values of BITS bits; OFFSET: int8 codes plus 128, or codes as they are, in eighths.
template <int DTYPE, int BITS, bool OFFSET>
void decompress_values(const rarefy_quantized& w, int64_t row, uint32_t* out) {
  const QuantizedOps<BITS> ops{w.scale_groups};
  const int64_t first = row * w.col_blocks, groups = w.scale_groups;
  const uint8_t* values_of = static_cast<const uint8_t*>(w.values);
  for (int64_t cell = first; cell < first + TILE_ROWS * w.col_blocks; ++cell) {
    const int64_t r = cell % TILE_ROWS;
    prefetch_ahead(values_of + cell * 8 * BITS);
    alignas(64) int8_t codes[64];
    const auto loaded = ops.load(values_of + (cell - r) * 8 * BITS, r, ops.zero_points(loaded_zeros(w, cell)));
    std::memcpy(codes, &loaded, 64);
    if constexpr (DTYPE == RAREFY_I8) {
      if constexpr (OFFSET)
        for (int8_t& code : codes) code = int8_t(w.zero_bits ? code << w.zero_bits : code ^ -128);
      store_int8_lanes(codes, r, out);
    } else if constexpr (DTYPE == RAREFY_I16) {
      store_wide_lanes(codes, r, out);
    } else {
      const float row_scale = w.row_scales && row + r < w.rows ? w.row_scales[row + r] : 1.0f;
      const float low = row_scale * (groups ? from_bf16(w.scales[cell * groups]) : 1.0f);
      const float high = groups > 1 ? row_scale * from_bf16(w.scales[cell * groups + 1]) : low;
      alignas(64) float values[64];
      const float steps = float(1 << w.zero_bits);  // of zero points with a fraction, between codes
      const uint8_t* zeros = w.zero_bits ? w.zeros + cell * groups : nullptr;
      const float zero_low = zeros ? zeros[0] : 0.0f, zero_high = zeros ? zeros[1] : 0.0f;
      for (int64_t c = 0; c < 32; ++c) values[c] = (float(codes[c]) * steps - zero_low) * low;
      for (int64_t c = 32; c < 64; ++c) values[c] = (float(codes[c]) * steps - zero_high) * high;
      if constexpr (DTYPE == RAREFY_BF16)
        store_bf16_lanes(values, r, out);
      else
        for (int64_t c = 0; c < 64; ++c) out[c * TILE_ROWS + r] = __builtin_bit_cast(uint32_t, values[c]);
    }
    if (r == TILE_ROWS - 1)
      out += DTYPE == RAREFY_I8 ? DENSE_BLOCK : DTYPE == RAREFY_F32 ? 64 * TILE_ROWS : 2 * DENSE_BLOCK;
  }
}

// Four rows from `row` on, dequantized to fp32, or to bf16 in blocks; for int8 inputs the values as int8, in blocks,
// for joined terms in 16 bits.
template <int DTYPE, bool OFFSET = false>
void decompress_quantized(const rarefy_quantized& w, int64_t row, uint32_t* out) {
  switch (w.dtype) {
    case RAREFY_I4: return decompress_values<DTYPE, 4, OFFSET>(w, row, out);
    case RAREFY_I5: return decompress_values<DTYPE, 5, OFFSET>(w, row, out);
    case RAREFY_I6: return decompress_values<DTYPE, 6, OFFSET>(w, row, out);
    default: return decompress_values<DTYPE, 8, OFFSET>(w, row, out);
  }
}

// Row tiles times VECS vectors of inputs, for one block of lanes.
template <int VECS>
void dense_row_tiles(const uint32_t* values, int64_t tile_stride, int64_t tiles, int64_t lanes, bool accumulate,
                     const uint32_t* x, uint32_t* out) {
  using L = LaneOps<RAREFY_F32>;
  for (int64_t p = 0; p < tiles; ++p, values += tile_stride, out += TILE_ROWS * TILE_COLS) {
    typename L::acc acc[TILE_ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t)
        acc[r][t] = accumulate ? L::load_acc(out + r * TILE_COLS + t * SIMD_WIDTH) : L::zero();
    for (int64_t l = 0; l < lanes; ++l) {
      typename L::input in[VECS];
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) in[t] = L::load(x + l * TILE_COLS + t * SIMD_WIDTH);
      __builtin_prefetch(values + tile_stride + l * TILE_ROWS);  // the next row tile is not contiguous to this one
#pragma GCC unroll 4
      for (int r = 0; r < TILE_ROWS; ++r) {
        const auto w = L::broadcast(values[l * TILE_ROWS + r]);
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], in[t], w);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) L::store_acc(out + r * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
  }
}

// Dense row tiles, `tile_stride` elements apart, times the first `columns` of a column tile: out [4 tiles][TILE_COLS].
void dense_gemm(const uint32_t* values, int64_t tile_stride, int64_t tiles, int64_t lanes, const uint32_t* x,
                uint32_t* out, int64_t columns) {
  for (int64_t l = 0; l < lanes; l += GEMM_BLOCK) {
    const int64_t block = std::min(GEMM_BLOCK, lanes - l);
    for_each_vector_group(columns, [&](auto vectors, int64_t column) {
      dense_row_tiles<vectors>(values + l * TILE_ROWS, tile_stride, tiles, block, l > 0, x + l * TILE_COLS + column,
                               out + column);
    });
  }
}

}  // namespace
