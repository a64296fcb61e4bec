// Runs the steps of a plan one after the other, each in parts that threads take: all within one parallel region, so that
// threads start once. Whoever is there works, and waits only for what a step needs; nobody waits for a thread that has not
// come.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "conv_ops.hpp"
#include "decode_steps.hpp"
#include "kernel_table.h"
#include "linear_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace {

constexpr int64_t SOME = 16;    // columns of a part of a norm
constexpr int SPINS = 2000;     // looks at a counter before the processor is given away

int64_t tiles_of(const rarefy_attention& a) { return over(a.queries + NT - 1, NT); }  // that a sequence may touch

int64_t parts_of(const rarefy_step& s) {
  const int64_t tiles = over(s.columns, NT);
  const auto* a = static_cast<const rarefy_attention*>(s.w);
  if (s.few) switch (s.op) {
      case RAREFY_PRODUCT: return over(s.features, PART);
      case RAREFY_ADD:
      case RAREFY_TIMES: return 1;
      case RAREFY_ATTEND: return s.columns * a->heads;
      default: return s.columns;
    }
  switch (s.op) {
    case RAREFY_PRODUCT:
      return unfolds(s) ? over(tiles, TILES) * over(s.features, UNFOLDED) : tiles * over(s.features, SLAB);
    case RAREFY_NORM: return over(s.columns, SOME);
    case RAREFY_ADD:
    case RAREFY_TIMES: return tiles * over(s.features, ROWS);
    case RAREFY_ATTEND: return a->batch * a->heads * tiles_of(*a);
    case RAREFY_PLANES: return s.batch * over(s.features, CHANNELS);
    case RAREFY_CONVOLVE: return s.flag ? parts_of_squares(s) : tiles * over(s.features, rows_of(tiles));
    case RAREFY_POOL:
    case RAREFY_DEPTHWISE: return tiles * over(s.features, CHANNELS);
    case RAREFY_AVERAGE: return s.columns * over(s.features, ROWS);
    default: return tiles;
  }
}

int run_part(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  if (s.few) return run_few(t, s, i);
  switch (s.op) {
    case RAREFY_PACK: {
      float* out = s.out.at + i * s.out.tile;
      if (s.flag) {
        if ((i + 1) * NT > s.columns) std::memset(out, 0, size_t(s.features * NT) * 4);
        tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
          const float* x = s.x.at + b * s.features * s.tokens + token;
          for (int64_t f = 0; f < s.features; ++f) std::memcpy(out + f * NT + column, x + f * s.tokens, size_t(n) * 4);
        });
        break;
      }
      if (s.tokens != s.apart || (i + 1) * NT > s.columns) std::memset(out, 0, size_t(s.features * NT) * 4);
      tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
        t.pack[RAREFY_F32](s.x.at + (b * s.tokens + token) * s.features, s.features, n, s.features, nullptr,
                           reinterpret_cast<uint32_t*>(out + column));
      });
      break;
    }
    case RAREFY_UNPACK:
      if (s.flag) {
        tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
          const float* x = s.x.at + i * s.x.tile + column;
          float* out = s.out.at + b * s.features * s.tokens + token;
          for (int64_t f = 0; f < s.features; ++f) std::memcpy(out + f * s.tokens, x + f * NT, size_t(n) * 4);
        });
        break;
      }
      tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
        t.unpack(s.x.at + i * s.x.tile + column, s.features, n, s.out.at + (b * s.tokens + token) * s.features,
                 s.features);
      });
      break;
    case RAREFY_PRODUCT: return run_linear(t, s, i);
    case RAREFY_RANGE: {
      alignas(64) float near[NT];
      t.ranges(s.x.at + i * s.x.tile, s.features, near);
      images_in(s, i, [&](int64_t, int64_t column, int64_t n) {
        const uint32_t most = t.largest(near + column % NT, n);
        std::memcpy(s.out.at + column, &most, 4);
      });
      break;
    }
    case RAREFY_BYTES: {
      const float* x = s.x.at + i * s.x.tile;
      float* scales = s.sum.at + i * NT;
      if (s.flag == 2) {
        image_scales(t, s, i, scales);
      } else {
        t.ranges(s.flag ? s.more.at + i * s.more.tile : x, s.flag ? s.groups : s.features, scales);
        for (int64_t n = 0; n < NT; ++n)  // as rarefy_step_of has it
          scales[n] = !(scales[n] < INFINITY) ? NAN : scales[n] > 127e-36f ? scales[n] * (1.0f / 127.0f) : 1.0f;
      }
      t.to_bytes(x, s.features, scales, reinterpret_cast<uint32_t*>(s.out.at + i * s.out.tile));
      break;
    }
    case RAREFY_NORM: {
      const int64_t tile = i * SOME / NT, column = i * SOME % NT, each = s.features / s.groups;
      for (int64_t f = 0; f < s.features; f += each)
        t.norm(s.x.at + tile * s.x.tile + column + f * NT, each, SOME, s.gain, s.bias, s.least, s.flag != 0,
               s.out.at + tile * s.out.tile + column + f * NT);
      break;
    }
    case RAREFY_ADD:
    case RAREFY_TIMES: {
      const int64_t chunks = over(s.features, ROWS), tile = i / chunks, row = i % chunks * ROWS;
      t.pair(s.x.at + tile * s.x.tile + row * NT, s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr,
             s.op == RAREFY_TIMES, s.act, s.out.at + tile * s.out.tile + row * NT,
             std::min(ROWS, s.features - row) * NT);
      break;
    }
    case RAREFY_ATTEND: {
      const auto& a = *static_cast<const rarefy_attention*>(s.w);
      const int64_t most = tiles_of(a), head = i / most % a.heads, b = i / most / a.heads;
      const int64_t tile = b * a.apart / NT + i % most;
      if (tile * NT < b * a.apart + a.queries) t.attend(a, b, head, tile);
      break;
    }
    case RAREFY_PLANES: return cut_planes(t, s, i);
    case RAREFY_CONVOLVE: return s.flag ? convolve_squares(t, s, i) : convolve(t, s, i);
    case RAREFY_POOL:
    case RAREFY_DEPTHWISE: each_channel(t, s, i); break;
    case RAREFY_AVERAGE: average(s, i); break;
    case RAREFY_ROTATE:
      t.rotate[0](s.x.at + i * s.x.tile, s.more.at + i * s.more.tile, s.sum.at + i * s.sum.tile, s.groups,
                  s.features / s.groups, s.out.at + i * s.out.tile);
      break;
    case RAREFY_KEEP:
      tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
        for (int64_t done = 0, room; done < n; done += room) {
          float* to = place_in(s, b, token + done, room);
          room = std::min(room, n - done);
          const float* x = s.x.at + i * s.x.tile + column + done;
          for (int64_t f = 0; f < s.features; ++f) std::memcpy(to + f * NT, x + f * NT, size_t(room) * 4);
        }
      });
      break;
  }
  return RAREFY_OK;
}

