// Vectors of eight numbers in the compiler's own notation: the same text serves every CPU, and AVX2 with the few places
// where its instructions do better than what compilers make of it.
#pragma once
#include <cstdint>
#include <cstring>

#include "rarefy.h"
#include "kernel_table.h"

#if defined(__AVX2__)
#include "avx2.hpp"
#endif

namespace {

constexpr int W = 8;
#if defined(__AVX2__)
constexpr int MOST = 2;  // vectors of a tile that fit sixteen registers
constexpr int32_t ADDED = 0;
#else
constexpr int MOST = 1;
constexpr int32_t ADDED = 128;
#endif

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));

template <class V>
inline V at(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

using lanes = vu;

inline lanes lanes_at(const void* p) { return at<vu>(p); }
inline void put_lanes(void* p, lanes v) { std::memcpy(p, &v, sizeof v); }

struct FloatSums {
  using sum = vf;
  static vf zero() { return vf{}; }
  static float total(vf s) { return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7])); }
};

struct IntegerSums {  // their total is the bits of a float
  using sum = vi;
  static vi zero() { return vi{}; }
  static float total(vi s) {
    int32_t t = 0;
    for (int i = 0; i < W; ++i) t += s[i];
    return __builtin_bit_cast(float, t);
  }
};

inline uint32_t to_bf16(float f) {  // to the nearest, even where two are as near; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, f);
  if ((u & 0x7fffffff) > 0x7f800000) return (u >> 16) | 0x40;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline vf low_half(vu x) { return vf(x << 16); }
inline vf high_half(vu x) { return vf(x & 0xffff0000u); }

// bytes of inputs times bytes of weights (signed), four to a sum
inline vi dot_bytes(vi s, vu x, vi w) {
#if defined(__AVX2__)
  // pairs stay within 16 bits, as inputs are at most 127 and weights 128, where unsigned inputs would not
  const __m256i signs = _mm256_sign_epi8(__m256i(x), __m256i(w));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(w)), signs);
  return vi(_mm256_add_epi32(__m256i(s), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
#else
  s += vi(x & 255u) * (w << 24 >> 24);
  s += vi(x >> 8 & 255u) * (w << 16 >> 24);
  s += vi(x >> 16 & 255u) * (w << 8 >> 24);
  return s + vi(x >> 24) * (w >> 24);
#endif
}

// The values of a cell at the places of its bits, zeros elsewhere.
template <class T, int N>
inline void scatter(const char* bits, const T* v, T (&out)[N]) {
  uint64_t mask = 0;
  std::memcpy(&mask, bits, N / 8);
  for (int i = 0; i < N; ++i) {
    out[i] = mask >> i & 1 ? *v : T(0);
    v += mask >> i & 1;
  }
}

template <int KIND>
struct Bits;

template <>
struct Bits<RAREFY_F32> : FloatSums {
  using value = float;
  using input = float;
  static constexpr int cell = 8;
  static int none() { return 0; }
  static vf expand(int, const char* bits, const float* v) {
#if defined(__AVX2__)
    const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(places.ranks[uint8_t(*bits)])));
    const __m256i here = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(uint8_t(*bits)), here), here);
    return vf(_mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(v), from), _mm256_castsi256_ps(kept)));
#else
    float out[8];
    scatter(bits, v, out);
    return at<vf>(out);
#endif
  }
  static vf step(vf s, vf w, const float* x) { return s + w * at<vf>(x); }
};

template <>
struct Bits<RAREFY_BF16> : FloatSums {
  using value = uint16_t;
  using input = uint16_t;
  static constexpr int cell = 16;
  static int none() { return 0; }
  static vu expand(int, const char* bits, const uint16_t* v) {
#if defined(__AVX2__)
    return vu(expand_pairs(bits, v));
#else
    uint16_t out[16];
    scatter(bits, v, out);
    return at<vu>(out);
#endif
  }
  static vf step(vf s, vu w, const uint16_t* x) {
    const vu in = at<vu>(x);
    return s + low_half(w) * low_half(in) + high_half(w) * high_half(in);
  }
};

template <>
struct Bits<RAREFY_I8> : IntegerSums {
  using value = int8_t;
  using input = uint8_t;
  static constexpr int cell = 32;
  static int none() { return 0; }
  static vi expand(int, const char* bits, const int8_t* v) {
#if defined(__AVX2__)
    return vi(expand_bytes(bits, v));
#else
    int8_t out[32];
    scatter(bits, v, out);
    return at<vi>(out);
#endif
  }
  static vi step(vi s, vi w, const uint8_t* x) { return dot_bytes(s, at<vu>(x), w); }
};

struct Nibbles {
  struct bytes {
    vi of[2];
  };
  static int none() { return 0; }
  static bytes expand(int, const uint64_t* mask, const uint8_t* v) {
    int8_t out[64];
#if defined(__AVX2__)
    const char* bits = reinterpret_cast<const char*>(mask);
    from_nibbles(v, 8, 8, out);
    return {{vi(expand_bytes(bits, out)), vi(expand_bytes(bits + 4, out + __builtin_popcountll(*mask << 32)))}};
#else
    for (int i = 0, k = 0; i < 64; ++i) {
      const bool here = *mask >> i & 1;
      out[i] = here ? int8_t((v[k / 2] >> (k % 2 * 4) & 15) - 8) : int8_t(0);
      k += here;
    }
    return {{at<vi>(out), at<vi>(out + 32)}};
#endif
  }
  static vf step(vf s, bytes w, const uint8_t* x, float by) {
    const vi dot = dot_bytes(dot_bytes(vi{}, at<vu>(x), w.of[0]), at<vu>(x + 32), w.of[1]);
    return s + __builtin_convertvector(dot, vf) * by;
  }
};

