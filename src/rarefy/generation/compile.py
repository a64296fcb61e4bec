"""`compile`: one function for language models, which become decoders, and all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, overload

from torch import nn
from torch.export import ExportedProgram

from rarefy.common.errors import DataError
from rarefy.common.renamed import renamed_parameters
from rarefy.compiler import compile as compiler
from rarefy.compiler.executor import Compiled
from rarefy.compiler.exported_program import to_module
from rarefy.compiler.model_checks import check_module
from rarefy.generation.decoder import Decoder, decoder
from rarefy.model import hf
from rarefy.model.layers import Selector

DEFAULTS = {"ignore": None, "per_layer": None, "calibrate": None, "solver": "obs", "tune": True, "dynamic": True}


@overload
def compile(
    model: nn.Module,
    example: None = None,
    *,
    precision: str | None = None,
    cache_precision: str = "fp32",
    max_error: float | None = None,
) -> Decoder: ...


@overload
def compile(
    model: nn.Module | ExportedProgram,
    example: Any,
    *,
    precision: str | None = None,
    ignore: Selector = None,
    per_layer: Mapping[str, str] | None = None,
    calibrate: Iterable[Any] | None = None,
    solver: str = "obs",
    tune: bool = True,
    dynamic: bool = True,
    max_error: float | None = None,
) -> Compiled: ...


@renamed_parameters(values="precision")
def compile(
    model: nn.Module | ExportedProgram,
    example: Any = None,
    *,
    precision: str | None = None,
    ignore: Selector = None,
    per_layer: Mapping[str, str] | None = None,
    calibrate: Iterable[Any] | None = None,
    solver: str = "obs",
    tune: bool = True,
    dynamic: bool = True,
    cache_precision: str = "fp32",
    max_error: float | None = None,
) -> Compiled | Decoder:
    """Return a faster callable that computes what the model does.

    With an example, the model is exported with `torch.export`, its operators are fused, and each fused subgraph runs as
    one native call on the CPU. Operators that the engine does not have run in torch. Without an example, a causal
    language model of transformers becomes a `Decoder`, which has a KV cache and `generate`. Outputs are compared with
    the model's before anything is returned.

    Args:
        model: a model in evaluation mode, on the CPU, in fp32, bf16 or fp16, or what `torch.export.export` made of
            one, which has its example.
        example: what the model can be called with: a dict of keywords, a tuple of arguments, or one tensor. A language
            model with an example is compiled as it is called: from ids to logits, without a cache.
        precision: None for that of the model; those in fp16 run in fp32. "fp32" runs one in bf16 in fp32 too. "bf16",
            "int16" (not for decoders) and "int8" run layers in bfloat16, 16-bit integers and 8 bits; see
            `rarefy.compiler.compile.compile` and `rarefy.decoder` for what stays in fp32.
        ignore: selectors of layers that stay in fp32, whatever the precision.
        per_layer: precisions of single layers, "fp32", "bf16", "int16" or "int8" by selector: {"head": "bf16"}.
        calibrate: batches, each like the example, for static scales of int8 convolutions.
        solver: with calibrate, how weights are rounded: "obs" or "rtn".
        tune: time native calls against torch on the example, and run what is faster.
        dynamic: False fixes all sizes to the example's, and compiles in a part of the time.
        cache_precision: of the KV cache of a language model without an example: "fp32", or "int8" for a quarter of its
            memory.
        max_error: the largest relative distance of outputs on the example, or of a decoder's logits on random tokens.
            None for 0.001 in fp32, 0.1 in bf16, 0.03 in int16, and 0.2 in int8, where there is a warning from 0.1.

    Returns:
        A `Compiled`, to be called like the model; for a language model without an example a `Decoder`.

    Raises:
        DataError: if there is no example and the model is no language model, or the example cannot be used;
            or if there is no such cache_precision, or not for this model.
        ModelError: if the model cannot be exported, is in training mode, or outputs differ from the model's.

    Cost: seconds to a minute.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> fast = compile(nn.Sequential(nn.Linear(64, 64), nn.GELU()).eval(), torch.randn(8, 64))
        >>> fast(torch.randn(3, 64)).shape
        torch.Size([3, 64])
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
        >>> compile(model).generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5).shape
        torch.Size([1, 8])
    """
    options: dict[str, Any] = {"ignore": ignore, "per_layer": per_layer, "calibrate": calibrate, "solver": solver}
    options |= {"tune": tune, "dynamic": dynamic}
    if isinstance(model, ExportedProgram):
        model, example = to_module(model, example)
    if example is not None:
        if cache_precision != "fp32":
            raise DataError(
                "cache_precision has no effect with an example: leave the example out, and a language model becomes a "
                "decoder with a KV cache"
            )
        return compiler.compile(model, example, precision=precision, max_error=max_error, **options)
    check_module(model)
    if not hf.is_causal_lm(model):
        raise DataError(
            f"compile needs an example input of {type(model).__name__}: compile(model, example). Only language models "
            "of transformers need none"
        )
    unused = [n for n, default in DEFAULTS.items() if options[n] != default]
    if unused:
        raise DataError(
            f"{unused[0]} has no effect on a decoder of a language model: leave it out, or pass an example, which "
            "compiles the model without a KV cache"
        )
    return decoder(model, precision=precision, cache_precision=cache_precision, max_error=max_error)
