// Kernels compiled for any CPU.
#include "all_kernels.hpp"

extern const rarefy_kernel_table rarefy_portable = all_kernels("portable");
