// Steps on images in NHWC order, of int8 codes or fp32 numbers: conversion, convolution, pooling.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "linear_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t MAX_COPY_BYTES = 512 << 10;  // of the inputs of a part that are copied together
constexpr int64_t MAX_PIXEL_BLOCKS = 4;        // of a part: weights are read once for all of them
constexpr int64_t PARTS_PER_THREAD = 6;
constexpr int64_t MAX_PREFETCH_BLOCKS = 8;  // of inputs: with more of them outputs cost little
constexpr int64_t MAX_PREFETCH_LANES = 16 * MAX_PREFETCH_BLOCKS;

inline int64_t nhwc_row_bytes(const rarefy_nhwc_image& i) { return (i.width + 2 * i.border) * i.pixel_bytes; }
inline int64_t nhwc_image_bytes(const rarefy_nhwc_image& i) { return (i.height + 2 * i.border) * nhwc_row_bytes(i); }

// Where a pixel is, from the first byte of all images on.
inline int64_t nhwc_at(const rarefy_nhwc_image& i, int64_t image, int64_t row, int64_t column) {
  return image * nhwc_image_bytes(i) + (row + i.border) * nhwc_row_bytes(i) + (column + i.border) * i.pixel_bytes;
}

// Bytes of a channel, and the place of the dtype in the kernel table.
inline int64_t nhwc_bytes(const rarefy_nhwc_image& i) { return i.dtype == RAREFY_I8 ? 1 : 4; }
inline int64_t nhwc_kind(const rarefy_nhwc_image& i) { return i.dtype == RAREFY_I8; }

inline uint8_t* nhwc_codes(const rarefy_view& v) { return reinterpret_cast<uint8_t*>(v.data); }

// A code as it lies in memory.
inline uint8_t stored_code_of(const rarefy_kernel_table& t, int32_t code) {
  return uint8_t((__builtin_bit_cast(uint32_t, t.packed_zeros) & 255u) + uint32_t(code));
}

// Fill the border of an image beside some of its rows, and above the first and below the last row.
inline void fill_border(const rarefy_kernel_table& t, const rarefy_nhwc_image& i, uint8_t* codes, int64_t image,
                        int64_t from, int64_t to) {
  const int64_t side = i.border * i.pixel_bytes, row = nhwc_row_bytes(i);
  if (!side) return;
  uint8_t* first = codes + nhwc_at(i, image, 0, -i.border);
  const int zero = i.dtype == RAREFY_I8 ? stored_code_of(t, i.zero) : 0;
  if (from == 0) std::memset(first - i.border * row, zero, size_t(i.border * row));
  if (to == i.height) std::memset(first + to * row, zero, size_t(i.border * row));
  for (int64_t y = from; y < to; ++y) {
    std::memset(first + y * row, zero, size_t(side));
    std::memset(first + (y + 1) * row - side, zero, size_t(side));
  }
}

// One row of an image out of column tiles, out of an external image, or codes out of an image of numbers.
inline int run_nhwc_quantize(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc_image &in = s.nhwc->in, &out = s.nhwc->out;
  const int64_t image = part / out.height, row = part % out.height, first = row * out.width;
  uint8_t* codes = nhwc_codes(s.out_codes) + nhwc_at(out, image, row, 0);
  const auto write = [&](const float* x, int64_t stride, int64_t pixels) {
    if (out.dtype == RAREFY_I8)
      t.nhwc_quantize(x, stride, out.channels, pixels, 1.0f / out.scale, out.zero, codes, out.pixel_bytes);
    else
      t.nhwc_pack_f32(x, stride, out.channels, pixels, codes, out.pixel_bytes);
    codes += pixels * out.pixel_bytes;
  };
  if (in.channels) {
    t.nhwc_to_codes(nhwc_codes(s.x) + nhwc_at(in, image, row, 0), in.pixel_bytes, out.channels, out.width,
                    1.0f / out.scale, out.zero, codes, out.pixel_bytes);
  } else if (s.channels_first) {
    write(s.x.data + image * out.channels * s.tokens + first, s.tokens, out.width);
  } else {
    for (int64_t at = image * s.tokens + first, end = at + out.width, n; at < end; at += n) {
      n = std::min(TILE_COLS - at % TILE_COLS, end - at);
      write(tile_of(s.x, at / TILE_COLS) + at % TILE_COLS, TILE_COLS, n);
    }
  }
  fill_border(t, out, nhwc_codes(s.out_codes), image, row, row + 1);
  return RAREFY_OK;
}

