// Attention as a step of a program on column tiles: in fp32, or with products in bf16.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t KEYS_PER_CHUNK = 256;  // whose scores are in the cache at a time
constexpr int64_t KEY_BLOCK = 16, VALUE_BLOCK = 32;

// Column tiles that a sequence may touch.
inline int64_t attention_tiles(const rarefy_attention& a) { return ceil_div(a.queries + TILE_COLS - 1, TILE_COLS); }

inline bool multiplies_bf16(const rarefy_attention& a) { return a.bf16 && rarefy_active_kernels().multiplies_bf16; }

// Whether a part is a head of a sequence, so that its keys and values are packed once; else a column tile of it.
inline bool packs_keys_once(const rarefy_attention& a) {
  return multiplies_bf16(a) && a.batch * a.heads >= 3 * int64_t(num_threads());
}

inline int64_t attention_parts(const rarefy_attention& a) {
  return a.batch * a.heads * (packs_keys_once(a) ? 1 : attention_tiles(a));
}

// Keys that a query may see: those before trailing padding, which a mask of the same value for all queries hides.
inline int64_t visible_keys(const rarefy_attention& a, const float* mask) {
  if (!mask || a.mask_query_stride) return a.keys;
  int64_t keys = a.keys;
  while (keys > 0 && mask[(keys - 1) * a.mask_key_stride] <= MASKED) --keys;
  return keys ? keys : a.keys;
}

// One head of one sequence, its keys and values packed for dense products in bf16.
struct LaneAttention {
  LaneAttention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t sequence, int64_t head)
      : t(t), a(a), first(sequence * a.seq_stride), first_key(sequence * a.kv_seq_stride), head_dim(a.head_dim),
        offset(head * head_dim * TILE_COLS) {
    mask = a.mask ? a.mask + sequence * a.mask_batch_stride + head * a.mask_head_stride : nullptr;
    keys = visible_keys(a, mask);
    dim_blocks = ceil_div(head_dim, 32);
    key_words = ceil_div(keys, KEY_BLOCK) * dim_blocks * 256;
    value_blocks = ceil_div(keys, VALUE_BLOCK);
    value_words = ceil_div(head_dim, 16) * value_blocks * 256;
    kv_offset = head / (a.heads / a.kv_heads) * head_dim * TILE_COLS;
    chunk = std::min(KEYS_PER_CHUNK, ceil_div(keys, 32) * 32);
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
    for (int64_t key = 0; key < keys; key += KEY_BLOCK)
      t.pack_columns_as_rows(at(a.k, a.k_stride, key), head_dim, packed_keys + key / KEY_BLOCK * dim_blocks * 256);
    for (int64_t key = 0; key < keys; key += VALUE_BLOCK)
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
    for (int64_t key = 0; key < last; key += chunk) {
      const int64_t n = std::min(chunk, last - key);
      for (int64_t j = 0; j < n; j += 32)
        t.dense_lanes[0](packed_keys + (key + j) / KEY_BLOCK * dim_blocks * 256, dim_blocks,
                         n - j > KEY_BLOCK ? 32 : KEY_BLOCK, queries,
                         reinterpret_cast<uint32_t*>(scores + j * TILE_COLS), count);
      const float* m = mask ? mask + key * a.mask_key_stride + query * a.mask_query_stride : nullptr;
      t.softmax_lanes(a, m, key, n, query, count, scores, weights, max, sum, rescale);
      multiply_values(key, n, count);
      t.add_rescaled(sums, key ? rescale : nullptr, key + n < last ? nullptr : sum, head_dim, count, out);
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
      t.dense_lanes[0](packed_values + (d / 16 * value_blocks + key / VALUE_BLOCK) * 256, blocks, 16, weights,
                       reinterpret_cast<uint32_t*>(sums + d * TILE_COLS), columns);
  }

  const rarefy_kernel_table& t;
  const rarefy_attention& a;
  int64_t first, first_key, head_dim, offset, kv_offset, keys, chunk;
  int64_t dim_blocks, value_blocks, key_words, value_words;
  const float* mask;
  uint32_t *packed_keys, *packed_values, *queries, *weights;
  float *scores, *sums;

 public:
  int64_t words;  // of memory that `pack` takes
};

inline int run_lane_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  const int64_t tiles = attention_tiles(a), pieces = packs_keys_once(a) ? 1 : tiles;
  LaneAttention head(t, a, part / pieces / a.heads, part / pieces % a.heads);
  const ScratchBuffer<1> scratch(size_t(head.words) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  head.pack(static_cast<uint32_t*>(scratch.data));
  const DenseSection section(t);
  const int64_t first_tile = part / pieces / a.heads * a.seq_stride / TILE_COLS;
  for (int64_t i = 0; i < tiles / pieces; ++i) head.attend(first_tile + part % pieces + i);
  return RAREFY_OK;
}

inline int run_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  if (multiplies_bf16(a)) return run_lane_attention(t, a, part);
  const int64_t tiles = attention_tiles(a), head = part / tiles % a.heads, sequence = part / tiles / a.heads;
  const int64_t tile = sequence * a.seq_stride / TILE_COLS + part % tiles;
  if (tile * TILE_COLS < sequence * a.seq_stride + a.queries) t.attention_tile(a, sequence, head, tile);
  return RAREFY_OK;
}

}  // namespace