struct Cells {
  const int64_t parts;
  struct numbers {
    int8_t of[64];
  };
  numbers bytes(const uint8_t* v) const { return at<numbers>(v); }
  struct zero {
    int8_t first, second;
  };
  zero zeros(const uint8_t* z) const {
    return z ? zero{int8_t(z[0]), int8_t(z[parts > 1])} : zero{8, 8};
  }
  struct scale {
    float low, high;
  };
  scale scales(const uint16_t* s) const {
    return parts ? scale{from_bf16(s[0]), from_bf16(s[parts > 1])} : scale{1.0f, 1.0f};
  }
  numbers nibbles(const uint8_t* v, zero z) const {
    numbers out;
#if defined(__AVX2__)
    from_nibbles(v, z.first, z.second, out.of);
#else
    for (int i = 0; i < 64; ++i) out.of[i] = int8_t((v[i / 2] >> (i % 2 * 4) & 15) - (i < 32 ? z.first : z.second));
#endif
    return out;
  }
  vf step(vf s, const numbers& w, const uint8_t* x, scale by) const {
    const vi a = dot_bytes(vi{}, at<vu>(x), at<vi>(w.of)), b = dot_bytes(vi{}, at<vu>(x + 32), at<vi>(w.of + 32));
    return s + __builtin_convertvector(a, vf) * by.low + __builtin_convertvector(b, vf) * by.high;
  }
  static vf floats(const int8_t* v) {
    typedef int8_t eight __attribute__((vector_size(8)));
    return __builtin_convertvector(at<eight>(v), vf);
  }
  vf step(vf s, const numbers& w, const float* x, scale by) const {
    vf a{}, b{};
    for (int i = 0; i < 32; i += W) {
      a += floats(w.of + i) * at<vf>(x + i);
      b += floats(w.of + 32 + i) * at<vf>(x + 32 + i);
    }
    return s + a * by.low + b * by.high;
  }
};

template <int KIND>
struct Lanes;

#if defined(__AVX2__)
// Of n numbers at x as many as there is room for, with zeros behind.
template <int N>
inline const float* filled(const float* x, int64_t n, float (&room)[N]) {
  if (n >= N) return x;
  std::memset(room, 0, sizeof room);
  std::memcpy(room, x, size_t(n) * 4);
  return room;
}
#endif

struct Floats : FloatSums {
  static vf sum_at(const uint32_t* o) { return at<vf>(o); }
  static void store(uint32_t* o, vf s) { std::memcpy(o, &s, sizeof s); }
};

template <>
struct Lanes<RAREFY_F32> : Floats {
  using input = vf;
  static constexpr int width = 1;
  static vf load(const uint32_t* x) { return at<vf>(x); }
  static vf spread(uint32_t w) { return vf(vu{} + w); }
  static vf step(vf s, vf x, vf w) { return s + w * x; }
  static lanes to_lanes(const float* x, int64_t n, float) {
    lanes v{};
    std::memcpy(&v, x, size_t(n) * 4);
    return v;
  }
};

template <>
struct Lanes<RAREFY_BF16> : Floats {
  using input = vu;
  static constexpr int width = 2;
  static vu load(const uint32_t* x) { return at<vu>(x); }
  static vu spread(uint32_t w) { return vu{} + w; }
  static vf step(vf s, vu x, vu w) { return s + low_half(w) * low_half(x) + high_half(w) * high_half(x); }
  static lanes to_lanes(const float* x, int64_t n, float) {
#if defined(__AVX2__)
    float all[2 * W];
    return lanes(to_pairs(filled(x, n, all)));
#else
    lanes v;
    for (int64_t i = 0; i < W; ++i)
      v[i] = (2 * i < n ? to_bf16(x[2 * i]) : 0) | (2 * i + 1 < n ? to_bf16(x[2 * i + 1]) : 0) << 16;
    return v;
#endif
  }
};

template <>
struct Lanes<RAREFY_I8> : IntegerSums {
  using input = vu;
  static constexpr int width = 4;
  static vi sum_at(const uint32_t* o) { return at<vi>(o); }
  static void store(uint32_t* o, vi s) { std::memcpy(o, &s, sizeof s); }
  static vu load(const uint32_t* x) { return at<vu>(x); }
  static vi spread(uint32_t w) { return vi(vu{} + w); }
  static vi step(vi s, vu x, vi w) { return dot_bytes(s, x, w); }
  static lanes to_lanes(const float* x, int64_t n, float scale) {
#if defined(__AVX2__)
    float all[4 * W];
    return lanes(to_bytes(filled(x, n, all), scale));
#else
    uint8_t bytes[4 * W];
    for (int64_t i = 0; i < 4 * W; ++i) bytes[i] = i < n ? uint8_t(nearest(x[i] * scale) + ADDED) : ADDED;
    return lanes_at(bytes);
#endif
  }
  static int nearest(float f) {  // even where two are as near; NaN and what is too large become the ends
    const float most = f < 127.0f ? (f > -128.0f ? f : -128.0f) : 127.0f;
    return int(most + 12582912.0f - 12582912.0f);
  }
};

inline void transpose(lanes (&r)[W]) {
#if defined(__AVX2__)
  transpose_eight(reinterpret_cast<__m256(&)[W]>(r));
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

inline void past_caches(float* to, lanes v) {
#if defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), __m256i(v));
#else
  put_lanes(to, v);
#endif
}

inline void seen() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