// The pixels of a convolution's outputs, in blocks, and how they are split into parts. Without segments, and not by
// rows, a block also computes sums between the rows of outputs, which are dropped, so that its inputs are evenly
// spaced. Images without a border count as one where a kernel reads single pixels. Sparse weights read column tiles,
// into which the inputs of a block are transposed; all images count as one. Convolutions of few inputs, and depthwise
// ones, whose numbers an image takes, run by rows and keep no sums ("direct").
struct NhwcConv {
  NhwcConv(const rarefy_kernel_table& table, const rarefy_step& step)
      : t(table),
        s(step),
        c(*s.nhwc),
        features(s.features),
        kind(nhwc_kind(c.in)),
        bytes(nhwc_bytes(c.in)),
        rounds(!kind && c.factors) {
    const int64_t width = c.in.width + 2 * c.padding[1] - c.dilation[1] * (c.kernel[1] - 1) - 1;
    out_width = width / c.stride[1] + 1;
    out_height = s.tokens / out_width;
    const bool sparse = s.weight;
    numbers = stores_numbers();
    direct = numbers && !rounds && (c.taps || (!sparse && !c.segments && c.num_blocks <= NHWC_BLOCKS_IN_L1));
    by_rows = c.group_outputs || (!c.segments && (direct || c.stride[0] > 1 || c.stride[1] > 1));
    pitch = c.segments || by_rows ? out_width : c.in.width + 2 * c.in.border;
    const bool one = sparse || ((!c.segments || rounds) && !c.group_outputs && is_pointwise() && !c.padding[0]);
    const int64_t images = one ? 1 : s.batch, rows = one ? s.batch * out_height : out_height;
    positions = (rows - 1) * pitch + out_width;
    const int64_t most = sparse ? TILE_COLS : NHWC_PIXELS, step_pixels = sparse ? 16 : t.nhwc_pixels[product_kind()];
    const int64_t even = ceil_div(positions, ceil_div(positions, most));
    block_pixels = std::min(ceil_div(even, step_pixels), most / step_pixels) * step_pixels;
    if (direct && !is_even() && out_width <= NHWC_PIXELS) block_pixels = NHWC_PIXELS / out_width * out_width;  // rows
    blocks_per_image = ceil_div(positions, block_pixels);
    blocks = images * blocks_per_image;
    const int64_t copy = copy_bytes(), wanted = PARTS_PER_THREAD * num_threads();
    blocks_per_part = std::clamp<int64_t>(blocks / wanted, 1, MAX_PIXEL_BLOCKS);
    if (copy) blocks_per_part = std::clamp<int64_t>(MAX_COPY_BYTES / copy, 1, blocks_per_part);
    block_parts = ceil_div(blocks, blocks_per_part);
    const int64_t together = sparse ? SLAB_ROWS : NHWC_OUTPUTS;
    const int64_t chunks = std::clamp<int64_t>(ceil_div(wanted, block_parts), 1, ceil_div(features, together));
    outputs_per_part = ceil_div(ceil_div(features, chunks), together) * together;
    parts = block_parts * ceil_div(features, outputs_per_part);
  }

  // Whether all outputs are numbers in an image, of groups that are computed together, with an activation that limits
  // them.
  bool stores_numbers() const {
    return !kind && s.out_codes.data && !nhwc_kind(c.out) && !s.out.data && !s.winograd && !c.group_outputs &&
           is_clamp(s.act);
  }

  int64_t product_kind() const { return rounds ? 2 : kind; }

  int64_t copy_bytes() const { return c.segments && !s.weight ? block_pixels * c.num_blocks * 64 : 0; }  // of a block

  // Where an output is in a value: its row counts from the first row of image `image` on.
  int64_t at(const rarefy_nhwc_image& i, int64_t image, int64_t row, int64_t column) const {
    return nhwc_at(i, image + row / out_height, row % out_height, column);
  }

  // Where the first input of an output is.
  int64_t input_at(int64_t image, int64_t row, int64_t column) const {
    return nhwc_at(c.in, image, row * c.stride[0] - c.padding[0], column * c.stride[1] - c.padding[1]);
  }

  // Call f(row, column, pixels) for each run of outputs within a row.
  template <class F>
  void for_each_run(int64_t first, int64_t pixels, F&& f) const {
    for (int64_t q = first, end = first + pixels, run; q < end; q += run) {
      const int64_t column = q % pitch;
      run = std::min(pitch - column, end - q);
      if (const int64_t used = std::min(run, out_width - column); used > 0) f(q / pitch, column, used);
    }
  }

