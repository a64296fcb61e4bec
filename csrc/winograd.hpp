// Winograd convolution F(2x2, 3x3) (Lavin and Gray 2016, section 4.1): a 2x2 output tile takes 16 multiplications per
// input channel and output channel instead of 36. Output tiles are the columns of column tiles; each of the 16
// positions of a transformed tile is one GEMM.
#pragma once
#include <cstdint>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "simd.hpp"

namespace {

// Input transform: the 4x4 inputs of each channel and output tile become B^T d B, whose position k is stored at
// out + k stride. Like gather_lanes it writes up to SEGMENT_FLOATS past a row, and reads as much past the planes.
void winograd_input(const float* x, const int32_t* offsets, int64_t inputs, const rarefy_segment* segments, int count,
                    float* out, int64_t stride) {
  for (int64_t c = 0; c < inputs; ++c, offsets += 16, out += TILE_COLS)
    for (int p = 0; p < count; ++p)
      for (int64_t n = 0; n < segments[p].size; n += SIMD_WIDTH) {
        const float* source = x + segments[p].source + n;
        float* to = out + segments[p].column + n;
        auto in = [&](int i, int j) { return load_vec(source + offsets[4 * i + j]); };
        auto row = [&](int i, auto combine) {
          const f32_vec a = combine(0), b = combine(1), c = combine(2), d = combine(3);
          store_vec(to + 4 * i * stride, a - c);
          store_vec(to + (4 * i + 1) * stride, b + c);
          store_vec(to + (4 * i + 2) * stride, c - b);
          store_vec(to + (4 * i + 3) * stride, b - d);
        };
        row(0, [&](int j) { return in(0, j) - in(2, j); });
        row(1, [&](int j) { return in(1, j) + in(2, j); });
        row(2, [&](int j) { return in(2, j) - in(1, j); });
        row(3, [&](int j) { return in(1, j) - in(3, j); });
      }
}

// Output transform of one output channel: act(A^T m A + bias + residual), two rows of pixels [2][2 TILE_COLS]. The
// residual has the same layout.
void winograd_output(const float* products, int64_t stride, int64_t tiles, float bias, const float* residual, int act,
                     float* out) {
  for (int64_t n = 0; n < tiles; n += SIMD_WIDTH) {
    auto row = [&](int64_t pixel_row, auto combine) {
      const f32_vec s0 = combine(0), s1 = combine(1), s2 = combine(2), s3 = combine(3);
      const f32_vec even = s0 + s1 + s2, odd = s1 - s2 - s3;
      float interleaved[2 * SIMD_WIDTH];
      for (int i = 0; i < SIMD_WIDTH; ++i) {
        interleaved[2 * i] = even[i];
        interleaved[2 * i + 1] = odd[i];
      }
      for (int64_t half = 0; half < 2 * SIMD_WIDTH; half += SIMD_WIDTH) {
        const int64_t offset = pixel_row * 2 * TILE_COLS + 2 * n + half;
        f32_vec v = load_vec(interleaved + half) + bias;
        if (residual) v += load_vec(residual + offset);
        store_vec(out + offset, activate(v, act));
      }
    };
    auto m = [&](int i, int j) { return load_vec(products + (4 * i + j) * stride + n); };
    row(0, [&](int j) { return m(0, j) + m(1, j) + m(2, j); });
    row(1, [&](int j) { return m(1, j) - m(2, j) - m(3, j); });
  }
}

}  // namespace
