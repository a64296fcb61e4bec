// Products with sparse weights: bitmasks, single values (CSR), tiles of four rows.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// ---- bitmask, small batches ----------------------------------------------------------------------------------------
// Four rows by 64 columns at a time: their values lie one after the other, so memory is read in one stream. Where each
// cell's values begin is counted from the beginning of its panel, so cells do not wait for each other.

template <int KIND, int M>
inline void bit_rows(const rarefy_bitmask& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  using B = Bits<KIND>;
  typename B::sum sum[R4][M];
#pragma GCC unroll 4
  for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[r][m] = B::zero();
  const uint64_t* mask = w.masks + row * w.words;
  const auto* value = static_cast<const typename B::value*>(w.values) + w.starts[row / R4];
  const auto none = B::none();
  const auto* in = static_cast<const typename B::input*>(x);
  for (int64_t word = 0; word < w.words; ++word, in += 64, mask += R4) {
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r) {
#pragma GCC unroll 4
      for (int part = 0; part < 64; part += B::cell) {
        const auto* from = part ? value + __builtin_popcountll(mask[r] << (64 - part)) : value;
        const auto wide = B::expand(none, reinterpret_cast<const char*>(mask + r) + part / 8, from);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[r][m] = B::step(sum[r][m], wide, in + m * ldx + part);
      }
      value += __builtin_popcountll(mask[r]);
      ahead(value);
    }
    ahead(mask);
  }
  for (int r = 0; r < R4 && row + r < w.rows; ++r)
    for (int m = 0; m < M; ++m) y[m * ldy + row + r] = B::total(sum[r][m]);
}

// The same for int4: 64 values become bytes in a register, and their integer products are scaled as a group.
template <int M>
inline void nibble_rows(const rarefy_bitmask& w, int64_t row, const void* x, int64_t ldx, float* y, int64_t ldy) {
  FloatSums::sum sum[R4][M];
#pragma GCC unroll 4
  for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[r][m] = FloatSums::zero();
  const uint64_t* mask = w.masks + row * w.words;
  const uint8_t* value = static_cast<const uint8_t*>(w.values) + w.starts[row / R4];
  const uint16_t* scale = static_cast<const uint16_t*>(w.scales) + row * w.words;
  const auto none = Nibbles::none();
  const uint8_t* in = static_cast<const uint8_t*>(x);
  for (int64_t word = 0; word < w.words; ++word, in += 64, mask += R4, scale += R4) {
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r) {
      const auto wide = Nibbles::expand(none, mask + r, value);
      const float by = from_bf16(scale[r]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[r][m] = Nibbles::step(sum[r][m], wide, in + m * ldx, by);
      value += (__builtin_popcountll(mask[r]) + 1) / 2;
    }
    ahead(value);
    ahead(mask);
  }
  for (int r = 0; r < R4 && row + r < w.rows; ++r)
    for (int m = 0; m < M; ++m) y[m * ldy + row + r] = FloatSums::total(sum[r][m]);
}

template <int KIND, int M>
void bit_range(const rarefy_bitmask& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t row = from; row < to; row += R4)
    if constexpr (KIND == RAREFY_I4)
      nibble_rows<M>(w, row, x, ldx, y, ldy);
    else
      bit_rows<KIND, M>(w, row, x, ldx, y, ldy);
}

// Rows `from`..`to` (from: of fours) for n inputs, four of these at a time.
template <int KIND>
void bit_any(const rarefy_bitmask& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy,
             int64_t n) {
  const auto* in = static_cast<const typename Bits<KIND == RAREFY_I4 ? int(RAREFY_I8) : KIND>::input*>(x);
  for (; n > 0; n -= 4, in += 4 * ldx, y += 4 * ldy) {
    if (n >= 4)
      bit_range<KIND, 4>(w, from, to, in, ldx, y, ldy);
    else if (n == 3)
      bit_range<KIND, 3>(w, from, to, in, ldx, y, ldy);
    else if (n == 2)
      bit_range<KIND, 2>(w, from, to, in, ldx, y, ldy);
    else
      bit_range<KIND, 1>(w, from, to, in, ldx, y, ldy);
  }
}

// ---- single values, high sparsity ----------------------------------------------------------------------------------
// One row after the other, each value times M inputs that lie side by side. Sums are many, so that products do not wait
// for each other; gathering a vector of inputs is slower than loads one by one.

inline float wide(float v) { return v; }
inline float wide(uint16_t v) { return from_bf16(v); }
inline float wide(int8_t v) { return v; }

template <int M>
struct side_by_side {
  typedef float type __attribute__((vector_size(M * 4)));
};
template <>
struct side_by_side<1> {
  typedef float type;
};