struct alignas(64) Count {
  std::atomic<int64_t> left;  // parts that are not done
};

void rest(int& spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
#if defined(__linux__)
  if (++spins % SPINS == 0) sched_yield();
#endif
}

}  // namespace

API void rarefy_large_pages(void* p, int64_t bytes) { large_pages(p, size_t(bytes)); }

API int rarefy_run_plan(const rarefy_step* steps, int64_t count) {
  const rarefy_table& t = rarefy_chosen();
  const uint32_t threads = threads_here();
  for (int64_t k = 0; k < count; ++k)
    if (steps[k].op < 0 || steps[k].op >= RAREFY_OPS || steps[k].wait < 0 || steps[k].wait > k) return RAREFY_BAD;
  if (threads == 1) {
    int failed = RAREFY_OK;
    for (int64_t k = 0; k < count && !failed; ++k)
      for (int64_t i = 0, parts = parts_of(steps[k]); i < parts; ++i) failed |= run_part(t, steps[k], i);
    return failed;
  }
  const Scratch<2> scratch(size_t(count) * (sizeof(Count) + threads * sizeof(Run)));
  if (!scratch.from) return RAREFY_MEMORY;
  Count* counts = static_cast<Count*>(scratch.from);
  Run* runs = reinterpret_cast<Run*>(counts + count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t parts = parts_of(steps[k]);
    (new (&counts[k]) Count{})->left.store(parts, std::memory_order_relaxed);
    for (uint32_t o = 0; o < threads; ++o)
      (new (&runs[k * threads + o]) Run{})->set(parts * o / threads, parts * (o + 1) / threads);
  }
  std::atomic<uint32_t> arrived{0};
  std::atomic<int> failed{RAREFY_OK};
  auto work = [&] {
    const uint32_t me = arrived.fetch_add(1) % threads;
    int64_t done = 0;  // steps that are
    for (int64_t k = 0; k < count; ++k) {
      for (; done < steps[k].wait; ++done)
        for (int spins = 0; counts[done].left.load(std::memory_order_acquire) > 0;) rest(spins);
      const int64_t did = take_parts(runs + k * threads, threads, me, [&](int64_t i) {
        if (const int why = run_part(t, steps[k], i)) failed.store(why, std::memory_order_relaxed);
      });
      if (did) counts[k].left.fetch_sub(did, std::memory_order_acq_rel);
    }
  };
  rarefy_run_parallel(0, threads, 1, body<decltype(work)>, &work);
  return failed;
}
