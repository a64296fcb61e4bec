// Work split over torch's threads with work stealing, and scratch memory.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "rarefy.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#endif

extern rarefy_parallel_for_fn rarefy_parallel_for;
extern int (*rarefy_get_num_threads)(uint32_t*);

constexpr size_t HUGE_PAGE = 2 << 20;

// Ask for huge pages in untouched memory. Faults on small pages dominate the time of a layer with 50 MB of outputs, and
// columns read in random order exceed the TLB.
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Temporary memory of a call. Up to MAX_CACHED bytes stay allocated for the thread's next call. Code that runs inside a
// parallel region uses another slot than the call that waits for the region.
template <int SLOT>
class ScratchBuffer {
 public:
  explicit ScratchBuffer(size_t bytes) {
    if (bytes > MAX_CACHED) {
      owned.reset(allocate(bytes));
    } else if (bytes > cached_bytes) {
      cached.reset(allocate(bytes));
      cached_bytes = cached ? bytes : 0;
    }
    data = bytes > MAX_CACHED ? owned.get() : cached.get();
  }
  void* data;  // null where there is no memory

 private:
  static constexpr size_t MAX_CACHED = 16 << 20;
  static void* allocate(size_t bytes) {
    const size_t page = bytes < HUGE_PAGE / 4 ? 4096 : HUGE_PAGE, rounded = (bytes + page - 1) / page * page;
    void* p = std::aligned_alloc(page, rounded);
    if (p) advise_huge_pages(p, rounded);
    return p;
  }
  std::unique_ptr<void, FreeDeleter> owned;
  inline static thread_local std::unique_ptr<void, FreeDeleter> cached;
  inline static thread_local size_t cached_bytes = 0;
};

constexpr int64_t MAX_THREADS = 256;
constexpr int64_t MIN_PARALLEL_WORK = 20000;  // multiplications for which a second thread pays off

// A range of parts that is taken from both ends. Begin and end share one atomic integer.
struct alignas(64) WorkRange {
  std::atomic<uint64_t> packed;
  void set(int64_t begin, int64_t end) { packed.store(uint64_t(begin) << 32 | uint64_t(end)); }
  int64_t take_first() { return take(1ull << 32, 0); }
  int64_t take_last() { return take(0, 1); }
  int64_t take(uint64_t add, uint64_t subtract) {
    uint64_t s = packed.load(std::memory_order_relaxed);
    while (s >> 32 < (s & 0xffffffff))
      if (packed.compare_exchange_weak(s, s + add - subtract))
        return int64_t(subtract ? (s & 0xffffffff) - 1 : s >> 32);
    return -1;
  }
};

template <class F>
void run_range(int64_t begin, int64_t end, void* context) {
  for (int64_t i = begin; i < end; ++i) (*static_cast<F*>(context))();
}

// Run the parts of thread `thread`'s own range from its front, or backwards from its end, then steal from the other
// ends of the other ranges. Return how many parts it ran.
template <class F>
int64_t run_and_steal(WorkRange* ranges, uint32_t threads, uint32_t thread, bool backwards, F&& part) {
  int64_t count = 0;
  const auto run = [&](WorkRange& range, bool last) {
    for (int64_t i; (i = last ? range.take_last() : range.take_first()) >= 0; ++count) part(i);
  };
  run(ranges[thread], backwards);
  for (uint32_t other = 1; other < threads; ++other) run(ranges[(thread + other) % threads], !backwards);
  return count;
}

// The threads of the program that this thread runs a part of; 0 outside of programs.
inline thread_local uint32_t program_threads = 0;

// Let this thread run parts of a program that was split for so many threads: torch's own number may differ between its
// threads after a call of torch.set_num_threads, but how a step is split must not.
class ProgramThreads {
 public:
  explicit ProgramThreads(uint32_t threads) : before(program_threads) { program_threads = threads; }
  ~ProgramThreads() { program_threads = before; }
  ProgramThreads(const ProgramThreads&) = delete;
  ProgramThreads& operator=(const ProgramThreads&) = delete;

 private:
  const uint32_t before;
};

inline uint32_t num_threads() {
  if (program_threads) return program_threads;
  uint32_t threads = 1;
  if (rarefy_parallel_for && rarefy_get_num_threads) rarefy_get_num_threads(&threads);
  return std::min<uint32_t>(std::max<uint32_t>(threads, 1), MAX_THREADS);
}

// The threads of a parallel region as they begin. Some kernels of Linux wake a thread that has slept on the CPU of the
// thread that wakes it, while another CPU is idle: both then run in turns of milliseconds. So the caller naps once
// where others have not begun, and a thread that finds itself on the caller's CPU leaves it.
class Arrivals {
 public:
  explicit Arrivals(uint32_t threads) : threads_(threads), caller_(current_thread()), cpu_(current_cpu()) {}

  // The number of this thread.
  uint32_t arrive() {
    if (current_thread() != caller_ && cpu_ >= 0 && current_cpu() == cpu_) leave_cpu(cpu_, threads_);
    return count_.fetch_add(1) % threads_;
  }

  // For the caller, between pieces of its work: let others begin.
  void let_in() {
    if (current_thread() != caller_ || done_) return;  // in this order: other threads must not read done_
    if (++checks_ < CHECKS_BEFORE_NAP && count_.load(std::memory_order_relaxed) < threads_) return;
    done_ = true;
    if (count_.load(std::memory_order_relaxed) < threads_) nap();
  }

 private:
  static constexpr int CHECKS_BEFORE_NAP = 2;
#if defined(__linux__)
  using Thread = pthread_t;
  static Thread current_thread() { return pthread_self(); }
  static int current_cpu() { return sched_getcpu(); }
  static void nap() {
    const timespec time{0, 1};
    nanosleep(&time, nullptr);
  }
  static void leave_cpu(int cpu, uint32_t threads) {
    cpu_set_t all;
    if (sched_getaffinity(0, sizeof all, &all) || !CPU_ISSET(cpu, &all) || uint32_t(CPU_COUNT(&all)) < threads) return;
    cpu_set_t others = all;
    CPU_CLR(cpu, &others);
    if (!sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof all, &all);
  }
#else
  using Thread = int;
  static Thread current_thread() { return 0; }
  static int current_cpu() { return -1; }
  static void nap() {}
  static void leave_cpu(int, uint32_t) {}
#endif

  std::atomic<uint32_t> count_{0};
  const uint32_t threads_;
  const Thread caller_;
  const int cpu_;
  int checks_ = 0;     // of the caller alone
  bool done_ = false;  // likewise
};

// Run part(0) to part(parts - 1). Each thread gets a contiguous range, so that it reads memory in one stream.
template <class F>
void for_each_part(int64_t parts, bool parallel, F&& part) {
  const uint32_t threads = parallel ? uint32_t(std::min<int64_t>(num_threads(), parts)) : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < parts; ++i) part(i);
    return;
  }
  WorkRange ranges[MAX_THREADS];
  for (uint32_t t = 0; t < threads; ++t) ranges[t].set(parts * t / threads, parts * (t + 1) / threads);
  Arrivals arrivals(threads);
  auto work = [&] {
    run_and_steal(ranges, threads, arrivals.arrive(), false, [&](int64_t i) {
      part(i);
      arrivals.let_in();
    });
  };
  rarefy_parallel_for(0, threads, 1, run_range<decltype(work)>, &work);
}
