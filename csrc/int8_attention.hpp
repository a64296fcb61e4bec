// Attention with products of codes: queries and keys have a scale for each token, values one for each feature of a
// head, and the weights of the softmax are codes too. Scores and weights are [keys][TILE_COLS queries]. Sequences may
// begin in any column. Causal attention and windows are in fp32 or bf16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "kernel_table.h"
#include "lane_attention.hpp"
#include "rarefy.h"
#include "simd.hpp"
#include "visible_keys.hpp"

namespace {

constexpr int64_t SCORED_KEYS = 128;                                  // whose scores are in the cache at a time
constexpr float LARGEST_WEIGHT = INPUT_ZERO_POINT ? 255.0f : 127.0f;  // inputs of products are unsigned, or signed
constexpr float LOG2_LARGEST = INPUT_ZERO_POINT ? 7.99435344f : 6.98868469f;

// SIMD_WIDTH consecutive columns of a head, of which `count` exist: `in_low` of them in one column tile, the rest at
// the start of the next one.
struct ColumnGroup {
  ColumnGroup(const float* x, int64_t stride, int64_t column, int64_t columns)
      : low(x + column / TILE_COLS * stride + column % TILE_COLS),
        high(x + (column / TILE_COLS + 1) * stride),
        count(std::min<int64_t>(columns, SIMD_WIDTH)),
        in_low(std::min(count, TILE_COLS - column % TILE_COLS)) {}

  f32_vec load(int64_t feature) const {
    const float* a = low + feature * TILE_COLS;
    if (in_low == count) return load_partial(a, count);
    float both[2 * SIMD_WIDTH];
    store_vec(both, load_partial(a, in_low));
    store_vec(both + in_low, load_partial(high + feature * TILE_COLS, count - in_low));
    return load_vec(both);
  }

