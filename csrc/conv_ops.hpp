// Steps of images: values whose tokens are pixels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv_indirection.hpp"
#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t CHANNELS = 8;  // of a part of what runs channel by channel
constexpr int64_t FOURS = 64;   // of rows of a part of a convolution
constexpr int64_t SQUARED = 64;  // rows of a part of a convolution by squares
constexpr int64_t LANES = 16;   // of a channel that are brought together at once

// Rows of a part of a convolution: fewer where there are few tiles, so that threads share them.
inline int64_t rows_of(int64_t tiles) { return tiles < 8 ? SLAB : FOURS * R4; }

// Calls f(image, column, how many) for the columns of each image that lie in a tile.
template <class F>
inline void images_in(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * NT, end = std::min(at + NT, s.columns), n; at < end; at += n) {
    n = std::min(s.tokens - at % s.tokens, end - at);
    f(at / s.tokens, at, n);
  }
}

// Scales of a tile's columns: of each that of its image, the largest magnitudes of which are given tile by tile.
inline void image_scales(const rarefy_table& t, const rarefy_step& s, int64_t tile, float* out) {
  std::fill_n(out, NT, 1.0f);
  images_in(s, tile, [&](int64_t b, int64_t column, int64_t n) {
    uint32_t most = 0;  // bits, of which those of NaN are more than all others
    for (int64_t at = b * s.tokens, end = at + s.tokens; at < end; at = (at / NT + 1) * NT)
      most = std::max(most, __builtin_bit_cast(uint32_t, s.more.at[at]));
    const float largest = __builtin_bit_cast(float, most);
    std::fill_n(out + column % NT, n, rarefy_step_of(t, &largest, 1));
  });
}

// Planes of some channels of one image.
inline int cut_planes(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const auto& image = *static_cast<const rarefy_image*>(s.w);
  const Image plan(*image.w, image.height, image.width);
  const int64_t parts = over(s.features, CHANNELS), b = i / parts, from = i % parts * CHANNELS;
  const bool raw = s.flag == 1;
  const float rest = s.flag == 2 ? t.no_bytes : s.least;
  const Scratch<1> near(raw ? 4 : size_t(s.tokens + NT) * 4);
  if (!near.from) return RAREFY_MEMORY;
  for (int64_t f = from; f < std::min(from + CHANNELS, s.features); ++f) {
    const float* x = s.x.at + (b * s.features + f) * s.tokens;
    if (!raw) {
      float* own = static_cast<float*>(near.from);
      for (int64_t at = b * s.tokens, end = at + s.tokens; at < end;) {
        const int64_t n = std::min(NT - at % NT, end - at);
        std::memcpy(own + at - b * s.tokens, s.x.at + at / NT * s.x.tile + f * NT + at % NT, size_t(n) * 4);
        at += n;
      }
      x = own;
    }
    float* out = s.out.at + (b * s.features + f) * plan.channel;
    for (int64_t p = 0; p < plan.phases; ++p) plan.cut(t, x, plan.phase[p], out + p * plan.plane, rest);
  }
  return RAREFY_OK;
}

