"""Compiled models as models of transformers: an object of the model's own class whose calls run on the engine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from rarefy.checkpoint.fit_structure import skeleton
from rarefy.checkpoint.save import hf_config, save
from rarefy.common.atomic_io import INDEX
from rarefy.common.errors import DataError, ModelError
from rarefy.compiler.executor import Compiled
from rarefy.generation.decoder import Decoder
from rarefy.integrations.hf_generation import generate_with
from rarefy.model import hf
from rarefy.model.batches import FILLED, with_masks

# files that `save` writes, beside the shards of weights
OF_MODEL = (INDEX, "rarefy-index.json.xz", "graph.json", "config.json", "receipt.json", "receipt.txt", "receipt.md")
SWITCHES = ("output_hidden_states", "output_attentions")  # outputs that a model may be compiled with
UNUSED = ("use_cache", "return_dict", "logits_to_keep", "past_key_values", *SWITCHES)  # never inputs of a graph


class OnEngine:
    """What a class of transformers becomes for a compiled model: mixed in before it.

    The object has no weights of its own: its parameters are on the meta device.

    Attributes:
        engine: what `rarefy.compile` or `rarefy.decoder` returned.
    """

    engine: Compiled | Decoder

    @property
    def device(self) -> torch.device:
        """Return the CPU, where the engine runs."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the model's inputs and outputs; weights may be packed in another."""
        return self.__dict__["engine_dtype"]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model; ModelError for another device than the CPU, or another type."""
        wanted = [*args, *kwargs.values()]
        types = [v for v in wanted if isinstance(v, torch.dtype) and v != self.dtype]
        places = [v for v in [*args[:1], kwargs.get("device")] if isinstance(v, str | int | torch.device)]
        devices = [v for v in places if torch.device(v).type != "cpu"]
        if types or devices:
            raise ModelError(f"a compiled model stays on the CPU in its precision, got to({(types + devices)[0]})")
        return self

    def cpu(self) -> Any:
        """Return the model: it is on the CPU."""
        return self

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise ModelError("a compiled model stays on the CPU in its precision: compile the model in another one")

    def train(self, mode: bool = True) -> Any:
        """Return the model; ModelError for training mode."""
        if mode:
            raise ModelError("a compiled model cannot be trained: train the model, and compile it again")
        return self

    def can_generate(self) -> bool:
        """Return whether this is a language model with a KV cache."""
        return isinstance(self.engine, Decoder)

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Tensor:
        """Return prompts with generated text, as `generate` of transformers does; see `generate_with`."""
        if not isinstance(self.engine, Decoder):
            raise ModelError(f"{type(self).__name__} generates no text: only causal language models do")
        return generate_with(self, self.engine, inputs, generation_config, kwargs)

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """Write the compiled model to a folder, which AutoModel loads after `import rarefy`."""
        save_adapter(self, save_directory)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise ModelError: weights are packed for this machine's kernels."""
        raise ModelError("a compiled model has no state_dict: its weights are packed; save_pretrained writes them")


def adapter(model: Any, engine: Compiled | Decoder) -> Any:
    """Return an object of a model's class that runs on the engine.

    Args:
        model: the model that was compiled. It may be deleted afterwards.
        engine: what `compile` or `decoder` returned for it.
    """
    shell = skeleton(model)
    become_adapter_(shell, engine)
    return shell


def become_adapter_(model: Any, engine: Compiled | Decoder) -> None:
    """Turn a model without weights into one that runs on the engine, in place."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    model.__class__ = _class_on_engine(type(model))
    model.__dict__.update(engine=engine, engine_dtype=dtype, training=False)


@cache
def _class_on_engine(original: type[PreTrainedModel]) -> type:
    """Return a subclass of a class of transformers, of the same name, whose calls run on the engine."""

    signature = inspect.signature(original.forward)
    me, *_ = signature.parameters
    more = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = signature.bind(self, *args, **kwargs).arguments
        others = named.pop(more, {})
        return _run(self, {k: v for k, v in {**named, **others}.items() if v is not None and k != me})

    members = {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (OnEngine, original), members)


def _run(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the outputs of a call by names, in the model's own output class."""
    wants_tuple = not inputs.get("return_dict", True)
    engine = model.engine
    if "labels" in inputs:
        raise DataError("a compiled model computes no loss: leave out labels")
    tensors = {k: v for k, v in inputs.items() if k not in UNUSED}
    if isinstance(engine, Decoder):
        for name in ("past_key_values", *SWITCHES):
            if name in inputs and inputs[name] is not False:  # an empty cache is False as a bool
                raise DataError(f"a decoder takes no {name}: leave it out; generate uses the decoder's own cache")
        outputs: Any = CausalLMOutputWithPast(logits=_logits(engine, tensors, inputs.get("logits_to_keep", 0)))
    else:
        for name in (n for n in SWITCHES if inputs.get(n)):
            if not any(o.startswith(name.removeprefix("output_")) for o in engine.output_names):
                raise DataError(f"compiled without {name}: set model.config.{name} = True before compiling")
        outputs = engine(**_fitted(engine, tensors))
        if isinstance(outputs, dict) and not isinstance(outputs, ModelOutput):
            outputs = ModelOutput(**outputs)  # of a class that the saved graph could not name
    return outputs.to_tuple() if wants_tuple and isinstance(outputs, ModelOutput) else outputs


