// The active instruction set, and the multiplication of row-major inputs by one or more weights of each format.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"

extern const rarefy_kernel_table rarefy_portable;
#if defined(RAREFY_X86)
extern const rarefy_kernel_table rarefy_avx2, rarefy_avx512;
bool rarefy_has_amx();
void rarefy_set_amx_kernels(rarefy_kernel_table&);
#endif

namespace {

constexpr int64_t TILES_PER_PART = 32;  // row tiles of a part
constexpr int64_t ROWS_PER_PART = 32;   // rows of a part, where inputs are few

std::atomic<const rarefy_kernel_table*> active_table{nullptr};

#if defined(RAREFY_X86)
// The kernels for AVX-512. Intel's cores multiply bf16 without AMX at half the rate of fp32; Zen 4 and later do so at
// twice the rate.
const rarefy_kernel_table* avx512_table() {
  static const rarefy_kernel_table table = [] {
    rarefy_kernel_table t = rarefy_avx512;
    t.multiplies_bf16 = !__builtin_cpu_is("intel");
    return t;
  }();
  return &table;
}

// The kernels for AVX-512, those of AMX in place of some; null where there is no AMX.
const rarefy_kernel_table* amx_table() {
  static const bool found = rarefy_has_amx();
  static const rarefy_kernel_table table = [] {
    rarefy_kernel_table t = rarefy_avx512;
    rarefy_set_amx_kernels(t);
    return t;
  }();
  return found ? &table : nullptr;
}
#endif

// The table of an instruction set that this CPU has; without a name that of the best one.
const rarefy_kernel_table* find_table(const char* name) {
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
  if (avx512 && (!name || !std::strcmp(name, "amx")))
    if (const rarefy_kernel_table* t = amx_table()) return t;
  if (avx512 && (!name || !std::strcmp(name, "avx512"))) return avx512_table();
  if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &rarefy_avx2;
#endif
  return !name || !std::strcmp(name, "portable") ? &rarefy_portable : nullptr;
}

}  // namespace

float rarefy_input_scale(const rarefy_kernel_table& t, const float* x, int64_t n) {
  const uint32_t bits = t.absmax_bits(x, n);
  if (bits >= 0x7f800000u) return std::nanf("");  // NaN or inf: all outputs of this row are NaN
  const float scale = __builtin_bit_cast(float, bits) / 127.0f;
  return std::max(scale, MIN_INPUT_SCALE);
}

rarefy_parallel_for_fn rarefy_parallel_for = nullptr;
int (*rarefy_get_num_threads)(uint32_t*) = nullptr;

const rarefy_kernel_table& rarefy_active_kernels() {
  const rarefy_kernel_table* t = active_table.load(std::memory_order_acquire);
  if (!t) active_table.store(t = find_table(nullptr), std::memory_order_release);
  return *t;
}

API int32_t rarefy_abi_version(void) { return RAREFY_ABI_VERSION; }

API int rarefy_scales_blocks(int rows) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  return rows ? t.convert_row_blocks != nullptr : t.quantize_blocks != nullptr;
}
API int rarefy_multiplies_bf16(void) { return rarefy_active_kernels().multiplies_bf16; }

API const char* rarefy_isa(void) { return rarefy_active_kernels().name; }

API int rarefy_set_isa(const char* name) {
  const rarefy_kernel_table* t = find_table(name);
  if (t) active_table.store(t, std::memory_order_release);
  return t ? RAREFY_OK : RAREFY_INVALID;
}

API void rarefy_set_parallel_for(rarefy_parallel_for_fn run, int (*get_num_threads)(uint32_t*)) {
  rarefy_parallel_for = run;
  rarefy_get_num_threads = get_num_threads;
}

