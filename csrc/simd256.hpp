// Vectors of eight 32-bit elements in the compiler's vector extension, for any CPU. With AVX2, the few operations that
// compilers translate badly use its intrinsics (avx2.hpp). Section by section what simd.hpp lists.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"

#if defined(__AVX2__)
#include "avx2.hpp"
#endif

namespace {

constexpr int SIMD_WIDTH = 8;
#if defined(__AVX2__)
constexpr int MAX_VECS = 2;  // of sixteen registers
constexpr int32_t INPUT_ZERO_POINT = 0;
#else
constexpr int MAX_VECS = 1;
constexpr int32_t INPUT_ZERO_POINT = 128;
#endif

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

using raw_vec = u32x8;

constexpr bool BLOCK_SCALES = false;  // inputs of weights have two terms
constexpr bool JOINED_TERMS = true;   // the two int8 terms of an input are one number of 16 bits

inline raw_vec load_raw(const void* p) { return load_as<u32x8>(p); }
inline void store_raw(void* p, raw_vec v) { std::memcpy(p, &v, sizeof v); }

struct F32Accumulator {
  using acc = f32x8;
  static f32x8 zero() { return f32x8{}; }
  static float reduce(f32x8 s) { return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7])); }
};

struct I32Accumulator {  // its sum is returned as the bits of a float
  using acc = i32x8;
  static i32x8 zero() { return i32x8{}; }
  static float reduce(i32x8 s) {
    int32_t sum = 0;
    for (int i = 0; i < SIMD_WIDTH; ++i) sum += s[i];
    return __builtin_bit_cast(float, sum);
  }
};

inline uint32_t to_bf16(float f) {  // rounds to nearest even; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline f32x8 low_bf16(u32x8 x) { return f32x8(x << 16); }
inline f32x8 high_bf16(u32x8 x) { return f32x8(x & 0xffff0000u); }

// Add to each sum the dot product of four int8 inputs and four int8 weights.
inline i32x8 dot_int8(i32x8 s, u32x8 x, i32x8 w) {
#if defined(__AVX2__)
  // Signed inputs of at most 128 times weights of at most 127: a pair of products fits 16 bits. Unsigned inputs' would
  // not.
  const __m256i signed_w = _mm256_sign_epi8(__m256i(w), __m256i(x));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(x)), signed_w);
  return i32x8(_mm256_add_epi32(__m256i(s), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
#else
  s += i32x8(x & 255u) * (w << 24 >> 24);
  s += i32x8(x >> 8 & 255u) * (w << 16 >> 24);
  s += i32x8(x >> 16 & 255u) * (w << 8 >> 24);
  return s + i32x8(x >> 24) * (w >> 24);
#endif
}

// Put consecutive values where the mask has bits, zeros elsewhere.
template <class T, int N>
inline void expand_scalar(const char* bits, const T* v, T (&out)[N]) {
  uint64_t mask = 0;
  std::memcpy(&mask, bits, N / 8);
  for (int i = 0; i < N; ++i) {
    out[i] = mask >> i & 1 ? *v : T(0);
    v += mask >> i & 1;
  }
}

template <int DTYPE>
struct BitmaskOps;

template <>
struct BitmaskOps<RAREFY_F32> : F32Accumulator {
  using value = float;
  using input = float;
  static constexpr int CELL = 8;  // columns of one expansion
  static int zeros() { return 0; }
  static f32x8 expand(int, const char* bits, const float* v) {
#if defined(__AVX2__)
    const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(expansions.ranks[uint8_t(*bits)])));
    const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i nonzero = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(uint8_t(*bits)), bit), bit);
    return f32x8(_mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(v), index), _mm256_castsi256_ps(nonzero)));
#else
    float out[8];
    expand_scalar(bits, v, out);
    return load_as<f32x8>(out);
#endif
  }
  static f32x8 multiply_add(f32x8 s, f32x8 w, const float* x) { return s + w * load_as<f32x8>(x); }
};

template <>
struct BitmaskOps<RAREFY_BF16> : F32Accumulator {
  using value = uint16_t;
  using input = uint16_t;
  static constexpr int CELL = 16;
  static int zeros() { return 0; }
  static u32x8 expand(int, const char* bits, const uint16_t* v) {
#if defined(__AVX2__)
    return u32x8(expand_16bit(bits, v));
#else
    uint16_t out[16];
    expand_scalar(bits, v, out);
    return load_as<u32x8>(out);
#endif
  }
  static f32x8 multiply_add(f32x8 s, u32x8 w, const uint16_t* x) {
    const u32x8 in = load_as<u32x8>(x);
    return s + low_bf16(w) * low_bf16(in) + high_bf16(w) * high_bf16(in);
  }
};

