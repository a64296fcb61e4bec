// Elementwise operators, normalization, rotary positions, quantization and pooling on column tiles
// [features][TILE_COLS]. Reductions over features run down a tile, so no vector is ever reduced across its elements.
#pragma once
#include <cstdint>
#include <cstring>

#include "epilogue.hpp"
#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// Transpose a tile into y[columns][features]. O(columns features).
void unpack_tile(const float* x, int64_t features, int64_t columns, float* y, int64_t ldy) {
  raw_vec square[SIMD_WIDTH];
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const int64_t num_cols = columns - n < SIMD_WIDTH ? columns - n : SIMD_WIDTH;
    for (int64_t f = 0; f < features; f += SIMD_WIDTH) {
      const int64_t num_rows = features - f < SIMD_WIDTH ? features - f : SIMD_WIDTH;
      for (int64_t i = 0; i < SIMD_WIDTH; ++i) square[i] = load_raw(x + (f + (i < num_rows ? i : 0)) * TILE_COLS + n);
      transpose(square);
      for (int64_t i = 0; i < num_cols; ++i) store_partial(y + (n + i) * ldy + f, f32_vec(square[i]), num_rows);
    }
  }
}

// out = act(a + b), where b may be null, or act(a) b; `count` floats, a multiple of TILE_COLS.
void add_or_mul(const float* a, const float* b, bool mul, int act, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += SIMD_WIDTH) {
    const f32_vec v = load_vec(a + i);
    store_vec(out + i, mul ? activate(v, act) * load_vec(b + i) : activate(b ? v + load_vec(b + i) : v, act));
  }
}

// Layer or RMS normalization over features of VECS vectors of columns.
template <int VECS>
void norm_columns(const float* x, int64_t features, const float* gamma, const float* bias, float eps,
                  bool subtract_mean, float* out) {
  constexpr int CHAINS = VECS < 4 ? 4 / VECS : 1;  // independent sums, to hide the latency of additions
  const float reciprocal = 1.0f / float(features);
  f32_vec sum[CHAINS][VECS] = {}, squares[CHAINS][VECS] = {}, mean[VECS] = {}, scale[VECS];
  auto total = [](f32_vec(&v)[CHAINS][VECS], int t) {
    f32_vec s = v[0][t];
    for (int i = 1; i < CHAINS; ++i) s += v[i][t];
    return s;
  };
  if (subtract_mean) {
    for (int64_t f = 0; f < features; ++f)
#pragma GCC unroll 4
      for (int t = 0; t < VECS; ++t) sum[f % CHAINS][t] += load_vec(x + f * TILE_COLS + t * SIMD_WIDTH);
    for (int t = 0; t < VECS; ++t) mean[t] = total(sum, t) * reciprocal;
  }
  for (int64_t f = 0; f < features; ++f)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) {
      const f32_vec v = load_vec(x + f * TILE_COLS + t * SIMD_WIDTH) - mean[t];
      squares[f % CHAINS][t] += v * v;
    }
  for (int t = 0; t < VECS; ++t) scale[t] = 1.0f / sqrt_vec(total(squares, t) * reciprocal + eps);
  for (int64_t f = 0; f < features; ++f) {
    const float g = gamma ? gamma[f] : 1.0f, b = bias ? bias[f] : 0.0f;
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) {
      const int64_t at = f * TILE_COLS + t * SIMD_WIDTH;
      store_vec(out + at, (load_vec(x + at) - mean[t]) * scale[t] * g + b);
    }
  }
}

// Normalization of the first `columns` columns.
void norm_tile(const float* x, int64_t features, int64_t columns, const float* gamma, const float* bias, float eps,
               bool subtract_mean, float* out) {
  constexpr int64_t STEP = 4 * SIMD_WIDTH;
  int64_t n = 0;
  for (; n + STEP <= columns; n += STEP) norm_columns<4>(x + n, features, gamma, bias, eps, subtract_mean, out + n);
  for (; n < columns; n += SIMD_WIDTH) norm_columns<1>(x + n, features, gamma, bias, eps, subtract_mean, out + n);
}

// Rotary positions, as rope_row in decode_ops.hpp.
void rope_tile(const float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, float* out) {
  const int64_t half = head_dim / 2 * TILE_COLS;
  for (int64_t h = 0; h < heads; ++h, x += head_dim * TILE_COLS, out += head_dim * TILE_COLS)
    for (int64_t i = 0; i < half; i += SIMD_WIDTH) {
      const f32_vec a = load_vec(x + i), b = load_vec(x + half + i);
      store_vec(out + i, a * load_vec(cos + i) - b * load_vec(sin + i));
      store_vec(out + half + i, b * load_vec(cos + half + i) + a * load_vec(sin + half + i));
    }
}

// The largest magnitude of each of the first `columns` columns.
void column_absmax(const float* x, int64_t features, int64_t columns, float* out) {
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    i32_vec max{};
    for (int64_t f = 0; f < features; ++f) max = larger_magnitude(max, load_vec(x + f * TILE_COLS + n));
    store_vec(out + n, f32_vec(max));
  }
}

