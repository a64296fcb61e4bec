// Images of fp32 numbers in NHWC order: depthwise products, outputs, pooling, and conversion from channels. Products of
// pixels and weights are those of nhwc_kernels.hpp.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "nhwc_sums.hpp"
#include "simd.hpp"

namespace {

constexpr int DEPTHWISE_F32_PIXELS = SIMD_WIDTH == 16 ? 6 : 4;
constexpr int DEPTHWISE_F32_VECS = SIMD_WIDTH == 16 ? 4 : 2;  // whose sums fit the registers

// Some pixels of VECS vectors of channels of a depthwise convolution.
template <int PIXELS, int VECS, class Sink>
inline void depthwise_f32_pixels(const rarefy_nhwc_taps& t, const uint8_t* x, const uint32_t* taps, const Sink& sink) {
  f32_vec sums[PIXELS][VECS] = {};
  for (int64_t r = 0; r < t.rows; ++r) {
    const uint8_t* in = x + t.offsets[r];
    for (int64_t k = 0; k < t.columns; ++k, taps += t.stride, in += t.column_bytes) {
      f32_vec weights[VECS];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) weights[v] = f32_vec(load_raw(taps + v * SIMD_WIDTH));
#pragma GCC unroll 8
      for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v)
          sums[p][v] += load_number(in + p * t.pixel_bytes + v * SIMD_WIDTH * 4) * weights[v];
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) sink.end(p, v, sums[p][v]);
}

template <int VECS, class Sink>
inline void depthwise_f32_vectors(const rarefy_nhwc_taps& t, const uint8_t* x, const uint32_t* taps, int64_t pixels,
                                  Sink sink) {
  auto run = [&](auto number) {
    depthwise_f32_pixels<number, VECS>(t, x, taps, sink);
    x += number * t.pixel_bytes;
    sink.skip(number);
    pixels -= number;
  };
  while (pixels >= DEPTHWISE_F32_PIXELS) run(std::integral_constant<int, DEPTHWISE_F32_PIXELS>{});
  if (DEPTHWISE_F32_PIXELS > 4 && pixels >= 4) run(std::integral_constant<int, 4>{});
  if (pixels >= 2) run(std::integral_constant<int, 2>{});
  if (pixels >= 1) run(std::integral_constant<int, 1>{});
}

// Call f(first channel, number of vectors as a constant) for all channels.
template <class F>
inline void for_each_f32_vectors(int64_t channels, F&& f) {
  int64_t c = 0;
  auto run = [&](auto vectors) {
    f(c, vectors);
    c += vectors * SIMD_WIDTH;
  };
  while (channels - c > (DEPTHWISE_F32_VECS - 1) * SIMD_WIDTH) run(std::integral_constant<int, DEPTHWISE_F32_VECS>{});
  if (DEPTHWISE_F32_VECS > 2 && channels - c > SIMD_WIDTH) run(std::integral_constant<int, 2>{});
  while (channels - c > 0) run(std::integral_constant<int, 1>{});
}

void nhwc_depthwise_f32(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channels, int64_t pixels, uint32_t* acc) {
  for_each_f32_vectors(channels, [&](int64_t c, auto vectors) {
    depthwise_f32_vectors<vectors>(t, x + c * 4, t.taps + c, pixels, SumBuffer<LaneOps<RAREFY_F32>>{acc + c, false});
  });
}

// As nhwc_numbers, of a depthwise convolution.
void nhwc_depthwise_numbers(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t pixels,
                            const rarefy_nhwc_outputs& outputs) {
  for_each_f32_vectors(outputs.outputs, [&](int64_t c, auto vectors) {
    with_number_sink(outputs, c,
                     [&](auto sink) { depthwise_f32_vectors<vectors>(t, x + c * 4, t.taps + c, pixels, sink); });
  });
}

// VECS vectors of one pixel: act(sums + bias + residual). n: numbers that exist.
template <int ACT, bool RESIDUAL, int VECS>
inline void f32_outputs(const uint32_t* sums, const f32_vec (&bias)[OUTPUT_VECS], const uint8_t* residual, int64_t n,
                        f32_vec (&out)[OUTPUT_VECS], uint8_t* to) {
#pragma GCC unroll 4
  for (int v = 0; v < VECS; ++v) {
    out[v] = f32_vec(load_raw(sums + v * SIMD_WIDTH)) + bias[v];
    if constexpr (RESIDUAL) out[v] += load_number(residual + v * SIMD_WIDTH * 4);
    out[v] = activate(out[v], ACT);
    if (to) store_partial(reinterpret_cast<float*>(to) + v * SIMD_WIDTH, out[v], n - v * SIMD_WIDTH);
  }
}