  const float *low, *high;
  int64_t count, in_low;
};

// Store the first `count` columns of v: `in_low` of them at `low`, the others from `high` on.
inline void store_columns(f32_vec v, int64_t count, int64_t in_low, float* low, float* high) {
  if (count == SIMD_WIDTH && (in_low >= count || in_low <= 0)) return store_vec(in_low > 0 ? low : high - in_low, v);
  float columns[SIMD_WIDTH];
  store_vec(columns, v);
  for (int64_t i = 0; i < count; ++i) *(i < in_low ? low + i : high + i - in_low) = columns[i];
}

using Weights = decltype(LaneOps<RAREFY_I8>::broadcast(0));

// The scale of codes for the largest magnitude, as absmax_to_scales finds it.
inline f32_vec scale_of(f32_vec absmax) {
  const f32_vec scale = max_vec(absmax * (1.0f / 127.0f), f32_vec{} + MIN_INPUT_SCALE);
  return absmax < INFINITY ? scale : f32_vec{} + NAN;
}

// Codes of the columns, four features to a lane, in out[lane * stride], as inputs of products. Returns their scales.
inline f32_vec quantize_group(const ColumnGroup& g, int64_t features, uint32_t* out, int64_t stride) {
  i32_vec max{};
  for (int64_t f = 0; f < features; ++f) max = larger_magnitude(max, g.load(f));
  const f32_vec scale = scale_of(f32_vec(max)), inverse = 1.0f / scale;
  for (int64_t f = 0; f < features; f += 4, out += stride) {
    u32_vec bits[4] = {};
    for (int64_t i = 0; i < std::min<int64_t>(4, features - f); ++i) bits[i] = rounded_bits(g.load(f + i) * inverse);
    store_raw(out, pack_codes(bits[0], bits[1], bits[2], bits[3]));
  }
  return scale;
}

// Sums of products of four rows of signed codes with VECS vectors of inputs, which store(row, vector, sum) takes in
// fp32; lane l of row r is w[r * row + l * lane].
template <int VECS, class F>
inline void multiply_codes(const uint32_t* w, int64_t row, int64_t lane, int64_t lanes, const uint32_t* x, F&& store) {
  using L = LaneOps<RAREFY_I8>;
  typename L::acc sums[4][VECS];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) sums[r][t] = L::zero();
  const uint32_t *w1 = w + row, *w2 = w1 + row, *w3 = w2 + row;
#pragma GCC unroll 1
  for (int64_t l = 0; l < lanes; ++l, x += TILE_COLS) {
    const Weights codes[4] = {L::broadcast(w[l * lane]), L::broadcast(w1[l * lane]), L::broadcast(w2[l * lane]),
                              L::broadcast(w3[l * lane])};
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) {
      const auto in = L::load(x + t * SIMD_WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[r][t] = L::multiply_add(sums[r][t], in, codes[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < VECS; ++t) store(r, t, __builtin_convertvector(i32_vec(sums[r][t]), f32_vec));
}

// Scores of four keys: sums times the keys' factors, plus their shifts.
template <int VECS>
__attribute__((noinline)) void score_four(const uint32_t* keys, int64_t key_stride, int64_t lanes, const uint32_t* x,
                                          const float* factors, const float* shifts, float* scores) {
  multiply_codes<VECS>(keys, 1, key_stride, lanes, x, [&](int r, int t, f32_vec sum) {
    store_vec(scores + r * TILE_COLS + t * SIMD_WIDTH, sum * factors[r] + shifts[r]);
  });
}

// Four features of values weighted by some keys' weights, added to the sums so far, which are rescaled; null before the
// first keys.
template <int VECS>
__attribute__((noinline)) void add_four(const uint32_t* values, int64_t stride, int64_t lanes, const uint32_t* x,
                                        const float* scales, const float* rescale, float* sums) {
  multiply_codes<VECS>(values, stride, 1, lanes, x, [&](int r, int t, f32_vec sum) {
    float* out = sums + r * TILE_COLS + t * SIMD_WIDTH;
    sum *= scales[r];
    store_vec(out, rescale ? load_vec(out) * load_vec(rescale + t * SIMD_WIDTH) + sum : sum);
  });
}

struct Int8Attention {
  using L = LaneOps<RAREFY_I8>;
  using Inputs = L::input;

  Int8Attention(const rarefy_attention& a, int64_t sequence, int64_t head)
      : a(a),
        head_dim(a.head_dim),
        lanes((head_dim + 3) / 4),
        first(a.bounds ? a.bounds[2 * sequence] : sequence * a.seq_stride),
        first_key(a.bounds ? first : sequence * a.kv_seq_stride),
        queries(a.bounds ? a.bounds[2 * sequence + 1] : a.queries),
        q(a.q + head * head_dim * TILE_COLS),
        out(a.out + head * head_dim * TILE_COLS) {
    const int64_t kv_offset = head / (a.heads / a.kv_heads) * head_dim * TILE_COLS;
    k = a.k + kv_offset;
    v = a.v + kv_offset;
    mask = a.mask ? a.mask + sequence * a.mask_batch_stride + head * a.mask_head_stride : nullptr;
    const KeyRange visible = a.bounds ? KeyRange{0, queries} : visible_keys(a, mask);
    begin = visible.begin / 16 * 16;
    end = visible.end;
  }

  static int64_t padded_keys(const rarefy_attention& a) { return (a.keys + 63) / 64 * 64; }

  static int64_t words(const rarefy_attention& a) {
    const int64_t lanes = (a.head_dim + 3) / 4, keys = padded_keys(a);
    return keys * 2 + lanes * keys + lanes * keys + lanes * 4 + (lanes + lanes * 4) * TILE_COLS +
           (SCORED_KEYS + SCORED_KEYS / 4) * TILE_COLS;
  }

  void pack(uint32_t* memory) {
    key_stride = padded_keys(a);
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    codes = take(lanes * TILE_COLS);
    sums = reinterpret_cast<float*>(take(lanes * 4 * TILE_COLS));
    scores = reinterpret_cast<float*>(take(SCORED_KEYS * TILE_COLS));
    weights = take(SCORED_KEYS / 4 * TILE_COLS);
    keys = take(lanes * key_stride);
    values = take(lanes * key_stride);
    factors = reinterpret_cast<float*>(take(key_stride));
    shifts = reinterpret_cast<float*>(take(key_stride));
    value_scales = reinterpret_cast<float*>(take(lanes * 4));
    pack_keys();
    pack_values();
  }

  // The queries from `query`, a multiple of TILE_COLS, on.
  void attend(int64_t query) {
    alignas(64) float scales[TILE_COLS], max[TILE_COLS], sum[TILE_COLS] = {}, rescale[TILE_COLS];
    std::fill_n(max, TILE_COLS, MASKED);
    // without bounds columns up to the next multiple of 16 belong to the sequence
    const int64_t present = a.bounds ? queries : (queries + 15) / 16 * 16, count = std::min(TILE_COLS, present - query);
    for (int64_t n = 0; n < count; n += SIMD_WIDTH)
      store_vec(scales + n,
                quantize_group({q, a.q_stride, first + query + n, count - n}, head_dim, codes + n, TILE_COLS));
    for (int64_t key = begin; key < end; key += SCORED_KEYS) {
      const int64_t n = std::min(SCORED_KEYS, end - key);
      for_each_vector_group(count, [&](auto vectors, int64_t column) { score<vectors>(key, n, column); });
      softmax(key, n, query, count, scales, max, sum, rescale);
      for_each_vector_group(count, [&](auto vectors, int64_t column) {
        add_values<vectors>(key, n, column, key > begin ? rescale + column : nullptr);
      });
    }
    write(query, count, sum);
  }

 private:
  // Keys as signed codes [lanes][key_stride]; a score is (sum of products) factor + shift, times the query's scale.
  // Keys beyond the last one get no weight.
  void pack_keys() {
    for (int64_t key = begin; key < end; key += SIMD_WIDTH) {
      uint32_t* out = keys + key - begin;
      const f32_vec scale = quantize_group({k, a.k_stride, first_key + key, end - key}, head_dim, out, key_stride);
      auto total = L::zero();  // of codes times the zero point
      for (int64_t l = 0; l < lanes; ++l, out += key_stride) {
        store_raw(out, raw_vec(u32_vec(load_raw(out)) ^ PACKED_ZEROS));
        total = L::multiply_add(total, Inputs(u32_vec{} + PACKED_ZEROS), Weights(load_raw(out)));
      }
      const f32_vec factor = scale * (a.scale * LOG2_E);
      const f32_vec shift = __builtin_convertvector(i32_vec(total), f32_vec) * -factor;
      store_vec(factors + key - begin, factor);
      store_vec(shifts + key - begin, shift);
    }
    for (int64_t key = end - begin; key < (end - begin + 3) / 4 * 4; ++key) {
      factors[key] = 0.0f;
      shifts[key] = -INFINITY;
    }
  }

  // Values as signed codes: four keys to a lane, [lanes * 4 features][key_stride / 4].
  void pack_values() {
    constexpr int64_t STEP = 4 * SIMD_WIDTH;
    const int64_t count = end - begin;
    for (int64_t d = 0; d < lanes * 4; ++d) {
      uint32_t* out = values + d * (key_stride / 4);
      if (d >= head_dim) {  // rows of four
        std::fill_n(out, key_stride / 4, 0u);
        value_scales[d] = 1.0f;
        continue;
      }
      i32_vec max{};
      for (int64_t key = 0; key < count; key += SIMD_WIDTH)
        max = larger_magnitude(max, ColumnGroup(v, a.v_stride, first_key + begin + key, count - key).load(d));
      int32_t largest = 0;
      for (int i = 0; i < SIMD_WIDTH; ++i) largest = std::max(largest, int32_t(max[i]));
      value_scales[d] = scale_of(f32_vec(i32_vec{} + largest))[0];
      for (int64_t key = 0; key < count; key += STEP, out += SIMD_WIDTH) {
        alignas(64) float row[STEP] = {};
        for (int64_t n = 0; n < std::min(STEP, count - key); n += SIMD_WIDTH)
          store_vec(row + n, ColumnGroup(v, a.v_stride, first_key + begin + key + n, count - key - n).load(d));
        const raw_vec codes = L::pack(row, STEP, 1.0f / value_scales[d]);
        store_raw(out, raw_vec(u32_vec(codes) ^ PACKED_ZEROS));
      }
    }
  }

  template <int VECS>
  void score(int64_t key, int64_t count, int64_t column) {
    const int64_t at = key - begin;
    for (int64_t j = 0; j < count; j += 4)
      score_four<VECS>(keys + at + j, key_stride, lanes, codes + column, factors + at + j, shifts + at + j,
                       scores + j * TILE_COLS + column);
  }

  // As softmax_lanes, for weights in codes.
  void softmax(int64_t key, int64_t count, int64_t query, int64_t columns, const float* scales, float* max, float* sum,
               float* rescale) {
    const float* m = mask ? mask + key * a.mask_key_stride + query * a.mask_query_stride : nullptr;
    const int64_t rows = (count + 3) / 4 * 4;
    bool scaled = false, adds = false;
    if (m && a.mask_query_stride) {
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t n = 0; n < columns; n += SIMD_WIDTH)
          store_vec(scores + j * TILE_COLS + n, load_vec(scores + j * TILE_COLS + n) * load_vec(scales + n));
      mask_scores(a, m, key, count, query, columns, 1.0f, scores);
      scaled = true;
      m = nullptr;
    }
    for (int64_t j = 0; m && j < count; ++j) adds |= m[j * a.mask_key_stride] != 0.0f;
    float nan = 0.0f;  // or NaN, where a key has it
    for (int64_t j = 0; j < count; ++j) nan += factors[key - begin + j] * 0.0f;
    for (int64_t n = 0; n < columns; n += SIMD_WIDTH) {
      const f32_vec scale = scaled ? f32_vec{} + 1.0f : load_vec(scales + n), before = load_vec(max + n);
      f32_vec top = f32_vec{} - INFINITY;
      float* s = scores + n;
      if (adds) {
        for (int64_t j = 0; j < rows; ++j) {
          const f32_vec v =
              load_vec(s + j * TILE_COLS) * scale + (j < count ? m[j * a.mask_key_stride] * LOG2_E : 0.0f);
          store_vec(s + j * TILE_COLS, v);
          top = max_of(v, top);
        }
      } else {
        f32_vec largest[4] = {top, top, top, top};
        for (int64_t j = 0; j < rows; j += 4)
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) largest[i] = max_of(load_vec(s + (j + i) * TILE_COLS), largest[i]);
        top = max_of(max_of(largest[0], largest[1]), max_of(largest[2], largest[3])) * scale;
      }
      top = max_vec(top, before);
      const f32_vec factor = exp2_fast(before - top), inner = adds ? f32_vec{} + 1.0f : scale;
      const f32_vec shift = top - LOG2_LARGEST, largest_weight = f32_vec{} + LARGEST_WEIGHT;
      auto total = L::zero();
      for (int64_t j = 0; j < rows; j += 4, s += 4 * TILE_COLS) {
        u32_vec code[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i)
          code[i] = u32_vec(
              round_to_integers(min_of(exp2_fast(load_vec(s + i * TILE_COLS) * inner - shift), largest_weight)));
        const u32_vec lane = (code[0] | code[1] << 8) | (code[2] << 16 | code[3] << 24);
        store_raw(weights + j / 4 * TILE_COLS + n, raw_vec(lane));
        total = L::multiply_add(total, Inputs(lane), L::broadcast(0x01010101u));
      }
      f32_vec added = __builtin_convertvector(i32_vec(total), f32_vec);
      for (int i = 0; i < SIMD_WIDTH; ++i)
        if (top[i] <= MASKED) added[i] = weigh_alike(n + i, count);
      // infinite scores and keys with NaN make the sum NaN
      store_vec(sum + n, load_vec(sum + n) * factor + added + (load_vec(scales + n) * nan + (top - top)));
      store_vec(max + n, top);
      store_vec(rescale + n, factor);
    }
  }

  // A query that sees no key attends to all alike. Returns the sum of its weights.
  float weigh_alike(int64_t column, int64_t count) {
    auto* bytes = reinterpret_cast<uint8_t*>(weights + column);
    for (int64_t j = 0; j < count; ++j) bytes[j / 4 * TILE_COLS * 4 + j % 4] = 1;
    return float(count);
  }

  // Add the values of some keys to the sums so far, which are rescaled; null before the first keys.
  template <int VECS>
  void add_values(int64_t key, int64_t count, int64_t column, const float* rescale) {
    const int64_t row = key_stride / 4;
    for (int64_t d = 0; d < head_dim; d += 4)
      add_four<VECS>(values + d * row + (key - begin) / 4, row, (count + 3) / 4, weights + column, value_scales + d,
                     rescale, sums + d * TILE_COLS + column);
  }

  void write(int64_t query, int64_t count, const float* sum) {
    const int64_t column = first + query, lane = column % TILE_COLS, in_tile = TILE_COLS - lane;
    float *low = out + column / TILE_COLS * a.out_stride + lane, *high = low + a.out_stride - lane;
    alignas(64) float inverse[TILE_COLS];
    for (int64_t n = 0; n < TILE_COLS; ++n) inverse[n] = 1.0f / sum[n];
    for (int64_t d = 0; d < head_dim; ++d, low += TILE_COLS, high += TILE_COLS)
      for (int64_t n = 0; n < count; n += SIMD_WIDTH) {
        const f32_vec v = load_vec(sums + d * TILE_COLS + n) * load_vec(inverse + n);
        store_columns(v, std::min<int64_t>(SIMD_WIDTH, count - n), in_tile - n, low + n, high);
      }
  }

  const rarefy_attention& a;
  int64_t head_dim, lanes, first, first_key, queries, begin, end, key_stride;
  const float *q, *k, *v, *mask;
  float* out;
  uint32_t *codes, *keys, *values, *weights;
  float *scores, *sums, *factors, *shifts, *value_scales;
};

int64_t int8_attention_words(const rarefy_attention& a) { return Int8Attention::words(a); }

// One head of one sequence, for its queries from `from` to `to`, of which `from` is a multiple of TILE_COLS.
void int8_attention(const rarefy_attention& a, int64_t sequence, int64_t head, int64_t from, int64_t to,
                    uint32_t* memory) {
  Int8Attention attention(a, sequence, head);
  attention.pack(memory);
  for (int64_t query = from; query < to; query += TILE_COLS) attention.attend(query);
}

}  // namespace
