// Operators of decode steps, on row-major activations: normalization, rotary positions, attention to the KV cache,
// which is stored in column tiles [tiles][features][TILE_COLS].
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#include "tile_attention.hpp"

namespace {

inline float reduce_vec(f32_vec v) { return F32Accumulator::reduce(__builtin_bit_cast(F32Accumulator::acc, v)); }

// Layer or RMS normalization of one row.
void norm_row(const float* x, int64_t features, const float* gamma, const float* bias, float eps, bool subtract_mean,
              float* out) {
  auto mean_of = [&](auto&& vec_at) {
    f32_vec acc[2] = {};
    for (int64_t f = 0; f < features; f += SIMD_WIDTH) acc[f / SIMD_WIDTH % 2] += vec_at(f);
    return reduce_vec(acc[0] + acc[1]) / float(features);
  };
  const float mean = subtract_mean ? mean_of([&](int64_t f) { return load_partial(x + f, features - f); }) : 0.0f;
  const float variance = mean_of([&](int64_t f) {
    f32_vec v = load_partial(x + f, features - f) - mean;
    if (features - f < SIMD_WIDTH)
      for (int64_t i = features - f; i < SIMD_WIDTH; ++i) v[i] = 0.0f;
    return v * v;
  });
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  for (int64_t f = 0; f < features; f += SIMD_WIDTH) {
    const int64_t count = features - f;
    f32_vec v = (load_partial(x + f, count) - mean) * scale;
    if (gamma) v *= load_partial(gamma + f, count);
    if (bias) v += load_partial(bias + f, count);
    store_partial(out + f, v, count);
  }
}

// Rotary positions (Su et al. 2021, eq. 34): rotate the first half of each head's features with the second half, by
// angles whose cosines and sines [head_dim] are given.
void rope_row(const float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_dim, out += head_dim)
    for (int64_t d = 0; d < half; d += SIMD_WIDTH) {
      const int64_t count = half - d;
      const f32_vec a = load_partial(x + d, count), b = load_partial(x + half + d, count);
      store_partial(out + d, a * load_partial(cos + d, count) - b * load_partial(sin + d, count), count);
      store_partial(out + half + d, b * load_partial(cos + half + d, count) + a * load_partial(sin + half + d, count),
                    count);
    }
}

// Scores of the keys in the cache tiles `begin`..`end`, into p; keys outside `first`..`last` are masked. Returns the
// maximum.
inline float score_cached_keys(const rarefy_attention& a, const float* q, const float* keys, int64_t begin, int64_t end,
                               int64_t first, int64_t last, float* p) {
  constexpr int VECS = TILE_COLS / SIMD_WIDTH, UNROLL = VECS > 4 ? 1 : 2;
  const int64_t head_dim = a.head_dim;
  f32_vec max = f32_vec{} + MASKED;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* k = keys + tile * a.k_stride;
    f32_vec acc[UNROLL][VECS] = {};
    int64_t d = 0;
    for (; d + UNROLL <= head_dim; d += UNROLL)
#pragma GCC unroll 2
      for (int u = 0; u < UNROLL; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v) acc[u][v] += load_vec(k + (d + u) * TILE_COLS + v * SIMD_WIDTH) * q[d + u];
    for (; d < head_dim; ++d)
      for (int v = 0; v < VECS; ++v) acc[0][v] += load_vec(k + d * TILE_COLS + v * SIMD_WIDTH) * q[d];
    float* scores = p + (tile - begin) * TILE_COLS;
    for (int v = 0; v < VECS; ++v)
      store_vec(scores + v * SIMD_WIDTH, (UNROLL > 1 ? acc[0][v] + acc[UNROLL - 1][v] : acc[0][v]) * a.scale);
    for (int64_t j = 0; j < TILE_COLS; ++j)
      if (tile * TILE_COLS + j < first || tile * TILE_COLS + j >= last) scores[j] = MASKED * 2;
    for (int v = 0; v < VECS; ++v) max = max_vec(max, load_vec(scores + v * SIMD_WIDTH));
  }
  float top = max[0];
  for (int i = 1; i < SIMD_WIDTH; ++i) top = max[i] > top ? max[i] : top;
  return top;
}

// Sum the values in the cache tiles `begin`..`end`, weighted by p, into sums [head_dim][SIMD_WIDTH].
inline void sum_cached_values(const rarefy_attention& a, const float* p, const float* values, int64_t begin,
                              int64_t end, float* sums) {
  constexpr int VECS = TILE_COLS / SIMD_WIDTH;
  std::memset(sums, 0, size_t(a.head_dim * SIMD_WIDTH) * 4);
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* v = values + tile * a.v_stride;
    f32_vec weights[VECS];
    for (int i = 0; i < VECS; ++i) weights[i] = load_vec(p + (tile - begin) * TILE_COLS + i * SIMD_WIDTH);
    for (int64_t d = 0; d < a.head_dim; ++d) {
      f32_vec even = load_vec(sums + d * SIMD_WIDTH), odd{};  // two accumulators, to hide latency
#pragma GCC unroll 8
      for (int i = 0; i < VECS; i += 2) {
        even += weights[i] * load_vec(v + d * TILE_COLS + i * SIMD_WIDTH);
        odd += weights[i + 1] * load_vec(v + d * TILE_COLS + (i + 1) * SIMD_WIDTH);
      }
      store_vec(sums + d * SIMD_WIDTH, even + odd);
    }
  }
}

// One head of one token attends to the cache. `scratch`: one float for each cached key up to whole tiles, then one
// vector for each feature of the head.
void attention_row(const rarefy_attention& a, int64_t batch, int64_t token, int64_t head, float* scratch) {
  const int64_t head_dim = a.head_dim, row = batch * a.queries + token;
  const int64_t position = a.cache->length + token, last = position + 1;
  const int64_t start = a.cache->starts ? a.cache->starts[batch] : 0;
  int64_t first = a.window ? std::max<int64_t>(0, last - a.window) : 0;
  if (start <= position) first = std::max(first, start);  // queries in the padding attend to the padding
  const int64_t kv_head = head / (a.heads / a.kv_heads) * head_dim * TILE_COLS;
  const int64_t begin = first / TILE_COLS, end = (last + TILE_COLS - 1) / TILE_COLS;
  const int64_t first_tile = batch * a.cache->capacity / TILE_COLS;
  const float* q = a.q + row * a.q_stride + head * head_dim;
  const float* keys = keys_or_values(a, a.k, a.k_offset) + first_tile * a.k_stride + kv_head;
  const float* values = keys_or_values(a, a.v, a.v_offset) + first_tile * a.v_stride + kv_head;
  const float max = score_cached_keys(a, q, keys, begin, end, first, last, scratch);
  f32_vec total{};
  for (int64_t j = 0; j < (end - begin) * TILE_COLS; j += SIMD_WIDTH) {
    const f32_vec e = exp_vec(load_vec(scratch + j) - max);
    total += e;
    store_vec(scratch + j, e);
  }
  float* sums = scratch + (end - begin) * TILE_COLS;
  sum_cached_values(a, scratch, values, begin, end, sums);
  const float inverse = 1.0f / reduce_vec(total);
  float* out = a.out + row * a.out_stride + head * head_dim;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = reduce_vec(load_vec(sums + d * SIMD_WIDTH)) * inverse;
}

}  // namespace
