// Runs a program: its steps in order, each split into parts that threads take. All steps run within one parallel
// region, so that threads start once. A thread waits only for the steps that its next step depends on, and never for
// threads that have not started yet.
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>

#include "attention_ops.hpp"
#include "conv_ops.hpp"
#include "decode_steps.hpp"
#include "kernel_table.h"
#include "linear_ops.hpp"
#include "nhwc_channels.hpp"
#include "nhwc_ops.hpp"
#include "parallel.h"
#include "rarefy.h"
#include "step_common.hpp"
#include "winograd_ops.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace {

constexpr int SPINS_BEFORE_YIELD = 2000;

// Whole tiles, which memory is read faster in, where there is one for each thread.
int64_t norm_columns_per_part(const rarefy_step& s) {
  return ceil_div(s.columns, TILE_COLS) < int64_t(num_threads()) ? 16 : TILE_COLS;
}

int64_t num_parts(const rarefy_step& s) {
  if (s.decode) return decode_parts(s);
  const int64_t tiles = ceil_div(s.columns, TILE_COLS);
  switch (s.op) {
    case RAREFY_OP_LINEAR: return linear_parts(s, tiles);
    case RAREFY_OP_NORM: return ceil_div(s.columns, norm_columns_per_part(s));
    case RAREFY_OP_ADD:
    case RAREFY_OP_MUL:
    case RAREFY_OP_FAKE_QUANTIZE:
    case RAREFY_OP_CHANNEL_AFFINE:
    case RAREFY_OP_REARRANGE:
    case RAREFY_OP_CHANNEL_SCALE: return tiles * ceil_div(s.features, FEATURES_PER_PART);
    case RAREFY_OP_ATTENTION: return attention_parts(*s.attention);
    case RAREFY_OP_PAD_PLANES: return s.batch * ceil_div(s.features, CHANNELS_PER_PART);
    case RAREFY_OP_CONV: return tiles * ceil_div(s.features, conv_rows_per_part(s, tiles));
    case RAREFY_OP_MAX_POOL:
    case RAREFY_OP_DEPTHWISE_CONV: return tiles * ceil_div(s.features, CHANNELWISE_PER_PART);
    case RAREFY_OP_GROUP_NORM: return s.batch * s.groups;
    case RAREFY_OP_GLOBAL_AVG_POOL: return s.columns * ceil_div(s.features, FEATURES_PER_PART);
    case RAREFY_OP_NHWC_QUANTIZE:
    case RAREFY_OP_NHWC_MAX_POOL: return s.batch * s.nhwc->out.height;
    case RAREFY_OP_NHWC_MAP: return nhwc_map_parts(s);
    case RAREFY_OP_NHWC_COPY:
    case RAREFY_OP_NHWC_SPREAD: return s.batch * s.nhwc->in.height;
    case RAREFY_OP_NHWC_MEAN: return s.batch * ceil_div(s.nhwc->in.channels, MEAN_CHANNELS_PER_PART);
    case RAREFY_OP_NHWC_DEPTHWISE:
    case RAREFY_OP_NHWC_CONV:
      return s.winograd ? NhwcWinograd(rarefy_active_kernels(), s).parts : NhwcConv(rarefy_active_kernels(), s).parts;
    default: return tiles;
  }
}

void run_pack(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  float* out = tile_of(s.out, tile);
  const bool has_gaps = (tile + 1) * TILE_COLS > s.columns || (!s.channels_first && s.tokens != s.seq_stride);
  if (has_gaps) std::memset(out, 0, size_t(s.features * TILE_COLS) * 4);
  for_each_token_run(s, tile, [&](int64_t sequence, int64_t token, int64_t column, int64_t n) {
    if (s.channels_first) {
      const float* x = s.x.data + sequence * s.features * s.tokens + token;
      for (int64_t f = 0; f < s.features; ++f)
        std::memcpy(out + f * TILE_COLS + column, x + f * s.tokens, size_t(n) * 4);
    } else {
      t.pack_inputs[RAREFY_F32](s.x.data + (sequence * s.tokens + token) * s.features, s.features, n, s.features,
                                nullptr, reinterpret_cast<uint32_t*>(out + column));
    }
  });
}

void run_unpack(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  for_each_token_run(s, tile, [&](int64_t sequence, int64_t token, int64_t column, int64_t n) {
    const float* x = tile_of(s.x, tile) + column;
    if (s.channels_first) {
      float* out = s.out.data + sequence * s.features * s.tokens + token;
      for (int64_t f = 0; f < s.features; ++f) std::memcpy(out + f * s.tokens, x + f * TILE_COLS, size_t(n) * 4);
    } else {
      t.unpack_tile(x, s.features, n, s.out.data + (sequence * s.tokens + token) * s.features, s.features);
    }
  });
}