// Outputs of VECS vectors of features from `first` on: codes or numbers of pixels, in a column tile, or both.
template <int ACT, bool RESIDUAL, int VECS>
void store_f32_vectors(const rarefy_nhwc_outputs& o, int64_t first, const uint32_t* acc, int64_t pixels) {
  const int64_t n = std::min<int64_t>(o.outputs - first, VECS * SIMD_WIDTH);
  f32_vec bias[OUTPUT_VECS], out[OUTPUT_VECS];
  for (int v = 0; v < VECS; ++v) bias[v] = load_vec(o.bias + first + v * SIMD_WIDTH);
  const auto compute = [&](int64_t p) {
    uint8_t* codes = o.codes ? o.codes + p * o.codes_stride : nullptr;
    f32_outputs<ACT, RESIDUAL, VECS>(acc + p * NHWC_OUTPUTS + first, bias,
                                     RESIDUAL ? o.residual + p * o.residual_stride + first * 4 : nullptr, n, out,
                                     codes && o.numbers ? codes + first * 4 : nullptr);
    if (!codes || o.numbers) return;
    f32_vec divided[OUTPUT_VECS] = {};
    for (int v = 0; v < VECS; ++v) divided[v] = out[v] * o.inverse_scale + float(o.zero);
    store_codes(divided, codes + first, n);
  };
  if (!o.out) {
    for (int64_t p = 0; p < pixels; ++p) compute(p);
    return;
  }
  for (int64_t p = 0; p < pixels; p += SIMD_WIDTH) {
    const int64_t count = std::min<int64_t>(SIMD_WIDTH, pixels - p);
    raw_vec squares[VECS][SIMD_WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) {
      compute(p + i);
      for (int v = 0; v < VECS; ++v) squares[v][i] = raw_vec(out[v]);
    }
    for (int v = 0; v < VECS; ++v) {
      transpose(squares[v]);
      for (int64_t i = 0; i < std::min<int64_t>(SIMD_WIDTH, n - v * SIMD_WIDTH); ++i)
        store_partial(o.out + (first + v * SIMD_WIDTH + i) * TILE_COLS + p, f32_vec(squares[v][i]), count);
    }
  }
}

template <int ACT, bool RESIDUAL>
void store_nhwc_f32(const rarefy_nhwc_outputs& outputs, const uint32_t* acc, int64_t pixels) {
  const rarefy_nhwc_outputs o = outputs;  // a copy, which stores do not change
  int64_t first = 0;
  for (; o.outputs - first > (OUTPUT_VECS - 1) * SIMD_WIDTH; first += OUTPUT_VECS * SIMD_WIDTH)
    store_f32_vectors<ACT, RESIDUAL, OUTPUT_VECS>(o, first, acc, pixels);
  for (; first < o.outputs; first += SIMD_WIDTH) store_f32_vectors<ACT, RESIDUAL, 1>(o, first, acc, pixels);
}

template <int ACT>
void store_nhwc_f32(const rarefy_nhwc_outputs& o, const uint32_t* acc, int64_t pixels) {
  if (o.residual)
    store_nhwc_f32<ACT, true>(o, acc, pixels);
  else
    store_nhwc_f32<ACT, false>(o, acc, pixels);
}

void nhwc_store_f32(const rarefy_nhwc_outputs& o, const uint32_t* acc, int64_t pixels) {
  with_activation(o.act, [&](auto act) { store_nhwc_f32<act>(o, acc, pixels); });
}

