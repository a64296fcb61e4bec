// Types and constants shared by all kernels, and the table of functions that each instruction set provides.
#pragma once
#include <cstdint>
#include <type_traits>

#include "rarefy.h"

#define API extern "C" __attribute__((visibility("default")))

constexpr int64_t TILE_COLS = 64;            // columns of a column tile
constexpr float MIN_INPUT_SCALE = 1e-36f;    // of int8: the reciprocal of a smaller one would be infinite
constexpr float LOST_STEPS = 254.0f;         // of what rounding to int8 loses, in one step of int8
constexpr int64_t INT16_INPUT_STEPS = 8191;  // of the largest magnitude
// Weights in int16 are rounded so that sums of products fit 32 bits: of a whole row, of dense rows of so many columns.
constexpr int64_t INT16_COLUMNS = 1024;
constexpr int64_t MAX_INT16_SUM = ((int64_t(1) << 31) - 1) / INT16_INPUT_STEPS;  // of the magnitudes of codes
// Columns whose products of joined terms and codes of 8 bits fit a sum of 32 bits: where one sum has all of them, and
// where eight sums share them.
constexpr int64_t JOINED_TILE_COLUMNS = 512, JOINED_ROW_COLUMNS = 2048;
static_assert(JOINED_TILE_COLUMNS * 32767 * 128 < (int64_t(1) << 31));
static_assert(JOINED_ROW_COLUMNS / 8 * 32767 * 128 < (int64_t(1) << 31));
constexpr int64_t MAX_STRIDE = 8;          // of a convolution
constexpr int64_t MAX_DENSE_STRIDE = 64;   // of a dense one in fp32
constexpr int64_t MAX_GEMV_COLUMNS = 4;    // of a column tile, which dense weights multiply without a whole tile
constexpr int64_t MAX_VECTOR = 16;         // columns of a vector at most
constexpr int TILE_ROWS = 4;               // rows of a row tile
constexpr int64_t SLAB_ROWS = 128;         // rows of a SELL slab
constexpr int64_t PREFETCH_BYTES = 2048;   // prefetch distance in a weight
constexpr float MASKED = -1e30f;           // lower scores count as masked; a difference of two is no NaN
constexpr int64_t MAX_HEADS_TOGETHER = 4;  // heads of a token that read the keys of a cache together
constexpr int64_t CEILING_LANES = 128;     // lanes of the inputs of `multiply_adds`
constexpr int64_t READ_BYTES = 256;        // bytes that `read_memory` reads at a time
constexpr int64_t NHWC_OUTPUTS = 64;       // outputs that are computed together
constexpr int64_t NHWC_BLOCKS_IN_L1 = 4;   // blocks of 64 outputs, 4 KB each, that stay in the L1 cache for all pixels
constexpr int64_t NHWC_PIXELS = 66;        // pixels that are computed together at most
constexpr int64_t SEGMENT_FLOATS = 16;     // maximum length of a segment; copies always have this size

// Whether an activation only limits numbers.
inline bool is_clamp(int act) { return act == RAREFY_NONE || act == RAREFY_RELU || act == RAREFY_RELU6; }

// Bits of a value of a quantized weight, and the bytes of 64 of them.
constexpr int value_bits(int32_t dtype) {
  return dtype == RAREFY_I4 ? 4 : dtype == RAREFY_I5 ? 5 : dtype == RAREFY_I6 ? 6 : 8;
}
constexpr int64_t cell_bytes(int32_t dtype) { return 8 * value_bits(dtype); }

// The number of a weight's function among `quantized_gemv`.
static inline int quantized_variant(const rarefy_quantized& w) {
  return 3 * (w.dtype - RAREFY_I8) + (w.two_terms ? 2 : w.fp32_inputs ? 1 : 0);
}

// Whether single inputs of a weight have a scale for each 32 where there are kernels for that, in place of two terms.
static inline bool has_block_inputs(const rarefy_quantized& w) { return w.two_terms && w.dtype != RAREFY_I8; }

