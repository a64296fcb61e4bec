"""The structs and enums of native programs, as csrc/rarefy.h declares them."""

from __future__ import annotations

from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from typing import Any

from torch import Tensor

from rarefy.runtime.native_calls import address

NAMES = (  # rarefy_op
    "pack", "unpack", "linear", "convert", "norm", "add", "mul", "attention", "rope", "kv_store", "pad_planes", "conv",
    "max_pool", "depthwise_conv", "global_avg_pool", "image_absmax", "channel_affine", "channel_scale", "rearrange",
    "fake_quantize", "group_norm", "nhwc_quantize", "nhwc_conv", "nhwc_max_pool", "nhwc_depthwise", "nhwc_map",
    "nhwc_copy", "nhwc_mean", "nhwc_unpack", "nhwc_spread",
)  # fmt: skip
OPS = {name: i for i, name in enumerate(NAMES)}


class View(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Step(Structure):
    _fields_ = [
        *[(n, c_int32) for n in ("op", "act", "decode", "format", "dtype", "channels_first", "per_image", "two_terms")],
        *[(n, c_int32) for n in ("subtract_mean", "winograd", "store_values", "whole_columns", "codes_dtype")],
        *[(n, c_int32) for n in ("in_zero", "codes_zero")],
        *[(n, c_float) for n in ("in_scale", "codes_scale")],
        *[(n, c_float) for n in ("eps", "pad_value")],
        *[(n, c_void_p) for n in ("weight", "attention", "indirection")],
        *[(n, View) for n in ("x", "out", "out_codes", "other", "residual", "in_scales", "in_absmax", "out_scales")],
        *[(n, View) for n in ("out_absmax", "cos", "sin")],
        *[(n, c_void_p) for n in ("gamma", "bias", "depthwise_weights", "row_sums")],
        *[(n, c_int64) for n in ("columns", "features", "batch", "tokens", "seq_stride")],
        *[(n, c_int64) for n in ("groups", "heads", "absmax_rows", "depends_on")],
        *[(n, c_void_p) for n in ("segments", "segment_starts")],
        ("token_rows", c_void_p),
        ("nhwc", c_void_p),
    ]


class KVCache(Structure):
    _fields_ = [
        *[(n, c_void_p) for n in ("data", "starts", "pages")],
        *[(n, c_int64) for n in ("tiles", "length", "features")],
        *[(n, c_void_p) for n in ("codes", "scales")],
        ("head_dim", c_int64),
    ]


class Attention(Structure):
    _fields_ = [
        *[(n, c_void_p) for n in ("q", "k", "v", "out")],
        *[(n, c_int64) for n in ("q_stride", "k_stride", "v_stride", "out_stride")],
        ("mask", c_void_p),
        *[(n, c_int64) for n in ("mask_batch_stride", "mask_head_stride", "mask_query_stride", "mask_key_stride")],
        *[(n, c_int64) for n in ("batch", "heads", "kv_heads", "head_dim", "queries", "keys", "seq_stride")],
        ("cache", c_void_p),
        *[(n, c_int64) for n in ("k_offset", "v_offset", "window")],
        ("scale", c_float),
        ("causal", c_int32),
        ("dtype", c_int32),
        ("cap", c_float),
        ("kv_seq_stride", c_int64),
        ("bounds", c_void_p),
        ("heads_together", c_int64),
        ("max_bias", c_float),
    ]


def data_pointer(step: Step, operand: Any) -> c_void_p:
    """Return the address of an operand's data as it stands in a step, which may be written."""
    return c_void_p.from_address(addressof(step) + operand.offset + View.data.offset)


def set_mask(a: Attention, mask: Tensor) -> Tensor:
    """Write a mask's address and strides; return the expanded mask, which the caller keeps alive."""
    mask = mask.resolve_neg()[(None,) * (4 - mask.dim())]
    mask = mask.expand(a.batch, mask.shape[1], a.queries, a.keys)
    a.mask = address(mask)
    a.mask_batch_stride, a.mask_head_stride, a.mask_query_stride, a.mask_key_stride = mask.stride()
    if mask.shape[1] == 1:
        a.mask_head_stride = 0
    return mask
