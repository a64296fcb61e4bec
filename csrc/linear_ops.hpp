// Linear layers on column tiles, for each weight format.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

constexpr int64_t DECOMPRESSED_ROWS = 32;  // rows that are decompressed at a time
constexpr int64_t DECOMPRESSED_TILES = 4;  // column tiles that they are multiplied by
constexpr int64_t DENSE_ROWS_PER_CALL = 32;
constexpr int64_t INT16_BLOCKS = INT16_COLUMNS / 32;  // of lanes of int16, whose sums fit 32 bits

// What the formats have in common.
struct LinearWeight {
  explicit LinearWeight(const rarefy_step& s) {
    switch (s.format) {
      case RAREFY_TILES: set_sparse(*static_cast<const rarefy_tiles*>(s.weight)); break;
      case RAREFY_SELL: set_sparse(*static_cast<const rarefy_sell*>(s.weight)); break;
      case RAREFY_DENSE: {
        const auto& w = *static_cast<const rarefy_dense*>(s.weight);
        rows = w.rows;
        dtype = w.dtype;
        cols = w.cols;
        epilogue = {w.scales, w.row_sums, w.bias, w.act};
        break;
      }
      case RAREFY_BITMASK: {
        const auto& w = *static_cast<const rarefy_bitmask*>(s.weight);
        rows = w.rows;
        dtype = w.dtype;
        col_blocks = w.col_blocks;
        cols = w.cols;
        const bool int8 = dtype == RAREFY_I8;
        epilogue = {int8 ? static_cast<const float*>(w.scales) : nullptr,
                    int8 ? static_cast<const int32_t*>(w.row_sums) : nullptr, w.bias, w.act};
        break;
      }
      default: {
        const auto& w = *static_cast<const rarefy_quantized*>(s.weight);
        rows = w.rows;
        dtype = !w.scale_groups && !w.fp32_inputs ? RAREFY_I8 : s.dtype;
        col_blocks = w.col_blocks;
        cols = w.cols;
        two_terms = w.two_terms && dtype == RAREFY_I8;
        epilogue = {w.row_scales, s.row_sums, w.bias, w.act};
      }
    }
  }
  template <class T>
  void set_sparse(const T& w) {
    rows = w.rows;
    lanes = w.lanes;
    dtype = w.dtype;
    epilogue = {w.scales, w.row_sums, w.bias, w.act};
  }
  int64_t rows, col_blocks = 0, cols = 0, lanes = 0;
  int32_t dtype;           // of the multiplication
  bool two_terms = false;  // of int8 inputs
  rarefy_weight_epilogue epilogue;
};

// Formats for few inputs are decompressed for column tiles.
inline bool is_decompressed(const rarefy_step& s) { return s.format == RAREFY_BITMASK || s.format == RAREFY_QUANTIZED; }

// Weights of bf16, int8 and int16 whose inputs are lanes; their steps write codes as well as fp32.
inline bool is_in_lanes(const rarefy_step& s) { return !is_decompressed(s) && LinearWeight(s).dtype != RAREFY_F32; }

inline int64_t linear_parts(const rarefy_step& s, int64_t tiles) {
  if (s.whole_columns) return tiles;
  return is_decompressed(s) ? ceil_div(tiles, DECOMPRESSED_TILES) * ceil_div(s.features, DECOMPRESSED_ROWS)
                            : tiles * ceil_div(s.features, SLAB_ROWS);
}

