#include "generic.hpp"
//
#include "kernels.hpp"

extern const rarefy_table rarefy_portable = RAREFY_TABLE("portable");
