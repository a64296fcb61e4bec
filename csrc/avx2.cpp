// Kernels compiled for AVX2.
#include "all_kernels.hpp"

extern const rarefy_kernel_table rarefy_avx2 = all_kernels("avx2");