// Some rows of a weight of bf16 or int8, in blocks, times one column tile. Inputs of two terms are multiplied one after
// the other.
inline void multiply_blocks(const rarefy_kernel_table& t, int32_t dtype, const uint32_t* values, int64_t lane_blocks,
                            bool two_terms, const uint32_t* x, int64_t columns, rarefy_tile_epilogue e, float* out) {
  alignas(64) uint32_t sums[DECOMPRESSED_ROWS * TILE_COLS];
  const DenseSection section(t);
  const auto multiply = [&](const uint32_t* in, const rarefy_tile_epilogue& epilogue) {
    t.dense_lanes[lane_index(dtype)](values, lane_blocks, ceil_div(e.rows, 16) * 16, in, sums, columns);
    t.store_outputs[lane_index(dtype)](
        epilogue, sums,
        {.out = out, .absmax = nullptr, .bf16 = nullptr, .codes = nullptr, .inverse_scale = 0.0f, .zero = 0});
  };
  if (two_terms) {
    alignas(64) float lost_scales[TILE_COLS];
    for (int64_t n = 0; n < TILE_COLS; ++n) lost_scales[n] = e.col_scales[n] / LOST_STEPS;
    rarefy_tile_epilogue lost = e;
    lost.bias = nullptr;
    lost.act = RAREFY_NONE;
    lost.col_scales = lost_scales;
    multiply(x + lane_blocks * 16 * TILE_COLS, lost);
    e.residual = out;
  }
  multiply(x, e);
}

// As multiply_blocks, of joined terms: as many columns at a time as fit sums of 32 bits.
inline void multiply_joined(const rarefy_kernel_table& t, const uint32_t* values, int64_t lane_blocks,
                            const uint32_t* x, int64_t columns, rarefy_tile_epilogue e, float* out) {
  alignas(64) uint32_t sums[DECOMPRESSED_ROWS * TILE_COLS];
  alignas(64) float scales[TILE_COLS];
  for (int64_t n = 0; n < TILE_COLS; ++n) scales[n] = e.col_scales[n] / LOST_STEPS;
  e.col_scales = scales;
  constexpr int64_t step = JOINED_TILE_COLUMNS / 32;
  for (int64_t b = 0; b < lane_blocks; b += step) {
    for (int64_t r = 0; r < e.rows; r += 16)
      t.dense_lanes[lane_index(RAREFY_I16)](values + (r * lane_blocks + b * 16) * 16, std::min(step, lane_blocks - b),
                                            16, x + b * 16 * TILE_COLS, sums + r * TILE_COLS, columns);
    rarefy_tile_epilogue part = e;
    if (b + step < lane_blocks) {
      part.bias = nullptr;
      part.act = RAREFY_NONE;
    }
    t.store_outputs[lane_index(RAREFY_I16)](
        part, sums,
        {.out = out, .absmax = nullptr, .bf16 = nullptr, .codes = nullptr, .inverse_scale = 0.0f, .zero = 0});
    e.residual = out;
  }
}

// Some rows of a quantized weight, decompressed to codes plus 128, times a column tile with scales of blocks.
inline void multiply_scaled_blocks(const rarefy_kernel_table& t, const rarefy_quantized& w, int64_t row,
                                   const uint32_t* values, const uint32_t* x, int64_t columns, rarefy_tile_epilogue e,
                                   float* out) {
  alignas(64) float sums[DECOMPRESSED_ROWS * TILE_COLS], ones[TILE_COLS];
  std::fill_n(ones, TILE_COLS, 1.0f);
  t.multiply_blocked(w, row, values, ceil_div(e.rows, TILE_ROWS) * TILE_ROWS, x, columns, sums);
  e.col_scales = ones;
  const int32_t stored = e.row_scales ? RAREFY_F32 : RAREFY_BF16;  // with their scales, or as they are
  t.store_outputs[lane_index(stored)](
      e, reinterpret_cast<const uint32_t*>(sums),
      {.out = out, .absmax = nullptr, .bf16 = nullptr, .codes = nullptr, .inverse_scale = 0.0f, .zero = 0});
}

