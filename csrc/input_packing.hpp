// Inputs in the layouts that kernels read: lanes [lanes][TILE_COLS] for column tiles, zero-padded rows for few inputs,
// and the gather of a convolution's inputs out of padded planes.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// Pack rows of fp32 inputs into lanes [lanes][TILE_COLS]: SIMD_WIDTH rows at a time are converted and transposed.
// `scales`: reciprocals of the int8 scales of the rows, or null.
template <int DTYPE>
void pack_inputs(const float* x, int64_t ldx, int64_t rows, int64_t width, const float* scales, uint32_t* out) {
  using L = LaneOps<DTYPE>;
  constexpr int64_t inputs_per_lane = L::INPUTS, step = SIMD_WIDTH * inputs_per_lane;
  const int64_t lanes = (width + inputs_per_lane - 1) / inputs_per_lane;
  raw_vec square[SIMD_WIDTH];
  for (int64_t n = 0; n < rows; n += SIMD_WIDTH) {
    const int64_t num_rows = rows - n < SIMD_WIDTH ? rows - n : SIMD_WIDTH;
    for (int64_t k = 0; k < lanes; k += SIMD_WIDTH) {
      const int64_t num_lanes = lanes - k < SIMD_WIDTH ? lanes - k : SIMD_WIDTH, inputs = width - k * inputs_per_lane;
      for (int64_t i = 0; i < SIMD_WIDTH; ++i)
        square[i] = i < num_rows ? L::pack(x + (n + i) * ldx + k * inputs_per_lane, inputs < step ? inputs : step,
                                           scales ? scales[n + i] : 1.0f)
                                 : raw_vec{};
      transpose(square);
      for (int64_t i = 0; i < num_lanes; ++i) store_raw(out + (k + i) * TILE_COLS + n, square[i]);
    }
  }
}

// Convert one row of n inputs, zero-padded to `padded`. `scale`: the reciprocal of its int8 scale.
template <int DTYPE>
void convert_row(const float* x, int64_t n, int64_t padded, float scale, void* out) {
  using L = LaneOps<DTYPE>;
  constexpr int64_t step = SIMD_WIDTH * L::INPUTS;
  for (int64_t k = 0; k < padded; k += step) {
    const int64_t count = n - k < step ? (n > k ? n - k : 0) : step;
    store_raw(static_cast<uint32_t*>(out) + k / L::INPUTS, L::pack(x + (n > k ? k : 0), count, scale));
  }
}

// As convert_row to int8, in two terms: numbers of 16 bits in steps LOST_STEPS times as small where they are joined;
// else codes, and behind them those of what rounding lost.
template <bool JOINED>
void convert_row_two_terms(const float* x, int64_t n, int64_t padded, float scale, void* out) {
  if constexpr (JOINED) {
    auto* numbers = static_cast<int16_t*>(out);
    const float steps = scale * LOST_STEPS;
    int64_t i = 0;
    for (; i + 2 * SIMD_WIDTH <= n; i += 2 * SIMD_WIDTH)
      store_raw(reinterpret_cast<uint32_t*>(numbers + i),
                round_pair_to_int16(load_vec(x + i) * steps, load_vec(x + i + SIMD_WIDTH) * steps));
    for (; i < n; ++i) numbers[i] = LaneOps < JOINED ? RAREFY_I16 : RAREFY_I8 > ::round(x[i] * steps);
    std::memset(numbers + n, 0, size_t(padded - n) * 2);
  } else {
    using L = LaneOps<RAREFY_I8>;
    constexpr int64_t step = SIMD_WIDTH * L::INPUTS;
    convert_row<RAREFY_I8>(x, n, padded, scale, out);
    uint8_t* codes = static_cast<uint8_t*>(out);
    for (int64_t k = 0; k < padded; k += step) {
      const int64_t count = n - k < step ? (n > k ? n - k : 0) : step;
      alignas(64) float lost[step] = {};
      for (int64_t i = 0; i < count; ++i)
        lost[i] =
            x[k + i] * scale - float(INPUT_ZERO_POINT ? int(codes[k + i]) - INPUT_ZERO_POINT : int8_t(codes[k + i]));
      store_raw(reinterpret_cast<uint32_t*>(codes + padded + k), L::pack(lost, count, LOST_STEPS));
    }
  }
}

// The bits of the largest magnitude. Magnitudes of floats are ordered like integers, with NaN above all others.
uint32_t absmax_bits(const float* x, int64_t n) {
  uint32_t max = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
    max = magnitude > max ? magnitude : max;
  }
  return max;
}

// Every second float.
void take_even(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[2 * i];
}

// Gather lanes of a convolution's inputs into out [lanes + 1][TILE_COLS]: lane l of each segment is read from
// x + offsets[l] on, in memory that ends at `end`. Copies have a fixed size; what they write past a segment, the next
// one overwrites, and the last of a lane runs into the next row.
void gather_lanes(const float* x, const float* end, const int32_t* offsets, int64_t lanes,
                  const rarefy_segment* segments, int count, uint32_t* out) {
  const int64_t reach = segments[count - 1].source + SEGMENT_FLOATS;
  for (int64_t l = 0; l < lanes; ++l) {
    const float* lane = x + offsets[l];
    for (int64_t c = TILE_COLS; c < 2 * TILE_COLS; c += 16)  // the inputs of the next tile
      __builtin_prefetch(lane + segments[0].source + c, 0, 2);
    if (end - lane >= reach)
      for (int p = 0; p < count; ++p)
        std::memcpy(out + l * TILE_COLS + segments[p].column, lane + segments[p].source, SEGMENT_FLOATS * 4);
    else
      for (int p = 0; p < count; ++p)
        std::memcpy(out + l * TILE_COLS + segments[p].column, lane + segments[p].source, size_t(segments[p].size) * 4);
  }
}

}  // namespace
