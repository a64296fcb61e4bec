// Images in NHWC order: products of pixels and weights, and what turns sums of int8 codes into codes. amx.cpp has the
// same products of codes on AMX tiles; nhwc_f32.hpp has what is for fp32 alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "nhwc_sums.hpp"
#include "rarefy.h"
#include "simd.hpp"

namespace {

constexpr int64_t NHWC_BLOCK = 16 * 16;                     // lanes of weights in a block: 16 inputs by 16 outputs
constexpr int GROUP_VECS = 16 / SIMD_WIDTH;                 // vectors of 16 outputs
constexpr int NHWC_GROUPS = SIMD_WIDTH == 16 ? 4 : 1;       // groups of 16 outputs whose sums fit the registers
constexpr int DEPTHWISE_PIXELS = SIMD_WIDTH == 16 ? 7 : 4;  // whose sums fit the registers
template <int DTYPE>
constexpr int NHWC_PIXELS_PER_CALL = SIMD_WIDTH == 16 || DTYPE != RAREFY_I8 ? 6 : 4;

// A code as it lies in memory, which is ordered like its value.
using stored_code = std::conditional_t<INPUT_ZERO_POINT != 0, uint8_t, int8_t>;

// Some pixels times GROUPS groups of 16 outputs.
template <int DTYPE, int PIXELS, int GROUPS, class Sink>
inline void nhwc_block_products(const rarefy_nhwc_block* blocks, int64_t count, const uint8_t* x, int64_t x_stride,
                                const uint32_t* values, int64_t group_stride, const Sink& sink) {
  using L = LaneOps<DTYPE>;
  using weight = decltype(L::broadcast(0u));
  constexpr int VECS = GROUPS * GROUP_VECS;
  typename L::acc sum[PIXELS][VECS];
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) sum[p][v] = sink.begin(p, v);
  for (int64_t b = 0; b < count; ++b, values += NHWC_BLOCK) {
    const uint8_t* in = x + blocks[b].offset;
    for (int64_t l = 0; l < blocks[b].lanes; ++l, in += 4) {
      weight w[VECS];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v)
        w[v] = weight(L::load(values + v / GROUP_VECS * group_stride + l * 16 + v % GROUP_VECS * SIMD_WIDTH));
#pragma GCC unroll 8
      for (int p = 0; p < PIXELS; ++p) {
        uint32_t lane;
        std::memcpy(&lane, in + p * x_stride, 4);
        const auto inputs = typename L::input(L::broadcast(lane));
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v) sum[p][v] = L::multiply_add(sum[p][v], inputs, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) sink.end(p, v, sum[p][v]);
}

template <int DTYPE, int GROUPS, class Sink>
inline void nhwc_group_products(const rarefy_nhwc_block* blocks, int64_t count, const uint8_t* x, int64_t x_stride,
                                int64_t pixels, const uint32_t* values, int64_t group_stride, Sink sink) {
  auto run = [&](auto number) {
    nhwc_block_products<DTYPE, number, GROUPS>(blocks, count, x, x_stride, values, group_stride, sink);
    x += number * x_stride;
    sink.skip(number);
    pixels -= number;
  };
  constexpr int MOST = NHWC_PIXELS_PER_CALL<DTYPE>;
  while (pixels >= MOST) run(std::integral_constant<int, MOST>{});
  if (pixels >= 4) run(std::integral_constant<int, 4>{});
  if (pixels >= 2) run(std::integral_constant<int, 2>{});
  if (pixels >= 1) run(std::integral_constant<int, 1>{});
}

// Call f(first group, number of them as a constant) for all groups of 16 outputs.
template <class F>
inline void for_each_groups(int64_t groups, F&& f) {
  int64_t g = 0;
  auto run = [&](auto number) {
    f(g, number);
    g += number;
  };
  while (groups - g >= NHWC_GROUPS) run(std::integral_constant<int, NHWC_GROUPS>{});
  if constexpr (NHWC_GROUPS > 2)
    if (groups - g >= 2) run(std::integral_constant<int, 2>{});
  if constexpr (NHWC_GROUPS > 1)
    if (groups - g >= 1) run(std::integral_constant<int, 1>{});
}

// At most NHWC_BLOCKS_IN_L1 blocks, from block b on, added to the sums of those before.
template <int DTYPE>
void nhwc_chunk_products(const rarefy_nhwc_block* blocks, int64_t num_blocks, int64_t b, const uint8_t* x,
                         int64_t x_stride, int64_t pixels, const uint32_t* values, int64_t groups, uint32_t* acc) {
  const int64_t group_stride = num_blocks * NHWC_BLOCK, count = std::min(NHWC_BLOCKS_IN_L1, num_blocks - b);
  for_each_groups(groups, [&](int64_t g, auto number) {
    nhwc_group_products<DTYPE, number>(blocks + b, count, x, x_stride, pixels,
                                       values + g * group_stride + b * NHWC_BLOCK, group_stride,
                                       SumBuffer<LaneOps<DTYPE>>{acc + g * 16, b > 0});
  });
}

template <int DTYPE>
void nhwc_products(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                   int64_t pixels, const uint32_t* values, int64_t groups, uint32_t* acc) {
  for (int64_t b = 0; b < num_blocks; b += NHWC_BLOCKS_IN_L1)
    nhwc_chunk_products<DTYPE>(blocks, num_blocks, b, x, x_stride, pixels, values, groups, acc);
}

// At most NHWC_OUTPUTS numbers of evenly spaced pixels from at most NHWC_BLOCKS_IN_L1 blocks.
void nhwc_numbers(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                  int64_t pixels, const uint32_t* values, const rarefy_nhwc_outputs& outputs) {
  const int64_t group_stride = num_blocks * NHWC_BLOCK;
  for_each_groups((outputs.outputs + 15) / 16, [&](int64_t g, auto number) {
    with_number_sink(outputs, g * 16, [&](auto sink) {
      nhwc_group_products<RAREFY_F32, number>(blocks, num_blocks, x, x_stride, pixels, values + g * group_stride,
                                              group_stride, sink);
    });
  });
}

// The sums of some pixels of 2 * SIMD_WIDTH channels of a depthwise convolution.
template <int PIXELS>
struct DepthwiseSums {
  raw_vec low[PIXELS] = {}, high[PIXELS] = {};