// Where the high bits of a row's codes of 5 or 6 bits begin in a panel, the codes of four rows in a block; and which
// bit of each byte is the first one of an even or an odd column.
static constexpr int64_t high_bytes(int bits, int64_t row) { return 128 + (bits == 6 ? row % 2 * 32 : 0); }
static constexpr int high_bit(int bits, int64_t row, int64_t odd) {
  return int(bits == 6 ? 4 * (row / 2) + 2 * odd : 2 * row + odd);
}

// A code of 4 to 6 bits of a panel.
static inline int panel_code(const uint8_t* panel, int bits, int64_t row, int64_t column) {
  const int64_t odd = column % 2;
  const int low = panel[32 * row + column / 2] >> (4 * odd) & 15;
  if (bits == 4) return low;
  const int high = panel[high_bytes(bits, row) + column / 2] >> high_bit(bits, row, odd) & ((1 << (bits - 4)) - 1);
  return low | high << 4;
}

// The zero points that are subtracted where the codes of a row in a block are loaded; null: the middle of the codes.
// Those with a fraction are subtracted later.
static inline const uint8_t* loaded_zeros(const rarefy_quantized& w, int64_t cell) {
  static constexpr uint8_t none[2] = {};
  return w.zero_bits ? none : w.zeros ? w.zeros + cell * w.scale_groups : nullptr;
}

// Call f(count, first) for n inputs, four at a time and then the rest; `count` is a constant.
template <class F>
inline void for_each_four(int64_t n, F&& f) {
  int64_t first = 0;
  for (; first + 4 <= n; first += 4) f(std::integral_constant<int, 4>{}, first);
  if (n - first == 3)
    f(std::integral_constant<int, 3>{}, first);
  else if (n - first == 2)
    f(std::integral_constant<int, 2>{}, first);
  else if (n - first == 1)
    f(std::integral_constant<int, 1>{}, first);
}

static inline float from_bf16(uint16_t v) { return __builtin_bit_cast(float, uint32_t(v) << 16); }

static inline int64_t inputs_per_lane(int32_t dtype) {
  return dtype == RAREFY_F32 ? 1 : dtype == RAREFY_BF16 || dtype == RAREFY_I16 ? 2 : 4;
}

static inline bool is_lane_dtype(int32_t dtype) {
  return dtype == RAREFY_I16 || (dtype >= RAREFY_F32 && dtype <= RAREFY_I8);
}

// The index of a dtype of lanes in tables of functions.
constexpr int32_t lane_index(int32_t dtype) { return dtype == RAREFY_I16 ? 3 : dtype; }

// Dequantization, bias and activation of a weight, whatever its format.
struct rarefy_weight_epilogue {
  const float* scales;
  const int32_t* row_sums;
  const float* bias;
  int32_t act;
};

// Epilogue of accumulators [rows][TILE_COLS]: act(accumulators + bias + residual), in place. int8 accumulators are
// first corrected for the inputs' zero point by the row sums and multiplied by the scales of rows and of columns.
struct rarefy_tile_epilogue {
  const float *bias, *residual;
  int64_t rows;
  int32_t act;
  const float *row_scales, *col_scales;
  const int32_t* row_sums;
  int32_t zero;     // the code of zero in the inputs
  int64_t columns;  // of the tile, in whole vectors
};

// Where the outputs of 32 rows of a tile go: fp32, codes, the columns' largest magnitudes so far. All but one may be
// null.
struct rarefy_tile_outputs {
  float* out;           // [rows][TILE_COLS]
  float* absmax;        // [TILE_COLS], updated
  uint32_t* bf16;       // [rows / 2][TILE_COLS]
  uint32_t* codes;      // [rows / 4][TILE_COLS], int8 with one scale for all
  float inverse_scale;  // of codes
  int32_t zero;         // the code of zero
};

// Where sums of NHWC images, [pixels][NHWC_OUTPUTS], go: an image of codes or numbers, fp32 in a column tile, or both.
// Sums of fp32 images have no factors, and their residual is numbers.
struct rarefy_nhwc_outputs {
  const float *factors, *bias;
  const int32_t* row_sums;
  int32_t in_zero;  // the code of zero in the inputs
  int64_t outputs;  // at most NHWC_OUTPUTS
  int32_t act;
  uint8_t* codes;  // of the first pixel, or null
  bool numbers;    // in place of codes
  int64_t codes_stride;
  float inverse_scale;
  int32_t zero;
  const uint8_t* residual;  // of the first pixel, or null
  int64_t residual_stride;
  float residual_scale;
  int32_t residual_zero;
  float* out;  // [outputs][TILE_COLS], or null
};

