// Sparse convolution of NCHW tensors without im2col. 64 consecutive outputs, across images, form a column tile: for
// each, the inputs of a block of lanes are gathered out of padded planes (conv_indirection.hpp) into the L1 cache,
// where the kernels run on them as on packed inputs.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "conv_indirection.hpp"
#include "kernel_table.h"
#include "parallel.h"
#include "rarefy.h"

namespace {

constexpr int64_t MAX_CHUNK = 64;           // row tiles of a part
constexpr int64_t MIN_PARTS = 4;            // fewer than that: parts become smaller
constexpr int64_t ROUND_FLOATS = 1 << 20;   // padded images of one round, small enough for the caches
constexpr int64_t STREAM_FLOATS = 2 << 20;  // larger outputs are written past the caches

// A convolution of n images, in rounds of images; each round pads its images, then computes their outputs.
struct ConvRun {
  ConvRun(const rarefy_conv& conv, const float* input, int64_t height, int64_t width, const float* added, float* output,
          int64_t images)
      : w(conv),
        x(input),
        residual(added),
        y(output),
        n(images),
        t(rarefy_active_kernels()),
        geometry(w, height, width) {
    lanes = w.weight.lanes;
    block = w.weight.block;
    inputs = w.inputs * w.groups;
    outputs = w.outputs * w.groups;
    image_floats = inputs * geometry.channel_floats;
    pixels = geometry.out_height * geometry.out_width;
    row_tiles = (w.outputs + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t column_tiles = (n * pixels + TILE_COLS - 1) / TILE_COLS;
    const int64_t min_chunk = w.sell ? SLAB_ROWS / TILE_ROWS : 8;
    chunk = w.sell ? MAX_CHUNK : std::min(MAX_CHUNK, row_tiles);
    while (chunk > min_chunk && column_tiles * w.groups * ((row_tiles + chunk - 1) / chunk) < MIN_PARTS) chunk /= 2;
    round = geometry.direct ? n : std::max<int64_t>(1, std::min(n, ROUND_FLOATS / std::max<int64_t>(1, image_floats)));
    parallel = w.weight.rows * lanes / 8 * pixels * n > MIN_PARALLEL_WORK;
    stream = n * outputs * pixels > STREAM_FLOATS;
  }

  void pad_images(int64_t from, int64_t images, float* planes) const {
    for_each_part(geometry.direct ? 0 : images * inputs, parallel, [&](int64_t i) {
      for (int64_t p = 0; p < geometry.num_planes; ++p)
        geometry.copy_phase(t, x + (from * inputs + i) * geometry.height * geometry.width, geometry.phases[p],
                            planes + i * geometry.channel_floats + p * geometry.plane_floats);
    });
  }

  // Some row tiles of one group for one column tile of a round. `end`: of the readable memory of the planes.
  bool run_part(int64_t part, int64_t from, int64_t images, const float* planes, const float* end,
                const int32_t* offsets) const {
    const int64_t chunks = (row_tiles + chunk - 1) / chunk, begin = part % chunks * chunk;
    const int64_t group = part / chunks % w.groups, column = part / chunks / w.groups * TILE_COLS;
    const int64_t columns = std::min(TILE_COLS, images * pixels - column);
    const int64_t end_tile = std::min(row_tiles, begin + chunk);
    const ScratchBuffer<1> scratch(size_t(block + 1 + chunk * TILE_ROWS) * TILE_COLS * 4);
    uint32_t* gathered = static_cast<uint32_t*>(scratch.data);
    if (!gathered) return false;
    uint32_t* acc = gathered + (block + 1) * TILE_COLS;  // gather_lanes writes into one more row
    rarefy_segment segments[TILE_COLS];
    const int count = geometry.output_segments(column, columns, image_floats, segments);
    for (int64_t b = 0, l = 0; l < lanes; ++b, l += block) {
      t.gather_lanes(planes + group * w.inputs * geometry.channel_floats, end, offsets + l, std::min(block, lanes - l),
                     segments, count, gathered);
      if (w.sell)
        t.sell_spmm_block[0](*w.sell, b, begin * TILE_ROWS / SLAB_ROWS,
                             (end_tile * TILE_ROWS + SLAB_ROWS - 1) / SLAB_ROWS, gathered, acc, columns, nullptr);
      else
        t.tiles_spmm_block[0](w.weight, b, group * row_tiles + begin, group * row_tiles + end_tile, gathered, acc,
                              columns);
    }
    const int64_t row = group * w.outputs + begin * TILE_ROWS;
    const int64_t rows = std::min(end_tile * TILE_ROWS, w.outputs) - begin * TILE_ROWS;
    const float* bias = w.weight.bias ? w.weight.bias + row : nullptr;
    for (int64_t done = 0, run; done < columns; done += run) {  // one image at a time
      const int64_t image = (column + done) / pixels, pixel = (column + done) % pixels;
      run = std::min(columns - done, pixels - pixel);
      const int64_t offset = ((from + image) * outputs + row) * pixels + pixel;
      t.f32_epilogue(reinterpret_cast<const float*>(acc) + done, rows, run, bias,
                     residual ? residual + offset : nullptr, w.weight.act, y + offset, pixels, stream);
    }
    return true;
  }

  int run() const {
    const int64_t chunks = (row_tiles + chunk - 1) / chunk, offsets_size = (lanes + 63) / 64 * 64;
    std::atomic<bool> no_memory{false};
    const int64_t planes_floats = geometry.direct ? 0 : round * image_floats + SEGMENT_FLOATS;
    const ScratchBuffer<0> scratch(size_t(offsets_size + planes_floats) * 4);
    int32_t* offsets = static_cast<int32_t*>(scratch.data);
    if (!offsets) return RAREFY_NO_MEMORY;
    geometry.lane_offsets(offsets);
    float* padded = reinterpret_cast<float*>(offsets + offsets_size);
    if (stream) advise_huge_pages(y, size_t(n * outputs * pixels) * 4);
    for (int64_t from = 0; from < n; from += round) {
      const int64_t images = std::min(round, n - from), column_tiles = (images * pixels + TILE_COLS - 1) / TILE_COLS;
      const float* planes = geometry.direct ? x : padded;
      const float* end = geometry.direct ? x + n * image_floats : padded + planes_floats;
      pad_images(from, images, padded);
      for_each_part(column_tiles * w.groups * chunks, parallel, [&](int64_t part) {
        if (!run_part(part, from, images, planes, end, offsets)) no_memory.store(true);
      });
    }
    return no_memory ? RAREFY_NO_MEMORY : RAREFY_OK;
  }

  const rarefy_conv& w;
  const float *x, *residual;
  float* y;
  int64_t n;
  const rarefy_kernel_table& t;
  ConvGeometry geometry;
  int64_t lanes, block, inputs, outputs, image_floats;
  int64_t pixels;     // outputs of an image and channel
  int64_t row_tiles;  // of a group
  int64_t chunk;      // row tiles of a part
  int64_t round;      // images of a round
  bool parallel, stream;
};

}  // namespace

API int rarefy_run_conv(const rarefy_conv* w, const float* x, int64_t height, int64_t width, const float* residual,
                        float* y, int64_t n) {
  if (w->weight.dtype != RAREFY_F32 || w->dense) return RAREFY_INVALID;
  return ConvRun(*w, x, height, width, residual, y, n).run();
}

API int64_t rarefy_padded_image_floats(const rarefy_conv* w, int64_t height, int64_t width) {
  return w->inputs * ConvGeometry(*w, height, width).channel_floats;
}

API void rarefy_indirection_offsets(const rarefy_conv* w, int64_t height, int64_t width, int32_t* out) {
  ConvGeometry(*w, height, width).lane_offsets(out);
}
