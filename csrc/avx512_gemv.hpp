// Few inputs times quantized weights of 4, 5, 6 and 8 bits, with AVX-512 and VNNI.
//
// Weights of 8 bits with one scale for a row: products of both terms of the inputs are added up as integers for a whole
// row. Weights of fewer bits: inputs have a scale for each 32 of them, as in column tiles (blocked_inputs.hpp). Two
// rows share a vector, and codes are multiplied as they are stored, without a sign; the zero points are multiplied by
// the sums of the inputs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd512.hpp"

namespace {

// 64 inputs in two parts, the even and the odd ones, in lanes of four.
struct alignas(64) BlockInputs {
  int8_t part[2][32];
  int32_t negative_sums[8];  // of the codes of each lane of both parts, negated
  float scales[8];           // of each lane
};
static_assert(sizeof(BlockInputs) == 128);  // as many bytes as two terms

inline __m512i load_twice(const void* p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p)); }

// The sums of four vectors.
inline __m128 sum_vectors(const __m512 (&v)[4]) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  const __m512 all =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m128 low = _mm_add_ps(_mm512_extractf32x4_ps(all, 0), _mm512_extractf32x4_ps(all, 1));
  return _mm_add_ps(low, _mm_add_ps(_mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)));
}

inline void store_sums(const __m128& sums, int64_t rows, float* y) {
  float four[4];
  std::memcpy(four, &sums, sizeof four);
  std::copy_n(four, std::min<int64_t>(rows, 4), y);
}

// Quantize one row of n inputs with a scale for each 32, zero-padded to `padded`.
void convert_row_blocks(const float* x, int64_t n, int64_t padded, void* out) {
  BlockInputs* block = static_cast<BlockInputs*>(out);
  for (int64_t k = 0; k < padded; k += 64, ++block) {
    alignas(64) int8_t codes[64];
    alignas(64) int32_t sums[16];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t left = std::clamp<int64_t>(n - k - 32 * half, 0, 32);
      const auto mask = left < 32 ? (1u << left) - 1 : ~0u;
      const float* in = x + (left ? k + 32 * half : 0);
      const __m512 a = _mm512_maskz_loadu_ps(__mmask16(mask), in),
                   b = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), in + (left > 16 ? 16 : 0));
      const __m512i sign = _mm512_set1_epi32(0x7fffffff);  // magnitudes as integers: NaN is larger than all others
      const __m512i larger = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), sign),
                                              _mm512_and_si512(_mm512_castps_si512(b), sign));
      alignas(64) int32_t bits[16];
      _mm512_store_si512(bits, larger);
      const float max = __builtin_bit_cast(float, *std::max_element(bits, bits + 16)) / 127.0f;
      const float scale = max < MIN_INPUT_SCALE ? MIN_INPUT_SCALE : max + (max - max);  // infinity becomes NaN
      const __m512 inverse = _mm512_set1_ps(1.0f / scale);
      std::fill_n(block->scales + 4 * half, 4, scale);
      for (int64_t part = 0; part < 2; ++part) {
        const __m128i rounded = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(part ? b : a, inverse)));
        std::memcpy(codes + 32 * half + 16 * part, &rounded, 16);
      }
    }
    const __m512i all = _mm512_load_si512(codes);
    _mm512_store_si512(sums, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), all));
    for (int64_t i = 0; i < 8; ++i) block->negative_sums[i] = -(sums[2 * i] + sums[2 * i + 1]);
    for (int64_t i = 0; i < 32; ++i) {
      block->part[0][i] = codes[2 * i];
      block->part[1][i] = codes[2 * i + 1];
    }
  }
}