namespace {

// One of the weights of a grouped call.
template <class T>
struct Job {
  const T* w;
  const float* residual;
  float* y;
  int64_t ldy;
};

// The rows of all jobs in parts of `size` rows.
template <class T>
struct JobParts {
  JobParts(const Job<T>* jobs, int64_t count, int64_t size) : jobs(jobs), size(size) {
    for (int64_t j = 0; j < count; ++j) total += parts_of(j);
  }
  int64_t parts_of(int64_t j) const { return (jobs[j].w->rows + size - 1) / size; }
  // The job of a part; `part` becomes its index within that job.
  const Job<T>& find(int64_t& part) const {
    int64_t j = 0;
    for (; part >= parts_of(j); ++j) part -= parts_of(j);
    return jobs[j];
  }
  const Job<T>* jobs;
  int64_t size, total = 0;
};

template <class T>
int64_t total_rows(const Job<T>* jobs, int64_t count) {
  int64_t rows = 0;
  for (int64_t j = 0; j < count; ++j) rows += jobs[j].w->rows;
  return rows;
}

constexpr int64_t rows_per_part(const rarefy_tiles*) { return TILES_PER_PART * TILE_ROWS; }
constexpr int64_t rows_per_part(const rarefy_sell*) { return SLAB_ROWS; }

void multiply_part(const rarefy_kernel_table& t, const rarefy_tiles& w, int64_t part, const uint32_t* x, uint32_t* acc,
                   int64_t columns) {
  const int64_t end = std::min((w.rows + TILE_ROWS - 1) / TILE_ROWS, (part + 1) * TILES_PER_PART);
  t.tiles_spmm[w.dtype](w, part * TILES_PER_PART, end, x, acc, columns);
}

void multiply_part(const rarefy_kernel_table& t, const rarefy_sell& w, int64_t part, const uint32_t* x, uint32_t* acc,
                   int64_t columns) {
  t.sell_spmm[w.dtype](w, part, x, acc, columns, nullptr);
}

// Row tiles and SELL: inputs are packed into column tiles first.
template <class T>
int run_on_column_tiles(const Job<T>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  const T* first = jobs->w;
  const int32_t dtype = first->dtype;
  if (dtype > RAREFY_I8) return RAREFY_INVALID;  // programs alone have the others
  const bool int8 = dtype == RAREFY_I8;
  const int64_t tiles = (n + TILE_COLS - 1) / TILE_COLS, inputs = first->inputs, lanes = first->lanes;
  const ScratchBuffer<0> scratch(size_t(tiles * lanes * TILE_COLS) * 4 + size_t(tiles * TILE_COLS) * 8);
  uint32_t* packed = static_cast<uint32_t*>(scratch.data);
  if (!packed) return RAREFY_NO_MEMORY;
  float* scales = reinterpret_cast<float*>(packed + tiles * lanes * TILE_COLS);
  float* inverse = scales + tiles * TILE_COLS;
  const bool parallel = lanes * total_rows(jobs, count) / 8 * n > MIN_PARALLEL_WORK;
  for_each_part(tiles, parallel, [&](int64_t tile) {
    const int64_t columns = std::min(TILE_COLS, n - tile * TILE_COLS);
    if (int8)
      for (int64_t i = 0; i < TILE_COLS; ++i) {
        const float scale = i < columns ? rarefy_input_scale(t, x + (tile * TILE_COLS + i) * ldx, inputs) : 1.0f;
        scales[tile * TILE_COLS + i] = scale;
        inverse[tile * TILE_COLS + i] = 1.0f / scale;
      }
    t.pack_inputs[dtype](x + tile * TILE_COLS * ldx, ldx, columns, inputs, int8 ? inverse + tile * TILE_COLS : nullptr,
                         packed + tile * lanes * TILE_COLS);
  });
  constexpr int64_t SIZE = rows_per_part(static_cast<const T*>(nullptr));
  const JobParts<T> parts(jobs, count, SIZE);
  for_each_part(parts.total * tiles, parallel, [&](int64_t i) {
    const int64_t tile = i / parts.total, columns = std::min(TILE_COLS, n - tile * TILE_COLS);
    int64_t part = i % parts.total;
    const Job<T>& job = parts.find(part);
    const int64_t row = part * SIZE;
    alignas(64) uint32_t acc[SIZE * TILE_COLS];
    multiply_part(t, *job.w, part, packed + tile * lanes * TILE_COLS, acc, columns);
    const rarefy_weight_epilogue epilogue{job.w->scales, job.w->row_sums, job.w->bias, job.w->act};
    t.transposed_epilogue[dtype](epilogue, row, std::min(SIZE, job.w->rows - row), acc, scales + tile * TILE_COLS,
                                 columns, job.residual ? job.residual + tile * TILE_COLS * job.ldy : nullptr,
                                 job.y + tile * TILE_COLS * job.ldy, job.ldy);
  });
  return RAREFY_OK;
}

int run_jobs(const Job<rarefy_tiles>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  return run_on_column_tiles(jobs, count, x, ldx, n);
}

int run_jobs(const Job<rarefy_sell>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  return run_on_column_tiles(jobs, count, x, ldx, n);
}

int run_jobs(const Job<rarefy_bitmask>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  const rarefy_bitmask* first = jobs->w;
  const int32_t dtype = first->dtype;
  const int64_t padded = first->col_blocks * 64, bytes = 4 / inputs_per_lane(dtype);
  const ScratchBuffer<0> scratch(size_t(n * padded * bytes + n * 4));
  char* in = static_cast<char*>(scratch.data);
  if (!in) return RAREFY_NO_MEMORY;
  float* scales = reinterpret_cast<float*>(in + n * padded * bytes);
  for (int64_t i = 0; i < n; ++i) {
    scales[i] = dtype >= RAREFY_I8 ? rarefy_input_scale(t, x + i * ldx, first->cols) : 1.0f;
    t.convert_row[dtype](x + i * ldx, first->cols, padded, 1.0f / scales[i], in + i * padded * bytes);
  }
  const JobParts<rarefy_bitmask> parts(jobs, count, ROWS_PER_PART);
  for_each_part(parts.total, total_rows(jobs, count) * first->cols / 8 * n > MIN_PARALLEL_WORK, [&](int64_t part) {
    const Job<rarefy_bitmask>& job = parts.find(part);
    const int64_t from = part * ROWS_PER_PART, to = std::min(job.w->rows, from + ROWS_PER_PART);
    t.bitmask_gemv[dtype](*job.w, from, to, in, padded, job.y, job.ldy, n);
    t.bitmask_epilogue[dtype](*job.w, from, to, scales, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

int run_jobs(const Job<rarefy_quantized>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  const rarefy_quantized* first = jobs->w;
  const bool fp32_inputs = first->fp32_inputs;
  const bool two_terms = first->two_terms;
  const int64_t padded = first->col_blocks * 64, bytes = fp32_inputs ? 4 : two_terms ? 2 : 1;
  const ScratchBuffer<0> scratch(size_t(n * padded * bytes + n * 4));
  char* in = static_cast<char*>(scratch.data);
  if (!in) return RAREFY_NO_MEMORY;
  float* scales = reinterpret_cast<float*>(in + n * padded * bytes);
  const auto convert_row = two_terms ? t.convert_row_two_terms : t.convert_row[fp32_inputs ? RAREFY_F32 : RAREFY_I8];
  const bool blocks = has_block_inputs(*first) && t.convert_row_blocks;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = x + i * ldx;
    char* converted = in + i * padded * bytes;
    if (blocks) {
      t.convert_row_blocks(row, first->cols, padded, converted);
      continue;
    }
    scales[i] = fp32_inputs ? 1.0f : rarefy_input_scale(t, row, first->cols);
    convert_row(row, first->cols, padded, 1.0f / scales[i], converted);
  }
  const auto gemv = t.quantized_gemv[quantized_variant(*first)];
  const int64_t row_entries = two_terms ? 2 * padded : padded;
  const JobParts<rarefy_quantized> parts(jobs, count, ROWS_PER_PART);
  for_each_part(parts.total, total_rows(jobs, count) * first->cols / 8 * n > MIN_PARALLEL_WORK, [&](int64_t part) {
    const Job<rarefy_quantized>& job = parts.find(part);
    const int64_t from = part * ROWS_PER_PART, to = std::min(job.w->rows, from + ROWS_PER_PART);
    gemv(*job.w, from, to, in, row_entries, job.y, job.ldy, n);
    t.quantized_epilogue(*job.w, from, to, fp32_inputs ? nullptr : scales, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

int run_jobs(const Job<rarefy_csr>* jobs, int64_t count, const float* x, int64_t ldx, int64_t n) {
  const rarefy_kernel_table& t = rarefy_active_kernels();
  const int variant = n > 8 ? 3 : n > 4 ? 2 : n > 1;  // 1, 4, 8 or 16 interleaved inputs
  const int64_t width = variant ? 2 << variant : 1, groups = (n + width - 1) / width, stride = jobs->w->inputs * width;
  const ScratchBuffer<0> scratch(size_t(variant ? groups * stride : 0) * 4);
  float* interleaved = static_cast<float*>(scratch.data);
  if (variant && !interleaved) return RAREFY_NO_MEMORY;
  for (int64_t i = 0; variant && i < groups * width; ++i) {
    float* out = interleaved + i / width * stride + i % width;
    for (int64_t c = 0; c < jobs->w->inputs; ++c) out[c * width] = i < n ? x[i * ldx + c] : 0.0f;
  }
  int64_t values = 0;
  for (int64_t j = 0; j < count; ++j) values += jobs[j].w->starts[jobs[j].w->rows];
  const JobParts<rarefy_csr> parts(jobs, count, ROWS_PER_PART);
  for_each_part(parts.total, values * n > MIN_PARALLEL_WORK, [&](int64_t part) {
    const Job<rarefy_csr>& job = parts.find(part);
    const int64_t from = part * ROWS_PER_PART, to = std::min(job.w->rows, from + ROWS_PER_PART);
    for (int64_t g = 0; g < groups; ++g)
      t.csr_spmm[variant](*job.w, from, to, variant ? interleaved + g * stride : x, job.y + g * width * job.ldy,
                          job.ldy, std::min(width, n - g * width));
    t.csr_epilogue(*job.w, from, to, nullptr, job.residual, job.y, job.ldy, n);
  });
  return RAREFY_OK;
}

template <class T>
int run_one(const T* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy, int64_t n) {
  const Job<T> job{w, residual, y, ldy};
  return run_jobs(&job, 1, x, ldx, n);
}

template <class T>
int run_group(const void* const* w, int64_t count, const float* x, int64_t ldx, float* const* y, int64_t n) {
  Job<T> jobs[RAREFY_MAX_GROUPED];
  for (int64_t j = 0; j < count; ++j) {
    const T* weight = static_cast<const T*>(w[j]);
    jobs[j] = {weight, nullptr, y[j], weight->rows};
  }
  return run_jobs(jobs, count, x, ldx, n);
}

}  // namespace

API int rarefy_run_tiles(const rarefy_tiles* w, const float* x, int64_t ldx, const float* residual, float* y,
                         int64_t ldy, int64_t n) {
  return run_one(w, x, ldx, residual, y, ldy, n);
}

API int rarefy_run_sell(const rarefy_sell* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                        int64_t n) {
  return run_one(w, x, ldx, residual, y, ldy, n);
}

API int rarefy_run_bitmask(const rarefy_bitmask* w, const float* x, int64_t ldx, const float* residual, float* y,
                           int64_t ldy, int64_t n) {
  return run_one(w, x, ldx, residual, y, ldy, n);
}

API int rarefy_run_csr(const rarefy_csr* w, const float* x, int64_t ldx, const float* residual, float* y, int64_t ldy,
                       int64_t n) {
  return run_one(w, x, ldx, residual, y, ldy, n);
}

API int rarefy_run_quantized(const rarefy_quantized* w, const float* x, int64_t ldx, const float* residual, float* y,
                             int64_t ldy, int64_t n) {
  return run_one(w, x, ldx, residual, y, ldy, n);
}

API int rarefy_run_grouped(int32_t format, const void* const* w, int64_t count, const float* x, int64_t ldx,
                           float* const* y, int64_t n) {
  if (count < 1 || count > RAREFY_MAX_GROUPED) return RAREFY_INVALID;
  switch (format) {
    case RAREFY_BITMASK: return run_group<rarefy_bitmask>(w, count, x, ldx, y, n);
    case RAREFY_CSR: return run_group<rarefy_csr>(w, count, x, ldx, y, n);
    case RAREFY_TILES: return run_group<rarefy_tiles>(w, count, x, ldx, y, n);
    case RAREFY_SELL: return run_group<rarefy_sell>(w, count, x, ldx, y, n);
    case RAREFY_QUANTIZED: return run_group<rarefy_quantized>(w, count, x, ldx, y, n);
    default: return RAREFY_INVALID;
  }
}

namespace {
// One row, a run of columns with one scale at a time.
void dequantize_row(const rarefy_quantized& w, int64_t row, float* out) {
  const int64_t bytes = cell_bytes(w.dtype), groups = w.scale_groups, group_size = groups > 1 ? 32 : 64;
  const float row_scale = w.row_scales ? w.row_scales[row] : 1.0f;
  for (int64_t c = 0; c < w.cols; c += group_size) {
    const int64_t cell = (row / TILE_ROWS * w.col_blocks + c / 64) * TILE_ROWS + row % TILE_ROWS;
    const int64_t column = c % 64, group = cell * groups + column / group_size;
    const float scale = groups ? row_scale * from_bf16(w.scales[group]) : row_scale;
    const int64_t n = std::min(group_size, w.cols - c);
    const uint8_t* panel = static_cast<const uint8_t*>(w.values) + (cell - row % TILE_ROWS) * bytes;
    if (w.dtype != RAREFY_I8) {
      const int bits = value_bits(w.dtype), zero_point = w.zeros ? w.zeros[group] : 1 << (bits - 1);
      for (int64_t i = column; i < column + n; ++i) {
        const int code = panel_code(panel, bits, row % TILE_ROWS, i);
        out[c - column + i] = float((code << w.zero_bits) - zero_point) * scale;
      }
    } else {
      const int8_t* codes = reinterpret_cast<const int8_t*>(panel) + row % TILE_ROWS * bytes + column;
      for (int64_t i = 0; i < n; ++i) out[c + i] = float(codes[i]) * scale;
    }
  }
}
}  // namespace

API int rarefy_dequantize_rows(const rarefy_quantized* w, const int64_t* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= w->rows) return RAREFY_INVALID;
  for (int64_t i = 0; i < n; ++i) dequantize_row(*w, rows[i], out + i * w->cols);
  return RAREFY_OK;
}
