// AVX-512 emulated by SIMDe (Debian's libsimde-dev) and by the intrinsics below that SIMDe lacks, so that tests run the
// AVX-512 kernels on CPUs without those instructions. For tests only (RAREFY_EMULATE in CMakeLists.txt).
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

template <class T, int N>
struct elements {
  T of[N];
};

template <class To, class From>
To bit_cast_to(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T load_mask(const T* p) {
  T mask;
  std::memcpy(&mask, p, sizeof mask);
  return mask;
}

// Put consecutive elements of v where the mask has bits; the others keep those of `base`.
template <class T, int N, class V, class M>
V expand_elements(V base, M mask, V v) {
  auto out = bit_cast_to<elements<T, N>>(base);
  const auto in = bit_cast_to<elements<T, N>>(v);
  for (int i = 0, k = 0; i < N; ++i)
    if (mask >> i & 1) out.of[i] = in.of[k++];
  return bit_cast_to<V>(out);
}

template <class To, class From, int N, class V>
__m512i widen_elements(V v) {
  const auto in = bit_cast_to<elements<From, N>>(v);
  elements<To, N> out;
  for (int i = 0; i < N; ++i) out.of[i] = in.of[i];
  return bit_cast_to<__m512i>(out);
}

// Load the elements at which the mask has bits, and no other memory; the others are zeros.
template <class T, int N, class V>
V load_elements(uint64_t mask, const void* p) {
  elements<T, N> out{};
  for (int i = 0; i < N; ++i)
    if (mask >> i & 1) out.of[i] = static_cast<const T*>(p)[i];
  return bit_cast_to<V>(out);
}

// Store the elements of v where the mask has bits.
template <class T, int N, class V>
void store_elements(void* p, uint64_t mask, V v) {
  const auto in = bit_cast_to<elements<T, N>>(v);
  for (int i = 0; i < N; ++i)
    if (mask >> i & 1) static_cast<T*>(p)[i] = in.of[i];
}

// Add in the order of _mm512_reduce_add: halves onto halves.
template <class T, class V>
T reduce_elements(V v) {
  auto all = bit_cast_to<elements<T, 16>>(v);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) all.of[i] += all.of[i + n];
  return all.of[0];
}

uint16_t round_to_bf16(float f) {  // to nearest even; subnormals become zero, as in hardware
  const uint32_t u = bit_cast_to<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t(u & 0x7f800000 ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 & 0x8000);
}

__m512bh round_both_to_bf16(__m512 high, __m512 low) {
  const auto a = bit_cast_to<elements<float, 16>>(low), b = bit_cast_to<elements<float, 16>>(high);
  elements<uint16_t, 32> out;
  for (int i = 0; i < 16; ++i) {
    out.of[i] = round_to_bf16(a.of[i]);
    out.of[16 + i] = round_to_bf16(b.of[i]);
  }
  return bit_cast_to<__m512bh>(out);
}

__m512 reduce_to_fraction(__m512 v, int) {  // its only use: v - floor(v)
  auto all = bit_cast_to<elements<float, 16>>(v);
  for (float& f : all.of) f = std::isinf(f) ? 0.0f : f - std::floor(f);
  return bit_cast_to<__m512>(all);
}

}  // namespace

#define _load_mask16 load_mask
#define _load_mask32 load_mask
#define _load_mask64 load_mask
#define _mm512_cvtepi8_epi32 widen_elements<int32_t, int8_t, 16>
#define _mm512_cvtepu8_epi32 widen_elements<int32_t, uint8_t, 16>
#define _mm512_cvtepu8_epi16 widen_elements<uint16_t, uint8_t, 32>
#define _mm512_cvtne2ps_pbh round_both_to_bf16
#define _mm512_mask_expand_ps expand_elements<float, 16>
#define _mm512_mask_expand_epi16 expand_elements<uint16_t, 32>
#define _mm512_mask_expand_epi8 expand_elements<uint8_t, 64>
#define _mm512_mask_storeu_epi8 store_elements<uint8_t, 64>
#undef _mm512_maskz_loadu_ps  // SIMDe reads the whole vector
#define _mm512_maskz_loadu_ps load_elements<float, 16, __m512>
#undef _mm512_mask_storeu_ps  // SIMDe 0.8.2 writes zeros where the mask has none
#define _mm512_mask_storeu_ps store_elements<float, 16>
#define _mm512_reduce_ps reduce_to_fraction
#define _mm512_reduce_add_epi32 reduce_elements<int32_t>
#define _mm512_reduce_add_ps reduce_elements<float>
#define _mm512_stream_si512(p, v) std::memcpy(p, &(v), 64)