// What `begin_dense` saves for `end_dense`: the tile configuration of the thread.
struct alignas(64) rarefy_dense_state {
  uint8_t bytes[64];
};

// The weights of some channels of a depthwise convolution, and where they read. Row r of the kernel begins at
// x + offsets[r] for the first output, and pixel_bytes later for the next one.
struct rarefy_nhwc_taps {
  const int64_t* offsets;
  int64_t rows, columns;  // of the kernel
  int64_t column_bytes;   // from one column of the kernel to the next
  int64_t pixel_bytes;    // from one output to the next
  const uint32_t* taps;   // weights of 16 bits, columns 2i and 2i + 1 together; of fp32 images fp32, column by column
  int64_t stride;         // from one (pair of) columns to the next
};

// Some blocks of 64 features of a tile of inputs: how many, the first one, of how many; columns of the tile in memory.
struct rarefy_tile_blocks {
  int64_t count, first, all, width;
};

struct rarefy_kernel_table {
  const char* name;
  bool multiplies_bf16;  // faster than fp32
  float packed_zeros;    // the bits of four int8 inputs that are zero

  // Input packing.
  void (*pack_inputs[3])(const float* x, int64_t ldx, int64_t rows, int64_t width, const float* scales, uint32_t* out);
  void (*convert_row[4])(const float* x, int64_t n, int64_t padded, float scale, void* out);
  void (*convert_row_two_terms)(const float* x, int64_t n, int64_t padded, float scale, void* out);
  // In place of two terms: avx512_gemv.hpp. Null where those are read.
  void (*convert_row_blocks)(const float* x, int64_t n, int64_t padded, void* out);
  void (*pack_block_rows)(const void* rows, int64_t row_bytes, int64_t count, const rarefy_tile_blocks&,
                          uint32_t* tile);
  uint32_t (*absmax_bits)(const float* x, int64_t n);
  void (*take_even)(const float* x, int64_t n, float* out);
  void (*gather_lanes)(const float* x, const float* end, const int32_t* offsets, int64_t lanes,
                       const rarefy_segment* segments, int count, uint32_t* out);

  // Few inputs: rows `from`..`to` of a weight, then the epilogue on the same rows.
  void (*bitmask_gemv[4])(const rarefy_bitmask&, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                          int64_t ldy, int64_t n);
  void (*bitmask_epilogue[4])(const rarefy_bitmask&, int64_t from, int64_t to, const float* scales,
                              const float* residual, float* y, int64_t ldy, int64_t n);
  void (*quantized_gemv[12])(const rarefy_quantized&, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                             int64_t ldy, int64_t n);  // by quantized_variant
  void (*quantized_epilogue)(const rarefy_quantized&, int64_t from, int64_t to, const float* scales,
                             const float* residual, float* y, int64_t ldy, int64_t n);
  void (*csr_spmm[4])(const rarefy_csr&, int64_t from, int64_t to, const float* x, float* y, int64_t ldy,
                      int64_t count);  // on 1, 4, 8, 16 interleaved inputs
  void (*csr_epilogue)(const rarefy_csr&, int64_t from, int64_t to, const float* scales, const float* residual,
                       float* y, int64_t ldy, int64_t n);

