// Attention as a step of a program on column tiles, with products in fp32, bf16 or int8.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"
#include "visible_keys.hpp"

namespace {

constexpr int64_t KEYS_PER_CHUNK = 256;  // whose scores are in the cache at a time
constexpr int64_t KEY_BLOCK = 16, VALUE_BLOCK = 32;

// Column tiles that a sequence may touch; in int8 those of its own, from its first token on.
inline int64_t attention_tiles(const rarefy_attention& a) {
  return ceil_div(a.queries + (a.dtype == RAREFY_I8 ? 0 : TILE_COLS - 1), TILE_COLS);
}

// Whether keys and values are packed for dense products; those of a cache are packed tile by tile (tile_attention.hpp).
inline bool multiplies_bf16(const rarefy_attention& a) {
  return a.dtype == RAREFY_BF16 && !a.cache && rarefy_active_kernels().multiplies_bf16;
}

// Whether a part is a head of a sequence, so that its keys and values are packed once; else a column tile of it.
inline bool packs_keys_once(const rarefy_attention& a) {
  return (a.dtype == RAREFY_I8 || multiplies_bf16(a)) && a.batch * a.heads >= 3 * int64_t(num_threads());
}

inline int64_t attention_parts(const rarefy_attention& a) {
  return a.batch * a.heads * (packs_keys_once(a) ? 1 : attention_tiles(a));
}

// One head of one sequence, its keys and values packed for dense products in bf16.
struct LaneAttention {
  LaneAttention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t sequence, int64_t head)
      : t(t),
        a(a),
        first(sequence * a.seq_stride),
        first_key(sequence * a.kv_seq_stride),
        head_dim(a.head_dim),
        offset(head * head_dim * TILE_COLS) {
    mask = a.mask ? a.mask + sequence * a.mask_batch_stride + head * a.mask_head_stride : nullptr;
    const KeyRange visible = visible_keys(a, mask);
    begin = visible.begin / VALUE_BLOCK * VALUE_BLOCK;
    keys = visible.end;
    dim_blocks = ceil_div(head_dim, 32);
    key_words = ceil_div(keys, KEY_BLOCK) * dim_blocks * 256;
    value_blocks = ceil_div(keys, VALUE_BLOCK);
    value_words = ceil_div(head_dim, 16) * value_blocks * 256;
    kv_offset = head / (a.heads / a.kv_heads) * head_dim * TILE_COLS;
    chunk = std::min(KEYS_PER_CHUNK, ceil_div(keys - begin, 32) * 32);
    const int64_t rows = ceil_div(head_dim, 16) * 16;
    words = key_words + value_words + (dim_blocks * 16 + chunk + chunk / 2 + rows) * TILE_COLS;
  }

  void pack(uint32_t* memory) {
    packed_keys = memory;
    packed_values = packed_keys + key_words;
    queries = packed_values + value_words;
    scores = reinterpret_cast<float*>(queries + dim_blocks * 16 * TILE_COLS);
    weights = queries + (dim_blocks * 16 + chunk) * TILE_COLS;
    sums = reinterpret_cast<float*>(weights + chunk / 2 * TILE_COLS);
    for (int64_t key = begin; key < keys; key += KEY_BLOCK)
      t.pack_columns_as_rows(at(a.k, a.k_stride, key), head_dim, packed_keys + key / KEY_BLOCK * dim_blocks * 256);
    for (int64_t key = begin; key < keys; key += VALUE_BLOCK)
      for (int64_t d = 0; d < head_dim; d += 16) {
        const float* low = at(a.v, a.v_stride, key) + d * TILE_COLS;
        const int64_t left = keys - key - 16;
        const float* high = left > 0 ? at(a.v, a.v_stride, key + 16) + d * TILE_COLS : low;
        t.pack_features_as_rows(low, high, std::min<int64_t>(keys - key, 16), std::clamp<int64_t>(left, 0, 16),
                                head_dim - d, packed_values + (d / 16 * value_blocks + key / VALUE_BLOCK) * 256);
      }
  }

