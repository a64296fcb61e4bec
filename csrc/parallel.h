// Parts of the work for torch's threads, and scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "rarefy.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern rarefy_parallel rarefy_run_parallel;
extern int (*rarefy_count_threads)(uint32_t*);

constexpr size_t PAGE = 2 << 20;

// Ask for large pages in fresh memory: small ones cost most of the time of a layer with 50 MB of outputs, and their
// addresses are too many for the processor to hold while columns are read in any order.
inline void large_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + bytes) / PAGE * PAGE;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of a call; up to KEPT bytes of it stay with the thread for its next one. A part of the work takes another slot
// than the call that waits for it.
template <int SLOT>
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes > KEPT) {
      own.reset(fresh(bytes));
    } else if (bytes > size) {
      kept.reset(fresh(bytes));
      size = kept ? bytes : 0;
    }
    from = bytes > KEPT ? own.get() : kept.get();
  }
  void* from;

 private:
  static constexpr size_t KEPT = 16 << 20;
  static void* fresh(size_t bytes) {
    const size_t page = bytes < PAGE / 4 ? 4096 : PAGE, whole = (bytes + page - 1) / page * page;
    void* p = std::aligned_alloc(page, whole);
    if (p) large_pages(p, whole);
    return p;
  }
  std::unique_ptr<void, Free> own;
  inline static thread_local std::unique_ptr<void, Free> kept;
  inline static thread_local size_t size = 0;
};

constexpr int64_t MOST_THREADS = 256;
constexpr int64_t LEAST = 20000;  // products worth a second thread

// A run of parts, taken from both ends: begin and end in one word.
struct alignas(64) Run {
  std::atomic<uint64_t> span;
  void set(int64_t begin, int64_t end) { span.store(uint64_t(begin) << 32 | uint64_t(end)); }
  int64_t first() { return take(1ull << 32, 0); }
  int64_t last() { return take(0, 1); }
  int64_t take(uint64_t more, uint64_t less) {
    uint64_t s = span.load(std::memory_order_relaxed);
    while (s >> 32 < (s & 0xffffffff))
      if (span.compare_exchange_weak(s, s + more - less)) return int64_t(less ? (s & 0xffffffff) - 1 : s >> 32);
    return -1;
  }
};

template <class F>
void body(int64_t begin, int64_t end, void* context) {
  for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))();
}

// What thread `me` does of parts that lie in a run for each thread: its own from the front, then from the ends of the
// others'. Returns how many it did.
template <class F>
int64_t take_parts(Run* runs, uint32_t threads, uint32_t me, F&& part) {
  int64_t did = 0;
  for (int64_t i; (i = runs[me].first()) >= 0; ++did) part(i);
  for (uint32_t other = 1; other < threads; ++other)
    for (int64_t i; (i = runs[(me + other) % threads].last()) >= 0; ++did) part(i);
  return did;
}

inline uint32_t threads_here() {
  uint32_t threads = 1;
  if (rarefy_run_parallel && rarefy_count_threads) rarefy_count_threads(&threads);
  return std::min<uint32_t>(std::max<uint32_t>(threads, 1), MOST_THREADS);
}

// Parts go to threads in as many runs as there are threads, so that each reads memory in one stream; who is done helps
// the others, from the ends of their runs.
template <class F>
void on_threads(int64_t parts, bool worth, F&& part) {
  const uint32_t threads = worth ? uint32_t(std::min<int64_t>(threads_here(), parts)) : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < parts; ++i) part(i);
    return;
  }
  Run runs[MOST_THREADS];
  for (uint32_t t = 0; t < threads; ++t) runs[t].set(parts * t / threads, parts * (t + 1) / threads);
  std::atomic<uint32_t> arrived{0};
  auto take = [&] { take_parts(runs, threads, arrived.fetch_add(1) % threads, part); };
  rarefy_run_parallel(0, threads, 1, body<decltype(take)>, &take);
}