// y[m][row] for rows `from`..`to`, `some` of M inputs x[column][M].
template <class T, int M>
void csr_rows(const rarefy_csr& w, int64_t from, int64_t to, const float* x, float* y, int64_t ldy, int64_t some) {
  using V = typename side_by_side<M>::type;
  constexpr int S = 8;
  for (int64_t row = from; row < to; ++row) {
    const int64_t size = w.starts[row + 1] - w.starts[row];
    const T* value = static_cast<const T*>(w.values) + w.starts[row];
    const uint16_t* column = w.columns + w.starts[row];
    V sum[S] = {}, in;
    int64_t k = 0;
    for (; k + S <= size; k += S) {
      ahead(value + k);
      ahead(column + k);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        std::memcpy(&in, x + column[k + s] * int64_t(M), sizeof in);
        sum[s] += in * wide(value[k + s]);
      }
    }
    for (; k < size; ++k) {
      std::memcpy(&in, x + column[k] * int64_t(M), sizeof in);
      sum[0] += in * wide(value[k]);
    }
    V total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    if (w.scales) total *= w.scales[row];
    float out[M];
    std::memcpy(out, &total, sizeof out);
    for (int64_t m = 0; m < some; ++m) y[m * ldy + row] = out[m];
  }
}

template <int M>
void csr_any(const rarefy_csr& w, int64_t from, int64_t to, const float* x, float* y, int64_t ldy, int64_t some) {
  switch (w.kind) {
    case RAREFY_F32: return csr_rows<float, M>(w, from, to, x, y, ldy, some);
    case RAREFY_BF16: return csr_rows<uint16_t, M>(w, from, to, x, y, ldy, some);
    default: return csr_rows<int8_t, M>(w, from, to, x, y, ldy, some);
  }
}

// ---- tiles, larger batches ----------------------------------------------------------------------------------------
// The columns of a tile of four rows come sorted by pattern (which of the four have a value there): fifteen loops
// without a branch, T vectors of inputs loaded once and used by every row of the pattern.

template <int KIND, int T, int P>
inline void pattern(typename Lanes<KIND>::sum (&c)[R4][T], const uint32_t* x, int64_t count, const uint16_t*& column,
                    const uint32_t*& value) {
  using L = Lanes<KIND>;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* from = x + int64_t(*column++) * NT;
    typename L::input in[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) in[t] = L::load(from + t * W);
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r)
      if (P >> r & 1) {
        const auto wide = L::spread(*value++);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) c[r][t] = L::step(c[r][t], in[t], wide);
      }
  }
}

template <int KIND, int T>
inline void tile(typename Lanes<KIND>::sum (&c)[R4][T], const uint32_t* x, const uint16_t* counts,
                 const uint16_t*& column, const uint32_t*& value) {
  pattern<KIND, T, 1>(c, x, counts[1], column, value);
  pattern<KIND, T, 2>(c, x, counts[2], column, value);
  pattern<KIND, T, 3>(c, x, counts[3], column, value);
  pattern<KIND, T, 4>(c, x, counts[4], column, value);
  pattern<KIND, T, 5>(c, x, counts[5], column, value);
  pattern<KIND, T, 6>(c, x, counts[6], column, value);
  pattern<KIND, T, 7>(c, x, counts[7], column, value);
  pattern<KIND, T, 8>(c, x, counts[8], column, value);
  pattern<KIND, T, 9>(c, x, counts[9], column, value);
  pattern<KIND, T, 10>(c, x, counts[10], column, value);
  pattern<KIND, T, 11>(c, x, counts[11], column, value);
  pattern<KIND, T, 12>(c, x, counts[12], column, value);
  pattern<KIND, T, 13>(c, x, counts[13], column, value);
  pattern<KIND, T, 14>(c, x, counts[14], column, value);
  pattern<KIND, T, 15>(c, x, counts[15], column, value);
}

// Tiles `from`..`to` on T vectors of the inputs of block `b`; `out` is [4 (to - from)][NT] sums.
template <int KIND, int T>
void tiles_part(const rarefy_tiles& w, int64_t b, int64_t from, int64_t to, const uint32_t* x, uint32_t* out) {
  using L = Lanes<KIND>;
  const int64_t blocks = (w.cols + w.block - 1) / w.block;
  for (int64_t t = from; t < to; ++t, out += R4 * NT) {
    const int64_t at = t * blocks + b;
    const uint16_t* column = w.columns + w.starts[2 * at];
    const uint32_t* value = w.values + w.starts[2 * at + 1];
    typename L::sum c[R4][T];
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < T; ++v) c[r][v] = b ? L::sum_at(out + r * NT + v * W) : L::zero();
    tile<KIND, T>(c, x, w.counts + at * 16, column, value);
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < T; ++v) L::store(out + r * NT + v * W, c[r][v]);
  }
}

// `columns` of the inputs are in use.
template <int KIND>
void tiles_block(const rarefy_tiles& w, int64_t b, int64_t from, int64_t to, const uint32_t* x, uint32_t* out,
                 int64_t columns) {
  by_vectors(columns, [&](auto size, int64_t at) { tiles_part<KIND, size>(w, b, from, to, x + at, out + at); });
}

// Blocks of columns go round outside, so that the inputs of a block stay in the first cache for all the tiles.
template <int KIND>
void tiles_any(const rarefy_tiles& w, int64_t from, int64_t to, const uint32_t* x, uint32_t* out, int64_t columns) {
  for (int64_t b = 0; b * w.block < w.cols; ++b)
    tiles_block<KIND>(w, b, from, to, x + b * w.block * NT, out, columns);
}

}  // namespace
