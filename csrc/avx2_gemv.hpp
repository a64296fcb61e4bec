// Few inputs of 16 bits, each the two int8 terms of a number in one, times a quantized weight, with AVX2.
//
// Codes of less than 8 bits are multiplied as they are stored, without a sign. What they are too large by, the zero
// point, is multiplied by the sums of the inputs, once for four rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "avx2.hpp"
#include "kernel_table.h"
#include "rarefy.h"

namespace {

constexpr int64_t GEMV_BLOCKS = JOINED_ROW_COLUMNS / 64;  // blocks of 64 columns at a time
constexpr int64_t GEMV_PREFETCH = 1024;  // bytes ahead: two threads read 27 GB/s, 21 with twice as many

// 64 codes of a row of a panel as vectors of 16 bits: of 8 bits all in their order, of less columns 0, 4, 8 ... then 1,
// 5, 9 ...
template <int BITS>
inline void load_words(const uint8_t* panel, int row, __m256i (&words)[4]) {
  if constexpr (BITS == 8) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      words[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + 64 * row) + i));
    return;
  }
  const auto load = [&](int64_t at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + at)); };
  const __m256i nibbles = load(32 * row), fifteen = _mm256_set1_epi16(15);
  words[0] = _mm256_and_si256(nibbles, fifteen);
  words[1] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), fifteen);
  words[2] = _mm256_and_si256(_mm256_srli_epi16(nibbles, 8), fifteen);
  words[3] = _mm256_srli_epi16(nibbles, 12);
  if constexpr (BITS > 4 && BITS < 8) {
    const __m256i high = load(high_bytes(BITS, row)), mask = _mm256_set1_epi16(((1 << (BITS - 4)) - 1) << 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int right = high_bit(BITS, row, i % 2) + i / 2 * 8 - 4;
      const __m256i bits = right < 0 ? _mm256_slli_epi16(high, -right) : _mm256_srli_epi16(high, right);
      words[i] = _mm256_or_si256(words[i], _mm256_and_si256(bits, mask));
    }
  }
}

// 32 values of 16 bits: the even ones, and the odd ones.
inline void split_pairs(__m256i first, __m256i second, __m256i& even, __m256i& odd) {
  const auto low = [](__m256i v) { return _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16); };
  const auto high = [](__m256i v) { return _mm256_srai_epi32(v, 16); };
  even = _mm256_permute4x64_epi64(_mm256_packs_epi32(low(first), low(second)), 0xd8);
  odd = _mm256_permute4x64_epi64(_mm256_packs_epi32(high(first), high(second)), 0xd8);
}

// 64 inputs in the order of load_words for less than 8 bits.
inline void arrange_inputs(const int16_t* x, __m256i* out) {
  __m256i in[4];
  for (int i = 0; i < 4; ++i) in[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i);
  split_pairs(in[0], in[1], out[0], out[1]);
  split_pairs(in[2], in[3], out[2], out[3]);
  const __m256i even[2] = {out[0], out[2]}, odd[2] = {out[1], out[3]};
  split_pairs(even[0], even[1], out[0], out[2]);
  split_pairs(odd[0], odd[1], out[1], out[3]);
}

inline int64_t sum_of(__m256i v) {
  alignas(32) int32_t all[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), v);
  int64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += all[i];
  return sum;
}

// The sum of each of N vectors, at most eight.
template <int N>
inline void sums_of(const __m256* v, float* out) {
  const auto at = [&](int i) { return i < N ? v[i] : _mm256_setzero_ps(); };
  const auto four = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps(at(i), at(i + 1)), _mm256_hadd_ps(at(i + 2), at(i + 3)));
  };
  const __m256 first = four(0), second = N > 4 ? four(4) : _mm256_setzero_ps();
  const __m256 low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
  alignas(32) float all[8];
  _mm256_store_ps(all, _mm256_add_ps(low, high));
  std::memcpy(out, all, N * sizeof(float));
}

