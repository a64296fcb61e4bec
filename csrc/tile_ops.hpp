// What lies between products of matrices, on tiles [features][NT] of columns (tokens): sums over features run down a
// tile, so no vector is ever added up across.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// x normed over features for `columns` of a tile.
void norm(const float* x, int64_t features, int64_t columns, const float* gain, const float* bias, float least,
          bool centred, float* out) {
  constexpr int S = 4;  // sums that do not wait for each other
  const float part = 1.0f / float(features);
  for (int64_t n = 0; n < columns; n += W) {
    vec total[S] = {}, square[S] = {}, mean{};
    if (centred) {
      for (int64_t f = 0; f < features; ++f) total[f % S] += whole_at(x + f * NT + n);
      mean = ((total[0] + total[1]) + (total[2] + total[3])) * part;
    }
    for (int64_t f = 0; f < features; ++f) {
      const vec v = whole_at(x + f * NT + n) - mean;
      square[f % S] += v * v;
    }
    const vec by = 1.0f / root(((square[0] + square[1]) + (square[2] + square[3])) * part + least);
    for (int64_t f = 0; f < features; ++f) {
      vec v = (whole_at(x + f * NT + n) - mean) * by;
      if (gain) v *= gain[f];
      if (bias) v += bias[f];
      put_whole(out + f * NT + n, v);
    }
  }
}

// Rows of a tile -> y[n][features], `columns` from the tile's column 0 on.
void unpack(const float* x, int64_t features, int64_t columns, float* y, int64_t ldy) {
  lanes square[W];
  for (int64_t n = 0; n < columns; n += W) {
    const int64_t some = columns - n < W ? columns - n : W;
    for (int64_t f = 0; f < features; f += W) {
      const int64_t here = features - f < W ? features - f : W;
      for (int64_t i = 0; i < W; ++i) square[i] = lanes_at(x + (f + (i < here ? i : 0)) * NT + n);
      transpose(square);
      for (int64_t i = 0; i < some; ++i) put_some(y + (n + i) * ldy + f, vec(square[i]), here);
    }
  }
}

// out = act(a + b) or act(a) b, for `count` floats, a multiple of NT.
void pair(const float* a, const float* b, bool product, int act, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const vec v = whole_at(a + i);
    put_whole(out + i, product ? activated(v, act) * whole_at(b + i) : activated(b ? v + whole_at(b + i) : v, act));
  }
}

// The largest magnitude of each column of a tile: of their bits, of which those of NaN are the largest.
void ranges(const float* x, int64_t features, float* out) {
  for (int64_t n = 0; n < NT; n += W) {
    ints most{};
    for (int64_t f = 0; f < features; ++f) {
      const ints here = ints(words(whole_at(x + f * NT + n)) & 0x7fffffffu);
      most = here > most ? here : most;
    }
    put_whole(out + n, vec(most));
  }
}

// Bytes of a tile, four features to a lane; each column has its scale.
void to_bytes_tile(const float* x, int64_t features, const float* scales, uint32_t* out) {
  for (int64_t n = 0; n < NT; n += W) {
    const vec by = 1.0f / whole_at(scales + n);
    for (int64_t f = 0; f < features; f += 4) {
      words lane = words{} + NO_BYTES;
      for (int64_t i = 0; i < 4 && f + i < features; ++i) {
        const vec v = whole_at(x + (f + i) * NT + n) * by;
        const ints whole = __builtin_convertvector((v + 12582912.0f) - 12582912.0f, ints);
        lane ^= (words(whole) & 255u) << uint32_t(8 * i);
      }
      std::memcpy(out + f / 4 * NT + n, &lane, sizeof lane);
    }
  }
}