// Decompress some rows of a weight once and multiply several column tiles by them.
inline int run_decompressed_linear(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const LinearWeight w(s);
  const int64_t chunks = ceil_div(w.rows, DECOMPRESSED_ROWS), row = part % chunks * DECOMPRESSED_ROWS;
  const int64_t first_tile = part / chunks * DECOMPRESSED_TILES, rows = std::min(DECOMPRESSED_ROWS, w.rows - row);
  const int64_t row_tiles = ceil_div(rows, TILE_ROWS), tile_stride = w.col_blocks * 64 * TILE_ROWS;
  const bool quantized = s.format == RAREFY_QUANTIZED;
  // bf16 and int8 in blocks of 16 rows by 16 lanes; other formats of bf16 become fp32
  const bool blocks = w.dtype == RAREFY_I8 || (quantized && w.dtype == RAREFY_BF16);
  const bool joined = w.two_terms && t.decompress_joined, blocked = s.two_terms == 2;
  const int64_t lane_blocks = w.col_blocks * (w.dtype == RAREFY_I8 && !joined ? 1 : 2);
  const ScratchBuffer<1> scratch(size_t(DECOMPRESSED_ROWS * (blocks ? lane_blocks * 16 : w.col_blocks * 64)) * 4);
  uint32_t* values = static_cast<uint32_t*>(scratch.data);
  if (!values) return RAREFY_NO_MEMORY;
  for (int64_t i = 0; i < row_tiles; ++i) {
    const int64_t r = i * TILE_ROWS;
    uint32_t* first = values + (blocks ? (r / 16 * lane_blocks * 16 + r % 16) * 16 : i * tile_stride);
    if (quantized)
      (blocked  ? t.decompress_offset
       : joined ? t.decompress_joined
                : t.decompress_quantized[w.dtype])(*static_cast<const rarefy_quantized*>(s.weight), row + r, first);
    else
      t.decompress_bitmask[w.dtype](*static_cast<const rarefy_bitmask*>(s.weight), row + r, first);
  }
  const int64_t end_tile = std::min(first_tile + DECOMPRESSED_TILES, ceil_div(s.columns, TILE_COLS));
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const auto* x = reinterpret_cast<const uint32_t*>(tile_of(s.x, tile));
    const int64_t columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS);
    const float* col_scales = s.in_scales.data ? s.in_scales.data + tile * TILE_COLS : nullptr;
    const rarefy_tile_epilogue epilogue =
        tile_epilogue(w.epilogue, row, rows, col_scales, optional_rows(s.residual, tile, row), 0, columns_of(s, tile));
    float* out = tile_of(s.out, tile) + row * TILE_COLS;
    if (blocked) {
      multiply_scaled_blocks(t, *static_cast<const rarefy_quantized*>(s.weight), row, values, x, columns, epilogue,
                             out);
    } else if (joined) {
      multiply_joined(t, values, lane_blocks, x, columns, epilogue, out);
    } else if (blocks) {
      multiply_blocks(t, w.dtype, values, lane_blocks, w.two_terms, x, columns, epilogue, out);
    } else {
      t.dense_gemm(values, tile_stride, row_tiles, w.cols, x, reinterpret_cast<uint32_t*>(out), columns);
      apply_epilogue(t, epilogue, false, out);
    }
  }
  return RAREFY_OK;
}

// Compute rows `first`..`end` of a column tile, `size` at a time, from the sums that multiply(row, rows, sums) finds,
// and store their outputs: in `out`, in the step's codes of bf16 or with one scale, and in out_absmax, where it has
// them. `absmax`: the columns' largest magnitudes, or null.
template <int64_t SIZE, class F>
inline void store_rows(const rarefy_kernel_table& t, const rarefy_step& s, int32_t dtype,
                       const rarefy_weight_epilogue& w, int64_t tile, int64_t first, int64_t end,
                       const float* col_scales, float* out, float* absmax, F&& multiply) {
  alignas(64) uint32_t sums[SIZE * TILE_COLS];
  alignas(64) float slab_absmax[TILE_COLS] = {};
  float* max = absmax ? absmax : s.out_absmax.data ? slab_absmax : nullptr;
  uint32_t* bf16 = s.out_codes.data && s.codes_dtype == RAREFY_BF16 ? codes_of(s, tile) : nullptr;
  uint32_t* codes = s.out_codes.data && s.codes_scale != 0.0f ? codes_of(s, tile) : nullptr;
  for (int64_t row = first; row < end; row += SIZE) {
    const int64_t rows = std::min(SIZE, end - row);
    multiply(row, rows, sums);
    t.store_outputs[lane_index(dtype)](
        tile_epilogue(w, row, rows, col_scales, optional_rows(s.residual, tile, row), s.in_zero, columns_of(s, tile)),
        sums,
        {.out = out ? out + row * TILE_COLS : nullptr,
         .absmax = max,
         .bf16 = bf16 ? bf16 + row / 2 * TILE_COLS : nullptr,
         .codes = codes ? codes + row / 4 * TILE_COLS : nullptr,
         .inverse_scale = codes ? 1.0f / s.codes_scale : 0.0f,
         .zero = s.codes_zero});
    if (s.out_absmax.data && ((row + rows) % SLAB_ROWS == 0 || row + rows == end)) {
      std::copy_n(max, TILE_COLS, tile_of(s.out_absmax, tile) + row / SLAB_ROWS * TILE_COLS);
      if (!absmax) std::fill_n(max, TILE_COLS, 0.0f);
    }
  }
}

