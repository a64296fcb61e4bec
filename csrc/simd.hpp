// Vectors of one instruction set, in which all kernels are written: simd512.hpp where RAREFY_SIMD512 is defined, else
// simd256.hpp with quantized256.hpp. Each translation unit compiles the kernels for its own instruction set. Everything
// is in an unnamed namespace: the linker must never merge an inline function compiled for AVX-512 with that of another
// unit.
//
// What either file provides:
//   SIMD_WIDTH, MAX_VECS   32-bit elements of a vector; vectors per row of a 4-row tile whose accumulators fit
//   registers INPUT_ZERO_POINT       added to int8 inputs: 128 where the dot product takes them unsigned, else 0
//   raw_vec                SIMD_WIDTH 32-bit elements of any type; load_raw, store_raw; transpose: SIMD_WIDTH of them
//   F32Accumulator, I32Accumulator   a vector of sums, and its reduction to one number
//   BitmaskOps<DTYPE>      expand the values of a bitmask, multiply them by an input; Int4BitmaskOps: int4
//   QuantizedOps           dequantize 64 values of a quantized weight, multiply them by an input
//   LaneOps<DTYPE>         multiply-accumulate of 32-bit lanes: 1 fp32, 2 bf16 or int16, 4 int8 inputs
//   JOINED_TERMS           whether the two int8 terms of an input are one number of 16 bits
//   BLOCK_SCALES           whether single inputs of 4- to 6-bit weights have a scale for each 32 in place of two terms
//   load_first, store_first   the first n floats, then zeros, where n is smaller than a vector
//   exp2_fast              2^x for x <= 8 with a relative error of 1e-4, at least 2^-100; NaN stays NaN
//   exp_vec, reciprocal    e^x and 1 / x with a relative error of 1e-7; NaN stays NaN
//   round_to_integers      the nearest integers of numbers from 0 to 2^22
//   stream_store, stream_fence   stores that bypass the caches, and the fence that makes them visible
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernel_table.h"
#if defined(RAREFY_SIMD512)
#include "simd512.hpp"
#else
#include "quantized256.hpp"
#endif

namespace {

constexpr uint32_t PACKED_ZEROS = uint32_t(INPUT_ZERO_POINT) * 0x01010101u;  // four int8 inputs that are zero

typedef float f32_vec __attribute__((vector_size(SIMD_WIDTH * 4)));
typedef int32_t i32_vec __attribute__((vector_size(SIMD_WIDTH * 4)));
typedef uint32_t u32_vec __attribute__((vector_size(SIMD_WIDTH * 4)));

inline f32_vec load_vec(const float* p) {
  f32_vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_vec(float* p, f32_vec v) { std::memcpy(p, &v, sizeof v); }

// The first n floats at p, then zeros; n may be larger than a vector.
inline f32_vec load_partial(const float* p, int64_t n) {
  return n >= SIMD_WIDTH ? load_vec(p) : f32_vec(load_first(p, n));
}

inline void store_partial(float* p, f32_vec v, int64_t n) {
  if (n >= SIMD_WIDTH)
    std::memcpy(p, &v, sizeof v);
  else
    store_first(p, v, n);
}

// The larger one of a magnitude and that of v, as integers, so that NaN is larger than all others.
inline i32_vec larger_magnitude(i32_vec max, f32_vec v) {
  const i32_vec magnitude = i32_vec(u32_vec(v) & 0x7fffffffu);
  return magnitude > max ? magnitude : max;
}

inline f32_vec max_vec(f32_vec a, f32_vec b) { return a > b ? a : b; }

// Compilers turn the loop into vector square roots; the vector extension has none.
inline f32_vec sqrt_vec(f32_vec v) {
  float f[SIMD_WIDTH];
  std::memcpy(f, &v, sizeof v);
  for (int i = 0; i < SIMD_WIDTH; ++i) f[i] = __builtin_sqrtf(f[i]);
  std::memcpy(&v, f, sizeof v);
  return v;
}

// Prefetch a weight, which is read once in streams: Intel's hardware prefetcher alone is 1.5 to 2 times slower.
inline void prefetch_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + PREFETCH_BYTES, 0, 3); }

// Split `columns` into groups of vectors whose accumulators for four rows fit the registers, and call
// part(vectors, first column) for each. With sixteen registers, groups of three use all of them: MOST is 2 where
// products need one too.
template <int MOST = 3, class F>
inline void for_each_vector_group(int64_t columns, F&& part) {
  int64_t left = (columns + SIMD_WIDTH - 1) / SIMD_WIDTH, column = 0;
  auto take = [&](auto vectors) {
    part(vectors, column);
    left -= vectors;
    column += vectors * SIMD_WIDTH;
  };
  if constexpr (MAX_VECS == 2 && MOST == 3)
    while (left == 3 || left > 4) take(std::integral_constant<int, 3>{});
  while (left >= MAX_VECS) take(std::integral_constant<int, MAX_VECS>{});
  if constexpr (MAX_VECS > 2)
    if (left >= 2) take(std::integral_constant<int, 2>{});
  while (left >= 1) take(std::integral_constant<int, 1>{});
}

}  // namespace
