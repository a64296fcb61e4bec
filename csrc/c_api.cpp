// Choice of an instruction set; products of matrices.
#include "rarefy.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"

extern const rarefy_table rarefy_portable;
#if defined(RAREFY_X86)
extern const rarefy_table rarefy_avx2, rarefy_avx512;
#endif

namespace {

constexpr int64_t CHUNK = 32, PART = 32;  // tiles, rows that a thread takes at once

int64_t inputs_of_lane(int32_t kind) { return kind >= RAREFY_I8 ? 4 : kind == RAREFY_BF16 ? 2 : 1; }

std::atomic<const rarefy_table*> table{nullptr};

const rarefy_table* of_name(const char* name) {
#if defined(RAREFY_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
#if defined(RAREFY_EMULATED)
  const bool avx512 = avx2;
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
#endif
  if (avx512 && (!name || !std::strcmp(name, "avx512"))) return &rarefy_avx512;
  if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &rarefy_avx2;
#endif
  return !name || !std::strcmp(name, "portable") ? &rarefy_portable : nullptr;
}

}  // namespace

float rarefy_step_of(const rarefy_table& t, const float* x, int64_t n) {
  const uint32_t most = t.largest(x, n);
  if (most >= 0x7f800000u) return std::nanf("");  // NaN or inf: no output of this row means anything
  const float step = __builtin_bit_cast(float, most) / 127.0f;
  return step > 1e-36f ? step : 1.0f;  // one over less would be infinite
}

rarefy_parallel rarefy_run_parallel = nullptr;
int (*rarefy_count_threads)(uint32_t*) = nullptr;

const rarefy_table& rarefy_chosen() {
  const rarefy_table* t = table.load(std::memory_order_acquire);
  if (!t) table.store(t = of_name(nullptr), std::memory_order_release);
  return *t;
}

API const char* rarefy_isa(void) { return rarefy_chosen().name; }

API int rarefy_use_isa(const char* name) {
  const rarefy_table* t = of_name(name);
  if (t) table.store(t, std::memory_order_release);
  return t ? RAREFY_OK : RAREFY_BAD;
}

API void rarefy_use_parallel(rarefy_parallel run, int (*threads)(uint32_t*)) {
  rarefy_run_parallel = run;
  rarefy_count_threads = threads;
}

