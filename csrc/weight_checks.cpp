// Bounds checks of packed weights, for those that come from a file: no index or offset leads outside its arrays.
#include <algorithm>
#include <cstdlib>

#include "kernel_table.h"
#include "rarefy.h"

API int rarefy_check_csr(const rarefy_csr* w, int64_t values) {
  if (w->dtype < 0 || w->dtype > 2 || w->rows < 0 || w->inputs < 0 || w->inputs > 65536) return RAREFY_INVALID;
  if (w->starts[0] || w->starts[w->rows] != values) return RAREFY_INVALID;
  for (int64_t r = 0; r < w->rows; ++r)
    if (w->starts[r + 1] < w->starts[r]) return RAREFY_INVALID;
  for (int64_t r = 0; r < w->rows; ++r)
    for (int64_t i = w->starts[r]; i < w->starts[r + 1]; ++i)  // strictly ascending: no column twice
      if (w->columns[i] >= w->inputs || (i > w->starts[r] && w->columns[i] <= w->columns[i - 1])) return RAREFY_INVALID;
  return RAREFY_OK;
}

API int rarefy_check_quantized(const rarefy_quantized* w, int64_t values) {
  if (w->rows < 0 || w->cols < 0 || w->col_blocks != (w->cols + 63) / 64) return RAREFY_INVALID;
  if (w->dtype < RAREFY_I8 || w->dtype > RAREFY_I6 || w->scale_groups < 0 || w->scale_groups > 2) return RAREFY_INVALID;
  if ((w->scale_groups == 0) == (w->scales != nullptr)) return RAREFY_INVALID;
  if (w->zeros && (!w->scale_groups || w->dtype == RAREFY_I8)) return RAREFY_INVALID;
  const int bits = value_bits(w->dtype);
  if (w->zero_bits && (w->zero_bits != 3 || bits > 5 || !w->zeros || !w->two_terms || w->scale_groups != 2))
    return RAREFY_INVALID;  // codes with their fraction fit a byte
  if (w->two_terms && w->fp32_inputs) return RAREFY_INVALID;
  for (int64_t i = 0; w->zeros && i < (w->rows + 3) / 4 * 4 * w->col_blocks * w->scale_groups; ++i)
    if (!w->zero_bits && w->zeros[i] >= 1 << bits) return RAREFY_INVALID;
  return (w->rows + 3) / 4 * w->col_blocks * 4 * cell_bytes(w->dtype) == values ? RAREFY_OK : RAREFY_INVALID;
}

API int rarefy_check_bitmask(const rarefy_bitmask* w, int64_t values) {
  if (w->rows < 0 || w->cols < 0 || w->col_blocks != (w->cols + 63) / 64) return RAREFY_INVALID;
  if (w->dtype < 0 || w->dtype > 3) return RAREFY_INVALID;
  int64_t count = 0;
  for (int64_t tile = 0; tile < (w->rows + 3) / 4; ++tile) {
    if (w->starts[tile] != count) return RAREFY_INVALID;
    for (int64_t block = 0; block < w->col_blocks; ++block)
      for (int64_t r = 0; r < 4; ++r) {
        const uint64_t bits = w->masks[(tile * w->col_blocks + block) * 4 + r];
        const int64_t columns = w->cols - 64 * block;
        if (bits && (4 * tile + r >= w->rows || (columns < 64 && bits >> columns))) return RAREFY_INVALID;
        const int64_t nonzeros = __builtin_popcountll(bits);
        count += w->dtype == RAREFY_I4 ? (nonzeros + 1) / 2 : nonzeros;
      }
  }
  return count == values ? RAREFY_OK : RAREFY_INVALID;
}

namespace {

// Whether sums of products with some lanes of int16 fit 32 bits: of each row, the magnitudes so far.
struct Int16Sums {
  bool add(int64_t row, uint32_t lane) {
    const auto low = int16_t(lane), high = int16_t(lane >> 16);
    of[row] += std::abs(int64_t(low)) + std::abs(int64_t(high));
    return of[row] <= MAX_INT16_SUM;
  }
  int64_t of[SLAB_ROWS] = {};
};

}  // namespace

