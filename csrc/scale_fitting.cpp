// Fitting of scales for any CPU, and its C interface.
#include "scale_fitting.hpp"

#include <atomic>

constexpr int64_t WEIGHTS_PER_PART = 16384;  // blocks of a part have about as many

#if defined(RAREFY_X86)
int rarefy_fit_blocks_avx2(const rarefy_scale_fit& f, int64_t first, int64_t end);
#else
constexpr auto rarefy_fit_blocks_avx2 = fit_blocks;
#endif

API int rarefy_fit_scales(const rarefy_scale_fit* f) {
  if (f->blocks < 0 || f->size < 1 || f->count < 0 || f->max_code < 1 || f->min_code > 0) return RAREFY_INVALID;
  if (f->symmetric && f->min_code == 0) return RAREFY_INVALID;
  const bool avx2 = std::strcmp(rarefy_active_kernels().name, "portable") != 0;
  const int64_t each = std::max<int64_t>(1, WEIGHTS_PER_PART / f->size / LANES) * LANES;
  const int64_t parts = (f->blocks + each - 1) / each;
  std::atomic<int> error = RAREFY_OK;
  for_each_part(parts, parts > 1, [&](int64_t part) {
    if (const int code =
            (avx2 ? rarefy_fit_blocks_avx2 : fit_blocks)(*f, part * each, std::min(f->blocks, (part + 1) * each)))
      error = code;
  });
  return error;
}
