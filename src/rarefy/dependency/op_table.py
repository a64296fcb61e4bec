"""The table that maps each ATen operator to the rule for its dimensions."""

from __future__ import annotations

from typing import Any

from rarefy.dependency import layer_rules as layers
from rarefy.dependency import shape_rules as shapes

# Names without the prefix `aten`. Operators with torch's tag `pointwise` need no entry.
OPERATORS: dict[Any, str] = {
    shapes.pointwise: """copy_ masked_fill masked_fill_ clamp lerp addcmul addcdiv hardswish hardswish_ hardsigmoid
        hardsigmoid_ gelu silu silu_ relu relu_ mish prelu _prelu_kernel celu elu leaky_relu leaky_relu_
        native_dropout""",
    shapes.restrided: "as_strided as_strided_",
    shapes.same_shape: """clone detach detach_ alias lift_fresh lift_fresh_copy _to_copy contiguous dropout resolve_conj
        bernoulli bernoulli_ view_as fill_ zero_""",
    shapes.like: "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty",
    shapes.factory: "zeros ones full empty randn rand",
    shapes.constant: "arange linspace scalar_tensor eye tril_indices triu_indices randint randperm tensor",
    shapes.view: "view _unsafe_view reshape _reshape_alias flatten",
    shapes.permute: "permute",
    shapes.transpose: "t transpose transpose_ t_",
    shapes.expand: "expand",
    shapes.squeeze: "squeeze unsqueeze squeeze_ unsqueeze_",
    shapes.cat: "cat",
    shapes.stack: "stack",
    shapes.split: "split split_with_sizes chunk unsafe_split unsafe_chunk",
    shapes.glu: "glu",
    shapes.slice_: "slice",
    shapes.select: "select unbind",
    shapes.repeat: "repeat",
    shapes.pad: "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
    shapes.order_dependent: """roll flip cumsum _softmax _safe_softmax _log_softmax sort topk cumprod tril triu tril_
        triu_""",
    shapes.reduction: """sum mean var var_mean std amax amin max min prod any all argmax argmin logsumexp
        linalg_vector_norm norm""",
    layers.matmul: "mm bmm addmm baddbmm mv addmv dot addmm_ baddbmm_",
    layers.convolution: "convolution _convolution convolution_overrideable",
    layers.weight_norm: "_weight_norm_interface",
    layers.batch_norm: """native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit
        _native_batch_norm_legit_functional cudnn_batch_norm""",
    layers.layer_norm: "native_layer_norm rms_norm _fused_rms_norm",
    layers.group_norm: "native_group_norm",
    layers.resample: """max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
        upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    layers.grid_sample: "grid_sampler_2d grid_sampler",
    layers.pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    layers.channel_shuffle: "native_channel_shuffle channel_shuffle",
    layers.embedding: "embedding",
    layers.index: "index _unsafe_index",
    layers.gather: "index_select gather",
    layers.attention: """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
        _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention scaled_dot_product_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math""",
    layers.scatter: """index_put index_put_ scatter scatter_ index_copy index_copy_ slice_scatter scatter_add index_add_
        masked_scatter""",
    layers.scalar: "_local_scalar_dense item is_nonzero equal nonzero",
}
RULES: dict[str, Any] = {"pointwise": shapes.pointwise}
RULES |= {name: rule for rule, names in OPERATORS.items() for name in names.split()}
