// Convolution, pooling and their preparation, as steps of a program on column tiles whose columns are pixels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv_indirection.hpp"
#include "kernel_table.h"
#include "linear_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t CHANNELS_PER_PART = 8;      // padding
constexpr int64_t CHANNELWISE_PER_PART = 32;  // pooling, depthwise convolution
constexpr int64_t CONV_ROWS_PER_PART = 256;   // convolution

// Whether all lanes are gathered before they are multiplied.
inline bool is_dense_int8(const rarefy_conv& w) { return w.dense && w.weight.dtype == RAREFY_I8; }

// Rows of a part of a convolution: fewer where there are few tiles, so that all threads have work. Dense int8 rows
// gather all their inputs first, so that they are all of them where there are tiles for all threads.
inline int64_t conv_rows_per_part(const rarefy_step& s, int64_t tiles) {
  const rarefy_conv& w = *s.indirection->conv;
  if (is_dense_int8(w) && tiles >= 4 * int64_t(num_threads())) return ceil_div(s.features, SLAB_ROWS) * SLAB_ROWS;
  return tiles < 8 ? SLAB_ROWS : CONV_ROWS_PER_PART;
}

// Call f(image, first column, columns) for each image in a tile.
template <class F>
inline void for_each_image(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * TILE_COLS, end = std::min(at + TILE_COLS, s.columns), n; at < end; at += n) {
    n = std::min(s.tokens - at % s.tokens, end - at);
    f(at / s.tokens, at, n);
  }
}

// The int8 scales of a tile's columns: each that of its image. in_absmax has the largest magnitude of each image in
// each tile, at its first column there.
inline void image_scales(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile, float* out) {
  std::fill_n(out, TILE_COLS, 1.0f);
  for_each_image(s, tile, [&](int64_t image, int64_t column, int64_t n) {
    uint32_t bits = 0;  // compared as integers, so that NaN is larger than all others
    for (int64_t at = image * s.tokens, end = at + s.tokens; at < end; at = (at / TILE_COLS + 1) * TILE_COLS)
      bits = std::max(bits, __builtin_bit_cast(uint32_t, s.in_absmax.data[at]));
    const float absmax = __builtin_bit_cast(float, bits);
    std::fill_n(out + column % TILE_COLS, n, rarefy_input_scale(t, &absmax, 1));
  });
}

// The bits of four int8 codes of zero, where signed codes have `zero`.
inline float packed_zero_codes(const rarefy_kernel_table& t, int32_t zero) {
  const uint32_t code = (__builtin_bit_cast(uint32_t, t.packed_zeros) + uint32_t(zero)) & 255u;
  return __builtin_bit_cast(float, code * 0x01010101u);
}

