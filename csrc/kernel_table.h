// What each instruction set provides; one table a translation unit.
#pragma once
#include <cstring>

#include "rarefy.h"

#define API extern "C" __attribute__((visibility("default")))

constexpr int64_t NT = 64;  // columns (batch or pixels) of a packed tile of inputs
constexpr int64_t SLAB = 128;  // rows among which pairs are found
constexpr int R4 = 4;       // rows of a tile or panel of weights
constexpr int64_t AHEAD = 2048;  // bytes of weights that are fetched ahead of their use
constexpr int64_t PIECE = 16;  // floats that are brought together at a time

inline float from_bf16(uint16_t v) { return __builtin_bit_cast(float, uint32_t(v) << 16); }

// Some of the outputs of a square: where they are read, counted from the place of a lane, and which they are.
struct rarefy_piece {
  int64_t from;
  int32_t to, size;
};

// What becomes of the sums of a product, of whatever format.
struct rarefy_sums {
  const float* scales;
  const int32_t* sums;
  const float* bias;
  int32_t act;
};

// What becomes of sums [rows][NT] when the last of them is there: act(sums + bias + more), where they lie. Those of bytes
// are `sums` too large, as often as what was added to inputs, and in steps of rows (`scales`) and columns.
struct rarefy_end {
  const float *bias, *more;
  int64_t rows;
  int32_t act;
  const float *scales, *steps;
  const int32_t* sums;
};

struct rarefy_table {
  const char* name;
  float no_bytes;  // four zeros in bytes, as inputs have them
  void (*bits[4])(const rarefy_bitmask&, int64_t, int64_t, const void*, int64_t, float*, int64_t, int64_t);
  void (*panels[4])(const rarefy_panels&, int64_t, int64_t, const void*, int64_t, float*, int64_t, int64_t);
  void (*settle_panels)(const rarefy_panels&, int64_t, int64_t, const float*, const float*, float*, int64_t, int64_t);
  void (*csr[4])(const rarefy_csr&, int64_t, int64_t, const float*, float*, int64_t, int64_t);  // of 1, 4, 8, 16 inputs
  void (*rows)(const rarefy_csr&, int64_t, int64_t, const float*, const float*, float*, int64_t, int64_t);
  void (*tiles[3])(const rarefy_tiles&, int64_t, int64_t, const uint32_t*, uint32_t*, int64_t);
  void (*sell[3])(const rarefy_sell&, int64_t, const uint32_t*, uint32_t*, int64_t, const rarefy_end*);
  void (*bring)(const float*, const float*, const int32_t*, int64_t, const rarefy_piece*, int, uint32_t*);
  void (*tiles_one[2])(const rarefy_tiles&, int64_t, int64_t, int64_t, const uint32_t*, uint32_t*, int64_t);  // fp32, bytes
  void (*sell_one[2])(const rarefy_sell&, int64_t, int64_t, int64_t, const uint32_t*, uint32_t*, int64_t,
                      const rarefy_end*);
  void (*put)(const float*, int64_t, int64_t, const float*, const float*, int, float*, int64_t, bool);
  void (*halve)(const float*, int64_t, float*);
  uint32_t (*largest)(const float*, int64_t);
  void (*pack[3])(const float*, int64_t, int64_t, int64_t, const float*, uint32_t*);
  void (*convert[4])(const float*, int64_t, int64_t, float, void*);
  void (*settle[4])(const rarefy_bitmask&, int64_t, int64_t, const float*, const float*, float*, int64_t, int64_t);
  void (*finish[3])(const rarefy_sums&, int64_t, int64_t, const uint32_t*, const float*, int64_t, const float*, float*,
                    int64_t);
  void (*norm)(const float*, int64_t, int64_t, const float*, const float*, float, bool, float*);
  void (*unpack)(const float*, int64_t, int64_t, float*, int64_t);
  void (*pair)(const float*, const float*, bool, int, float*, int64_t);
  void (*ranges)(const float*, int64_t, float*);
  void (*to_bytes)(const float*, int64_t, const float*, uint32_t*);
  void (*settle_bytes)(const rarefy_end&, float*);
  void (*attend)(const rarefy_attention&, int64_t, int64_t, int64_t);
  void (*gathered)(const float*, int64_t, const float*, bool, float*);
  void (*norm_row)(const float*, int64_t, const float*, const float*, float, bool, float*);
  void (*rotate[2])(const float*, const float*, const float*, int64_t, int64_t, float*);  // a tile, a row
  void (*attend_row)(const rarefy_attention&, int64_t, int64_t, int64_t, float*);
  void (*unfold[4])(const rarefy_bitmask&, int64_t, uint32_t*);
  void (*unfold_panels)(const rarefy_panels&, int64_t, bool, uint32_t*);
  void (*dense[2])(const uint32_t*, int64_t, int64_t, int64_t, const uint32_t*, uint32_t*, int64_t, bool);  // fp32, bytes
  void (*squares_in)(const float*, const int32_t*, int64_t, const rarefy_piece*, int, float*, int64_t);
  void (*squares_out)(const float*, int64_t, int64_t, float, const float*, int, float*);
};

const rarefy_table& rarefy_chosen();  // what serves this process
float rarefy_step_of(const rarefy_table& t, const float* x, int64_t n);  // of n inputs in bytes
