// Decode steps of a program: few tokens, activations row-major. Also how the KV cache stores tokens.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "kv_layout.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

// Store some tokens of one sequence in the cache, up to the end of a tile: feature f of token n is x[f * stride + n].
// Returns how many were stored, at most `count`.
inline int64_t store_tokens(const rarefy_kernel_table& t, const rarefy_step& s, int64_t batch, int64_t token,
                            const float* x, int64_t stride, int64_t count) {
  const rarefy_attention& a = *s.attention;
  const rarefy_kv_cache& c = *a.cache;
  const int64_t position = c.length + token, tile = position / TILE_COLS, column = position % TILE_COLS;
  const int64_t offset = s.store_values ? a.v_offset : a.k_offset;
  count = std::min(count, TILE_COLS - column);
  if (c.codes) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const CodedTile to = coded_tile(a, offset, batch, tile, head);
      t.store_kv_codes(x + head * a.head_dim * stride, stride, count, a.head_dim, !s.store_values,
                       to.codes + column * (s.store_values ? 1 : 2), to.scales + column);
    }
    return count;
  }
  float* slot = cached_tile(a, offset, batch, tile, 0) + column;
  for (int64_t f = 0; f < s.features; ++f, slot += TILE_COLS, x += stride) {
    if (count == 1)
      *slot = *x;
    else
      std::memcpy(slot, x, size_t(count) * 4);
  }
  return count;
}

