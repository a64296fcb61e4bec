// Runs the steps of a plan one after the other, each in parts that threads take: all within one parallel region, so that
// threads start once. Whoever is there works; nobody waits for a thread that has not come.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "rarefy.h"
#include "table.h"
#include "threads.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace {

constexpr int64_t SOME = 16;    // columns of a part of a norm
constexpr int64_t ROWS = 64;    // features of a part of an addition
constexpr int SPINS = 2000;     // looks at a counter before the processor is given away

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What of a product is the same whatever its format is.
struct Product {
  explicit Product(const rarefy_step& s) {
    s.flag ? take(*static_cast<const rarefy_sell*>(s.w)) : take(*static_cast<const rarefy_tiles*>(s.w));
  }
  template <class T>
  void take(const T& w) {
    rows = w.rows;
    kind = w.kind;
    sums = {w.scales, w.sums, w.bias, w.act};
  }
  int64_t rows;
  int32_t kind;
  rarefy_sums sums;
};

int64_t chunks_of(const rarefy_step& s) { return over(Product(s).rows, SLAB); }

int64_t tiles_of(const rarefy_attention& a) { return over(a.queries + NT - 1, NT); }  // that a sequence may touch

int64_t parts_of(const rarefy_step& s) {
  const int64_t tiles = over(s.columns, NT);
  switch (s.op) {
    case RAREFY_PRODUCT: return tiles * chunks_of(s);
    case RAREFY_NORM: return over(s.columns, SOME);
    case RAREFY_ADD:
    case RAREFY_TIMES: return tiles * over(s.features, ROWS);
    case RAREFY_ATTEND: {
      const auto& a = *static_cast<const rarefy_attention*>(s.w);
      return a.batch * a.heads * tiles_of(a);
    }
    default: return tiles;
  }
}

// Calls f(sequence, token, column, how many) for the tokens that lie in a tile.
template <class F>
void tokens_in(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * NT, end = std::min(at + NT, s.columns); at < end;) {
    const int64_t b = at / s.apart, token = at % s.apart, left = std::min(s.apart - token, end - at);
    if (token < s.tokens) f(b, token, at % NT, std::min(left, s.tokens - token));
    at += left;
  }
}

void run_part(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  switch (s.op) {
    case RAREFY_PACK: {
      float* out = s.out.at + i * s.out.tile;
      if (s.tokens != s.apart || (i + 1) * NT > s.columns) std::memset(out, 0, size_t(s.features * NT) * 4);
      tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
        t.pack[RAREFY_F32](s.x.at + (b * s.tokens + token) * s.features, s.features, n, s.features, nullptr,
                           reinterpret_cast<uint32_t*>(out + column));
      });
      break;
    }
    case RAREFY_UNPACK:
      tokens_in(s, i, [&](int64_t b, int64_t token, int64_t column, int64_t n) {
        t.unpack(s.x.at + i * s.x.tile + column, s.features, n, s.out.at + (b * s.tokens + token) * s.features,
                 s.features);
      });
      break;
    case RAREFY_PRODUCT: {
      const Product p(s);
      const int64_t chunks = over(p.rows, SLAB), tile = i / chunks, chunk = i % chunks, row = chunk * SLAB;
      const int64_t rows = std::min(SLAB, p.rows - row), columns = std::min(NT, s.columns - tile * NT);
      float* out = s.out.at + tile * s.out.tile + row * NT;
      const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
      const auto* x = reinterpret_cast<const uint32_t*>(s.x.at + tile * s.x.tile);
      auto* sums = reinterpret_cast<uint32_t*>(out);
      if (s.flag)
        t.sell[p.kind](*static_cast<const rarefy_sell*>(s.w), chunk, x, sums, columns);
      else
        t.tiles[p.kind](*static_cast<const rarefy_tiles*>(s.w), row / R4, over(row + rows, R4), x, sums, columns);
      if (p.kind == RAREFY_I8)
        t.settle_bytes(p.sums, row, rows, s.sum.at + tile * NT, more, out);
      else
        t.put(out, rows, NT, p.sums.bias ? p.sums.bias + row : nullptr, more, p.sums.act, out, NT, false);
      break;
    }
    case RAREFY_BYTES:
      t.to_bytes(s.x.at + i * s.x.tile, s.features, s.sum.at + i * NT,
                 reinterpret_cast<uint32_t*>(s.out.at + i * s.out.tile));
      break;
    case RAREFY_NORM: {
      const int64_t tile = i * SOME / NT, column = i * SOME % NT;
      t.norm(s.x.at + tile * s.x.tile + column, s.features, SOME, s.gain, s.bias, s.least, s.flag != 0,
             s.out.at + tile * s.out.tile + column);
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
  }
}

struct alignas(64) Count {
  std::atomic<int64_t> done;
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

API int rarefy_run_plan(const rarefy_step* steps, int64_t count) {
  const rarefy_table& t = rarefy_chosen();
  const uint32_t threads = threads_here();
  for (int64_t k = 0; k < count; ++k)
    if (steps[k].op < 0 || steps[k].op >= RAREFY_OPS) return RAREFY_BAD;
  if (threads == 1) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0, parts = parts_of(steps[k]); i < parts; ++i) run_part(t, steps[k], i);
    return RAREFY_OK;
  }
  const Scratch<2> scratch(size_t(count) * (sizeof(Count) + threads * sizeof(Run)));
  if (!scratch.from) return RAREFY_MEMORY;
  Count* counts = static_cast<Count*>(scratch.from);
  Run* runs = reinterpret_cast<Run*>(counts + count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t parts = parts_of(steps[k]);
    new (&counts[k]) Count{};
    for (uint32_t o = 0; o < threads; ++o) (new (&runs[k * threads + o]) Run{})->set(parts * o / threads, parts * (o + 1) / threads);
  }
  std::atomic<uint32_t> arrived{0};
  auto work = [&] {
    const uint32_t me = arrived.fetch_add(1) % threads;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t parts = parts_of(steps[k]);
      const int64_t did = take_parts(runs + k * threads, threads, me, [&](int64_t i) { run_part(t, steps[k], i); });
      counts[k].done.fetch_add(did, std::memory_order_acq_rel);
      for (int spins = 0; counts[k].done.load(std::memory_order_acquire) < parts;) rest(spins);
    }
  };
  rarefy_run_parallel(0, threads, 1, body<decltype(work)>, &work);
  return RAREFY_OK;
}
