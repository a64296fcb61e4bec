// Runs the steps of a plan one after the other, each in parts that threads take: all within one parallel region, so that
// threads start once. Whoever is there works, and waits only for what a step needs; nobody waits for a thread that has not
// come.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "conv_indirection.hpp"
#include "rarefy.h"
#include "kernel_table.h"
#include "parallel.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace {

constexpr int64_t SOME = 16;    // columns of a part of a norm
constexpr int64_t ROWS = 64;    // features of a part of an addition
constexpr int64_t UNFOLDED = 32;  // rows that are unfolded at a time
constexpr int64_t TILES = 4;    // of inputs that unfolded rows are multiplied by
constexpr int64_t PART = 32;    // rows of a part of a product of few tokens
constexpr int64_t CHANNELS = 8;  // of a part of what runs channel by channel
constexpr int64_t FOURS = 64;   // of rows of a part of a convolution
constexpr int64_t SQUARED = 64;  // rows of a part of a convolution by squares
constexpr int SPINS = 2000;     // looks at a counter before the processor is given away

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What of a product is the same whatever its format is.
struct Product {
  explicit Product(const rarefy_step& s) {
    switch (s.flag) {
      case RAREFY_TILES: take(*static_cast<const rarefy_tiles*>(s.w)); break;
      case RAREFY_SELL: take(*static_cast<const rarefy_sell*>(s.w)); break;
      case RAREFY_DENSE: {
        const auto& w = *static_cast<const rarefy_dense*>(s.w);
        rows = w.rows;
        kind = w.kind;
        cols = w.cols;
        sums = {nullptr, nullptr, w.bias, w.act};
        break;
      }
      case RAREFY_BITMASK: {
        const auto& w = *static_cast<const rarefy_bitmask*>(s.w);
        rows = w.rows;
        kind = w.kind;
        words = w.words;
        cols = w.cols;
        const bool bytes = kind == RAREFY_I8;
        sums = {bytes ? static_cast<const float*>(w.scales) : nullptr,
                bytes ? static_cast<const int32_t*>(w.sums) : nullptr, w.bias, w.act};
        break;
      }
      default: {
        const auto& w = *static_cast<const rarefy_panels*>(s.w);
        rows = w.rows;
        kind = !w.parts && !w.exact ? RAREFY_I8 : RAREFY_F32;
        words = w.words;
        cols = w.cols;
        sums = {w.whole, s.sums, w.bias, w.act};
      }
    }
  }
  template <class T>
  void take(const T& w) {
    rows = w.rows;
    kind = w.kind;
    sums = {w.scales, w.sums, w.bias, w.act};
  }
  int64_t rows, words = 0, cols = 0;
  int32_t kind;
  rarefy_sums sums;
};

bool unfolds(const rarefy_step& s) { return s.flag == RAREFY_BITMASK || s.flag == RAREFY_PANELS; }

int64_t tiles_of(const rarefy_attention& a) { return over(a.queries + NT - 1, NT); }  // that a sequence may touch

// Rows of a part of a convolution: fewer where there are few tiles, so that threads share them.
int64_t rows_of(int64_t tiles) { return tiles < 8 ? SLAB : FOURS * R4; }

int64_t parts_of_squares(const rarefy_step& s);

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

// Calls f(sequence, token, column, how many) for the tokens that lie in a tile.
template <class F>
void tokens_in(const rarefy_step& s, int64_t tile, F&& f) {
  for (int64_t at = tile * NT, end = std::min(at + NT, s.columns); at < end;) {
    const int64_t b = at / s.apart, token = at % s.apart, left = std::min(s.apart - token, end - at);
    if (token < s.tokens) f(b, token, at % NT, std::min(left, s.tokens - token));
    at += left;
  }
}

// Where a cache has what a step keeps for a token on, and how many more tokens follow there one after the other.
float* place_in(const rarefy_step& s, int64_t batch, int64_t token, int64_t& room) {
  const auto& a = *static_cast<const rarefy_attention*>(s.w);
  const rarefy_cache& c = *a.cache;
  const int64_t at = c.past + token, before = s.flag ? a.v_before : a.k_before;
  room = NT - at % NT;
  return c.at + (before * c.batch + batch * s.features) * c.capacity + at / NT * s.features * NT + at % NT;
}

