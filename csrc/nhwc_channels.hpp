// Steps on the channels of fp32 images in NHWC order: affine maps, gates, sums, means, concatenation, and conversion
// into column tiles.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "nhwc_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t MAP_PARTS_PER_THREAD = 4;
constexpr int64_t MEAN_CHANNELS_PER_PART = 64;

// Rows of an image that a part maps: few parts for each image, as each part gathers the image's gates.
inline int64_t nhwc_map_rows(const rarefy_step& s) {
  const int64_t parts = std::max<int64_t>(1, MAP_PARTS_PER_THREAD * num_threads() / s.batch);
  return ceil_div(s.nhwc->in.height, std::min(parts, s.nhwc->in.height));
}

inline int64_t nhwc_map_parts(const rarefy_step& s) { return s.batch * ceil_div(s.nhwc->in.height, nhwc_map_rows(s)); }

// Some rows of an image: act(x * scale + bias + residual), where the scale is `gamma` or the image's column of `other`.
inline int run_nhwc_map(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc& c = *s.nhwc;
  const int64_t rows = nhwc_map_rows(s), chunks = ceil_div(c.in.height, rows), image = part / chunks;
  const int64_t from = part % chunks * rows, to = std::min(from + rows, c.in.height);
  const ScratchBuffer<1> scratch(size_t(ceil_div(c.in.channels, 16) * 16) * 4);
  float* gates = static_cast<float*>(scratch.data);
  if (!gates) return RAREFY_NO_MEMORY;
  if (s.other.data) {
    const float* column = tile_of(s.other, image / TILE_COLS) + image % TILE_COLS;
    for (int64_t f = 0; f < c.in.channels; ++f) gates[f] = column[f * TILE_COLS];
  }
  for (int64_t y = from; y < to; ++y) {
    const uint8_t* residual = s.residual.data ? nhwc_codes(s.residual) + nhwc_at(c.residual, image, y, 0) : nullptr;
    t.nhwc_map(nhwc_codes(s.x) + nhwc_at(c.in, image, y, 0), c.in.pixel_bytes, c.in.width, c.in.channels,
               s.other.data ? gates : s.gamma, s.bias, residual, c.residual.pixel_bytes, s.act,
               nhwc_codes(s.out_codes) + nhwc_at(c.out, image, y, 0) + c.first_channel * 4, c.out.pixel_bytes);
  }
  if (!c.first_channel) fill_border(t, c.out, nhwc_codes(s.out_codes), image, from, to);
  return RAREFY_OK;
}

// Channels of each pixel of a row in another order. Where they follow each other, they are copied at once.
inline void select_channels(const uint8_t* x, const rarefy_nhwc& c, uint8_t* out) {
  int64_t run = 1;
  while (run < c.num_order && c.order[run] == c.order[0] + run) ++run;
  for (int64_t i = 0; i < c.in.width; ++i, x += c.in.pixel_bytes, out += c.out.pixel_bytes) {
    const float* from = reinterpret_cast<const float*>(x);
    float* to = reinterpret_cast<float*>(out);
    std::memcpy(to, from + c.order[0], size_t(run) * 4);
    for (int64_t j = run; j < c.num_order; ++j) to[j] = from[c.order[j]];
  }
}

// One row of an image: its channels go to those of a wider image from `first_channel` on.
inline void run_nhwc_copy(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc& c = *s.nhwc;
  const int64_t image = part / c.in.height, y = part % c.in.height;
  const uint8_t* x = nhwc_codes(s.x) + nhwc_at(c.in, image, y, 0);
  uint8_t* out = nhwc_codes(s.out_codes) + nhwc_at(c.out, image, y, 0) + c.first_channel * nhwc_bytes(c.out);
  if (c.order) {
    select_channels(x, c, out);
  } else {
    for (int64_t i = 0; i < c.in.width; ++i, x += c.in.pixel_bytes, out += c.out.pixel_bytes)
      std::memcpy(out, x, size_t(c.in.channels * nhwc_bytes(c.in)));
  }
  if (!c.first_channel) fill_border(t, c.out, nhwc_codes(s.out_codes), image, y, y + 1);
}

// One row of an image, whose pixels become stride[0] rows of stride[1] pixels each.
inline void run_nhwc_spread(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc& c = *s.nhwc;
  const int64_t image = part / c.in.height, y = part % c.in.height, rows = c.stride[0], columns = c.stride[1];
  const int64_t bytes = c.in.channels / (rows * columns) * nhwc_bytes(c.in);  // of a pixel
  const bool together = bytes == c.out.pixel_bytes;
  const int64_t copies = together ? 1 : columns, size = together ? bytes * columns : bytes;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* x = nhwc_codes(s.x) + nhwc_at(c.in, image, y, 0) + r * columns * bytes;
    uint8_t* out =
        nhwc_codes(s.out_codes) + nhwc_at(c.out, image, y * rows + r, 0) + c.first_channel * nhwc_bytes(c.out);
    for (int64_t i = 0; i < c.in.width; ++i, x += c.in.pixel_bytes)
      for (int64_t k = 0; k < copies; ++k, out += together ? size : c.out.pixel_bytes)
        std::memcpy(out, x + k * size, size_t(size));
  }
  if (!c.first_channel) fill_border(t, c.out, nhwc_codes(s.out_codes), image, y * rows, (y + 1) * rows);
}

// The means of some channels of one image.
inline void run_nhwc_mean(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc_image& in = s.nhwc->in;
  const int64_t chunks = ceil_div(in.channels, MEAN_CHANNELS_PER_PART), image = part / chunks;
  const int64_t from = part % chunks * MEAN_CHANNELS_PER_PART;
  const int64_t channels = std::min(MEAN_CHANNELS_PER_PART, in.channels - from);
  alignas(64) float sums[MEAN_CHANNELS_PER_PART] = {};
  for (int64_t y = 0; y < in.height; ++y)
    t.nhwc_sum(nhwc_codes(s.x) + nhwc_at(in, image, y, 0) + from * 4, in.pixel_bytes, in.width, channels, sums);
  float* out = tile_of(s.out, image / TILE_COLS) + from * TILE_COLS + image % TILE_COLS;
  for (int64_t f = 0; f < channels; ++f) out[f * TILE_COLS] = sums[f] / float(in.height * in.width);
}

// One column tile out of an image.
inline void run_nhwc_unpack(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  const rarefy_nhwc_image& in = s.nhwc->in;
  for (int64_t at = tile * TILE_COLS, end = std::min(at + TILE_COLS, s.columns), n; at < end; at += n) {
    const int64_t image = at / s.tokens, row = at % s.tokens / in.width, column = at % in.width;
    n = std::min(in.width - column, end - at);
    t.nhwc_unpack(nhwc_codes(s.x) + nhwc_at(in, image, row, column), in.pixel_bytes, n, in.channels,
                  tile_of(s.out, tile) + at % TILE_COLS);
  }
}

}  // namespace
