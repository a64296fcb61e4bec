// Weights of few bits without gaps, small batches: whole numbers times scales.; `Cells` of the including unit makes bytes of 64 values and multiplies them by inputs.
#pragma once
#include <cstdint>
#include <type_traits>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// Four rows on M inputs: NIBBLES of the weight, inputs EXACT in fp32 or in bytes.
template <bool NIBBLES, bool EXACT, int M>
inline void panel_rows(const rarefy_panels& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  using input = typename std::conditional<EXACT, float, uint8_t>::type;
  constexpr int64_t bytes = NIBBLES ? 32 : 64;
  FloatSums::sum sum[R4][M];
#pragma GCC unroll 4
  for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[r][m] = FloatSums::zero();
  const int64_t cell = row * w.words, parts = w.parts;
  const uint8_t* value = static_cast<const uint8_t*>(w.values) + cell * bytes;
  const uint16_t* scale = w.scales + cell * parts;
  const uint8_t* zero = w.zeros ? w.zeros + cell * parts : nullptr;
  const input* in = static_cast<const input*>(x);
  const Cells cells{parts};
  for (int64_t word = 0; word < w.words; ++word, in += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r, value += bytes, scale += parts) {
      const auto by = cells.scales(scale);
      const auto wide = NIBBLES ? cells.nibbles(value, cells.zeros(zero)) : cells.bytes(value);
      zero += zero ? parts : 0;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[r][m] = cells.step(sum[r][m], wide, in + m * ldx, by);
      ahead(value);
    }
  }
  for (int r = 0; r < R4 && row + r < w.rows; ++r)
    for (int m = 0; m < M; ++m) y[m * ldy + row + r] = FloatSums::total(sum[r][m]);
}

template <bool NIBBLES, bool EXACT, int M>
void panel_range(const rarefy_panels& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t row = from; row < to; row += R4) panel_rows<NIBBLES, EXACT, M>(w, row, x, ldx, y, ldy);
}

// Rows `from`..`to` (from: of fours) for n inputs, four of these at a time.
template <bool NIBBLES, bool EXACT>
void panels_any(const rarefy_panels& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy,
                int64_t n) {
  const auto* in = static_cast<const typename std::conditional<EXACT, float, uint8_t>::type*>(x);
  for (; n > 0; n -= 4, in += 4 * ldx, y += 4 * ldy) {
    if (n >= 4)
      panel_range<NIBBLES, EXACT, 4>(w, from, to, in, ldx, y, ldy);
    else if (n == 3)
      panel_range<NIBBLES, EXACT, 3>(w, from, to, in, ldx, y, ldy);
    else if (n == 2)
      panel_range<NIBBLES, EXACT, 2>(w, from, to, in, ldx, y, ldy);
    else
      panel_range<NIBBLES, EXACT, 1>(w, from, to, in, ldx, y, ldy);
  }
}

// Outputs `from`..`to` of n inputs, whose sums lie where the outputs will; `scales`: of inputs in bytes, or null.
void settle_panels(const rarefy_panels& w, int64_t from, int64_t to, const float* scales, const float* residual, float* y,
                   int64_t ldy, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = from; r < to; r += W) {
      const int64_t here = to - r;
      float* at = y + i * ldy + r;
      vec v = some_at(at, here);
      if (scales) {
        if constexpr (ADDED != 0) v -= some_at(w.sums + r, here) * float(ADDED);
        v *= scales[i];
      }
      if (w.whole) v *= some_at(w.whole + r, here);
      if (w.bias) v += some_at(w.bias + r, here);
      if (residual) v += some_at(residual + i * ldy + r, here);
      put_some(at, activated(v, w.act), here);
    }
}

}  // namespace
