#include "simd256.hpp"
//
#include "spmm.hpp"

extern const rarefy_table rarefy_avx2 = RAREFY_TABLE("avx2");
