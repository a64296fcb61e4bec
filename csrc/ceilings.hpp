// Loops that measure what a CPU can do at best: multiply-adds with inputs in the L1 cache and sums in registers, and
// reading memory. amx.cpp has multiply-adds on AMX tiles.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// Multiply four rows of a weight [CEILING_LANES][4] by inputs [CEILING_LANES][TILE_COLS], `rounds` times. Returns the
// number of multiply-adds; the sums go to `sums` so that the compiler must compute them.
template <int DTYPE>
int64_t multiply_adds(const uint32_t* weights, const uint32_t* x, int64_t rounds, uint32_t* sums) {
  using L = LaneOps<DTYPE>;
  constexpr int VECS = MAX_VECS == 2 ? 3 : MAX_VECS;  // with sixteen registers, twelve sums hide the latency
  typename L::acc acc[TILE_ROWS][VECS];
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) acc[r][t] = L::zero();
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t l = 0; l < CEILING_LANES; ++l) {
      typename L::input in[VECS];
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) in[t] = L::load(x + l * TILE_COLS + t * SIMD_WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < TILE_ROWS; ++r) {
        const auto w = L::broadcast(weights[l * TILE_ROWS + r]);
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], in[t], w);
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) L::store_acc(sums + r * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
  return rounds * CEILING_LANES * TILE_ROWS * VECS * SIMD_WIDTH * L::INPUTS;
}

// Read `bytes`, a multiple of READ_BYTES, and store sums of what was read.
inline void read_memory(const char* p, int64_t bytes, uint32_t* sums) {
  constexpr int VECS = READ_BYTES / (SIMD_WIDTH * 4);
  u32_vec sum[VECS] = {};
  for (int64_t i = 0; i < bytes; i += READ_BYTES)
#pragma GCC unroll 32
    for (int v = 0; v < VECS; ++v) {
      u32_vec in;
      if (v * SIMD_WIDTH * 4 % 64 == 0) prefetch_ahead(p + i + v * SIMD_WIDTH * 4);
      std::memcpy(&in, p + i + v * SIMD_WIDTH * 4, sizeof in);
      sum[v] += in;
    }
  std::memcpy(sums, sum, sizeof sum);
}

}  // namespace