// Pack or unpack the tokens that token_rows gives, a vector of columns at a time; through a buffer where their rows are
// not contiguous.
int move_token_rows(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  constexpr int64_t GROUP = 16;
  const bool packs = s.op == RAREFY_OP_PACK;
  const size_t row_bytes = size_t(s.features) * 4;
  const ScratchBuffer<1> scratch(GROUP * row_bytes);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  float* buffer = static_cast<float*>(scratch.data);
  for (int64_t at = tile * TILE_COLS, end = std::min(at + TILE_COLS, s.columns); at < end; at += GROUP) {
    const int64_t n = std::min(GROUP, end - at), *rows = s.token_rows + at;
    const bool contiguous = rows[n - 1] - rows[0] == n - 1;
    const auto row = [&](float* x, int64_t i) { return x + rows[i] * s.features; };
    if (packs) {
      for (int64_t i = 0; !contiguous && i < n; ++i) std::memcpy(buffer + i * s.features, row(s.x.data, i), row_bytes);
      t.pack_inputs[RAREFY_F32](contiguous ? row(s.x.data, 0) : buffer, s.features, n, s.features, nullptr,
                                reinterpret_cast<uint32_t*>(tile_of(s.out, tile) + at % TILE_COLS));
    } else {
      t.unpack_tile(tile_of(s.x, tile) + at % TILE_COLS, s.features, n, contiguous ? row(s.out.data, 0) : buffer,
                    s.features);
      for (int64_t i = 0; !contiguous && i < n; ++i)
        std::memcpy(row(s.out.data, i), buffer + i * s.features, row_bytes);
    }
  }
  return RAREFY_OK;
}

void run_image_absmax(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  alignas(64) float absmax[TILE_COLS];
  t.column_absmax(tile_of(s.x, tile), s.features, TILE_COLS, absmax);
  for_each_image(s, tile, [&](int64_t, int64_t column, int64_t n) {
    const uint32_t bits = t.absmax_bits(absmax + column % TILE_COLS, n);
    std::memcpy(s.out.data + column, &bits, 4);
  });
}

void run_convert(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  const float* x = tile_of(s.x, tile);
  if (s.dtype == RAREFY_BF16) {
    t.pack_bf16_lanes(x, s.features, columns_of(s, tile), reinterpret_cast<uint32_t*>(tile_of(s.out, tile)));
    return;
  }
  if (s.codes_scale != 0.0f) {
    t.quantize_static(x, s.features, 1.0f / s.codes_scale, s.codes_zero,
                      reinterpret_cast<uint32_t*>(tile_of(s.out, tile)));
    return;
  }
  float* scales = s.out_scales.data + tile * TILE_COLS;
  auto* codes = reinterpret_cast<uint32_t*>(tile_of(s.out, tile));
  const int64_t columns = columns_of(s, tile);
  if (s.two_terms == 2) {
    t.quantize_blocks(x, s.features, columns, codes);
    return;
  }
  if (s.per_image) {
    image_scales(t, s, tile, scales);
  } else {
    if (s.in_absmax.data)
      t.column_absmax(tile_of(s.in_absmax, tile), s.absmax_rows, columns, scales);
    else
      t.column_absmax(x, s.features, columns, scales);
    if (!s.two_terms) {
      quantize_by_absmax(t, s.dtype, x, s.features, columns, scales, codes);
      return;
    }
    absmax_to_scales(scales, columns);
  }
  (s.two_terms ? t.quantize_two_terms : t.quantize_tile)(x, s.features, columns, scales, codes);
}

int run_norm(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t size = norm_columns_per_part(s), first = part * size, tile = first / TILE_COLS,
                column = first % TILE_COLS;
  const int64_t group = s.features / s.groups;
  const ScratchBuffer<1> scratch(s.out.data ? 4 : size_t(s.features * TILE_COLS) * 4);
  if (!scratch.data) return RAREFY_NO_MEMORY;
  float* out = s.out.data ? tile_of(s.out, tile) + column : static_cast<float*>(scratch.data);
  for (int64_t f = 0; f < s.features; f += group)
    t.norm_tile(tile_of(s.x, tile) + column + f * TILE_COLS, group, size, s.gamma, s.bias, s.eps, s.subtract_mean != 0,
                out + f * TILE_COLS);
  if (s.out_codes.data && s.codes_dtype == RAREFY_BF16) {
    t.pack_bf16_lanes(out, s.features, size, codes_of(s, tile) + column);
  } else if (s.out_codes.data) {
    float* scales = s.out_scales.data + first;
    t.column_absmax(out, s.features, size, scales);
    quantize_by_absmax(t, s.codes_dtype, out, s.features, size, scales, codes_of(s, tile) + column);
  }
  return RAREFY_OK;
}

