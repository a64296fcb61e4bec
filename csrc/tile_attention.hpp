// Attention on column tiles. Queries are columns, VECS vectors of them at a time; keys and values are broadcast one
// number at a time, a column tile of them per step, with a running maximum and sum of the softmax (Milakov and
// Gimelshein 2018).
#pragma once
#include <algorithm>
#include <cstdint>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#include "visible_keys.hpp"

namespace {

// Scores of KEYS keys for the queries: out[key][vector] = q k scale.
template <int VECS, int KEYS>
inline void score_keys(const float* q, const float* k, int64_t head_dim, float scale, f32_vec (*out)[VECS]) {
  f32_vec acc[KEYS][VECS] = {};
  for (int64_t d = 0; d < head_dim; ++d, q += TILE_COLS, k += TILE_COLS) {
    f32_vec in[VECS];
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) in[t] = load_vec(q + t * SIMD_WIDTH);
#pragma GCC unroll 4
    for (int r = 0; r < KEYS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) acc[r][t] += in[t] * k[r];
  }
  for (int r = 0; r < KEYS; ++r)
    for (int t = 0; t < VECS; ++t) out[r][t] = acc[r][t] * scale;
}

// out = out rescale + sum of p v over the keys, for FEATURES features of a head.
template <int VECS, int FEATURES>
inline void add_values(const f32_vec (*p)[VECS], const float* v, int64_t keys, const f32_vec* rescale, float* out) {
  f32_vec acc[FEATURES][VECS];
#pragma GCC unroll 4
  for (int r = 0; r < FEATURES; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) acc[r][t] = load_vec(out + r * TILE_COLS + t * SIMD_WIDTH) * rescale[t];
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < FEATURES; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) acc[r][t] += p[j][t] * v[r * TILE_COLS + j];
#pragma GCC unroll 4
  for (int r = 0; r < FEATURES; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) store_vec(out + r * TILE_COLS + t * SIMD_WIDTH, acc[r][t]);
}

// Keys or values: those of the step, or those of this layer in the cache.
inline const float* keys_or_values(const rarefy_attention& a, const float* own, int64_t cache_offset) {
  return a.cache ? a.cache->data + cache_offset * a.cache->batch * a.cache->capacity : own;
}

// Add the mask of `keys` keys; `m` is its element of the first query and key, `query` the first query's position.
template <int VECS>
inline void add_mask(const rarefy_attention& a, const float* m, int64_t query, int64_t keys, f32_vec (*scores)[VECS]) {
  for (int64_t j = 0; j < keys; ++j)
    for (int t = 0; t < VECS; ++t) {
      if (!a.mask_query_stride) {
        scores[j][t] += m[j * a.mask_key_stride];
        continue;
      }
      float mask[SIMD_WIDTH];
      for (int i = 0; i < SIMD_WIDTH; ++i)
        mask[i] = query + t * SIMD_WIDTH + i < a.queries
                      ? m[j * a.mask_key_stride + (t * SIMD_WIDTH + i) * a.mask_query_stride]
                      : 0.0f;
      scores[j][t] += load_vec(mask);
    }
}

// Mask keys that a query must not see: later ones, padding before `start`, those outside the window. Positions count
// from the first token of the cache.
template <int VECS>
inline void mask_hidden_keys(const rarefy_attention& a, int64_t first_key, int64_t keys, int64_t first_query,
                             int64_t start, f32_vec (*scores)[VECS]) {
  for (int64_t j = 0; j < keys; ++j)
    for (int t = 0; t < VECS; ++t)
      for (int i = 0; i < SIMD_WIDTH; ++i) {
        const int64_t key = first_key + j, query = first_query + t * SIMD_WIDTH + i;
        if ((a.causal && key > query) || (key < start && start <= query) || (a.window && key + a.window <= query))
          scores[j][t][i] = MASKED * 2;
      }
}

// Turn scores into exponentials relative to the new maximum; `rescale` corrects what was summed before. They are at
// least e^-60: a query to which every key is masked attends to all alike, and no product with a value is denormal.
template <int VECS>
inline void update_softmax(int64_t keys, f32_vec (*scores)[VECS], f32_vec* max, f32_vec* sum, f32_vec* rescale) {
  for (int t = 0; t < VECS; ++t) {
    f32_vec new_max = max[t];
    for (int64_t j = 0; j < keys; ++j) new_max = max_vec(new_max, scores[j][t]);
    rescale[t] = exp_vec(max[t] - new_max);
    max[t] = new_max;
    f32_vec added{};
    for (int64_t j = 0; j < keys; ++j)
      added += scores[j][t] = exp_vec(max_vec(f32_vec{} - 60.0f, scores[j][t] - new_max));
    sum[t] = sum[t] * rescale[t] + added;
  }
}

