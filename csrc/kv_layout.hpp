// Where a KV cache stores the keys or values of one head of one sequence.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

// Codes and scales of the first tile, and the distances from tile to tile.
struct CodedTiles {
  int8_t* codes;
  float* scales;
  int64_t codes_stride, scales_stride;
};

// Of a cache in 8 bits. `offset`: the step's k_offset or v_offset.
inline CodedTiles coded_tiles(const rarefy_attention& a, int64_t offset, int64_t batch, int64_t kv_head) {
  const rarefy_kv_cache& c = *a.cache;
  const int64_t features = a.kv_heads * a.head_dim;
  return {.codes = c.codes + (offset * c.batch + batch * features) * c.capacity + kv_head * a.head_dim * TILE_COLS,
          .scales = c.scales + (offset / c.head_dim * c.batch + batch * a.kv_heads) * c.capacity + kv_head * TILE_COLS,
          .codes_stride = features * TILE_COLS,
          .scales_stride = a.kv_heads * TILE_COLS};
}

}  // namespace
