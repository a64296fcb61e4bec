// Quantized weights times 12 to 32 inputs with an int8 scale for each 32 features, as the steps of several sequences
// have them. Weights are read where they lie, in cells of 64 codes: what is loaded is not stored again.
//
// A narrow tile of inputs is as wide as there are columns, a multiple of a vector: signed codes in lanes
// [blocks][16][width], then for each 8 lanes the scales of the columns, and the sums of their codes times -128.
#pragma once
#include <cstdint>
#include <cstring>

#include "dense_gemm.hpp"
#include "kernel_table.h"
#include "simd512.hpp"

namespace {

constexpr int64_t CELL = 64, PANEL = TILE_ROWS * CELL;  // bytes: codes of a row in a block, and of four rows

// The codes of four rows from `row` on as bytes in cells, [blocks][4][64]: signed ones, or such without a sign, in
// eighths, where zero points have a fraction.
template <int BITS>
void code_cells(const rarefy_quantized& w, int64_t row, uint8_t* out) {
  const QuantizedOps<BITS> ops{w.scale_groups};
  const int64_t first = row * w.col_blocks;
  const uint8_t* values = static_cast<const uint8_t*>(w.values);
  for (int64_t cell = first; cell < first + TILE_ROWS * w.col_blocks; ++cell, out += CELL) {
    const int64_t r = cell % TILE_ROWS;
    __builtin_prefetch(values + cell * 8 * BITS + PREFETCH_BYTES, 0, 3);
    const __m512i codes = ops.load(values + (cell - r) * 8 * BITS, r, ops.zero_points(loaded_zeros(w, cell)));
    _mm512_storeu_si512(out, w.zero_bits ? _mm512_slli_epi16(codes, 3) : codes);
  }
}

// Cells of four rows of a weight of less than 8 bits.
void decompress_cells(const rarefy_quantized& w, int64_t row, uint8_t* out) {
  if (w.dtype == RAREFY_I4) return code_cells<4>(w, row, out);
  if (w.dtype == RAREFY_I5) return code_cells<5>(w, row, out);
  code_cells<6>(w, row, out);
}

// ROWS rows, four or eight, times VECS vectors of inputs. `scales`, `zeros`: of the first row and block.
template <int ROWS, int VECS, int GROUPS, bool EIGHTHS>
inline void narrow_rows(const rarefy_quantized& w, const uint8_t* cells, const uint16_t* scales, const uint8_t* zeros,
                        const uint32_t* x, float* out) {
  constexpr int64_t WIDTH = VECS * SIMD_WIDTH;
  const int64_t blocks = w.col_blocks, panel = blocks * PANEL, stride = blocks * TILE_ROWS * GROUPS;
  const uint32_t* header = x + blocks * DENSE_LANES * WIDTH;
  const __m512i offset = in_register(_mm512_set1_epi32(int(0x80808080u)));
  alignas(64) int32_t weights[ROWS][16];  // of a block, without a sign
  __m512 sums[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < VECS; ++t) sums[r][t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, cells += PANEL, scales += TILE_ROWS * GROUPS) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* cell = cells + r / 4 * panel + r % 4 * CELL;
      __builtin_prefetch(cell + ROWS / TILE_ROWS * panel, 0, 2);
      const __m512i codes = _mm512_loadu_si512(cell);
      _mm512_store_si512(weights[r], EIGHTHS ? codes : _mm512_xor_si512(codes, offset));
    }
    for (int64_t part = 0; part < 2; ++part, header += 2 * WIDTH) {
      const auto group = [&](int r) { return r / 4 * stride + r % 4 * GROUPS + (GROUPS == 2 ? part : 0); };
      __m512i acc[ROWS][VECS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int t = 0; t < VECS; ++t) {
          acc[r][t] = _mm512_loadu_si512(header + WIDTH + t * SIMD_WIDTH);
          if constexpr (EIGHTHS)
            acc[r][t] = _mm512_mullo_epi32(_mm512_srai_epi32(acc[r][t], 7), _mm512_set1_epi32(zeros[group(r)]));
        }
#pragma GCC unroll 8
      for (int64_t l = 0; l < 8; ++l, x += WIDTH) {
        __m512i in[VECS];
#pragma GCC unroll 2
        for (int t = 0; t < VECS; ++t) in[t] = _mm512_loadu_si512(x + t * SIMD_WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m512i codes = _mm512_set1_epi32(weights[r][part * 8 + l]);
#pragma GCC unroll 2
          for (int t = 0; t < VECS; ++t) acc[r][t] = in_register(_mm512_dpbusd_epi32(acc[r][t], codes, in[t]));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int t = 0; t < VECS; ++t) {
          __m512 v = _mm512_cvtepi32_ps(acc[r][t]);
          if constexpr (GROUPS != 0) v = _mm512_mul_ps(v, _mm512_set1_ps(from_bf16(scales[group(r)])));
          sums[r][t] = _mm512_fmadd_ps(v, _mm512_castsi512_ps(_mm512_loadu_si512(header + t * SIMD_WIDTH)), sums[r][t]);
        }
    }
    if constexpr (EIGHTHS) zeros += TILE_ROWS * GROUPS;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int t = 0; t < VECS; ++t) _mm512_storeu_ps(out + r * TILE_COLS + t * SIMD_WIDTH, sums[r][t]);
}

template <int VECS, int GROUPS, bool EIGHTHS = false>
void narrow_sums(const rarefy_quantized& w, int64_t row, int64_t rows, const uint8_t* cells, const uint32_t* x,
                 float* out) {
  constexpr int TOGETHER = VECS == 1 ? 8 : TILE_ROWS;  // sums enough to hide the latency of products
  const auto multiply = [&](auto count, int64_t r) {
    const int64_t first = (row + r) * w.col_blocks * GROUPS;
    narrow_rows<count, VECS, GROUPS, EIGHTHS>(w, cells + r * w.col_blocks * CELL, w.scales + first,
                                              EIGHTHS ? w.zeros + first : nullptr, x, out + r * TILE_COLS);
  };
  int64_t r = 0;
  for (; r + TOGETHER <= rows; r += TOGETHER) multiply(std::integral_constant<int, TOGETHER>{}, r);
  if (r < rows) multiply(std::integral_constant<int, TILE_ROWS>{}, r);
}

// Rows `row` on, a multiple of four, whose codes are in `cells`, times a narrow tile: sums [rows][TILE_COLS], without
// the weight's scales of rows.
void multiply_narrow(const rarefy_quantized& w, int64_t row, int64_t rows, const uint8_t* cells, const uint32_t* x,
                     int64_t columns, float* out) {
  const auto with_vectors = [&](auto vectors) {
    if (w.zero_bits) return narrow_sums<vectors, 2, true>(w, row, rows, cells, x, out);
    if (w.scale_groups == 2) return narrow_sums<vectors, 2>(w, row, rows, cells, x, out);
    if (w.scale_groups == 1) return narrow_sums<vectors, 1>(w, row, rows, cells, x, out);
    narrow_sums<vectors, 0>(w, row, rows, cells, x, out);
  };
  if (columns > SIMD_WIDTH)
    with_vectors(std::integral_constant<int, 2>{});
  else
    with_vectors(std::integral_constant<int, 1>{});
}

}  // namespace
