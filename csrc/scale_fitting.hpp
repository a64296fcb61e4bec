// The scales of quantized weights with the least squared error among ever smaller ranges. Compiled without fused
// operations, so that all machines choose the same scales.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"

namespace {

constexpr int64_t LANES = 8;                     // blocks that are fitted side by side
constexpr int64_t FLOAT_SUMS = 1024;             // sums of more squares are in double
constexpr float ROUND_TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it drops the fraction
constexpr float TINY = std::numeric_limits<float>::min();

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

inline f32x8 load(const float* p) {
  f32x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32x8 round(f32x8 v) { return (v + ROUND_TO_INTEGER) - ROUND_TO_INTEGER; }

inline f32x8 clamp(f32x8 v, float low, float high) {  // NaN stays NaN
  v = v < low ? f32x8{} + low : v;
  return v > high ? f32x8{} + high : v;
}

struct Grids {
  f32x8 scale, zero;
};

// Eight blocks, [size][LANES], and the weights of their errors, or null.
struct Blocks {
  const rarefy_scale_fit& f;
  const float *x, *weigh;
  const float min_code = float(f.min_code), max_code = float(f.max_code);

  // Grids from `low` to `high`, which zero is a point of.
  Grids of_range(f32x8 low, f32x8 high) const {
    f32x8 scale = (high - low) / max_code;
    if (f.symmetric) {
      const f32x8 above = high / max_code, below = low / min_code;
      scale = above > below ? above : below;
    }
    scale = scale < TINY ? f32x8{} + 1.0f : scale;
    return {scale, f.symmetric ? f32x8{} : clamp(round(-low / scale), 0.0f, max_code)};
  }

  f64x8 squared_errors(const Grids& grids) const {
    f64x8 total{};
    for (int64_t first = 0; first < f.size; first += FLOAT_SUMS) {
      f32x8 sums{};
      for (int64_t i = first; i < std::min(f.size, first + FLOAT_SUMS); ++i) {
        const f32x8 v = load(x + i * LANES);
        const f32x8 codes = clamp(round(v / grids.scale) + grids.zero, min_code, max_code) - grids.zero;
        const f32x8 errors = codes * grids.scale - v;
        sums += weigh ? errors * errors * load(weigh + i * LANES) : errors * errors;
      }
      total += __builtin_convertvector(sums, f64x8);
    }
    return total;
  }

  Grids fit() const {
    f32x8 low{}, high{}, nan{};
    for (int64_t i = 0; i < f.size; ++i) {
      const f32x8 v = load(x + i * LANES);
      low = v < low ? v : low;
      high = v > high ? v : high;
      nan = v == v ? nan : v;
    }
    Grids best = of_range(low, high);
    f64x8 least = squared_errors(best);
    for (int64_t i = 0; i < f.count; ++i) {
      const Grids grids = of_range(low * f.fractions[i], high * f.fractions[i]);
      const f64x8 errors = squared_errors(grids);
      const i32x8 better = __builtin_convertvector(errors < least, i32x8);
      least = errors < least ? errors : least;
      best.scale = better ? grids.scale : best.scale;
      best.zero = better ? grids.zero : best.zero;
    }
    best.scale = nan == nan ? best.scale : nan;
    return best;
  }
};

// Blocks of [blocks][size] as [size][LANES]; lanes without a block repeat the last one.
void transpose(const float* x, int64_t blocks, int64_t size, float* out) {
  for (int64_t b = 0; b < LANES; ++b)
    for (int64_t i = 0; i < size; ++i) out[i * LANES + b] = x[std::min(b, blocks - 1) * size + i];
}

int fit_blocks(const rarefy_scale_fit& f, int64_t first, int64_t end) {
  const ScratchBuffer<1> scratch(size_t(f.size * LANES * (f.weigh ? 2 : 1)) * 4);
  float* x = static_cast<float*>(scratch.data);
  if (!x) return RAREFY_NO_MEMORY;
  float* weigh = f.weigh ? x + f.size * LANES : nullptr;
  for (int64_t b = first; b < end; b += LANES) {
    const int64_t blocks = std::min(LANES, end - b);
    transpose(f.x + b * f.size, blocks, f.size, x);
    if (weigh) transpose(f.weigh + b * f.size, blocks, f.size, weigh);
    const Grids found = Blocks{f, x, weigh}.fit();
    std::memcpy(f.scale + b, &found.scale, size_t(blocks) * 4);
    if (f.zero) std::memcpy(f.zero + b, &found.zero, size_t(blocks) * 4);
  }
  return RAREFY_OK;
}

}  // namespace
