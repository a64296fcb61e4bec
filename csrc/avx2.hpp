// What AVX2's own instructions do better than what compilers make of loops.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// For each mask of eight: which of the values that follow each other lies at each place. Bytes that no value goes to
// have the highest bit, of which a shuffle makes zeros.
struct Places {
  uint64_t ranks[256];        // without that bit
  uint64_t bytes[256];
  uint64_t pairs[256][2];     // of numbers of two bytes
  constexpr Places() : ranks(), bytes(), pairs() {
    for (int mask = 0; mask < 256; ++mask)
      for (int place = 0, rank = 0; place < 8; rank += mask >> place & 1, ++place) {
        const bool here = mask >> place & 1;
        ranks[mask] |= uint64_t(rank) << (8 * place);
        bytes[mask] |= uint64_t(here ? rank : 128) << (8 * place);
        pairs[mask][place / 4] |= uint64_t(here ? (2 * rank + 1) << 8 | 2 * rank : 128 << 8 | 128) << (16 * (place % 4));
      }
  }
};
constexpr Places places{};

inline __m128i two_eights(const void* low, const void* high) {
  const __m128i first = _mm_loadl_epi64(static_cast<const __m128i*>(low));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), static_cast<const __m64*>(high)));
}

// Values at the places of 32 bits, zeros elsewhere; eight bytes may be read past the last.
inline __m256i expand_bytes(const char* bits, const int8_t* v) {
  uint32_t mask;
  std::memcpy(&mask, bits, 4);
  const auto past = [&](int n) { return v + __builtin_popcount(mask << (32 - n)); };
  const auto at = [&](int n) { return places.bytes + (mask >> n & 255); };
  const __m256i upper = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);  // of each half
  const __m256i values = _mm256_set_m128i(two_eights(past(16), past(24)), two_eights(v, past(8)));
  const __m256i from = _mm256_set_m128i(two_eights(at(16), at(24)), two_eights(at(0), at(8)));
  return _mm256_shuffle_epi8(values, _mm256_or_si256(from, upper));
}

// The same of 16 bits, for numbers of two bytes.
inline __m256i expand_pairs(const char* bits, const uint16_t* v) {
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  const uint8_t low = uint8_t(bits[0]), high = uint8_t(bits[1]);
  return _mm256_shuffle_epi8(_mm256_set_m128i(load(v + __builtin_popcount(low)), load(v)),
                             _mm256_set_m128i(load(places.pairs[high]), load(places.pairs[low])));
}

// 64 nibbles as bytes, the lower first, each less a zero, of which either half has its own.
inline void from_nibbles(const uint8_t* v, int8_t first, int8_t second, int8_t (&out)[64]) {
  for (int half = 0; half < 2; ++half) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 16 * half)));
    const __m256i bytes = _mm256_and_si256(_mm256_or_si256(w, _mm256_slli_epi16(w, 4)), _mm256_set1_epi8(15));
    const __m256i whole = _mm256_sub_epi8(bytes, _mm256_set1_epi8(half ? second : first));
    std::memcpy(out + 32 * half, &whole, 32);
  }
}

// 32 numbers in bytes.
inline __m256i to_bytes(const float* x, float scale) {
  const __m256 by = _mm256_set1_ps(scale);
  const auto whole = [&](int n) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + n), by)); };
  const __m256i fours = _mm256_packs_epi16(_mm256_packs_epi32(whole(0), whole(8)), _mm256_packs_epi32(whole(16), whole(24)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(fours, order);
}

// 16 numbers in bf16, to the nearest, even where two are as near; NaN stays NaN.
inline __m256i to_pairs(const float* x) {
  const auto half = [&](int n) {
    const __m256 f = _mm256_loadu_ps(x + n);
    const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i none = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(near, none, nan), 16);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(half(0), half(8)), 0xd8);
}

inline void transpose_eight(__m256 (&r)[8]) {
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