// Int8 lanes of four features of SIMD_WIDTH columns; `code` gives the rounded bits of a vector.
template <class F>
inline void quantize_columns(const float* x, int64_t features, uint32_t* out, F&& code) {
  int64_t f = 0;
  for (; f + 4 <= features; f += 4, x += 4 * TILE_COLS, out += TILE_COLS)
    store_raw(out, pack_codes(code(load_vec(x)), code(load_vec(x + TILE_COLS)), code(load_vec(x + 2 * TILE_COLS)),
                              code(load_vec(x + 3 * TILE_COLS))));
  if (f == features) return;
  u32_vec last[4] = {};
  for (int64_t i = 0; f + i < features; ++i) last[i] = code(load_vec(x + i * TILE_COLS));
  store_raw(out, pack_codes(last[0], last[1], last[2], last[3]));
}

// Quantize the first `columns` columns, with one scale for each column.
void quantize_tile(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out) {
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const f32_vec inverse = 1.0f / load_vec(scales + n);
    quantize_columns(x + n, features, out + n, [&](f32_vec v) { return rounded_bits(v * inverse); });
  }
}

// As quantize_tile, to lanes of two numbers of 16 bits, in `steps` of a scale.
void quantize_pairs(const float* x, int64_t features, int64_t columns, const float* scales, float steps,
                    uint32_t* out) {
  for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
    const f32_vec inverse = steps / load_vec(scales + n);
    for (int64_t f = 0; f < features; f += 2) {
      const float* in = x + f * TILE_COLS + n;
      const u32_vec low = rounded_bits(load_vec(in) * inverse) & 0xffffu;
      const u32_vec high = f + 1 < features ? rounded_bits(load_vec(in + TILE_COLS) * inverse) << 16 : u32_vec{};
      store_raw(out + f / 2 * TILE_COLS + n, raw_vec(low | high));
    }
  }
}

void quantize_int16(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out) {
  quantize_pairs(x, features, columns, scales, 1.0f, out);
}

// As quantize_tile, in two terms: lanes of two joined numbers, or behind the codes those of what they lose.
template <bool JOINED>
void quantize_two_terms(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out) {
  if constexpr (JOINED) {
    quantize_pairs(x, features, columns, scales, LOST_STEPS, out);
  } else {
    quantize_tile(x, features, columns, scales, out);
    out += (features + 63) / 64 * 16 * TILE_COLS;
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
      const f32_vec inverse = 1.0f / load_vec(scales + n);
      quantize_columns(x + n, features, out + n, [&](f32_vec v) {
        const f32_vec code = f32_vec(rounded_bits(v * inverse)) - ROUND_TO_INTEGER;
        return rounded_bits((v * inverse - code) * LOST_STEPS);
      });
    }
  }
}

// Quantize a tile with one scale for all.
void quantize_static(const float* x, int64_t features, float inverse_scale, int32_t zero, uint32_t* out) {
  for (int64_t n = 0; n < TILE_COLS; n += SIMD_WIDTH)
    quantize_columns(x + n, features, out + n, [&](f32_vec v) { return static_code(v, inverse_scale, zero); });
}

// The numbers that codes with one scale for all stand for; `count` floats, a multiple of SIMD_WIDTH.
void fake_quantize(const float* x, float scale, int32_t zero, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += SIMD_WIDTH)
    store_vec(out + i, (shifted_code(load_vec(x + i), 1.0f / scale, zero) - ROUND_TO_INTEGER) * scale);
}

// Segments `from`..`from + N` of one channel, see channelwise.
template <int N, bool SUM>
inline void channelwise_segments(const float* x, const int32_t* offsets, int64_t lanes, const float* weights,
                                 const rarefy_segment* segments, float* out) {
  constexpr int VECS = SEGMENT_FLOATS / SIMD_WIDTH;
  f32_vec acc[N][VECS];
  for (int p = 0; p < N; ++p)
    for (int v = 0; v < VECS; ++v)
      acc[p][v] = SUM ? f32_vec{} : load_vec(x + offsets[0] + segments[p].source + v * SIMD_WIDTH);
  for (int64_t l = 0; l < lanes; ++l) {
    const float* lane = x + offsets[l];
#pragma GCC unroll 4
    for (int p = 0; p < N; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        const f32_vec in = load_vec(lane + segments[p].source + v * SIMD_WIDTH);
        f32_vec& a = acc[p][v];
        if constexpr (SUM)
          a += in * weights[l];
        else
          a = ((in <= a) | (a != a)) ? a : in;  // NaN stays NaN
      }
  }
  for (int p = 0; p < N; ++p)
    for (int v = 0; v < VECS; ++v) store_vec(out + segments[p].column + v * SIMD_WIDTH, acc[p][v]);
}

