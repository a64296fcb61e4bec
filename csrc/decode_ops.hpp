// Operators of decode steps, on row-major activations: normalization, rotary positions, attention to the KV cache,
// which is stored in column tiles [tiles][features][TILE_COLS].
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "kv_codes.hpp"
#include "kv_layout.hpp"
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

// One head of the cache in fp32, as a token attends to it.
struct CachedNumbers {
  const rarefy_attention& a;
  const float* q;
  int64_t batch, kv_head;

  CachedNumbers(const rarefy_attention& a, const float* q, int64_t batch, int64_t kv_head, float*)
      : a(a), q(q), batch(batch), kv_head(kv_head) {}

  // Scores of the first `keys` keys of a tile, up to a multiple of 16: whole cache lines.
  void score(int64_t tile, int64_t keys, float* scores) const {
    const float *k = cached_tile(a, a.k_offset, batch, tile, kv_head),
                *v = cached_tile(a, a.v_offset, batch, tile, kv_head);
    with_lines(keys, [&](auto lines) { score_lines<lines>(k, v, scores); });
  }

  // Add the first `keys` values of a tile, weighted by p, to sums [head_dim][SIMD_WIDTH].
  void add_values(int64_t tile, int64_t keys, const float* p, float* sums) const {
    const float* v = cached_tile(a, a.v_offset, batch, tile, kv_head);
    with_lines(keys, [&](auto lines) { add_lines<lines>(v, p, sums); });
  }

  template <class F>
  static void with_lines(int64_t keys, F&& f) {
    static_assert(TILE_COLS == 64);
    if (keys > 48) return f(std::integral_constant<int, 4>{});
    if (keys > 32) return f(std::integral_constant<int, 3>{});
    if (keys > 16) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
  }

  template <int LINES>
  void score_lines(const float* k, const float* values, float* scores) const {
    constexpr int VECS = LINES * 16 / SIMD_WIDTH, UNROLL = VECS > 4 ? 1 : 2;
    f32_vec acc[UNROLL][VECS] = {};
    int64_t d = 0;
    for (; d + UNROLL <= a.head_dim; d += UNROLL) {
#pragma GCC unroll 8
      for (int line = 0; line < UNROLL * LINES; ++line)
        __builtin_prefetch(values + (d + line / LINES) * TILE_COLS + line % LINES * 16, 0, 3);
#pragma GCC unroll 2
      for (int u = 0; u < UNROLL; ++u)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v) acc[u][v] += load_vec(k + (d + u) * TILE_COLS + v * SIMD_WIDTH) * q[d + u];
    }
    for (; d < a.head_dim; ++d)
      for (int v = 0; v < VECS; ++v) acc[0][v] += load_vec(k + d * TILE_COLS + v * SIMD_WIDTH) * q[d];
    for (int v = 0; v < VECS; ++v)
      store_vec(scores + v * SIMD_WIDTH, (UNROLL > 1 ? acc[0][v] + acc[UNROLL - 1][v] : acc[0][v]) * a.scale);
  }

  template <int LINES>
  void add_lines(const float* v, const float* p, float* sums) const {
    constexpr int VECS = LINES * 16 / SIMD_WIDTH;
    f32_vec weights[VECS];
    for (int i = 0; i < VECS; ++i) weights[i] = load_vec(p + i * SIMD_WIDTH);
    for (int64_t d = 0; d < a.head_dim; ++d) {
      f32_vec even = load_vec(sums + d * SIMD_WIDTH), odd{};  // two accumulators, to hide latency
#pragma GCC unroll 8
      for (int i = 0; i < VECS; ++i) (i % 2 ? odd : even) += weights[i] * load_vec(v + d * TILE_COLS + i * SIMD_WIDTH);
      store_vec(sums + d * SIMD_WIDTH, even + odd);
    }
  }
};

// One head of a cache in 8 bits. The query and the weights of a tile are rounded to 16 bits, so that products are those
// of integers, which read and convert less than products of dequantized numbers.
struct CachedCodes {
  const rarefy_attention& a;
  int64_t batch, kv_head;
  const int32_t* query;  // pairs of features
  float scale;