def _fitted(engine: Compiled, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that a graph has: those that change nothing are left out or filled in."""
    names = list(engine.keywords)
    for name in [n for n in tensors if n not in names]:
        if not (name in FILLED and bool((tensors[name] == FILLED[name]).all())):
            raise DataError(f"compiled without {name}: pass an example= that has it")
        tensors = {k: v for k, v in tensors.items() if k != name}
    return with_masks(tensors, names)


def _logits(decoder: Decoder, tensors: Mapping[str, Any], keep: Any) -> Tensor:
    """Return the logits of a text without a cache, of the last `keep` tokens, 0 for all."""
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    extra = [n for n in tensors if n not in ("input_ids", "attention_mask", "token_type_ids", "position_ids")]
    if ids is None or extra:
        raise DataError(f"a decoder takes input_ids and attention_mask, got {', '.join(tensors) or 'nothing'}")
    if mask is not None and mask.shape != ids.shape:
        raise DataError(f"attention_mask: expected the shape of input_ids, {list(ids.shape)}, got {list(mask.shape)}")
    if ids.dim() == 2:
        _check_positions(tensors.get("position_ids"), mask, ids)
    # padding on the right follows all that matters
    cache = None if mask is None or _is_padded_right(mask) else decoder.cache(len(ids), ids.shape[1], mask)
    with torch.no_grad():
        logits = decoder(ids, cache, last=keep == 1 if isinstance(keep, int) else False)
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _other_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a saved folder that are no part of its model, such as a README, by name."""
    if not (folder / INDEX).is_file():
        return {}
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name[0] != "."]
    ours = [f for f in files if f.name in OF_MODEL or ".safetensors" in f.name]
    return {f.name: f.read_bytes() for f in files if f not in ours}


def _is_padded_right(mask: Tensor) -> bool:
    """Return whether each row of a mask is ones, then zeros."""
    ones = mask == 1
    right = torch.arange(mask.shape[1]) < ones.sum(1, keepdim=True)
    return torch.equal(ones, right) and bool((ones | (mask == 0)).all()) and bool(ones[:, :1].all())


def _check_positions(positions: Tensor | None, mask: Tensor | None, ids: Tensor) -> None:
    """Raise DataError for positions other than those that the decoder counts itself."""
    if positions is None:
        return
    ones = torch.ones_like(ids) if mask is None else mask.long()
    plain = torch.arange(ids.shape[1]).expand_as(ids)
    counted = ones.cumsum(1) - 1
    fits = positions.dim() == 2 and positions.shape[1] == ids.shape[1] and len(positions) in (1, len(ids))
    if not fits or not any(bool(((positions == p) | (ones == 0)).all()) for p in (plain, counted)):
        raise DataError("position_ids: a decoder counts the tokens from 0 itself: leave them out")


def save_adapter(model: Any, folder: str | Path, files: Mapping[str, bytes] | None = None) -> None:
    """Write a compiled model with its config to a folder; `files` are more files by name.

    As `save_pretrained` of transformers does, it replaces an older model there, and leaves other files as they are.
    """
    structure = hf.structure(model)
    named = {**_other_files(Path(folder)), "config.json": hf_config(structure), **(files or {})}
    if isinstance(model.engine, Decoder):
        named["generation_config.json"] = json.dumps(model.generation_config.to_diff_dict()).encode()
    save(model.engine, folder, files=named, overwrite=True)
