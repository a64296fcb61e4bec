// Where a KV cache stores the keys or values of one head of one sequence, for 64 tokens.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

inline int64_t page_of(const rarefy_kv_cache& c, int64_t batch, int64_t tile) {
  return c.pages[batch * c.tiles + tile];
}

// Of a cache in fp32. `offset`: the step's k_offset or v_offset.
inline float* cached_tile(const rarefy_attention& a, int64_t offset, int64_t batch, int64_t tile, int64_t kv_head) {
  const rarefy_kv_cache& c = *a.cache;
  return c.data + (page_of(c, batch, tile) * c.features + offset + kv_head * a.head_dim) * TILE_COLS;
}

struct CodedTile {
  int8_t* codes;
  float* scales;
};

// Of a cache in 8 bits.
inline CodedTile coded_tile(const rarefy_attention& a, int64_t offset, int64_t batch, int64_t tile, int64_t kv_head) {
  const rarefy_kv_cache& c = *a.cache;
  const int64_t page = page_of(c, batch, tile), heads = c.features / c.head_dim;
  return {.codes = c.codes + (page * c.features + offset + kv_head * a.head_dim) * TILE_COLS,
          .scales = c.scales + (page * heads + offset / c.head_dim + kv_head) * TILE_COLS};
}

}  // namespace
