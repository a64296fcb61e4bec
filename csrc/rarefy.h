// C interface of the CPU kernels: pointers and sizes in, an error code out. The library keeps no weights, throws no
// exceptions and does not depend on torch; the caller lends it a parallel-for function.
//
// Terms used in all files:
//   row, column    an output feature of a weight, and an input feature; of activations, a column is a token or a pixel
//   column tile    64 columns of activations, stored as [features][64]
//   row tile       four rows of a weight that a kernel processes together
//   lane           32 bits of one column: 1 fp32, 2 bf16 or int16, or 4 int8 inputs
//   decode step    a step on few tokens, whose activations are stored row-major, one token after the other
#pragma once
#include <cstdint>

extern "C" {

// Changes with every change of a struct, an enum or a function below; the Python loader compares it with its own.
enum { RAREFY_ABI_VERSION = 34 };

enum rarefy_error { RAREFY_OK = 0, RAREFY_INVALID = 1, RAREFY_NO_MEMORY = 2 };
enum rarefy_dtype {
  RAREFY_F32 = 0,
  RAREFY_BF16 = 1,
  RAREFY_I8 = 2,
  RAREFY_I4 = 3,  // bitmask and quantized only
  RAREFY_I5 = 4,  // quantized only
  RAREFY_I6 = 5,
  RAREFY_I16 = 6,  // tiles, sell and dense, and dense convolutions
};
enum rarefy_activation {
  RAREFY_NONE = 0,
  RAREFY_RELU = 1,
  RAREFY_GELU = 2,
  RAREFY_GELU_TANH = 3,
  RAREFY_SILU = 4,
  RAREFY_RELU6 = 5,
  RAREFY_HARDSWISH = 6,
  RAREFY_HARDSIGMOID = 7,
  RAREFY_SIGMOID = 8,
  RAREFY_TANH = 9,
};

typedef void (*rarefy_range_fn)(int64_t begin, int64_t end, void* context);
typedef int (*rarefy_parallel_for_fn)(int64_t begin, int64_t end, int64_t grain, rarefy_range_fn body, void* context);

// Sparse weight as bitmasks, in blocks of four rows by 64 columns: the nonzero values of each row follow its mask.
// int4 values are nibbles (value + 8), low nibble first; each row of a block starts at a byte and has its own scale.
struct rarefy_bitmask {
  int64_t rows, cols;     // outputs, inputs
  int64_t col_blocks;     // blocks of 64 columns, (cols + 63) / 64
  const uint64_t* masks;  // [rows / 4][col_blocks][4]; bit j of block b is column 64 b + j; rows padded to fours
  const int64_t* starts;  // [rows / 4], index of the first value of each row tile
  const void* values;     // readable for 64 bytes past the last value
  const void* scales;     // int8: float [rows]; int4: bf16 [rows / 4][col_blocks][4]
  const void* row_sums;   // int8: int32 [rows], sum of values; int4: float [rows], sum of values times scales
  const float* bias;      // [rows] or null
  int32_t dtype, act;
};

// Dense weight of 4, 5, 6 or 8 bits in blocks of four rows by 64 columns, zero-padded after the last column. A block
// stores its rows one after the other: 64 int8 values each, or codes from which a zero point is subtracted:
//   int4    32 bytes of each row: byte i holds columns 2 i (low nibble) and 2 i + 1
//   int5/6  the low four bits, as int4; then the high bits, whose byte i belongs to the same columns: of int5 32 bytes,
//           row r in bits 2 r (even columns) and 2 r + 1; of int6 32 bytes of rows 0 and 2, then of 1 and 3, the first
//           row in bits 0-1 (even columns) and 2-3, the second one in bits 4-5 and 6-7
struct rarefy_quantized {
  int64_t rows, cols;       // outputs, inputs
  int64_t col_blocks;       // blocks of 64 columns, (cols + 63) / 64
  const void* values;       // [rows / 4][col_blocks][32 bytes for each bit of a value]
  const uint16_t* scales;   // bf16 [rows / 4][col_blocks][4][scale_groups], or null
  const uint8_t* zeros;     // zero points of less than 8 bits, shaped like scales; null: 8, of int5 16, of int6 32
  const float* row_scales;  // [rows], one scale for a whole row, or null
  const float* row_sums;    // [rows], sum of values times `scales` (without row_scales)
  const float* bias;        // [rows] or null
  int32_t dtype, act;       // RAREFY_I8, RAREFY_I4, RAREFY_I5 or RAREFY_I6
  int32_t scale_groups;     // scales of a row in a block: 0 (row_scales only), 1, or 2 (32 columns each)
  int32_t fp32_inputs;      // 1: inputs stay fp32; 0: each input row is quantized to int8
  int32_t two_terms;        // 1: what that loses is quantized to int8 as well
  int32_t zero_bits;        // 0, or 3: zero points in eighths, (8 code - zero) times the scale; of 4 or 5 bits, with
                            // two terms and two scale_groups
};

// Blocks of weights that share a scale, and what is fitted to them: the scale of least squared error among those of the
// whole range of a block and of `fractions` of it.
struct rarefy_scale_fit {
  const float *x, *weigh;  // [blocks][size]; weights of the squared errors, or null
  int64_t blocks, size;
  const float* fractions;  // [count]
  int64_t count;
  int32_t min_code, max_code;
  int32_t symmetric;    // 1: no zero points
  float *scale, *zero;  // [blocks]; null where symmetric
};

// Sparse weight in row tiles. In each tile the columns are sorted by pattern: which of the four rows are nonzero there.
struct rarefy_tiles {
  int64_t rows, inputs;    // outputs, inputs
  int64_t lanes;           // inputs in lanes
  int64_t block;           // lanes of a column block; column indices count from its start
  const uint16_t* counts;  // [tiles][blocks][16], columns of each pattern; pattern 0 has none
  const int64_t* starts;   // [tiles][blocks][2], index of the first column and of the first value
  const uint16_t* columns;
  const uint32_t* values;
  const float* scales;      // int8, int16: [rows]
  const int32_t* row_sums;  // int8: [rows], sum of values
  const float* bias;
  int32_t dtype, act;
};

// Sparse weight as SELL-C-sigma with slices of two rows. In each column block, the rows of a slab of 128 are sorted by
// their number of nonzeros and paired; the values and columns of the two rows of a pair are interleaved.
struct rarefy_sell {
  int64_t rows, inputs;     // outputs, inputs
  int64_t lanes;            // inputs in lanes
  int64_t block;            // lanes of a column block
  const int64_t* starts;    // [slabs][blocks], index of the first pair of values of a block
  const uint16_t* counts;   // [slabs][blocks][64], pairs of values of each pair of rows
  const uint8_t* order;     // [slabs][blocks][64][2], the two rows of each pair, within the slab
  const uint16_t* columns;  // [n][2], lanes within the block
  const uint32_t* values;   // [n][2]
  const float* scales;      // int8, int16: [rows]
  const int32_t* row_sums;  // int8: [rows], sum of values
  const float* bias;
  int32_t dtype, act;
};

// Compressed sparse rows, for high sparsity. At most 65,536 inputs.
struct rarefy_csr {
  int64_t rows, inputs;
  const int64_t* starts;  // [rows + 1], index of the first value of each row
  const uint16_t* columns;
  const void* values;
  const float* scales;  // int8: [rows]
  const float* bias;
  int32_t dtype, act;
};

// Dense weight, for layers with few zeros. Runs in programs only. fp32: four rows interleaved. bf16 and int8: blocks of
// 16 rows by 16 lanes, as AMX reads them; rows and lanes are padded with zeros.
struct rarefy_dense {
  int64_t rows, cols;
  const void* values;       // fp32: [rows / 4][cols][4]; bf16, int8: lanes [rows / 16][lanes / 16][16 rows][16 lanes]
  const float* scales;      // int8, int16: [rows]
  const int32_t* row_sums;  // int8: [rows], sum of values
  const float* bias;        // [rows] or null
  int32_t dtype, act;
};

// Convolution weight. Its rows are the outputs of one group after the other, each group padded to whole row tiles; its
// lanes are (input of the group, kernel row, kernel column). fp32, or int8 with one group and four inputs in a lane.
struct rarefy_conv {
  rarefy_tiles weight;              // its bias covers all outputs
  const rarefy_sell* sell;          // one group: used in place of the tiles, or null
  const void* dense;                // one group: values as in rarefy_dense in place of the tiles, or null
  int64_t groups, outputs, inputs;  // outputs and inputs (int8: lanes of four inputs) of a group
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

int32_t rarefy_abi_version(void);
const char* rarefy_isa(void);  // the active instruction set
// 1: inputs have a scale for each 32 features in place of two terms: those of column tiles, or with `rows` single ones
// of weights of 4 to 6 bits.
int rarefy_scales_blocks(int rows);
int rarefy_multiplies_bf16(void);      // 1: it multiplies bf16 faster than fp32 on this CPU
int rarefy_set_isa(const char* name);  // "amx", "avx512", "avx2", "portable"; RAREFY_INVALID where the CPU lacks it
void rarefy_set_parallel_for(rarefy_parallel_for_fn run, int (*num_threads)(uint32_t*));

// Bounds-check every index of a weight. Call these before running a weight that comes from a file. O(values).
int rarefy_check_bitmask(const rarefy_bitmask* w, int64_t values);
int rarefy_check_csr(const rarefy_csr* w, int64_t values);
int rarefy_check_quantized(const rarefy_quantized* w, int64_t values);
int rarefy_check_tiles(const rarefy_tiles* w, int64_t columns, int64_t values);
int rarefy_check_sell(const rarefy_sell* w, int64_t values);
int rarefy_check_conv(const rarefy_conv* w, int64_t columns, int64_t values);  // SELL: columns is unused

// y[n][rows] = act(x[n][inputs] w^T + bias + residual). ldx and ldy are the row strides of x and y in floats. The
// residual is laid out like y and may be null.
int rarefy_run_bitmask(const rarefy_bitmask* w, const float* x, int64_t ldx, const float* residual, float* y,
                       int64_t ldy, int64_t n);
int rarefy_run_quantized(const rarefy_quantized* w, const float* x, int64_t ldx, const float* residual, float* y,
                         int64_t ldy, int64_t n);
int rarefy_run_csr(const rarefy_csr* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                   int64_t n);
int rarefy_run_tiles(const rarefy_tiles* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                     int64_t n);
int rarefy_run_sell(const rarefy_sell* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                    int64_t n);

enum rarefy_format {
  RAREFY_BITMASK = 0,
  RAREFY_CSR = 1,
  RAREFY_TILES = 2,
  RAREFY_QUANTIZED = 3,
  RAREFY_SELL = 4,
  RAREFY_DENSE = 5,  // in programs only
};
enum { RAREFY_MAX_GROUPED = 16 };
// Multiply the same inputs by several weights of one format and dtype: y[j] is [n][rows of weight j].
int rarefy_run_grouped(int32_t format, const void* const* w, int64_t count, const float* x, int64_t ldx,
                       float* const* y, int64_t n);
// Dequantize rows of a weight, out[n][cols]; RAREFY_INVALID for a row index out of range.
int rarefy_dequantize_rows(const rarefy_quantized* w, const int64_t* rows, int64_t n, float* out);

// y[n][outputs][OH][OW] = act(x[n][inputs][height][width] convolved with w + bias + residual), all contiguous.
int rarefy_run_conv(const rarefy_conv* w, const float* x, int64_t height, int64_t width, const float* residual,
                    float* y, int64_t n);

// ---- programs -------------------------------------------------------------------------------------------------------
// A program is a list of steps on fp32 activations. Activations are stored in column tiles [tiles][features][64], so
// that no step transposes; in decode steps they are stored row-major, [tokens][features].

enum rarefy_op {
  RAREFY_OP_PACK = 0,       // x[batch][tokens][features], or with channels_first x[batch][features][tokens] -> out
  RAREFY_OP_UNPACK = 1,     // x -> out[batch][tokens][features], or as above
  RAREFY_OP_LINEAR = 2,     // out = act(weight x + bias + residual)
  RAREFY_OP_CONVERT = 3,    // out = x in `dtype`, and for int8 and int16 out_scales; in column tiles bf16, int8, int16
  RAREFY_OP_NORM = 4,       // out = norm(x) gamma + bias, for each of `groups` groups of features
  RAREFY_OP_ADD = 5,        // out = act(x + other)
  RAREFY_OP_MUL = 6,        // out = act(x) other
  RAREFY_OP_ATTENTION = 7,  // as `attention` says
  RAREFY_OP_ROPE = 8,       // out = x with rotary positions in each of `heads` heads
  RAREFY_OP_KV_STORE = 9,   // write x into the KV cache of `attention`
  RAREFY_OP_PAD_PLANES = 10,       // out = images x in padded planes, for the convolution of `indirection`
  RAREFY_OP_CONV = 11,             // out = act(convolution of the planes x + bias + residual)
  RAREFY_OP_MAX_POOL = 12,         // out = maximum over the kernel window of the planes x
  RAREFY_OP_DEPTHWISE_CONV = 13,   // out = act(depthwise convolution of the planes x + bias)
  RAREFY_OP_GLOBAL_AVG_POOL = 14,  // out[batch] = mean over the pixels of each image of x
  RAREFY_OP_IMAGE_ABSMAX = 15,     // out = largest magnitude of each image in a tile, at its first column there
  RAREFY_OP_CHANNEL_AFFINE = 16,   // out = act(x gamma + bias), with a gamma and a bias for each feature
  RAREFY_OP_CHANNEL_SCALE = 17,    // out = x times the feature of its image in `other`, which has one column an image
  RAREFY_OP_REARRANGE = 18,        // out = columns of x in another order, as `segments` says
  RAREFY_OP_FAKE_QUANTIZE = 19,    // out = x rounded to int8 codes with one scale for all, dequantized
  RAREFY_OP_GROUP_NORM = 20,       // out = x normalized over pixels and features of `groups` groups of each image
  RAREFY_OP_NHWC_QUANTIZE = 21,    // out_codes = the images x: tiles, with channels_first external, with nhwc->in
                                   // NHWC of numbers; `out_codes` and x of NHWC_* are int8 codes, or fp32 numbers
  RAREFY_OP_NHWC_CONV = 22,        // out, out_codes = act(convolution of x + bias + residual, of the dtype of x)
  RAREFY_OP_NHWC_MAX_POOL = 23,    // out_codes = maximum over the kernel window of the codes x
  RAREFY_OP_NHWC_DEPTHWISE = 24,   // as NHWC_CONV, for depthwise convolutions
  // On fp32 NHWC images (nhwc_channels.hpp):
  RAREFY_OP_NHWC_MAP = 25,     // out_codes = act(x * gamma + bias + residual), or x * other of its image
  RAREFY_OP_NHWC_COPY = 26,    // channels of out_codes from nhwc->first_channel on = x, in nhwc->order
  RAREFY_OP_NHWC_MEAN = 27,    // out = means over the pixels of each image x
  RAREFY_OP_NHWC_UNPACK = 28,  // out = the image x in tiles
  RAREFY_OP_NHWC_SPREAD = 29,  // pixels of out_codes = the channels of x, nhwc->stride pixels for each pixel
  RAREFY_OP_COUNT = 30,
};

struct rarefy_view {
  float* data;     // null: the step has no such operand
  int64_t stride;  // floats from one column tile to the next; in decode steps from one token to the next
};

// Keys and values of the tokens so far, in pages of 64 tokens: for each layer its keys, then its values,
// [features][64].
struct rarefy_kv_cache {
  float* data;            // [pages][features][64] in fp32; null for a cache in 8 bits
  const int64_t* starts;  // [batch], the first token of each sequence that is not padding; or null
  const int32_t* pages;   // [batch][tiles], of each 64 tokens of a sequence; sequences may share full ones
  int64_t tiles;          // of a sequence
  int64_t length;         // tokens in the cache
  int64_t features;       // of a token: keys and values of all layers
  int8_t* codes;          // [pages][features][64], each head as in kv_codes.hpp; null for a cache in fp32
  float* scales;          // of codes: [pages][features / head_dim][64], a row for each head
  int64_t head_dim;       // features of the smallest head of all layers
};

// How a convolution reads padded planes: for each lane, the offset of its first input from an output's position.
struct rarefy_indirection {
  const rarefy_conv* conv;  // of one group; of one input for pooling and depthwise convolutions
  int64_t height, width;    // of the images
  const int32_t* offsets;   // [lanes]
};

// out = softmax(q k scale + mask) v for each head; the features of a head are contiguous. With a cache, keys and values
// come from the cache.
struct rarefy_attention {
  const float *q, *k, *v;
  float* out;
  int64_t q_stride, k_stride, v_stride, out_stride;  // as in rarefy_view
  const float* mask;                                 // additive, or null
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;
  int64_t batch, heads, kv_heads, head_dim, queries, keys;
  int64_t seq_stride;  // columns from one sequence of queries to the next
  const rarefy_kv_cache* cache;
  int64_t k_offset, v_offset;  // features of earlier layers in the cache
  int64_t window;              // keys that a query attends to at most, itself included; 0: all
  float scale;
  int32_t causal;
  int32_t dtype;          // of the products: fp32, or without a cache bf16 or int8
  float cap;              // with a cache, a score s becomes cap tanh(s / cap); 0: it stays
  int64_t kv_seq_stride;  // columns from one sequence of keys and values to the next, without a cache
  const int64_t* bounds;  // [batch][2], first column and tokens of each sequence, without a cache and a mask; `queries`
                          // and `keys` are those of the longest. null: as seq_stride, queries and keys say
  int64_t heads_together;  // with a cache: heads that read the same keys and are computed by one thread
  float max_bias;          // with a cache, linear position biases (ALiBi) as alibi_slope says; 0: none
};

// Consecutive columns of a tile whose inputs are consecutive in memory too.
struct rarefy_segment {
  int64_t source;        // where they are read, from the offset of a lane on
  int32_t column, size;  // first column, number of columns
};

// Images of int8 codes or fp32 numbers in NHWC order, one pixel's channels after the other. Each image has a border of
// pixels of zeros. Steps read up to 31 pixels and 64 bytes past the last image.
struct rarefy_nhwc_image {
  int64_t height, width, channels;
  int64_t border;       // pixels on each side
  int64_t pixel_bytes;  // from one pixel to the next
  float scale;          // a value is (code - zero) * scale
  int32_t zero;
  int32_t dtype;  // RAREFY_I8; RAREFY_F32: numbers, without scale and zero
};

// 64 bytes of inputs that are multiplied by 16 lanes of weights; the first `lanes` of them exist.
struct rarefy_nhwc_block {
  int32_t offset, lanes;  // bytes from the first input of an output
};

// An operator on NHWC images.
struct rarefy_nhwc {
  rarefy_nhwc_image in, out, residual;  // out, residual: of the codes, where the step has such operands
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  // The rest is for NHWC_CONV and NHWC_DEPTHWISE. Outputs are padded to 64 in factors, bias, row_sums and taps.
  const uint32_t* values;           // dense: [outputs / 16][blocks][16 lanes][16 outputs]
  const rarefy_nhwc_block* blocks;  // of the inputs of an output, in the image or, with segments, in a copy of them
  const int64_t* segments;  // offsets in the image of runs of bytes that are copied together, or of taps; or null
  int64_t num_blocks, num_segments;
  int64_t segment_bytes, segment_stride;  // of a segment; from one to the next in the copy
  const float *factors, *bias;            // scales of weight times input, of codes, or, where images are fp32, of a
                                          // weight in int16, whose inputs `segments` has; bias: [outputs]
  const int32_t* row_sums;                // [outputs], sums of the weight's codes; of codes
  // NHWC_DEPTHWISE: weights of 16 bits, two columns together: [segments][(tap_columns + 1) / 2][outputs]; of fp32
  // images fp32: [segments][tap_columns][outputs]
  const uint32_t* taps;
  int64_t tap_columns;  // of the kernel; a segment is one of its rows
  // NHWC_CONV of fp32 in groups, else 0: outputs of one, a multiple of 16, and inputs. The last group may have fewer.
  int64_t group_outputs, group_channels;
  const rarefy_nhwc_block* last_blocks;  // of the last group
  int64_t first_channel;                 // NHWC_COPY, NHWC_* of fp32: where x or the outputs begin in a pixel of `out`
  const int64_t* order;                  // NHWC_COPY: the channels of x that are copied; null: all, as they are
  int64_t num_order;
};

struct rarefy_step {
  int32_t op, act;         // rarefy_op, rarefy_activation
  int32_t decode;          // 1: a decode step, activations are row-major
  int32_t format;          // LINEAR, sparse NHWC_CONV: rarefy_format of `weight`
  int32_t dtype;           // CONVERT, PAD_PLANES: rarefy_dtype of `out`; LINEAR of grouped RAREFY_QUANTIZED: of x
  int32_t channels_first;  // PACK, UNPACK, PAD_PLANES: the external tensor is [batch][features][tokens]
  int32_t per_image;       // CONVERT: one scale for each image instead of one for each column
  int32_t two_terms;  // CONVERT to int8, and LINEAR that reads it: 16 bits or more for each input. 1: codes and what
                      // rounding them lost, in scale / LOST_STEPS; 2: codes with a scale for each 32, see
                      // rarefy_scales_blocks; 3: as 2, of 12 to 32 tokens
  int32_t subtract_mean;  // NORM: LayerNorm; 0: RMSNorm
  int32_t winograd;       // NHWC_CONV of fp32: F(2x2, 3x3), whose `values` are [16][outputs / 16][blocks][16][16]
  int32_t store_values;   // KV_STORE: x are values; 0: keys
  int32_t whole_columns;  // LINEAR of bf16, int8: a part is a column tile with all rows
  int32_t codes_dtype;    // rarefy_dtype of `out_codes`: bf16 or int8
  int32_t in_zero;        // LINEAR, CONV of int8, PAD_PLANES: the code of zero in x
  int32_t codes_zero;     // CONVERT, FAKE_QUANTIZE, out_codes: the code of zero, with a codes_scale
  float in_scale;         // LINEAR, CONV of int8: one scale for all of x; 0: in_scales
  float codes_scale;      // as codes_zero, of int8: one scale for all; 0: one for each column
  float eps;              // NORM, GROUP_NORM: added to the variance
  float pad_value;        // PAD_PLANES: value outside the image; int8 planes are padded with zeros
  const void* weight;     // LINEAR; NHWC_CONV where it is sparse, else null
  const rarefy_attention* attention;      // ATTENTION, KV_STORE
  const rarefy_indirection* indirection;  // PAD_PLANES, CONV, MAX_POOL, DEPTHWISE_CONV
  rarefy_view x;
  rarefy_view out;         // null in steps that write `out_codes` alone
  rarefy_view out_codes;   // LINEAR of bf16, int8 (int8: with whole_columns), NORM: out in lanes of `codes_dtype`
  rarefy_view other;       // ADD (may be null), MUL, CHANNEL_SCALE: second operand
  rarefy_view residual;    // LINEAR, CONV: or null
  rarefy_view in_scales;   // LINEAR, CONV of int8, LINEAR of int16: scales of the columns of x, or of its images
  rarefy_view in_absmax;   // CONVERT: largest magnitudes of x, [absmax_rows][64] of each tile; null: computed from x
  rarefy_view out_scales;  // CONVERT, out_codes: scales of the columns
  rarefy_view out_absmax;  // LINEAR, CONV: receives the columns' largest magnitudes for every 128 outputs; or null
  rarefy_view cos, sin;    // ROPE: of the angles, [head_dim] for each column
  const float *gamma,
      *bias;  // NORM: [features / groups]; CHANNEL_AFFINE, GROUP_NORM, bias also DEPTHWISE_CONV: [features]; or null.
              // DEPTHWISE_CONV: gamma [tokens] multiplies the sums of each pixel, without an activation
  const float* depthwise_weights;  // DEPTHWISE_CONV: [features][kernel height * width]
  const int32_t* row_sums;         // LINEAR of RAREFY_QUANTIZED with int8 inputs: [rows], sum of values
  int64_t columns, features;       // of x and out; columns of all sequences
  int64_t batch, tokens;           // sequences (images), tokens (pixels) of each
  int64_t seq_stride;              // columns from one sequence to the next
  int64_t groups;                  // NORM, GROUP_NORM
  int64_t heads;                   // ROPE
  int64_t absmax_rows;             // CONVERT
  int64_t depends_on;              // the first `depends_on` steps must be done before this one
  // REARRANGE: for each column tile of out, from segment_starts[tile] to segment_starts[tile + 1], where its columns
  // come from: segments of at most SEGMENT_FLOATS columns, in order, that cover the tile. A negative source: zeros.
  const rarefy_segment* segments;
  const int64_t* segment_starts;
  const int64_t* token_rows;  // PACK, UNPACK: [columns], ascending: which row of the external tensor is the token
                              // in each column; null: as batch, tokens and seq_stride say
  const rarefy_nhwc* nhwc;    // NHWC_*
};

struct rarefy_step_time {  // nanoseconds that one thread
  int64_t busy;            // ran parts of a step
  int64_t waiting;         // waited before it for steps that it depends on
};

// `times`: null, or [threads][count] that receive how long each thread took for each step.
int rarefy_run_program(const rarefy_step* steps, int64_t count, rarefy_step_time* times);

enum { RAREFY_CEILING_READ = 3 };
// What all threads together reach at best. `kind`: a rarefy_dtype for multiply-adds per second of fp32, bf16 or int8,
// or RAREFY_CEILING_READ for bytes per second when each thread reads its share of `memory` [bytes] again and again.
// Takes `seconds`. Returns 0 for another kind, or memory of less than 64 KB for each thread.
double rarefy_measure_ceiling(int32_t kind, double seconds, const void* memory, int64_t bytes);

int rarefy_fit_scales(const rarefy_scale_fit* f);

int64_t rarefy_padded_image_floats(const rarefy_conv* w, int64_t height, int64_t width);  // planes of one image
void rarefy_indirection_offsets(const rarefy_conv* w, int64_t height, int64_t width, int32_t* out);  // [lanes]
}