// The planes of some channels of one image.
inline int run_pad_planes(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_indirection& in = *s.indirection;
  const ConvGeometry geometry(*in.conv, in.height, in.width);
  const int64_t chunks = ceil_div(s.features, CHANNELS_PER_PART), image = part / chunks;
  const int64_t from = part % chunks * CHANNELS_PER_PART, to = std::min(from + CHANNELS_PER_PART, s.features);
  const float pad_value = s.dtype == RAREFY_I8 ? packed_zero_codes(t, s.in_zero) : s.pad_value;
  const ScratchBuffer<1> scratch(s.channels_first ? 4 : size_t(s.tokens + TILE_COLS) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  for (int64_t f = from; f < to; ++f) {
    const float* x = s.x.data + (image * s.features + f) * s.tokens;
    if (!s.channels_first) {  // collect the channel out of the tiles
      float* channel = static_cast<float*>(scratch.data);
      for (int64_t at = image * s.tokens, end = at + s.tokens; at < end;) {
        const int64_t n = std::min(TILE_COLS - at % TILE_COLS, end - at);
        std::memcpy(channel + at - image * s.tokens, tile_of(s.x, at / TILE_COLS) + f * TILE_COLS + at % TILE_COLS,
                    size_t(n) * 4);
        at += n;
      }
      x = channel;
    }
    float* out = s.out.data + (image * s.features + f) * geometry.channel_floats;
    for (int64_t p = 0; p < geometry.num_planes; ++p)
      geometry.copy_phase(t, x, geometry.phases[p], out + p * geometry.plane_floats, pad_value);
  }
  return RAREFY_OK;
}

// The int8 scales of the images that a tile's outputs belong to.
inline void output_scales(const rarefy_step& s, int64_t tile, float* out) {
  if (s.in_scale != 0.0f) {
    std::fill_n(out, TILE_COLS, s.in_scale);
    return;
  }
  const int64_t pixels = s.indirection->height * s.indirection->width;
  for (int64_t n = 0; n < TILE_COLS; ++n)
    out[n] = s.in_scales.data[std::min(tile * TILE_COLS + n, s.columns - 1) / s.tokens * pixels];
}

// As run_conv, for a dense weight of int8: all lanes are gathered first, then each 32 rows are multiplied at once.
inline int run_dense_conv(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_indirection& in = *s.indirection;
  const rarefy_conv& w = *in.conv;
  const ConvGeometry geometry(w, in.height, in.width);
  const int64_t tiles = ceil_div(s.columns, TILE_COLS), size = conv_rows_per_part(s, tiles);
  const int64_t chunks = ceil_div(s.features, size), tile = part / chunks, first = part % chunks * size;
  const int64_t columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS), end = std::min(first + size, s.features);
  const int64_t lanes = w.weight.lanes, lane_blocks = ceil_div(lanes, 16);
  const int64_t image_floats = w.inputs * geometry.channel_floats;
  const ScratchBuffer<1> scratch(size_t(lane_blocks * 16 + 1) * TILE_COLS * 4);  // one more row, as in run_conv
  uint32_t* gathered = static_cast<uint32_t*>(scratch.data);
  if (!gathered) return RAREFY_NO_MEMORY;
  rarefy_segment segments[TILE_COLS];
  const int count = geometry.output_segments(tile * TILE_COLS, columns, image_floats, segments);
  t.gather_lanes(s.x.data, s.x.data + s.batch * image_floats + SEGMENT_FLOATS, in.offsets, lanes, segments, count,
                 gathered);
  alignas(64) float col_scales[TILE_COLS];
  output_scales(s, tile, col_scales);
  const rarefy_weight_epilogue e{w.weight.scales, w.weight.row_sums, w.weight.bias, w.weight.act};
  store_dense_rows(t, s, RAREFY_I8, static_cast<const uint32_t*>(w.dense), lane_blocks, e, gathered, tile, first, end,
                   columns, col_scales, tile_of(s.out, tile), nullptr);
  return RAREFY_OK;
}

// Some output rows of one column tile of a convolution.
inline int run_conv(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  if (is_dense_int8(*s.indirection->conv)) return run_dense_conv(t, s, part);
  const rarefy_indirection& in = *s.indirection;
  const rarefy_conv& w = *in.conv;
  const ConvGeometry geometry(w, in.height, in.width);
  const int64_t tiles = ceil_div(s.columns, TILE_COLS), size = conv_rows_per_part(s, tiles);
  const int64_t chunks = ceil_div(s.features, size), tile = part / chunks, row = part % chunks * size;
  const int64_t rows = std::min(size, s.features - row), columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS);
  const int64_t lanes = w.weight.lanes, block = w.weight.block, image_floats = w.inputs * geometry.channel_floats;
  const ScratchBuffer<1> scratch(size_t(block + 1) * TILE_COLS * 4);  // gather_lanes writes into one more row
  uint32_t* gathered = static_cast<uint32_t*>(scratch.data);
  if (!gathered) return RAREFY_NO_MEMORY;
  rarefy_segment segments[TILE_COLS];
  const int count = geometry.output_segments(tile * TILE_COLS, columns, image_floats, segments);
  float* out = tile_of(s.out, tile) + row * TILE_COLS;
  auto* acc = reinterpret_cast<uint32_t*>(out);
  const float* end = s.x.data + s.batch * image_floats + SEGMENT_FLOATS;
  const bool int8 = w.weight.dtype == RAREFY_I8;
  alignas(64) float col_scales[TILE_COLS];
  if (int8) output_scales(s, tile, col_scales);
  const rarefy_tile_epilogue epilogue =
      tile_epilogue({w.weight.scales, w.weight.row_sums, w.weight.bias, w.weight.act}, row, rows, col_scales,
                    optional_rows(s.residual, tile, row), s.in_zero, columns_of(s, tile));
  for (int64_t b = 0, l = 0; l < lanes; ++b, l += block) {
    const int64_t block_lanes = std::min(block, lanes - l);
    t.gather_lanes(s.x.data, end, in.offsets + l, block_lanes, segments, count, gathered);
    if (w.sell)
      t.sell_spmm_block[int8](*w.sell, b, row / SLAB_ROWS, ceil_div(row + rows, SLAB_ROWS), gathered, acc, columns,
                              l + block >= lanes ? &epilogue : nullptr);
    else
      t.tiles_spmm_block[int8](w.weight, b, row / TILE_ROWS, ceil_div(row + rows, TILE_ROWS), gathered, acc, columns);
  }
  if (!w.sell) apply_epilogue(t, epilogue, int8, out);
  write_absmax(t, s, tile, row, rows);
  return RAREFY_OK;
}