template <>
struct BitmaskOps<RAREFY_I8> : I32Accumulator {
  using value = int8_t;
  using input = uint8_t;
  static constexpr int CELL = 32;
  static int zeros() { return 0; }
  static i32x8 expand(int, const char* bits, const int8_t* v) {
#if defined(__AVX2__)
    return i32x8(expand_8bit(bits, v));
#else
    int8_t out[32];
    expand_scalar(bits, v, out);
    return load_as<i32x8>(out);
#endif
  }
  static i32x8 multiply_add(i32x8 s, i32x8 w, const uint8_t* x) { return dot_int8(s, load_as<u32x8>(x), w); }
};

struct Int4BitmaskOps {
  struct int8_values {
    i32x8 of[2];
  };
  static int zeros() { return 0; }
  static int8_values expand(int, const uint64_t* mask, const uint8_t* v) {
    int8_t out[64];
#if defined(__AVX2__)
    const char* bits = reinterpret_cast<const char*>(mask);
    unpack_int4(v, 8, 8, out);
    return {{i32x8(expand_8bit(bits, out)), i32x8(expand_8bit(bits + 4, out + __builtin_popcountll(*mask << 32)))}};
#else
    for (int i = 0, k = 0; i < 64; ++i) {
      const bool nonzero = *mask >> i & 1;
      out[i] = nonzero ? int8_t((v[k / 2] >> (k % 2 * 4) & 15) - 8) : int8_t(0);
      k += nonzero;
    }
    return {{load_as<i32x8>(out), load_as<i32x8>(out + 32)}};
#endif
  }
  static f32x8 multiply_add(f32x8 s, int8_values w, const uint8_t* x, float scale) {
    const i32x8 dot = dot_int8(dot_int8(i32x8{}, load_as<u32x8>(x), w.of[0]), load_as<u32x8>(x + 32), w.of[1]);
    return s + __builtin_convertvector(dot, f32x8) * scale;
  }
};

template <int DTYPE>
struct LaneOps;

#if defined(__AVX2__)
// N floats: those at x, or a zero-padded copy where there are fewer.
template <int N>
inline const float* zero_padded(const float* x, int64_t n, float (&buffer)[N]) {
  if (n >= N) return x;
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, x, size_t(n) * 4);
  return buffer;
}
#endif

struct F32LaneOps : F32Accumulator {
  static f32x8 load_acc(const uint32_t* o) { return load_as<f32x8>(o); }
  static void store_acc(uint32_t* o, f32x8 s) { std::memcpy(o, &s, sizeof s); }
};

template <>
struct LaneOps<RAREFY_F32> : F32LaneOps {
  using input = f32x8;
  static constexpr int INPUTS = 1;  // of a lane
  static f32x8 load(const uint32_t* x) { return load_as<f32x8>(x); }
  static f32x8 broadcast(uint32_t w) { return f32x8(u32x8{} + w); }
  static f32x8 multiply_add(f32x8 s, f32x8 x, f32x8 w) { return s + w * x; }
  static raw_vec pack(const float* x, int64_t n, float) {
    raw_vec v{};
    std::memcpy(&v, x, size_t(n) * 4);
    return v;
  }
};

template <>
struct LaneOps<RAREFY_BF16> : F32LaneOps {
  using input = u32x8;
  static constexpr int INPUTS = 2;
  static u32x8 load(const uint32_t* x) { return load_as<u32x8>(x); }
  static u32x8 broadcast(uint32_t w) { return u32x8{} + w; }
  static f32x8 multiply_add(f32x8 s, u32x8 x, u32x8 w) {
    return s + low_bf16(w) * low_bf16(x) + high_bf16(w) * high_bf16(x);
  }
  static raw_vec pack(const float* x, int64_t n, float) {
#if defined(__AVX2__)
    float buffer[2 * SIMD_WIDTH];
    return raw_vec(round_16_to_bf16(zero_padded(x, n, buffer)));
#else
    raw_vec v;
    for (int64_t i = 0; i < SIMD_WIDTH; ++i)
      v[i] = (2 * i < n ? to_bf16(x[2 * i]) : 0) | (2 * i + 1 < n ? to_bf16(x[2 * i + 1]) : 0) << 16;
    return v;
#endif
  }
};

