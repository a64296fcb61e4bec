// Vectors of sixteen numbers: AVX-512 with VNNI, BF16 and VBMI2.
#pragma once
#if defined(RAREFY_EMULATED)
#include "avx512_emulation.hpp"
#define HIDE(how, v)
#else
#include <immintrin.h>
#define HIDE(how, v) how("" : "+v"(v))
#endif

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"

namespace {
constexpr int W = 16, MOST = 4;
constexpr int32_t ADDED = 128;

// Zen 4 and 5 make a zero-masked expansion wait for the register that it overwrites. So it is merged into zeros that
// the compiler cannot know to be zeros.
inline __m512i zeros() {
  __m512i z = _mm512_setzero_si512();
  HIDE(asm volatile, z);
  return z;
}

// Expansion out of memory is slower than a load and an expansion of a register, into which compilers like to fold it.
inline __m512i in_register(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  HIDE(asm, v);
  return v;
}

using lanes = __m512i;

inline lanes lanes_at(const void* p) { return _mm512_loadu_si512(p); }
inline void put_lanes(void* p, lanes v) { _mm512_storeu_si512(p, v); }

struct FloatSums {
  using sum = __m512;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static float total(__m512 s) { return _mm512_reduce_add_ps(s); }
};

struct IntegerSums {  // their total is the bits of a float
  using sum = __m512i;
  static __m512i zero() { return _mm512_setzero_si512(); }
  static float total(__m512i s) { return __builtin_bit_cast(float, _mm512_reduce_add_epi32(s)); }
};

template <int KIND>
struct Bits;

template <>
struct Bits<RAREFY_F32> : FloatSums {
  using value = float;
  using input = float;
  static constexpr int cell = 16;
  static __m512 none() { return _mm512_castsi512_ps(zeros()); }
  static __m512 expand(__m512 none, const char* bits, const float* v) {
    return _mm512_mask_expand_ps(none, _load_mask16((__mmask16*)bits), _mm512_castsi512_ps(in_register(v)));
  }
  static __m512 step(__m512 s, __m512 w, const float* x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), s); }
};

template <>
struct Bits<RAREFY_BF16> : FloatSums {
  using value = uint16_t;
  using input = uint16_t;
  static constexpr int cell = 32;
  static __m512i none() { return zeros(); }
  static __m512i expand(__m512i none, const char* bits, const uint16_t* v) {
    return _mm512_mask_expand_epi16(none, _load_mask32((__mmask32*)bits), in_register(v));
  }
  static __m512 step(__m512 s, __m512i w, const uint16_t* x) {
    return _mm512_dpbf16_ps(s, __m512bh(w), __m512bh(_mm512_loadu_si512(x)));
  }
};

template <>
struct Bits<RAREFY_I8> : IntegerSums {
  using value = int8_t;
  using input = uint8_t;
  static constexpr int cell = 64;
  static __m512i none() { return zeros(); }
  static __m512i expand(__m512i none, const char* bits, const int8_t* v) {
    return _mm512_mask_expand_epi8(none, _load_mask64((__mmask64*)bits), in_register(v));
  }
  static __m512i step(__m512i s, __m512i w, const uint8_t* x) { return _mm512_dpbusd_epi32(s, _mm512_loadu_si512(x), w); }
};

struct Nibbles {
  static __m512i none() { return zeros(); }
  static __m512i expand(__m512i none, const uint64_t* mask, const uint8_t* v) {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
    const __m512i bytes = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
    return _mm512_mask_expand_epi8(none, _load_mask64((__mmask64*)mask), _mm512_sub_epi8(bytes, _mm512_set1_epi8(8)));
  }
  static __m512 step(__m512 s, __m512i w, const uint8_t* x, float by) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(x), w);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(by), s);
  }
};

// The compiler would make constants anew in a loop, on the one port for shuffles.
inline __m512i constant(__m512i v) {
  HIDE(asm, v);
  return v;
}