  // `memory` receives the rounded query.
  CachedCodes(const rarefy_attention& a, const float* q, int64_t batch, int64_t kv_head, float* memory)
      : a(a), batch(batch), kv_head(kv_head), query(reinterpret_cast<int32_t*>(memory)) {
    const float limit = float(std::min<int64_t>(32767, 16000000 / a.head_dim));  // the sum fits 32 bits
    i32_vec top{};
    for (int64_t d = 0; d < a.head_dim; d += SIMD_WIDTH)
      top = larger_magnitude(top, load_partial(q + d, a.head_dim - d));
    int32_t largest = 0;
    for (int i = 0; i < SIMD_WIDTH; ++i) largest = std::max(largest, top[i]);
    const float unit = code_scale(__builtin_bit_cast(float, largest)) * MAX_CODE / limit, inverse = 1.0f / unit;
    for (int64_t d = 0; d < a.head_dim; d += 2) {
      const uint32_t low = uint16_t(round_within(q[d] * inverse, limit));
      const uint32_t both = low | uint32_t(round_within(q[d + 1] * inverse, limit)) << 16;
      std::memcpy(memory + d / 2, &both, 4);
    }
    scale = unit * a.scale;
  }

  void score(int64_t tile, int64_t, float* scores) const {
    constexpr int VECS = TILE_COLS / SIMD_WIDTH;
    const CodedTile keys = coded_tile(a, a.k_offset, batch, tile, kv_head);
    const int8_t* k = keys.codes;
    raw_vec acc[VECS] = {};
    for (int64_t d = 0; d < a.head_dim; d += 2, k += 2 * TILE_COLS) {
      const raw_vec in = __builtin_bit_cast(raw_vec, i32_vec{} + query[d / 2]);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) acc[v] = multiply_add_pairs(acc[v], load_wide_pairs(k + 2 * v * SIMD_WIDTH), in);
    }
    for (int v = 0; v < VECS; ++v)
      store_vec(scores + v * SIMD_WIDTH, to_numbers(acc[v]) * load_vec(keys.scales + v * SIMD_WIDTH) * scale);
  }

  void add_values(int64_t tile, int64_t, const float* p, float* sums) const {
    constexpr int VECS = TILE_COLS / SIMD_WIDTH, PAIRS = VECS / 2;
    constexpr float LIMIT = 32767.0f, TINY = 1e-30f;
    const CodedTile values = coded_tile(a, a.v_offset, batch, tile, kv_head);
    const int8_t* v = values.codes;
    f32_vec weights[VECS];
    i32_vec top{};
    for (int i = 0; i < VECS; ++i) {
      weights[i] = load_vec(p + i * SIMD_WIDTH) * load_vec(values.scales + i * SIMD_WIDTH);
      top = larger_magnitude(top, weights[i]);
    }
    int32_t bits = 0;
    for (int i = 0; i < SIMD_WIDTH; ++i) bits = std::max(bits, top[i]);
    const float largest = __builtin_bit_cast(float, bits), unit = (largest < TINY ? TINY : largest) / LIMIT;
    const float inverse = 1.0f / unit;
    int16_t rounded[TILE_COLS];
    for (int i = 0; i < VECS; ++i) {
      const f32_vec w = weights[i] * inverse;
      const i32_vec codes =
          __builtin_convertvector((w < LIMIT ? w : f32_vec{} + LIMIT) + 8388608.0f - 8388608.0f, i32_vec);
      const wide_vec wide = __builtin_convertvector(codes, wide_vec);
      std::memcpy(rounded + i * SIMD_WIDTH, &wide, sizeof wide);
    }
    raw_vec in[PAIRS];
    for (int i = 0; i < PAIRS; ++i) in[i] = load_raw(rounded + 2 * i * SIMD_WIDTH);
    for (int64_t d = 0; d < a.head_dim; ++d, v += TILE_COLS) {
      raw_vec acc{};
#pragma GCC unroll 4
      for (int i = 0; i < PAIRS; ++i) acc = multiply_add_pairs(acc, load_wide_pairs(v + 2 * i * SIMD_WIDTH), in[i]);
      store_vec(sums + d * SIMD_WIDTH, load_vec(sums + d * SIMD_WIDTH) + to_numbers(acc) * unit);
    }
  }
};