template <>
struct LaneOps<RAREFY_I8> : I32Accumulator {
  using input = u32x8;
  static constexpr int INPUTS = 4;
  static i32x8 load_acc(const uint32_t* o) { return load_as<i32x8>(o); }
  static void store_acc(uint32_t* o, i32x8 s) { std::memcpy(o, &s, sizeof s); }
  static u32x8 load(const uint32_t* x) { return load_as<u32x8>(x); }
  static i32x8 broadcast(uint32_t w) { return i32x8(u32x8{} + w); }
  static i32x8 multiply_add(i32x8 s, u32x8 x, i32x8 w) { return dot_int8(s, x, w); }
  static raw_vec pack(const float* x, int64_t n, float scale) {
#if defined(__AVX2__)
    float buffer[4 * SIMD_WIDTH];
    return raw_vec(quantize_32(zero_padded(x, n, buffer), scale));
#else
    uint8_t bytes[4 * SIMD_WIDTH];
    for (int64_t i = 0; i < 4 * SIMD_WIDTH; ++i)
      bytes[i] = i < n ? uint8_t(round_to_int8(x[i] * scale) + INPUT_ZERO_POINT) : INPUT_ZERO_POINT;
    return load_raw(bytes);
#endif
  }
  static int round_to_int8(float f) {  // to nearest even; saturates, and NaN becomes 127
    const float clamped = f < 127.0f ? (f > -128.0f ? f : -128.0f) : 127.0f;
    return int(clamped + 12582912.0f - 12582912.0f);  // 1.5 * 2^23 drops the fraction
  }
};

template <>
struct LaneOps<RAREFY_I16> : LaneOps<RAREFY_I8> {
  static constexpr int INPUTS = 2;
  static int16_t round(float f) {                                                     // saturates
    const float clamped = f < 32767.0f ? (f > -32767.0f ? f : -32767.0f) : 32767.0f;  // of NaN too
    return int16_t(int32_t(clamped + 12582912.0f - 12582912.0f));                     // 1.5 * 2^23 drops the fraction
  }
  static i32x8 multiply_add(i32x8 s, u32x8 x, i32x8 w) {
#if defined(__AVX2__)
    return i32x8(_mm256_add_epi32(__m256i(s), _mm256_madd_epi16(__m256i(x), __m256i(w))));
#else
    const i32x8 low = (i32x8(x) << 16 >> 16) * (w << 16 >> 16), high = (i32x8(x) >> 16) * (w >> 16);
    return i32x8(u32x8(s) + u32x8(low) + u32x8(high));  // of numbers without a scale, such as NaN, sums may overflow
#endif
  }
};

// Pairs of bf16 from two vectors: a in the low halves, b in the high ones. NaN stays NaN.
inline u32x8 round_to_bf16(f32x8 v) {
  const u32x8 u = u32x8(v), rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return v == v ? rounded : u >> 16 | 0x40u;
}
inline raw_vec pack_bf16(f32x8 a, f32x8 b) { return round_to_bf16(a) | round_to_bf16(b) << 16; }

// Eight stored codes as integers, and the low bytes of eight integers.
inline i32x8 load_codes(const void* p) {
#if defined(__AVX2__)
  return i32x8(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  i32x8 v;
  for (int i = 0; i < SIMD_WIDTH; ++i)
    v[i] = INPUT_ZERO_POINT ? static_cast<const uint8_t*>(p)[i] : static_cast<const int8_t*>(p)[i];
  return v;
#endif
}
#if defined(__AVX2__)
inline f32x8 max_of(f32x8 a, f32x8 b) { return f32x8(_mm256_max_ps(__m256(a), __m256(b))); }  // b where one is NaN
inline f32x8 min_of(f32x8 a, f32x8 b) { return f32x8(_mm256_min_ps(__m256(a), __m256(b))); }
#else
inline f32x8 max_of(f32x8 a, f32x8 b) { return a > b ? a : b; }
inline f32x8 min_of(f32x8 a, f32x8 b) { return a < b ? a : b; }
#endif
// Thirty-two numbers below 2^31 as stored codes, rounded, which saturate.
inline raw_vec round_to_codes(const f32x8 (&v)[4]) {
#if defined(__AVX2__)
  __m256i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm256_cvtps_epi32(__m256(v[i]));
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
  return raw_vec(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
  uint8_t bytes[4 * SIMD_WIDTH];
  for (int i = 0; i < 4 * SIMD_WIDTH; ++i) {
    const float f = v[i / SIMD_WIDTH][i % SIMD_WIDTH], clamped = f < 127.0f ? (f > -128.0f ? f : -128.0f) : 127.0f;
    bytes[i] = uint8_t(int(clamped + 12582912.0f - 12582912.0f) + INPUT_ZERO_POINT);
  }
  return load_raw(bytes);
#endif
}

// Sixteen numbers as int16, rounded, which saturate.
inline raw_vec round_pair_to_int16(f32x8 a, f32x8 b) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(__m256(a)), _mm256_cvtps_epi32(__m256(b)));
  return raw_vec(_mm256_permute4x64_epi64(pairs, 0xd8));
#else
  int16_t out[2 * SIMD_WIDTH];
  for (int i = 0; i < 2 * SIMD_WIDTH; ++i)
    out[i] = LaneOps<RAREFY_I16>::round(i < SIMD_WIDTH ? a[i] : b[i - SIMD_WIDTH]);
  return load_raw(out);
#endif
}

