// Inputs in the layouts that kernels read, and the largest magnitude of a row.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "rarefy.h"
#include "simd.hpp"

namespace {

// A block of lanes of a convolution's inputs, brought together in `near`, in rows of NT and a row more: those of lane l
// are pieces counted from x + places[l], in memory that ends at `last`.
void bring(const float* x, const float* last, const int32_t* places, int64_t lanes, const rarefy_piece* pieces, int count,
           uint32_t* near) {
  const int64_t reach = pieces[count - 1].from + PIECE;
  for (int64_t l = 0; l < lanes; ++l) {
    const float* place = x + places[l];
    for (int64_t c = NT; c < 2 * NT; c += 16) __builtin_prefetch(place + pieces[0].from + c, 0, 2);  // the next square's
    if (last - place >= reach)  // what is copied past the end of a piece, the next one writes over
      for (int p = 0; p < count; ++p) std::memcpy(near + l * NT + pieces[p].to, place + pieces[p].from, PIECE * 4);
    else
      for (int p = 0; p < count; ++p)
        std::memcpy(near + l * NT + pieces[p].to, place + pieces[p].from, size_t(pieces[p].size) * 4);
  }
}

// Every second float.
void halve(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[2 * i];
}

// The bits of the largest magnitude; magnitudes of floats are ordered as integers are.
uint32_t largest(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t here = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
    most = here > most ? here : most;
  }
  return most;
}

// Rows of fp32 inputs become rows of lanes (`to_lanes`), W of them at a time are transposed.
template <int KIND>
void pack(const float* x, int64_t ldx, int64_t rows, int64_t width, const float* scales, uint32_t* out) {
  using L = Lanes<KIND>;
  constexpr int64_t each = L::width;  // inputs of a lane
  const int64_t depth = (width + each - 1) / each;
  lanes square[W];
  for (int64_t n = 0; n < rows; n += W) {
    const int64_t here = rows - n < W ? rows - n : W;
    for (int64_t k = 0; k < depth; k += W) {
      const int64_t some = depth - k < W ? depth - k : W, inputs = width - k * each;
      for (int64_t i = 0; i < W; ++i)
        square[i] = i < here ? L::to_lanes(x + (n + i) * ldx + k * each, inputs < W * each ? inputs : W * each,
                                           scales ? scales[n + i] : 1.0f)
                             : lanes{};
      transpose(square);
      for (int64_t i = 0; i < some; ++i) put_lanes(out + (k + i) * NT + n, square[i]);
    }
  }
}

// One row of inputs as the bitmask kernels read it, with zeros behind.
template <int KIND>
void convert(const float* x, int64_t n, int64_t wide, float scale, void* out) {
  using L = Lanes<KIND>;
  constexpr int64_t step = W * L::width;
  for (int64_t k = 0; k < wide; k += step) {
    const int64_t some = n - k < step ? (n > k ? n - k : 0) : step;
    put_lanes(static_cast<uint32_t*>(out) + k / L::width, L::to_lanes(x + (n > k ? k : 0), some, scale));
  }
}

}  // namespace
