// Where the sums of NHWC images go: into a buffer, or as numbers straight into an image.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

constexpr int OUTPUT_VECS = 4;  // vectors of outputs that are stored together
constexpr int64_t OUTPUTS_TOGETHER = OUTPUT_VECS * SIMD_WIDTH;

// The first n of OUTPUTS_TOGETHER outputs, already divided by the scale, as codes.
inline void store_codes(f32_vec (&v)[OUTPUT_VECS], uint8_t* codes, int64_t n) {
#pragma GCC unroll 4
  for (f32_vec& x : v) x = min_of(x, f32_vec{} + 127.0f);
  store_bytes(codes, round_to_codes(v), n);
}

inline f32_vec load_number(const uint8_t* p) {
  f32_vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Sums [pixels][NHWC_OUTPUTS] in lanes of type L, which go on from what is there or begin with zeros.
template <class L>
struct SumBuffer {
  uint32_t* acc;
  bool accumulate;

  inline auto begin(int pixel, int vec) const { return accumulate ? L::load_acc(at(pixel, vec)) : L::zero(); }
  inline void end(int pixel, int vec, typename L::acc sum) const { L::store_acc(at(pixel, vec), sum); }
  inline void skip(int64_t pixels) { acc += pixels * NHWC_OUTPUTS; }
  inline uint32_t* at(int pixel, int vec) const { return acc + pixel * NHWC_OUTPUTS + vec * SIMD_WIDTH; }
};

// Numbers of evenly spaced pixels, from output `first` on: sums + bias + residual, limited as the activation says.
template <bool RESIDUAL>
struct NumberSink {
  static constexpr bool HAS_RESIDUAL = RESIDUAL;
  NumberSink(const rarefy_nhwc_outputs& o, int64_t first)
      : out(o.codes + first * 4),
        residual(RESIDUAL ? o.residual + first * 4 : nullptr),
        out_stride(o.codes_stride),
        residual_stride(o.residual_stride),
        features(o.outputs - first),
        bias(o.bias + first),
        low(o.act == RAREFY_NONE ? -INFINITY : 0.0f),
        high(o.act == RAREFY_RELU6 ? 6.0f : INFINITY) {}

  inline f32_vec begin(int, int) const { return f32_vec{}; }
  inline void end(int pixel, int vec, f32_vec sum) const {
    if (vec * SIMD_WIDTH >= features) return;
    sum += load_vec(bias + vec * SIMD_WIDTH);
    if constexpr (RESIDUAL) sum += load_number(residual + pixel * residual_stride + vec * SIMD_WIDTH * 4);
    auto* to = reinterpret_cast<float*>(out + pixel * out_stride) + vec * SIMD_WIDTH;
    store_partial(to, clamp_vec(sum, low, high), features - vec * SIMD_WIDTH);
  }
  inline void skip(int64_t pixels) {
    out += pixels * out_stride;
    if constexpr (RESIDUAL) residual += pixels * residual_stride;
  }

  uint8_t* out;
  const uint8_t* residual;
  int64_t out_stride, residual_stride, features;
  const float* bias;
  float low, high;
};

// Call f(sink of outputs from `first` on).
template <class F>
inline void with_number_sink(const rarefy_nhwc_outputs& o, int64_t first, F&& f) {
  if (o.residual)
    f(NumberSink<true>(o, first));
  else
    f(NumberSink<false>(o, first));
}

}  // namespace