// Some blocks of inputs as multiply_rows reads them.
template <int BITS, int INPUTS>
struct JoinedInputs {
  JoinedInputs(const uint8_t* x, int64_t ldx, int64_t blocks) {
    for (int m = 0; m < INPUTS; ++m) {
      const auto* in = reinterpret_cast<const int16_t*>(x + m * ldx);
      first[m] = reinterpret_cast<const __m256i*>(in);
      if constexpr (BITS < 8) {
        first[m] = words[m];
        for (int64_t b = 0; b < blocks; ++b, in += 64) {
          arrange_inputs(in, words[m] + 4 * b);
          sum_halves(in, sums[m] + 2 * b);
        }
      }
    }
  }
  // The sums of the first and the last 32 of 64 inputs.
  static void sum_halves(const int16_t* x, float* out) {
    const auto pairs = [&](int i) {
      return _mm256_madd_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i), _mm256_set1_epi16(1));
    };
    const __m256i low = _mm256_add_epi32(pairs(0), pairs(1)), high = _mm256_add_epi32(pairs(2), pairs(3));
    const __m256i fours = _mm256_hadd_epi32(low, high), eights = _mm256_hadd_epi32(fours, fours);
    const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(eights), _mm256_extracti128_si256(eights, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(out), _mm_cvtepi32_ps(both));
  }
  const __m256i* first[INPUTS];
  __m256i words[BITS < 8 ? INPUTS : 1][BITS < 8 ? 4 * GEMV_BLOCKS : 1];
  float sums[BITS < 8 ? INPUTS : 1][BITS < 8 ? 2 * GEMV_BLOCKS : 1];  // of each 32 columns
};

// The scales (bf16) of four rows for one block.
template <int GROUPS>
struct BlockScales {
  explicit BlockScales(const uint16_t* scale) {
    const __m128i stored = GROUPS == 2 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale))
                                       : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale));
    all = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
  }
  // The zero points of codes times them.
  template <int BITS>
  __m256 excess(const uint8_t* zero) const {
    return _mm256_mul_ps(all, zero ? zeros(zero) : _mm256_set1_ps(BITS < 8 ? 1 << (BITS - 1) : 0));
  }
  static __m256 zeros(const uint8_t* zero) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, zero, TILE_ROWS * GROUPS);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
  }
  // The scale of one half of the columns of row r in all elements, or those of both, each in half of the elements: so
  // are sums of less than 8 bits, and one scale for both is the same.
  __m256 of(int r, int half) const { return pick(GROUPS == 2 ? 2 * r + half : r, GROUPS == 2 ? 2 * r + half : r); }
  __m256 of_halves(int r) const { return pick(GROUPS == 2 ? 2 * r : r, GROUPS == 2 ? 2 * r + 1 : r); }
  __m256 pick(int low, int high) const {
    return _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(low, low, low, low, high, high, high, high));
  }
  __m256 all;
};

// What codes without a sign are too large by, times the sums of inputs: of four rows.
template <int BITS, int GROUPS, int INPUTS>
inline void excess_of_rows(const uint16_t* scale, const uint8_t* zero, int64_t blocks,
                           const JoinedInputs<BITS, INPUTS>& x, float (&out)[TILE_ROWS][INPUTS]) {
  __m256 acc[INPUTS];
  for (int m = 0; m < INPUTS; ++m) acc[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, scale += TILE_ROWS * GROUPS) {
    const BlockScales<GROUPS> scales(scale);
    const __m256 excess = scales.template excess<BITS>(zero);
    zero += zero ? TILE_ROWS * GROUPS : 0;
#pragma GCC unroll 4
    for (int m = 0; m < INPUTS; ++m) {
      const float* sums = x.sums[m] + 2 * b;
      double pair;
      std::memcpy(&pair, sums, 8);
      const __m256 both = GROUPS == 2 ? _mm256_castpd_ps(_mm256_set1_pd(pair)) : _mm256_set1_ps(sums[0] + sums[1]);
      acc[m] = _mm256_fmadd_ps(excess, both, acc[m]);
    }
  }
  for (int m = 0; m < INPUTS; ++m) {
    alignas(32) float all[8];
    _mm256_store_ps(all, acc[m]);
    for (int r = 0; r < TILE_ROWS; ++r) out[r][m] = GROUPS == 2 ? all[2 * r] + all[2 * r + 1] : all[r];
  }
}

