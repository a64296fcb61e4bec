// Vectors of sixteen 32-bit elements: AVX-512 with VNNI, BF16 and VBMI2. Section by section what simd.hpp lists.
#pragma once
#if defined(RAREFY_EMULATED)
#include "avx512_emulation.hpp"
#define HIDE_FROM_COMPILER(asm_keyword, v)
#else
#include <immintrin.h>
#define HIDE_FROM_COMPILER(asm_keyword, v) asm_keyword("" : "+v"(v))
#endif

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"

namespace {
constexpr int SIMD_WIDTH = 16, MAX_VECS = 4;
constexpr int32_t INPUT_ZERO_POINT = 128;
constexpr bool JOINED_TERMS = false;  // the two int8 terms of an input are multiplied one after the other
constexpr bool BLOCK_SCALES = true;   // inputs of 4- to 6-bit weights have a scale for each 32 in place of two terms

// On Zen 4 and 5 a zero-masked expansion waits for the register that it overwrites. So values are merged into zeros
// that the compiler cannot recognize as zeros.
inline __m512i opaque_zeros() {
  __m512i z = _mm512_setzero_si512();
  HIDE_FROM_COMPILER(asm volatile, z);
  return z;
}

// An expansion from memory is slower than a load and an expansion from a register; compilers like to fuse the two.
inline __m512i load_to_register(const void* p) {
  __m512i v = _mm512_loadu_si512(p);
  HIDE_FROM_COMPILER(asm, v);
  return v;
}

using raw_vec = __m512i;

inline raw_vec load_raw(const void* p) { return _mm512_loadu_si512(p); }
inline void store_raw(void* p, raw_vec v) { _mm512_storeu_si512(p, v); }

struct F32Accumulator {
  using acc = __m512;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static float reduce(__m512 s) { return _mm512_reduce_add_ps(s); }
};

struct I32Accumulator {  // its sum is returned as the bits of a float
  using acc = __m512i;
  static __m512i zero() { return _mm512_setzero_si512(); }
  static float reduce(__m512i s) { return __builtin_bit_cast(float, _mm512_reduce_add_epi32(s)); }
};

template <int DTYPE>
struct BitmaskOps;

template <>
struct BitmaskOps<RAREFY_F32> : F32Accumulator {
  using value = float;
  using input = float;
  static constexpr int CELL = 16;  // columns of one expansion
  static __m512 zeros() { return _mm512_castsi512_ps(opaque_zeros()); }
  static __m512 expand(__m512 zeros, const char* bits, const float* v) {
    return _mm512_mask_expand_ps(zeros, _load_mask16((__mmask16*)bits), _mm512_castsi512_ps(load_to_register(v)));
  }
  static __m512 multiply_add(__m512 s, __m512 w, const float* x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), s); }
};

template <>
struct BitmaskOps<RAREFY_BF16> : F32Accumulator {
  using value = uint16_t;
  using input = uint16_t;
  static constexpr int CELL = 32;
  static __m512i zeros() { return opaque_zeros(); }
  static __m512i expand(__m512i zeros, const char* bits, const uint16_t* v) {
    return _mm512_mask_expand_epi16(zeros, _load_mask32((__mmask32*)bits), load_to_register(v));
  }
  static __m512 multiply_add(__m512 s, __m512i w, const uint16_t* x) {
    return _mm512_dpbf16_ps(s, __m512bh(w), __m512bh(_mm512_loadu_si512(x)));
  }
};

template <>
struct BitmaskOps<RAREFY_I8> : I32Accumulator {
  using value = int8_t;
  using input = uint8_t;
  static constexpr int CELL = 64;
  static __m512i zeros() { return opaque_zeros(); }
  static __m512i expand(__m512i zeros, const char* bits, const int8_t* v) {
    return _mm512_mask_expand_epi8(zeros, _load_mask64((__mmask64*)bits), load_to_register(v));
  }
  static __m512i multiply_add(__m512i s, __m512i w, const uint8_t* x) {
    return _mm512_dpbusd_epi32(s, _mm512_loadu_si512(x), w);
  }
};