// The maximum of one channel's lanes, or with weights act(their weighted sum + bias), out[TILE_COLS]. Lane l of each
// segment is read from x + offsets[l] on; SEGMENT_FLOATS are readable there. What is computed past a segment, the next
// one overwrites.
void channelwise(const float* x, const int32_t* offsets, int64_t lanes, const float* weights, float bias, int act,
                 const rarefy_segment* segments, int count, float* out) {
  alignas(64) float sums[TILE_COLS + SEGMENT_FLOATS] = {};
  const auto four = weights ? channelwise_segments<4, true> : channelwise_segments<4, false>;
  const auto one = weights ? channelwise_segments<1, true> : channelwise_segments<1, false>;
  int p = 0;
  for (; p + 4 <= count; p += 4) four(x, offsets, lanes, weights, segments + p, sums);
  for (; p < count; ++p) one(x, offsets, lanes, weights, segments + p, sums);
  for (int64_t n = 0; n < TILE_COLS; n += SIMD_WIDTH) {
    const f32_vec v = load_vec(sums + n);
    store_vec(out + n, weights ? activate(v + bias, act) : v);
  }
}

// out = act(x scale + bias), with a scale and a bias for each feature.
void channel_affine(const float* x, int64_t features, const float* scale, const float* bias, int act, float* out) {
  for (int64_t f = 0; f < features; ++f)
    for (int64_t n = 0; n < TILE_COLS; n += SIMD_WIDTH)
      store_vec(out + f * TILE_COLS + n, activate(load_vec(x + f * TILE_COLS + n) * scale[f] + bias[f], act));
}

// out = x times factors[f * TILE_COLS] in `columns` columns of each feature f.
void channel_scale(const float* x, int64_t features, int64_t columns, const float* factors, float* out) {
  for (int64_t f = 0; f < features; ++f)
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH)
      store_partial(out + f * TILE_COLS + n, load_partial(x + f * TILE_COLS + n, columns - n) * factors[f * TILE_COLS],
                    columns - n);
}

// Columns of x in another order, see rarefy_step.segments; SEGMENT_FLOATS are readable at each source. What is written
// past a segment, the next one overwrites.
void rearrange(const float* x, int64_t features, const rarefy_segment* segments, int count, float* out) {
  constexpr int VECS = SEGMENT_FLOATS / SIMD_WIDTH;
  alignas(64) float columns[TILE_COLS + SEGMENT_FLOATS];
  for (int64_t f = 0; f < features; ++f, x += TILE_COLS, out += TILE_COLS) {
    for (int p = 0; p < count; ++p) {
      const rarefy_segment s = segments[p];
      for (int v = 0; v < VECS; ++v)
        store_vec(columns + s.column + v * SIMD_WIDTH,
                  s.source < 0 ? f32_vec{} : load_vec(x + s.source + v * SIMD_WIDTH));
    }
    for (int64_t n = 0; n < TILE_COLS; n += SIMD_WIDTH) store_vec(out + n, load_vec(columns + n));
  }
}

// sums[f * TILE_COLS] += the sum of `columns` columns of each feature f.
void add_column_sums(const float* x, int64_t features, int64_t columns, float* sums) {
  for (int64_t f = 0; f < features; ++f) {
    f32_vec v{};
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH) v += load_partial(x + f * TILE_COLS + n, columns - n);
    float parts[SIMD_WIDTH], sum = 0.0f;
    store_vec(parts, v);
    for (int i = 0; i < SIMD_WIDTH; ++i) sum += parts[i];
    sums[f * TILE_COLS] += sum;
  }
}

// sums[0] += the sum of x - mean over features and `columns` columns, sums[1] += the sum of its squares.
void add_deviations(const float* x, int64_t features, int64_t columns, float mean, double* sums) {
  f32_vec sum{}, squares{};
  float rest = 0.0f, rest_squares = 0.0f;
  for (int64_t f = 0; f < features; ++f) {
    int64_t n = 0;
    for (; n + SIMD_WIDTH <= columns; n += SIMD_WIDTH) {
      const f32_vec v = load_vec(x + f * TILE_COLS + n) - mean;
      sum += v;
      squares += v * v;
    }
    for (; n < columns; ++n) {
      const float v = x[f * TILE_COLS + n] - mean;
      rest += v;
      rest_squares += v * v;
    }
  }
  sums[0] += double(rest);
  sums[1] += double(rest_squares);
  for (int i = 0; i < SIMD_WIDTH; ++i) {
    sums[0] += double(sum[i]);
    sums[1] += double(squares[i]);
  }
}

// out = (x - mean) scale gamma + bias in `columns` columns of each feature; gamma and bias may be null.
void normalize_columns(const float* x, int64_t features, int64_t columns, float mean, float scale, const float* gamma,
                       const float* bias, float* out) {
  for (int64_t f = 0; f < features; ++f) {
    const float factor = gamma ? scale * gamma[f] : scale, shift = bias ? bias[f] : 0.0f;
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH)
      store_partial(out + f * TILE_COLS + n, (load_partial(x + f * TILE_COLS + n, columns - n) - mean) * factor + shift,
                    columns - n);
  }
}

}  // namespace