// ROWS of four rows, from row `row` of them on, whose scales are for groups of columns.
template <int BITS, int GROUPS, int ROWS, int INPUTS>
inline void multiply_rows(const uint8_t* value, const uint16_t* scale, int row, int64_t blocks,
                          const JoinedInputs<BITS, INPUTS>& x, float (&out)[TILE_ROWS][INPUTS]) {
  __m256 acc[ROWS][INPUTS];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, value += TILE_ROWS * 8 * BITS, scale += TILE_ROWS * GROUPS) {
    const BlockScales<GROUPS> scales(scale);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      __m256i words[4];
      load_words<BITS>(value, row + r, words);
      _mm_prefetch(reinterpret_cast<const char*>(value) + (row + r) * 8 * BITS + GEMV_PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) {
        const __m256i* in = x.first[m] + 4 * b;
        const auto pairs = [&](int i) { return _mm256_madd_epi16(words[i], _mm256_loadu_si256(in + i)); };
        const __m256i low = _mm256_add_epi32(pairs(0), pairs(1)), high = _mm256_add_epi32(pairs(2), pairs(3));
        if constexpr (BITS < 8 || GROUPS == 1) {
          acc[r][m] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), scales.of_halves(row + r), acc[r][m]);
        } else {
          acc[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), scales.of(row + r, 0), acc[r][m]);
          acc[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), scales.of(row + r, 1), acc[r][m]);
        }
      }
    }
  }
  sums_of<ROWS * INPUTS>(acc[0], out[row]);
}

// As multiply_rows, of codes of less than 8 bits that have one scale for a row: all sums are integers.
template <int BITS, int ROWS, int INPUTS>
inline void multiply_unscaled_rows(const uint8_t* value, int row, int64_t blocks, const JoinedInputs<BITS, INPUTS>& x,
                                   float (&out)[TILE_ROWS][INPUTS]) {
  __m256i acc[ROWS][INPUTS];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b, value += TILE_ROWS * 8 * BITS) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      __m256i words[4];
      load_words<BITS>(value, row + r, words);
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          acc[r][m] =
              _mm256_add_epi32(acc[r][m], _mm256_madd_epi16(words[i], _mm256_loadu_si256(x.first[m] + 4 * b + i)));
      _mm_prefetch(reinterpret_cast<const char*>(value) + (row + r) * 8 * BITS + GEMV_PREFETCH, _MM_HINT_T0);
    }
  }
  for (int m = 0; m < INPUTS; ++m) {
    int64_t excess = 0;
    for (int64_t i = 0; i < 2 * blocks; ++i) excess += int64_t(x.sums[m][i]);
    excess *= 1 << (BITS - 1);
    for (int r = 0; r < ROWS; ++r) out[row + r][m] = float(sum_of(acc[r][m]) - excess);
  }
}

// Keep GCC from adding products to each other before they are added to a sum: that takes more registers than there are.
inline void in_register(__m256i& v) { asm("" : "+x"(v)); }