struct Int4BitmaskOps {
  static __m512i zeros() { return opaque_zeros(); }
  static __m512i expand(__m512i zeros, const uint64_t* mask, const uint8_t* v) {
    const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
    const __m512i bytes = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), _mm512_set1_epi8(15));
    return _mm512_mask_expand_epi8(zeros, _load_mask64((__mmask64*)mask), _mm512_sub_epi8(bytes, _mm512_set1_epi8(8)));
  }
  static __m512 multiply_add(__m512 s, __m512i w, const uint8_t* x, float scale) {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(x), w);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale), s);
  }
};

// Hide from the compiler how a vector was computed: it would rebuild constants in a loop, on the only shuffle port, and
// GCC copies sums of products from register to register, twice for each product.
inline __m512i in_register(__m512i v) {
  HIDE_FROM_COMPILER(asm, v);
  return v;
}

template <int BITS>
struct QuantizedOps {
  const int64_t scale_groups;
  const __m512i fifteen = in_register(_mm512_set1_epi8(15));
  const __m512i middle = in_register(_mm512_set1_epi8(BITS < 8 ? 1 << (BITS - 1) : 0));
  const __m512i high_mask = in_register(_mm512_set1_epi16(short(BITS == 6 ? 0x3000 : 0x1000)));
  const __m512i byte_of_half =
      in_register(_mm512_mask_blend_epi8(0xffffffff00000000ull, _mm512_setzero_si512(), _mm512_set1_epi8(1)));
  const __m512i shifts = in_register(_mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(16), _mm512_setzero_si512()));
  const __m512i high_bits = in_register(_mm512_set1_epi32(int(0xffff0000)));

  // The zero points (and scales) of both halves are broadcast together; each half then selects its own.
  __m512i zero_points(const uint8_t* z) const {
    if (BITS == 8 || !z) return middle;
    if (scale_groups < 2) return _mm512_set1_epi8(char(*z));
    uint16_t both;
    std::memcpy(&both, z, 2);
    return _mm512_shuffle_epi8(_mm512_set1_epi16(short(both)), byte_of_half);
  }
  __m512 scales(const uint16_t* s) const {
    if (!scale_groups) return _mm512_set1_ps(1.0f);
    uint32_t both;
    __m512i pairs;
    if (scale_groups > 1) {
      std::memcpy(&both, s, 4);
      pairs = _mm512_set1_epi32(int(both));
    } else {
      pairs = _mm512_set1_epi16(short(*s));
    }
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(pairs, shifts), high_bits));
  }
  // The values of a row of a panel.
  __m512i load(const uint8_t* panel, int64_t row, __m512i zero_point) const {
    if constexpr (BITS == 8) return _mm512_loadu_si512(panel + 64 * row);
    const auto load = [&](int64_t at) {  // bytes of two columns, in 16 bits
      return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + at)));
    };
    const __m512i w = load(32 * row);
    __m512i codes = _mm512_and_si512(_mm512_or_si512(w, _mm512_slli_epi16(w, 4)), fifteen);
    if constexpr (BITS > 4 && BITS < 8) {
      const __m512i high = load(high_bytes(BITS, row));
      const auto bits = [&](int odd) {
        const __m128i left = _mm_cvtsi32_si128(12 - high_bit(BITS, row, odd));
        return _mm512_and_si512(_mm512_sll_epi16(high, left), high_mask);
      };
      codes = _mm512_or_si512(codes, _mm512_or_si512(_mm512_srli_epi16(bits(0), 8), bits(1)));
    }
    return _mm512_sub_epi8(codes, zero_point);
  }
  __m512 multiply_add(__m512 s, __m512i w, const uint8_t* x, __m512 scale) const {
    const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(x), w);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, s);
  }
  __m512 multiply_add(__m512 s, __m512i w, const uint8_t* x, const uint8_t* lost, __m512 scale) const {
    return multiply_add(multiply_add(s, w, x, scale), w, lost, _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / LOST_STEPS)));
  }
  template <int QUARTER>
  static __m512 to_f32(__m512i w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(w, QUARTER)));
  }
  __m512 multiply_add(__m512 s, __m512i w, const float* x, __m512 scale) const {
    __m512 a = _mm512_mul_ps(to_f32<0>(w), _mm512_loadu_ps(x)),
           b = _mm512_mul_ps(to_f32<2>(w), _mm512_loadu_ps(x + 32));
    a = _mm512_fmadd_ps(to_f32<1>(w), _mm512_loadu_ps(x + 16), a);
    b = _mm512_fmadd_ps(to_f32<3>(w), _mm512_loadu_ps(x + 48), b);
    const __m512 low = _mm512_shuffle_f32x4(scale, scale, 0x00), high = _mm512_shuffle_f32x4(scale, scale, 0xff);
    return _mm512_fmadd_ps(b, high, _mm512_fmadd_ps(a, low, s));
  }
};

