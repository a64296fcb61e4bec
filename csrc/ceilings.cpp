// Measures the CPU's ceilings with all threads: multiply-adds per second, and bytes read per second.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"

namespace {

constexpr double WINDOW = 0.002;          // seconds; the best window counts, so that short disturbances do not
constexpr double MAX_WAIT = 0.02;         // seconds that a thread waits for the others
constexpr int64_t ROUNDS = 256;           // of multiply-adds between two looks at the clock
constexpr int64_t READ_CHUNK = 64 << 10;  // bytes read between two looks at the clock
constexpr uint32_t ONES = 0x3f803f80;     // two ones in bf16, about one in fp32

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Call work(thread) in all threads for `window` seconds each; return what it returns per second, summed over threads.
// On a busy machine some threads start late: those that came first wait for them, for a while.
template <class F>
double rate_in_window(double window, F&& work) {
  const uint32_t threads = num_threads();
  std::atomic<uint32_t> arrived{0};
  std::atomic<double> rate{0};
  auto run = [&] {
    const uint32_t thread = arrived.fetch_add(1) % threads;
    for (const double end = now() + MAX_WAIT; arrived.load() < threads && now() < end;) {
    }
    const double start = now();
    double seconds;
    int64_t done = 0;
    do {
      done += work(thread);
      seconds = now() - start;
    } while (seconds < window);
    rate.fetch_add(double(done) / seconds);
  };
  if (threads == 1)
    run();
  else
    rarefy_parallel_for(0, threads, 1, run_range<decltype(run)>, &run);
  return rate;
}

template <class F>
double best_rate(double seconds, F&& work) {
  const double end = now() + seconds;
  double best = 0;
  do best = std::max(best, rate_in_window(std::min(seconds, WINDOW), work));
  while (now() < end);
  return best;
}

struct alignas(64) Position {
  int64_t offset;
};

double read_rate(const rarefy_kernel_table& t, const char* memory, int64_t bytes, double seconds) {
  const int64_t share = bytes / num_threads() / READ_CHUNK * READ_CHUNK;
  if (!memory || share <= 0) return 0;
  Position positions[MAX_THREADS] = {};  // a window continues where the last one ended
  return best_rate(seconds, [&](uint32_t thread) {
    alignas(64) uint32_t sums[READ_BYTES / 4];
    int64_t& offset = positions[thread].offset;
    t.read_memory(memory + thread * share + offset, READ_CHUNK, sums);
    offset = (offset + READ_CHUNK) % share;
    return READ_CHUNK;
  });
}

}  // namespace

API double rarefy_measure_ceiling(int32_t kind, double seconds, const void* memory, int64_t bytes) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  if (kind == RAREFY_CEILING_READ) return read_rate(t, static_cast<const char*>(memory), bytes, seconds);
  if (kind != RAREFY_I16 && (kind < RAREFY_F32 || kind > RAREFY_I8)) return 0;
  alignas(64) uint32_t weights[CEILING_LANES * TILE_ROWS], x[CEILING_LANES * TILE_COLS];
  std::fill_n(weights, CEILING_LANES * TILE_ROWS, ONES);
  std::fill_n(x, CEILING_LANES * TILE_COLS, ONES);
  return best_rate(seconds, [&](uint32_t) {
    alignas(64) uint32_t sums[2 * 16 * TILE_COLS];
    return t.multiply_adds[lane_index(kind)](weights, x, ROUNDS, sums);
  });
}