// As multiply_unscaled_rows, of 8 bits: a vector of inputs is read once for all rows.
template <int ROWS, int INPUTS>
inline void multiply_int8_rows(const uint8_t* value, int row, int64_t blocks, const JoinedInputs<8, INPUTS>& x,
                               float (&out)[TILE_ROWS][INPUTS]) {
  __m256i acc[ROWS][INPUTS];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < INPUTS; ++m) acc[r][m] = _mm256_setzero_si256();
  value += row * 64;
  for (int64_t b = 0; b < blocks; ++b, value += TILE_ROWS * 64) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(value) + r * 64 + GEMV_PREFETCH, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m256i word[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        word[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(value + r * 64) + i));
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) {
        const __m256i in = _mm256_loadu_si256(x.first[m] + 4 * b + i);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          acc[r][m] = _mm256_add_epi32(acc[r][m], _mm256_madd_epi16(word[r], in));
          in_register(acc[r][m]);
        }
      }
    }
  }
  __m256 numbers[ROWS][INPUTS];
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < INPUTS; ++m) numbers[r][m] = _mm256_cvtepi32_ps(acc[r][m]);
  sums_of<ROWS * INPUTS>(numbers[0], out[row]);
}

// Rows `from` (a multiple of four) to `to` on at most four inputs, ldx bytes apart.
template <int BITS, int GROUPS, int INPUTS>
void joined_rows(const rarefy_quantized& w, int64_t from, int64_t to, const uint8_t* x, int64_t ldx, float* y,
                 int64_t ldy) {
  constexpr int ROWS = INPUTS == 1 ? 4 : 2;  // sums and weights fit sixteen registers
  const auto* values = static_cast<const uint8_t*>(w.values);
  const float steps = float(1 << w.zero_bits);  // of zero points, between codes
  for (int64_t first = 0; first < w.col_blocks; first += GEMV_BLOCKS) {
    const int64_t blocks = std::min(GEMV_BLOCKS, w.col_blocks - first);
    const JoinedInputs<BITS, INPUTS> inputs(x + 128 * first, ldx, blocks);
    for (int64_t row = from; row < to; row += TILE_ROWS) {
      const int64_t cell = row * w.col_blocks + TILE_ROWS * first;
      const uint8_t* value = values + cell * 8 * BITS;
      const uint16_t* scale = GROUPS ? w.scales + cell * GROUPS : nullptr;
      float sums[TILE_ROWS][INPUTS], excess[TILE_ROWS][INPUTS] = {};
      if constexpr (GROUPS && BITS < 8)
        excess_of_rows<BITS, GROUPS>(scale, w.zeros ? w.zeros + cell * GROUPS : nullptr, blocks, inputs, excess);
#pragma GCC unroll 2
      for (int r = 0; r < TILE_ROWS; r += ROWS) {
        if constexpr (GROUPS)
          multiply_rows<BITS, GROUPS, ROWS>(value, scale, r, blocks, inputs, sums);
        else if constexpr (BITS == 8)
          multiply_int8_rows<ROWS>(value, r, blocks, inputs, sums);
        else
          multiply_unscaled_rows<BITS, ROWS>(value, r, blocks, inputs, sums);
      }
      for (int m = 0; m < INPUTS; ++m)
        for (int r = 0; r < TILE_ROWS && row + r < w.rows; ++r) {
          float& out = y[m * ldy + row + r];
          out = (sums[r][m] * steps - excess[r][m]) * (1.0f / LOST_STEPS) + (first ? out : 0.0f);
        }
    }
  }
}

template <int BITS, int GROUPS>
void joined_groups(const rarefy_quantized& w, int64_t from, int64_t to, const uint8_t* x, int64_t ldx, float* y,
                   int64_t ldy, int64_t n) {
  for_each_four(n, [&](auto inputs, int64_t first) {
    joined_rows<BITS, GROUPS, inputs>(w, from, to, x + first * ldx, ldx, y + first * ldy, ldy);
  });
}

template <int BITS>
void joined_gemv(const rarefy_quantized& w, int64_t from, int64_t to, const uint8_t* x, int64_t ldx, float* y,
                 int64_t ldy, int64_t n) {
  if (w.scale_groups == 2)
    joined_groups<BITS, 2>(w, from, to, x, ldx, y, ldy, n);
  else if (w.scale_groups == 1)
    joined_groups<BITS, 1>(w, from, to, x, ldx, y, ldy, n);
  else
    joined_groups<BITS, 0>(w, from, to, x, ldx, y, ldy, n);
}

}  // namespace