  // Whether an output reads the pixel at its own place, and no border is between them.
  bool is_pointwise() const {
    return c.kernel[0] == 1 && c.kernel[1] == 1 && c.stride[0] == 1 && c.stride[1] == 1 && !c.in.border;
  }

  // Whether inputs and outputs of all pixels are evenly spaced, beyond the ends of rows.
  bool is_even() const { return !c.taps && is_pointwise() && is_flat(); }

  // Whether consecutive outputs are neighbours in the codes and the residual, beyond the ends of rows.
  bool is_flat() const {
    return pitch == out_width && !(s.out_codes.data && c.out.border) && !(s.residual.data && c.residual.border);
  }

  // Copy the inputs of each pixel of a block together. Copies run over their ends, which the next ones overwrite.
  void copy_inputs(int64_t image, int64_t first, int64_t pixels, uint8_t* out) const {
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t n) {
      const uint8_t* source = nhwc_codes(s.x) + input_at(image, row, column);
      for (int64_t i = 0; i < n; ++i, out += c.num_blocks * 64, source += c.stride[1] * c.in.pixel_bytes)
        for (int64_t k = 0; k < c.num_segments; ++k)
          for (int64_t b = 0; b < c.segment_bytes; b += 32)
            std::memcpy(out + k * c.segment_stride + b, source + c.segments[k] + b, 32);
    });
  }

  // As copy_inputs, rounded to int16; a scale for each pixel.
  void round_inputs(int64_t image, int64_t first, int64_t pixels, uint8_t* out, float* scales) const {
    const int64_t row_numbers = c.num_blocks * 32;
    auto* numbers = reinterpret_cast<int16_t*>(out);
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t n) {
      t.nhwc_round_int16(nhwc_codes(s.x) + input_at(image, row, column), c.stride[1] * c.in.pixel_bytes, c.segments,
                         c.num_segments, c.segment_bytes / 4, n, row_numbers, numbers, scales);
      numbers += n * row_numbers;
      scales += n;
    });
  }

  // Fetch the residual and the place of a block's codes into the cache, while their sums are computed.
  void prefetch(int64_t image, int64_t first, int64_t pixels, int64_t output) const {
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t n) {
      if (s.residual.data) {
        const uint8_t* p = residual_at(image, row, column, output);
        for (int64_t i = 0; i < n; ++i) __builtin_prefetch(p + i * c.residual.pixel_bytes, 0, 2);
      }
      if (s.out_codes.data) {
        const uint8_t* p = codes_at(image, row, column, output);
        for (int64_t i = 0; i < n; ++i) __builtin_prefetch(p + i * c.out.pixel_bytes, 1, 2);
      }
    });
  }

  // How outputs `output`..`output + n` are stored, without where.
  rarefy_nhwc_outputs outputs_of(int64_t output, int64_t n) const {
    return {.factors = kind ? c.factors + output : nullptr,
            .bias = c.bias + output,
            .row_sums = kind ? c.row_sums + output : nullptr,
            .in_zero = c.in.zero,
            .outputs = n,
            .act = s.act,
            .codes = nullptr,
            .numbers = !nhwc_kind(c.out),
            .codes_stride = c.out.pixel_bytes,
            .inverse_scale = s.out_codes.data && nhwc_kind(c.out) ? 1.0f / c.out.scale : 0.0f,
            .zero = c.out.zero,
            .residual = nullptr,
            .residual_stride = c.residual.pixel_bytes,
            .residual_scale = c.residual.scale,
            .residual_zero = c.residual.zero,
            .out = nullptr};
  }

  // Where outputs of a pixel are in the codes and the residual.
  uint8_t* codes_at(int64_t image, int64_t row, int64_t column, int64_t output) const {
    return nhwc_codes(s.out_codes) + at(c.out, image, row, column) + (output + c.first_channel) * nhwc_bytes(c.out);
  }
  const uint8_t* residual_at(int64_t image, int64_t row, int64_t column, int64_t output) const {
    return nhwc_codes(s.residual) + at(c.residual, image, row, column) + output * nhwc_bytes(c.residual);
  }

  // Outputs `output`..`output + n` of a block from their sums.
  void store(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n, const uint32_t* acc) const {
    rarefy_nhwc_outputs o = outputs_of(output, n);
    const auto store_run = [&](int64_t row, int64_t column, int64_t left) {
      for (int64_t x = column, count; left > 0; left -= count, x += count) {
        const int64_t token = image * s.tokens + row * out_width + x;  // fp32 is stored within a column tile
        count = s.out.data ? std::min(left, TILE_COLS - token % TILE_COLS) : left;
        if (s.out_codes.data) o.codes = codes_at(image, row, x, output);
        if (s.residual.data) o.residual = residual_at(image, row, x, output);
        if (s.out.data) o.out = tile_of(s.out, token / TILE_COLS) + output * TILE_COLS + token % TILE_COLS;
        t.nhwc_store[kind](o, acc + (row * pitch + x - first) * NHWC_OUTPUTS, count);
      }
    };
    if (is_flat())
      store_run(0, first, pixels);
    else
      for_each_run(first, pixels, store_run);
  }

  void multiply(const rarefy_nhwc_block* blocks_of, const uint8_t* in, int64_t stride, int64_t pixels, int64_t output,
                int64_t n, uint32_t* acc) const {
    t.nhwc_products[product_kind()](blocks_of, c.num_blocks, in, stride, pixels, c.values + output * c.num_blocks * 16,
                                    ceil_div(n, 16), acc);
  }

  // Each group multiplies its own channels, row by row.
  void multiply_groups(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n, uint32_t* acc) const {
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t count) {
      const uint8_t* x = nhwc_codes(s.x) + input_at(image, row, column);
      for (int64_t o = output, left; o < output + n; o += left) {
        const int64_t group = o / c.group_outputs;
        left = std::min((group + 1) * c.group_outputs, output + n) - o;
        const bool last = (group + 1) * c.group_outputs >= features;
        multiply(last ? c.last_blocks : c.blocks, x + group * c.group_channels * 4, c.stride[1] * c.in.pixel_bytes,
                 count, o, left, acc + (row * pitch + column - first) * NHWC_OUTPUTS + o - output);
      }
    });
  }

  void multiply_rows(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n, uint32_t* acc) const {
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t count) {
      multiply(c.blocks, nhwc_codes(s.x) + input_at(image, row, column), c.stride[1] * c.in.pixel_bytes, count, output,
               n, acc + (row * pitch + column - first) * NHWC_OUTPUTS);
    });
  }

  // Outputs `output`..`output + n` of a block, straight into the image.
  void store_directly(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n) const {
    rarefy_nhwc_outputs o = outputs_of(output, n);
    const int64_t stride = c.stride[1] * c.in.pixel_bytes;
    const auto run = [&](int64_t row, int64_t column, int64_t count) {
      const uint8_t* x = nhwc_codes(s.x) + input_at(image, row, column);
      o.codes = codes_at(image, row, column, output);
      if (s.residual.data) o.residual = residual_at(image, row, column, output);
      if (c.taps)
        t.nhwc_depthwise_numbers(taps_of(output), x + output * bytes, count, o);
      else
        t.nhwc_numbers(c.blocks, c.num_blocks, x, stride, count, c.values + output * c.num_blocks * 16, o);
    };
    if (is_even())
      run(0, first, pixels);
    else
      for_each_run(first, pixels, run);
  }

  // As store_directly, from rounded inputs.
  void store_int16(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n, const uint8_t* in,
                   const float* scales, uint32_t* acc) const {
    rarefy_nhwc_outputs o = outputs_of(output, n);
    o.factors = c.factors + output;
    const auto run = [&](int64_t row, int64_t column, int64_t count) {
      o.codes = codes_at(image, row, column, output);
      if (s.residual.data) o.residual = residual_at(image, row, column, output);
      t.nhwc_int16_numbers(c.blocks, c.num_blocks, in, c.num_blocks * 64, count, c.values + output * c.num_blocks * 16,
                           scales, acc, o);
      in += count * c.num_blocks * 64;
      scales += count;
    };
    if (is_flat())
      run(0, first, pixels);
    else
      for_each_run(first, pixels, run);
  }

  rarefy_nhwc_taps taps_of(int64_t output) const {
    return {.offsets = c.segments,
            .rows = c.num_segments,
            .columns = c.tap_columns,
            .column_bytes = c.dilation[1] * c.in.pixel_bytes,
            .pixel_bytes = c.stride[1] * c.in.pixel_bytes,
            .taps = c.taps + output,
            .stride = ceil_div(features, NHWC_OUTPUTS) * NHWC_OUTPUTS};
  }

  void sum_depthwise(int64_t image, int64_t first, int64_t pixels, int64_t output, int64_t n, uint32_t* acc) const {
    const rarefy_nhwc_taps taps = taps_of(output);
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t count) {
      const uint8_t* x = nhwc_codes(s.x) + input_at(image, row, column);
      t.nhwc_depthwise[kind](taps, x + output * bytes, n, count, acc + (row * pitch + column - first) * NHWC_OUTPUTS);
    });
  }

  // Transpose the inputs of a block into lanes of a column tile.
  void transpose_inputs(int64_t first, int64_t pixels, uint32_t* lanes) const {
    int64_t offsets[TILE_COLS], i = 0;
    for_each_run(first, pixels, [&](int64_t row, int64_t column, int64_t n) {
      const int64_t at = input_at(row / out_height, row % out_height, column);
      for (int64_t k = 0; k < n; ++k) offsets[i++] = at + k * c.stride[1] * c.in.pixel_bytes;
    });
    std::fill(offsets + i, offsets + TILE_COLS, offsets[i - 1]);
    t.nhwc_lanes(nhwc_codes(s.x), offsets, pixels, c.segments, c.num_segments, c.in.channels, lanes);
  }

  // Blocks `from`..`to`, outputs `output`..`end` of a sparse weight, a slab of rows at a time.
  int run_sparse(int64_t from, int64_t to, int64_t output, int64_t end) const {
    const LinearWeight w(s);
    const ScratchBuffer<1> scratch(size_t(w.lanes + SLAB_ROWS) * TILE_COLS * 4);
    uint32_t *sums = static_cast<uint32_t*>(scratch.data), *lanes = sums + SLAB_ROWS * TILE_COLS;
    if (!sums) return RAREFY_NO_MEMORY;
    alignas(64) uint32_t acc[TILE_COLS * NHWC_OUTPUTS];
    for (int64_t b = from; b < to; ++b) {
      const int64_t first = b * block_pixels, pixels = std::min(block_pixels, positions - first);
      transpose_inputs(first, pixels, lanes);
      for (int64_t row = output; row < end; row += SLAB_ROWS) {
        const int64_t rows = std::min(SLAB_ROWS, end - row);
        for (int64_t o = row; w.lanes <= MAX_PREFETCH_LANES && o < row + rows; o += NHWC_OUTPUTS)
          prefetch(0, first, pixels, o);
        multiply_sparse(t, s, row, rows, lanes, sums, pixels);
        for (int64_t o = 0; o < rows; o += NHWC_OUTPUTS) {
          const int64_t n = std::min(NHWC_OUTPUTS, rows - o);
          t.transpose_sums(sums + o * TILE_COLS, n, pixels, acc);
          store(0, first, pixels, row + o, n, acc);
        }
      }
    }
    return RAREFY_OK;
  }

  int run(int64_t part) const {
    const int64_t from = part % block_parts * blocks_per_part, to = std::min(from + blocks_per_part, blocks);
    const int64_t output = part / block_parts * outputs_per_part, end = std::min(output + outputs_per_part, features);
    if (const int code = s.weight ? run_sparse(from, to, output, end) : run_dense(from, to, output, end)) return code;
    if (s.out_codes.data && !output && !c.first_channel)
      for (int64_t i = 0; i < s.batch; ++i)  // by the part that has an image's first output
        if (const int64_t b = block_of(i); b >= from && b < to)
          fill_border(t, c.out, nhwc_codes(s.out_codes), i, 0, c.out.height);
    return RAREFY_OK;
  }

  int run_dense(int64_t from, int64_t to, int64_t output, int64_t end) const {
    const int64_t copy = copy_bytes();
    const int64_t scale_bytes = rounds ? block_pixels * 4 : 0;
    const ScratchBuffer<1> scratch(size_t((to - from) * (copy + scale_bytes) + 64));
    uint8_t* copies = static_cast<uint8_t*>(scratch.data);
    if (!copies) return RAREFY_NO_MEMORY;
    auto* all_scales = reinterpret_cast<float*>(copies + (to - from) * copy + 64);
    const uint8_t* x = nhwc_codes(s.x) + nhwc_at(c.in, 0, -c.padding[0], -c.padding[1]);
    alignas(64) uint32_t acc[NHWC_PIXELS * NHWC_OUTPUTS];
    const DenseSection section(t);
    for (int64_t o = output; o < end; o += NHWC_OUTPUTS)
      for (int64_t b = from; b < to; ++b) {
        const int64_t image = b / blocks_per_image, first = b % blocks_per_image * block_pixels;
        const int64_t pixels = std::min(block_pixels, positions - first), n = std::min(NHWC_OUTPUTS, end - o);
        if (direct) {
          store_directly(image, first, pixels, o, n);
          continue;
        }
        if (c.num_blocks <= MAX_PREFETCH_BLOCKS) prefetch(image, first, pixels, o);
        if (c.taps) {
          sum_depthwise(image, first, pixels, o, n, acc);
        } else if (c.group_outputs) {
          multiply_groups(image, first, pixels, o, n, acc);
        } else if (by_rows) {
          multiply_rows(image, first, pixels, o, n, acc);
        } else if (c.segments) {
          uint8_t* in = copies + (b - from) * copy;
          float* scales = all_scales + (b - from) * block_pixels;
          if (o == output && rounds)
            round_inputs(image, first, pixels, in, scales);
          else if (o == output)
            copy_inputs(image, first, pixels, in);
          if (rounds && numbers) {
            store_int16(image, first, pixels, o, n, in, scales, acc);
            continue;
          }
          multiply(c.blocks, in, c.num_blocks * 64, pixels, o, n, acc);
          if (rounds) t.nhwc_scale_sums(acc, pixels, n, scales, c.factors + o);
        } else {
          multiply(c.blocks, x + image * nhwc_image_bytes(c.in) + first * c.in.pixel_bytes, c.in.pixel_bytes, pixels, o,
                   n, acc);
        }
        store(image, first, pixels, o, n, acc);
      }
    return RAREFY_OK;
  }

  int64_t block_of(int64_t image) const {
    return blocks == blocks_per_image && s.batch > 1 ? image * s.tokens / block_pixels : image * blocks_per_image;
  }

  const rarefy_kernel_table& t;
  const rarefy_step& s;
  const rarefy_nhwc& c;
  int64_t features;
  int64_t kind, bytes;  // of the inputs: nhwc_kind, nhwc_bytes
  bool rounds;          // inputs are numbers that are rounded to int16 for the products
  bool numbers;         // see stores_numbers
  bool direct;          // no sums are kept
  bool by_rows;         // each row of outputs is computed by itself
  int64_t out_width, out_height;
  int64_t pitch;             // pixels from one row of outputs to the next
  int64_t positions;         // pixels of an image, with those between rows
  int64_t block_pixels;      // of a block
  int64_t blocks_per_image;  // of it
  int64_t blocks;            // of all images
  int64_t blocks_per_part;   // consecutive ones
  int64_t block_parts, outputs_per_part, parts;
};

