"""A model as it is deployed, and the time of its calls in turns with another one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from rarefy.checkpoint.save import save
from rarefy.common.errors import ModelError
from rarefy.compiler.compile import compile
from rarefy.compiler.executor import Compiled
from rarefy.compiler.kernel_selection import fits_int16
from rarefy.evaluation.outputs import named_output, output_tensor, pool, token_mask
from rarefy.evaluation.profiling import K, compare, rates
from rarefy.generation.decoder import decoder
from rarefy.model import hf
from rarefy.model.forward import call, evaluating, without_targets
from rarefy.model.layers import all_layers
from rarefy.pipeline.engine_evaluation import EngineModule, decode_step, resident_bytes
from rarefy.pipeline.speed import resize_batch
from rarefy.runtime.bindings import multiplies_bf16
from rarefy.search.frontier import Point
from rarefy.search.targets import DECODE, times_tokens

SECONDS = 1.5  # of calls of one model at one batch size
REPEATS = (5, 400)  # at least and at most
TEXTS = 12  # texts that each language model reads and continues
ATTEMPTS, SPREAD = 3, 0.15  # at times, and how far their quartiles may lie apart, in parts of the median
PROMPT, NEW = 256, 48  # tokens of a prompt that is timed, and tokens decoded after it
BITS_OF = {None: 32, "bf16": 16, "int16": 16, "int8": 8}  # by precision of the engine
SMOOTH = 0.5  # the power of the largest inputs that is moved into the weights

Deployed = Compiled | EngineModule
PerLayer = tuple[tuple[str, str], ...]  # layers and their precision, of a variant, which has a hash


def deploy(
    model: nn.Module,
    example: Any,
    precision: str | None,
    calibration: Sequence[Any],
    ignore: Sequence[str] = (),
    per_layer: Mapping[str, str] = MappingProxyType({}),
    solver: str = "obs",
    cache_precision: str = "fp32",
) -> Deployed:
    """Return a model on the engine: a decoder for causal language models, else compiled.

    Convolutions in 8 bits get static scales from the calibration batches. Layers named in `ignore` stay in fp32, those
    in `per_layer` have the precision beside their name, as far as the model has them; of a factorized layer, both
    factors. `solver` "rtn" is for models that are only timed. `cache_precision` is that of a decoder's KV cache.
    """
    with evaluating(model):
        if hf.is_causal_lm(model):
            return EngineModule(
                decoder(model, precision=precision, cache_precision=cache_precision, max_error=math.inf)
            )
        static = has_static_scales(model, precision, calibration)
        calibrate = [without_targets(b) for b in calibration] if static else None
        names = sorted({l.name for l in all_layers(model)}) if ignore or per_layer else []
        stay = [n for n in names if any(_is_in(n, i) for i in ignore)]
        own = {n: p for n in names for layer, p in per_layer.items() if _is_in(n, layer) and n not in stay}
        options: dict[str, Any] = {"precision": precision, "ignore": stay, "per_layer": own, "calibrate": calibrate}
        return compile(model, without_targets(example), **options, solver=solver, max_error=math.inf)  # judged on data


def _is_in(name: str, layer: str) -> bool:
    """Return whether a layer is another one, or a factor of it."""
    return name == layer or name.startswith(f"{layer}.")


def has_static_scales(model: nn.Module, precision: str | None, calibration: Sequence[Any]) -> bool:
    """Return whether a model gets static scales: in 8 bits, if it has convolutions and there are calibration data."""
    convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    return precision == "int8" and bool(calibration) and convolutions


def engine_in(deployed: Deployed) -> Any:
    """Return the compiled model or decoder itself, which `rarefy.save` takes."""
    return deployed.engine if isinstance(deployed, EngineModule) else deployed


def sizes_of(deployed: Deployed) -> dict[str, int]:
    """Return the bytes of a model's weights in memory and of its saved folder: 0 for one that cannot be saved."""
    engine = engine_in(deployed)
    with TemporaryDirectory() as place:
        try:
            disk = save(engine, Path(place) / "model")
        except ModelError:
            disk = 0
    return {"memory": resident_bytes(engine), "disk": disk}


def timed_names(model: nn.Module, batches: Sequence[int], objective: str) -> tuple[str, ...]:
    """Return the names of what is timed: batch sizes, or the phases of a language model, one where it is the target."""
    if not hf.is_causal_lm(model):
        return tuple(str(b) for b in batches)
    return (objective,) if objective in DECODE else DECODE


