// Epilogues: what turns the accumulators of a kernel into outputs. Scale, bias, residual, activation; and the
// activation functions themselves.
#pragma once
#include <cstdint>
#include <type_traits>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// erf(x) with an error of 4e-7: x P(x^2) / Q(x^2), a minimax fit on [0, 4]; beyond, one. NaN stays NaN.
inline f32_vec erf_vec(f32_vec x) {
  const f32_vec u = x * x;
  f32_vec p = u * 1.92172909e-8f - 1.99013334e-6f;
  p = p * u + 1.55498303e-4f;
  p = p * u + 4.29155584e-3f;
  p = p * u + 5.24288602e-2f;
  p = p * u + 2.13910177e-1f;
  p = p * u + 1.12837863f;
  f32_vec q = u * 1.09766598e-3f + 1.55481091e-2f;
  q = q * u + 1.20785296e-1f;
  q = q * u + 5.22900641e-1f;
  q = q * u + 1.0f;
  const f32_vec sign = f32_vec((u32_vec(x) & 0x80000000u) | 0x3f800000u);
  return u < 16.0f ? x * p * reciprocal(q) : u != u ? x : sign;
}

// v limited to [low, high]. NaN stays NaN.
inline f32_vec clamp_vec(f32_vec v, float low, float high) {
  v = v < low ? f32_vec{} + low : v;
  return v > high ? f32_vec{} + high : v;
}

// Near zero the exponential's rounding would be most of the result; there the series is exact enough.
inline f32_vec tanh_vec(f32_vec v) {
  const f32_vec u = v * v;
  const f32_vec near = v * (1.0f - u * (0.333333333f - u * (0.133333333f - u * 0.0539682540f)));
  const f32_vec far = 1.0f - 2.0f * reciprocal(exp_vec(v + v) + 1.0f);
  return u < 0.04f ? near : far;
}