// Whether a dense weight has more columns than sums of int16 have room for; then they are added as fp32 numbers.
inline bool is_summed_in_parts(int32_t dtype, int64_t lane_blocks) {
  return dtype == RAREFY_I16 && lane_blocks > INT16_BLOCKS;
}

// The sums of some rows of a dense weight: multiply(values, blocks, rows, first block, sums) has those of `blocks`
// blocks of lanes. `values` are those of the first row.
template <class F>
inline void sum_dense_rows(const rarefy_kernel_table& t, int32_t dtype, const uint32_t* values, int64_t lane_blocks,
                           int64_t rows, uint32_t* sums, F&& multiply) {
  if (!is_summed_in_parts(dtype, lane_blocks)) return multiply(values, lane_blocks, ceil_div(rows, 16) * 16, 0, sums);
  alignas(64) uint32_t part[16 * TILE_COLS] = {};
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t b = 0; b < lane_blocks; b += INT16_BLOCKS) {
      multiply(values + (r * lane_blocks + b * 16) * 16, std::min(INT16_BLOCKS, lane_blocks - b), 16, b, part);
      t.add_sums(part, 16 * TILE_COLS, b > 0, reinterpret_cast<float*>(sums + r * TILE_COLS));
    }
}

// As store_rows, for a dense weight times few columns. The caller may hold memory of slot 1.
inline int store_few_columns(const rarefy_kernel_table& t, const rarefy_step& s, int32_t dtype, const uint32_t* values,
                             int64_t lane_blocks, const rarefy_weight_epilogue& w, const uint32_t* x, int64_t tile,
                             int64_t first, int64_t end, int64_t columns, const float* col_scales, float* out,
                             float* absmax) {
  const int64_t lanes = lane_blocks * 16;
  const ScratchBuffer<3> scratch(size_t(columns * lanes) * 4);
  uint32_t* rows_of_lanes = static_cast<uint32_t*>(scratch.data);
  if (!rows_of_lanes) return RAREFY_NO_MEMORY;
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < lanes; ++l) rows_of_lanes[n * lanes + l] = x[l * TILE_COLS + n];
  const auto multiply = [&](const uint32_t* from, int64_t blocks, int64_t rows, int64_t block, uint32_t* sums) {
    for (int64_t n = 0; n < columns; ++n)
      t.lanes_gemv[lane_index(dtype)](from, blocks, rows, rows_of_lanes + n * lanes + block * 16, sums + n);
  };
  const int32_t stored = is_summed_in_parts(dtype, lane_blocks) ? RAREFY_F32 : dtype;
  store_rows<DENSE_ROWS_PER_CALL>(t, s, stored, w, tile, first, end, col_scales, out, absmax,
                                  [&](int64_t row, int64_t rows, uint32_t* sums) {
                                    sum_dense_rows(t, dtype, values + row * lanes, lane_blocks, rows, sums, multiply);
                                  });
  return RAREFY_OK;
}