  // The queries of the sequence in one column tile.
  void attend(int64_t tile) {
    const int64_t from = std::max(first, tile * TILE_COLS), query = from - first, lane = from % TILE_COLS;
    const int64_t end = std::min(first + ceil_div(a.queries, 16) * 16, (tile + 1) * TILE_COLS), count = end - from;
    if (count <= 0) return;
    alignas(64) float max[TILE_COLS], sum[TILE_COLS] = {}, rescale[TILE_COLS];
    std::fill_n(max, TILE_COLS, MASKED);
    t.pack_bf16_lanes(a.q + tile * a.q_stride + offset + lane, head_dim, count, queries);
    float* out = a.out + tile * a.out_stride + offset + lane;
    const int64_t last = a.causal ? std::min(keys, query + count) : keys;
    for (int64_t key = begin; key < last; key += chunk) {
      const int64_t n = std::min(chunk, last - key);
      for (int64_t j = 0; j < n; j += 32)
        t.dense_lanes[RAREFY_BF16](packed_keys + (key + j) / KEY_BLOCK * dim_blocks * 256, dim_blocks,
                                   n - j > KEY_BLOCK ? 32 : KEY_BLOCK, queries,
                                   reinterpret_cast<uint32_t*>(scores + j * TILE_COLS), count);
      const float* m = mask ? mask + key * a.mask_key_stride + query * a.mask_query_stride : nullptr;
      t.softmax_lanes(a, m, key, n, query, count, scores, weights, max, sum, rescale);
      multiply_values(key, n, count);
      t.add_rescaled(sums, key > begin ? rescale : nullptr, key + n < last ? nullptr : sum, head_dim, count, out);
    }
  }

 private:
  const float* at(const float* x, int64_t stride, int64_t key) const {
    const int64_t column = first_key + key;
    return x + column / TILE_COLS * stride + kv_offset + column % TILE_COLS;
  }

  // Sums of values [head_dim][TILE_COLS], weighted by some keys' weights.
  void multiply_values(int64_t key, int64_t count, int64_t columns) {
    const int64_t blocks = ceil_div(count, VALUE_BLOCK);
    for (int64_t d = 0; d < head_dim; d += 16)
      t.dense_lanes[RAREFY_BF16](packed_values + (d / 16 * value_blocks + key / VALUE_BLOCK) * 256, blocks, 16, weights,
                                 reinterpret_cast<uint32_t*>(sums + d * TILE_COLS), columns);
  }

  const rarefy_kernel_table& t;
  const rarefy_attention& a;
  int64_t first, first_key, head_dim, offset, kv_offset, begin, keys, chunk;
  int64_t dim_blocks, value_blocks, key_words, value_words;
  const float* mask;
  uint32_t *packed_keys, *packed_values, *queries, *weights;
  float *scores, *sums;

 public:
  int64_t words;  // of memory that `pack` takes
};

