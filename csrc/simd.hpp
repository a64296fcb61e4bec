// The vectors of the instruction set that a translation unit is compiled for, and what all kernels do with them. All of it is in an unnamed namespace: an inline function compiled for AVX-512 must never be the
// one that the linker picks for another unit.
//
// From simd256.hpp or, where RAREFY_SIMD512 is defined, simd512.hpp:
//   W, MOST        floats of a vector, vectors of a tile that fit the registers
//   ADDED          what is added to inputs in bytes: 128 where products take them without a sign, else 0
//   Bits<KIND>     expansion of a bitmask's values, and the product with an input; Nibbles: those of int4
//   Cells          64 whole numbers, and their product with inputs
//   Lanes<KIND>    products of 32-bit lanes: 1 fp32, 2 bf16, 4 int8
//   lanes          W 32-bit numbers; lanes_at, put_lanes; transpose: W of them
//   past_caches    lanes to memory, of which whole lines are written; seen: other threads see them from here on
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernel_table.h"
#if defined(RAREFY_SIMD512)
#include "simd512.hpp"
#else
#include "simd256.hpp"
#endif

namespace {

constexpr uint32_t NO_BYTES = uint32_t(ADDED) * 0x01010101u;  // four zeros in bytes

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ints __attribute__((vector_size(W * 4)));
typedef uint32_t words __attribute__((vector_size(W * 4)));

// The first n floats at p, zeros behind.
inline vec some_at(const float* p, int64_t n) {
  vec v{};
  if (n >= W)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, size_t(n) * 4);
  return v;
}

inline void put_some(float* p, vec v, int64_t n) {
  if (n >= W)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, size_t(n) * 4);
}

inline vec whole_at(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void put_whole(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec larger(vec a, vec b) { return a > b ? a : b; }

// A vector is a register or a piece of one, whose root compilers find by themselves.
inline vec root(vec v) {
  float f[W];
  std::memcpy(f, &v, sizeof v);
  for (int i = 0; i < W; ++i) f[i] = __builtin_sqrtf(f[i]);
  std::memcpy(&v, f, sizeof v);
  return v;
}

// Weights are read once, in streams that Intel's own fetching does not keep up with (1.5 to 2 times faster).
inline void ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD, 0, 3); }

// Calls part(how many vectors, the first column) for whole vectors of `columns` that together fit the registers as sums
// of four rows: of sixteen registers three vectors leave none over.
template <class F>
inline void by_vectors(int64_t columns, F&& part) {
  int64_t left = (columns + W - 1) / W, at = 0;
  auto take = [&](auto size) {
    part(size, at);
    left -= size;
    at += size * W;
  };
  if constexpr (MOST == 2)
    while (left == 3 || left > 4) take(std::integral_constant<int, 3>{});
  while (left >= MOST) take(std::integral_constant<int, MOST>{});
  if constexpr (MOST > 2)
    if (left >= 2) take(std::integral_constant<int, 2>{});
  while (left >= 1) take(std::integral_constant<int, 1>{});
}

}  // namespace
