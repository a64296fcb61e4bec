// The kernel table of the instruction set that this translation unit is compiled for.
#pragma once
#include "ceilings.hpp"
#include "decode_ops.hpp"
#include "dense_gemm.hpp"
#include "dense_gemv.hpp"
#include "epilogue.hpp"
#include "input_packing.hpp"
#include "int8_attention.hpp"
#include "kernel_table.h"
#include "kv_codes.hpp"
#include "lane_attention.hpp"
#include "nhwc_f32.hpp"
#include "nhwc_int16.hpp"
#include "nhwc_kernels.hpp"
#include "quantized_gemv.hpp"
#include "spmm.hpp"
#include "spmm_sell.hpp"
#include "tile_attention.hpp"
#include "tile_ops.hpp"
#include "weight_decompress.hpp"
#include "winograd.hpp"
#if defined(RAREFY_SIMD512)
#include "blocked_inputs.hpp"
#include "narrow_inputs.hpp"
#endif

namespace {

// What decompresses weights for joined terms, where there are such.
template <int32_t DTYPE = RAREFY_I16>
constexpr decltype(rarefy_kernel_table::decompress_joined) decompress_joined() {
  if constexpr (JOINED_TERMS) return decompress_quantized<DTYPE>;
  return nullptr;
}

// Inputs with a scale for each 32, where there are kernels for them.
struct BlockedKernels {
  decltype(rarefy_kernel_table::convert_row_blocks) convert_row;
  decltype(rarefy_kernel_table::pack_block_rows) pack_rows;
  decltype(rarefy_kernel_table::quantize_blocks) quantize;
  decltype(rarefy_kernel_table::decompress_offset) decompress;
  decltype(rarefy_kernel_table::multiply_blocked) multiply;
  decltype(rarefy_kernel_table::decompress_cells) decompress_cells;
  decltype(rarefy_kernel_table::multiply_narrow) multiply_narrow;
};
#if defined(RAREFY_SIMD512)
constexpr BlockedKernels BLOCKED{
    convert_row_blocks, pack_block_rows,  quantize_blocks, decompress_quantized<RAREFY_I8, true>,
    multiply_blocked,   decompress_cells, multiply_narrow};
#else
constexpr BlockedKernels BLOCKED{};
#endif

constexpr rarefy_kernel_table all_kernels(const char* name) {
  return {
      .name = name,
      .multiplies_bf16 = SIMD_WIDTH == 16,
      .packed_zeros = __builtin_bit_cast(float, PACKED_ZEROS),
      .pack_inputs = {pack_inputs<RAREFY_F32>, pack_inputs<RAREFY_BF16>, pack_inputs<RAREFY_I8>},
      .convert_row = {convert_row<RAREFY_F32>, convert_row<RAREFY_BF16>, convert_row<RAREFY_I8>,
                      convert_row<RAREFY_I8>},
      .convert_row_two_terms = convert_row_two_terms<JOINED_TERMS>,
      .convert_row_blocks = BLOCKED.convert_row,
      .pack_block_rows = BLOCKED.pack_rows,
      .absmax_bits = absmax_bits,
      .take_even = take_even,
      .gather_lanes = gather_lanes,
      .bitmask_gemv = {bitmask_gemv<RAREFY_F32>, bitmask_gemv<RAREFY_BF16>, bitmask_gemv<RAREFY_I8>,
                       bitmask_gemv<RAREFY_I4>},
      .bitmask_epilogue = {rows_epilogue<RAREFY_F32, rarefy_bitmask>, rows_epilogue<RAREFY_BF16, rarefy_bitmask>,
                           rows_epilogue<RAREFY_I8, rarefy_bitmask>, rows_epilogue<RAREFY_I4, rarefy_bitmask>},
      .quantized_gemv = {quantized_gemv<8, INT8_INPUTS>, quantized_gemv<8, FP32_INPUTS>, quantized_gemv<8, TWO_TERMS>,
                         quantized_gemv<4, INT8_INPUTS>, quantized_gemv<4, FP32_INPUTS>, quantized_gemv<4, TWO_TERMS>,
                         quantized_gemv<5, INT8_INPUTS>, quantized_gemv<5, FP32_INPUTS>, quantized_gemv<5, TWO_TERMS>,
                         quantized_gemv<6, INT8_INPUTS>, quantized_gemv<6, FP32_INPUTS>, quantized_gemv<6, TWO_TERMS>},
      .quantized_epilogue = quantized_epilogue,
      .csr_spmm = {csr_spmm<1>, csr_spmm<4>, csr_spmm<8>, csr_spmm<16>},
      .csr_epilogue = rows_epilogue<RAREFY_F32, rarefy_csr>,
      .tiles_spmm = {tiles_spmm<RAREFY_F32>, tiles_spmm<RAREFY_BF16>, tiles_spmm<RAREFY_I8>, tiles_spmm<RAREFY_I16>},
      .tiles_spmm_block = {tiles_spmm_block<RAREFY_F32>, tiles_spmm_block<RAREFY_I8>},
      .sell_spmm = {sell_spmm<RAREFY_F32>, sell_spmm<RAREFY_BF16>, sell_spmm<RAREFY_I8>, sell_spmm<RAREFY_I16>},
      .sell_spmm_block = {sell_spmm_block<RAREFY_F32>, sell_spmm_block<RAREFY_I8>},
      .repeat_column = repeat_column,
      .dense_gemv = dense_gemv,
      .dense_gemm = dense_gemm,
      .begin_dense = begin_dense,
      .end_dense = end_dense,
      .dense_lanes = {nullptr, dense_lanes<RAREFY_BF16>, dense_lanes<RAREFY_I8>, dense_lanes<RAREFY_I16>},
      .add_sums = add_sums,
      .lanes_gemv = {nullptr, lanes_gemv<RAREFY_BF16>, lanes_gemv<RAREFY_I8>, lanes_gemv<RAREFY_I16>},
      .store_outputs = {store_outputs<RAREFY_F32>, store_outputs<RAREFY_BF16>, store_outputs<RAREFY_I8>,
                        store_outputs<RAREFY_I16>},
      .decompress_bitmask = {decompress_bitmask<RAREFY_F32>, decompress_bitmask<RAREFY_BF16>,
                             decompress_bitmask<RAREFY_I8>, decompress_bitmask<RAREFY_I4>},
      .decompress_quantized = {decompress_quantized<RAREFY_F32>, decompress_quantized<RAREFY_BF16>,
                               decompress_quantized<RAREFY_I8>},
      .decompress_joined = decompress_joined(),
      .quantize_blocks = BLOCKED.quantize,
      .decompress_offset = BLOCKED.decompress,
      .multiply_blocked = BLOCKED.multiply,
      .decompress_cells = BLOCKED.decompress_cells,
      .multiply_narrow = BLOCKED.multiply_narrow,
      .transposed_epilogue = {transposed_epilogue<RAREFY_F32>, transposed_epilogue<RAREFY_BF16>,
                              transposed_epilogue<RAREFY_I8>},
      .f32_epilogue = f32_epilogue,
      .dequantize_epilogue = dequantize_epilogue,
      .unpack_tile = unpack_tile,
      .add_or_mul = add_or_mul,
      .norm_tile = norm_tile,
      .column_absmax = column_absmax,
      .quantize_tile = quantize_tile,
      .quantize_int16 = quantize_int16,
      .quantize_two_terms = quantize_two_terms<JOINED_TERMS>,
      .quantize_static = quantize_static,
      .fake_quantize = fake_quantize,
      .channelwise = channelwise,
      .channel_affine = channel_affine,
      .channel_scale = channel_scale,
      .rearrange = rearrange,
      .add_deviations = add_deviations,
      .normalize_columns = normalize_columns,
      .add_column_sums = add_column_sums,
      .attention_tile = attention_tile,
      .coded_attention_tile = coded_attention_tile,
      .store_kv_codes = store_kv_codes,
      .int8_attention_words = int8_attention_words,
      .int8_attention = int8_attention,
      .pack_bf16_lanes = pack_bf16_lanes,
      .pack_columns_as_rows = pack_columns_as_rows,
      .pack_features_as_rows = pack_features_as_rows,
      .softmax_lanes = softmax_lanes,
      .add_rescaled = add_rescaled,
      .nhwc_products = {nhwc_products<RAREFY_F32>, nhwc_products<RAREFY_I8>, nhwc_products<RAREFY_I16>},
      .nhwc_round_int16 = nhwc_round_int16,
      .nhwc_int16_numbers = nhwc_int16_numbers,
      .nhwc_scale_sums = nhwc_scale_sums,
      .nhwc_depthwise = {nhwc_depthwise_f32, nhwc_depthwise},
      .nhwc_numbers = nhwc_numbers,
      .nhwc_depthwise_numbers = nhwc_depthwise_numbers,
      .nhwc_lanes = nhwc_lanes,
      .transpose_sums = transpose_sums,
      .nhwc_pixels = {NHWC_PIXELS_PER_CALL<RAREFY_F32>, NHWC_PIXELS_PER_CALL<RAREFY_I8>,
                      NHWC_PIXELS_PER_CALL<RAREFY_I16>},
      .nhwc_store = {nhwc_store_f32, nhwc_store},
      .nhwc_quantize = nhwc_quantize,
      .nhwc_pack_f32 = nhwc_pack_f32,
      .nhwc_to_codes = nhwc_to_codes,
      .nhwc_max = {nhwc_max_f32, nhwc_max},
      .nhwc_unpack = nhwc_unpack,
      .nhwc_map = nhwc_map,
      .nhwc_sum = nhwc_sum,
      .winograd_input = winograd_input,
      .winograd_output = winograd_output,
      .norm_row = norm_row,
      .rope = {rope_tile, rope_row},
      .attention_row = attention_row,
      .multiply_adds = {multiply_adds<RAREFY_F32>, multiply_adds<RAREFY_BF16>, multiply_adds<RAREFY_I8>,
                        multiply_adds<RAREFY_I16>},
      .read_memory = read_memory,
  };
}

}  // namespace
