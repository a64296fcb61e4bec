// A padded image, cut into stride x stride phases: planes in which a kernel position is a shift. An output reads its
// place in a plane plus places[lane], whatever the lane.
#pragma once
#include <algorithm>
#include <cstring>

#include "rarefy.h"
#include "kernel_table.h"

namespace {

struct Image {
  const rarefy_conv& w;
  int64_t height, width, oh, ow;
  int64_t rows, columns;      // of a phase
  int64_t plane, channel;     // floats of a phase, of all phases of a channel that are read
  int64_t phase[64];          // which phase (row of it times stride + column) lies where
  int64_t phases = 0;
  bool direct;                // x itself is its only phase

  Image(const rarefy_conv& c, int64_t h, int64_t wd) : w(c), height(h), width(wd) {
    oh = (h + 2 * c.padding[0] - c.dilation[0] * (c.kernel[0] - 1) - 1) / c.stride[0] + 1;
    ow = (wd + 2 * c.padding[1] - c.dilation[1] * (c.kernel[1] - 1) - 1) / c.stride[1] + 1;
    rows = (h + 2 * c.padding[0] + c.stride[0] - 1) / c.stride[0];
    columns = (wd + 2 * c.padding[1] + c.stride[1] - 1) / c.stride[1];
    plane = rows * columns;
    for (int64_t i = 0; i < c.kernel[0]; ++i)
      for (int64_t j = 0; j < c.kernel[1]; ++j) {
        const int64_t p = i * c.dilation[0] % c.stride[0] * c.stride[1] + j * c.dilation[1] % c.stride[1];
        if (std::find(phase, phase + phases, p) == phase + phases) phase[phases++] = p;
      }
    channel = phases * plane;
    direct = c.stride[0] == 1 && c.stride[1] == 1 && !c.padding[0] && !c.padding[1];
  }

  // Where outputs `q`.. of images that follow each other are read: pieces of a row, or of a plane where rows join.
  int pieces(int64_t q, int64_t here, int64_t image, rarefy_piece* out) const {
    const int64_t each = oh * ow, wide = columns == ow ? each : ow;
    int count = 0;
    for (int64_t done = 0; done < here;) {
      const int64_t at = (q + done) % each;
      const int64_t some = std::min({here - done, wide - at % wide, PIECE});
      out[count++] = {(q + done) / each * image + at / wide * columns + at % wide, int32_t(done), int32_t(some)};
      done += some;
    }
    return count;
  }

  void places(int32_t* out) const {
    for (int64_t c = 0; c < w.inputs; ++c)
      for (int64_t i = 0; i < w.kernel[0]; ++i)
        for (int64_t j = 0; j < w.kernel[1]; ++j) {
          const int64_t a = i * w.dilation[0], b = j * w.dilation[1];
          const int64_t p = a % w.stride[0] * w.stride[1] + b % w.stride[1];
          const int64_t at = std::find(phase, phase + phases, p) - phase;
          *out++ = int32_t(c * channel + at * plane + a / w.stride[0] * columns + b / w.stride[1]);
        }
  }

  // One phase of one channel: x[i * stride + a - padding][j * stride + b - padding], `rest` outside.
  void cut(const rarefy_table& t, const float* x, int64_t p, float* out, float rest = 0.0f) const {
    const int64_t a = p / w.stride[1] - w.padding[0], b = p % w.stride[1] - w.padding[1], s = w.stride[1];
    const int64_t first = b < 0 ? (-b + s - 1) / s : 0;                              // column that lies inside
    const int64_t end = std::max(first, std::min(columns, (width - b + s - 1) / s));  // and past the last
    for (int64_t i = 0; i < rows; ++i, out += columns) {
      const int64_t r = i * w.stride[0] + a;
      if (r < 0 || r >= height) {
        std::fill(out, out + columns, rest);
        continue;
      }
      const float* row = x + r * width + b;
      std::fill(out, out + std::min(first, columns), rest);
      if (s == 1)
        std::memcpy(out + first, row + first, size_t(end - first) * 4);
      else if (s == 2)
        t.halve(row + first * 2, end - first, out + first);
      else
        for (int64_t j = first; j < end; ++j) out[j] = row[j * s];
      std::fill(out + end, out + columns, rest);
    }
  }
};

}  // namespace
