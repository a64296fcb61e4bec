// Products with rows of quantized weights in panels, by the vectors of simd256.hpp.
#pragma once
#include <algorithm>

#include "simd256.hpp"

#if defined(__AVX2__)
#include "avx2_gemv.hpp"
#endif

namespace {

template <int BITS>
struct QuantizedOps {
  const int64_t scale_groups;
  struct int8_values {
    i32x8 of[2];
  };
  struct zero_point_pair {  // of the first and the last 32 columns
    int8_t low, high;
  };
  zero_point_pair zero_points(const uint8_t* z) const {
    constexpr int8_t middle = BITS < 8 ? 1 << (BITS - 1) : 0;
    return BITS < 8 && z ? zero_point_pair{int8_t(z[0]), int8_t(z[scale_groups > 1])} : zero_point_pair{middle, middle};
  }
  struct scale_pair {
    f32x8 low, high;
  };
  scale_pair scales(const uint16_t* s) const {
    if (!scale_groups) return {f32x8{} + 1.0f, f32x8{} + 1.0f};
    uint32_t both = *s;
    if (scale_groups > 1)
      std::memcpy(&both, s, 4);
    else
      both |= both << 16;
    const u32x8 pairs = u32x8{} + both;
    return {f32x8(pairs << 16), f32x8(pairs & 0xffff0000u)};
  }
  // The values of a row of a panel.
  int8_values load(const uint8_t* panel, int64_t row, zero_point_pair z) const {
    if constexpr (BITS == 8) return {{load_as<i32x8>(panel + 64 * row), load_as<i32x8>(panel + 64 * row + 32)}};
    int8_t out[64];
#if defined(__AVX2__)
    unpack_codes<BITS>(panel, row, z.low, z.high, out);
#else
    for (int i = 0; i < 64; ++i) out[i] = int8_t(panel_code(panel, BITS, row, i) - (i < 32 ? z.low : z.high));
#endif
    return {{load_as<i32x8>(out), load_as<i32x8>(out + 32)}};
  }
  f32x8 multiply_add(f32x8 s, const int8_values& w, const uint8_t* x, scale_pair scale) const {
    const i32x8 a = dot_int8(i32x8{}, load_as<u32x8>(x), w.of[0]);
    const i32x8 b = dot_int8(i32x8{}, load_as<u32x8>(x + 32), w.of[1]);
    return s + __builtin_convertvector(a, f32x8) * scale.low + __builtin_convertvector(b, f32x8) * scale.high;
  }
  static f32x8 to_f32(const int8_t* v) {
    typedef int8_t i8x8 __attribute__((vector_size(8)));
    return __builtin_convertvector(load_as<i8x8>(v), f32x8);
  }
  f32x8 multiply_add(f32x8 s, const int8_values& values, const float* x, scale_pair scale) const {
    int8_t w[64];
    std::memcpy(w, values.of, sizeof w);
    f32x8 a{}, b{};
    for (int i = 0; i < 32; i += SIMD_WIDTH) {
      a += to_f32(w + i) * load_as<f32x8>(x + i);
      b += to_f32(w + 32 + i) * load_as<f32x8>(x + 32 + i);
    }
    return s + a * scale.low + b * scale.high;
  }
};

#if !defined(__AVX2__)
// Rows `from` (a multiple of four) to `to` on inputs of 16 bits, which join two int8 terms; ldx in bytes.
template <int BITS>
void joined_gemv(const rarefy_quantized& w, int64_t from, int64_t to, const uint8_t* x, int64_t ldx, float* y,
                 int64_t ldy, int64_t n) {
  const QuantizedOps<BITS> ops{w.scale_groups};
  for (int64_t row = from; row < std::min(to, w.rows); ++row)
    for (int64_t i = 0; i < n; ++i) {
      float sum = 0.0f;
      for (int64_t block = 0; block < w.col_blocks; ++block) {
        const int64_t panel = (row / TILE_ROWS * w.col_blocks + block) * TILE_ROWS, cell = panel + row % TILE_ROWS;
        const auto scales = ops.scales(w.scales + cell * w.scale_groups);
        const auto values = ops.load(static_cast<const uint8_t*>(w.values) + panel * 8 * BITS, row % TILE_ROWS,
                                     ops.zero_points(loaded_zeros(w, cell)));
        int8_t codes[64];
        int16_t in[64];
        std::memcpy(codes, values.of, sizeof codes);
        std::memcpy(in, x + i * ldx + block * sizeof in, sizeof in);
        int32_t low = 0, high = 0;
        const uint8_t* zeros = w.zero_bits ? w.zeros + cell * w.scale_groups : nullptr;
        const int zero[2] = {zeros ? zeros[0] : 0, zeros ? zeros[1] : 0};
        for (int c = 0; c < 32; ++c) {
          low += ((codes[c] << w.zero_bits) - zero[0]) * in[c];
          high += ((codes[c + 32] << w.zero_bits) - zero[1]) * in[c + 32];
        }
        sum += float(low) * scales.low[0] + float(high) * scales.high[0];
      }
      y[i * ldy + row] = sum * (1.0f / LOST_STEPS);
    }
}
#endif

}  // namespace
