// Convolution by zero-skipping tiles, without im2col. NT outputs in a row, of however many images, are a square: for each
// a block of lanes is brought together in pieces (conv_indirection.hpp), and the tiles run on it as on a packed batch, in the first
// cache and on aligned loads.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "conv_indirection.hpp"
#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"

namespace {

constexpr int64_t CHUNK = 64, FEW = 4;    // tiles of weights that a thread takes at once; parts that are too few
constexpr int64_t ROUND = 1 << 20;        // floats of padded images that are made at once: they stay in the caches
constexpr int64_t STREAM = 2 << 20;       // outputs that will not be in a cache when they are read: they go past it

}  // namespace

API int rarefy_run_conv(const rarefy_conv* w, const float* x, int64_t height, int64_t width, const float* residual,
                        float* y, int64_t n) {
  if (w->weight.kind != RAREFY_F32 || w->dense) return RAREFY_BAD;
  const rarefy_table& t = rarefy_chosen();
  const Image plan(*w, height, width);
  const int64_t lanes = w->weight.cols, inputs = w->inputs * w->groups, outputs = w->outputs * w->groups;
  const int64_t image = inputs * plan.channel, each = plan.oh * plan.ow, all = (n * each + NT - 1) / NT;
  const int64_t tiles = (w->outputs + R4 - 1) / R4, block = w->weight.block;
  const int64_t least = w->sell ? SLAB / R4 : 8;  // tiles of a part
  int64_t chunk = w->sell ? CHUNK : std::min(CHUNK, tiles);
  while (chunk > least && all * w->groups * ((tiles + chunk - 1) / chunk) < FEW) chunk /= 2;
  const int64_t chunks = (tiles + chunk - 1) / chunk;
  std::atomic<bool> failed{false};
  const int64_t most = plan.direct ? n : std::max<int64_t>(1, std::min(n, ROUND / std::max<int64_t>(1, image)));
  const Scratch<0> scratch(size_t((lanes + 63) / 64 * 64 + (plan.direct ? 0 : most * image + PIECE)) * 4);
  int32_t* places = static_cast<int32_t*>(scratch.from);
  if (!places) return RAREFY_MEMORY;
  plan.places(places);
  float* made = reinterpret_cast<float*>(places + (lanes + 63) / 64 * 64);
  const bool worth = w->weight.rows * lanes / 8 * each * n > LEAST;
  const bool stream = n * outputs * each > STREAM;
  if (stream) large_pages(y, size_t(n * outputs * each) * 4);
  for (int64_t from = 0; from < n; from += most) {  // a round of images
    const int64_t some = std::min(most, n - from), squares = (some * each + NT - 1) / NT;
    const float* first = plan.direct ? x : made;
    const float* last = plan.direct ? x + n * image : made + most * image + PIECE;
    on_threads(plan.direct ? 0 : some * inputs, worth, [&](int64_t i) {
      for (int64_t p = 0; p < plan.phases; ++p)
        plan.cut(t, x + (from * inputs + i) * height * width, plan.phase[p], made + i * plan.channel + p * plan.plane);
    });
    on_threads(squares * w->groups * chunks, worth, [&](int64_t part) {
      const int64_t c = part % chunks, g = part / chunks % w->groups, q = part / chunks / w->groups * NT;
      const int64_t here = std::min(NT, some * each - q), begin = c * chunk, end = std::min(tiles, begin + chunk);
      const Scratch<1> near(size_t(block + 1 + chunk * R4) * NT * 4);  // a line between: pieces are copied whole
      uint32_t* sums = static_cast<uint32_t*>(near.from) + (block + 1) * NT;
      if (!near.from) return failed.store(true);
      rarefy_piece pieces[NT];
      const int count = plan.pieces(q, here, image, pieces);
      for (int64_t b = 0, l = 0; l < lanes; ++b, l += block) {
        uint32_t* in = static_cast<uint32_t*>(near.from);
        t.bring(first + g * w->inputs * plan.channel, last, places + l, std::min(block, lanes - l), pieces, count, in);
        if (w->sell)
          t.sell_one[0](*w->sell, b, begin * R4 / SLAB, (end * R4 + SLAB - 1) / SLAB, in, sums, here, nullptr);
        else
          t.tiles_one[0](w->weight, b, g * tiles + begin, g * tiles + end, in, sums, here);
      }
      const int64_t o = g * w->outputs + begin * R4, rows = std::min(end * R4, w->outputs) - begin * R4;
      const float* bias = w->weight.bias ? w->weight.bias + o : nullptr;
      for (int64_t done = 0, run; done < here; done += run) {
        const int64_t i = (q + done) / each, at = (q + done) % each;
        run = std::min(here - done, each - at);
        const int64_t to = ((from + i) * outputs + o) * each + at;
        t.put(reinterpret_cast<const float*>(sums) + done, rows, run, bias, residual ? residual + to : nullptr,
              w->weight.act, y + to, each, stream);
      }
    });
  }
  return failed ? RAREFY_MEMORY : RAREFY_OK;
}

API int rarefy_check_conv(const rarefy_conv* w, int64_t columns, int64_t values) {
  if (w->groups < 1 || w->outputs < 1 || w->inputs < 1) return RAREFY_BAD;
  const bool bytes = w->weight.kind == RAREFY_I8;
  if (bytes ? w->groups != 1 : w->weight.kind != RAREFY_F32) return RAREFY_BAD;
  for (int i = 0; i < 2; ++i)
    if (w->kernel[i] < 1 || w->stride[i] < 1 || w->padding[i] < 0 || w->dilation[i] < 1 || w->stride[i] > 8) return RAREFY_BAD;
  const int64_t rows = w->dense ? w->outputs : w->groups * ((w->outputs + R4 - 1) / R4 * R4);
  if (w->weight.rows != rows || (w->dense && (w->groups != 1 || bytes || w->weight.block < 1))) return RAREFY_BAD;
  if (w->weight.inputs != w->inputs * w->kernel[0] * w->kernel[1] * (bytes ? 4 : 1)) return RAREFY_BAD;
  if (w->dense) return w->weight.cols == w->weight.inputs ? RAREFY_OK : RAREFY_BAD;
  if (!w->sell) return rarefy_check_tiles(&w->weight, columns, values);
  const rarefy_sell& s = *w->sell;
  if (w->groups != 1 || s.kind != w->weight.kind || s.rows != w->weight.rows || s.inputs != w->weight.inputs) return RAREFY_BAD;
  return s.block == w->weight.block && s.cols == w->weight.cols ? rarefy_check_sell(&s, values) : RAREFY_BAD;
}

API int64_t rarefy_image_floats(const rarefy_conv* w, int64_t height, int64_t width) {
  return w->inputs * Image(*w, height, width).channel;
}

API void rarefy_image_places(const rarefy_conv* w, int64_t height, int64_t width, int32_t* out) {
  Image(*w, height, width).places(out);
}