// The positions of a window along one axis, for output `at`, that lie in the image.
struct WindowRange {
  WindowRange(const rarefy_nhwc& c, int axis, int64_t at, int64_t size) : start(at * c.stride[axis] - c.padding[axis]) {
    const int64_t step = c.dilation[axis];
    from = start < 0 ? ceil_div(-start, step) : 0;
    to = start < size ? std::min(c.kernel[axis], ceil_div(size - start, step)) : 0;
  }
  int64_t start;     // of the window
  int64_t from, to;  // positions
};

// One row of an image of a max pool.
inline int run_nhwc_max_pool(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const rarefy_nhwc& c = *s.nhwc;
  const int64_t image = part / c.out.height, row = part % c.out.height;
  const uint8_t* x = nhwc_codes(s.x);
  uint8_t* out = nhwc_codes(s.out_codes) + nhwc_at(c.out, image, row, 0) + c.first_channel * nhwc_bytes(c.out);
  const int64_t channels = c.in.channels;
  const WindowRange down(c, 0, row, c.in.height);
  for (int64_t column = 0; column < c.out.width; ++column, out += c.out.pixel_bytes) {
    bool first = true;
    const WindowRange across(c, 1, column, c.in.width);
    for (int64_t i = down.from; i < down.to; ++i)
      for (int64_t j = across.from; j < across.to; ++j) {
        const uint8_t* source =
            x + nhwc_at(c.in, image, down.start + i * c.dilation[0], across.start + j * c.dilation[1]);
        if (first)
          std::memcpy(out, source, size_t(channels * nhwc_bytes(c.out)));
        else
          t.nhwc_max[nhwc_kind(c.out)](source, channels, out);
        first = false;
      }
    if (first && c.out.dtype == RAREFY_I8)
      std::memset(out, stored_code_of(t, -128), size_t(channels));  // minus infinity, which saturates
    else if (first)
      std::fill_n(reinterpret_cast<float*>(out), channels, -INFINITY);
  }
  if (!c.first_channel) fill_border(t, c.out, nhwc_codes(s.out_codes), image, row, row + 1);
  return RAREFY_OK;
}

}  // namespace