// The first n of 32 bytes.
inline void store_bytes(void* p, raw_vec v, int64_t n) {
  if (n >= 32)
    store_raw(p, v);
  else
    std::memcpy(p, &v, size_t(n));
}

inline raw_vec max_of_codes(raw_vec a, raw_vec b) {
#if defined(__AVX2__)
  return raw_vec(_mm256_max_epi8(__m256i(a), __m256i(b)));
#else
  typedef uint8_t u8x32 __attribute__((vector_size(32)));
  const u8x32 x = u8x32(a), y = u8x32(b);
  return raw_vec(x > y ? x : y);
#endif
}

// Pairs of 16 bits, of the codes of 16 channels of two pixels, in an order of their own.
struct code_pairs {
  raw_vec low, high;
};
#if defined(__AVX2__)
inline __m256i load_wide_codes(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline code_pairs pairs_of(__m256i a, __m256i b) {
  return {raw_vec(_mm256_unpacklo_epi16(a, b)), raw_vec(_mm256_unpackhi_epi16(a, b))};
}
#else
inline code_pairs load_wide_codes(const void* p) {
  return {raw_vec(load_codes(p)), raw_vec(load_codes(static_cast<const uint8_t*>(p) + SIMD_WIDTH))};
}
inline code_pairs pairs_of(code_pairs a, code_pairs b) {
  return {(a.low & 0xffffu) | b.low << 16, (a.high & 0xffffu) | b.high << 16};
}
#endif
inline code_pairs load_code_pairs(const void* a, const void* b) {
  return pairs_of(load_wide_codes(a), load_wide_codes(b));
}
inline code_pairs in_pair_order(raw_vec first, raw_vec second) {
#if defined(__AVX2__)
  return {raw_vec(_mm256_permute2x128_si256(__m256i(first), __m256i(second), 0x20)),
          raw_vec(_mm256_permute2x128_si256(__m256i(first), __m256i(second), 0x31))};
#else
  return {first, second};
#endif
}
inline code_pairs in_channel_order(code_pairs p) { return in_pair_order(p.low, p.high); }
inline raw_vec multiply_add_pairs(raw_vec s, raw_vec x, raw_vec w) {
  return raw_vec(LaneOps<RAREFY_I16>::multiply_add(i32x8(s), x, i32x8(w)));
}

inline void transpose(raw_vec (&r)[SIMD_WIDTH]) {
#if defined(__AVX2__)
  __m256 rows[SIMD_WIDTH];  // copied: vectors of another type must not alias these
  std::memcpy(rows, r, sizeof rows);
  transpose_8x8(rows);
  std::memcpy(r, rows, sizeof rows);
#else
  for (int i = 0; i < SIMD_WIDTH; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

inline f32x8 exp2_fast(f32x8 x) {
  x = x < -100.0f ? f32x8{} - 100.0f : x;
  const f32x8 shifted = x + 12582912.0f;  // 1.5 * 2^23 drops the fraction
  const f32x8 r = x - (shifted - 12582912.0f);
  f32x8 p = r * 5.5171660e-2f + 2.4261112e-1f;
  p = p * r + 6.9326099e-1f;
  p = p * r + 9.9992807e-1f;
  return f32x8(u32x8(p) + (u32x8(shifted) << 23));
}
// e^x with a relative error of 1e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays NaN.
inline f32x8 exp_vec(f32x8 x) {
  x = x < -87.0f ? f32x8{} - 87.0f : x;
  x = x > 88.0f ? f32x8{} + 88.0f : x;
  const f32x8 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // x / ln 2, rounded: 1.5 * 2^23 drops the fraction
  const f32x8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const f32x8 power = f32x8((u32x8(__builtin_convertvector(n == n ? n : f32x8{}, i32x8)) + 127u) << 23);
  return p * power;
}

// 1 / v with a relative error of 1e-7, zero where that would be denormal.
inline f32x8 reciprocal(f32x8 v) {
#if defined(__AVX2__)
  const f32x8 r = f32x8(_mm256_rcp_ps(__m256(v)));
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}

inline i32x8 round_to_integers(f32x8 v) {
#if defined(__AVX2__)
  return i32x8(_mm256_cvtps_epi32(__m256(v)));
#else
  return i32x8(u32x8(v + 12582912.0f) & 0x3fffffu);
#endif
}

inline f32x8 load_first(const float* p, int64_t n) {
  f32x8 v{};
  std::memcpy(&v, p, size_t(n) * 4);
  return v;
}

inline void store_first(float* p, f32x8 v, int64_t n) {
#if defined(__AVX2__)
  const i32x8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  _mm256_maskstore_ps(p, __m256i(lanes < int32_t(n)), __m256(v));
#else
  std::memcpy(p, &v, size_t(n) * 4);
#endif
}

inline void stream_store(float* p, raw_vec v) {
#if defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(v));
#else
  store_raw(p, v);
#endif
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
