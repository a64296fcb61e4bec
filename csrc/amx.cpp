// Dense multiplication on AMX tiles: 16 rows of 64 bytes each. Weights are stored in such tiles; 16 lanes by 16 columns
// of a column tile are one too. The other kernels of a CPU with AMX are those for AVX-512.
#if defined(RAREFY_EMULATED)
#include "amx_emulation.hpp"
#else
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

static_assert(NHWC_OUTPUTS == TILE_COLS);  // sums of both kinds of products are stored alike

constexpr int64_t LANES = 16, BLOCK = 16 * LANES, COLUMN_STRIDE = TILE_COLS * 4;  // bytes from one row to the next
constexpr int64_t NHWC_BLOCKS_IN_L1 = 18;                                         // blocks of 32 outputs, 2 KB each
constexpr int64_t BLOCKS_IN_L1 = 8;  // blocks of 32 rows and 64 columns, 2 and 4 KB each, that fit the L1 cache

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// Configure eight tiles of full size, and keep what was configured before: another library may use AMX too.
void begin_dense(rarefy_dense_state* before) {
  _tile_storeconfig(before);
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
}

void end_dense(const rarefy_dense_state* before) {
  if (before->bytes[0])  // its palette
    _tile_loadconfig(before);
  else
    _tile_release();
}

// Tiles 0 to 3 are the sums of ROWS by COLUMNS, each 16 or 32, whose rows are COLUMN_STRIDE bytes apart.
template <int ROWS, int COLUMNS>
inline void load_sums(const uint32_t* acc, bool accumulate) {
  const uint32_t* below = acc + 16 * TILE_COLS;
  if (accumulate) {
    _tile_loadd(0, acc, COLUMN_STRIDE);
    if constexpr (COLUMNS > 16) _tile_loadd(1, acc + 16, COLUMN_STRIDE);
    if constexpr (ROWS > 16) _tile_loadd(2, below, COLUMN_STRIDE);
    if constexpr (ROWS > 16 && COLUMNS > 16) _tile_loadd(3, below + 16, COLUMN_STRIDE);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS > 16) _tile_zero(1);
    if constexpr (ROWS > 16) _tile_zero(2);
    if constexpr (ROWS > 16 && COLUMNS > 16) _tile_zero(3);
  }
}

template <int ROWS, int COLUMNS>
inline void store_sums(uint32_t* acc) {
  uint32_t* below = acc + 16 * TILE_COLS;
  _tile_stored(0, acc, COLUMN_STRIDE);
  if constexpr (COLUMNS > 16) _tile_stored(1, acc + 16, COLUMN_STRIDE);
  if constexpr (ROWS > 16) _tile_stored(2, below, COLUMN_STRIDE);
  if constexpr (ROWS > 16 && COLUMNS > 16) _tile_stored(3, below + 16, COLUMN_STRIDE);
}

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs. Two blocks of rows by two of columns; one block of rows where
// ROWS is 16. The tile numbers must be literals.
#define MULTIPLY(sum, weight, input)      \
  do {                                    \
    if constexpr (DTYPE == RAREFY_I8)     \
      _tile_dpbsud(sum, weight, input);   \
    else                                  \
      _tile_dpbf16ps(sum, weight, input); \
  } while (false)

template <int DTYPE, int ROWS, int COLUMNS>
inline void multiply_tiles(const uint32_t* values, int64_t row_stride, int64_t blocks, bool accumulate,
                           const uint32_t* x, uint32_t* acc) {
  load_sums<ROWS, COLUMNS>(acc, accumulate);
  for (int64_t b = 0; b < blocks; ++b, values += BLOCK, x += LANES * TILE_COLS) {
    _tile_loadd(6, x, COLUMN_STRIDE);
    _tile_loadd(4, values, 64);
    MULTIPLY(0, 4, 6);
    if constexpr (COLUMNS > 16) {
      _tile_loadd(7, x + 16, COLUMN_STRIDE);
      MULTIPLY(1, 4, 7);
    }
    if constexpr (ROWS > 16) {
      _tile_loadd(5, values + row_stride, 64);
      MULTIPLY(2, 5, 6);
      if constexpr (COLUMNS > 16) MULTIPLY(3, 5, 7);
    }
  }
  store_sums<ROWS, COLUMNS>(acc);
}

// What AMX can do at best: as multiply_adds in ceilings.hpp, with weights and inputs in tiles.
template <int DTYPE>
int64_t multiply_adds(const uint32_t* weights, const uint32_t* x, int64_t rounds, uint32_t* sums) {
  rarefy_dense_state before;
  begin_dense(&before);
  load_sums<32, 32>(sums, false);
  _tile_loadd(4, weights, 64);
  _tile_loadd(5, weights + BLOCK, 64);
  _tile_loadd(6, x, COLUMN_STRIDE);
  _tile_loadd(7, x + 16, COLUMN_STRIDE);
  for (int64_t round = 0; round < rounds; ++round) {
    MULTIPLY(0, 4, 6);
    MULTIPLY(1, 4, 7);
    MULTIPLY(2, 5, 6);
    MULTIPLY(3, 5, 7);
  }
  store_sums<32, 32>(sums);
  end_dense(&before);
  return rounds * 4 * 16 * 16 * LANES * (DTYPE == RAREFY_I8 ? 4 : 2);
}
#undef MULTIPLY