inline f32_vec activate(f32_vec v, int act) {
  switch (act) {
    case RAREFY_RELU: return v < 0.0f ? f32_vec{} : v;
    case RAREFY_GELU: return v * 0.5f * (erf_vec(v * 0.70710678f) + 1.0f);
    case RAREFY_GELU_TANH:
      return v < -12.0f ? f32_vec{} : v * reciprocal(exp_vec((v * v * 0.044715f + 1.0f) * v * -1.59576912f) + 1.0f);
    case RAREFY_SILU: return v < -87.0f ? f32_vec{} : v * reciprocal(exp_vec(-v) + 1.0f);
    case RAREFY_RELU6: return clamp_vec(v, 0.0f, 6.0f);
    case RAREFY_HARDSWISH: return v * (clamp_vec(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
    case RAREFY_HARDSIGMOID: return clamp_vec(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case RAREFY_SIGMOID: return reciprocal(exp_vec(-v) + 1.0f);
    case RAREFY_TANH: return tanh_vec(v);
    default: return v;
  }
}

// Call f(act), whose argument is a constant, so that loops over outputs hold one activation alone.
template <class F>
inline void with_activation(int act, F&& f) {
  switch (act) {
    case RAREFY_RELU: return f(std::integral_constant<int, RAREFY_RELU>{});
    case RAREFY_GELU: return f(std::integral_constant<int, RAREFY_GELU>{});
    case RAREFY_GELU_TANH: return f(std::integral_constant<int, RAREFY_GELU_TANH>{});
    case RAREFY_SILU: return f(std::integral_constant<int, RAREFY_SILU>{});
    case RAREFY_RELU6: return f(std::integral_constant<int, RAREFY_RELU6>{});
    case RAREFY_HARDSWISH: return f(std::integral_constant<int, RAREFY_HARDSWISH>{});
    case RAREFY_HARDSIGMOID: return f(std::integral_constant<int, RAREFY_HARDSIGMOID>{});
    case RAREFY_SIGMOID: return f(std::integral_constant<int, RAREFY_SIGMOID>{});
    case RAREFY_TANH: return f(std::integral_constant<int, RAREFY_TANH>{});
    default: return f(std::integral_constant<int, RAREFY_NONE>{});
  }
}

// GELU with an error below 2e-5 where |v| < 4, and of 4e-5 |v| beyond: for outputs of bf16 and int8 products, whose
// rounding is larger. erf(v / sqrt 2) is an odd polynomial, so no division is needed.
inline f32_vec gelu_fast(f32_vec v) {
  f32_vec x = v < -4.0f ? f32_vec{} - 4.0f : v;
  x = x > 4.0f ? f32_vec{} + 4.0f : x;
  const f32_vec u = x * x;
  f32_vec p = u * 1.34808706e-10f - 1.21338717e-08f;
  p = p * u + 4.88170770e-07f;
  p = p * u - 1.17212285e-05f;
  p = p * u + 1.89880768e-04f;
  p = p * u - 2.22571357e-03f;
  p = p * u + 1.96316075e-02f;
  p = p * u - 1.32647261e-01f;
  p = p * u + 7.97762036e-01f;
  return v * 0.5f * (x * p + 1.0f);
}

inline f32_vec activate_fast(f32_vec v, int act) { return act == RAREFY_GELU ? gelu_fast(v) : activate(v, act); }

// Outputs of one input from its accumulators, for rows `row` on; `n` of the vector's elements exist. `scale` is the
// int8 scale of the input.
template <int DTYPE, class Weight>
inline void vec_epilogue(const Weight& w, int64_t row, int64_t n, f32_vec acc, float scale, const float* residual,
                         float* y) {
  f32_vec v = acc;
  if constexpr (DTYPE == RAREFY_I8) {
    const u32_vec zero_point_term =
        u32_vec(load_partial(reinterpret_cast<const float*>(w.row_sums) + row, n)) * uint32_t(INPUT_ZERO_POINT);
    v = __builtin_convertvector(i32_vec(u32_vec(acc) - zero_point_term), f32_vec) *
        (load_partial(static_cast<const float*>(w.scales) + row, n) * scale);
  } else if constexpr (DTYPE == RAREFY_I4) {
    if constexpr (INPUT_ZERO_POINT != 0)
      v -= load_partial(static_cast<const float*>(w.row_sums) + row, n) * float(INPUT_ZERO_POINT);
    v *= scale;
  }
  if (w.bias) v += load_partial(w.bias + row, n);
  if (residual) v += load_partial(residual, n);
  store_partial(y, activate(v, w.act), n);
}

// Epilogue in place on y[n][rows], of rows `from`..`to`. `scales`: the int8 scales of the inputs, or null.
template <int DTYPE, class Weight>
void rows_epilogue(const Weight& w, int64_t from, int64_t to, const float* scales, const float* residual, float* y,
                   int64_t ldy, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = from; r < to; r += SIMD_WIDTH) {
      float* out = y + i * ldy + r;
      vec_epilogue<DTYPE>(w, r, to - r, load_partial(out, to - r), scales ? scales[i] : 1.0f,
                          residual ? residual + i * ldy + r : nullptr, out);
    }
}

// Epilogue of accumulators [rows][TILE_COLS], transposed into y[columns][row..]. The loop over rows is the inner one,
// so that only a few cache lines of y are written at a time.
template <int DTYPE>
void transposed_epilogue(const rarefy_weight_epilogue& w, int64_t row, int64_t rows, const uint32_t* acc,
                         const float* scales, int64_t columns, const float* residual, float* y, int64_t ldy) {
  raw_vec square[SIMD_WIDTH];
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const int64_t num_cols = columns - n < SIMD_WIDTH ? columns - n : SIMD_WIDTH;
    for (int64_t r = 0; r < rows; r += SIMD_WIDTH) {
      const int64_t num_rows = rows - r < SIMD_WIDTH ? rows - r : SIMD_WIDTH, offset = n * ldy + row + r;
      for (int64_t i = 0; i < SIMD_WIDTH; ++i) square[i] = load_raw(acc + (r + (i < num_rows ? i : 0)) * TILE_COLS + n);
      transpose(square);
      for (int64_t i = 0; i < num_cols; ++i)
        vec_epilogue<DTYPE>(w, row + r, num_rows, f32_vec(square[i]), DTYPE == RAREFY_I8 ? scales[n + i] : 1.0f,
                            residual ? residual + offset + i * ldy : nullptr, y + offset + i * ldy);
    }
  }
}

// fp32 epilogue of the first n columns of accumulators [rows][TILE_COLS], into rows of y that are ldy floats apart.
// `stream`: bypass the caches, where the outputs fill whole cache lines.
void f32_epilogue(const float* acc, int64_t rows, int64_t n, const float* bias, const float* residual, int act,
                  float* y, int64_t ldy, bool stream) {
  stream = stream && n == TILE_COLS && ldy % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  for (int64_t r = 0; r < rows; ++r, acc += TILE_COLS, y += ldy) {
    for (int64_t i = 0; i < n; i += SIMD_WIDTH) {
      f32_vec v = load_partial(acc + i, n - i) + (bias ? bias[r] : 0.0f);
      if (residual) v += load_partial(residual + r * ldy + i, n - i);
      v = activate(v, act);
      if (stream)
        stream_store(y + i, raw_vec(v));
      else
        store_partial(y + i, v, n - i);
    }
  }
  if (stream) stream_fence();
}

constexpr float ROUND_TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it drops the fraction

// The rounded number of each element, in the low bits.
inline u32_vec rounded_bits(f32_vec v) { return u32_vec(v + ROUND_TO_INTEGER); }

// int8 codes with one scale for all, which saturate, minus the code of zero and plus ROUND_TO_INTEGER. The zero point
// is not added before rounding: that would break ties in another way than torch does. NaN stays NaN.
inline f32_vec shifted_code(f32_vec v, float inverse_scale, int32_t zero) {
  return clamp_vec(v * inverse_scale, float(-128 - zero), float(127 - zero)) + ROUND_TO_INTEGER;
}

inline u32_vec static_code(f32_vec v, float inverse_scale, int32_t zero) {
  return u32_vec(shifted_code(v, inverse_scale, zero)) + uint32_t(zero);
}

// Lanes of four int8 inputs out of the low bytes of four vectors.
inline raw_vec pack_codes(u32_vec a, u32_vec b, u32_vec c, u32_vec d) {
  const u32_vec lane = ((a & 255u) | (b & 255u) << 8) | ((c & 255u) << 16 | d << 24);
  return raw_vec(lane ^ (u32_vec{} + PACKED_ZEROS));
}

// Outputs of VECS vectors of one row from column `column` on.
template <int DTYPE, int VECS, class Acc>
inline void tile_row_epilogue(const Acc (&acc)[VECS], const rarefy_tile_epilogue& e, int64_t row, int64_t column,
                              float* out) {
  const bool exists = row < e.rows;  // the last row tile may be padded
  const float bias = e.bias && exists ? e.bias[row] : 0.0f;
#pragma GCC unroll 8
  for (int t = 0; t < VECS; ++t) {
    f32_vec v;
    if constexpr (DTYPE == RAREFY_I8 || DTYPE == RAREFY_I16) {
      u32_vec zero_point_term{};
      if (DTYPE == RAREFY_I8)
        zero_point_term += uint32_t(exists ? e.row_sums[row] : 0) * uint32_t(INPUT_ZERO_POINT + e.zero);
      const float scale = exists ? e.row_scales[row] : 0.0f;
      v = __builtin_convertvector(i32_vec(__builtin_bit_cast(u32_vec, acc[t]) - zero_point_term), f32_vec);
      v = v * (load_vec(e.col_scales + column + t * SIMD_WIDTH) * scale) + bias;
    } else {
      v = __builtin_bit_cast(f32_vec, acc[t]) + bias;
    }
    if (e.residual) v += load_vec(e.residual + row * TILE_COLS + column + t * SIMD_WIDTH);
    store_vec(out + t * SIMD_WIDTH, activate(v, e.act));
  }
}

// int8 epilogue in place on accumulators [rows][TILE_COLS].
void dequantize_epilogue(const rarefy_tile_epilogue& e, float* acc) {
  for (int64_t r = 0; r < e.rows; ++r)
    for_each_vector_group(e.columns, [&](auto vectors, int64_t n) {
      u32_vec sums[vectors];
      for (int64_t t = 0; t < vectors; ++t)
        sums[t] = __builtin_bit_cast(u32_vec, load_vec(acc + r * TILE_COLS + n + t * SIMD_WIDTH));
      tile_row_epilogue<RAREFY_I8>(sums, e, r, n, acc + r * TILE_COLS + n);
    });
}

}  // namespace
