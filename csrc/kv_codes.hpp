// A KV cache in 8 bits. Each token of a head has one scale for its keys and one for its values. Codes of values are in
// column tiles [head_dim][TILE_COLS], those of keys in pairs of features [head_dim / 2][TILE_COLS][2], so that a vector
// of 16-bit products adds up both features of a token.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

typedef int8_t code_vec __attribute__((vector_size(SIMD_WIDTH)));
typedef int8_t code_pair_vec __attribute__((vector_size(SIMD_WIDTH * 2)));
typedef int16_t wide_vec __attribute__((vector_size(SIMD_WIDTH * 2)));
typedef int16_t wide_pair_vec __attribute__((vector_size(SIMD_WIDTH * 4)));

constexpr int MAX_CODE = 127;

inline f32_vec to_numbers(raw_vec v) { return __builtin_convertvector(__builtin_bit_cast(i32_vec, v), f32_vec); }

// Pairs of codes, each as 16 bits.
inline raw_vec load_wide_pairs(const int8_t* p) {
  code_pair_vec v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_bit_cast(raw_vec, __builtin_convertvector(v, wide_pair_vec));
}

// The nearest integer of a number below 2^22, at most `limit` away from zero; NaN becomes `limit`.
inline int32_t round_within(float v, float limit) {
  const float clamped = v < limit ? (v > -limit ? v : -limit) : limit;
  return int32_t(clamped + 12582912.0f - 12582912.0f);  // 1.5 * 2^23 drops the fraction
}

inline i32_vec round_to_codes_of(f32_vec v) {
  const f32_vec limit = f32_vec{} + float(MAX_CODE), below = v < limit ? v : limit;
  return __builtin_convertvector((below > -limit ? below : -limit) + 12582912.0f - 12582912.0f, i32_vec);
}

// The scale of numbers by the largest magnitude; NaN, so that all outputs are NaN, where that is not finite.
inline float code_scale(float largest) {
  return largest < INFINITY ? std::max(largest * (1.0f / MAX_CODE), MIN_INPUT_SCALE) : std::nanf("");
}

// Store one token of one head, x [head_dim].
inline void store_token_codes(const float* x, int64_t head_dim, bool pairs, int8_t* codes, float* scale) {
  i32_vec top{};
  for (int64_t f = 0; f < head_dim; f += SIMD_WIDTH) top = larger_magnitude(top, load_partial(x + f, head_dim - f));
  int32_t largest = 0;
  for (int i = 0; i < SIMD_WIDTH; ++i) largest = std::max(largest, top[i]);
  *scale = code_scale(__builtin_bit_cast(float, largest));
  const float inverse = 1.0f / *scale;
  for (int64_t f = 0; f < head_dim; ++f)
    codes[pairs ? f / 2 * 2 * TILE_COLS + f % 2 : f * TILE_COLS] = int8_t(round_within(x[f] * inverse, MAX_CODE));
}

// Store `columns` tokens of one head: feature f of token n is x[f * stride + n], so a stride of 1 is for one token.
// `codes` and `scales` are those of the first token.
void store_kv_codes(const float* x, int64_t stride, int64_t columns, int64_t head_dim, bool pairs, int8_t* codes,
                    float* scales) {
  if (stride == 1) return store_token_codes(x, head_dim, pairs, codes, scales);
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const int64_t count = std::min<int64_t>(columns - n, SIMD_WIDTH);
    i32_vec top{};
    for (int64_t f = 0; f < head_dim; ++f) top = larger_magnitude(top, load_partial(x + f * stride + n, count));
    f32_vec scale = f32_vec(top), inverse;
    for (int i = 0; i < SIMD_WIDTH; ++i) scale[i] = code_scale(scale[i]);
    inverse = 1.0f / scale;
    store_partial(scales + n, scale, count);
    const auto codes_of = [&](int64_t f) {
      return round_to_codes_of(load_partial(x + f * stride + n, count) * inverse);
    };
    for (int64_t f = 0; f < head_dim; f += pairs ? 2 : 1)
      if (pairs) {
        const i32_vec both = (codes_of(f) & 255) | codes_of(f + 1) << 8;
        const wide_vec v = __builtin_convertvector(both, wide_vec);
        std::memcpy(codes + f * TILE_COLS + 2 * n, &v, size_t(2 * count));
      } else {
        const code_vec v = __builtin_convertvector(codes_of(f), code_vec);
        std::memcpy(codes + f * TILE_COLS + n, &v, size_t(count));
      }
  }
}

// One tile of a head in fp32, out [head_dim][TILE_COLS].
inline void load_kv_codes(const int8_t* codes, const float* scales, int64_t head_dim, bool pairs, float* out) {
  for (int64_t n = 0; n < TILE_COLS; n += SIMD_WIDTH) {
    const f32_vec scale = load_vec(scales + n);
    for (int64_t f = 0; f < head_dim; f += pairs ? 2 : 1)
      if (pairs) {
        wide_vec v;
        std::memcpy(&v, codes + f * TILE_COLS + 2 * n, sizeof v);
        const i32_vec both = __builtin_convertvector(v, i32_vec);
        store_vec(out + f * TILE_COLS + n, __builtin_convertvector(both << 24 >> 24, f32_vec) * scale);
        store_vec(out + (f + 1) * TILE_COLS + n, __builtin_convertvector(both >> 8, f32_vec) * scale);
      } else {
        code_vec v;
        std::memcpy(&v, codes + f * TILE_COLS + n, sizeof v);
        store_vec(out + f * TILE_COLS + n, __builtin_convertvector(v, f32_vec) * scale);
      }
  }
}

}  // namespace