  inline void add(int pixel, code_pairs codes, code_pairs weights) {
    low[pixel] = multiply_add_pairs(low[pixel], codes.low, weights.low);
    high[pixel] = multiply_add_pairs(high[pixel], codes.high, weights.high);
  }
  inline void store(uint32_t* acc) const {
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) {
      const code_pairs sums = in_channel_order({low[i], high[i]});
      store_raw(acc + i * NHWC_OUTPUTS, sums.low);
      store_raw(acc + i * NHWC_OUTPUTS + SIMD_WIDTH, sums.high);
    }
  }
};

// Any distance between pixels and between taps.
template <int PIXELS>
inline void depthwise_pixels(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channel, uint32_t* acc) {
  DepthwiseSums<PIXELS> sums;
  const uint32_t* taps = t.taps + channel;
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t k = 0; k < t.columns; k += 2, taps += t.stride) {
      const uint8_t *a = x + t.offsets[r] + k * t.column_bytes, *b = k + 1 < t.columns ? a + t.column_bytes : a;
      const code_pairs weights = in_pair_order(load_raw(taps), load_raw(taps + SIMD_WIDTH));
#pragma GCC unroll 8
      for (int i = 0; i < PIXELS; ++i, a += t.pixel_bytes, b += t.pixel_bytes)
        sums.add(i, load_code_pairs(a, b), weights);
    }
  sums.store(acc);
}

// Pixels STRIDE columns apart, so that two neighbouring codes are a pair for several of them: output o multiplies its
// taps 2i and 2i + 1 by the pair that begins at column STRIDE * o + 2i.
template <int PIXELS, int COLUMNS, int STRIDE>
inline void depthwise_row_pixels(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channel, uint32_t* acc) {
  constexpr int PAIRS = (COLUMNS + 1) / 2, APART = 2 / STRIDE, ALL = PIXELS + (PAIRS - 1) * APART;
  DepthwiseSums<PIXELS> sums;
  const uint32_t* taps = t.taps + channel;
  for (int64_t r = 0; r < t.rows; ++r) {
    code_pairs weights[PAIRS];
#pragma GCC unroll 4
    for (int i = 0; i < PAIRS; ++i, taps += t.stride)
      weights[i] = in_pair_order(load_raw(taps), load_raw(taps + SIMD_WIDTH));
    const uint8_t* in = x + t.offsets[r];
    auto first = load_wide_codes(in);
#pragma GCC unroll 16
    for (int q = 0; q < ALL; ++q) {
      in += t.column_bytes;
      const auto second = load_wide_codes(in);
      const code_pairs codes = pairs_of(first, second);
#pragma GCC unroll 4
      for (int i = 0; i < PAIRS; ++i)
        if (q >= i * APART && q - i * APART < PIXELS) sums.add(q - i * APART, codes, weights[i]);
      if (q + 1 == ALL) break;
      if (STRIDE == 1) {
        first = second;
      } else {
        in += t.column_bytes;
        first = load_wide_codes(in);
      }
    }
  }
  sums.store(acc);
}

