// What the steps of a program share: their split into parts, the tokens of a column tile, epilogues. A part is the unit
// of work that a thread takes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

constexpr int64_t FEATURES_PER_PART = 64;     // elementwise operators and averages
constexpr int64_t DECODE_ROWS_PER_PART = 32;  // rows of a weight in decode steps
constexpr int64_t MIN_TILE_ROWS = 12;       // rows of inputs that are multiplied as a column tile, where that is faster
constexpr int64_t MAX_NARROW_COLUMNS = 32;  // columns of a narrow tile

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float* tile_of(const rarefy_view& v, int64_t tile) { return v.data + tile * v.stride; }

inline uint32_t* codes_of(const rarefy_step& s, int64_t tile) {
  return reinterpret_cast<uint32_t*>(tile_of(s.out_codes, tile));
}

// Part of a tile's features, or null where the step has no such operand.
inline const float* optional_rows(const rarefy_view& v, int64_t tile, int64_t row) {
  return v.data ? tile_of(v, tile) + row * TILE_COLS : nullptr;
}

// Call f(sequence, token, column in the tile, count) for each run of tokens in a tile. Columns between sequences hold
// no token.
template <class F>
inline void for_each_token_run(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * TILE_COLS, end = std::min(at + TILE_COLS, s.columns); at < end;) {
    const int64_t sequence = at / s.seq_stride, token = at % s.seq_stride;
    const int64_t left = std::min(s.seq_stride - token, end - at);
    if (token < s.tokens) f(sequence, token, at % TILE_COLS, std::min(left, s.tokens - token));
    at += left;
  }
}

// The columns of a tile that exist, up to a whole vector of any instruction set: no result depends on what lies behind.
inline int64_t columns_of(const rarefy_step& s, int64_t tile) {
  return std::min(TILE_COLS, ceil_div(s.columns - tile * TILE_COLS, MAX_VECTOR) * MAX_VECTOR);
}

inline rarefy_tile_epilogue tile_epilogue(const rarefy_weight_epilogue& w, int64_t row, int64_t rows,
                                          const float* col_scales, const float* residual, int32_t zero,
                                          int64_t columns) {
  return {.bias = w.bias ? w.bias + row : nullptr,
          .residual = residual,
          .rows = rows,
          .act = w.act,
          .row_scales = w.scales ? w.scales + row : nullptr,
          .col_scales = col_scales,
          .row_sums = w.row_sums ? w.row_sums + row : nullptr,
          .zero = zero,
          .columns = columns};
}

// The int8 scales of a tile's columns of x, null where there are none; `buffer` receives the one scale of all.
inline const float* input_scales(const rarefy_step& s, int64_t tile, float (&buffer)[TILE_COLS]) {
  if (s.in_scale == 0.0f) return s.in_scales.data ? s.in_scales.data + tile * TILE_COLS : nullptr;
  std::fill_n(buffer, TILE_COLS, s.in_scale);
  return buffer;
}

inline void apply_epilogue(const rarefy_kernel_table& t, const rarefy_tile_epilogue& e, bool int8, float* acc) {
  if (int8)
    t.dequantize_epilogue(e, acc);
  else
    t.f32_epilogue(acc, e.rows, e.columns, e.bias, e.residual, e.act, acc, TILE_COLS, false);
}

// Within its lifetime a thread may call `dense_lanes`.
class DenseSection {
 public:
  explicit DenseSection(const rarefy_kernel_table& t) : t_(t) { t_.begin_dense(&state_); }
  ~DenseSection() { t_.end_dense(&state_); }
  DenseSection(const DenseSection&) = delete;
  DenseSection& operator=(const DenseSection&) = delete;

 private:
  const rarefy_kernel_table& t_;
  rarefy_dense_state state_;
};

// The scales of columns in place of their largest magnitudes, as rarefy_input_scale finds those of int8.
inline void absmax_to_scales(float* scales, int64_t columns, float steps = 127.0f) {
  for (int64_t n = 0; n < columns; ++n)
    scales[n] = !(scales[n] < INFINITY) ? NAN : std::max(scales[n] * (1.0f / steps), MIN_INPUT_SCALE);
}

// Lanes of int8 or int16 of a tile's columns. `scales`: their largest magnitudes, which become their scales.
inline void quantize_by_absmax(const rarefy_kernel_table& t, int32_t dtype, const float* x, int64_t features,
                               int64_t columns, float* scales, uint32_t* codes) {
  const bool int16 = dtype == RAREFY_I16;
  absmax_to_scales(scales, columns, int16 ? float(INT16_INPUT_STEPS) : 127.0f);
  (int16 ? t.quantize_int16 : t.quantize_tile)(x, features, columns, scales, codes);
}

// Write out_absmax, where the step has one, for some rows of a tile from the start of a slab on.
inline void write_absmax(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile, int64_t row, int64_t rows) {
  for (int64_t done = 0; s.out_absmax.data && done < rows; done += SLAB_ROWS)
    t.column_absmax(tile_of(s.out, tile) + (row + done) * TILE_COLS, std::min(SLAB_ROWS, rows - done),
                    columns_of(s, tile), tile_of(s.out_absmax, tile) + (row + done) / SLAB_ROWS * TILE_COLS);
}

}  // namespace
