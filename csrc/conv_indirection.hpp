// How a convolution reads its inputs. A padded image is split into stride x stride planes, in which moving the kernel
// by one position is a constant offset: an output reads, for every lane, its own position plus the offset of that lane.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

struct ConvGeometry {
  const rarefy_conv& w;
  int64_t height, width, out_height, out_width;
  int64_t plane_height, plane_width;
  int64_t plane_floats, channel_floats;  // of one plane; of the planes of a channel that are read
  int64_t phases[64];                    // phase (its row times stride + its column) of each plane that is read
  int64_t num_planes = 0;                // of a channel
  bool direct;                           // the image itself is the only plane

  ConvGeometry(const rarefy_conv& c, int64_t h, int64_t wd) : w(c), height(h), width(wd) {
    out_height = (h + 2 * c.padding[0] - c.dilation[0] * (c.kernel[0] - 1) - 1) / c.stride[0] + 1;
    out_width = (wd + 2 * c.padding[1] - c.dilation[1] * (c.kernel[1] - 1) - 1) / c.stride[1] + 1;
    plane_height = (h + 2 * c.padding[0] + c.stride[0] - 1) / c.stride[0];
    plane_width = (wd + 2 * c.padding[1] + c.stride[1] - 1) / c.stride[1];
    plane_floats = plane_height * plane_width;
    for (int64_t i = 0; i < c.kernel[0]; ++i)
      for (int64_t j = 0; j < c.kernel[1]; ++j) {
        const int64_t phase = phase_of(i * c.dilation[0], j * c.dilation[1]);
        if (std::find(phases, phases + num_planes, phase) == phases + num_planes) phases[num_planes++] = phase;
      }
    channel_floats = num_planes * plane_floats;
    direct = c.stride[0] == 1 && c.stride[1] == 1 && !c.padding[0] && !c.padding[1];
  }

  int64_t phase_of(int64_t row, int64_t column) const { return row % w.stride[0] * w.stride[1] + column % w.stride[1]; }

  // Where `count` outputs from output `first` on, of consecutive images, are read: segments within a row, or within a
  // plane where rows are contiguous. Returns how many.
  int output_segments(int64_t first, int64_t count, int64_t image_floats, rarefy_segment* out) const {
    const int64_t outputs = out_height * out_width, run = plane_width == out_width ? outputs : out_width;
    int segments = 0;
    for (int64_t done = 0; done < count;) {
      const int64_t at = (first + done) % outputs;
      const int64_t size = std::min({count - done, run - at % run, SEGMENT_FLOATS});
      out[segments++] = {(first + done) / outputs * image_floats + at / run * plane_width + at % run, int32_t(done),
                         int32_t(size)};
      done += size;
    }
    return segments;
  }

  // The offsets of all lanes (input, kernel row, kernel column): the indirection buffer.
  void lane_offsets(int32_t* out) const {
    for (int64_t c = 0; c < w.inputs; ++c)
      for (int64_t i = 0; i < w.kernel[0]; ++i)
        for (int64_t j = 0; j < w.kernel[1]; ++j) {
          const int64_t row = i * w.dilation[0], column = j * w.dilation[1];
          const int64_t plane = std::find(phases, phases + num_planes, phase_of(row, column)) - phases;
          *out++ = int32_t(c * channel_floats + plane * plane_floats + row / w.stride[0] * plane_width +
                           column / w.stride[1]);
        }
  }

  // Copy one phase of one channel into a plane: x[i * stride + row - padding][j * stride + column - padding],
  // `pad_value` outside the image.
  void copy_phase(const rarefy_kernel_table& t, const float* x, int64_t phase, float* out,
                  float pad_value = 0.0f) const {
    const int64_t row = phase / w.stride[1] - w.padding[0], column = phase % w.stride[1] - w.padding[1];
    const int64_t s = w.stride[1];
    const int64_t first = column < 0 ? (-column + s - 1) / s : 0;  // columns of the plane inside the image
    const int64_t end = std::max(first, std::min(plane_width, (width - column + s - 1) / s));
    for (int64_t i = 0; i < plane_height; ++i, out += plane_width) {
      const int64_t source_row = i * w.stride[0] + row;
      if (source_row < 0 || source_row >= height) {
        std::fill(out, out + plane_width, pad_value);
        continue;
      }
      const float* source = x + source_row * width + column;
      std::fill(out, out + std::min(first, plane_width), pad_value);
      if (s == 1)
        std::memcpy(out + first, source + first, size_t(end - first) * 4);
      else if (s == 2)
        t.take_even(source + first * 2, end - first, out + first);
      else
        for (int64_t j = first; j < end; ++j) out[j] = source[j * s];
      std::fill(out + end, out + plane_width, pad_value);
    }
  }
};

}  // namespace