// Sums of a row, T vectors of them from column `lane` on, become outputs.
template <int KIND, int T, class S>
inline void finish_row(const S (&c)[T], const rarefy_end& end, int64_t row, int64_t lane, float* out) {
  const bool there = row < end.rows;
  const float bias = end.bias && there ? end.bias[row] : 0.0f;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    vec v;
    if constexpr (KIND == RAREFY_I8) {
      const words shift = words{} + uint32_t(there ? end.sums[row] : 0) * uint32_t(ADDED);
      const float scale = there ? end.scales[row] : 0.0f;
      v = __builtin_convertvector(ints(__builtin_bit_cast(words, c[t]) - shift), vec);
      v = v * (whole_at(end.steps + lane + t * W) * scale) + bias;
    } else {
      v = __builtin_bit_cast(vec, c[t]) + bias;
    }
    if (end.more) v += whole_at(end.more + row * NT + lane + t * W);
    put_whole(out + t * W, activated(v, end.act));
  }
}

// Sums of bytes [rows][NT] in place become outputs.
void settle_bytes(const rarefy_end& end, float* out) {
  for (int64_t r = 0; r < end.rows; ++r)
    for (int64_t n = 0; n < NT; n += 4 * W) {
      words sum[4];
      for (int64_t t = 0; t < 4; ++t) sum[t] = __builtin_bit_cast(words, whole_at(out + r * NT + n + t * W));
      finish_row<RAREFY_I8>(sum, end, r, n, out + r * NT + n);
    }
}

// Of lanes [lanes][NT] of one channel the largest, or their sum with weights; `begun`: with what is in out.
void gathered(const float* x, int64_t lanes, const float* weights, bool begun, float* out) {
  for (int64_t n = 0; n < NT; n += W) {
    vec v = begun ? whole_at(out + n) : weights ? vec{} : whole_at(x + n);
    for (int64_t l = 0; l < lanes; ++l) {
      const vec in = whole_at(x + l * NT + n);
      v = weights ? v + in * weights[l] : (in <= v) | (v != v) ? v : in;  // NaN stays
    }
    put_whole(out + n, v);
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------
// Queries are columns, T vectors of them at a time; keys and values of the same sequence are broadcast one number after
// the other, a tile of them at a time, with the running maximum and sum of softmax (Milakov and Gimelshein 2018).

constexpr float LOWEST = -1e30f;  // less is as good as masked, and differences of it are no NaN

template <int T, int R>
inline void score_keys(const float* q, const float* k, int64_t width, float scale, vec (*out)[T]) {
  vec c[R][T] = {};
  for (int64_t d = 0; d < width; ++d, q += NT, k += NT) {
    vec in[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) in[t] = whole_at(q + t * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) c[r][t] += in[t] * k[r];
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = c[r][t] * scale;
}

template <int T, int R>
inline void add_values(const vec (*p)[T], const float* v, int64_t keys, const vec* back, float* out) {
  vec c[R][T];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) c[r][t] = whole_at(out + r * NT + t * W) * back[t];
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) c[r][t] += p[j][t] * v[r * NT + j];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) put_whole(out + r * NT + t * W, c[r][t]);
}

// Keys or values, those of a cache behind `before` features.
inline const float* kept(const rarefy_attention& a, const float* own, int64_t before) {
  return a.cache ? a.cache->at + before * a.cache->batch * a.cache->capacity : own;
}