struct Cells {
  const int64_t parts;
  const __m512i fifteen = constant(_mm512_set1_epi8(15)), eight = constant(_mm512_set1_epi8(8));
  const __m512i halves = constant(_mm512_mask_blend_epi8(0xffffffff00000000ull, _mm512_setzero_si512(), _mm512_set1_epi8(1)));
  const __m512i shifts = constant(_mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(16), _mm512_setzero_si512()));
  const __m512i high = constant(_mm512_set1_epi32(int(0xffff0000)));

  // Zeros and scales of two halves come by loads to every place, of which each half keeps its own.
  __m512i zeros(const uint8_t* z) const {
    if (!z) return eight;
    if (parts < 2) return _mm512_set1_epi8(char(*z));
    uint16_t both;
    std::memcpy(&both, z, 2);
    return _mm512_shuffle_epi8(_mm512_set1_epi16(short(both)), halves);
  }
  __m512 scales(const uint16_t* s) const {
    if (!parts) return _mm512_set1_ps(1.0f);
    uint32_t both;
    __m512i places;
    if (parts > 1) {
      std::memcpy(&both, s, 4);
      places = _mm512_set1_epi32(int(both));
    } else {
      places = _mm512_set1_epi16(short(*s));
    }
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(places, shifts), high));
  }
  __m512i bytes(const uint8_t* v) const { return _mm512_loadu_si512(v); }
  __m512i nibbles(const uint8_t* v, __m512i zero) const {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
    return _mm512_sub_epi8(_mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), fifteen), zero);
  }
  __m512 step(__m512 s, __m512i w, const uint8_t* x, __m512 by) const {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(x), w);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), by, s);
  }
  template <int PART>
  static __m512 floats(__m512i w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, PART)));
  }
  __m512 step(__m512 s, __m512i w, const float* x, __m512 by) const {
    __m512 a = _mm512_mul_ps(floats<0>(w), _mm512_loadu_ps(x)), b = _mm512_mul_ps(floats<2>(w), _mm512_loadu_ps(x + 32));
    a = _mm512_fmadd_ps(floats<1>(w), _mm512_loadu_ps(x + 16), a);
    b = _mm512_fmadd_ps(floats<3>(w), _mm512_loadu_ps(x + 48), b);
    const __m512 low = _mm512_shuffle_f32x4(by, by, 0x00), last = _mm512_shuffle_f32x4(by, by, 0xff);
    return _mm512_fmadd_ps(b, last, _mm512_fmadd_ps(a, low, s));
  }
};

template <int KIND>
struct Lanes;

struct Floats : FloatSums {
  using input = __m512;
  static __m512 load(const uint32_t* x) { return _mm512_load_ps(x); }
  static __m512 spread(uint32_t w) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(w))); }
  static __m512 sum_at(const uint32_t* o) { return _mm512_load_ps(o); }
  static void store(uint32_t* o, __m512 s) { _mm512_store_ps(o, s); }
};

template <>
struct Lanes<RAREFY_F32> : Floats {
  static constexpr int width = 1;
  static __m512 step(__m512 s, __m512 x, __m512 w) { return _mm512_fmadd_ps(w, x, s); }
  static lanes to_lanes(const float* x, int64_t n, float) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x));
  }
};

template <>
struct Lanes<RAREFY_BF16> : Floats {
  static constexpr int width = 2;
  static __m512 step(__m512 s, __m512 x, __m512 w) { return _mm512_dpbf16_ps(s, __m512bh(x), __m512bh(w)); }
  static lanes to_lanes(const float* x, int64_t n, float) {
    const uint32_t mask = n >= 32 ? ~0u : (1u << n) - 1;
    const __m512 a = _mm512_maskz_loadu_ps(__mmask16(mask), x), b = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 16);
    return __m512i(_mm512_cvtne2ps_pbh(b, a));
  }
};

inline __m128i to_bytes(const float* x, uint32_t mask, __m512 scale) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(__mmask16(mask), x), scale));
  return _mm_xor_si128(_mm512_cvtsepi32_epi8(q), _mm_set1_epi8(char(ADDED)));
}

template <>
struct Lanes<RAREFY_I8> : IntegerSums {
  using input = __m512i;
  static constexpr int width = 4;
  static __m512i load(const uint32_t* x) { return _mm512_load_si512(x); }
  static __m512i spread(uint32_t w) { return _mm512_set1_epi32(int(w)); }
  static __m512i step(__m512i s, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(s, x, w); }
  static __m512i sum_at(const uint32_t* o) { return _mm512_load_si512(o); }
  static void store(uint32_t* o, __m512i s) { _mm512_store_si512(o, s); }
  static lanes to_lanes(const float* x, int64_t n, float scale) {
    const uint64_t mask = n >= 64 ? ~0ull : (1ull << n) - 1;
    const __m512 s = _mm512_set1_ps(scale);
    __m512i v = _mm512_castsi128_si512(to_bytes(x, uint32_t(mask) & 0xffff, s));
    v = _mm512_inserti32x4(v, to_bytes(x + 16, uint32_t(mask >> 16) & 0xffff, s), 1);
    v = _mm512_inserti32x4(v, to_bytes(x + 32, uint32_t(mask >> 32) & 0xffff, s), 2);
    return _mm512_inserti32x4(v, to_bytes(x + 48, uint32_t(mask >> 48) & 0xffff, s), 3);
  }
};

inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

inline void past_caches(float* to, lanes v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }

inline void seen() { _mm_sfence(); }

}  // namespace
