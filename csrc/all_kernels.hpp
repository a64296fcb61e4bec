// All kernels of one instruction set, as the table that the rest of the library calls.
#pragma once
#include "decode_ops.hpp"
#include "epilogue.hpp"
#include "input_packing.hpp"
#include "kernel_table.h"
#include "quantized_gemv.hpp"
#include "spmm.hpp"
#include "spmm_sell.hpp"
#include "tile_ops.hpp"
#include "weight_decompress.hpp"
#include "winograd.hpp"

namespace {

constexpr rarefy_table all_kernels(const char* name) {
  return {name,
   __builtin_bit_cast(float, NO_BYTES),
   {bit_any<RAREFY_F32>, bit_any<RAREFY_BF16>, bit_any<RAREFY_I8>, bit_any<RAREFY_I4>},
   {panels_any<false, false>, panels_any<false, true>, panels_any<true, false>, panels_any<true, true>},
   settle_panels,
   {csr_any<1>, csr_any<4>, csr_any<8>, csr_any<16>},
   settle_rows<RAREFY_F32, rarefy_csr>,
   {tiles_any<RAREFY_F32>, tiles_any<RAREFY_BF16>, tiles_any<RAREFY_I8>},
   {sell_any<RAREFY_F32>, sell_any<RAREFY_BF16>, sell_any<RAREFY_I8>},
   bring,
   {tiles_block<RAREFY_F32>, tiles_block<RAREFY_I8>},
   {sell_one<RAREFY_F32>, sell_one<RAREFY_I8>},
   put,
   halve,
   largest,
   {pack<RAREFY_F32>, pack<RAREFY_BF16>, pack<RAREFY_I8>},
   {convert<RAREFY_F32>, convert<RAREFY_BF16>, convert<RAREFY_I8>, convert<RAREFY_I8>},
   {settle_rows<RAREFY_F32, rarefy_bitmask>, settle_rows<RAREFY_BF16, rarefy_bitmask>,
   settle_rows<RAREFY_I8, rarefy_bitmask>, settle_rows<RAREFY_I4, rarefy_bitmask>},
   {finish<RAREFY_F32>, finish<RAREFY_BF16>, finish<RAREFY_I8>},
   norm,
   unpack,
   pair,
   ranges,
   to_bytes_tile,
   settle_bytes,
   attend,
   gathered,
   norm_row,
   {rotate_tile, rotate_row},
   attend_row,
   {unfold_bits<RAREFY_F32>, unfold_bits<RAREFY_BF16>, unfold_bits<RAREFY_I8>, unfold_bits<RAREFY_I4>},
   unfold_panels,
   {dense_any<RAREFY_F32>, dense_any<RAREFY_I8>},
   squares_in,
   squares_out};
}

}  // namespace
