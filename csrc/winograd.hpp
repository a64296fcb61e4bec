// Winograd convolution F(2x2, 3x3) on fp32 images in NHWC order (Lavin and Gray 2016, section 4.1): a square of 2x2
// outputs takes 16 multiplications per input channel and output channel instead of 36. Each of the 16 positions of a
// transformed square is one product.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "simd.hpp"

namespace {

// Input transform of one square: its 4x4 pixels become B^T d B, whose position k is stored at out + k stride. Reads and
// writes whole vectors.
void winograd_input(const uint8_t* const* rows, int64_t pixel_bytes, int64_t channels, float* out, int64_t stride) {
  for (int64_t c = 0; c < channels; c += SIMD_WIDTH) {
    auto in = [&](int i, int j) {
      f32_vec v;
      std::memcpy(&v, rows[i] + j * pixel_bytes + c * 4, sizeof v);
      return v;
    };
    auto row = [&](int i, auto combine) {
      const f32_vec d0 = combine(0), d1 = combine(1), d2 = combine(2), d3 = combine(3);
      store_vec(out + 4 * i * stride + c, d0 - d2);
      store_vec(out + (4 * i + 1) * stride + c, d1 + d2);
      store_vec(out + (4 * i + 2) * stride + c, d2 - d1);
      store_vec(out + (4 * i + 3) * stride + c, d1 - d3);
    };
    row(0, [&](int j) { return in(0, j) - in(2, j); });
    row(1, [&](int j) { return in(1, j) + in(2, j); });
    row(2, [&](int j) { return in(2, j) - in(1, j); });
    row(3, [&](int j) { return in(1, j) - in(3, j); });
  }
}

// Output transform of some squares: A^T m A, where position k of a square is NHWC_OUTPUTS sums at products + k stride.
// Two rows of pixels, out and out + row_stride.
void winograd_output(const uint32_t* products, int64_t stride, int64_t squares, int64_t outputs, uint32_t* out,
                     int64_t row_stride) {
  for (int64_t i = 0; i < squares; ++i, products += NHWC_OUTPUTS, out += 2 * NHWC_OUTPUTS)
    for (int64_t v = 0; v < outputs; v += SIMD_WIDTH) {
      auto row = [&](uint32_t* to, auto combine) {
        const f32_vec s0 = combine(0), s1 = combine(1), s2 = combine(2), s3 = combine(3);
        store_raw(to, raw_vec(s0 + s1 + s2));
        store_raw(to + NHWC_OUTPUTS, raw_vec(s1 - s2 - s3));
      };
      auto m = [&](int a, int b) { return f32_vec(load_raw(products + (4 * a + b) * stride + v)); };
      row(out + v, [&](int j) { return m(0, j) + m(1, j) + m(2, j); });
      row(out + row_stride + v, [&](int j) { return m(1, j) - m(2, j) - m(3, j); });
    }
}

}  // namespace