// Rows of even and odd inputs in blocks as a part of a column tile, see blocked_inputs.hpp, or of a narrow one.
void pack_block_rows(const void* rows, int64_t row_bytes, int64_t count, const rarefy_tile_blocks& p, uint32_t* tile) {
  const char* first = static_cast<const char*>(rows);
  uint32_t *codes_of = tile + p.first * SIMD_WIDTH * p.width,
           *header_of = tile + (p.all * SIMD_WIDTH + p.first * 4) * p.width;
  for (int64_t n = 0; n < count; n += SIMD_WIDTH)
    for (int64_t b = 0; b < p.count; ++b) {
      __m512i codes[SIMD_WIDTH], rest[SIMD_WIDTH];
      for (int64_t i = 0; i < SIMD_WIDTH; ++i) {
        const auto& in = reinterpret_cast<const BlockInputs*>(first + std::min(n + i, count - 1) * row_bytes)[b];
        const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.part[0])),
                      odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in.part[1]));
        const __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
        codes[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_permute2x128_si256(low, high, 0x20)),
                                      _mm256_permute2x128_si256(low, high, 0x31), 1);
        rest[i] = _mm512_loadu_si512(in.negative_sums);
      }
      transpose(codes);
      transpose(rest);
      for (int64_t l = 0; l < SIMD_WIDTH; ++l) store_raw(codes_of + (b * SIMD_WIDTH + l) * p.width + n, codes[l]);
      uint32_t* header = header_of + b * 4 * p.width + n;
      for (int64_t part = 0; part < 2; ++part, header += 2 * p.width) {
        const __m512i* sums = rest + 4 * part;
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
        store_raw(header, rest[8 + 4 * part]);
        store_raw(header + p.width, _mm512_slli_epi32(sum, 7));  // times 128
      }
    }
}

// The scales, and the zero points, of two rows in a block, one in each lane; GROUPS: how many a row has.
template <int GROUPS>
struct PairGroups {
  const __m512i scale_bytes =
      in_register(order([](int lane) { return (2 * place(lane) + 1) << 24 | (2 * place(lane)) << 16 | 0x8080; }));
  const __m512i zero_bytes = in_register(order([](int lane) { return int(0x80808000u) | place(lane); }));

  static constexpr int place(int lane) { return lane / (8 / GROUPS); }
  template <class F>
  static __m512i order(F&& f) {
    alignas(64) int32_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = f(i);
    return _mm512_load_si512(bytes);
  }
  __m512 scales(const uint16_t* s) const {
    __m512i all;
    if constexpr (GROUPS == 2) {
      int64_t four;
      std::memcpy(&four, s, 8);
      all = _mm512_set1_epi64(four);
    } else {
      int32_t two;
      std::memcpy(&two, s, 4);
      all = _mm512_set1_epi32(two);
    }
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(all, scale_bytes));
  }
  __m512i zero_points(const uint8_t* z) const {
    int32_t four = 0;
    std::memcpy(&four, z, 2 * GROUPS);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(four), zero_bytes);
  }
};

// The sums of four rows, two of them in a vector.
template <int INPUTS>
inline void store_pairs(const __m512 (&sums)[2][INPUTS], const rarefy_quantized& w, int64_t row, float* y,
                        int64_t ldy) {
  const __mmask16 low = 0xff;
  for (int m = 0; m < INPUTS; ++m) {
    const __m512 rows[4] = {_mm512_maskz_mov_ps(low, sums[0][m]), _mm512_maskz_mov_ps(__mmask16(~low), sums[0][m]),
                            _mm512_maskz_mov_ps(low, sums[1][m]), _mm512_maskz_mov_ps(__mmask16(~low), sums[1][m])};
    store_sums(sum_vectors(rows), w.rows - row, y + m * ldy + row);
  }
}

enum ZeroPoints { MIDDLE, WHOLE, EIGHTHS };  // where a weight has none, and of `zero_bits` 0 and 3

// The codes of a panel, SHIFT bits to the left: two rows in a vector, their even or their odd columns.
template <int BITS, int SHIFT>
struct PanelCodes {
  static_assert(BITS + SHIFT <= 8);
  static constexpr int HIGH = ((1 << (BITS - 4)) - 1) << (4 + SHIFT);
  const __m512i low_mask = in_register(_mm512_set1_epi8(char(15 << SHIFT)));
  const __m512i high_mask = in_register(_mm512_set1_epi8(char(HIGH)));
  const __m512i left[4] = {turns(0, 0), turns(0, 1), turns(1, 0), turns(1, 1)};