// Pixels out of channels: channel c of pixel i is x[c * stride + i].
void nhwc_pack_f32(const float* x, int64_t stride, int64_t channels, int64_t pixels, uint8_t* out,
                   int64_t pixel_bytes) {
  auto pixel = [&](int64_t i) { return reinterpret_cast<float*>(out + i * pixel_bytes); };
  if (channels < 4) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) pixel(i)[c] = x[c * stride + i];
    return;
  }
  for (int64_t c = 0; c < channels; c += SIMD_WIDTH)
    for (int64_t p = 0; p < pixels; p += SIMD_WIDTH) {
      const int64_t n = std::min<int64_t>(SIMD_WIDTH, channels - c), count = std::min<int64_t>(SIMD_WIDTH, pixels - p);
      raw_vec square[SIMD_WIDTH] = {};
      for (int64_t i = 0; i < n; ++i) square[i] = raw_vec(load_partial(x + (c + i) * stride + p, count));
      transpose(square);
      for (int64_t i = 0; i < count; ++i) store_partial(pixel(p + i) + c, f32_vec(square[i]), n);
    }
}

// Channels out of pixels: channel c of pixel i becomes out[c * TILE_COLS + i].
void nhwc_unpack(const uint8_t* x, int64_t pixel_bytes, int64_t pixels, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; c += SIMD_WIDTH)
    for (int64_t p = 0; p < pixels; p += SIMD_WIDTH) {
      const int64_t n = std::min<int64_t>(SIMD_WIDTH, channels - c), count = std::min<int64_t>(SIMD_WIDTH, pixels - p);
      raw_vec square[SIMD_WIDTH] = {};
      for (int64_t i = 0; i < count; ++i) square[i] = load_raw(x + (p + i) * pixel_bytes + c * 4);
      transpose(square);
      for (int64_t i = 0; i < n; ++i) store_partial(out + (c + i) * TILE_COLS + p, f32_vec(square[i]), count);
    }
}

// out = act(x * scale + bias + residual) for some pixels; scale, bias and residual may be null.
template <int ACT>
void map_pixels(const uint8_t* x, int64_t x_stride, int64_t pixels, int64_t channels, const float* scale,
                const float* bias, const uint8_t* residual, int64_t residual_stride, uint8_t* out, int64_t out_stride) {
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, out += out_stride) {
    const uint8_t* added = residual ? residual + p * residual_stride : nullptr;
    for (int64_t c = 0; c < channels; c += SIMD_WIDTH) {
      const int64_t n = std::min<int64_t>(SIMD_WIDTH, channels - c);
      f32_vec v = load_number(x + c * 4);
      if (scale) v *= load_partial(scale + c, n);
      if (bias) v += load_partial(bias + c, n);
      if (added) v += load_number(added + c * 4);
      store_partial(reinterpret_cast<float*>(out) + c, activate(v, ACT), n);
    }
  }
}

void nhwc_map(const uint8_t* x, int64_t x_stride, int64_t pixels, int64_t channels, const float* scale,
              const float* bias, const uint8_t* residual, int64_t residual_stride, int act, uint8_t* out,
              int64_t out_stride) {
  with_activation(act, [&](auto constant) {
    map_pixels<constant>(x, x_stride, pixels, channels, scale, bias, residual, residual_stride, out, out_stride);
  });
}

// sums[c] += the sum of channel c of some pixels.
void nhwc_sum(const uint8_t* x, int64_t pixel_bytes, int64_t pixels, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += SIMD_WIDTH) {
    const int64_t n = std::min<int64_t>(SIMD_WIDTH, channels - c);
    f32_vec even{}, odd{};
    for (int64_t p = 0; p + 1 < pixels; p += 2) {
      even += load_number(x + p * pixel_bytes + c * 4);
      odd += load_number(x + (p + 1) * pixel_bytes + c * 4);
    }
    if (pixels % 2) even += load_number(x + (pixels - 1) * pixel_bytes + c * 4);
    store_partial(sums + c, load_partial(sums + c, n) + (even + odd), n);
  }
}

// max[c] = the larger of two numbers, NaN where one is NaN.
void nhwc_max_f32(const uint8_t* x, int64_t channels, uint8_t* max) {
  auto* to = reinterpret_cast<float*>(max);
  for (int64_t c = 0; c < channels; c += SIMD_WIDTH) {
    const int64_t n = std::min<int64_t>(SIMD_WIDTH, channels - c);
    const f32_vec a = load_number(x + c * 4), b = load_partial(to + c, n);
    store_partial(to + c, a > b ? a : a != a ? a : b, n);
  }
}

}  // namespace
