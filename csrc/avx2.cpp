#include "generic.hpp"
//
#include "kernels.hpp"

extern const rarefy_table rarefy_avx2 = RAREFY_TABLE("avx2");