// `lane`: of the first query in its tile; `place`: of it in its sequence.
template <int T>
void attend_part(const rarefy_attention& a, int64_t batch, int64_t head, int64_t lane, int64_t place, const float* q,
                 float* out) {
  const int64_t width = a.width, first = batch * (a.cache ? a.cache->capacity : a.apart);
  const int64_t kv = head / (a.heads / a.kv_heads) * width * NT;
  const int64_t past = a.cache ? a.cache->past : 0, all = a.cache ? past + a.queries : a.keys;
  const int64_t start = a.cache && a.cache->starts ? a.cache->starts[batch] : 0, lowest = past + place;
  vec most[T], sum[T] = {}, back[T];
  for (int t = 0; t < T; ++t) most[t] = vec{} + LOWEST;
  for (int64_t d = 0; d < width; ++d)
    for (int t = 0; t < T; ++t) put_whole(out + d * NT + lane + t * W, vec{});
  const int64_t last = a.causal ? std::min(all, lowest + T * W) : all;
  int64_t begin = a.window ? std::max<int64_t>(0, lowest + 1 - a.window) : 0;
  if (start <= lowest) begin = std::max(begin, start);  // what fills a sequence up attends to what is there
  vec p[NT][T];
  for (int64_t from = begin / NT * NT; from < last;) {
    const int64_t at = first + from, column = at % NT, keys = std::min(NT - column, last - from);
    const float* k = kept(a, a.k, a.k_before) + at / NT * a.k_tile + kv + column;
    const float* v = kept(a, a.v, a.v_before) + at / NT * a.v_tile + kv + column;
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) score_keys<T, 4>(q + lane, k + j, width, a.scale, p + j);
    for (; j < keys; ++j) score_keys<T, 1>(q + lane, k + j, width, a.scale, p + j);
    if (a.mask) {
      const float* m = a.mask + batch * a.mask_batch + head * a.mask_head + place * a.mask_query + from * a.mask_key;
      for (j = 0; j < keys; ++j)
        for (int t = 0; t < T; ++t) {
          if (!a.mask_query) {
            p[j][t] += m[j * a.mask_key];
            continue;
          }
          float more[W];
          for (int i = 0; i < W; ++i)
            more[i] = place + t * W + i < a.queries ? m[j * a.mask_key + (t * W + i) * a.mask_query] : 0.0f;
          p[j][t] += whole_at(more);
        }
    }
    const bool ends = a.causal && from + keys > lowest, opens = from < start || a.window;
    if (ends || opens)
      for (j = 0; j < keys; ++j)
        for (int t = 0; t < T; ++t)
          for (int i = 0; i < W; ++i) {
            const int64_t key = from + j, query = lowest + t * W + i;
            if ((a.causal && key > query) || (key < start && start <= query) || (a.window && key + a.window <= query))
              p[j][t][i] = LOWEST * 2;
          }
    for (int t = 0; t < T; ++t) {
      vec here = most[t];
      for (j = 0; j < keys; ++j) here = larger(here, p[j][t]);
      back[t] = exponential(most[t] - here);
      most[t] = here;
      vec more{};
      for (j = 0; j < keys; ++j) more += p[j][t] = exponential(p[j][t] - here);
      sum[t] = sum[t] * back[t] + more;
    }
    int64_t d = 0;
    for (; d + 4 <= width; d += 4) add_values<T, 4>(p, v + d * NT, keys, back, out + d * NT + lane);
    for (; d < width; ++d) add_values<T, 1>(p, v + d * NT, keys, back, out + d * NT + lane);
    from += keys;
  }
  for (int64_t d = 0; d < width; ++d)
    for (int t = 0; t < T; ++t) {
      float* at = out + d * NT + lane + t * W;
      put_whole(at, whole_at(at) / sum[t]);
    }
}

// One head of the queries of one sequence that lie in one tile.
void attend(const rarefy_attention& a, int64_t batch, int64_t head, int64_t tile) {
  const int64_t first = batch * a.apart, from = std::max(first, tile * NT);
  const int64_t to = std::min(first + (a.queries + W - 1) / W * W, (tile + 1) * NT);
  const float* q = a.q + tile * a.q_tile + head * a.width * NT;
  float* out = a.out + tile * a.out_tile + head * a.width * NT;
  int64_t at = from;
  for (; at + MOST * W <= to; at += MOST * W) attend_part<MOST>(a, batch, head, at % NT, at - first, q, out);
  for (; at < to; at += W) attend_part<1>(a, batch, head, at % NT, at - first, q, out);
}

}  // namespace