void run_add_or_mul(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), tile = part / chunks;
  const int64_t row = part % chunks * FEATURES_PER_PART;
  t.add_or_mul(tile_of(s.x, tile) + row * TILE_COLS, optional_rows(s.other, tile, row), s.op == RAREFY_OP_MUL, s.act,
               tile_of(s.out, tile) + row * TILE_COLS, std::min(FEATURES_PER_PART, s.features - row) * TILE_COLS);
}

// Some features of one column tile.
void run_rearrange(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), tile = part / chunks;
  const int64_t row = part % chunks * FEATURES_PER_PART, first = s.segment_starts[tile];
  t.rearrange(s.x.data + row * TILE_COLS, std::min(FEATURES_PER_PART, s.features - row), s.segments + first,
              int(s.segment_starts[tile + 1] - first), tile_of(s.out, tile) + row * TILE_COLS);
}

void run_fake_quantize(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t chunks = ceil_div(s.features, FEATURES_PER_PART), tile = part / chunks;
  const int64_t row = part % chunks * FEATURES_PER_PART;
  t.fake_quantize(tile_of(s.x, tile) + row * TILE_COLS, s.codes_scale, s.codes_zero,
                  tile_of(s.out, tile) + row * TILE_COLS, std::min(FEATURES_PER_PART, s.features - row) * TILE_COLS);
}

// One group of features of one image.
void run_group_norm(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  const int64_t rows = s.features / s.groups, image = part / s.groups, from = part % s.groups * rows;
  const double count = double(rows * s.tokens);
  double mean[2] = {}, deviations[2] = {};
  for_each_run(s, image, [&](int64_t tile, int64_t column, int64_t n) {
    t.add_deviations(tile_of(s.x, tile) + from * TILE_COLS + column, rows, n, 0.0f, mean);
  });
  const float center = float(mean[0] / count);
  for_each_run(s, image, [&](int64_t tile, int64_t column, int64_t n) {
    t.add_deviations(tile_of(s.x, tile) + from * TILE_COLS + column, rows, n, center, deviations);
  });
  const float scale = float(1.0 / std::sqrt(deviations[1] / count + double(s.eps)));
  for_each_run(s, image, [&](int64_t tile, int64_t column, int64_t n) {
    t.normalize_columns(tile_of(s.x, tile) + from * TILE_COLS + column, rows, n, center, scale,
                        s.gamma ? s.gamma + from : nullptr, s.bias ? s.bias + from : nullptr,
                        tile_of(s.out, tile) + from * TILE_COLS + column);
  });
}

void run_kv_store(const rarefy_kernel_table& t, const rarefy_step& s, int64_t tile) {
  for_each_token_run(s, tile, [&](int64_t sequence, int64_t token, int64_t column, int64_t n) {
    for (int64_t done = 0; done < n;)
      done += store_tokens(t, s, sequence, token + done, tile_of(s.x, tile) + column + done, TILE_COLS, n - done);
  });
}

int run_part(const rarefy_kernel_table& t, const rarefy_step& s, int64_t part) {
  if (s.decode) return run_decode_step(t, s, part);
  if (s.token_rows) return move_token_rows(t, s, part);
  switch (s.op) {
    case RAREFY_OP_PACK: run_pack(t, s, part); break;
    case RAREFY_OP_UNPACK: run_unpack(t, s, part); break;
    case RAREFY_OP_LINEAR: return run_linear(t, s, part);
    case RAREFY_OP_CONVERT: run_convert(t, s, part); break;
    case RAREFY_OP_NORM: return run_norm(t, s, part);
    case RAREFY_OP_ADD:
    case RAREFY_OP_MUL: run_add_or_mul(t, s, part); break;
    case RAREFY_OP_FAKE_QUANTIZE: run_fake_quantize(t, s, part); break;
    case RAREFY_OP_ATTENTION: return run_attention(t, *s.attention, part);
    case RAREFY_OP_ROPE:
      t.rope[0](tile_of(s.x, part), tile_of(s.cos, part), tile_of(s.sin, part), s.heads, s.features / s.heads,
                tile_of(s.out, part));
      break;
    case RAREFY_OP_KV_STORE: run_kv_store(t, s, part); break;
    case RAREFY_OP_PAD_PLANES: return run_pad_planes(t, s, part);
    case RAREFY_OP_CONV: return run_conv(t, s, part);
    case RAREFY_OP_MAX_POOL:
    case RAREFY_OP_DEPTHWISE_CONV: run_channelwise(t, s, part); break;
    case RAREFY_OP_GLOBAL_AVG_POOL: run_global_avg_pool(t, s, part); break;
    case RAREFY_OP_CHANNEL_AFFINE: run_channel_affine(t, s, part); break;
    case RAREFY_OP_CHANNEL_SCALE: run_channel_scale(t, s, part); break;
    case RAREFY_OP_NHWC_QUANTIZE: return run_nhwc_quantize(t, s, part);
    case RAREFY_OP_NHWC_DEPTHWISE:
    case RAREFY_OP_NHWC_CONV: return s.winograd ? NhwcWinograd(t, s).run(part) : NhwcConv(t, s).run(part);
    case RAREFY_OP_NHWC_MAX_POOL: return run_nhwc_max_pool(t, s, part);
    case RAREFY_OP_NHWC_MAP: return run_nhwc_map(t, s, part);
    case RAREFY_OP_NHWC_COPY: run_nhwc_copy(t, s, part); break;
    case RAREFY_OP_NHWC_SPREAD: run_nhwc_spread(t, s, part); break;
    case RAREFY_OP_NHWC_MEAN: run_nhwc_mean(t, s, part); break;
    case RAREFY_OP_NHWC_UNPACK: run_nhwc_unpack(t, s, part); break;
    case RAREFY_OP_IMAGE_ABSMAX: run_image_absmax(t, s, part); break;
    case RAREFY_OP_REARRANGE: run_rearrange(t, s, part); break;
    case RAREFY_OP_GROUP_NORM: run_group_norm(t, s, part); break;
  }
  return RAREFY_OK;
}

