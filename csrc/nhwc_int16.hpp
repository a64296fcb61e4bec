// Products in int16 on fp32 images in NHWC order: the inputs of each output pixel are rounded together, with one scale.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "nhwc_kernels.hpp"
#include "nhwc_sums.hpp"
#include "simd.hpp"

namespace {

// The largest magnitude of n floats, as bits that are larger for infinite numbers and NaN.
inline int32_t largest_magnitude(const float* x, int64_t n, int32_t max) {
  i32_vec most[2] = {};
  int64_t i = 0;
  for (; i + 2 * SIMD_WIDTH <= n; i += 2 * SIMD_WIDTH)
    for (int v = 0; v < 2; ++v) most[v] = larger_magnitude(most[v], load_vec(x + i + v * SIMD_WIDTH));
  for (; i < n; i += SIMD_WIDTH) most[0] = larger_magnitude(most[0], load_partial(x + i, n - i));
  for (int v = 0; v < 2; ++v)
    for (int k = 0; k < SIMD_WIDTH; ++k) max = std::max<int32_t>(max, most[v][k]);
  return max;
}

// n floats in steps of 1 / inverse; writes whole vectors.
inline void round_to_int16(const float* x, int64_t n, float inverse, int16_t* out) {
  int64_t i = 0;
  for (; i + 2 * SIMD_WIDTH <= n; i += 2 * SIMD_WIDTH)
    store_raw(out + i, round_pair_to_int16(load_vec(x + i) * inverse, load_vec(x + i + SIMD_WIDTH) * inverse));
  if (i < n)
    store_raw(out + i, round_pair_to_int16(
                           load_partial(x + i, n - i) * inverse,
                           load_partial(x + i + SIMD_WIDTH, std::max<int64_t>(n - i - SIMD_WIDTH, 0)) * inverse));
}

// Round the inputs of some outputs, `x_stride` bytes apart: `runs` runs of `count` floats each, at x + offsets[r]. Rows
// of `out` are `padded` numbers, zeros after the inputs; a vector past the last row is written.
void nhwc_round_int16(const uint8_t* x, int64_t x_stride, const int64_t* offsets, int64_t runs, int64_t count,
                      int64_t pixels, int64_t padded, int16_t* out, float* scales) {
  for (int64_t p = 0; p < pixels; ++p, x += x_stride, out += padded) {
    const auto run = [&](int64_t r) { return reinterpret_cast<const float*>(x + offsets[r]); };
    int32_t max = 0;
    for (int64_t r = 0; r < runs; ++r) max = largest_magnitude(run(r), count, max);
    const float magnitude = __builtin_bit_cast(float, max);
    scales[p] =
        !(magnitude < INFINITY) ? NAN : std::max(magnitude * (1.0f / float(INT16_INPUT_STEPS)), MIN_INPUT_SCALE);
    for (int64_t r = 0; r < runs; ++r) round_to_int16(run(r), count, 1.0f / scales[p], out + r * count);
    std::memset(out + runs * count, 0, size_t(padded - runs * count) * 2);
  }
}

// Numbers out of sums of int16, which go on from what is in `acc` or begin with zeros.
template <bool RESIDUAL>
struct Int16Sink {
  using L = LaneOps<RAREFY_I16>;
  inline auto begin(int pixel, int vec) const { return sums.begin(pixel, vec); }
  inline void end(int pixel, int vec, L::acc sum) const {
    const f32_vec v = __builtin_convertvector(__builtin_bit_cast(i32_vec, sum), f32_vec);
    numbers.end(pixel, vec, v * scales[pixel] * load_vec(factors + vec * SIMD_WIDTH));
  }
  inline void skip(int64_t pixels) {
    sums.skip(pixels);
    numbers.skip(pixels);
    scales += pixels;
  }
  SumBuffer<L> sums;
  NumberSink<RESIDUAL> numbers;
  const float *factors, *scales;
};

// Numbers of evenly spaced pixels, with an activation of is_clamp, from rows of int16; `acc` is for sums of many
// blocks.
void nhwc_int16_numbers(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                        int64_t pixels, const uint32_t* values, const float* scales, uint32_t* acc,
                        const rarefy_nhwc_outputs& outputs) {
  const int64_t group_stride = num_blocks * NHWC_BLOCK, groups = (outputs.outputs + 15) / 16;
  const int64_t last = (num_blocks - 1) / NHWC_BLOCKS_IN_L1 * NHWC_BLOCKS_IN_L1;
  for (int64_t b = 0; b < last; b += NHWC_BLOCKS_IN_L1)
    nhwc_chunk_products<RAREFY_I16>(blocks, num_blocks, b, x, x_stride, pixels, values, groups, acc);
  for_each_groups(groups, [&](int64_t g, auto number) {
    const int64_t first = g * 16;
    with_number_sink(outputs, first, [&](auto sink) {
      const Int16Sink<decltype(sink)::HAS_RESIDUAL> sums{
          {acc + first, last > 0}, sink, outputs.factors + first, scales};
      nhwc_group_products<RAREFY_I16, number>(blocks + last, num_blocks - last, x, x_stride, pixels,
                                              values + g * group_stride + last * NHWC_BLOCK, group_stride, sums);
    });
  });
}

// Sums [pixels][NHWC_OUTPUTS] as fp32 numbers, in place.
void nhwc_scale_sums(uint32_t* acc, int64_t pixels, int64_t outputs, const float* scales, const float* factors) {
  for (int64_t p = 0; p < pixels; ++p, acc += NHWC_OUTPUTS)
    for (int64_t o = 0; o < outputs; o += SIMD_WIDTH) {
      auto* sums = reinterpret_cast<float*>(acc + o);
      const f32_vec v = __builtin_convertvector(i32_vec(load_vec(sums)), f32_vec);
      store_vec(sums, v * scales[p] * load_vec(factors + o));
    }
}

}  // namespace
