// What attention in bf16 needs besides products: keys, values and queries as operands of dense products, and the
// softmax between the two. Scores are [keys][TILE_COLS queries], so the softmax runs down the rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dense_gemm.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"
#include "tile_attention.hpp"

namespace {

constexpr float LOG2_E = 1.44269504f;

// Pairs of features of the first `columns` columns as bf16, the lanes padded with zeros to a multiple of 16.
void pack_bf16_lanes(const float* x, int64_t features, int64_t columns, uint32_t* out) {
  const int64_t lanes = (features + 31) / 32 * 16;
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
      const f32_vec low = 2 * l < features ? load_vec(x + 2 * l * TILE_COLS + n) : f32_vec{};
      const f32_vec high = 2 * l + 1 < features ? load_vec(x + (2 * l + 1) * TILE_COLS + n) : f32_vec{};
      store_raw(out + l * TILE_COLS + n, pack_bf16(low, high));
    }
}

// 16 columns as rows of a dense weight, whose lanes are pairs of features: blocks [lanes / 16][16 columns][16 lanes].
void pack_columns_as_rows(const float* x, int64_t features, uint32_t* out) {
  for (int64_t f = 0; f < features; f += 2 * DENSE_LANES, out += DENSE_BLOCK)
    for (int64_t l = 0; l < DENSE_LANES; l += SIMD_WIDTH)
      for (int64_t n = 0; n < DENSE_ROWS; n += SIMD_WIDTH) {
        raw_vec square[SIMD_WIDTH];
        for (int64_t i = 0; i < SIMD_WIDTH; ++i) {
          const int64_t feature = f + 2 * (l + i);
          const f32_vec low = feature < features ? load_vec(x + feature * TILE_COLS + n) : f32_vec{};
          const f32_vec high = feature + 1 < features ? load_vec(x + (feature + 1) * TILE_COLS + n) : f32_vec{};
          square[i] = pack_bf16(low, high);
        }
        transpose(square);
        for (int64_t i = 0; i < SIMD_WIDTH; ++i) store_raw(out + (n + i) * DENSE_LANES + l, square[i]);
      }
}

// 32 columns of 16 features as a block of a dense weight, whose rows are features and whose lanes are pairs of columns.
// The two groups of 16 columns have `first` and `second` columns; the rest is zeros.
void pack_features_as_rows(const float* a, const float* b, int64_t first, int64_t second, int64_t features,
                           uint32_t* out) {
  for (int64_t f = 0; f < DENSE_ROWS; ++f, a += TILE_COLS, b += TILE_COLS, out += DENSE_LANES) {
    float columns[2 * DENSE_LANES] = {};
    if (f < features) std::memcpy(columns, a, size_t(first) * 4);
    if (f < features && second) std::memcpy(columns + DENSE_LANES, b, size_t(second) * 4);
    for (int64_t l = 0; l < DENSE_LANES; l += SIMD_WIDTH)
      store_raw(out + l, LaneOps<RAREFY_BF16>::pack(columns + 2 * l, 2 * SIMD_WIDTH, 1.0f));
  }
}

// Scores times log2(e) and the scale, the mask added, hidden keys masked: the slow way, for masks with a number for
// each query, causal attention and windows.
void mask_scores(const rarefy_attention& a, const float* mask, int64_t first_key, int64_t keys, int64_t first_query,
                 int64_t columns, float scale, float* scores) {
  const int64_t visible = std::min(columns, a.queries - first_query);
  for (int64_t j = 0; j < keys; ++j, scores += TILE_COLS) {
    const int64_t key = first_key + j;
    // of all columns, those that see this key
    const int64_t from = a.causal ? std::clamp<int64_t>(key - first_query, 0, columns) : 0;
    const int64_t to = a.window ? std::clamp<int64_t>(key + a.window - first_query, from, columns) : columns;
    for (int64_t n = 0; n < columns; ++n) {
      const float m = mask && n < visible ? mask[j * a.mask_key_stride + n * a.mask_query_stride] * LOG2_E : 0.0f;
      scores[n] = n < from || n >= to ? 2 * MASKED : scores[n] * scale + m;
    }
  }
}

// Softmax of `keys` rows of scores over `columns` queries: scores become pairs of keys as bf16, padded with zeros to 16
// lanes. `max` and `sum` are those of earlier keys, and are updated; `rescale` receives what sums so far are worth.
// `mask` is added: of the first key and query, null where there is none.
void softmax_lanes(const rarefy_attention& a, const float* mask, int64_t first_key, int64_t keys, int64_t first_query,
                   int64_t columns, float* scores, uint32_t* out, float* max, float* sum, float* rescale) {
  float scale = a.scale * LOG2_E;
  const bool hides = a.window || (a.causal && first_key + keys > first_query);
  if (hides || (mask && a.mask_query_stride)) {
    mask_scores(a, mask, first_key, keys, first_query, columns, scale, scores);
    scale = 1.0f;
    mask = nullptr;
  }
  bool adds = false;  // a mask of zeros adds nothing
  for (int64_t j = 0; mask && j < keys; ++j) adds |= mask[j * a.mask_key_stride] != 0.0f;
  const int64_t lanes = (keys + 31) / 32 * 16;
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    f32_vec top = load_vec(max + n);
    for (int64_t j = 0; j < keys; ++j) {
      float* s = scores + j * TILE_COLS + n;
      f32_vec v = load_vec(s) * scale;
      if (adds) store_vec(s, v += mask[j * a.mask_key_stride] * LOG2_E);
      top = max_vec(v, top);
    }
    const f32_vec factor = exp2_fast(load_vec(max + n) - top), inner = f32_vec{} + (adds ? 1.0f : scale);
    f32_vec total[2] = {};
    const float* s = scores + n;
    int64_t l = 0;
    for (; l < keys / 2; ++l, s += 2 * TILE_COLS) {
      const f32_vec low = exp2_fast(load_vec(s) * inner - top), high = exp2_fast(load_vec(s + TILE_COLS) * inner - top);
      total[0] += low;
      total[1] += high;
      store_raw(out + l * TILE_COLS + n, pack_bf16(low, high));
    }
    if (keys % 2) {
      const f32_vec low = exp2_fast(load_vec(s) * inner - top);
      total[0] += low;
      store_raw(out + l++ * TILE_COLS + n, pack_bf16(low, f32_vec{}));
    }
    for (; l < lanes; ++l) store_raw(out + l * TILE_COLS + n, raw_vec{});
    store_vec(max + n, top);
    store_vec(sum + n, load_vec(sum + n) * factor + (total[0] + total[1]));
    store_vec(rescale + n, factor);
  }
}

// out = (out rescale + sums) / total over the first `columns` columns; rescale is null for the first keys, total is
// null but for the last.
void add_rescaled(const float* sums, const float* rescale, const float* total, int64_t features, int64_t columns,
                  float* out) {
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const f32_vec factor = rescale ? load_vec(rescale + n) : f32_vec{};
    const f32_vec inverse = total ? 1.0f / load_vec(total + n) : f32_vec{} + 1.0f;
    for (int64_t i = n; i < features * TILE_COLS; i += TILE_COLS) {
      const f32_vec v = load_vec(sums + i);
      store_vec(out + i, (rescale ? load_vec(out + i) * factor + v : v) * inverse);
    }
  }
}

}  // namespace