struct alignas(64) PartCounter {
  std::atomic<int64_t> remaining;
};

void pause_or_yield(int& spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
#if defined(__linux__)
  if (++spins % SPINS_BEFORE_YIELD == 0) sched_yield();
#endif
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int run_on_one_thread(const rarefy_kernel_table& t, const rarefy_step* steps, int64_t count, rarefy_step_time* times) {
  int error = RAREFY_OK;
  for (int64_t k = 0; k < count && !error; ++k) {
    const int64_t start = times ? now() : 0;
    for (int64_t i = 0, parts = num_parts(steps[k]); i < parts; ++i) error |= run_part(t, steps[k], i);
    if (times) times[k] = {now() - start, 0};
  }
  return error;
}

// Within its lifetime denormal numbers count as zero on this thread: one operation on them can take as long as a
// hundred others, and columns beyond the last one hold whatever was in memory before.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned FLUSH_TO_ZERO = 1u << 15, DENORMALS_ARE_ZERO = 1u << 6;
  const unsigned before_;
#else
 public:
  FlushDenormals() {}  // a constructor: its objects are no unused variables
#endif
};

}  // namespace

API int rarefy_run_program(const rarefy_step* steps, int64_t count, rarefy_step_time* times) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  const uint32_t threads = num_threads();
  const ProgramThreads of_caller(threads);
  for (int64_t k = 0; k < count; ++k) {
    const rarefy_step& s = steps[k];
    if (s.op < 0 || s.op >= RAREFY_OP_COUNT || s.depends_on < 0 || s.depends_on > k) return RAREFY_INVALID;
  }
  if (threads == 1) {
    const FlushDenormals of_steps;
    return run_on_one_thread(t, steps, count, times);
  }
  const ScratchBuffer<2> scratch(size_t(count) * (sizeof(PartCounter) + threads * sizeof(WorkRange)));
  if (!scratch.data) return RAREFY_NO_MEMORY;
  PartCounter* counters = static_cast<PartCounter*>(scratch.data);
  WorkRange* ranges = reinterpret_cast<WorkRange*>(counters + count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t parts = num_parts(steps[k]);
    (new (&counters[k]) PartCounter{})->remaining.store(parts, std::memory_order_relaxed);
    for (uint32_t i = 0; i < threads; ++i)
      (new (&ranges[k * threads + i]) WorkRange{})->set(parts * i / threads, parts * (i + 1) / threads);
  }
  Arrivals arrivals(threads);
  std::atomic<int> error{RAREFY_OK};
  auto work = [&] {
    const ProgramThreads of_worker(threads);
    const FlushDenormals of_steps;
    const uint32_t thread = arrivals.arrive();
    int64_t finished = 0;  // leading steps known to be done
    for (int64_t k = 0; k < count; ++k) {
      const int64_t start = times ? now() : 0;
      for (; finished < steps[k].depends_on; ++finished)
        for (int spins = 0; counters[finished].remaining.load(std::memory_order_acquire) > 0;) pause_or_yield(spins);
      const int64_t ready = times ? now() : 0;
      // every other step backwards: what the last one wrote last is still in the cache
      const int64_t ran =
          run_and_steal(ranges + k * threads, threads, thread, k % 2 && !steps[k].decode, [&](int64_t part) {
            if (const int code = run_part(t, steps[k], part)) error.store(code, std::memory_order_relaxed);
          });
      if (ran) counters[k].remaining.fetch_sub(ran, std::memory_order_acq_rel);
      arrivals.let_in();
      if (times) times[thread * count + k] = {now() - ready, ready - start};
    }
  };
  rarefy_parallel_for(0, threads, 1, run_range<decltype(work)>, &work);
  return error;
}
