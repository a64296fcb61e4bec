// AVX2 intrinsics for what compilers translate badly: expansion by a bitmask, unpacking of codes, rounding to int8 and
// bf16, transposition.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernel_table.h"

namespace {

// Shuffle indices that expand consecutive values by a mask of eight bits. Positions without a bit have the highest bit
// set in `bytes` and `pairs`: a byte shuffle writes zeros there.
struct ExpansionTables {
  uint64_t ranks[256];     // for 32-bit elements, without that bit
  uint64_t bytes[256];     // for 8-bit elements
  uint64_t pairs[256][2];  // for 16-bit elements
  constexpr ExpansionTables() : ranks(), bytes(), pairs() {
    for (int mask = 0; mask < 256; ++mask)
      for (int position = 0, rank = 0; position < 8; rank += mask >> position & 1, ++position) {
        const bool nonzero = mask >> position & 1;
        const uint64_t pair = nonzero ? (2 * rank + 1) << 8 | 2 * rank : 128 << 8 | 128;
        ranks[mask] |= uint64_t(rank) << (8 * position);
        bytes[mask] |= uint64_t(nonzero ? rank : 128) << (8 * position);
        pairs[mask][position / 4] |= pair << (16 * (position % 4));
      }
  }
};
constexpr ExpansionTables expansions{};

inline __m128i load_two_halves(const void* low, const void* high) {
  const __m128i first = _mm_loadl_epi64(static_cast<const __m128i*>(low));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), static_cast<const __m64*>(high)));
}

// Expand int8 values by 32 mask bits; reads up to eight bytes past the last value.
inline __m256i expand_8bit(const char* bits, const int8_t* v) {
  uint32_t mask;
  std::memcpy(&mask, bits, 4);
  const auto values_from = [&](int n) { return v + __builtin_popcount(mask << (32 - n)); };
  const auto indices_from = [&](int n) { return expansions.bytes + (mask >> n & 255); };
  const __m256i upper = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);  // second half of 16 bytes
  const __m256i values =
      _mm256_set_m128i(load_two_halves(values_from(16), values_from(24)), load_two_halves(v, values_from(8)));
  const __m256i indices = _mm256_set_m128i(load_two_halves(indices_from(16), indices_from(24)),
                                           load_two_halves(indices_from(0), indices_from(8)));
  return _mm256_shuffle_epi8(values, _mm256_or_si256(indices, upper));
}

// Expand 16-bit values by 16 mask bits.
inline __m256i expand_16bit(const char* bits, const uint16_t* v) {
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  const uint8_t low = uint8_t(bits[0]), high = uint8_t(bits[1]);
  return _mm256_shuffle_epi8(_mm256_set_m128i(load(v + __builtin_popcount(low)), load(v)),
                             _mm256_set_m128i(load(expansions.pairs[high]), load(expansions.pairs[low])));
}

// Unpack a row of a panel of codes of 4 to 6 bits, and subtract the zero points of the first and the last 32.
template <int BITS>
inline void unpack_codes(const uint8_t* panel, int64_t row, int8_t low_zero, int8_t high_zero, int8_t (&out)[64]) {
  for (int64_t half = 0; half < 2; ++half) {
    const auto load = [&](int64_t at) {  // bytes of two columns, in 16 bits
      return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + at + 16 * half)));
    };
    const __m256i w = load(32 * row);
    __m256i codes = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), _mm256_set1_epi8(15));
    if constexpr (BITS > 4) {
      const __m256i high = load(high_bytes(BITS, row)), mask = _mm256_set1_epi16(((1 << (BITS - 4)) - 1) << 12);
      const __m256i even = _mm256_and_si256(_mm256_slli_epi16(high, 12 - high_bit(BITS, row, 0)), mask),
                    odd = _mm256_and_si256(_mm256_slli_epi16(high, 12 - high_bit(BITS, row, 1)), mask);
      codes = _mm256_or_si256(codes, _mm256_or_si256(_mm256_srli_epi16(even, 8), odd));
    }
    const __m256i values = _mm256_sub_epi8(codes, _mm256_set1_epi8(half ? high_zero : low_zero));
    std::memcpy(out + 32 * half, &values, 32);
  }
}

// Unpack 64 nibbles and subtract the zero points of the first and the last 32.
inline void unpack_int4(const uint8_t* v, int8_t low_zero, int8_t high_zero, int8_t (&out)[64]) {
  unpack_codes<4>(v, 0, low_zero, high_zero, out);
}

inline __m256i quantize_32(const float* x, float scale) {
  const __m256 s = _mm256_set1_ps(scale);
  const auto rounded = [&](int n) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + n), s)); };
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(rounded(0), rounded(8)), _mm256_packs_epi32(rounded(16), rounded(24)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs works on halves of 16 bytes
  return _mm256_permutevar8x32_epi32(bytes, order);
}

// Round to nearest even; NaN stays NaN.
inline __m256i round_16_to_bf16(const float* x) {
  const auto half = [&](int n) {
    const __m256 f = _mm256_loadu_ps(x + n);
    const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet_nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet_nan, is_nan), 16);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(half(0), half(8)), 0xd8);
}

inline void transpose_8x8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0x44);
      u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace
