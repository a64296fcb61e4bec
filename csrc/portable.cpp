// The kernels for any CPU.
#include "all_kernels.hpp"

extern const rarefy_table rarefy_portable = all_kernels("portable");