template <int DTYPE>
struct LaneOps;

struct F32LaneOps : F32Accumulator {
  using input = __m512;
  static __m512 load(const uint32_t* x) { return _mm512_load_ps(x); }
  static __m512 broadcast(uint32_t w) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(w))); }
  static __m512 load_acc(const uint32_t* o) { return _mm512_load_ps(o); }
  static void store_acc(uint32_t* o, __m512 s) { _mm512_store_ps(o, s); }
};

template <>
struct LaneOps<RAREFY_F32> : F32LaneOps {
  static constexpr int INPUTS = 1;  // of a lane
  static __m512 multiply_add(__m512 s, __m512 x, __m512 w) { return _mm512_fmadd_ps(w, x, s); }
  static raw_vec pack(const float* x, int64_t n, float) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x));
  }
};

template <>
struct LaneOps<RAREFY_BF16> : F32LaneOps {
  static constexpr int INPUTS = 2;
  static __m512 multiply_add(__m512 s, __m512 x, __m512 w) { return _mm512_dpbf16_ps(s, __m512bh(x), __m512bh(w)); }
  static raw_vec pack(const float* x, int64_t n, float) {
    const uint32_t mask = n >= 32 ? ~0u : (1u << n) - 1;
    const __m512 a = _mm512_maskz_loadu_ps(__mmask16(mask), x),
                 b = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), x + 16);
    return __m512i(_mm512_cvtne2ps_pbh(b, a));
  }
};

// Quantize sixteen floats, those without a mask bit as zeros.
inline __m128i quantize_16(const float* x, uint32_t mask, __m512 scale) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(__mmask16(mask), x), scale));
  return _mm_xor_si128(_mm512_cvtsepi32_epi8(q), _mm_set1_epi8(char(INPUT_ZERO_POINT)));
}

template <>
struct LaneOps<RAREFY_I8> : I32Accumulator {
  using input = __m512i;
  static constexpr int INPUTS = 4;
  static __m512i load(const uint32_t* x) { return _mm512_load_si512(x); }
  static __m512i broadcast(uint32_t w) { return _mm512_set1_epi32(int(w)); }
  static __m512i multiply_add(__m512i s, __m512i x, __m512i w) { return in_register(_mm512_dpbusd_epi32(s, x, w)); }
  static __m512i load_acc(const uint32_t* o) { return _mm512_load_si512(o); }
  static void store_acc(uint32_t* o, __m512i s) { _mm512_store_si512(o, s); }
  static raw_vec pack(const float* x, int64_t n, float scale) {
    const uint64_t mask = n >= 64 ? ~0ull : (1ull << n) - 1;
    const __m512 s = _mm512_set1_ps(scale);
    __m512i v = _mm512_castsi128_si512(quantize_16(x, uint32_t(mask) & 0xffff, s));
    v = _mm512_inserti32x4(v, quantize_16(x + 16, uint32_t(mask >> 16) & 0xffff, s), 1);
    v = _mm512_inserti32x4(v, quantize_16(x + 32, uint32_t(mask >> 32) & 0xffff, s), 2);
    return _mm512_inserti32x4(v, quantize_16(x + 48, uint32_t(mask >> 48) & 0xffff, s), 3);
  }
};

