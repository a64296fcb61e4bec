// Sparse CPU kernels behind a plain C interface: pointers and sizes in, an error number out. Nothing here allocates
// weights, throws or knows torch; the one thing borrowed is a function that runs chunks in parallel.
#pragma once
#include <cstdint>

extern "C" {

enum rarefy_error { RAREFY_OK = 0, RAREFY_BAD = 1, RAREFY_MEMORY = 2 };
enum rarefy_kind { RAREFY_F32 = 0, RAREFY_BF16 = 1, RAREFY_I8 = 2, RAREFY_I4 = 3 };  // of values; int4 in bitmasks alone
enum rarefy_act { RAREFY_NONE = 0, RAREFY_RELU = 1, RAREFY_GELU = 2, RAREFY_GELU_TANH = 3, RAREFY_SILU = 4 };

typedef void (*rarefy_body)(int64_t begin, int64_t end, void* context);
typedef int (*rarefy_parallel)(int64_t begin, int64_t end, int64_t grain, rarefy_body body, void* context);

// Panels of four rows by 64 columns: their masks in bits, and one row after the other the values that are not zero.
// Those of int4 are nibbles (value + 8), the lower first; each row of a panel begins with a byte and has a scale.
struct rarefy_bitmask {
  int64_t rows, cols;       // outputs, inputs
  int64_t words;            // 64-bit words of a row's mask, (cols + 63) / 64
  const uint64_t* masks;    // [rows / 4][words][4], bit j of word w is column 64 w + j; rows are padded to fours
  const int64_t* starts;    // [rows / 4], where the values of four rows begin
  const void* values;       // 64 bytes may be read past the last
  const void* scales;       // int8: float [rows]; int4: bf16 [rows / 4][words][4]
  const void* sums;         // int8: int32 [rows], sums of values; int4: float [rows], of values times their scales
  const float* bias;        // [rows] or null
  int32_t kind, act;
};

// Panels of four rows by 64 columns of whole numbers, one row after the other, without gaps: bytes, or nibbles of which
// the lower comes first and which mean themselves less a zero. Past the last column lie zeros.
struct rarefy_panels {
  int64_t rows, cols;       // outputs, inputs
  int64_t words;            // 64 columns each, (cols + 63) / 64
  const void* values;       // [rows / 4][words][4][64 or 32]
  const uint16_t* scales;   // bf16 [rows / 4][words][4][parts], or null
  const uint8_t* zeros;     // of nibbles, as scales lie; null: 8
  const float* whole;       // [rows], the scale of a whole row, or null
  const float* sums;        // [rows], of numbers times scales (but for `whole`)
  const float* bias;        // [rows] or null
  int32_t kind, act;        // RAREFY_I8 or RAREFY_I4
  int32_t parts;            // scales of a row of 64: 0 (it has one for all), 1, or 2 of 32 columns each
  int32_t exact;            // inputs as they are in fp32; 0: rounded to bytes, each with a scale
};

// Four rows at a time; the columns of such a tile, sorted by which of its rows have a value there.
struct rarefy_tiles {
  int64_t rows, inputs;     // outputs, inputs
  int64_t cols;             // inputs in lanes of 4 bytes (1 fp32, 2 bf16, 4 int8)
  int64_t block;            // lanes of a block of columns; columns count from its beginning
  const uint16_t* counts;   // [tiles][blocks][16], columns of each pattern; that of pattern 0 is 0
  const int64_t* starts;    // [tiles][blocks][2], where its columns and values begin
  const uint16_t* columns;
  const uint32_t* values;
  const float* scales;      // int8: [rows]
  const int32_t* sums;      // int8: [rows], sums of values
  const float* bias;
  int32_t kind, act;
};

// Pairs of rows of about as many values: SELL-C-sigma. Slabs of 128 rows; in each block of lanes their rows come sorted
// by how many values they have there, two and two, values and lanes of one beside those of the other.
struct rarefy_sell {
  int64_t rows, inputs;     // outputs, inputs
  int64_t cols;             // inputs in lanes of 4 bytes
  int64_t block;            // lanes of a block
  const int64_t* starts;    // [slabs][blocks], where the pairs of values of a block begin
  const uint16_t* counts;   // [slabs][blocks][64], pairs of values of a pair of rows
  const uint8_t* order;     // [slabs][blocks][64][2], which rows of the slab these are
  const uint16_t* columns;  // [n][2], lanes within the block
  const uint32_t* values;   // [n][2]
  const float* scales;      // int8: [rows]
  const int32_t* sums;      // int8: [rows], sums of values
  const float* bias;
  int32_t kind, act;
};

// One row after the other: values that are not zero and their columns, for high sparsity. At most 65,536 inputs.
struct rarefy_csr {
  int64_t rows, inputs;
  const int64_t* starts;    // [rows + 1], where the values of a row begin
  const uint16_t* columns;
  const void* values;
  const float* scales;      // int8: [rows]
  const float* bias;
  int32_t kind, act;
};

// A weight as it is, where zeros are few. In plans alone.
struct rarefy_dense {
  int64_t rows, cols;
  const float* values;      // [rows / 4][cols][4]
  const float* bias;
  int32_t kind, act;
};

// A convolution: tiles whose rows are the outputs of one group after the other, padded to fours in each, and whose
// lanes are (input of a group, kernel row, kernel column). fp32; or int8 of one group, whose lanes are of four inputs.
struct rarefy_conv {
  rarefy_tiles weight;      // its bias is that of all outputs
  const rarefy_sell* sell;  // of one group: the weight as pairs of rows, in the place of those tiles; or null
  const float* dense;       // of one group: the weight as it is, [outputs / 4][lanes][4], in their place; or null
  int64_t groups, outputs, inputs;  // outputs and inputs, or fours of them, of a group
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

const char* rarefy_isa(void);                      // what serves this process
int rarefy_use_isa(const char* name);              // "avx512", "avx2", "portable"; RAREFY_BAD where this CPU has it not
void rarefy_use_parallel(rarefy_parallel run, int (*threads)(uint32_t*));
// Whether every index leads inside; to be asked of what comes from a file before it runs. O(values).
int rarefy_check_bitmask(const rarefy_bitmask* w, int64_t values);
int rarefy_check_csr(const rarefy_csr* w, int64_t values);
int rarefy_check_panels(const rarefy_panels* w, int64_t values);
int rarefy_check_tiles(const rarefy_tiles* w, int64_t columns, int64_t values);
int rarefy_check_sell(const rarefy_sell* w, int64_t values);
int rarefy_check_conv(const rarefy_conv* w, int64_t columns, int64_t values);  // of sell: values alone

// y[n][rows] = act(x[n][inputs] times w transposed + bias + residual); rows of x and y are ldx and ldy apart. The residual
// lies as y does, and may be null.
int rarefy_run_bitmask(const rarefy_bitmask* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                       int64_t n);
int rarefy_run_panels(const rarefy_panels* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                      int64_t n);
int rarefy_run_csr(const rarefy_csr* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                   int64_t n);
int rarefy_run_tiles(const rarefy_tiles* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                     int64_t n);
int rarefy_run_sell(const rarefy_sell* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                    int64_t n);
// The same inputs times each of several weights of one format and kind, as one call: outputs y[j] are [n][rows of j].
enum rarefy_format {
  RAREFY_BITMASK = 0, RAREFY_CSR = 1, RAREFY_TILES = 2, RAREFY_PANELS = 3, RAREFY_SELL = 4,
  RAREFY_DENSE = 5,  // of plans alone
};
enum { RAREFY_MOST_JOBS = 16 };
int rarefy_run_together(int32_t format, const void* const* w, int64_t count, const float* x, int64_t ldx, float* const* y,
                        int64_t n);
// Rows of a weight, out[n][cols]; RAREFY_BAD where it has one of them not.
int rarefy_rows_of_panels(const rarefy_panels* w, const int64_t* rows, int64_t n, float* out);
// A plan: steps on fp32 tensors that lie in tiles of 64 columns (tokens), [tiles][features][64], so that nothing is
// turned around between products; or, where tokens are `few`, row after row. A sequence begins `apart` columns after the
// one before.
enum rarefy_op {
  RAREFY_PACK = 0,    // x[batch][tokens][features] -> out; with flag x[batch][features][tokens], as images lie
  RAREFY_UNPACK = 1,  // x -> out[batch][tokens][features]; flag as above
  RAREFY_PRODUCT = 2, // out = act(w x + bias + more); w: of the format in flag; of int8, x and sum are what
                      // RAREFY_BYTES made
  RAREFY_BYTES = 3,   // x -> out, in bytes, and sum, the scales of columns. Their largest magnitudes are in `more`: with
                      // flag 1 `groups` of them for a column, with flag 2 those of whole sequences (images), as
                      // RAREFY_RANGE made them. Of few tokens in the numbers of flag, up to whole 64 features
  RAREFY_NORM = 4,    // out = norm(x) gain + bias, for each of `groups`; flag: whether means are taken off
  RAREFY_ADD = 5,     // out = act(x + more)
  RAREFY_TIMES = 6,   // out = act(x) more
  RAREFY_ATTEND = 7,  // w: rarefy_attention
  RAREFY_ROTATE = 8,  // out = x with each of `groups` (heads) turned by the angles of cosines `more` and sines `sum`
  RAREFY_KEEP = 9,    // x into the cache of w (rarefy_attention): keys, or with flag values
  RAREFY_PLANES = 10,  // images x -> out, padded planes for w (rarefy_image), with `least` outside; flag 1: x lies
                       // [batch][features][pixels], 2: of bytes, with zeros outside
  RAREFY_CONVOLVE = 11,  // out = act(planes x convolved with w (rarefy_image) + bias + more); of int8, x are planes of
                         // bytes, and sum their images' scales. With flag 1 by squares of two by two outputs: w has
                         // kernel 4, stride 2, and dense weights [16][outputs / 4][inputs][4]
  RAREFY_POOL = 12,    // out = the largest of the pixels of planes x that w (rarefy_image) takes together
  RAREFY_DEPTHWISE = 13, // out = act(planes x, each channel convolved with its weights in gain, + bias)
  RAREFY_AVERAGE = 14, // means of images x -> out[batch] as tokens
  RAREFY_RANGE = 15,   // x -> out, the largest magnitude of each image in a tile, at its first column there
  RAREFY_OPS = 16,
};

struct rarefy_place {
  float* at;
  int64_t tile;  // floats from one tile to the next; of few tokens, from one to the next
};

struct rarefy_step {
  int32_t op, act;
  const void* w;
  rarefy_place x, more, out, sum;
  rarefy_place range;                                // product, convolve: of each 128 outputs the largest magnitudes of
                                                     // columns; or null
  const float *gain, *bias;
  const int32_t* sums;                               // of panels: of each row's whole numbers, if inputs are bytes
  int64_t columns, features, batch, tokens, apart;  // columns: of all sequences
  int64_t groups;
  int64_t wait;                                      // how many of the steps before must be done
  float least;                                       // norm: what is added to the variance
  int32_t flag, few;
};

// Keys and values of tokens that were: for each layer its keys, then its values, [batch][capacity / 64][features][64].
struct rarefy_cache {
  float* at;
  const int64_t* starts;    // [batch], the first token of each sequence that counts; or null
  int64_t batch, capacity;  // tokens, whole tiles of them
  int64_t past;             // tokens that are there
};

// What a step brings together of padded images; w is of one group, and of a pool or depthwise of one input.
struct rarefy_image {
  const rarefy_conv* w;
  int64_t height, width;    // of images
  const int32_t* places;    // of lanes
};

// out = softmax(q k scale + mask) v for each head, whose features lie one after the other. With a cache, keys and values
// are its: `k_before`, `v_before` features of it lie before them.
struct rarefy_attention {
  const float *q, *k, *v;
  float* out;
  int64_t q_tile, k_tile, v_tile, out_tile;
  const float* mask;        // or null; how far its numbers for the next batch, head, query and key are:
  int64_t mask_batch, mask_head, mask_query, mask_key;
  int64_t batch, heads, kv_heads, width, queries, keys, apart;
  const rarefy_cache* cache;
  int64_t k_before, v_before;
  int64_t window;           // keys that a query sees at most, its own among them; 0: all
  float scale;
  int32_t causal;
};

int rarefy_run_plan(const rarefy_step* steps, int64_t count);
void rarefy_large_pages(void* p, int64_t bytes);  // asks for them in memory that nobody has touched yet
int64_t rarefy_image_floats(const rarefy_conv* w, int64_t height, int64_t width);  // of an image's planes
void rarefy_image_places(const rarefy_conv* w, int64_t height, int64_t width, int32_t* out);  // [lanes]

// y[n][outputs][OH][OW] = act(x[n][inputs][height][width] convolved with w + bias + residual), all contiguous.
int rarefy_run_conv(const rarefy_conv* w, const float* x, int64_t height, int64_t width, const float* residual, float* y,
                    int64_t n);
}
