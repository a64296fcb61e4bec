// Steps of few tokens, whose features lie one after the other.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

namespace {

// Where a cache has what a step keeps for a token on, and how many more tokens follow there one after the other.
inline float* place_in(const rarefy_step& s, int64_t batch, int64_t token, int64_t& room) {
  const auto& a = *static_cast<const rarefy_attention*>(s.w);
  const rarefy_cache& c = *a.cache;
  const int64_t at = c.past + token, before = s.flag ? a.v_before : a.k_before;
  room = NT - at % NT;
  return c.at + (before * c.batch + batch * s.features) * c.capacity + at / NT * s.features * NT + at % NT;
}

inline int run_few(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const float* x = s.x.at + i * s.x.tile;
  float* out = s.out.at + i * s.out.tile;
  const int64_t each = s.features / std::max<int64_t>(1, s.groups);
  switch (s.op) {
    case RAREFY_PACK: std::memcpy(out, s.x.at + i * s.features, size_t(s.features) * 4); break;
    case RAREFY_UNPACK: std::memcpy(s.out.at + i * s.features, x, size_t(s.features) * 4); break;
    case RAREFY_PRODUCT: {
      const int64_t from = i * PART, to = std::min(s.features, from + PART), n = s.columns;
      const float* scales = s.sum.at;
      if (s.flag == RAREFY_PANELS) {
        const auto& w = *static_cast<const rarefy_panels*>(s.w);
        const int64_t apart = w.exact ? s.x.tile : s.x.tile * 4;
        t.panels[(w.kind == RAREFY_I4 ? 2 : 0) + (w.exact ? 1 : 0)](w, from, to, s.x.at, apart, s.out.at, s.out.tile, n);
        t.settle_panels(w, from, to, w.exact ? nullptr : scales, s.more.at, s.out.at, s.out.tile, n);
      } else {
        const auto& w = *static_cast<const rarefy_bitmask*>(s.w);
        const int64_t apart = s.x.tile * (w.kind >= RAREFY_I8 ? 4 : w.kind == RAREFY_BF16 ? 2 : 1);
        t.bits[w.kind](w, from, to, s.x.at, apart, s.out.at, s.out.tile, n);
        t.settle[w.kind](w, from, to, scales, s.more.at, s.out.at, s.out.tile, n);
      }
      break;
    }
    case RAREFY_BYTES: {
      const int kind = s.flag;
      const float step = kind == RAREFY_I8 ? rarefy_step_of(t, x, s.features) : 1.0f;
      s.sum.at[i] = step;
      t.convert[kind](x, s.features, over(s.features, 64) * 64, 1.0f / step, out);
      break;
    }
    case RAREFY_NORM:
      for (int64_t g = 0; g < s.features; g += each)
        t.norm_row(x + g, each, s.gain, s.bias, s.least, s.flag != 0, out + g);
      break;
    case RAREFY_ADD:
    case RAREFY_TIMES:
      t.pair(s.x.at, s.more.at, s.op == RAREFY_TIMES, s.act, s.out.at, over(s.columns * s.out.tile, NT) * NT);
      break;
    case RAREFY_ROTATE:
      t.rotate[1](x, s.more.at + i * s.more.tile, s.sum.at + i * s.sum.tile, s.groups, each, out);
      break;
    case RAREFY_KEEP: {
      int64_t room;
      float* to = place_in(s, i / s.tokens, i % s.tokens, room);
      for (int64_t f = 0; f < s.features; ++f) to[f * NT] = x[f];
      break;
    }
    case RAREFY_ATTEND: {
      const auto& a = *static_cast<const rarefy_attention*>(s.w);
      const int64_t token = i / a.heads;
      const Scratch<1> near(size_t(over(a.cache->past + a.queries, NT) * NT + a.width * 16) * 4);
      if (!near.from) return RAREFY_MEMORY;
      t.attend_row(a, token / a.queries, token % a.queries, i % a.heads, static_cast<float*>(near.from));
      break;
    }
  }
  return RAREFY_OK;
}

}  // namespace
