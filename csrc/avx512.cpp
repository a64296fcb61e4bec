// Kernels compiled for AVX-512.
#define RAREFY_SIMD512
#include "all_kernels.hpp"

extern const rarefy_kernel_table rarefy_avx512 = all_kernels("avx512");
