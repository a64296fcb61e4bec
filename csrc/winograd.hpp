// Convolutions of 3 x 3 by F(2x2, 3x3) of Winograd (Lavin and Gray 2016, section 4.1): a square of two by two outputs
// takes 16 products of an input with a weight, not 36. Squares are columns of a tile; each of the 16 places of a
// transformed square is a product of matrices of its own.
#pragma once
#include <cstdint>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "simd.hpp"

namespace {

// Inputs of each channel, four by four for a square, become B^T d B, place k of it at out + k apart. As `bring` does, it
// writes up to PIECE past a row; planes have as much behind them.
void squares_in(const float* x, const int32_t* places, int64_t inputs, const rarefy_piece* pieces, int count, float* out,
                int64_t apart) {
  for (int64_t c = 0; c < inputs; ++c, places += 16, out += NT)
    for (int p = 0; p < count; ++p)
      for (int64_t n = 0; n < pieces[p].size; n += W) {
        const float* from = x + pieces[p].from + n;
        float* to = out + pieces[p].to + n;
        auto in = [&](int i, int j) { return whole_at(from + places[4 * i + j]); };
        auto row = [&](int i, auto sum) {
          const vec a = sum(0), b = sum(1), c = sum(2), d = sum(3);
          put_whole(to + 4 * i * apart, a - c);
          put_whole(to + (4 * i + 1) * apart, b + c);
          put_whole(to + (4 * i + 2) * apart, c - b);
          put_whole(to + (4 * i + 3) * apart, b - d);
        };
        row(0, [&](int j) { return in(0, j) - in(2, j); });
        row(1, [&](int j) { return in(1, j) + in(2, j); });
        row(2, [&](int j) { return in(2, j) - in(1, j); });
        row(3, [&](int j) { return in(1, j) - in(3, j); });
      }
}

// Products of one output become act(A^T m A + bias + more): two rows [2][2 NT] of pixels, `more` among them as they lie.
void squares_out(const float* m, int64_t apart, int64_t squares, float bias, const float* more, int act, float* out) {
  for (int64_t n = 0; n < squares; n += W) {
    auto row = [&](int64_t a, auto sum) {
      const vec s0 = sum(0), s1 = sum(1), s2 = sum(2), s3 = sum(3), even = s0 + s1 + s2, odd = s1 - s2 - s3;
      float both[2 * W];
      for (int i = 0; i < W; ++i) {
        both[2 * i] = even[i];
        both[2 * i + 1] = odd[i];
      }
      for (int64_t half = 0; half < 2 * W; half += W) {
        const int64_t to = a * 2 * NT + 2 * n + half;
        vec v = whole_at(both + half) + bias;
        if (more) v += whole_at(more + to);
        put_whole(out + to, activated(v, act));
      }
    };
    auto at = [&](int i, int j) { return whole_at(m + (4 * i + j) * apart + n); };
    row(0, [&](int j) { return at(0, j) + at(1, j) + at(2, j); });
    row(1, [&](int j) { return at(1, j) - at(2, j) - at(3, j); });
  }
}

}  // namespace