template <int COLUMNS, int STRIDE>
inline void depthwise_rows(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channel, int64_t pixels,
                           uint32_t* acc) {
  auto run = [&](auto number) {
    if constexpr (COLUMNS)
      depthwise_row_pixels<number, COLUMNS, STRIDE>(t, x, channel, acc);
    else
      depthwise_pixels<number>(t, x, channel, acc);
    x += number * t.pixel_bytes;
    acc += number * NHWC_OUTPUTS;
    pixels -= number;
  };
  while (pixels >= DEPTHWISE_PIXELS) run(std::integral_constant<int, DEPTHWISE_PIXELS>{});
  if (DEPTHWISE_PIXELS > 4 && pixels >= 4) run(std::integral_constant<int, 4>{});
  while (pixels >= 1) run(std::integral_constant<int, 1>{});
}

void nhwc_depthwise(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channels, int64_t pixels, uint32_t* acc) {
  const int64_t stride = t.pixel_bytes == t.column_bytes ? 1 : t.pixel_bytes == 2 * t.column_bytes ? 2 : 0;
  for (int64_t c = 0; c < channels; c += 2 * SIMD_WIDTH) {
    const auto run = [&](auto rows) { rows(t, x + c, c, pixels, acc + c); };
    if (t.columns == 3 && stride == 1)
      run(depthwise_rows<3, 1>);
    else if (t.columns == 3 && stride == 2)
      run(depthwise_rows<3, 2>);
    else if (t.columns == 5 && stride == 1)
      run(depthwise_rows<5, 1>);
    else if (t.columns == 5 && stride == 2)
      run(depthwise_rows<5, 2>);
    else
      run(depthwise_rows<0, 0>);
  }
}

void nhwc_lanes(const uint8_t* x, const int64_t* offsets, int64_t pixels, const int64_t* taps, int64_t num_taps,
                int64_t channels, uint32_t* out) {
  const int64_t lanes = (channels + 3) / 4;
  for (int64_t n = 0; n < pixels; n += SIMD_WIDTH)
    for (int64_t k = 0; k < num_taps; ++k)
      for (int64_t c = 0; c < lanes; c += SIMD_WIDTH) {
        raw_vec square[SIMD_WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < SIMD_WIDTH; ++i) square[i] = load_raw(x + offsets[n + i] + taps[k] + c * 4);
        transpose(square);
        uint32_t* to = out + (c * num_taps + k) * TILE_COLS + n;
        for (int64_t i = 0; i < std::min<int64_t>(SIMD_WIDTH, lanes - c); ++i)
          store_raw(to + i * num_taps * TILE_COLS, square[i]);
      }
}

void transpose_sums(const uint32_t* sums, int64_t rows, int64_t pixels, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += SIMD_WIDTH)
    for (int64_t n = 0; n < pixels; n += SIMD_WIDTH) {
      raw_vec square[SIMD_WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < SIMD_WIDTH; ++i) square[i] = load_raw(sums + (r + i) * TILE_COLS + n);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < SIMD_WIDTH; ++i) store_raw(out + (n + i) * NHWC_OUTPUTS + r, square[i]);
    }
}