// Some channels of one column tile: max pooling, or depthwise convolution where the step has weights for it. The tiles
// of a channel follow each other, so that its planes stay in the cache.
inline void run_channelwise(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_indirection& in = *s.indirection;
  const ConvGeometry geometry(*in.conv, in.height, in.width);
  const int64_t tiles = ceil_div(s.columns, TILE_COLS), tile = part % tiles;
  const int64_t from = part / tiles * CHANNELWISE_PER_PART, to = std::min(from + CHANNELWISE_PER_PART, s.features);
  const int64_t lanes = in.conv->kernel[0] * in.conv->kernel[1];
  const int64_t columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS);
  rarefy_segment segments[TILE_COLS];
  const int count = geometry.output_segments(tile * TILE_COLS, columns, s.features * geometry.channel_floats, segments);
  alignas(64) float factors[TILE_COLS] = {};
  for (int64_t n = 0; s.gamma && n < columns; ++n) factors[n] = s.gamma[(tile * TILE_COLS + n) % s.tokens];
  for (int64_t f = from; f < to; ++f) {
    float* out = tile_of(s.out, tile) + f * TILE_COLS;
    t.channelwise(s.x.data + f * geometry.channel_floats, in.offsets, lanes,
                  s.depthwise_weights ? s.depthwise_weights + f * lanes : nullptr, s.bias ? s.bias[f] : 0.0f, s.act,
                  segments, count, out);
    if (s.gamma) t.add_or_mul(out, factors, true, RAREFY_NONE, out, TILE_COLS);
  }
}

// Call f(tile, column in the tile, count) for the columns of one image in each tile.
template <class F>
inline void for_each_run(const rarefy_step& s, int64_t image, F&& f) {
  for (int64_t at = image * s.tokens, end = at + s.tokens, n; at < end; at += n) {
    n = std::min(TILE_COLS - at % TILE_COLS, end - at);
    f(at / TILE_COLS, at % TILE_COLS, n);
  }
}

// Some features of one image.
inline void run_global_avg_pool(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), image = part / chunks;
  const int64_t from = part % chunks * FEATURES_PER_PART, rows = std::min(FEATURES_PER_PART, s.features - from);
  float* out = tile_of(s.out, image / TILE_COLS) + from * TILE_COLS + image % TILE_COLS;
  for (int64_t f = 0; f < rows; ++f) out[f * TILE_COLS] = 0.0f;
  for_each_run(s, image, [&](int64_t tile, int64_t column, int64_t n) {
    t.add_column_sums(tile_of(s.x, tile) + from * TILE_COLS + column, rows, n, out);
  });
  for (int64_t f = 0; f < rows; ++f) out[f * TILE_COLS] /= float(s.tokens);
}

// Some features of one column tile.
inline void run_channel_affine(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), tile = part / chunks;
  const int64_t from = part % chunks * FEATURES_PER_PART, rows = std::min(FEATURES_PER_PART, s.features - from);
  t.channel_affine(tile_of(s.x, tile) + from * TILE_COLS, rows, s.gamma + from, s.bias + from, s.act,
                   tile_of(s.out, tile) + from * TILE_COLS);
}

inline void run_channel_scale(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), tile = part / chunks;
  const int64_t from = part % chunks * FEATURES_PER_PART, rows = std::min(FEATURES_PER_PART, s.features - from);
  for_each_image(s, tile, [&](int64_t image, int64_t column, int64_t n) {
    const int64_t at = from * TILE_COLS + column % TILE_COLS;
    t.channel_scale(tile_of(s.x, tile) + at, rows, n,
                    tile_of(s.other, image / TILE_COLS) + from * TILE_COLS + image % TILE_COLS,
                    tile_of(s.out, tile) + at);
  });
}

}  // namespace