// Rows `from`..`to` of a quantized weight on many rows of inputs in blocks: those become column tiles, and what tiles
// are multiplied by is decompressed.
inline int run_blocked_rows(const rarefy_kernel_table& t, const rarefy_step& s, const rarefy_quantized& w, int64_t from,
                            int64_t to) {
  const int64_t blocks = w.col_blocks, rows = ceil_div(to - from, TILE_ROWS) * TILE_ROWS;
  const int64_t tile_words = (blocks * 16 + blocks * 4) * TILE_COLS, weight_words = DECODE_ROWS_PER_PART * blocks * 16;
  const ScratchBuffer<1> scratch(size_t(tile_words + weight_words + DECODE_ROWS_PER_PART * TILE_COLS) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  uint32_t *tile = static_cast<uint32_t*>(scratch.data), *values = tile + tile_words;
  float* sums = reinterpret_cast<float*>(values + weight_words);
  for (int64_t r = 0; r < rows; r += TILE_ROWS)
    t.decompress_offset(w, from + r, values + (r / 16 * blocks * 16 + r % 16) * 16);
  for (int64_t n = 0; n < s.columns; n += TILE_COLS) {
    const int64_t count = std::min(TILE_COLS, s.columns - n);
    t.pack_block_rows(s.x.data + n * s.x.stride, s.x.stride * 4, count,
                      {.count = blocks, .first = 0, .all = blocks, .width = TILE_COLS}, tile);
    t.multiply_blocked(w, from, values, rows, tile, count, sums);
    t.unpack_tile(sums, to - from, count, s.out.data + n * s.out.stride + from, s.out.stride);
  }
  t.quantized_epilogue(w, from, to, nullptr, s.residual.data, s.out.data, s.out.stride, s.columns);
  return RAREFY_OK;
}

constexpr int64_t NARROW_BLOCKS = 4;  // blocks of 64 features of all tokens that are converted at a time

// Some blocks of inputs become a part of a narrow tile.
inline void convert_narrow(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  constexpr int64_t block_bytes = 128;
  alignas(64) char rows[MAX_NARROW_COLUMNS * NARROW_BLOCKS * block_bytes];
  const int64_t blocks = ceil_div(s.features, 64), first = part * NARROW_BLOCKS;
  const int64_t count = std::min(NARROW_BLOCKS, blocks - first),
                features = std::min(count * 64, s.features - first * 64);
  for (int64_t n = 0; n < s.columns; ++n)
    t.convert_row_blocks(s.x.data + n * s.x.stride + first * 64, features, count * 64, rows + n * count * block_bytes);
  t.pack_block_rows(rows, count * block_bytes, s.columns,
                    {.count = count, .first = first, .all = blocks, .width = ceil_div(s.columns, 16) * 16},
                    reinterpret_cast<uint32_t*>(s.out.data));
}

// Rows `from`..`to` of a quantized weight times a narrow tile.
inline int run_narrow_rows(const rarefy_kernel_table& t, const rarefy_step& s, const rarefy_quantized& w, int64_t from,
                           int64_t to) {
  alignas(64) float sums[DECODE_ROWS_PER_PART * TILE_COLS];
  const int64_t row_bytes = w.col_blocks * 64, rows = ceil_div(to - from, TILE_ROWS) * TILE_ROWS;
  const ScratchBuffer<1> scratch(size_t(w.dtype == RAREFY_I8 ? 0 : rows * row_bytes));
  const uint8_t* cells = static_cast<const uint8_t*>(w.values) + from * row_bytes;
  if (w.dtype != RAREFY_I8) {
    auto* decompressed = static_cast<uint8_t*>(scratch.data);
    if (!decompressed) return RAREFY_NO_MEMORY;
    for (int64_t r = 0; r < rows; r += TILE_ROWS) t.decompress_cells(w, from + r, decompressed + r * row_bytes);
    cells = decompressed;
  }
  t.multiply_narrow(w, from, rows, cells, reinterpret_cast<const uint32_t*>(s.x.data), s.columns, sums);
  t.unpack_tile(sums, to - from, s.columns, s.out.data + from, s.out.stride);
  t.quantized_epilogue(w, from, to, nullptr, s.residual.data, s.out.data, s.out.stride, s.columns);
  return RAREFY_OK;
}

inline int run_decode_linear(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t from = part * DECODE_ROWS_PER_PART, to = std::min(s.features, from + DECODE_ROWS_PER_PART);
  const float* scales = s.in_scales.data;
  if (s.two_terms == 3) return run_narrow_rows(t, s, *static_cast<const rarefy_quantized*>(s.weight), from, to);
  if (s.format == RAREFY_QUANTIZED && s.two_terms == 2 && s.columns >= MIN_TILE_ROWS)
    return run_blocked_rows(t, s, *static_cast<const rarefy_quantized*>(s.weight), from, to);
  if (s.format == RAREFY_QUANTIZED) {
    const auto& w = *static_cast<const rarefy_quantized*>(s.weight);
    const int64_t ldx = w.fp32_inputs ? s.x.stride : s.x.stride * 4;
    t.quantized_gemv[quantized_variant(w)](w, from, to, s.x.data, ldx, s.out.data, s.out.stride, s.columns);
    t.quantized_epilogue(w, from, to, w.fp32_inputs ? nullptr : scales, s.residual.data, s.out.data, s.out.stride,
                         s.columns);
  } else {
    const auto& w = *static_cast<const rarefy_bitmask*>(s.weight);
    const int64_t ldx = s.x.stride * (w.dtype >= RAREFY_I8 ? 4 : w.dtype == RAREFY_BF16 ? 2 : 1);
    t.bitmask_gemv[w.dtype](w, from, to, s.x.data, ldx, s.out.data, s.out.stride, s.columns);
    t.bitmask_epilogue[w.dtype](w, from, to, scales, s.residual.data, s.out.data, s.out.stride, s.columns);
  }
  return RAREFY_OK;
}

// Heads of a part of attention, all of which read the same keys.
inline int64_t heads_together(const rarefy_attention& a) {
  return std::clamp<int64_t>(a.heads_together, 1, std::min(a.heads / a.kv_heads, MAX_HEADS_TOGETHER));
}

inline int64_t attention_parts(const rarefy_attention& a, int64_t tokens) {
  return tokens * a.kv_heads * ceil_div(a.heads / a.kv_heads, heads_together(a));
}

inline int run_decode_attention(const rarefy_kernel_table& t, const rarefy_attention& a, int64_t part) {
  const int64_t group = a.heads / a.kv_heads, together = heads_together(a), parts = ceil_div(group, together);
  const int64_t token = part / (a.kv_heads * parts), kv_head = part / parts % a.kv_heads;
  const int64_t first = part % parts * together, heads = std::min(together, group - first);
  const int64_t keys = ceil_div(a.cache->length + a.queries, TILE_COLS) * TILE_COLS;
  const ScratchBuffer<1> scratch(size_t(heads * (keys + a.head_dim * 17)) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  t.attention_row(a, token / a.queries, token % a.queries, kv_head * group + first, heads,
                  static_cast<float*>(scratch.data));
  return RAREFY_OK;
}

inline int64_t decode_parts(const rarefy_step& s) {
  switch (s.op) {
    case RAREFY_OP_LINEAR: return ceil_div(s.features, DECODE_ROWS_PER_PART);
    case RAREFY_OP_CONVERT: return s.two_terms == 3 ? ceil_div(s.features, 64 * NARROW_BLOCKS) : s.columns;
    case RAREFY_OP_ADD:
    case RAREFY_OP_MUL: return 1;
    case RAREFY_OP_ATTENTION: return attention_parts(*s.attention, s.columns);
    default: return s.columns;  // one token each
  }
}

inline int run_decode_step(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  if (s.op == RAREFY_OP_CONVERT && s.two_terms == 3) {
    convert_narrow(t, s, part);
    return RAREFY_OK;
  }
  const float* x = s.x.data + part * s.x.stride;
  float* out = s.out.data + part * s.out.stride;
  switch (s.op) {
    case RAREFY_OP_PACK: std::memcpy(out, s.x.data + part * s.features, size_t(s.features) * 4); break;
    case RAREFY_OP_UNPACK: std::memcpy(s.out.data + part * s.features, x, size_t(s.features) * 4); break;
    case RAREFY_OP_LINEAR: return run_decode_linear(t, s, part);
    case RAREFY_OP_CONVERT: {
      if (s.two_terms >= 2) {
        t.convert_row_blocks(x, s.features, ceil_div(s.features, 64) * 64, out);
        break;
      }
      const float scale = s.dtype == RAREFY_I8 ? rarefy_input_scale(t, x, s.features) : 1.0f;
      s.out_scales.data[part] = scale;
      const int64_t padded = ceil_div(s.features, 64) * 64;
      (s.two_terms ? t.convert_row_two_terms : t.convert_row[s.dtype])(x, s.features, padded, 1.0f / scale, out);
      break;
    }
    case RAREFY_OP_NORM: {
      const int64_t group = s.features / std::max<int64_t>(1, s.groups);
      for (int64_t f = 0; f < s.features; f += group)
        t.norm_row(x + f, group, s.gamma, s.bias, s.eps, s.subtract_mean != 0, out + f);
      break;
    }
    case RAREFY_OP_ADD:
    case RAREFY_OP_MUL:
      t.add_or_mul(s.x.data, s.other.data, s.op == RAREFY_OP_MUL, s.act, s.out.data,
                   ceil_div(s.columns * s.out.stride, TILE_COLS) * TILE_COLS);
      break;
    case RAREFY_OP_FAKE_QUANTIZE:
      t.fake_quantize(x, s.codes_scale, s.codes_zero, out, ceil_div(s.features, 16) * 16);
      break;
    case RAREFY_OP_ROPE:
      t.rope[1](x, s.cos.data + part * s.cos.stride, s.sin.data + part * s.sin.stride, s.heads,
                s.features / std::max<int64_t>(1, s.heads), out);
      break;
    case RAREFY_OP_KV_STORE: store_tokens(t, s, part / s.tokens, part % s.tokens, x, 1, 1); break;
    case RAREFY_OP_ATTENTION: return run_decode_attention(t, *s.attention, part);
  }
  return RAREFY_OK;
}

}  // namespace