// What turns sums into outputs of OUTPUTS_TOGETHER features, for all pixels: out = sum * factors + bias + residual.
struct NhwcFactors {
  NhwcFactors(const rarefy_nhwc_outputs& o, int64_t first) {
    residual_scale = o.residual ? o.residual_scale : 0.0f;
    const float residual_zero = float(o.residual_zero + INPUT_ZERO_POINT) * residual_scale;
#pragma GCC unroll 4
    for (int v = 0; v < OUTPUT_VECS; ++v) {
      const int64_t at = first + v * SIMD_WIDTH;
      factors[v] = load_vec(o.factors + at);
      const i32_vec row_sums = i32_vec(load_vec(reinterpret_cast<const float*>(o.row_sums) + at));
      const f32_vec zero_terms = __builtin_convertvector(row_sums * (INPUT_ZERO_POINT + o.in_zero), f32_vec);
      bias[v] = load_vec(o.bias + at) - zero_terms * factors[v] - residual_zero;
    }
  }
  // Make the outputs codes before they are rounded.
  void divide_by_scale(float inverse_scale, float zero) {
    residual_scale *= inverse_scale;
    for (int v = 0; v < OUTPUT_VECS; ++v) {
      factors[v] *= inverse_scale;
      bias[v] = bias[v] * inverse_scale + zero;
    }
  }
  float residual_scale;
  f32_vec factors[OUTPUT_VECS], bias[OUTPUT_VECS];
};

// Outputs of one pixel before the activation. n: features that exist.
template <bool RESIDUAL>
inline void nhwc_outputs(const NhwcFactors& f, const uint32_t* sums, const uint8_t* residual, int64_t n,
                         f32_vec (&out)[OUTPUT_VECS]) {
  uint8_t some[OUTPUTS_TOGETHER];
  if (RESIDUAL && n < OUTPUTS_TOGETHER) residual = static_cast<const uint8_t*>(std::memcpy(some, residual, size_t(n)));
#pragma GCC unroll 4
  for (int v = 0; v < OUTPUT_VECS; ++v) {
    const i32_vec sum = i32_vec(load_vec(reinterpret_cast<const float*>(sums) + v * SIMD_WIDTH));
    out[v] = __builtin_convertvector(sum, f32_vec) * f.factors[v] + f.bias[v];
    if constexpr (RESIDUAL)
      out[v] += __builtin_convertvector(i32_vec(load_codes(residual + v * SIMD_WIDTH)), f32_vec) * f.residual_scale;
  }
}

// Codes alone, of outputs without an activation, with ReLU or with ReLU6.
template <bool RESIDUAL>
void store_nhwc_codes_only(const rarefy_nhwc_outputs& outputs, const uint32_t* acc, int64_t pixels) {
  const rarefy_nhwc_outputs o = outputs;  // a copy, which stores of codes do not change
  const float most = o.act == RAREFY_RELU6 ? std::min(127.0f, 6.0f * o.inverse_scale + float(o.zero)) : 127.0f;
  const uint32_t least = uint8_t((o.act == RAREFY_NONE ? -128 : o.zero) + INPUT_ZERO_POINT) * 0x01010101u;
  uint32_t least_codes[SIMD_WIDTH];
  for (uint32_t& code : least_codes) code = least;
  for (int64_t first = 0; first < o.outputs; first += OUTPUTS_TOGETHER) {
    const int64_t n = std::min(o.outputs - first, OUTPUTS_TOGETHER);
    NhwcFactors factors(o, first);
    factors.divide_by_scale(o.inverse_scale, float(o.zero));
    for (int64_t p = 0; p < pixels; ++p) {
      f32_vec out[OUTPUT_VECS];
      nhwc_outputs<RESIDUAL>(factors, acc + p * NHWC_OUTPUTS + first,
                             RESIDUAL ? o.residual + p * o.residual_stride + first : nullptr, n, out);
#pragma GCC unroll 4
      for (int v = 0; v < OUTPUT_VECS; ++v) out[v] = min_of(out[v], f32_vec{} + most);
      store_bytes(o.codes + p * o.codes_stride + first, max_of_codes(round_to_codes(out), load_raw(least_codes)), n);
    }
  }
}

