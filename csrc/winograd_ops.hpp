// Steps of Winograd convolutions on fp32 images in NHWC order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernel_table.h"
#include "nhwc_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t MAX_SQUARES = 64;                   // of 2x2 outputs, of a part
constexpr int64_t MAX_TRANSFORMED_BYTES = 384 << 10;  // of the inputs of a part

// The squares of 2x2 outputs of a convolution, and how they are split into parts.
struct NhwcWinograd {
  NhwcWinograd(const rarefy_kernel_table& table, const rarefy_step& step) : conv(table, step), c(*step.nhwc) {
    rows = ceil_div(conv.out_height, 2);
    columns = ceil_div(conv.out_width, 2);
    squares = step.batch * rows * columns;
    padded_channels = ceil_div(c.in.channels, 16) * 16;
    const int64_t fit = std::clamp<int64_t>(MAX_TRANSFORMED_BYTES / (padded_channels * 64), 6, MAX_SQUARES);
    const int64_t step_pixels = table.nhwc_pixels[0];
    const int64_t even = ceil_div(squares, ceil_div(squares, fit));
    block_squares = std::min(ceil_div(even, step_pixels) * step_pixels, fit / step_pixels * step_pixels);
    blocks = ceil_div(squares, block_squares);
    const int64_t wanted = 2 * num_threads();
    const int64_t chunks = std::clamp<int64_t>(ceil_div(wanted, blocks), 1, ceil_div(conv.features, NHWC_OUTPUTS));
    outputs_per_part = ceil_div(ceil_div(conv.features, chunks), NHWC_OUTPUTS) * NHWC_OUTPUTS;
    parts = blocks * ceil_div(conv.features, outputs_per_part);
  }

  // Call f(image, row, column, count, squares before) for each run of squares within a row of them.
  template <class F>
  void for_each_run(int64_t first, int64_t count, F&& f) const {
    for (int64_t q = first, run; q < first + count; q += run) {
      const int64_t column = q % columns;
      run = std::min(columns - column, first + count - q);
      f(q / columns / rows, q / columns % rows, column, run, q - first);
    }
  }

  void transform_inputs(int64_t first, int64_t count, float* out) const {
    for_each_run(first, count, [&](int64_t image, int64_t row, int64_t column, int64_t run, int64_t before) {
      const uint8_t* lines[4];
      for (int64_t i = 0; i < 4; ++i) {  // a row below the image is for outputs that do not exist
        const int64_t y = std::min(2 * row - c.padding[0] + i, c.in.height + c.in.border - 1);
        lines[i] = nhwc_codes(conv.s.x) + nhwc_at(c.in, image, y, 2 * column - c.padding[1]);
      }
      for (int64_t k = 0; k < run; ++k) {
        conv.t.winograd_input(lines, c.in.pixel_bytes, c.in.channels, out + (before + k) * padded_channels,
                              block_squares * padded_channels);
        for (const uint8_t*& line : lines) line += 2 * c.in.pixel_bytes;
      }
    });
  }

  int run(int64_t part) const {
    const int64_t first = part % blocks * block_squares, count = std::min(block_squares, squares - first);
    const int64_t output = part / blocks * outputs_per_part;
    const int64_t end = std::min(output + outputs_per_part, conv.features);
    const int64_t in_stride = block_squares * padded_channels, out_stride = block_squares * NHWC_OUTPUTS;
    const ScratchBuffer<1> scratch(size_t(16 * (in_stride + out_stride) + 4 * out_stride) * 4 + 64);
    float* in = static_cast<float*>(scratch.data);
    if (!in) return RAREFY_NO_MEMORY;
    auto* products = reinterpret_cast<uint32_t*>(in + 16 * in_stride);
    uint32_t* pixels = products + 16 * out_stride;
    transform_inputs(first, count, in);
    const int64_t groups = ceil_div(conv.features, 16), group_floats = c.num_blocks * 256;
    for (int64_t o = output; o < end; o += NHWC_OUTPUTS) {
      const int64_t n = std::min(NHWC_OUTPUTS, end - o);
      for (int64_t k = 0; k < 16; ++k)
        conv.t.nhwc_products[0](c.blocks, c.num_blocks, reinterpret_cast<const uint8_t*>(in + k * in_stride),
                                padded_channels * 4, count, c.values + (k * groups + o / 16) * group_floats,
                                ceil_div(n, 16), products + k * out_stride);
      conv.t.winograd_output(products, out_stride, count, n, pixels, 2 * out_stride);
      for_each_run(first, count, [&](int64_t image, int64_t row, int64_t column, int64_t run, int64_t before) {
        for (int64_t y = 2 * row; y < std::min(2 * row + 2, conv.out_height); ++y)
          conv.store(image, y * conv.pitch + 2 * column, std::min(2 * run, conv.out_width - 2 * column), o, n,
                     pixels + (y - 2 * row) * 2 * out_stride + 2 * before * NHWC_OUTPUTS);
      });
    }
    if (conv.s.out_codes.data && !output && !c.first_channel)
      for (int64_t i = first / (rows * columns); i <= (first + count - 1) / (rows * columns); ++i)
        if (i * rows * columns >= first)  // by the part that has an image's first output
          fill_border(conv.t, c.out, nhwc_codes(conv.s.out_codes), i, 0, c.out.height);
    return RAREFY_OK;
  }

  const NhwcConv conv;
  const rarefy_nhwc& c;
  int64_t rows, columns;  // squares of an image
  int64_t squares;        // of all images
  int64_t padded_channels;
  int64_t block_squares, blocks, outputs_per_part, parts;
};

}  // namespace
