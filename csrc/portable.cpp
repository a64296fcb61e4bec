#include "simd256.hpp"
//
#include "spmm.hpp"

extern const rarefy_table rarefy_portable = RAREFY_TABLE("portable");