  // How far the high bits of these rows and columns are rotated.
  static __m512i turns(int pair, int odd) {
    const auto of_row = [&](int row) { return (4 + SHIFT - high_bit(BITS, row, odd)) & 63; };
    if (BITS == 4) return _mm512_setzero_si512();
    return in_register(_mm512_mask_set1_epi64(_mm512_set1_epi64(of_row(2 * pair)), 0xf0, of_row(2 * pair + 1)));
  }
  static __m512i load_high(const uint8_t* panel) {
    if constexpr (BITS == 4) return _mm512_setzero_si512();
    if constexpr (BITS == 5) return load_twice(panel + 128);
    return _mm512_loadu_si512(panel + 128);
  }
  void load(const uint8_t* panel, int pair, __m512i high, __m512i (&codes)[2]) const {
    const __m512i nibbles = _mm512_loadu_si512(panel + 64 * pair);
    codes[0] = _mm512_and_si512(SHIFT ? _mm512_slli_epi16(nibbles, SHIFT) : nibbles, low_mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4 - SHIFT), low_mask);
    if constexpr (BITS > 4) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m512i bits = _mm512_and_si512(_mm512_rolv_epi64(high, left[2 * pair + odd]), high_mask);
        codes[odd] = _mm512_or_si512(codes[odd], bits);
      }
    }
  }
};

// Four rows of 4 to 6 bits on INPUTS inputs.
template <int BITS, int GROUPS, int ZEROS, int INPUTS>
inline void panel_rows(const rarefy_quantized& w, int64_t row, const void* inputs, int64_t ldx, float* y, int64_t ldy) {
  constexpr int64_t panel_bytes = 32 * BITS;
  const uint8_t* x = static_cast<const uint8_t*>(inputs);
  const PairGroups<GROUPS == 2 ? 2 : 1> groups;
  const PanelCodes<BITS, ZEROS == EIGHTHS ? 3 : 0> rows;
  const __m512i middle = in_register(_mm512_set1_epi32(1 << (BITS - 1)));
  const uint8_t* panel = static_cast<const uint8_t*>(w.values) + row * w.col_blocks * 8 * BITS;
  const uint16_t* scales = w.scales + row * w.col_blocks * GROUPS;
  const uint8_t* zeros = ZEROS ? w.zeros + row * w.col_blocks * GROUPS : nullptr;
  __m512 sums[2][INPUTS];
#pragma GCC unroll 4
  for (int m = 0; m < INPUTS; ++m) sums[0][m] = sums[1][m] = _mm512_setzero_ps();
  for (int64_t block = 0; block < w.col_blocks; ++block, panel += panel_bytes, x += sizeof(BlockInputs)) {
#pragma GCC unroll 3
    for (int64_t at = 0; at < panel_bytes; at += 64) __builtin_prefetch(panel + PREFETCH_BYTES + at, 0, 3);
    const __m512i high = rows.load_high(panel);
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      __m512i codes[2];
      rows.load(panel, pair, high, codes);
      const __m512i zero = ZEROS ? groups.zero_points(zeros + 2 * GROUPS * pair) : middle;
      const __m512 scale = GROUPS ? groups.scales(scales + 2 * GROUPS * pair) : _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) {
        const auto& in = *reinterpret_cast<const BlockInputs*>(x + m * ldx);
        __m512i dot = _mm512_madd_epi16(zero, load_twice(in.negative_sums));
        dot = _mm512_dpbusd_epi32(dot, codes[0], load_twice(in.part[0]));
        dot = _mm512_dpbusd_epi32(dot, codes[1], load_twice(in.part[1]));
        __m512 v = _mm512_cvtepi32_ps(dot);
        if constexpr (GROUPS != 0) v = _mm512_mul_ps(v, scale);
        sums[pair][m] = _mm512_fmadd_ps(v, _mm512_castsi512_ps(load_twice(in.scales)), sums[pair][m]);
      }
    }
    scales += TILE_ROWS * GROUPS;
    if (ZEROS) zeros += TILE_ROWS * GROUPS;
  }
  store_pairs(sums, w, row, y, ldy);
}

