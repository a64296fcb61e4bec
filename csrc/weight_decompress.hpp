// Dense lanes [column][4] of four rows, which many inputs are multiplied by; and weights for few inputs, unfolded into
// such: so one copy of a weight serves one token and a thousand.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

constexpr int64_t CLOSE = 128;  // lanes of inputs that stay in the first cache

// 64 values of a row become every fourth lane.
template <class T, class F>
inline void spread_cell(const T (&cell)[64], uint32_t* out, F&& as_float) {
  for (int64_t c = 0; c < 64; ++c) out[c * R4] = __builtin_bit_cast(uint32_t, float(as_float(cell[c])));
}

inline void spread_bytes(const char* cell, uint32_t* out) {
  for (int64_t c = 0; c < 16; ++c) std::memcpy(out + c * R4, cell + 4 * c, 4);
}

// Four rows from `row` on. Bytes stay bytes, four to a lane; all else becomes fp32.
template <int KIND>
void unfold_bits(const rarefy_bitmask& w, int64_t row, uint32_t* out) {
  const uint64_t* mask = w.masks + row * w.words;
  if constexpr (KIND == RAREFY_I4) {
    const uint8_t* value = static_cast<const uint8_t*>(w.values) + w.starts[row / R4];
    const uint16_t* scale = static_cast<const uint16_t*>(w.scales) + row * w.words;
    const auto none = Nibbles::none();
    for (int64_t word = 0; word < w.words; ++word, out += 64 * R4)
      for (int r = 0; r < R4; ++r, ++mask, ++scale) {
        alignas(64) int8_t cell[64];
        const auto wide = Nibbles::expand(none, mask, value);
        std::memcpy(cell, &wide, 64);
        const float by = from_bf16(*scale);
        spread_cell(cell, out + r, [&](int8_t v) { return v * by; });
        value += (__builtin_popcountll(*mask) + 1) / 2;
      }
  } else {
    using B = Bits<KIND>;
    using T = typename B::value;
    const T* value = static_cast<const T*>(w.values) + w.starts[row / R4];
    const auto none = B::none();
    for (int64_t word = 0; word < w.words; ++word, out += (KIND == RAREFY_I8 ? 16 : 64) * R4)
      for (int r = 0; r < R4; ++r, ++mask) {
        alignas(64) T cell[64];
        for (int part = 0; part < 64; part += B::cell) {
          const T* from = part ? value + __builtin_popcountll(*mask << (64 - part)) : value;
          const auto wide = B::expand(none, reinterpret_cast<const char*>(mask) + part / 8, from);
          std::memcpy(cell + part, &wide, sizeof(T) * B::cell);
        }
        value += __builtin_popcountll(*mask);
        if constexpr (KIND == RAREFY_F32)
          spread_cell(cell, out + r, [](float v) { return v; });
        else if constexpr (KIND == RAREFY_BF16)
          spread_cell(cell, out + r, [](uint16_t v) { return from_bf16(v); });
        else
          spread_bytes(reinterpret_cast<const char*>(cell), out + r);
      }
  }
}

// `bytes`: they stay bytes, for inputs in bytes; else whole numbers times all their scales.
void unfold_panels(const rarefy_panels& w, int64_t row, bool bytes, uint32_t* out) {
  const bool nibbles = w.kind == RAREFY_I4;
  const Cells cells{w.parts};
  const int64_t at = row * w.words, parts = w.parts;
  const uint8_t* value = static_cast<const uint8_t*>(w.values) + at * (nibbles ? 32 : 64);
  for (int64_t cell = at; cell < at + R4 * w.words; ++cell) {
    const int64_t r = cell % R4;
    if (bytes) {
      spread_bytes(reinterpret_cast<const char*>(value), out + r);
      value += 64;
    } else {
      const float whole = w.whole && row + r < w.rows ? w.whole[row + r] : 1.0f;
      const float low = whole * (parts ? from_bf16(w.scales[cell * parts]) : 1.0f);
      const float high = parts > 1 ? whole * from_bf16(w.scales[cell * parts + 1]) : low;
      const auto zero = cells.zeros(w.zeros ? w.zeros + cell * parts : nullptr);
      alignas(64) int8_t small[64];
      const auto wide = nibbles ? cells.nibbles(value, zero) : cells.bytes(value);
      std::memcpy(small, &wide, 64);
      for (int64_t c = 0; c < 64; ++c)
        out[c * R4 + r] = __builtin_bit_cast(uint32_t, float(small[c]) * (c < 32 ? low : high));
      value += nibbles ? 32 : 64;
    }
    if (r == R4 - 1) out += (bytes ? 16 : 64) * R4;
  }
}

template <int KIND, int T>
void dense_part(const uint32_t* values, int64_t apart, int64_t fours, int64_t lanes, bool begun, const uint32_t* x,
                uint32_t* out) {
  using L = Lanes<KIND>;
  for (int64_t p = 0; p < fours; ++p, values += apart, out += R4 * NT) {
    typename L::sum c[R4][T];
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) c[r][t] = begun ? L::sum_at(out + r * NT + t * W) : L::zero();
    for (int64_t l = 0; l < lanes; ++l) {
      typename L::input in[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) in[t] = L::load(x + l * NT + t * W);
      __builtin_prefetch(values + apart + l * R4);  // of the next four, which lie elsewhere
#pragma GCC unroll 4
      for (int r = 0; r < R4; ++r) {
        const auto w = L::spread(values[l * R4 + r]);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) c[r][t] = L::step(c[r][t], in[t], w);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R4; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) L::store(out + r * NT + t * W, c[r][t]);
  }
}

// Dense lanes of `fours`, `apart` from each other, times `columns` of a tile of inputs: sums [4 fours][NT]; `begun`: added
// to what is there.
template <int KIND>
void dense_any(const uint32_t* values, int64_t apart, int64_t fours, int64_t lanes, const uint32_t* x, uint32_t* out,
               int64_t columns, bool begun) {
  for (int64_t b = 0; b < lanes; b += CLOSE) {
    const int64_t some = std::min(CLOSE, lanes - b);
    by_vectors(columns, [&](auto size, int64_t at) {
      dense_part<KIND, size>(values + b * R4, apart, fours, some, begun || b > 0, x + b * NT + at, out + at);
    });
  }
}

}  // namespace
