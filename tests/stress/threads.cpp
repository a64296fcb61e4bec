// A parallel-for for kernels under ThreadSanitizer, which knows every lock of it; OpenMP's are unknown to it. Each
// thread that calls has workers of its own, as with OpenMP.
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/rarefy.h"

namespace {

thread_local uint32_t threads = 1;

class Workers {
 public:
  ~Workers() {
    {
      std::lock_guard lock(mutex_);
      stops_ = true;
    }
    begin_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  // Run body(i, i + 1) for each i, the first one in this thread.
  void run(int64_t begin, int64_t end, rarefy_range_fn body, void* context) {
    while (int64_t(threads_.size()) < end - begin - 1)
      threads_.emplace_back([this, number = int64_t(threads_.size()) + 1, seen = calls_] { work(number, seen); });
    {
      std::lock_guard lock(mutex_);
      begin_at_ = begin, end_at_ = end, body_ = body, context_ = context;
      running_ = int64_t(threads_.size());
      ++calls_;
    }
    begin_.notify_all();
    body(begin, begin + 1, context);
    std::unique_lock lock(mutex_);
    end_.wait(lock, [this] { return !running_; });
  }

 private:
  void work(int64_t number, int64_t seen) {
    for (;;) {
      std::unique_lock lock(mutex_);
      begin_.wait(lock, [&] { return stops_ || calls_ > seen; });
      if (stops_) return;
      seen = calls_;
      const int64_t at = begin_at_ + number;
      const bool has_part = at < end_at_;
      lock.unlock();
      if (has_part) body_(at, at + 1, context_);
      lock.lock();
      if (!--running_) end_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begin_, end_;
  std::vector<std::thread> threads_;
  int64_t calls_ = 0, running_ = 0, begin_at_ = 0, end_at_ = 0;
  bool stops_ = false;
  rarefy_range_fn body_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace

extern "C" {

// For the calls of this thread.
void stress_set_num_threads(uint32_t n) { threads = n; }

int stress_num_threads(uint32_t* n) {
  *n = threads;
  return 0;
}

int stress_parallel_for(int64_t begin, int64_t end, int64_t, rarefy_range_fn body, void* context) {
  if (end - begin == 1) {
    body(begin, end, context);
    return 0;
  }
  thread_local Workers workers;
  workers.run(begin, end, body, context);
  return 0;
}
}