template <int BITS, int GROUPS, int ZEROS, int INPUTS>
void code_row_range(const rarefy_quantized& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                    int64_t ldy) {
  for (int64_t row = from; row < to; row += TILE_ROWS) panel_rows<BITS, GROUPS, ZEROS, INPUTS>(w, row, x, ldx, y, ldy);
}

// Rows `from` (a multiple of four) to `to` of a weight of 4, 5 or 6 bits.
template <int BITS, int INPUTS>
void code_rows(const rarefy_quantized& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y, int64_t ldy) {
  auto rows = code_row_range<BITS, 0, MIDDLE, INPUTS>;
  if (w.scale_groups == 2)
    rows = w.zeros ? code_row_range<BITS, 2, WHOLE, INPUTS> : code_row_range<BITS, 2, MIDDLE, INPUTS>;
  else if (w.scale_groups == 1)
    rows = w.zeros ? code_row_range<BITS, 1, WHOLE, INPUTS> : code_row_range<BITS, 1, MIDDLE, INPUTS>;
  if constexpr (BITS + 3 <= 8)
    if (w.zero_bits) rows = code_row_range<BITS, 2, EIGHTHS, INPUTS>;
  rows(w, from, to, x, ldx, y, ldy);
}

// Four rows of 8 bits on INPUTS inputs, in two terms; two rows at a time where the sums of four need too many
// registers.
template <int INPUTS>
inline void byte_rows(const rarefy_quantized& w, int64_t row, const void* inputs, int64_t ldx, float* y, int64_t ldy) {
  constexpr int ROWS = INPUTS > 2 ? 2 : 4;
  const uint8_t* x = static_cast<const uint8_t*>(inputs);
  const int64_t second = w.col_blocks * 64;  // where the second term of an input begins
  __m512 numbers[INPUTS][TILE_ROWS];
  for (int first = 0; first < TILE_ROWS; first += ROWS) {
    const uint8_t* values = static_cast<const uint8_t*>(w.values) + row * second + 64 * first;
    __m512i sums[ROWS][INPUTS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m) sums[r][m][0] = sums[r][m][1] = _mm512_setzero_si512();
    for (int64_t block = 0; block < w.col_blocks; ++block, values += 64 * TILE_ROWS) {
      __m512i codes[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        codes[r] = _mm512_loadu_si512(values + 64 * r);
        __builtin_prefetch(values + 64 * r + PREFETCH_BYTES, 0, 3);
      }
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m)
#pragma GCC unroll 2
        for (int term = 0; term < 2; ++term) {
          const __m512i in = _mm512_loadu_si512(x + m * ldx + block * 64 + term * second);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r)  // GCC copies sums in vain where it may
            sums[r][m][term] = in_register(_mm512_dpbusd_epi32(sums[r][m][term], in, codes[r]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < INPUTS; ++m)
        numbers[m][first + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][m][1]), _mm512_set1_ps(1.0f / LOST_STEPS),
                                                _mm512_cvtepi32_ps(sums[r][m][0]));
  }
  for (int m = 0; m < INPUTS; ++m) store_sums(sum_vectors(numbers[m]), w.rows - row, y + m * ldy + row);
}

template <int INPUTS>
void byte_row_range(const rarefy_quantized& w, int64_t from, int64_t to, const void* x, int64_t ldx, float* y,
                    int64_t ldy) {
  for (int64_t row = from; row < to; row += TILE_ROWS) byte_rows<INPUTS>(w, row, x, ldx, y, ldy);
}

// Whether a weight of 8 bits has one scale for a row, and so few columns that sums of products fit 32 bits.
constexpr int64_t MAX_BYTE_BLOCKS = (int64_t(1) << 31) / (4 * 255 * 128);
inline bool has_byte_rows(const rarefy_quantized& w) { return !w.scale_groups && w.col_blocks < MAX_BYTE_BLOCKS; }

}  // namespace