  // Column tiles: accumulators, and their epilogues.
  void (*tiles_spmm[4])(const rarefy_tiles&, int64_t from, int64_t to, const uint32_t* x, uint32_t* acc,
                        int64_t columns);
  void (*tiles_spmm_block[2])(const rarefy_tiles&, int64_t block, int64_t from, int64_t to, const uint32_t* x,
                              uint32_t* acc, int64_t columns);  // fp32, int8
  void (*sell_spmm[4])(const rarefy_sell&, int64_t slab, const uint32_t* x, uint32_t* acc, int64_t columns,
                       const rarefy_tile_epilogue*);
  void (*sell_spmm_block[2])(const rarefy_sell&, int64_t block, int64_t from, int64_t to, const uint32_t* x,
                             uint32_t* acc, int64_t columns, const rarefy_tile_epilogue*);  // fp32, int8
  // Few columns of a column tile, each repeated for the four rows of a row tile; then fp32 accumulators.
  void (*repeat_column)(const float* x, int64_t lanes, float* out);
  void (*dense_gemv)(const float* values, int64_t tile_stride, int64_t row_tiles, int64_t lanes, const float* x,
                     int64_t x_stride, int64_t columns, uint32_t* acc);
  void (*dense_gemm)(const uint32_t* values, int64_t tile_stride, int64_t tiles, int64_t lanes, const uint32_t* x,
                     uint32_t* acc, int64_t columns);  // fp32
  // Called before and after `dense_lanes` by each thread, with the same state.
  void (*begin_dense)(rarefy_dense_state*);
  void (*end_dense)(const rarefy_dense_state*);
  // 16 or 32 rows of a dense weight times a column tile: acc [rows][TILE_COLS]. Not fp32; by lane_index, as below.
  void (*dense_lanes[4])(const uint32_t* values, int64_t lane_blocks, int64_t rows, const uint32_t* x, uint32_t* acc,
                         int64_t columns);
  // out = sums + (add ? out : 0), as fp32 numbers.
  void (*add_sums)(const uint32_t* sums, int64_t count, bool add, float* out);
  // One row of lanes, which lie together, times rows of a dense weight of bf16 or int8: acc [rows][TILE_COLS], column
  // 0.
  void (*lanes_gemv[4])(const uint32_t* values, int64_t lane_blocks, int64_t rows, const uint32_t* x, uint32_t* acc);
  // Of fp32: of sums of codes, with their scales.
  void (*store_outputs[4])(const rarefy_tile_epilogue&, const uint32_t* acc, const rarefy_tile_outputs&);
  // Four rows: int8, and bf16 of quantized weights, for `dense_lanes`, else for `dense_gemm`.
  void (*decompress_bitmask[4])(const rarefy_bitmask&, int64_t row, uint32_t* out);
  void (*decompress_quantized[3])(const rarefy_quantized&, int64_t row, uint32_t* out);  // to fp32, bf16, int8
  // To int16, where the two int8 terms of an input are joined to 16 bits, in steps of 1 / LOST_STEPS: sums fit 32 bits
  // with at most JOINED_TILE_COLUMNS columns. Null where the terms are multiplied one after the other.
  void (*decompress_joined)(const rarefy_quantized&, int64_t row, uint32_t* out);
  // Inputs with a scale for each 32 features, in place of two terms: blocked_inputs.hpp. Null where that is no faster.
  void (*quantize_blocks)(const float* x, int64_t features, int64_t columns, uint32_t* out);
  void (*decompress_offset)(const rarefy_quantized&, int64_t row, uint32_t* out);
  void (*multiply_blocked)(const rarefy_quantized&, int64_t row, const uint32_t* values, int64_t rows,
                           const uint32_t* x, int64_t columns, float* out);
  // For few columns, see narrow_inputs.hpp; null where there is no such kernel.
  void (*decompress_cells)(const rarefy_quantized&, int64_t row, uint8_t* out);
  void (*multiply_narrow)(const rarefy_quantized&, int64_t row, int64_t rows, const uint8_t* cells, const uint32_t* x,
                          int64_t columns, float* out);
  void (*transposed_epilogue[3])(const rarefy_weight_epilogue&, int64_t row, int64_t rows, const uint32_t* acc,
                                 const float* scales, int64_t columns, const float* residual, float* y, int64_t ldy);
  void (*f32_epilogue)(const float* acc, int64_t rows, int64_t n, const float* bias, const float* residual, int act,
                       float* y, int64_t ldy, bool stream);
  void (*dequantize_epilogue)(const rarefy_tile_epilogue&, float* acc);

