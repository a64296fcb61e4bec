// Fitting of scales compiled for AVX2.
#include "scale_fitting.hpp"

int rarefy_fit_blocks_avx2(const rarefy_scale_fit& f, int64_t first, int64_t end);

int rarefy_fit_blocks_avx2(const rarefy_scale_fit& f, int64_t first, int64_t end) { return fit_blocks(f, first, end); }
