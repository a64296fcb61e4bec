// Which keys of an attention step can be seen at all.
#pragma once
#include <cstdint>

#include "kernel_table.h"
#include "rarefy.h"

namespace {

struct KeyRange {
  int64_t begin, end;
};

// Keys that queries may see: those between leading and trailing padding, which a mask of the same value for all queries
// hides. All keys where every one is hidden. `mask`: of the head of the sequence, or null.
inline KeyRange visible_keys(const rarefy_attention& a, const float* mask) {
  KeyRange visible{0, a.keys};
  if (!mask || a.mask_query_stride) return visible;
  while (visible.end > 0 && mask[(visible.end - 1) * a.mask_key_stride] <= MASKED) --visible.end;
  if (!visible.end) return {0, a.keys};
  while (!a.causal && mask[visible.begin * a.mask_key_stride] <= MASKED) ++visible.begin;
  return visible;
}

}  // namespace