  // Other operators on column tiles.
  void (*unpack_tile)(const float* x, int64_t features, int64_t columns, float* y, int64_t ldy);
  void (*add_or_mul)(const float* a, const float* b, bool mul, int act, float* out, int64_t count);
  void (*norm_tile)(const float* x, int64_t features, int64_t columns, const float* gamma, const float* bias, float eps,
                    bool subtract_mean, float* out);
  void (*column_absmax)(const float* x, int64_t features, int64_t columns, float* out);
  void (*quantize_tile)(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out);
  void (*quantize_int16)(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out);
  void (*quantize_two_terms)(const float* x, int64_t features, int64_t columns, const float* scales, uint32_t* out);
  void (*quantize_static)(const float* x, int64_t features, float inverse_scale, int32_t zero, uint32_t* out);
  void (*fake_quantize)(const float* x, float scale, int32_t zero, float* out, int64_t count);
  void (*channelwise)(const float* x, const int32_t* offsets, int64_t lanes, const float* weights, float bias, int act,
                      const rarefy_segment* segments, int count, float* out);
  void (*channel_affine)(const float* x, int64_t features, const float* scale, const float* bias, int act, float* out);
  void (*channel_scale)(const float* x, int64_t features, int64_t columns, const float* factors, float* out);
  void (*rearrange)(const float* x, int64_t features, const rarefy_segment* segments, int count, float* out);
  void (*add_deviations)(const float* x, int64_t features, int64_t columns, float mean, double* sums);
  void (*normalize_columns)(const float* x, int64_t features, int64_t columns, float mean, float scale,
                            const float* gamma, const float* bias, float* out);
  void (*add_column_sums)(const float* x, int64_t features, int64_t columns, float* sums);
  void (*attention_tile)(const rarefy_attention&, int64_t batch, int64_t head, int64_t tile);
  // With a KV cache in 8 bits; `memory` has room for a tile of keys and values of a head.
  void (*coded_attention_tile)(const rarefy_attention&, int64_t batch, int64_t head, int64_t tile, float* memory);
  void (*store_kv_codes)(const float* x, int64_t stride, int64_t columns, int64_t head_dim, bool pairs, int8_t* codes,
                         float* scales);
  // Attention with products of codes, for queries `from` (a multiple of TILE_COLS) to `to` of one head of one sequence;
  // `memory` has int8_attention_words words.
  int64_t (*int8_attention_words)(const rarefy_attention&);
  void (*int8_attention)(const rarefy_attention&, int64_t sequence, int64_t head, int64_t from, int64_t to,
                         uint32_t* memory);
  void (*pack_bf16_lanes)(const float* x, int64_t features, int64_t columns, uint32_t* out);
  void (*pack_columns_as_rows)(const float* x, int64_t features, uint32_t* out);
  void (*pack_features_as_rows)(const float* a, const float* b, int64_t first, int64_t second, int64_t features,
                                uint32_t* out);
  void (*softmax_lanes)(const rarefy_attention&, const float* mask, int64_t first_key, int64_t keys,
                        int64_t first_query, int64_t columns, float* scores, uint32_t* out, float* max, float* sum,
                        float* rescale);
  void (*add_rescaled)(const float* sums, const float* rescale, const float* total, int64_t features, int64_t columns,
                       float* out);