// Products of NHWC images: PIXELS and OUTPUTS are 16 or 32; tiles 4 and 5 are pixels, 6 and 7 weights.
template <int PIXELS, int OUTPUTS>
inline void nhwc_tiles(const rarefy_nhwc_block* blocks, int64_t count, const uint8_t* x, int64_t x_stride,
                       const uint32_t* values, int64_t group_stride, bool accumulate, uint32_t* acc) {
  load_sums<PIXELS, OUTPUTS>(acc, accumulate);
  for (int64_t b = 0; b < count; ++b, values += BLOCK) {
    const uint8_t* in = x + blocks[b].offset;
    _tile_loadd(6, values, 64);
    _tile_loadd(4, in, x_stride);
    _tile_dpbusd(0, 4, 6);
    if constexpr (OUTPUTS > 16) {
      _tile_loadd(7, values + group_stride, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (PIXELS > 16) {
      _tile_loadd(5, in + 16 * x_stride, x_stride);
      _tile_dpbusd(2, 5, 6);
      if constexpr (OUTPUTS > 16) _tile_dpbusd(3, 5, 7);
    }
  }
  store_sums<PIXELS, OUTPUTS>(acc);
}

void nhwc_products(const rarefy_nhwc_block* blocks, int64_t num_blocks, const uint8_t* x, int64_t x_stride,
                   int64_t pixels, const uint32_t* values, int64_t groups, uint32_t* acc) {
  const int64_t group_stride = num_blocks * BLOCK;
  for (int64_t b = 0; b < num_blocks; b += NHWC_BLOCKS_IN_L1) {
    const int64_t count = std::min(NHWC_BLOCKS_IN_L1, num_blocks - b);
    for (int64_t g = 0; g < groups; g += 2)
      for (int64_t p = 0; p < pixels; p += 32) {
        const bool two = groups - g > 1;
        auto* multiply = pixels - p > 16 ? (two ? nhwc_tiles<32, 32> : nhwc_tiles<32, 16>)
                                         : (two ? nhwc_tiles<16, 32> : nhwc_tiles<16, 16>);
        multiply(blocks + b, count, x + p * x_stride, x_stride, values + g * group_stride + b * BLOCK, group_stride,
                 b > 0, acc + p * NHWC_OUTPUTS + g * 16);
      }
  }
}

template <int DTYPE>
void dense_lanes(const uint32_t* values, int64_t lane_blocks, int64_t rows, const uint32_t* x, uint32_t* acc,
                 int64_t columns) {
  const int64_t row_stride = lane_blocks * BLOCK;
  for (int64_t b = 0; b < lane_blocks; b += BLOCKS_IN_L1) {
    const int64_t blocks = std::min(BLOCKS_IN_L1, lane_blocks - b);
    const uint32_t* in = x + b * LANES * TILE_COLS;
    for (int64_t n = 0; n < columns; n += 32) {
      const bool two = columns - n > 16;
      auto* multiply = rows > 16 ? (two ? multiply_tiles<DTYPE, 32, 32> : multiply_tiles<DTYPE, 32, 16>)
                                 : (two ? multiply_tiles<DTYPE, 16, 32> : multiply_tiles<DTYPE, 16, 16>);
      multiply(values + b * BLOCK, row_stride, blocks, b > 0, in + n, acc + n);
    }
  }
}

}  // namespace

// Whether the CPU has AMX, and the system lets this process use it.
bool rarefy_has_amx() {
#if defined(RAREFY_EMULATED)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24, INT8 = 1u << 25;  // of leaf 7; not every compiler has names
  unsigned a, b, c, features = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
  return (features & (BF16 | TILES | INT8)) == (BF16 | TILES | INT8) &&
         !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
  return false;
#endif
}

void rarefy_set_amx_kernels(rarefy_kernel_table& t) {
  t.name = "amx";
  t.quantize_blocks = nullptr;  // sums leave a tile too slowly for scales of each block
  t.begin_dense = begin_dense;
  t.end_dense = end_dense;
  t.dense_lanes[RAREFY_BF16] = dense_lanes<RAREFY_BF16>;
  t.dense_lanes[RAREFY_I8] = dense_lanes<RAREFY_I8>;
  t.nhwc_products[1] = nhwc_products;
  t.nhwc_pixels[1] = 32;
  t.multiply_adds[RAREFY_BF16] = multiply_adds<RAREFY_BF16>;
  t.multiply_adds[RAREFY_I8] = multiply_adds<RAREFY_I8>;
}
