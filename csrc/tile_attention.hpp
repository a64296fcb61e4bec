// Attention on column tiles. Queries are columns, VECS vectors of them at a time; keys and values are broadcast one
// number at a time, a column tile of them per step, with a running maximum and sum of the softmax (Milakov and
// Gimelshein 2018).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "kv_codes.hpp"
#include "kv_layout.hpp"
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

// Keys and values of a tile, and their products with queries and weights of the softmax, in bf16: pairs of features of
// keys and queries, pairs of keys of values and weights. HEAD_DIM is the largest.
template <int VECS>
struct Bf16Tile {
  static constexpr int64_t HEAD_DIM = 128, PAIRS = TILE_COLS / 2;
  using L = LaneOps<RAREFY_BF16>;
  alignas(64) uint32_t queries[HEAD_DIM / 2][VECS * SIMD_WIDTH], words[HEAD_DIM / 2 * TILE_COLS];

  static bool fits(int64_t head_dim) { return head_dim <= HEAD_DIM && head_dim % 8 == 0; }

  void pack_queries(const float* q, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 2, q += 2 * TILE_COLS)
      for (int t = 0; t < VECS; ++t)
        store_raw(queries[d / 2] + t * SIMD_WIDTH,
                  pack_bf16(load_vec(q + t * SIMD_WIDTH), load_vec(q + TILE_COLS + t * SIMD_WIDTH)));
  }

  void score(const float* k, int64_t keys, int64_t head_dim, float scale, f32_vec (*out)[VECS]) {
    for (int64_t d = 0; d < head_dim; d += 2, k += 2 * TILE_COLS)
      for (int64_t j = 0; j < keys; j += SIMD_WIDTH)
        store_raw(words + d / 2 * TILE_COLS + j,
                  pack_bf16(load_partial(k + j, keys - j), load_partial(k + TILE_COLS + j, keys - j)));
    for (int64_t j = 0; j < keys; j += 4) {
      typename L::acc acc[4][VECS];
      multiply(queries[0], words + j, head_dim / 2, TILE_COLS, 1, acc, [](int, int) { return L::zero(); });
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t)
          if (j + r < keys) out[j + r][t] = f32_vec(acc[r][t]) * scale;
    }
  }

  // As add_values, for all features; the weights p are packed in place.
  void add(f32_vec (*p)[VECS], const float* v, int64_t keys, int64_t head_dim, const f32_vec* rescale, float* out) {
    uint32_t* weights = reinterpret_cast<uint32_t*>(p);
    const int64_t pairs = (keys + 1) / 2;
    for (int64_t i = 0; i < pairs; ++i)
      for (int t = 0; t < VECS; ++t)
        store_raw(weights + (i * VECS + t) * SIMD_WIDTH,
                  pack_bf16(p[2 * i][t], 2 * i + 1 < keys ? p[2 * i + 1][t] : f32_vec{}));
    for (int64_t d = 0; d < head_dim; ++d)
      for (int64_t j = 0; j < keys; j += 2 * SIMD_WIDTH)
        store_raw(words + d * PAIRS + j / 2, L::pack(v + d * TILE_COLS + j, std::min<int64_t>(keys - j, 32), 1.0f));
    for (int64_t d = 0; d < head_dim; d += 4, out += 4 * TILE_COLS) {
      typename L::acc acc[4][VECS];
      multiply(weights, words + d * PAIRS, pairs, 1, PAIRS, acc, [&](int r, int t) {
        return typename L::acc(load_vec(out + r * TILE_COLS + t * SIMD_WIDTH) * rescale[t]);
      });
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) store_vec(out + r * TILE_COLS + t * SIMD_WIDTH, f32_vec(acc[r][t]));
    }
  }

 private:
  // acc[r] = start(r) + the sum over pairs of in[pair] times the word of r.
  template <class F>
  static void multiply(const uint32_t* in, const uint32_t* of, int64_t pairs, int64_t pair_stride, int64_t stride,
                       typename L::acc (&acc)[4][VECS], F&& start) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) acc[r][t] = start(r, t);
    for (int64_t i = 0; i < pairs; ++i, in += VECS * SIMD_WIDTH, of += pair_stride) {
      typename L::input x[VECS];
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) x[t] = L::load(in + t * SIMD_WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const auto w = L::broadcast(of[r * stride]);
#pragma GCC unroll 4
        for (int t = 0; t < VECS; ++t) acc[r][t] = L::multiply_add(acc[r][t], x[t], w);
      }
    }
  }
};