  // Images in NHWC order, of fp32 numbers [0] or of codes [1]; products also of inputs in int16 [2]. Sums of up to 64
  // outputs (groups of 16) of some pixels: acc [pixels][NHWC_OUTPUTS].
  void (*nhwc_products[3])(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                           int64_t pixels, const uint32_t* values, int64_t groups, uint32_t* acc);
  // Inputs of outputs as rows of int16 with a scale for each, and sums of their products as fp32: nhwc_int16.hpp.
  void (*nhwc_round_int16)(const uint8_t* x, int64_t x_stride, const int64_t* offsets, int64_t runs, int64_t count,
                           int64_t pixels, int64_t padded, int16_t* out, float* scales);
  void (*nhwc_int16_numbers)(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                             int64_t pixels, const uint32_t* values, const float* scales, uint32_t* acc,
                             const rarefy_nhwc_outputs&);
  void (*nhwc_scale_sums)(uint32_t* acc, int64_t pixels, int64_t outputs, const float* scales, const float* factors);
  // Sums of at most NHWC_OUTPUTS channels of some pixels of a depthwise convolution.
  void (*nhwc_depthwise[2])(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t channels, int64_t pixels,
                            uint32_t* acc);
  // Numbers of at most NHWC_OUTPUTS outputs of evenly spaced pixels, with an activation of is_clamp: of at most
  // NHWC_BLOCKS_IN_L1 blocks, or of a depthwise convolution. They read no sums and write no column tiles.
  void (*nhwc_numbers)(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                       int64_t pixels, const uint32_t* values, const rarefy_nhwc_outputs&);
  void (*nhwc_depthwise_numbers)(const rarefy_nhwc_taps& t, const uint8_t* x, int64_t pixels,
                                 const rarefy_nhwc_outputs&);
  // Codes of up to TILE_COLS pixels, tap k of pixel i at x + offsets[i] + taps[k], as lanes of a column tile:
  // out [channels / 4][num_taps][TILE_COLS]. `offsets` has TILE_COLS elements. Reads up to 64 bytes past the channels.
  void (*nhwc_lanes)(const uint8_t* x, const int64_t* offsets, int64_t pixels, const int64_t* taps, int64_t num_taps,
                     int64_t channels, uint32_t* out);
  // Sums [rows][TILE_COLS] of up to NHWC_OUTPUTS rows as [pixels][NHWC_OUTPUTS].
  void (*transpose_sums)(const uint32_t* sums, int64_t rows, int64_t pixels, uint32_t* out);
  int64_t nhwc_pixels[3];  // a number of pixels whose multiples run at full speed
  void (*nhwc_store[2])(const rarefy_nhwc_outputs&, const uint32_t* acc, int64_t pixels);
  // Codes, or numbers, of pixels: channel c of pixel i is x[c * stride + i].
  void (*nhwc_quantize)(const float* x, int64_t stride, int64_t channels, int64_t pixels, float inverse_scale,
                        int32_t zero, uint8_t* codes, int64_t pixel_bytes);
  void (*nhwc_pack_f32)(const float* x, int64_t stride, int64_t channels, int64_t pixels, uint8_t* out,
                        int64_t pixel_bytes);
  // Codes of pixels out of numbers; strides are in bytes. Reads whole vectors.
  void (*nhwc_to_codes)(const uint8_t* x, int64_t x_stride, int64_t channels, int64_t pixels, float inverse_scale,
                        int32_t zero, uint8_t* out, int64_t out_stride);
  void (*nhwc_max[2])(const uint8_t* x, int64_t channels, uint8_t* max);
  // Of fp32 images: nhwc_f32.hpp.
  void (*nhwc_unpack)(const uint8_t* x, int64_t pixel_bytes, int64_t pixels, int64_t channels, float* out);
  void (*nhwc_map)(const uint8_t* x, int64_t x_stride, int64_t pixels, int64_t channels, const float* scale,
                   const float* bias, const uint8_t* residual, int64_t residual_stride, int act, uint8_t* out,
                   int64_t out_stride);
  void (*nhwc_sum)(const uint8_t* x, int64_t pixel_bytes, int64_t pixels, int64_t channels, float* sums);

  // Winograd convolutions on fp32 images: of one square, and of some (winograd.hpp).
  void (*winograd_input)(const uint8_t* const* rows, int64_t pixel_bytes, int64_t channels, float* out, int64_t stride);
  void (*winograd_output)(const uint32_t* products, int64_t stride, int64_t squares, int64_t outputs, uint32_t* out,
                          int64_t row_stride);

  // Decode steps, row-major; rope has both layouts.
  void (*norm_row)(const float* x, int64_t features, const float* gamma, const float* bias, float eps,
                   bool subtract_mean, float* out);
  void (*rope[2])(const float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim,
                  float* out);  // column tile, row
  void (*attention_row)(const rarefy_attention&, int64_t batch, int64_t token, int64_t head, int64_t heads,
                        float* scratch);

  // The CPU's ceilings (ceilings.hpp).
  int64_t (*multiply_adds[4])(const uint32_t* weights, const uint32_t* x, int64_t rounds, uint32_t* sums);
  void (*read_memory)(const char* p, int64_t bytes, uint32_t* sums);
};

const rarefy_kernel_table& rarefy_active_kernels();
float rarefy_input_scale(const rarefy_kernel_table& t, const float* x, int64_t n);  // int8 scale of n inputs