// One head for VECS vectors of queries. `lane`: the first query's column in its tile; `query`: its position among the
// step's queries of its sequence. q and out point to the head's features in that tile.
template <int VECS>
void attend_queries(const rarefy_attention& a, int64_t batch, int64_t head, int64_t lane, int64_t query, const float* q,
                    float* out) {
  const int64_t head_dim = a.head_dim, first_column = batch * (a.cache ? a.cache->capacity : a.kv_seq_stride);
  const int64_t kv_head = head / (a.heads / a.kv_heads) * head_dim * TILE_COLS;
  const int64_t past = a.cache ? a.cache->length : 0;
  const float* mask = a.mask ? a.mask + batch * a.mask_batch_stride + head * a.mask_head_stride : nullptr;
  const KeyRange visible = a.cache ? KeyRange{0, past + a.queries} : visible_keys(a, mask);
  const int64_t start = a.cache && a.cache->starts ? a.cache->starts[batch] : 0, position = past + query;
  f32_vec max[VECS], sum[VECS] = {}, rescale[VECS];
  for (int t = 0; t < VECS; ++t) max[t] = f32_vec{} + MASKED;
  for (int64_t d = 0; d < head_dim; ++d)
    for (int t = 0; t < VECS; ++t) store_vec(out + d * TILE_COLS + lane + t * SIMD_WIDTH, f32_vec{});
  const int64_t end = a.causal ? std::min(visible.end, position + VECS * SIMD_WIDTH) : visible.end;
  int64_t begin = a.window ? std::max<int64_t>(0, position + 1 - a.window) : visible.begin;
  if (start <= position) begin = std::max(begin, start);  // queries in the padding attend to the padding
  f32_vec scores[TILE_COLS][VECS];
  for (int64_t from = begin / TILE_COLS * TILE_COLS; from < end;) {
    const int64_t at = first_column + from, column = at % TILE_COLS, keys = std::min(TILE_COLS - column, end - from);
    const float* k = keys_or_values(a, a.k, a.k_offset) + at / TILE_COLS * a.k_stride + kv_head + column;
    const float* v = keys_or_values(a, a.v, a.v_offset) + at / TILE_COLS * a.v_stride + kv_head + column;
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) score_keys<VECS, 4>(q + lane, k + j, head_dim, a.scale, scores + j);
    for (; j < keys; ++j) score_keys<VECS, 1>(q + lane, k + j, head_dim, a.scale, scores + j);
    if (mask) add_mask<VECS>(a, mask + query * a.mask_query_stride + from * a.mask_key_stride, query, keys, scores);
    if ((a.causal && from + keys > position) || from < start || a.window)
      mask_hidden_keys<VECS>(a, from, keys, position, start, scores);
    update_softmax<VECS>(keys, scores, max, sum, rescale);
    int64_t d = 0;
    for (; d + 4 <= head_dim; d += 4)
      add_values<VECS, 4>(scores, v + d * TILE_COLS, keys, rescale, out + d * TILE_COLS + lane);
    for (; d < head_dim; ++d) add_values<VECS, 1>(scores, v + d * TILE_COLS, keys, rescale, out + d * TILE_COLS + lane);
    from += keys;
  }
  for (int64_t d = 0; d < head_dim; ++d)
    for (int t = 0; t < VECS; ++t) {
      float* o = out + d * TILE_COLS + lane + t * SIMD_WIDTH;
      store_vec(o, load_vec(o) / sum[t]);
    }
}

// One head for the queries of one sequence in one column tile.
void attention_tile(const rarefy_attention& a, int64_t batch, int64_t head, int64_t tile) {
  const int64_t first = batch * a.seq_stride, from = std::max(first, tile * TILE_COLS);
  const int64_t to = std::min(first + (a.queries + SIMD_WIDTH - 1) / SIMD_WIDTH * SIMD_WIDTH, (tile + 1) * TILE_COLS);
  const float* q = a.q + tile * a.q_stride + head * a.head_dim * TILE_COLS;
  float* out = a.out + tile * a.out_stride + head * a.head_dim * TILE_COLS;
  constexpr int64_t STEP = MAX_VECS * SIMD_WIDTH;
  int64_t at = from;
  for (; at + STEP <= to; at += STEP) attend_queries<MAX_VECS>(a, batch, head, at % TILE_COLS, at - first, q, out);
  for (; at < to; at += SIMD_WIDTH) attend_queries<1>(a, batch, head, at % TILE_COLS, at - first, q, out);
}

}  // namespace
