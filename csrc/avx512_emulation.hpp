// AVX-512 in software, by SIMDe (Debian's libsimde-dev) and what it lacks, so that tests run those kernels on CPUs that
// have no such instructions. In no build that anybody uses.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

namespace {

template <class T, int N>
struct numbers {
  T of[N];
};

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T mask_at(const T* p) {
  T mask;
  std::memcpy(&mask, p, sizeof mask);
  return mask;
}

// The next of v's numbers wherever the mask has a bit.
template <class T, int N, class V, class M>
V expanded(V at, M mask, V v) {
  auto out = same_bits<numbers<T, N>>(at);
  const auto in = same_bits<numbers<T, N>>(v);
  for (int i = 0, k = 0; i < N; ++i)
    if (mask >> i & 1) out.of[i] = in.of[k++];
  return same_bits<V>(out);
}

template <class To, class From, int N, class V>
__m512i widened(V v) {
  const auto in = same_bits<numbers<From, N>>(v);
  numbers<To, N> out;
  for (int i = 0; i < N; ++i) out.of[i] = in.of[i];
  return same_bits<__m512i>(out);
}

// As the processor adds: halves upon halves.
template <class T, class V>
T sum_of(V v) {
  auto all = same_bits<numbers<T, 16>>(v);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) all.of[i] += all.of[i + n];
  return all.of[0];
}

uint16_t bf16_of(float f) {  // to the nearest, even where two are as near; what is less than normal becomes zero
  const uint32_t u = same_bits<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t(u & 0x7f800000 ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 & 0x8000);
}

__m512bh bf16_of_both(__m512 high, __m512 low) {
  const auto a = same_bits<numbers<float, 16>>(low), b = same_bits<numbers<float, 16>>(high);
  numbers<uint16_t, 32> out;
  for (int i = 0; i < 16; ++i) {
    out.of[i] = bf16_of(a.of[i]);
    out.of[16 + i] = bf16_of(b.of[i]);
  }
  return same_bits<__m512bh>(out);
}

}  // namespace

#define _load_mask16 mask_at
#define _load_mask32 mask_at
#define _load_mask64 mask_at
#define _mm512_cvtepi8_epi32 widened<int32_t, int8_t, 16>
#define _mm512_cvtepu8_epi16 widened<uint16_t, uint8_t, 32>
#define _mm512_cvtne2ps_pbh bf16_of_both
#define _mm512_mask_expand_ps expanded<float, 16>
#define _mm512_mask_expand_epi16 expanded<uint16_t, 32>
#define _mm512_mask_expand_epi8 expanded<uint8_t, 64>
#define _mm512_reduce_add_epi32 sum_of<int32_t>
#define _mm512_reduce_add_ps sum_of<float>
#define _mm512_stream_si512(p, v) std::memcpy(p, &(v), 64)
