// Steps of few tokens, whose features lie one after the other; and what keeps keys and values for later tokens, in tiles
// [tile][features][NT].
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#include "tile_ops.hpp"

namespace {

// x normed over features.
void norm_row(const float* x, int64_t features, const float* gain, const float* bias, float least, bool centred,
              float* out) {
  auto sum = [&](auto&& of) {
    vec total[2] = {};
    for (int64_t f = 0; f < features; f += W) total[f / W % 2] += of(f);
    return FloatSums::total(__builtin_bit_cast(FloatSums::sum, total[0] + total[1])) / float(features);
  };
  const float mean = centred ? sum([&](int64_t f) { return some_at(x + f, features - f); }) : 0.0f;
  const float square = sum([&](int64_t f) {
    vec v = some_at(x + f, features - f) - mean;
    if (features - f < W)
      for (int64_t i = features - f; i < W; ++i) v[i] = 0.0f;
    return v * v;
  });
  const float by = 1.0f / __builtin_sqrtf(square + least);
  for (int64_t f = 0; f < features; f += W) {
    const int64_t here = features - f;
    vec v = (some_at(x + f, here) - mean) * by;
    if (gain) v *= some_at(gain + f, here);
    if (bias) v += some_at(bias + f, here);
    put_some(out + f, v, here);
  }
}

// Rotary positions (Su et al. 2021, eq. 34): the first half of each head's features with the second, by angles whose
// cosines and sines are given.
void rotate_row(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t width, float* out) {
  const int64_t half = width / 2;
  for (int64_t h = 0; h < heads; ++h, x += width, out += width)
    for (int64_t d = 0; d < half; d += W) {
      const int64_t here = half - d;
      const vec a = some_at(x + d, here), b = some_at(x + half + d, here);
      put_some(out + d, a * some_at(cosine + d, here) - b * some_at(sine + d, here), here);
      put_some(out + half + d, b * some_at(cosine + half + d, here) + a * some_at(sine + half + d, here), here);
    }
}

// The same for the columns of a tile.
void rotate_tile(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t width, float* out) {
  const int64_t half = width / 2 * NT;
  for (int64_t h = 0; h < heads; ++h, x += width * NT, out += width * NT)
    for (int64_t i = 0; i < half; i += W) {
      const vec a = whole_at(x + i), b = whole_at(x + half + i);
      put_whole(out + i, a * whole_at(cosine + i) - b * whole_at(sine + i));
      put_whole(out + half + i, b * whole_at(cosine + half + i) + a * whole_at(sine + half + i));
    }
}

// One head of one token attends to what is kept; p is memory for a number for each key up to whole tiles, and a vector
// for each feature.
void attend_row(const rarefy_attention& a, int64_t batch, int64_t token, int64_t head, float* p) {
  constexpr int V = NT / W, U = V > 4 ? 1 : 2;
  const int64_t width = a.width, n = batch * a.queries + token, position = a.cache->past + token, last = position + 1;
  const int64_t start = a.cache->starts ? a.cache->starts[batch] : 0;
  int64_t first = a.window ? std::max<int64_t>(0, last - a.window) : 0;
  if (start <= position) first = std::max(first, start);  // what fills a sequence up attends to what is there
  const int64_t kv = head / (a.heads / a.kv_heads) * width * NT, begin = first / NT, end = (last + NT - 1) / NT;
  const float* q = a.q + n * a.q_tile + head * width;
  const float* keys = kept(a, a.k, a.k_before) + batch * a.cache->capacity / NT * a.k_tile + kv;
  const float* values = kept(a, a.v, a.v_before) + batch * a.cache->capacity / NT * a.v_tile + kv;
  vec most = vec{} + LOWEST;
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* k = keys + tile * a.k_tile;
    vec c[U][V] = {};
    int64_t d = 0;
    for (; d + U <= width; d += U)
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[u][v] += whole_at(k + (d + u) * NT + v * W) * q[d + u];
    for (; d < width; ++d)
      for (int v = 0; v < V; ++v) c[0][v] += whole_at(k + d * NT + v * W) * q[d];
    float* here = p + (tile - begin) * NT;
    for (int v = 0; v < V; ++v) put_whole(here + v * W, (U > 1 ? c[0][v] + c[U - 1][v] : c[0][v]) * a.scale);
    for (int64_t j = 0; j < NT; ++j)
      if (tile * NT + j < first || tile * NT + j >= last) here[j] = LOWEST * 2;
    for (int v = 0; v < V; ++v) most = larger(most, whole_at(here + v * W));
  }
  float top = most[0];
  for (int i = 1; i < W; ++i) top = most[i] > top ? most[i] : top;
  vec total{};
  for (int64_t j = 0; j < (end - begin) * NT; j += W) {
    const vec e = exponential(whole_at(p + j) - top);
    total += e;
    put_whole(p + j, e);
  }
  float* sums = p + (end - begin) * NT;
  std::memset(sums, 0, size_t(width * W) * 4);
  for (int64_t tile = begin; tile < end; ++tile) {
    const float* v = values + tile * a.v_tile;
    vec by[V];
    for (int i = 0; i < V; ++i) by[i] = whole_at(p + (tile - begin) * NT + i * W);
    for (int64_t d = 0; d < width; ++d) {
      vec c = whole_at(sums + d * W), more{};
#pragma GCC unroll 8
      for (int i = 0; i < V; i += 2) {
        c += by[i] * whole_at(v + d * NT + i * W);
        more += by[i + 1] * whole_at(v + d * NT + (i + 1) * W);
      }
      put_whole(sums + d * W, c + more);
    }
  }
  const float by = 1.0f / FloatSums::total(__builtin_bit_cast(FloatSums::sum, total));
  float* out = a.out + n * a.out_tile + head * width;
  for (int64_t d = 0; d < width; ++d)
    out[d] = FloatSums::total(__builtin_bit_cast(FloatSums::sum, whole_at(sums + d * W))) * by;
}

}  // namespace