// A tile of a convolution's outputs, some rows of them.
inline int convolve(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const auto& image = *static_cast<const rarefy_image*>(s.w);
  const rarefy_conv& w = *image.w;
  const Image plan(w, image.height, image.width);
  const int64_t tiles = over(s.columns, NT), size = rows_of(tiles), chunks = over(s.features, size);
  const int64_t tile = i / chunks, row = i % chunks * size, rows = std::min(size, s.features - row);
  const int64_t lanes = w.weight.cols, block = w.weight.block, here = std::min(NT, s.columns - tile * NT);
  const int64_t whole = w.inputs * plan.channel;
  const Scratch<1> near(size_t(block + 1) * NT * 4);  // a line between: pieces are copied whole
  uint32_t* in = static_cast<uint32_t*>(near.from);
  if (!in) return RAREFY_MEMORY;
  rarefy_piece pieces[NT];
  const int count = plan.pieces(tile * NT, here, whole, pieces);
  float* out = s.out.at + tile * s.out.tile + row * NT;
  auto* sums = reinterpret_cast<uint32_t*>(out);
  const float* last = s.x.at + s.batch * whole + PIECE;
  const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
  const bool bytes = w.weight.kind == RAREFY_I8;
  alignas(64) float steps[NT];
  for (int64_t n = 0; bytes && n < NT; ++n)
    steps[n] = s.sum.at[std::min(tile * NT + n, s.columns - 1) / s.tokens * image.height * image.width];
  const rarefy_end end = end_of({w.weight.scales, w.weight.sums, w.weight.bias, w.weight.act}, row, rows, steps, more);
  for (int64_t b = 0, l = 0; l < lanes; ++b, l += block) {
    t.bring(s.x.at, last, image.places + l, std::min(block, lanes - l), pieces, count, in);
    if (w.dense)
      multiply(t, w.dense, lanes, row, rows, l, std::min(block, lanes - l), in, here, sums);
    else if (w.sell)
      t.sell_one[bytes](*w.sell, b, row / SLAB, over(row + rows, SLAB), in, sums, here,
                        l + block >= lanes ? &end : nullptr);
    else
      t.tiles_one[bytes](w.weight, b, row / R4, over(row + rows, R4), in, sums, here);
  }
  if (!w.sell) settle(t, end, bytes, out);
  tell_ranges(t, s, tile, row, rows);
  return RAREFY_OK;
}

// Two by two outputs of a convolution by squares: how many there are, and of them a part.
struct Squares {
  explicit Squares(const rarefy_step& s)
      : image(*static_cast<const rarefy_image*>(s.w)), w(*image.w), plan(w, image.height, image.width) {
    height = image.height + 2 * w.padding[0] - 2;
    width = image.width + 2 * w.padding[1] - 2;
    plan.oh = over(height, 2);
    plan.ow = over(width, 2);
    all = s.batch * plan.oh * plan.ow;
    const int64_t tiles = over(all, NT);
    part = over(over(all, tiles + (tiles > 1) * tiles % 2), 8) * 8;  // as even as may be, for two threads as well
    parts = over(all, part);
  }
  // What of a tile of outputs lies where, for squares from `at` on: their place in the plan, and in two rows of pixels.
  int runs(const rarefy_step& s, int64_t at, int64_t here, rarefy_piece* out) const {
    int count = 0;
    for (int64_t done = 0, n; done < here; done += n) {
      const int64_t row = (at + done) / plan.ow, column = (at + done) % plan.ow;
      n = std::min(plan.ow - column, here - done);
      for (int64_t a = 0; a < 2; ++a) {
        const int64_t y = row % plan.oh * 2 + a, first = (row / plan.oh * height + y) * width + 2 * column;
        const int64_t end = y < height ? first + std::min(2 * n, width - 2 * column) : first;
        for (int64_t q = first, some; q < end; q += some) {
          some = std::min(NT - q % NT, end - q);
          out[count++] = {q / NT * s.out.tile + q % NT, int32_t((a * NT + done) * 2 + q - first), int32_t(some)};
        }
      }
    }
    return count;
  }
  const rarefy_image& image;
  const rarefy_conv& w;
  Image plan;
  int64_t height, width, all, part, parts;
};

inline int64_t parts_of_squares(const rarefy_step& s) { return Squares(s).parts * over(s.features, SQUARED); }

