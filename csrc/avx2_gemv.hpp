// One input of two int8 terms times a weight of 5 or 6 bits with scales for groups of inputs, with AVX2.
//
// Codes are multiplied as they are stored, without a sign: a pair of products with int8 fits 16 bits. What they are too
// large by, the zero point, is multiplied by the sums of the inputs, once for all rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "avx2.hpp"
#include "kernel_table.h"
#include "rarefy.h"

namespace {

constexpr int64_t GEMV_BLOCKS = 64;  // blocks of columns whose sums of inputs are computed at a time

// LOST_STEPS times the products of 32 codes and inputs, plus those of what rounding the inputs lost.
inline __m256i multiply_codes(__m256i codes, const uint8_t* x, const uint8_t* lost) {
  const auto pairs = [&](const uint8_t* in) {
    return _mm256_maddubs_epi16(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  };
  return _mm256_add_epi32(_mm256_madd_epi16(pairs(x), _mm256_set1_epi16(int16_t(LOST_STEPS))),
                          _mm256_madd_epi16(pairs(lost), _mm256_set1_epi16(1)));
}

inline float sum_of(__m256i v) {
  alignas(32) int32_t all[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), v);
  return float(((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7])));
}

// Four rows; `offsets`: the zero point times the sums of the inputs of each group.
template <int BITS, int GROUPS>
inline void multiply_four_rows(const uint8_t* value, const uint16_t* scale, const float* offsets, int64_t blocks,
                               const uint8_t* x, const uint8_t* lost, float (&sums)[TILE_ROWS]) {
  __m256 acc[TILE_ROWS], excess = _mm256_setzero_ps();
  for (__m256& a : acc) a = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, x += 64, lost += 64, scale += TILE_ROWS * GROUPS) {
    // the scales of all rows and groups, times the offsets of these groups
    const __m128i stored = GROUPS == 2 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale))
                                       : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale));
    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
    double pair;
    std::memcpy(&pair, offsets + 2 * b, 8);
    excess = _mm256_fmadd_ps(scales, _mm256_castpd_ps(_mm256_set1_pd(pair)), excess);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r, value += 8 * BITS) {
      __m256i codes[2];
      unpack_wide_codes<BITS>(value, codes);
      const __m256i low = multiply_codes(codes[0], x, lost), high = multiply_codes(codes[1], x + 32, lost + 32);
      if constexpr (GROUPS == 2) {
        float both;
        std::memcpy(&both, scale + 2 * r, 4);
        const __m256i pairs = _mm256_castps_si256(_mm256_set1_ps(both));
        const __m256i second = _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)));
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), acc[r]);
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_castsi256_ps(second), acc[r]);
      } else {
        const __m256i one_scale = _mm256_slli_epi32(_mm256_set1_epi16(int16_t(scale[r])), 16);
        const __m256 all = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
        acc[r] = _mm256_fmadd_ps(all, _mm256_castsi256_ps(one_scale), acc[r]);
      }
      _mm_prefetch(reinterpret_cast<const char*>(value) + PREFETCH_BYTES, _MM_HINT_T0);
    }
  }
  alignas(32) float all[8], over[8];
  _mm256_store_ps(over, excess);
  for (int r = 0; r < TILE_ROWS; ++r) {
    _mm256_store_ps(all, acc[r]);
    const float sum = ((all[0] + all[4]) + (all[1] + all[5])) + ((all[2] + all[6]) + (all[3] + all[7]));
    sums[r] = (sum - (GROUPS == 2 ? over[2 * r] + over[2 * r + 1] : over[r])) / LOST_STEPS;
  }
}

// Rows `from` (a multiple of four) to `to`.
template <int BITS, int GROUPS>
void wide_gemv(const rarefy_quantized& w, int64_t from, int64_t to, const uint8_t* x, float* y) {
  const int64_t row_bytes = w.col_blocks * 8 * BITS, row_scales = w.col_blocks * GROUPS;
  const auto* values = static_cast<const uint8_t*>(w.values);
  const __m256i zero_points = _mm256_set1_epi8(1 << (BITS - 1));
  for (int64_t first = 0; first < w.col_blocks; first += GEMV_BLOCKS) {
    const int64_t blocks = std::min(GEMV_BLOCKS, w.col_blocks - first);
    const uint8_t *in = x + 64 * first, *lost = in + 64 * w.col_blocks;
    float offsets[2 * GEMV_BLOCKS];
    for (int64_t b = 0; b < blocks; ++b) {
      const __m256i low = multiply_codes(zero_points, in + 64 * b, lost + 64 * b);
      const __m256i high = multiply_codes(zero_points, in + 64 * b + 32, lost + 64 * b + 32);
      offsets[2 * b] = GROUPS == 2 ? sum_of(low) : sum_of(_mm256_add_epi32(low, high));
      offsets[2 * b + 1] = GROUPS == 2 ? sum_of(high) : offsets[2 * b];
    }
    for (int64_t row = from; row < to; row += TILE_ROWS) {
      float sums[TILE_ROWS];
      multiply_four_rows<BITS, GROUPS>(values + row * row_bytes + TILE_ROWS * first * 8 * BITS,
                                       w.scales + row * row_scales + TILE_ROWS * first * GROUPS, offsets, blocks, in,
                                       lost, sums);
      for (int r = 0; r < TILE_ROWS && row + r < w.rows; ++r) y[row + r] = sums[r] + (first ? y[row + r] : 0.0f);
    }
  }
}

}  // namespace