// One head of one sequence for the queries in some column tiles.
inline int attend_tiles(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t sequence, int64_t index,
                        int64_t tile, int64_t end) {
  if (a.cache && a.cache->codes) {
    const ScratchBuffer<1> scratch(size_t(2 * a.head_dim * TILE_COLS) * 4);
    if (!scratch.data) return RAREFY_NO_MEMORY;
    for (; tile < end; ++tile) t.coded_attention_tile(a, sequence, index, tile, static_cast<float*>(scratch.data));
    return RAREFY_OK;
  }
  if (!multiplies_bf16(a)) {
    for (; tile < end; ++tile) t.attention_tile(a, sequence, index, tile);
    return RAREFY_OK;
  }
  LaneAttention head(t, a, sequence, index);
  const ScratchBuffer<1> scratch(size_t(head.words) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  head.pack(static_cast<uint32_t*>(scratch.data));
  const DenseSection section(t);
  for (; tile < end; ++tile) head.attend(tile);
  return RAREFY_OK;
}

// Copy `count` columns from column `from` of one head to column `to` of another one.
inline void copy_columns(const float* x, int64_t x_stride, int64_t from, float* out, int64_t out_stride, int64_t to,
                         int64_t head_dim, int64_t count) {
  for (int64_t n = 0, size; n < count; n += size) {
    const int64_t lane = (from + n) % TILE_COLS, out_lane = (to + n) % TILE_COLS;
    size = std::min({count - n, TILE_COLS - lane, TILE_COLS - out_lane});
    const float* source = x + (from + n) / TILE_COLS * x_stride + lane;
    float* target = out + (to + n) / TILE_COLS * out_stride + out_lane;
    for (int64_t d = 0; d < head_dim; ++d, source += TILE_COLS, target += TILE_COLS) {
      int64_t i = 0;  // copies of a fixed size need no call
      for (; i + 16 <= size; i += 16) std::memcpy(target + i, source + i, 64);
      for (; i + 4 <= size; i += 4) std::memcpy(target + i, source + i, 16);
      for (; i < size; ++i) std::memcpy(target + i, source + i, 4);
    }
  }
}

// A sequence that begins in any column: its columns are copied to tiles of its own, and the outputs back.
inline int run_bounded_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  const int64_t pieces = packs_keys_once(a) ? 1 : attention_tiles(a), index = part / pieces % a.heads;
  const int64_t *bounds = a.bounds + part / pieces / a.heads * 2, first = bounds[0], tokens = bounds[1];
  const int64_t tiles = ceil_div(tokens, TILE_COLS), tile = part % pieces, end = pieces == 1 ? tiles : tile + 1;
  if (tile >= tiles) return RAREFY_OK;
  const int64_t stride = a.head_dim * TILE_COLS, offset = index * stride;
  const int64_t kv_offset = index / (a.heads / a.kv_heads) * stride;
  const ScratchBuffer<3> scratch(size_t(4 * tiles * stride) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  float *q = static_cast<float*>(scratch.data), *k = q + tiles * stride, *v = k + tiles * stride;
  rarefy_attention own = a;
  own.q = q;
  own.k = k;
  own.v = v;
  own.out = v + tiles * stride;
  own.q_stride = own.k_stride = own.v_stride = own.out_stride = stride;
  own.batch = own.heads = own.kv_heads = 1;
  own.queries = own.keys = own.seq_stride = own.kv_seq_stride = tokens;
  own.bounds = nullptr;
  const int64_t query = tile * TILE_COLS, queries = std::min(tokens, end * TILE_COLS) - query;
  copy_columns(a.q + offset, a.q_stride, first + query, q, stride, query, a.head_dim, queries);
  copy_columns(a.k + kv_offset, a.k_stride, first, k, stride, 0, a.head_dim, tokens);
  copy_columns(a.v + kv_offset, a.v_stride, first, v, stride, 0, a.head_dim, tokens);
  if (const int code = attend_tiles(t, own, 0, 0, tile, end)) return code;
  copy_columns(own.out, stride, query, a.out + offset, a.out_stride, first + query, a.head_dim, queries);
  return RAREFY_OK;
}

// Whether a mask hides every key from a query by -infinity.
inline bool sees_nothing(const rarefy_attention& a, const float* mask, int64_t query) {
  const int64_t keys = a.causal ? std::min(a.keys, query + 1) : a.keys;
  mask += query * a.mask_query_stride;
  for (int64_t key = 0; key < keys; ++key)
    if (mask[key * a.mask_key_stride] != -INFINITY) return false;
  return true;
}

// Zeros, as in torch, for the queries from `from` to `to` that see nothing; the kernels let them see all keys alike.
inline void clear_unseeing(const rarefy_attention& a, int64_t sequence, int64_t head, int64_t from, int64_t to) {
  if (!a.mask) return;
  const float* mask = a.mask + sequence * a.mask_batch_stride + head * a.mask_head_stride;
  for (int64_t query = from; query < to; ++query) {
    if (!sees_nothing(a, mask, query)) continue;
    const int64_t column = sequence * a.seq_stride + query;
    float* out = a.out + column / TILE_COLS * a.out_stride + head * a.head_dim * TILE_COLS + column % TILE_COLS;
    for (int64_t d = 0; d < a.head_dim; ++d) out[d * TILE_COLS] = 0.0f;
  }
}

inline int run_int8_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  const int64_t pieces = packs_keys_once(a) ? 1 : attention_tiles(a), sequence = part / pieces / a.heads;
  const int64_t queries = a.bounds ? a.bounds[2 * sequence + 1] : a.queries, from = part % pieces * TILE_COLS;
  if (from >= queries) return RAREFY_OK;
  const ScratchBuffer<1> scratch(size_t(t.int8_attention_words(a)) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  const int64_t head = part / pieces % a.heads, to = pieces == 1 ? queries : std::min(queries, from + TILE_COLS);
  t.int8_attention(a, sequence, head, from, to, static_cast<uint32_t*>(scratch.data));
  if (!a.bounds) clear_unseeing(a, sequence, head, from, to);
  return RAREFY_OK;
}

inline int run_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  if (a.dtype == RAREFY_I8) return run_int8_attention(t, a, part);
  if (a.bounds) return run_bounded_attention(t, a, part);
  const int64_t pieces = packs_keys_once(a) ? 1 : attention_tiles(a), head = part / pieces % a.heads;
  const int64_t sequence = part / pieces / a.heads, first = sequence * a.seq_stride;
  const int64_t tile = first / TILE_COLS + part % pieces, tiles = ceil_div(first + a.queries, TILE_COLS);
  const int64_t end = pieces == 1 ? tiles : std::min(tile + 1, tiles);
  const int code = attend_tiles(t, a, sequence, head, tile, end);
  clear_unseeing(a, sequence, head, std::max<int64_t>(0, tile * TILE_COLS - first),
                 std::min(a.queries, end * TILE_COLS - first));
  return code;
}

}  // namespace