int run_few(const rarefy_table& t, const rarefy_step& s, int64_t i) {
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

// Sums [rows][NT] of `columns` of a tile of inputs times lanes `lane`..`lane` + `some` of a weight as it is, from `row` on.
void multiply(const rarefy_table& t, const float* values, int64_t lanes, int64_t row, int64_t rows, int64_t lane,
              int64_t some, const uint32_t* x, int64_t columns, uint32_t* out) {
  const auto* from = reinterpret_cast<const uint32_t*>(values + row * lanes + lane * R4);
  t.dense[0](from, lanes * R4, over(rows, R4), some, x, out, columns, lane > 0);
}

rarefy_end end_of(const rarefy_sums& w, int64_t row, int64_t rows, const float* steps, const float* more) {
  return {w.bias ? w.bias + row : nullptr, more, rows, w.act, w.scales ? w.scales + row : nullptr, steps,
          w.sums ? w.sums + row : nullptr};
}

void settle(const rarefy_table& t, const rarefy_end& end, bool bytes, float* out) {
  if (bytes)
    t.settle_bytes(end, out);
  else
    t.put(out, end.rows, NT, end.bias, end.more, end.act, out, NT, false);
}

// Some rows of a weight for few inputs, unfolded once and multiplied by several tiles.
int run_unfolded(const rarefy_table& t, const rarefy_step& s, int64_t i) {
  const Product p(s);
  const int64_t chunks = over(p.rows, UNFOLDED), row = i % chunks * UNFOLDED, first = i / chunks * TILES;
  const int64_t rows = std::min(UNFOLDED, p.rows - row), fours = over(rows, R4);
  const bool bytes = p.kind == RAREFY_I8;
  const int64_t lanes = bytes ? over(p.cols, 4) : p.cols, apart = p.words * (bytes ? 16 : 64) * R4;
  const Scratch<1> near(size_t(fours * apart) * 4);
  uint32_t* values = static_cast<uint32_t*>(near.from);
  if (!values) return RAREFY_MEMORY;
  for (int64_t f = 0; f < fours; ++f)
    if (s.flag == RAREFY_PANELS)
      t.unfold_panels(*static_cast<const rarefy_panels*>(s.w), row + f * R4, bytes, values + f * apart);
    else
      t.unfold[p.kind](*static_cast<const rarefy_bitmask*>(s.w), row + f * R4, values + f * apart);
  for (int64_t tile = first; tile < std::min(first + TILES, over(s.columns, NT)); ++tile) {
    float* out = s.out.at + tile * s.out.tile + row * NT;
    const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
    t.dense[bytes](values, apart, fours, lanes, reinterpret_cast<const uint32_t*>(s.x.at + tile * s.x.tile),
                   reinterpret_cast<uint32_t*>(out), std::min(NT, s.columns - tile * NT), false);
    settle(t, end_of(p.sums, row, rows, s.sum.at ? s.sum.at + tile * NT : nullptr, more), bytes, out);
  }
  return RAREFY_OK;
}

// Tells how large outputs are: of a tile, some rows of them, from whole slabs on.
void tell_ranges(const rarefy_table& t, const rarefy_step& s, int64_t tile, int64_t row, int64_t rows) {
  for (int64_t done = 0; s.range.at && done < rows; done += SLAB)
    t.ranges(s.out.at + tile * s.out.tile + (row + done) * NT, std::min(SLAB, rows - done),
             s.range.at + tile * s.range.tile + (row + done) / SLAB * NT);
}

}  // namespace

#include "conv_ops.hpp"

namespace {

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
    case RAREFY_PRODUCT: {
      if (unfolds(s)) return run_unfolded(t, s, i);
      const Product p(s);
      const int64_t chunks = over(p.rows, SLAB), tile = i / chunks, chunk = i % chunks, row = chunk * SLAB;
      const int64_t rows = std::min(SLAB, s.features - row), columns = std::min(NT, s.columns - tile * NT);
      float* out = s.out.at + tile * s.out.tile + row * NT;
      const float* more = s.more.at ? s.more.at + tile * s.more.tile + row * NT : nullptr;
      const auto* x = reinterpret_cast<const uint32_t*>(s.x.at + tile * s.x.tile);
      auto* sums = reinterpret_cast<uint32_t*>(out);
      const rarefy_end end = end_of(p.sums, row, rows, s.sum.at ? s.sum.at + tile * NT : nullptr, more);
      if (s.flag == RAREFY_DENSE)
        multiply(t, static_cast<const rarefy_dense*>(s.w)->values, p.cols, row, rows, 0, p.cols, x, columns, sums);
      else if (s.flag == RAREFY_SELL)
        t.sell[p.kind](*static_cast<const rarefy_sell*>(s.w), chunk, x, sums, columns, &end);
      else
        t.tiles[p.kind](*static_cast<const rarefy_tiles*>(s.w), row / R4, over(row + rows, R4), x, sums, columns);
      if (s.flag != RAREFY_SELL) settle(t, end, p.kind == RAREFY_I8, out);
      tell_ranges(t, s, tile, row, rows);
      break;
    }
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