def times_of(
    models: Mapping[str, Deployed], example: Any, names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return quartiles of milliseconds of models whose calls take turns: {batch: {model: quartiles}}.

    Where quartiles lie far apart, other programs were busy: the models are timed again, up to `ATTEMPTS` times, and
    the times that differ least are returned.

    Args:
        models: deployed models by name.
        example: what they can be called with; it is repeated or cut to each batch size.
        names: what is timed, from `timed_names`.
    """
    attempts = list[dict[str, dict[str, dict[str, float]]]]()
    while len(attempts) < ATTEMPTS and (not attempts or _spread(attempts[-1]) > SPREAD):
        attempts.append(_times_once(models, example, names))
    return min(attempts, key=_spread)


def _spread(times: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float:
    """Return how far the quartiles of a model lie apart, in parts of its median; the most of all models."""
    return max((t["high"] - t["low"]) / t["median"] for of_models in times.values() for t in of_models.values())


def _times_once(
    models: Mapping[str, Deployed], example: Any, names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return quartiles of milliseconds of models whose calls take turns."""
    if times_tokens(names):
        engines = {n: engine_in(m) for n, m in models.items()}
        engine = next(iter(engines.values()))
        prompt, new = timed_tokens(engine.max_tokens)
        steps = {n: decode_step(e, prompt + new) for n, e in engines.items()}
        new = new if "decode" in names else 1
        rates_of = rates(steps, engine.vocab_size, prompt=prompt, new=new, repeats=TEXTS)
        tokens = {"decode": ("token", 1), "prompt": ("prefill", prompt)}
        return {n: {m: _milliseconds(r[tokens[n][0]], tokens[n][1]) for m, r in rates_of.items()} for n in names}
    result = {}
    for name in names:
        batch = resize_batch(without_targets(example), int(name))
        result[name] = times_in_turns({n: partial(call, m, batch) for n, m in models.items()})
    return result


def timed_tokens(limit: int | None) -> tuple[int, int]:
    """Return how many tokens are read and decoded where a text may have so many.

    >>> timed_tokens(None), timed_tokens(128)
    ((256, 48), (107, 21))
    """
    total = PROMPT + NEW
    if limit is None or limit >= total:
        return PROMPT, NEW
    prompt = max(1, PROMPT * limit // total)
    return prompt, max(1, limit - prompt)


def times_in_turns(runs: Mapping[K, Callable[[], Any]], pause: float = 0.0) -> dict[K, dict[str, float]]:
    """Return quartiles of milliseconds of calls that take turns, a second or two of each; `pause` as in `compare`."""
    once = max(t.median for t in compare(runs, repeats=2, warmup=1).values())
    each = pause + (1 + bool(pause)) * once  # a pause comes with a call that is not timed
    repeats = round(min(max(SECONDS / max(each, 1e-6), REPEATS[0]), REPEATS[1]))
    times = compare(runs, repeats=repeats, warmup=1, pause=pause)
    return {n: {"median": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high} for n, t in times.items()}


def _milliseconds(rate: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Return quartiles of milliseconds from rates of tokens per second."""
    ends = {"median": "tokens_per_second", "low": "high", "high": "low"}
    return {name: 1e3 * tokens / rate[of] for name, of in ends.items()}


@dataclass(frozen=True)
class Variant:
    """A precision of the engine, and whether large inputs are smoothed for it (SmoothQuant) by a last stage.

    Layers in `ignore` stay in fp32, those in `per_layer` have a precision of their own. `cache_precision` is that of a
    language model's KV cache.
    """

    name: str
    precision: str | None
    smooth: bool = False
    ignore: tuple[str, ...] = ()
    cache_precision: str = "fp32"
    per_layer: PerLayer = ()

    def with_layers(self, layers: Sequence[str], exact: Variant, in_16_bits: Collection[str] = ()) -> Variant:
        """Return this precision with layers that are in a more exact one, as far as they can be in it, else in fp32.

        >>> Variant("int8", "int8").with_layers(["stem", "fc", "head"], Variant("bf16", "bf16"), ["head"]).name
        'int8, head in bf16, 2 layers in fp32'
        """
        own = {l: exact.precision for l in layers if exact.precision and l in in_16_bits}
        groups = {precision: [l for l in layers if own.get(l) == precision] for precision in (exact.precision, None)}
        words = [
            f"{f'{len(names)} layers' if len(names) > 1 else names[0]} in {precision or 'fp32'}"
            for precision, names in groups.items()
            if names
        ]
        ignore = (*self.ignore, *(l for l in layers if l not in own))
        per_layer = (*self.per_layer, *own.items())
        return replace(self, name=", ".join([self.name, *words]), ignore=ignore, per_layer=per_layer)

    def bits(self, layer: str) -> int:
        """Return the bits of a layer's weights."""
        return BITS_OF[None if layer in self.ignore else dict(self.per_layer).get(layer, self.precision)]

    def stages(self, ignore: Sequence[str]) -> list[dict[str, Any]]:
        """Return the recipe's last stages; layers in `ignore` keep their own bits."""
        if not self.smooth:
            return []
        options = {"weights": "int8", "activations": "int8", "smooth": SMOOTH}
        return [{"quantize": {**options, "ignore": list(ignore)} if ignore else options}]


PLAIN = Variant("fp32", None)


def variant_of(point: Point) -> Variant:
    """Return the precisions that a point was measured in."""
    name, cache = point.precision or "fp32", point.cache_precision
    own = tuple(point.per_layer.items())
    return Variant(name, point.precision, ignore=point.ignore, cache_precision=cache, per_layer=own)


def runs_in(runs: Variant | Point) -> tuple[str | None, tuple[str, ...], PerLayer, str]:
    """Return the precision that a model runs in, the layers that do not, and the precision of its KV cache."""
    return runs.precision, runs.ignore, tuple(sorted(dict(runs.per_layer).items())), runs.cache_precision


def variants_of(
    model: nn.Module, has_data: bool, counts_bytes: bool, ignore: tuple[str, ...] = ()
) -> tuple[Variant, ...]:
    """Return the precisions of the engine, beside fp32, that change a model; layers in `ignore` stay in fp32.

    bf16 is for linear layers, on CPUs that multiply it fast, or where bytes count: elsewhere it is slower than fp32.
    int16 is for convolutions, and for linear layers on the other CPUs. Decoders have neither, and may keep their KV
    cache in 8 bits.
    """
    int8 = Variant("int8", "int8")
    if hf.is_causal_lm(model):
        cached = Variant("int8, 8-bit cache", "int8", cache_precision="int8")
        return (int8, cached, Variant("int8 smoothed", "int8", True)) if has_data else (int8, cached)
    linear = any(isinstance(m, nn.Linear) for m in model.modules())
    convolution = any(isinstance(m, nn.Conv2d) and _has_int16_kernel(m) for m in model.modules())
    useful = {
        "bf16": linear and (multiplies_bf16() or counts_bytes),
        "int16": convolution or (linear and not multiplies_bf16()),
        "int8": True,
    }
    return tuple(Variant(p, p, ignore=ignore) for p, is_useful in useful.items() if is_useful)


def _has_int16_kernel(conv: nn.Conv2d) -> bool:
    """Return whether a convolution runs in int16; those for which Winograd's algorithm is faster do not."""
    by_winograd = (*conv.kernel_size, *conv.stride, *conv.dilation) == (3, 3, 1, 1, 1, 1)
    return not by_winograd and fits_int16(conv.weight, conv.groups)


@torch.no_grad()
def distance(model: nn.Module, wanted: Sequence[torch.Tensor], batches: Sequence[Any]) -> float | None:
    """Return how far a model's outputs are from the wanted ones: squared distance over squared length.

    Outputs that are wanted as infinite, as those of masked classes, do not count. None where others are infinite.
    """
    far = length = 0.0
    for output, target in zip(outputs_of(model, batches), wanted):
        counts = target.isfinite()
        if not counts.all():
            output, target = output[counts], target[counts]
        far += _squared_length(output - target)
        length += _squared_length(target)
    return far / max(length, 1e-30) if math.isfinite(far) else None


def _squared_length(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Sequence[Any]) -> list[torch.Tensor]:
    """Return the outputs for each batch in fp32: embeddings of texts where a model returns hidden states alone, else
    all numbers but those at padding."""
    tensors = []
    with evaluating(model):
        for batch in batches:
            inputs = without_targets(batch)
            output = call(model, inputs)
            tensor = output_tensor(output)
            mask = token_mask(inputs, tensor)
            if mask is not None and named_output(output, "last_hidden_state") is tensor:
                tensor = pool(tensor.float(), mask)
            elif mask is not None:
                tensor = tensor[mask]
            tensors.append(tensor.float())
    return tensors