namespace {

// One of several weights that the same inputs are multiplied by.
template <class T>
struct Job {
  const T* w;
  const float* residual;
  float* y;
  int64_t ldy;
};

// Parts of the rows of all the jobs, `size` rows each: which job, and where in it.
template <class T>
struct Parts {
  Parts(const Job<T>* jobs, int64_t count, int64_t size) : jobs(jobs), size(size) {
    for (int64_t j = 0; j < count; ++j) all += of(j);
  }
  int64_t of(int64_t j) const { return (jobs[j].w->rows + size - 1) / size; }
  const Job<T>& at(int64_t& part) const {
    int64_t j = 0;
    for (; part >= of(j); ++j) part -= of(j);
    return jobs[j];
  }
  const Job<T>* jobs;
  int64_t size, all = 0;
};

template <class T>
int64_t rows_of(const Job<T>* jobs, int64_t count) {
  int64_t rows = 0;
  for (int64_t j = 0; j < count; ++j) rows += jobs[j].w->rows;
  return rows;
}

constexpr int64_t rows_of_part(const rarefy_tiles*) { return CHUNK * R4; }
constexpr int64_t rows_of_part(const rarefy_sell*) { return SLAB; }

void multiply(const rarefy_table& t, const rarefy_tiles& w, int64_t part, const uint32_t* x, uint32_t* out, int64_t n) {
  t.tiles[w.kind](w, part * CHUNK, std::min((w.rows + R4 - 1) / R4, (part + 1) * CHUNK), x, out, n);
}

void multiply(const rarefy_table& t, const rarefy_sell& w, int64_t part, const uint32_t* x, uint32_t* out, int64_t n) {
  t.sell[w.kind](w, part, x, out, n, nullptr);
}

// Tiles and pairs of rows, which both run on packed inputs.
template <class T>
int run_packed(const Job<T>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_table& t = rarefy_chosen();
  const T* first = jobs->w;
  const int32_t kind = first->kind;
  const bool bytes = kind == RAREFY_I8;
  const int64_t squares = (n + NT - 1) / NT, inputs = first->inputs, cols = first->cols;
  const Scratch<0> scratch(size_t(squares * cols * NT) * 4 + size_t(squares * NT) * 8);
  uint32_t* packed = static_cast<uint32_t*>(scratch.from);
  if (!packed) return RAREFY_MEMORY;
  float* scales = reinterpret_cast<float*>(packed + squares * cols * NT);
  float* inverse = scales + squares * NT;
  const bool worth = cols * rows_of(jobs, count) / 8 * n > LEAST;
  on_threads(squares, worth, [&](int64_t s) {
    const int64_t here = std::min(NT, n - s * NT);
    if (bytes)
      for (int64_t i = 0; i < NT; ++i) {
        const float q = i < here ? rarefy_step_of(t, x + (s * NT + i) * ldx, inputs) : 1.0f;
        scales[s * NT + i] = q;
        inverse[s * NT + i] = 1.0f / q;
      }
    t.pack[kind](x + s * NT * ldx, ldx, here, inputs, bytes ? inverse + s * NT : nullptr, packed + s * cols * NT);
  });
  constexpr int64_t SIZE = rows_of_part(static_cast<const T*>(nullptr));
  const Parts<T> parts(jobs, count, SIZE);
  on_threads(parts.all * squares, worth, [&](int64_t i) {
    const int64_t s = i / parts.all, here = std::min(NT, n - s * NT);
    int64_t part = i % parts.all;
    const Job<T>& job = parts.at(part);
    const int64_t row = part * SIZE;
    alignas(64) uint32_t out[SIZE * NT];
    multiply(t, *job.w, part, packed + s * cols * NT, out, here);
    t.finish[kind]({job.w->scales, job.w->sums, job.w->bias, job.w->act}, row, std::min(SIZE, job.w->rows - row), out,
                   scales + s * NT, here, job.residual ? job.residual + s * NT * job.ldy : nullptr,
                   job.y + s * NT * job.ldy, job.ldy);
  });
  return RAREFY_OK;
}

int run(const Job<rarefy_tiles>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  return run_packed(jobs, count, x, ldx, n);
}

int run(const Job<rarefy_sell>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  return run_packed(jobs, count, x, ldx, n);
}

int run(const Job<rarefy_bitmask>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_table& t = rarefy_chosen();
  const rarefy_bitmask* first = jobs->w;
  const int32_t kind = first->kind;
  const int64_t wide = first->words * 64, bytes = 4 / inputs_of_lane(kind);
  const Scratch<0> scratch(size_t(n * wide * bytes + n * 4));
  char* in = static_cast<char*>(scratch.from);
  if (!in) return RAREFY_MEMORY;
  float* scales = reinterpret_cast<float*>(in + n * wide * bytes);
  for (int64_t i = 0; i < n; ++i) {
    scales[i] = kind >= RAREFY_I8 ? rarefy_step_of(t, x + i * ldx, first->cols) : 1.0f;
    t.convert[kind](x + i * ldx, first->cols, wide, 1.0f / scales[i], in + i * wide * bytes);
  }
  const Parts<rarefy_bitmask> parts(jobs, count, PART);
  on_threads(parts.all, rows_of(jobs, count) * first->cols / 8 * n > LEAST, [&](int64_t part) {
    const Job<rarefy_bitmask>& job = parts.at(part);
    const int64_t from = part * PART, to = std::min(job.w->rows, from + PART);
    t.bits[kind](*job.w, from, to, in, wide, job.y, job.ldy, n);
    t.settle[kind](*job.w, from, to, scales, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

int run(const Job<rarefy_panels>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_table& t = rarefy_chosen();
  const rarefy_panels* first = jobs->w;
  const bool exact = first->exact;
  const int64_t wide = first->words * 64, bytes = exact ? 4 : 1;
  const Scratch<0> scratch(size_t(n * wide * bytes + n * 4));
  char* in = static_cast<char*>(scratch.from);
  if (!in) return RAREFY_MEMORY;
  float* scales = reinterpret_cast<float*>(in + n * wide * bytes);
  for (int64_t i = 0; i < n; ++i) {
    scales[i] = exact ? 1.0f : rarefy_step_of(t, x + i * ldx, first->cols);
    t.convert[exact ? RAREFY_F32 : RAREFY_I8](x + i * ldx, first->cols, wide, 1.0f / scales[i], in + i * wide * bytes);
  }
  const auto rows = t.panels[(first->kind == RAREFY_I4 ? 2 : 0) + (exact ? 1 : 0)];
  const Parts<rarefy_panels> parts(jobs, count, PART);
  on_threads(parts.all, rows_of(jobs, count) * first->cols / 8 * n > LEAST, [&](int64_t part) {
    const Job<rarefy_panels>& job = parts.at(part);
    const int64_t from = part * PART, to = std::min(job.w->rows, from + PART);
    rows(*job.w, from, to, in, wide, job.y, job.ldy, n);
    t.settle_panels(*job.w, from, to, exact ? nullptr : scales, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

int run(const Job<rarefy_csr>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_table& t = rarefy_chosen();
  const int size = n > 8 ? 3 : n > 4 ? 2 : n > 1;  // of 1, 4, 8, 16 inputs side by side
  const int64_t side = size ? 2 << size : 1, groups = (n + side - 1) / side, group = jobs->w->inputs * side;
  const Scratch<0> scratch(size_t(size ? groups * group : 0) * 4);
  float* packed = static_cast<float*>(scratch.from);
  if (size && !packed) return RAREFY_MEMORY;
  for (int64_t i = 0; size && i < groups * side; ++i) {
    float* to = packed + i / side * group + i % side;
    for (int64_t c = 0; c < jobs->w->inputs; ++c) to[c * side] = i < n ? x[i * ldx + c] : 0.0f;
  }
  int64_t values = 0;
  for (int64_t j = 0; j < count; ++j) values += jobs[j].w->starts[jobs[j].w->rows];
  const Parts<rarefy_csr> parts(jobs, count, PART);
  on_threads(parts.all, values * n > LEAST, [&](int64_t part) {
    const Job<rarefy_csr>& job = parts.at(part);
    const int64_t from = part * PART, to = std::min(job.w->rows, from + PART);
    for (int64_t g = 0; g < groups; ++g)
      t.csr[size](*job.w, from, to, size ? packed + g * group : x, job.y + g * side * job.ldy, job.ldy,
                  std::min(side, n - g * side));
    t.rows(*job.w, from, to, nullptr, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

template <class T>
int run_all(const void* const* w, int64_t count, const float* x, int64_t ldx, float* const* y, int64_t n) {
  Job<T> jobs[RAREFY_MOST_JOBS];
  for (int64_t j = 0; j < count; ++j) {
    const T* one = static_cast<const T*>(w[j]);
    jobs[j] = {one, nullptr, y[j], one->rows};
  }
  return run(jobs, count, x, ldx, n);
}

}  // namespace

API int rarefy_run_tiles(const rarefy_tiles* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                         int64_t n) {
  const Job<rarefy_tiles> job{w, residual, y, ldy};
  return run(&job, 1, x, ldx, n);
}

API int rarefy_run_sell(const rarefy_sell* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                        int64_t n) {
  const Job<rarefy_sell> job{w, residual, y, ldy};
  return run(&job, 1, x, ldx, n);
}

API int rarefy_run_bitmask(const rarefy_bitmask* w, const float* x, int64_t ldx, const float* residual, float* y,
                           int64_t ldy, int64_t n) {
  const Job<rarefy_bitmask> job{w, residual, y, ldy};
  return run(&job, 1, x, ldx, n);
}

API int rarefy_run_csr(const rarefy_csr* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                       int64_t n) {
  const Job<rarefy_csr> job{w, residual, y, ldy};
  return run(&job, 1, x, ldx, n);
}

API int rarefy_run_panels(const rarefy_panels* w, const float* x, int64_t ldx, const float* residual, float* y,
                          int64_t ldy, int64_t n) {
  const Job<rarefy_panels> job{w, residual, y, ldy};
  return run(&job, 1, x, ldx, n);
}

API int rarefy_run_together(int32_t format, const void* const* w, int64_t count, const float* x, int64_t ldx,
                            float* const* y, int64_t n) {
  if (count < 1 || count > RAREFY_MOST_JOBS) return RAREFY_BAD;
  switch (format) {
    case RAREFY_BITMASK: return run_all<rarefy_bitmask>(w, count, x, ldx, y, n);
    case RAREFY_CSR: return run_all<rarefy_csr>(w, count, x, ldx, y, n);
    case RAREFY_TILES: return run_all<rarefy_tiles>(w, count, x, ldx, y, n);
    case RAREFY_SELL: return run_all<rarefy_sell>(w, count, x, ldx, y, n);
    case RAREFY_PANELS: return run_all<rarefy_panels>(w, count, x, ldx, y, n);
    default: return RAREFY_BAD;
  }
}

API int rarefy_rows_of_panels(const rarefy_panels* w, const int64_t* rows, int64_t n, float* out) {
  const bool nibbles = w->kind == RAREFY_I4;
  const int64_t parts = w->parts, each = parts > 1 ? 32 : 64;
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= w->rows) return RAREFY_BAD;
  for (int64_t i = 0; i < n; ++i, out += w->cols)
    for (int64_t c = 0; c < w->cols; ++c) {
      const int64_t cell = (rows[i] / R4 * w->words + c / 64) * R4 + rows[i] % R4, at = c % 64;
      const int64_t part = cell * parts + at / each;
      float by = w->whole ? w->whole[rows[i]] : 1.0f;
      if (parts) by *= from_bf16(w->scales[part]);
      const uint8_t* values = static_cast<const uint8_t*>(w->values) + cell * (nibbles ? 32 : 64);
      const int zero = w->zeros ? w->zeros[part] : 8;
      const int value = nibbles ? (values[at / 2] >> at % 2 * 4 & 15) - zero : static_cast<int8_t>(values[at]);
      out[c] = float(value) * by;
    }
  return RAREFY_OK;
}

API int rarefy_check_csr(const rarefy_csr* w, int64_t values) {
  if (w->kind < 0 || w->kind > 2 || w->rows < 0 || w->inputs < 0 || w->inputs > 65536) return RAREFY_BAD;
  if (w->starts[0] || w->starts[w->rows] != values) return RAREFY_BAD;
  for (int64_t r = 0; r < w->rows; ++r)
    if (w->starts[r + 1] < w->starts[r]) return RAREFY_BAD;
  for (int64_t r = 0; r < w->rows; ++r)
    for (int64_t i = w->starts[r]; i < w->starts[r + 1]; ++i)  // no column twice
      if (w->columns[i] >= w->inputs || (i > w->starts[r] && w->columns[i] <= w->columns[i - 1])) return RAREFY_BAD;
  return RAREFY_OK;
}

API int rarefy_check_panels(const rarefy_panels* w, int64_t values) {
  if (w->rows < 0 || w->cols < 0 || w->words != (w->cols + 63) / 64) return RAREFY_BAD;
  if ((w->kind != RAREFY_I8 && w->kind != RAREFY_I4) || w->parts < 0 || w->parts > 2) return RAREFY_BAD;
  if ((w->parts == 0) == (w->scales != nullptr) || (w->zeros && (!w->parts || w->kind != RAREFY_I4))) return RAREFY_BAD;
  return (w->rows + 3) / 4 * w->words * 4 * (w->kind == RAREFY_I4 ? 32 : 64) == values ? RAREFY_OK : RAREFY_BAD;
}

API int rarefy_check_bitmask(const rarefy_bitmask* w, int64_t values) {
  if (w->rows < 0 || w->cols < 0 || w->words != (w->cols + 63) / 64 || w->kind < 0 || w->kind > 3) return RAREFY_BAD;
  int64_t count = 0;
  for (int64_t g = 0; g < (w->rows + 3) / 4; ++g) {
    if (w->starts[g] != count) return RAREFY_BAD;
    for (int64_t word = 0; word < w->words; ++word)
      for (int64_t r = 0; r < 4; ++r) {
        const uint64_t bits = w->masks[(g * w->words + word) * 4 + r];
        const int64_t inside = w->cols - 64 * word;
        if (bits && (4 * g + r >= w->rows || (inside < 64 && bits >> inside))) return RAREFY_BAD;
        const int64_t here = __builtin_popcountll(bits);
        count += w->kind == RAREFY_I4 ? (here + 1) / 2 : here;
      }
  }
  return count == values ? RAREFY_OK : RAREFY_BAD;
}

API int rarefy_check_tiles(const rarefy_tiles* w, int64_t columns, int64_t values) {
  const int64_t each = inputs_of_lane(w->kind);
  if (w->kind < 0 || w->kind > 2 || w->rows < 0 || w->inputs < 0 || w->block < 1 || w->block > 65536) return RAREFY_BAD;
  if (w->cols != (w->inputs + each - 1) / each) return RAREFY_BAD;
  const int64_t blocks = (w->cols + w->block - 1) / w->block;
  int64_t column = 0, value = 0;
  for (int64_t at = 0; at < (w->rows + 3) / 4 * blocks; ++at) {
    if (w->starts[2 * at] != column || w->starts[2 * at + 1] != value || w->counts[16 * at]) return RAREFY_BAD;
    const int64_t wide = std::min(w->block, w->cols - at % blocks * w->block);
    for (int p = 1; p < 16; ++p) {
      const int64_t n = w->counts[16 * at + p];
      if (column + n > columns) return RAREFY_BAD;
      for (int64_t i = 0; i < n; ++i)
        if (w->columns[column + i] >= wide) return RAREFY_BAD;
      column += n;
      value += n * __builtin_popcount(uint32_t(p));
    }
  }
  return column == columns && value == values ? RAREFY_OK : RAREFY_BAD;
}

API int rarefy_check_sell(const rarefy_sell* w, int64_t values) {
  const int64_t each = inputs_of_lane(w->kind);
  if (w->kind < 0 || w->kind > 2 || w->rows < 0 || w->inputs < 0 || w->block < 1 || w->block > 65535) return RAREFY_BAD;
  if (w->cols != (w->inputs + each - 1) / each) return RAREFY_BAD;
  const int64_t blocks = (w->cols + w->block - 1) / w->block;
  int64_t value = 0;
  for (int64_t at = 0; at < (w->rows + SLAB - 1) / SLAB * blocks; ++at) {
    if (w->starts[at] != value) return RAREFY_BAD;
    const int64_t lanes = std::min(w->block, w->cols - at % blocks * w->block);
    const int64_t rows = std::min(SLAB, w->rows - at / blocks * SLAB), pairs = (rows + 1) / 2;
    bool known[SLAB] = {};
    for (int64_t p = 0; p < SLAB / 2; ++p) {
      const int64_t n = w->counts[at * (SLAB / 2) + p];
      if (value + n > values || (p >= pairs && n)) return RAREFY_BAD;
      for (int64_t i = 2 * value; i < 2 * (value + n); ++i)
        if (w->columns[i] >= lanes) return RAREFY_BAD;
      value += n;
      for (int64_t r = 0; r < 2 && p < pairs; ++r) {
        const uint8_t row = w->order[at * SLAB + 2 * p + r];
        if (row >= 2 * pairs || known[row]) return RAREFY_BAD;  // each once: a row more than there are lies past the last
        known[row] = true;
      }
    }
  }
  return value == values ? RAREFY_OK : RAREFY_BAD;
}
