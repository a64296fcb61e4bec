// What becomes of sums: scale, bias, residual, activation.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// e^x to 1e-7 of itself: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays.
inline vec exponential(vec x) {
  x = x < -87.0f ? vec{} - 87.0f : x;
  x = x > 88.0f ? vec{} + 88.0f : x;
  const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec power = vec((words(__builtin_convertvector(n == n ? n : vec{}, ints)) + 127u) << 23);
  return p * power;
}

// erf to 4e-7: x P(x^2) / Q(x^2), fitted for the least error on [0, 4], from where on it is one. NaN stays.
inline vec error_function(vec x) {
  const vec u = x * x;
  vec p = u * 1.92172909e-8f - 1.99013334e-6f;
  p = p * u + 1.55498303e-4f;
  p = p * u + 4.29155584e-3f;
  p = p * u + 5.24288602e-2f;
  p = p * u + 2.13910177e-1f;
  p = p * u + 1.12837863f;
  vec q = u * 1.09766598e-3f + 1.55481091e-2f;
  q = q * u + 1.20785296e-1f;
  q = q * u + 5.22900641e-1f;
  q = q * u + 1.0f;
  const vec whole = vec((words(x) & 0x80000000u) | 0x3f800000u);
  return u < 16.0f ? x * p / q : u != u ? x : whole;
}

inline vec activated(vec v, int act) {
  switch (act) {
    case RAREFY_RELU: return v < 0.0f ? vec{} : v;
    case RAREFY_GELU: return v * 0.5f * (error_function(v * 0.70710678f) + 1.0f);
    case RAREFY_GELU_TANH: return v < -12.0f ? vec{} : v / (exponential((v * v * 0.044715f + 1.0f) * v * -1.59576912f) + 1.0f);
    case RAREFY_SILU: return v < -87.0f ? vec{} : v / (exponential(-v) + 1.0f);
    default: return v;
  }
}

// Sums of one input for W outputs from `row` on, `here` of which exist, become outputs: act(sums by scale + bias +
// residual). `by`: the scale of the input, of int8 and int4.
template <int KIND, class M>
inline void settle(const M& w, int64_t row, int64_t here, vec sums, float by, const float* residual, float* y) {
  vec v = sums;
  if constexpr (KIND == RAREFY_I8) {
    const words shift = words(some_at(reinterpret_cast<const float*>(w.sums) + row, here)) * uint32_t(ADDED);
    v = __builtin_convertvector(ints(words(sums) - shift), vec) * (some_at(static_cast<const float*>(w.scales) + row, here) * by);
  } else if constexpr (KIND == RAREFY_I4) {
    if constexpr (ADDED != 0) v -= some_at(static_cast<const float*>(w.sums) + row, here) * float(ADDED);
    v *= by;
  }
  if (w.bias) v += some_at(w.bias + row, here);
  if (residual) v += some_at(residual, here);
  put_some(y, activated(v, w.act), here);
}

// Outputs `from`..`to` of n inputs, whose sums lie where the outputs will.
template <int KIND, class M>
void settle_rows(const M& w, int64_t from, int64_t to, const float* scales, const float* residual, float* y,
                 int64_t ldy, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = from; r < to; r += W) {
      float* at = y + i * ldy + r;
      settle<KIND>(w, r, to - r, some_at(at, to - r), scales ? scales[i] : 1.0f,
                   residual ? residual + i * ldy + r : nullptr, at);
    }
}

// Sums [rows][NT] become outputs y[n][row]. Of W inputs at a time all the rows are written: few lines of y are open at
// once.
template <int KIND>
void finish(const rarefy_sums& w, int64_t row, int64_t rows, const uint32_t* sums, const float* scales,
            int64_t columns, const float* residual, float* y, int64_t ldy) {
  lanes square[W];
  for (int64_t n = 0; n < columns; n += W) {
    const int64_t some = columns - n < W ? columns - n : W;
    for (int64_t r = 0; r < rows; r += W) {
      const int64_t here = rows - r < W ? rows - r : W, at = n * ldy + row + r;
      for (int64_t i = 0; i < W; ++i) square[i] = lanes_at(sums + (r + (i < here ? i : 0)) * NT + n);
      transpose(square);
      for (int64_t i = 0; i < some; ++i)
        settle<KIND>(w, row + r, here, vec(square[i]), KIND == RAREFY_I8 ? scales[n + i] : 1.0f,
                     residual ? residual + at + i * ldy : nullptr, y + at + i * ldy);
    }
  }
}

// `n` sums of each row become outputs of a convolution, rows of which are `apart`; past the caches if they fill whole
// lines there.
void put(const float* sums, int64_t rows, int64_t n, const float* bias, const float* residual, int act, float* y,
         int64_t apart, bool stream) {
  stream = stream && n == NT && apart % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  for (int64_t r = 0; r < rows; ++r, sums += NT, y += apart) {
    for (int64_t i = 0; i < n; i += W) {
      vec v = some_at(sums + i, n - i) + (bias ? bias[r] : 0.0f);
      if (residual) v += some_at(residual + r * apart + i, n - i);
      v = activated(v, act);
      if (stream)
        past_caches(y + i, lanes(v));
      else
        put_some(y + i, v, n - i);
    }
  }
  if (stream) seen();
}

}  // namespace