template <>
struct LaneOps<RAREFY_I16> : LaneOps<RAREFY_I8> {
  static constexpr int INPUTS = 2;
  static __m512i multiply_add(__m512i s, __m512i x, __m512i w) { return in_register(_mm512_dpwssd_epi32(s, x, w)); }
};

// Pairs of bf16 from two vectors: a in the low halves, b in the high ones.
inline raw_vec pack_bf16(__m512 a, __m512 b) {
  const __m512i order = _mm512_or_si512(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_slli_epi32(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
  return _mm512_permutexvar_epi16(order, __m512i(_mm512_cvtne2ps_pbh(b, a)));
}

// Sixteen stored codes as integers, and the low bytes of sixteen integers.
inline __m512i load_codes(const void* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline __m512 max_of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline __m512 min_of(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
// Sixty-four numbers below 2^31 as stored codes, rounded, which saturate.
inline __m512i round_to_codes(const __m512 (&v)[4]) {
  const __m512i a = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
  const __m512i b = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b));
  return _mm512_xor_si512(codes, _mm512_set1_epi8(char(INPUT_ZERO_POINT)));
}

// Thirty-two numbers as int16, rounded, which saturate.
inline __m512i round_pair_to_int16(__m512 a, __m512 b) {
  const __m512i pairs = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), pairs);
}

// The first n of 64 bytes.
inline void store_bytes(void* p, __m512i v, int64_t n) {
  _mm512_mask_storeu_epi8(p, n < 64 ? (1ull << n) - 1 : ~0ull, v);
}

inline __m512i max_of_codes(__m512i a, __m512i b) { return _mm512_max_epu8(a, b); }

// Pairs of 16 bits, of the codes of 32 channels of two pixels, in an order of their own.
struct code_pairs {
  __m512i low, high;
};
inline __m512i load_wide_codes(const void* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline code_pairs pairs_of(__m512i a, __m512i b) { return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)}; }
inline code_pairs load_code_pairs(const void* a, const void* b) {
  return pairs_of(load_wide_codes(a), load_wide_codes(b));
}
inline code_pairs in_pair_order(__m512i first, __m512i second) {
  return {_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd)};
}
inline code_pairs in_channel_order(code_pairs p) {
  return {_mm512_permutex2var_epi64(p.low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), p.high),
          _mm512_permutex2var_epi64(p.low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), p.high)};
}
inline __m512i multiply_add_pairs(__m512i s, __m512i x, __m512i w) {
  return LaneOps<RAREFY_I16>::multiply_add(s, x, w);
}

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

inline __m512 exp2_fast(__m512 x) {
  constexpr int FLOOR = 9;                        // without exceptions
  x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);  // no denormal numbers; NaN stays NaN
  const __m512 r = _mm512_reduce_ps(x, FLOOR);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(7.8024516e-2f), _mm512_set1_ps(2.2606716e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9583354e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.9992522e-1f));
  return _mm512_scalef_ps(p, x);  // times 2 to the floor of x
}

// e^x with a relative error of 1e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays NaN.
inline __m512 exp_vec(__m512 x) {
  constexpr int NEAREST = 8;  // without exceptions
  x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), NEAREST);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.9875691500e-4f), _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// 1 / v with a relative error of 1e-7, zero where that would be denormal.
inline __m512 reciprocal(__m512 v) {
  const __m512 r = _mm512_rcp14_ps(v);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(v, r, _mm512_set1_ps(1.0f)), r);
}

inline __m512i round_to_integers(__m512 v) { return _mm512_cvtps_epi32(v); }

inline __m512 load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline void store_first(float* p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }

inline void stream_store(float* p, raw_vec v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }

inline void stream_fence() { _mm_sfence(); }

}  // namespace