API int rarefy_check_tiles(const rarefy_tiles* w, int64_t columns, int64_t values) {
  const int64_t lane_inputs = inputs_per_lane(w->dtype);
  if (!is_lane_dtype(w->dtype) || w->rows < 0 || w->inputs < 0) return RAREFY_INVALID;
  if (w->block < 1 || w->block > 65536 || w->lanes != (w->inputs + lane_inputs - 1) / lane_inputs)
    return RAREFY_INVALID;
  const int64_t blocks = (w->lanes + w->block - 1) / w->block;
  int64_t column = 0, value = 0;
  Int16Sums sums;
  for (int64_t index = 0; index < (w->rows + 3) / 4 * blocks; ++index) {
    if (index % blocks == 0) sums = {};
    if (w->starts[2 * index] != column || w->starts[2 * index + 1] != value || w->counts[16 * index])
      return RAREFY_INVALID;
    const int64_t block_lanes = std::min(w->block, w->lanes - index % blocks * w->block);
    for (int pattern = 1; pattern < 16; ++pattern) {
      const int64_t n = w->counts[16 * index + pattern];
      if (column + n > columns) return RAREFY_INVALID;
      for (int64_t i = 0; i < n; ++i)
        if (w->columns[column + i] >= block_lanes) return RAREFY_INVALID;
      column += n;
      const int64_t last = value + n * __builtin_popcount(uint32_t(pattern));
      if (last > values) return RAREFY_INVALID;
      for (int64_t i = 0; w->dtype == RAREFY_I16 && value < last; ++i)
        for (int row = 0; row < 4; ++row)
          if (pattern >> row & 1 && !sums.add(row, w->values[value++])) return RAREFY_INVALID;
      value = last;
    }
  }
  return column == columns && value == values ? RAREFY_OK : RAREFY_INVALID;
}

API int rarefy_check_sell(const rarefy_sell* w, int64_t values) {
  const int64_t lane_inputs = inputs_per_lane(w->dtype);
  if (!is_lane_dtype(w->dtype) || w->rows < 0 || w->inputs < 0) return RAREFY_INVALID;
  if (w->block < 1 || w->block > 65535 || w->lanes != (w->inputs + lane_inputs - 1) / lane_inputs)
    return RAREFY_INVALID;
  const int64_t blocks = (w->lanes + w->block - 1) / w->block;
  int64_t value = 0;
  Int16Sums sums;
  for (int64_t index = 0; index < (w->rows + SLAB_ROWS - 1) / SLAB_ROWS * blocks; ++index) {
    if (w->starts[index] != value) return RAREFY_INVALID;
    const int64_t block_lanes = std::min(w->block, w->lanes - index % blocks * w->block);
    const int64_t pairs = (std::min(SLAB_ROWS, w->rows - index / blocks * SLAB_ROWS) + 1) / 2;
    bool seen[SLAB_ROWS] = {};
    if (index % blocks == 0) sums = {};
    for (int64_t p = 0; p < SLAB_ROWS / 2; ++p) {
      const int64_t n = w->counts[index * (SLAB_ROWS / 2) + p];
      if (value + n > values || (p >= pairs && n)) return RAREFY_INVALID;
      for (int64_t i = 2 * value; i < 2 * (value + n); ++i)
        if (w->columns[i] >= block_lanes) return RAREFY_INVALID;
      value += n;
      for (int64_t r = 0; r < 2 && p < pairs; ++r) {
        const uint8_t row = w->order[index * SLAB_ROWS + 2 * p + r];
        if (row >= 2 * pairs || seen[row]) return RAREFY_INVALID;  // each once; an odd count is padded by one row
        seen[row] = true;
        for (int64_t i = value - n; w->dtype == RAREFY_I16 && i < value; ++i)
          if (!sums.add(row, w->values[2 * i + r])) return RAREFY_INVALID;
      }
    }
  }
  return value == values ? RAREFY_OK : RAREFY_INVALID;
}

API int rarefy_check_conv(const rarefy_conv* w, int64_t columns, int64_t values) {
  if (w->groups < 1 || w->outputs < 1 || w->inputs < 1) return RAREFY_INVALID;
  const int32_t dtype = w->weight.dtype;
  if (dtype != RAREFY_F32 && (w->groups != 1 || !(dtype == RAREFY_I8 || (dtype == RAREFY_I16 && w->dense))))
    return RAREFY_INVALID;
  const int64_t max_stride = w->dense && dtype == RAREFY_F32 ? MAX_DENSE_STRIDE : MAX_STRIDE;
  for (int i = 0; i < 2; ++i) {
    if (w->kernel[i] < 1 || w->stride[i] < 1 || w->stride[i] > max_stride) return RAREFY_INVALID;
    if (w->padding[i] < 0 || w->dilation[i] < 1) return RAREFY_INVALID;
  }
  const int64_t rows = w->dense ? w->outputs : w->groups * ((w->outputs + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS);
  if (w->weight.rows != rows || (w->dense && (w->groups != 1 || w->weight.block < 1))) return RAREFY_INVALID;
  const int64_t each = inputs_per_lane(dtype);
  if (w->weight.inputs != w->inputs * w->kernel[0] * w->kernel[1] * each) return RAREFY_INVALID;
  if (w->dense) return w->weight.lanes == w->weight.inputs / each ? RAREFY_OK : RAREFY_INVALID;
  if (!w->sell) return rarefy_check_tiles(&w->weight, columns, values);
  const rarefy_sell& s = *w->sell;
  if (w->groups != 1 || s.dtype != w->weight.dtype || s.rows != w->weight.rows) return RAREFY_INVALID;
  if (s.inputs != w->weight.inputs || s.block != w->weight.block || s.lanes != w->weight.lanes) return RAREFY_INVALID;
  return rarefy_check_sell(&s, values);
}