// Scores s become cap tanh(s / cap), as in Gemma 2.
inline void cap_scores(float cap, f32_vec* scores, int64_t count) {
  const float inverse = 1.0f / cap;
  for (int64_t i = 0; i < count; ++i) scores[i] = tanh_vec(scores[i] * inverse) * cap;
}

// Return how much a head's score falls for each token between query and key (Press et al. 2022). 2^n heads have slopes
// in equal ratios, the last one 2^-max_bias. More heads have slopes between those.
inline float alibi_slope(const rarefy_attention& a, int64_t head) {
  if (a.max_bias == 0.0f) return 0.0f;
  int64_t power = 1;
  while (2 * power <= a.heads) power *= 2;
  const double step = head < power ? double(head + 1) : double(head - power) + 0.5;
  return float(std::exp2(-double(a.max_bias) * step / double(power)));
}

// Subtract `slope` for each token between a query and a key.
template <int VECS>
inline void add_position_biases(float slope, int64_t first_key, int64_t keys, int64_t first_query,
                                f32_vec (*scores)[VECS]) {
  f32_vec lanes{};
  for (int i = 0; i < SIMD_WIDTH; ++i) lanes[i] = float(i);
  for (int t = 0; t < VECS; ++t) {
    const f32_vec distance = float(first_key - first_query - t * SIMD_WIDTH) - lanes;
    for (int64_t j = 0; j < keys; ++j) scores[j][t] += (distance + float(j)) * slope;
  }
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
  i32_vec lanes{};
  for (int i = 0; i < SIMD_WIDTH; ++i) lanes[i] = i;
  const int32_t last = a.causal ? 0 : INT32_MAX, window = a.window ? int32_t(std::min<int64_t>(a.window, 1 << 30)) : 0;
  for (int t = 0; t < VECS; ++t) {
    const i32_vec query = lanes + int32_t(first_query - first_key + t * SIMD_WIDTH);  // positions from the first key
    const i32_vec unpadded = query >= int32_t(start - first_key);
    for (int32_t j = 0; j < keys; ++j) {
      i32_vec hidden = j - query > last;
      if (first_key + j < start) hidden |= unpadded;
      if (window) hidden |= query - j >= window;
      scores[j][t] = hidden ? f32_vec{} + MASKED * 2 : scores[j][t];
    }
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

// The keys and values that queries see, whose first is at position `position`; masked ones among them.
inline KeyRange keys_of_queries(const rarefy_attention& a, KeyRange visible, int64_t position, int64_t count,
                                int64_t start) {
  const int64_t end = a.causal ? std::min(visible.end, position + count) : visible.end;
  int64_t begin = a.window ? std::max<int64_t>(0, position + 1 - a.window) : visible.begin;
  if (start <= position) begin = std::max(begin, start);  // queries in the padding attend to the padding
  return {begin / TILE_COLS * TILE_COLS, end};
}

// Some queries of a head: where they are, and what they have seen so far. `lane`: the first query's column in its tile;
// `query`: its position among the step's queries of its sequence, `position` in the cache. q and out point to the
// head's features in that tile.
template <int VECS>
struct QueryVectors {
  const rarefy_attention& a;
  const float* mask;  // of the head of the sequence, or null
  int64_t start, lane, query, position;
  const float* q;
  float* out;
  f32_vec max[VECS], sum[VECS];
  Bf16Tile<VECS>* bf16 = nullptr;  // where products are in bf16
  float slope = 0.0f;              // of position biases

  void begin() {
    for (int t = 0; t < VECS; ++t) {
      max[t] = f32_vec{} + MASKED;
      sum[t] = f32_vec{};
    }
    for (int64_t d = 0; d < a.head_dim; ++d)
      for (int t = 0; t < VECS; ++t) store_vec(out + d * TILE_COLS + lane + t * SIMD_WIDTH, f32_vec{});
  }

  // Attend to `keys` keys from position `from` on, which are in one tile.
  void attend(const float* k, const float* v, int64_t from, int64_t keys) {
    f32_vec scores[TILE_COLS][VECS], rescale[VECS];
    int64_t j = 0, d = 0;
    if (bf16) {
      bf16->score(k, keys, a.head_dim, a.scale, scores);
      j = keys;
    }
    for (; j + 4 <= keys; j += 4) score_keys<VECS, 4>(q + lane, k + j, a.head_dim, a.scale, scores + j);
    for (; j < keys; ++j) score_keys<VECS, 1>(q + lane, k + j, a.head_dim, a.scale, scores + j);
    if (a.cap != 0.0f) cap_scores(a.cap, scores[0], keys * VECS);
    if (slope != 0.0f) add_position_biases<VECS>(slope, from, keys, position, scores);
    if (mask) add_mask<VECS>(a, mask + query * a.mask_query_stride + from * a.mask_key_stride, query, keys, scores);
    if ((a.causal && from + keys > position) || from < start || a.window)
      mask_hidden_keys<VECS>(a, from, keys, position, start, scores);
    update_softmax<VECS>(keys, scores, max, sum, rescale);
    if (bf16) return bf16->add(scores, v, keys, a.head_dim, rescale, out + lane);
    for (; d + 4 <= a.head_dim; d += 4)
      add_values<VECS, 4>(scores, v + d * TILE_COLS, keys, rescale, out + d * TILE_COLS + lane);
    for (; d < a.head_dim; ++d)
      add_values<VECS, 1>(scores, v + d * TILE_COLS, keys, rescale, out + d * TILE_COLS + lane);
  }

  void end() {
    for (int64_t d = 0; d < a.head_dim; ++d)
      for (int t = 0; t < VECS; ++t) {
        float* o = out + d * TILE_COLS + lane + t * SIMD_WIDTH;
        store_vec(o, load_vec(o) / sum[t]);
      }
  }
};

// One head for VECS vectors of queries.
template <int VECS>
void attend_queries(const rarefy_attention& a, int64_t batch, int64_t head, int64_t lane, int64_t query, const float* q,
                    float* out) {
  const int64_t kv_head = head / (a.heads / a.kv_heads), own_head = kv_head * a.head_dim * TILE_COLS;
  const int64_t past = a.cache ? a.cache->length : 0;
  const float* mask = a.mask ? a.mask + batch * a.mask_batch_stride + head * a.mask_head_stride : nullptr;
  const KeyRange visible = a.cache ? KeyRange{0, past + a.queries} : visible_keys(a, mask);
  const int64_t start = a.cache && a.cache->starts ? a.cache->starts[batch] : 0;
  QueryVectors<VECS> queries{a, mask, start, lane, query, past + query, q, out, {}, {}};
  queries.slope = alibi_slope(a, head);
  queries.begin();
  Bf16Tile<VECS> bf16;
  if (a.cache && a.dtype == RAREFY_BF16 && bf16.fits(a.head_dim)) {
    bf16.pack_queries(q + lane, a.head_dim);
    queries.bf16 = &bf16;
  }
  const KeyRange range = keys_of_queries(a, visible, past + query, VECS * SIMD_WIDTH, start);
  for (int64_t from = range.begin; from < range.end;) {
    const int64_t at = a.cache ? from : batch * a.kv_seq_stride + from, tile = at / TILE_COLS, column = at % TILE_COLS;
    const int64_t keys = std::min(TILE_COLS - column, range.end - from);
    const float* k = a.cache ? cached_tile(a, a.k_offset, batch, tile, kv_head) : a.k + tile * a.k_stride + own_head;
    const float* v = a.cache ? cached_tile(a, a.v_offset, batch, tile, kv_head) : a.v + tile * a.v_stride + own_head;
    queries.attend(k + column, v + column, from, keys);
    from += keys;
  }
  queries.end();
}

// The queries of one sequence in one column tile: their columns, and their parts of q and out.
struct TileQueries {
  TileQueries(const rarefy_attention& a, int64_t batch, int64_t head, int64_t tile)
      : first(batch * a.seq_stride),
        from(std::max(first, tile * TILE_COLS)),
        to(std::min(first + (a.queries + SIMD_WIDTH - 1) / SIMD_WIDTH * SIMD_WIDTH, (tile + 1) * TILE_COLS)),
        q(a.q + tile * a.q_stride + head * a.head_dim * TILE_COLS),
        out(a.out + tile * a.out_stride + head * a.head_dim * TILE_COLS) {}

  // Call f(number of vectors, first column) for each group of vectors.
  template <class F>
  void for_each_group(F&& f) const {
    constexpr int64_t STEP = MAX_VECS * SIMD_WIDTH;
    int64_t at = from;
    for (; at + STEP <= to; at += STEP) f(std::integral_constant<int, MAX_VECS>{}, at);
    for (; at < to; at += SIMD_WIDTH) f(std::integral_constant<int, 1>{}, at);
  }

  int64_t first, from, to;
  const float* q;
  float* out;
};

// One head for the queries of one sequence in one column tile.
void attention_tile(const rarefy_attention& a, int64_t batch, int64_t head, int64_t tile) {
  const TileQueries t(a, batch, head, tile);
  t.for_each_group(
      [&](auto vecs, int64_t at) { attend_queries<vecs>(a, batch, head, at % TILE_COLS, at - t.first, t.q, t.out); });
}

// The same with a cache in 8 bits: each tile of keys and values is dequantized once, for all queries of the tile.
void coded_attention_tile(const rarefy_attention& a, int64_t batch, int64_t head, int64_t tile, float* memory) {
  const TileQueries t(a, batch, head, tile);
  const int64_t past = a.cache->length, kv_head = head / (a.heads / a.kv_heads);
  const int64_t start = a.cache->starts ? a.cache->starts[batch] : 0;
  const KeyRange visible{0, past + a.queries};
  const float slope = alibi_slope(a, head);
  float *k = memory, *v = memory + a.head_dim * TILE_COLS;
  float max[TILE_COLS] = {}, sum[TILE_COLS] = {};
  const auto for_each_group = [&](auto&& action) {
    t.for_each_group([&](auto vecs, int64_t at) {
      const int64_t lane = at % TILE_COLS, query = at - t.first;
      QueryVectors<vecs> group{a, nullptr, start, lane, query, past + query, t.q, t.out, {}, {}};
      group.slope = slope;
      std::memcpy(group.max, max + lane, sizeof group.max);
      std::memcpy(group.sum, sum + lane, sizeof group.sum);
      action(group, keys_of_queries(a, visible, past + query, vecs * SIMD_WIDTH, start));
      std::memcpy(max + lane, group.max, sizeof group.max);
      std::memcpy(sum + lane, group.sum, sizeof group.sum);
    });
  };
  for_each_group([](auto& group, KeyRange) { group.begin(); });
  const KeyRange range = keys_of_queries(a, visible, past + t.from - t.first, t.to - t.from, start);
  for (int64_t from = range.begin; from < range.end; from += TILE_COLS) {
    const CodedTile keys = coded_tile(a, a.k_offset, batch, from / TILE_COLS, kv_head),
                    values = coded_tile(a, a.v_offset, batch, from / TILE_COLS, kv_head);
    load_kv_codes(keys.codes, keys.scales, a.head_dim, true, k);
    load_kv_codes(values.codes, values.scales, a.head_dim, false, v);
    for_each_group([&](auto& group, KeyRange own) {
      if (from >= own.begin && from < own.end) group.attend(k, v, from, std::min<int64_t>(TILE_COLS, own.end - from));
    });
  }
  for_each_group([](auto& group, KeyRange) { group.end(); });
}

}  // namespace