// Some squares of outputs, some rows of them.
inline int convolve_squares(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const Squares squares(s);
  const rarefy_conv& w = squares.w;
  const int64_t chunks = over(s.features, SQUARED), at = i / chunks * squares.part, row = i % chunks * SQUARED;
  const int64_t rows = std::min(SQUARED, s.features - row), here = std::min(squares.part, squares.all - at);
  const int64_t fours = over(s.features, R4), in_apart = (w.inputs + 1) * NT, out_apart = (over(rows, R4) * R4 + 1) * NT;
  const Scratch<1> near(size_t(in_apart + out_apart) * 16 * 4);
  float* in = static_cast<float*>(near.from);
  if (!in) return RAREFY_MEMORY;
  float* products = in + in_apart * 16;
  rarefy_piece pieces[NT], runs[5 * NT];
  int count = squares.plan.pieces(at, here, w.inputs * squares.plan.channel, pieces);
  t.squares_in(s.x.at, squares.image.places, w.inputs, pieces, count, in, in_apart);
  for (int64_t k = 0; k < 16; ++k)
    t.dense[0](reinterpret_cast<const uint32_t*>(w.dense) + (k * fours * R4 + row) * w.inputs, w.inputs * R4, over(rows, R4),
               w.inputs, reinterpret_cast<const uint32_t*>(in + k * in_apart),
               reinterpret_cast<uint32_t*>(products + k * out_apart), here, false);
  count = squares.runs(s, at, here, runs);
  alignas(64) float pixels[4 * NT], more[4 * NT];
  for (int64_t r = row; r < row + rows; ++r, products += NT) {
    for (int p = 0; s.more.at && p < count; ++p)
      std::memcpy(more + runs[p].to, s.more.at + runs[p].from + r * NT, size_t(runs[p].size) * 4);
    t.squares_out(products, out_apart, here, w.weight.bias ? w.weight.bias[r] : 0.0f, s.more.at ? more : nullptr,
                  w.weight.act, pixels);
    for (int p = 0; p < count; ++p)
      std::memcpy(s.out.at + runs[p].from + r * NT, pixels + runs[p].to, size_t(runs[p].size) * 4);
  }
  return RAREFY_OK;
}

// Channel by channel: the largest of the pixels that a kernel takes together, or their sum with weights.
inline void each_channel(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const auto& image = *static_cast<const rarefy_image*>(s.w);
  const Image plan(*image.w, image.height, image.width);
  const int64_t parts = over(s.features, CHANNELS), tile = i / parts, from = i % parts * CHANNELS;
  const int64_t lanes = image.w->kernel[0] * image.w->kernel[1], here = std::min(NT, s.columns - tile * NT);
  rarefy_piece pieces[NT];
  const int count = plan.pieces(tile * NT, here, s.features * plan.channel, pieces);
  const float* last = s.x.at + s.batch * s.features * plan.channel + PIECE;
  alignas(64) uint32_t near[(LANES + 1) * NT];
  for (int64_t f = from; f < std::min(from + CHANNELS, s.features); ++f) {
    float* out = s.out.at + tile * s.out.tile + f * NT;
    for (int64_t l = 0; l < lanes; l += LANES) {
      const int64_t some = std::min(LANES, lanes - l);
      t.bring(s.x.at + f * plan.channel, last, image.places + l, some, pieces, count, near);
      t.gathered(reinterpret_cast<const float*>(near), some, s.gain ? s.gain + f * lanes + l : nullptr, l > 0, out);
    }
    if (s.gain) t.put(out, 1, NT, s.bias ? s.bias + f : nullptr, nullptr, s.act, out, NT, false);
  }
}

// Means of some features of one image.
inline void average(const rarefy_step& s, int64_t i) {
  const int64_t parts = over(s.features, ROWS), b = i / parts, from = i % parts * ROWS;
  for (int64_t f = from; f < std::min(from + ROWS, s.features); ++f) {
    float sum = 0.0f;
    for (int64_t at = b * s.tokens, end = at + s.tokens; at < end;) {
      const int64_t n = std::min(NT - at % NT, end - at);
      const float* x = s.x.at + at / NT * s.x.tile + f * NT + at % NT;
      for (int64_t j = 0; j < n; ++j) sum += x[j];
      at += n;
    }
    s.out.at[b / NT * s.out.tile + f * NT + b % NT] = sum / float(s.tokens);
  }
}

}  // namespace