// Codes or numbers, and fp32 values.
template <int ACT, bool RESIDUAL>
void store_nhwc_outputs(const rarefy_nhwc_outputs& outputs, const uint32_t* acc, int64_t pixels) {
  const rarefy_nhwc_outputs o = outputs;
  for (int64_t first = 0; first < o.outputs; first += OUTPUTS_TOGETHER) {
    const int64_t n = std::min(o.outputs - first, OUTPUTS_TOGETHER);
    const NhwcFactors factors(o, first);
    for (int64_t p = 0; p < pixels; p += SIMD_WIDTH) {
      const int64_t count = std::min<int64_t>(SIMD_WIDTH, pixels - p);
      raw_vec squares[OUTPUT_VECS][SIMD_WIDTH] = {};
      for (int64_t i = 0; i < count; ++i) {
        f32_vec out[OUTPUT_VECS];
        nhwc_outputs<RESIDUAL>(factors, acc + (p + i) * NHWC_OUTPUTS + first,
                               RESIDUAL ? o.residual + (p + i) * o.residual_stride + first : nullptr, n, out);
        for (int v = 0; v < OUTPUT_VECS; ++v) {
          out[v] = activate_fast(out[v], ACT);
          squares[v][i] = raw_vec(out[v]);
          out[v] = out[v] * o.inverse_scale + float(o.zero);
        }
        if (!o.codes) continue;
        if (o.numbers) {
          auto* to = reinterpret_cast<float*>(o.codes + (p + i) * o.codes_stride) + first;
          for (int64_t v = 0; v * SIMD_WIDTH < n; ++v)
            store_partial(to + v * SIMD_WIDTH, f32_vec(squares[v][i]), n - v * SIMD_WIDTH);
          continue;
        }
        store_codes(out, o.codes + (p + i) * o.codes_stride + first, n);
      }
      for (int64_t v = 0; o.out && v * SIMD_WIDTH < n; ++v) {
        transpose(squares[v]);
        for (int64_t i = 0; i < std::min<int64_t>(SIMD_WIDTH, n - v * SIMD_WIDTH); ++i)
          store_partial(o.out + (first + v * SIMD_WIDTH + i) * TILE_COLS + p, f32_vec(squares[v][i]), count);
      }
    }
  }
}

template <int ACT>
void store_nhwc_outputs(const rarefy_nhwc_outputs& o, const uint32_t* acc, int64_t pixels) {
  if (o.residual)
    store_nhwc_outputs<ACT, true>(o, acc, pixels);
  else
    store_nhwc_outputs<ACT, false>(o, acc, pixels);
}

void nhwc_store(const rarefy_nhwc_outputs& o, const uint32_t* acc, int64_t pixels) {
  if (!o.out && !o.numbers && is_clamp(o.act))
    return o.residual ? store_nhwc_codes_only<true>(o, acc, pixels) : store_nhwc_codes_only<false>(o, acc, pixels);
  with_activation(o.act, [&](auto act) { store_nhwc_outputs<act>(o, acc, pixels); });
}

void nhwc_quantize(const float* x, int64_t stride, int64_t channels, int64_t pixels, float inverse_scale, int32_t zero,
                   uint8_t* codes, int64_t pixel_bytes) {
  for (int64_t c = 0; c < channels; c += 4)
    for (int64_t p = 0; p < pixels; p += SIMD_WIDTH) {
      const int64_t count = std::min<int64_t>(SIMD_WIDTH, pixels - p);
      u32_vec bits[4] = {};
      for (int64_t i = 0; i < std::min<int64_t>(4, channels - c); ++i)
        bits[i] = static_code(load_partial(x + (c + i) * stride + p, count), inverse_scale, zero);
      uint32_t lanes[SIMD_WIDTH];
      store_raw(lanes, pack_codes(bits[0], bits[1], bits[2], bits[3]));
      if (pixel_bytes == 4)
        std::memcpy(codes + p * 4, lanes, size_t(count) * 4);
      else
        for (int64_t i = 0; i < count; ++i) std::memcpy(codes + (p + i) * pixel_bytes + c, lanes + i, 4);
    }
}

void nhwc_to_codes(const uint8_t* x, int64_t x_stride, int64_t channels, int64_t pixels, float inverse_scale,
                   int32_t zero, uint8_t* out, int64_t out_stride) {
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, out += out_stride)
    for (int64_t c = 0; c < channels; c += OUTPUTS_TOGETHER) {
      f32_vec v[OUTPUT_VECS] = {};
#pragma GCC unroll 4
      for (int i = 0; i < OUTPUT_VECS; ++i)
        if (c + i * SIMD_WIDTH < channels)
          v[i] = load_number(x + (c + i * SIMD_WIDTH) * 4) * inverse_scale + float(zero);
      store_codes(v, out + c, std::min(channels - c, OUTPUTS_TOGETHER));
    }
}

// max[c] = the larger of two codes.
void nhwc_max(const uint8_t* codes, int64_t channels, uint8_t* max) {
  const auto* a = reinterpret_cast<const stored_code*>(codes);
  auto* b = reinterpret_cast<stored_code*>(max);
  for (int64_t c = 0; c < channels; ++c) b[c] = a[c] > b[c] ? a[c] : b[c];
}

}  // namespace