// Some heads of one token attend to the tiles of keys `begin`..`end`, of which the keys `first`..`last` are visible.
// Each tile is read for all of them. Head h has the scores and sums at scratch + h * stride, and position biases of
// slopes[h].
template <class Cached>
void attend_to(const Cached* cached, int64_t heads, int64_t begin, int64_t end, int64_t first, int64_t last,
               const float* slopes, float* scratch, int64_t stride, float* out) {
  const rarefy_attention& a = cached->a;
  const int64_t head_dim = a.head_dim, keys = (end - begin) * TILE_COLS;
  constexpr int VECS = TILE_COLS / SIMD_WIDTH;
  f32_vec max[MAX_HEADS_TOGETHER];
  for (f32_vec& m : max) m = f32_vec{} + MASKED;
  for (int64_t tile = begin; tile < end; ++tile)
    for (int64_t h = 0; h < heads; ++h) {
      float* scores = scratch + h * stride + (tile - begin) * TILE_COLS;
      cached[h].score(tile, last - tile * TILE_COLS, scores);
      if (a.cap != 0.0f) {
        f32_vec all[VECS];
        std::memcpy(all, scores, sizeof all);
        cap_scores(a.cap, all, VECS);
        std::memcpy(scores, all, sizeof all);
      }
      if (slopes[h] != 0.0f)
        for (int64_t j = 0; j < TILE_COLS; ++j) scores[j] += float(tile * TILE_COLS + j + 1 - last) * slopes[h];
      if (tile * TILE_COLS < first || (tile + 1) * TILE_COLS > last)
        for (int64_t j = 0; j < TILE_COLS; ++j)
          if (tile * TILE_COLS + j < first || tile * TILE_COLS + j >= last) scores[j] = MASKED * 2;
      for (int v = 0; v < VECS; ++v) max[h] = max_vec(max[h], load_vec(scores + v * SIMD_WIDTH));
    }
  float inverse[MAX_HEADS_TOGETHER];
  for (int64_t h = 0; h < heads; ++h) {
    float* scores = scratch + h * stride;
    float top = max[h][0];
    for (int i = 1; i < SIMD_WIDTH; ++i) top = max[h][i] > top ? max[h][i] : top;
    f32_vec total{};
    for (int64_t j = 0; j < keys; j += SIMD_WIDTH) {
      const f32_vec e = exp_vec(load_vec(scores + j) - top);
      total += e;
      store_vec(scores + j, e);
    }
    inverse[h] = 1.0f / reduce_vec(total);
    std::memset(scores + keys, 0, size_t(head_dim * SIMD_WIDTH) * 4);
  }
  for (int64_t tile = begin; tile < end; ++tile)
    for (int64_t h = 0; h < heads; ++h) {
      float* scores = scratch + h * stride;
      cached[h].add_values(tile, last - tile * TILE_COLS, scores + (tile - begin) * TILE_COLS, scores + keys);
    }
  for (int64_t h = 0; h < heads; ++h) {
    const float* sums = scratch + h * stride + keys;
    for (int64_t d = 0; d < head_dim; ++d)
      out[h * head_dim + d] = reduce_vec(load_vec(sums + d * SIMD_WIDTH)) * inverse[h];
  }
}

// `heads` heads of one token from `head` on, which read the same keys, attend to the cache. `scratch`, for each of
// them: one word for each feature of the head, one for each cached key up to whole tiles, then one vector for each
// feature.
void attention_row(const rarefy_attention& a, int64_t batch, int64_t token, int64_t head, int64_t heads,
                   float* scratch) {
  const int64_t head_dim = a.head_dim, row = batch * a.queries + token;
  const int64_t position = a.cache->length + token, last = position + 1;
  const int64_t start = a.cache->starts ? a.cache->starts[batch] : 0;
  int64_t first = a.window ? std::max<int64_t>(0, last - a.window) : 0;
  if (start <= position) first = std::max(first, start);  // queries in the padding attend to the padding
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const int64_t begin = first / TILE_COLS, end = (last + TILE_COLS - 1) / TILE_COLS;
  const int64_t stride = (end - begin) * TILE_COLS + head_dim * SIMD_WIDTH;
  const float* q = a.q + row * a.q_stride + head * head_dim;
  float slopes[MAX_HEADS_TOGETHER];
  for (int64_t h = 0; h < heads; ++h) slopes[h] = alibi_slope(a, head + h);
  float *out = a.out + row * a.out_stride + head * head_dim, *scores = scratch + heads * head_dim;
  const auto attend = [&](auto of) {
    const auto make = [&](int64_t h) { return of(q + h * head_dim, scratch + h * head_dim); };
    const auto one = make(0);
    static_assert(MAX_HEADS_TOGETHER == 4);
    const decltype(make(0)) cached[MAX_HEADS_TOGETHER] = {one, heads > 1 ? make(1) : one, heads > 2 ? make(2) : one,
                                                          heads > 3 ? make(3) : one};
    attend_to(cached, heads, begin, end, first, last, slopes, scores, stride, out);
  };
  if (a.cache->codes)
    attend([&](const float* query, float* memory) { return CachedCodes(a, query, batch, kv_head, memory); });
  else
    attend([&](const float* query, float* memory) { return CachedNumbers(a, query, batch, kv_head, memory); });
}

}  // namespace