// As store_rows, for a dense weight.
inline void store_dense_rows(const rarefy_kernel_table& t, const rarefy_step& s, int32_t dtype, const uint32_t* values,
                             int64_t lane_blocks, const rarefy_weight_epilogue& w, const uint32_t* x, int64_t tile,
                             int64_t first, int64_t end, int64_t columns, const float* col_scales, float* out,
                             float* absmax) {
  const DenseSection section(t);
  const auto multiply = [&](const uint32_t* from, int64_t blocks, int64_t rows, int64_t block, uint32_t* sums) {
    t.dense_lanes[lane_index(dtype)](from, blocks, rows, x + block * 16 * TILE_COLS, sums, columns);
  };
  const int32_t stored = is_summed_in_parts(dtype, lane_blocks) ? RAREFY_F32 : dtype;
  store_rows<DENSE_ROWS_PER_CALL>(
      t, s, stored, w, tile, first, end, col_scales, out, absmax, [&](int64_t row, int64_t rows, uint32_t* sums) {
        sum_dense_rows(t, dtype, values + row * lane_blocks * 16, lane_blocks, rows, sums, multiply);
      });
}

// Sums of some rows of a sparse weight, from the start of a slab on.
inline void multiply_sparse(const rarefy_kernel_table& t, const rarefy_step& s, int64_t row, int64_t rows,
                            const uint32_t* x, uint32_t* sums, int64_t columns) {
  if (s.format == RAREFY_SELL) {
    const auto& w = *static_cast<const rarefy_sell*>(s.weight);
    t.sell_spmm[lane_index(w.dtype)](w, row / SLAB_ROWS, x, sums, columns, nullptr);
  } else {
    const auto& w = *static_cast<const rarefy_tiles*>(s.weight);
    t.tiles_spmm[lane_index(w.dtype)](w, row / TILE_ROWS, ceil_div(row + rows, TILE_ROWS), x, sums, columns);
  }
}

// As store_rows, for a sparse weight, from the start of a slab on.
inline void store_sparse_rows(const rarefy_kernel_table& t, const rarefy_step& s, const LinearWeight& w,
                              const uint32_t* x, int64_t tile, int64_t first, int64_t end, int64_t columns,
                              const float* col_scales, float* out, float* absmax) {
  store_rows<SLAB_ROWS>(
      t, s, w.dtype, w.epilogue, tile, first, end, col_scales, out, absmax,
      [&](int64_t row, int64_t rows, uint32_t* sums) { multiply_sparse(t, s, row, rows, x, sums, columns); });
}

// A slab of rows, or with whole_columns all rows, of one column tile.
inline int run_lanes_linear(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const LinearWeight w(s);
  const int64_t size = s.whole_columns ? s.features : SLAB_ROWS, slabs = ceil_div(s.features, size);
  const int64_t tile = part / slabs, first = part % slabs * size, end = std::min(first + size, s.features);
  const int64_t columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS);
  const bool quantizes = s.out_codes.data && s.codes_dtype != RAREFY_BF16 && s.codes_scale == 0.0f;
  const ScratchBuffer<1> scratch(size_t(quantizes && !s.out.data ? s.features * TILE_COLS : 1) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  float* out = s.out.data ? tile_of(s.out, tile) : quantizes ? static_cast<float*>(scratch.data) : nullptr;
  alignas(64) float absmax[TILE_COLS] = {}, buffer[TILE_COLS];
  const float* scales = input_scales(s, tile, buffer);
  const auto* x = reinterpret_cast<const uint32_t*>(tile_of(s.x, tile));
  if (s.format == RAREFY_DENSE) {
    const auto* values = static_cast<const uint32_t*>(static_cast<const rarefy_dense*>(s.weight)->values);
    const int64_t blocks = ceil_div(w.cols, 16 * inputs_per_lane(w.dtype));
    float* largest = quantizes ? absmax : nullptr;
    if (s.columns > MAX_GEMV_COLUMNS)
      store_dense_rows(t, s, w.dtype, values, blocks, w.epilogue, x, tile, first, end, columns, scales, out, largest);
    else if (const int code = store_few_columns(t, s, w.dtype, values, blocks, w.epilogue, x, tile, first, end, columns,
                                                scales, out, largest))
      return code;
  } else {
    store_sparse_rows(t, s, w, x, tile, first, end, columns, scales, out, quantizes ? absmax : nullptr);
  }
  if (s.out_codes.data && s.codes_dtype == RAREFY_BF16 && end == s.features)  // kernels read whole blocks of lanes
    std::fill(codes_of(s, tile) + ceil_div(s.features, 2) * TILE_COLS,
              codes_of(s, tile) + ceil_div(s.features, 32) * 16 * TILE_COLS, 0u);
  if (quantizes) {
    float* out_scales = s.out_scales.data + tile * TILE_COLS;
    std::copy_n(absmax, TILE_COLS, out_scales);
    quantize_by_absmax(t, s.codes_dtype, out, s.features, columns_of(s, tile), out_scales, codes_of(s, tile));
  }
  return RAREFY_OK;
}

