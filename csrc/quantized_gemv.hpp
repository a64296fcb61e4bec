// Multiplication by dense weights of 4, 5, 6 and 8 bits for few inputs, and its epilogue.
#pragma once
#include <cstdint>
#include <type_traits>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#if defined(RAREFY_SIMD512)
#include "avx512_gemv.hpp"
#endif

namespace {

enum InputKind { INT8_INPUTS, FP32_INPUTS, TWO_TERMS };  // as `fp32_inputs` and `two_terms` of the weight

// Four rows on INPUTS inputs.
template <int BITS, InputKind KIND, int INPUTS>
inline void quantized_rows(const rarefy_quantized& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  using input = typename std::conditional<KIND == FP32_INPUTS, float, uint8_t>::type;
  using Ops = QuantizedOps<BITS>;
  F32Accumulator::acc acc[TILE_ROWS][INPUTS];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = F32Accumulator::zero();
  const int64_t cell = row * w.col_blocks, groups = w.scale_groups;
  const uint8_t* panel = static_cast<const uint8_t*>(w.values) + cell * 8 * BITS;
  const uint16_t* scale = w.scales + cell * groups;
  const uint8_t* zero_point = w.zeros ? w.zeros + cell * groups : nullptr;
  const input* in = static_cast<const input*>(x);
  const Ops ops{groups};
  for (int64_t block = 0; block < w.col_blocks; ++block, in += 64, panel += TILE_ROWS * 8 * BITS) {
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r, scale += groups) {
      const auto scales = ops.scales(scale);
      const auto values = ops.load(panel, r, ops.zero_points(zero_point));
      zero_point += zero_point ? groups : 0;
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) {
        const input* first = in + m * ldx;
        if constexpr (KIND == TWO_TERMS)
          acc[r][m] = ops.multiply_add(acc[r][m], values, first, first + w.col_blocks * 64, scales);
        else
          acc[r][m] = ops.multiply_add(acc[r][m], values, first, scales);
      }
      prefetch_ahead(panel + r * 8 * BITS);
    }
  }
  for (int r = 0; r < TILE_ROWS && row + r < w.rows; ++r)
    for (int m = 0; m < INPUTS; ++m) y[m * ldy + row + r] = F32Accumulator::reduce(acc[r][m]);
}

template <int BITS, InputKind KIND, int INPUTS>
void quantized_row_range(const rarefy_quantized& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                         int64_t ldy) {
  for (int64_t row = from; row < to; row += TILE_ROWS) quantized_rows<BITS, KIND, INPUTS>(w, row, x, ldx, y, ldy);
}

// Rows `from` (a multiple of four) to `to` on n inputs, four of them at a time.
template <int BITS, InputKind KIND>
void quantized_gemv(const rarefy_quantized& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                    int64_t ldy, int64_t n) {
  const auto* in = static_cast<const typename std::conditional<KIND == FP32_INPUTS, float, uint8_t>::type*>(x);
  if constexpr (KIND == TWO_TERMS && JOINED_TERMS)
    joined_gemv<BITS>(w, from, to, in, ldx, y, ldy, n);
  else
    for_each_four(n, [&](auto inputs, int64_t first) {
      auto rows = quantized_row_range<BITS, KIND, inputs>;
#if defined(RAREFY_SIMD512)
      if constexpr (KIND == TWO_TERMS && BITS < 8) rows = code_rows<BITS, inputs>;
      if constexpr (KIND == TWO_TERMS && BITS == 8)
        if (has_byte_rows(w)) rows = byte_row_range<inputs>;
#endif
      rows(w, from, to, in + first * ldx, ldx, y + first * ldy, ldy);
    });
}

// Epilogue in place on y[n][rows], of rows `from`..`to`. `scales`: the int8 scales of the inputs; null for fp32 inputs.
void quantized_epilogue(const rarefy_quantized& w, int64_t from, int64_t to, const float* scales, const float* residual,
                        float* y, int64_t ldy, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = from; r < to; r += SIMD_WIDTH) {
      const int64_t count = to - r;
      float* out = y + i * ldy + r;
      f32_vec v = load_partial(out, count);
      if (scales && !(BLOCK_SCALES && has_block_inputs(w))) {
        constexpr float both = INPUT_ZERO_POINT * (1.0f + 1.0f / LOST_STEPS);
        if (INPUT_ZERO_POINT != 0 && !(JOINED_TERMS && w.two_terms))
          v -= load_partial(w.row_sums + r, count) * (w.two_terms ? both : float(INPUT_ZERO_POINT));
        v *= scales[i];
      }
      if (w.row_scales) v *= load_partial(w.row_scales + r, count);
      if (w.bias) v += load_partial(w.bias + r, count);
      if (residual) v += load_partial(residual + i * ldy + r, count);
      store_partial(out, activate(v, w.act), count);
    }
}

}  // namespace
