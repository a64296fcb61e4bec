// Convolution by zero-skipping tiles, without im2col. The padded image is cut into stride x stride phases, planes in
// which a kernel position is a shift: output q of an image (counted along the rows of a plane) reads place[lane] + q,
// whatever the lane. For each square of NT outputs a block of lanes is brought together, and the tiles run on it as on a
// packed batch: in the first cache, on aligned loads. What is counted between the end of an output's row and the
// beginning of the next is computed and dropped.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "rarefy.h"
#include "table.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 64, FEW = 4;    // tiles of weights that a thread takes at once; parts that are too few
constexpr int64_t WORTH = 200;            // outputs, were all of a square empty, that a copy of the images costs
constexpr int64_t ROUND = 1 << 20;        // floats of padded images that are made at once: they stay in the caches
constexpr int64_t LEAST = 20000;          // products worth a second thread

struct Plan {
  const rarefy_conv& w;
  int64_t height, width, oh, ow;
  int64_t rows, columns;      // of a phase
  int64_t plane, channel;     // floats of a phase, of all phases of a channel that are read
  int64_t phase[64];          // which phase (row of it times stride + column) lies where
  int64_t phases = 0;
  bool direct;                // x itself is its only phase

  Plan(const rarefy_conv& c, int64_t h, int64_t wd) : w(c), height(h), width(wd) {
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
  int64_t outputs() const { return (oh - 1) * columns + ow; }  // that are counted, dropped ones included

  // Of `side` images that lie side by side in each channel.
  void places(int64_t side, int32_t* out) const {
    for (int64_t c = 0; c < w.inputs; ++c)
      for (int64_t i = 0; i < w.kernel[0]; ++i)
        for (int64_t j = 0; j < w.kernel[1]; ++j) {
          const int64_t a = i * w.dilation[0], b = j * w.dilation[1];
          const int64_t p = a % w.stride[0] * w.stride[1] + b % w.stride[1];
          const int64_t at = std::find(phase, phase + phases, p) - phase;
          *out++ = int32_t(c * channel * side + at * plane + a / w.stride[0] * columns + b / w.stride[1]);
        }
  }

  // One phase of one channel: x[i * stride + a - padding][j * stride + b - padding], zeros outside.
  void cut(const rarefy_table& t, const float* x, int64_t p, float* out) const {
    const int64_t a = p / w.stride[1] - w.padding[0], b = p % w.stride[1] - w.padding[1], s = w.stride[1];
    const int64_t first = b < 0 ? (-b + s - 1) / s : 0;                              // column that lies inside
    const int64_t end = std::max(first, std::min(columns, (width - b + s - 1) / s));  // and past the last
    for (int64_t i = 0; i < rows; ++i, out += columns) {
      const int64_t r = i * w.stride[0] + a;
      if (r < 0 || r >= height) {
        std::memset(out, 0, size_t(columns) * 4);
        continue;
      }
      const float* row = x + r * width + b;
      std::fill(out, out + std::min(first, columns), 0.0f);
      if (s == 1)
        std::memcpy(out + first, row + first, size_t(end - first) * 4);
      else if (s == 2)
        t.halve(row + first * 2, end - first, out + first);
      else
        for (int64_t j = first; j < end; ++j) out[j] = row[j * s];
      std::fill(out + end, out + columns, 0.0f);
    }
  }
};

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int rarefy_run_conv(const rarefy_conv* w, const float* x, int64_t height, int64_t width, float* y, int64_t n) {
  const rarefy_table& t = rarefy_chosen();
  const Plan plan(*w, height, width);
  const int64_t lanes = w->weight.cols, inputs = w->inputs * w->groups, outputs = w->outputs * w->groups;
  const int64_t image = inputs * plan.channel, each = plan.outputs();
  // Small images whose outputs do not fill squares, and of whose planes none is dropped, go on into each other. Where x
  // would serve as it is, the copy must be worth the products that are saved.
  const int64_t empty = (each + 15) / 16 * 16 - each;
  const bool joined = n > 1 && each == plan.plane && each % NT && each < 4 * NT &&
                      (!plan.direct || empty * w->outputs > WORTH * each);
  const bool direct = plan.direct && !joined;
  const int64_t tiles = (w->outputs + R4 - 1) / R4, block = w->weight.block;
  int64_t chunk = std::min(CHUNK, tiles);
  while (chunk > 8 && n * each / NT * w->groups * ((tiles + chunk - 1) / chunk) < FEW) chunk /= 2;
  const int64_t chunks = (tiles + chunk - 1) / chunk;
  std::atomic<bool> failed{false};
  const int64_t most = std::max<int64_t>(1, std::min(n, ROUND / std::max<int64_t>(1, image)));  // images of a round
  const Scratch<0> scratch(size_t((lanes + 63) / 64 * 64 + (direct ? 0 : most * image)) * 4);
  int32_t* places = static_cast<int32_t*>(scratch.from);
  if (!places) return RAREFY_MEMORY;
  float* made = reinterpret_cast<float*>(places + (lanes + 63) / 64 * 64);
  const bool worth = w->weight.rows * lanes / 8 * each * n > LEAST;
  for (int64_t from = 0; from < n; from += direct ? n : most) {
    const int64_t some = direct ? n : std::min(most, n - from), side = joined ? some : 1, span = side * each;
    const int64_t squares = (span + NT - 1) / NT;
    plan.places(side, places);
    on_threads(direct ? 0 : some * inputs, worth, [&](int64_t i) {
      float* to = made + (joined ? (i % inputs * side + i / inputs) * plan.plane : i * plan.channel);
      for (int64_t p = 0; p < plan.phases; ++p)
        plan.cut(t, x + (from * inputs + i) * height * width, plan.phase[p], to + p * plan.plane);
    });
    on_threads(some / side * squares * w->groups * chunks, worth, [&](int64_t part) {
      const int64_t c = part % chunks, g = part / chunks % w->groups, s = part / chunks / w->groups;
      const int64_t i = s / squares, q = s % squares * NT, here = std::min(NT, span - q);
      const int64_t begin = c * chunk, end = std::min(tiles, begin + chunk);
      const float* in = (direct ? x : made) + i * image + g * w->inputs * plan.channel * side + q;
      const Scratch<1> near(size_t(block + chunk * R4) * NT * 4);
      uint32_t* sums = static_cast<uint32_t*>(near.from) + block * NT;
      if (!near.from) return failed.store(true);
      t.placed(w->weight, g * tiles + begin, g * tiles + end, in, places, static_cast<uint32_t*>(near.from), sums, here);
      for (int64_t r = begin * R4; r < std::min(end * R4, w->outputs); ++r) {
        const int64_t o = g * w->outputs + r;
        t.put(reinterpret_cast<const float*>(sums) + (r - begin * R4) * NT, q, here, joined ? each : plan.columns,
              joined ? each : plan.ow, joined ? outputs * each : plan.ow, w->weight.bias ? w->weight.bias[o] : 0.0f,
              w->weight.act, y + ((from + i) * outputs + o) * plan.oh * plan.ow);
      }
    });
  }
  return failed ? RAREFY_MEMORY : RAREFY_OK;
}

API int rarefy_check_conv(const rarefy_conv* w, int64_t columns, int64_t values) {
  if (w->weight.kind != RAREFY_F32 || w->groups < 1 || w->outputs < 1 || w->inputs < 1) return RAREFY_BAD;
  for (int i = 0; i < 2; ++i)
    if (w->kernel[i] < 1 || w->stride[i] < 1 || w->padding[i] < 0 || w->dilation[i] < 1 || w->stride[i] > 8) return RAREFY_BAD;
  if (w->weight.rows != w->groups * ((w->outputs + R4 - 1) / R4 * R4)) return RAREFY_BAD;
  if (w->weight.inputs != w->inputs * w->kernel[0] * w->kernel[1]) return RAREFY_BAD;
  return rarefy_check_tiles(&w->weight, columns, values);
}