// Accumulators [rows][TILE_COLS] of some rows of a dense fp32 weight, whose row tiles are [lanes][4]. `few`: there are
// at most MAX_GEMV_COLUMNS columns in all.
inline int multiply_dense(const rarefy_kernel_table& t, const float* values, int64_t lanes, int64_t row, int64_t rows,
                          const float* x, int64_t columns, bool few, uint32_t* acc) {
  const float* first = values + row * lanes;
  if (!few) {
    t.dense_gemm(reinterpret_cast<const uint32_t*>(first), lanes * TILE_ROWS, ceil_div(rows, TILE_ROWS), lanes,
                 reinterpret_cast<const uint32_t*>(x), acc, columns);
    return RAREFY_OK;
  }
  const ScratchBuffer<1> scratch(size_t(columns * lanes * TILE_ROWS) * 4);
  float* repeated = static_cast<float*>(scratch.data);
  if (!repeated) return RAREFY_NO_MEMORY;
  for (int64_t n = 0; n < columns; ++n) t.repeat_column(x + n, lanes, repeated + n * lanes * TILE_ROWS);
  t.dense_gemv(first, lanes * TILE_ROWS, ceil_div(rows, TILE_ROWS), lanes, repeated, lanes * TILE_ROWS, columns, acc);
  return RAREFY_OK;
}

// One slab of rows of one column tile, here in fp32.
inline int run_linear(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  if (is_decompressed(s)) return run_decompressed_linear(t, s, part);
  if (is_in_lanes(s)) return run_lanes_linear(t, s, part);
  const LinearWeight w(s);
  const int64_t slabs = ceil_div(w.rows, SLAB_ROWS), tile = part / slabs, slab = part % slabs, row = slab * SLAB_ROWS;
  const int64_t rows = std::min(SLAB_ROWS, s.features - row);
  const int64_t columns = std::min(TILE_COLS, s.columns - tile * TILE_COLS);
  float* out = tile_of(s.out, tile) + row * TILE_COLS;
  const auto* x = reinterpret_cast<const uint32_t*>(tile_of(s.x, tile));
  auto* acc = reinterpret_cast<uint32_t*>(out);
  alignas(64) float buffer[TILE_COLS];
  const rarefy_tile_epilogue epilogue =
      tile_epilogue(w.epilogue, row, rows, input_scales(s, tile, buffer), optional_rows(s.residual, tile, row),
                    s.in_zero, columns_of(s, tile));
  if (s.format == RAREFY_DENSE) {
    if (const int code =
            multiply_dense(t, static_cast<const float*>(static_cast<const rarefy_dense*>(s.weight)->values), w.cols,
                           row, rows, tile_of(s.x, tile), columns, s.columns <= MAX_GEMV_COLUMNS, acc))
      return code;
  } else if (s.format == RAREFY_SELL) {
    t.sell_spmm[lane_index(w.dtype)](*static_cast<const rarefy_sell*>(s.weight), slab, x, acc, columns, &epilogue);
  } else {
    t.tiles_spmm[lane_index(w.dtype)](*static_cast<const rarefy_tiles*>(s.weight), row / TILE_ROWS,
                                      ceil_div(row + rows, TILE_ROWS), x, acc, columns);
  }
  if (s.format != RAREFY_SELL) apply_epilogue(t, epilogue, w.dtype == RAREFY_I8, out);
  write_absmax(t, s, tile, row, rows);
  return RAREFY_OK;
}

}  // namespace
