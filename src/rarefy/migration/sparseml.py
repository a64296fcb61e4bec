"""Translate SparseML's training recipes (27 legacy modifiers) to one `train` stage, with `cut` stages before it.

A legacy recipe is a timeline in epochs: each modifier has a start and an end. In our recipes a train stage has a number
of epochs, and everything in it a start and an end between 0 and 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration.recipe_draft import (
    MAX_STEPS,
    TEACHER,
    Draft,
    Modifier,
    ModifierOptions,
    Stage,
    curve,
    end_of_span,
    fraction,
    ignored,
    is_unsupported,
    mapping,
    name_list,
    note_regrowth,
    number,
    selectors,
    shape,
    steps,
)

LOG = ("log_types",)
MAX_ADAM_RATE = 0.004  # a recipe with a higher learning rate was for SGD


def convert(draft: Draft, modifiers: Sequence[Modifier], skip: bool) -> None:
    """Add the counterparts of legacy modifiers to a draft. RecipeError for one without, unless `skip`."""
    supported = [p for p in modifiers if not is_unsupported(draft, p, (HANDLERS,), UNSUPPORTED, "modifier", skip)]
    epochs = _epochs(modifiers)
    for nth, (begin, end) in enumerate(_phases(supported, epochs)):
        parts = [p for p in (_part(m, begin, end, epochs) for m in supported) if p is not None]
        if nth:
            draft.add("train", {}, [f"training from epoch {begin:g} on, with another pruning method"])
        for modifier in sorted(parts, key=lambda p: list(HANDLERS).index(p.name)):
            HANDLERS[modifier.name](draft, modifier, end - begin)
        stage = draft.stages[-1] if draft.stages else None
        if stage is not None and stage.name == "train":
            stage.settings = {"epochs": max(1, math.ceil(end - begin)), **stage.settings}
            if "optimizer" not in stage.settings:
                stage.remarks.append("the optimizer was your script's: name it here (optimizer: {name: sgd, lr: 0.01})")


def _phases(modifiers: Sequence[Modifier], epochs: float) -> list[tuple[float, float]]:
    """Return the spans of training, in epochs, that become train stages: a pruning method after another begins one."""
    pruning = [(*_epoch_span(m.take(), epochs), METHODS[m.name]) for m in modifiers if m.name in METHODS]
    cuts: list[float] = []
    last, method = 0.0, ""
    for start, end, name in sorted(pruning):
        if method and name != method and start >= last:
            cuts.append(start)
        last, method = max(last, end), name
    edges = [0.0, *cuts, epochs]
    return [(begin, end) for begin, end in pairwise(edges) if end > begin]


def _part(modifier: Modifier, begin: float, end: float, epochs: float) -> Modifier | None:
    """Return a modifier with epochs counted from the beginning of a phase; None if it acts before or after it."""
    if (begin, end) == (0.0, epochs):
        return modifier
    start, last = _epoch_span(modifier.take(), epochs)
    if modifier.name == "EpochRangeModifier":
        start, last = begin, end
    if start >= end or (begin > 0 and last <= begin):
        return None
    span = {"start_epoch": max(start, begin) - begin, "end_epoch": min(last, end) - begin}
    return replace(modifier, settings={**modifier.settings, **span})


def _epochs(modifiers: Sequence[Modifier]) -> float:
    """Return the length of training: that of EpochRangeModifier, else the latest end of any modifier."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for modifier in modifiers:
        options = modifier.take()
        for name in ("end_epoch", "start_epoch"):
            value = options.number(name)
            if value is not None and value > 0:
                ends[modifier.name == "EpochRangeModifier"].append(float(value))
    limits = ends[True] or ends[False] or [1.0]
    if max(limits) > 1e6:
        raise RecipeError(f"training of {max(limits):g} epochs [{modifiers[0].where}]")
    return max(limits)


def _epoch_span(options: ModifierOptions, epochs: float) -> tuple[float, float]:
    start = max(0.0, float(options.number("start_epoch") or 0.0))
    return start, float(end_of_span(options, start, options.number("end_epoch"), epochs))


def _span(options: ModifierOptions, epochs: float) -> tuple[float, float]:
    start, last = _epoch_span(options, epochs)
    return min(1.0, start / epochs), min(1.0, last / epochs)


def _steps(options: ModifierOptions, start: float, end: float, epochs: float, stage: Stage) -> int:
    every = options.number("update_frequency")
    if every is None or every <= 0:
        stage.remarks.append(f"{options.modifier.name} pruned at every step: {MAX_STEPS} times in all here")
        return MAX_STEPS
    count = round((end - start) * epochs / every)
    if count > MAX_STEPS:
        stage.remarks.append(f"{options.modifier.name} pruned {count:,} times: {MAX_STEPS} here, more changes nothing")
    return steps(count)


def pattern_of(mask_type: Any, modifier: Modifier) -> str:
    """Return the sparsity pattern of a mask type."""
    named = {
        "unstructured": "unstructured", "tensorrt": "2:4", "filter": "row", "channel": "column", "block4": "1x4",
        "block": "1x4",
    }  # fmt: skip
    if isinstance(mask_type, list) and len(mask_type) == 2 and all(type(n) is int for n in mask_type):
        return f"{mask_type[0]}x{mask_type[1]}"
    text = str(mask_type or "unstructured")
    nm, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"(?:block_?)?(\d+)[x_](\d+)", text)
    if text in named:
        return named[text]
    if nm:
        return "unstructured" if nm[2] == "0" else text
    if block:
        return f"{block[1]}x{block[2]}"
    raise RecipeError(
        f"{modifier.name}: no pattern of mask {text[:40]!r}; use {', '.join(named)}, N:M, [R, C] [{modifier.where}]"
    )


def _plan(method: str, scope: str | None = None) -> Callable[[Draft, Modifier, float], None]:
    """Return a handler for modifiers that prune."""

    def handle(draft: Draft, modifier: Modifier, epochs: float) -> None:
        options, stage = modifier.take(init_sparsity=0.05, leave_enabled=True), draft.train()
        start, end = _span(options, epochs)
        layers, pattern = selectors(options["params"], modifier, "params"), pattern_of(options["mask_type"], modifier)
        targets = [options[k] for k in ("final_sparsity", "compression_sparsity", "sparsity")]
        last = next((s for s in targets if s is not None), None)
        groups = _group_ends(last, modifier)
        final = max(groups.values()) if groups else fraction(last, modifier, "final_sparsity")
        if layers is None and options["params"] is not None:
            stage.remarks.append(f"{modifier.name}: the last layer stays dense here; name it in layers to prune it")
        plan: dict[str, Any] = {"method": method, **shape(pattern, final)}
        shared = options["global_sparsity"]
        is_global = scope == "global" if shared is None else bool(shared)
        if is_global and (pattern == "unstructured" or "x" in pattern):
            plan["scope"] = "global"
        if method in ("gradual", "movement", "second-order"):
            first = options.number("init_sparsity")
            plan["first"] = min(float(first or 0.0), float(plan.get("sparsity", 0.0)))
            plan["steps"] = _steps(options, start, end, epochs, stage)
            plan["schedule"] = curve(options, "inter_func", stage)
        elif method == "rigl":
            plan["steps"] = _steps(options, start, end, epochs, stage)
        if method == "alternate":
            every = options.number("update_frequency") or 5
            plan["cycles"] = max(1, round((end - start) * epochs / (2 * every)))
        plan |= {"start": start, "end": end}
        if method == "second-order":
            plan |= _fisher(options)
        if layers is not None:
            plan["layers"] = layers
        if groups:
            stage.remarks.append(f"{modifier.name} had a sparsity for each group of layers: see ends")
            plan["ends"] = groups
        note_regrowth(options, stage)
        stage.remarks += options.unmapped(
            *LOG,
            "phased",
            "score_type",
            "num_recomputations",
            "grad_sampler_kwargs",
            "num_pages",
            "momentum_buffer_reset",
        )
        score = options.values.get("score_type")
        if score not in (None, "magnitude"):
            stage.remarks.append(f"{modifier.name}: score_type {str(score)[:40]} is the method's own here")
        _join(stage, plan, modifier)

    return handle


def _fisher(options: ModifierOptions) -> dict[str, Any]:
    """Return the settings of second-order pruning, which early recipes have under `mfac_options`."""
    modifier = options.modifier
    nested = mapping(options["mfac_options"], modifier, "mfac_options")
    settings: dict[str, Any] = {}
    for ours, theirs in {"gradients": "num_grads", "block": "fisher_block_size", "damp": "damp"}.items():
        value: Any = options[theirs] if options[theirs] is not None else nested.get(theirs)
        if isinstance(value, Mapping):  # by sparsity
            numbers = [number(v, modifier, theirs) for v in value.values()]
            value = max(numbers) if numbers else None
        if value is not None:
            settings[ours] = number(value, modifier, theirs)
    return settings


def _group_ends(value: Any, modifier: Modifier) -> dict[str, float]:
    """Final sparsities by group: {0.8: [names], 0.9: [names]}."""
    if not isinstance(value, Mapping):
        return {}
    groups: dict[str, float] = {}
    for sparsity, names in value.items():
        try:
            share = float(sparsity)
        except ValueError:
            raise RecipeError(
                f"{modifier.name}: {sparsity!r:.40} is not a sparsity between 0 and 1 [{modifier.where}]"
            ) from None
        chosen = selectors(names, modifier, "final_sparsity")
        if chosen is None:  # all layers that no other group names
            groups = {"*": share, **groups}
        else:
            groups |= dict.fromkeys(chosen, share)
    return groups


def _join(stage: Stage, plan: dict[str, Any], modifier: Modifier) -> None:
    """Add pruning settings to the stage; a second modifier of the same method becomes part of its `ends`."""
    had = stage.settings.get("prune")
    if had is None:
        stage.settings["prune"] = plan
        return
    alike = had["method"] == plan["method"] == "gradual" and had["pattern"] == plan["pattern"]
    if not alike or ":" in had["pattern"]:
        raise RecipeError(
            f"{modifier.name} prunes too: in a span of training there is one pruning method, or several gradual ones "
            f"of one mask_type, not N:M [{modifier.where}]"
        )
    everywhere = not had.get("layers") or not plan.get("layers")
    groups: dict[str, Any] = had.pop("ends", None) or dict.fromkeys(had.get("layers") or ["*"], had["sparsity"])
    groups |= plan.get("ends") or dict.fromkeys(plan.get("layers") or ["*"], plan["sparsity"])
    if any(had[k] != plan[k] for k in ("start", "end", "steps", "first", "schedule")):
        stage.remarks.append(f"{modifier.name} had a span of its own: all groups rise together here, the longer time")
    layers = list(dict.fromkeys([*had.pop("layers", []), *plan.get("layers", [])]))
    first = min(had["first"], plan["first"], *groups.values())
    had |= {"start": min(had["start"], plan["start"]), "end": max(had["end"], plan["end"]),
            "ends": {k: groups[k] for k in sorted(groups, key=lambda k: k != "*")}, "sparsity": max(groups.values()),
            "steps": max(had["steps"], plan["steps"]), "first": first}  # fmt: skip
    if not everywhere:
        had["layers"] = layers
    if had.pop("scope", None) or plan.get("scope"):
        stage.remarks.append(f"{modifier.name}: each layer gets its sparsity here; before, a group shared it")


def _range(draft: Draft, modifier: Modifier, epochs: float) -> None:
    draft.train()


def _rate(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(), draft.train()
    first = options.number("init_lr") if options["init_lr"] is not None else options.number("learning_rate")
    falls = str(options["lr_func"] or options["lr_class"] or "constant")
    schedule = {
        "constant": "constant", "linear": "linear", "cosine": "cosine", "CosineAnnealingWarmRestarts": "cosine",
        "cyclic_linear": "linear", "StepLR": "cosine", "MultiStepLR": "cosine", "ExponentialLR": "cosine",
    }.get(falls, "cosine")  # fmt: skip
    optimizer = stage.settings.setdefault("optimizer", {"name": "adamw"})
    if "lr" in optimizer and first is not None:
        smaller = min(float(first), float(optimizer["lr"]))
        stage.remarks.append(f"{modifier.name}: a rate of {smaller:g} too: a stage has one, the largest")
    last = options.number("end_epoch")
    if falls != "constant" and last is not None and 0 <= last < epochs:
        stage.remarks.append(f"{modifier.name}: the rate falls over all {epochs:g} epochs here, not until {last:g}")
    if first is not None:
        optimizer["lr"] = max(float(first), float(optimizer.get("lr", 0.0)))
        optimizer["name"] = "sgd" if optimizer["lr"] > MAX_ADAM_RATE else "adamw"
    if stage.settings.get("lr_schedule", "constant") == "constant":
        stage.settings["lr_schedule"] = schedule
    if falls not in ("constant", "linear", "cosine"):
        stage.remarks.append(f"{modifier.name}: {falls} is {schedule} here, over all epochs")
    final = options.number("final_lr")
    if final:
        stage.remarks.append(f"{modifier.name}: the rate falls to 0 here, not to {final:g}")
    stage.remarks.append("the optimizer was your script's: it is assumed from the learning rate")
    stage.remarks += options.unmapped(
        *LOG, "start_epoch", "end_epoch", "lr_kwargs", "cycle_epochs", "constant_logging", "update_frequency"
    )


def _decay(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(), draft.train()
    stage.settings.setdefault("optimizer", {"name": "adamw"})["weight_decay"] = options.number("weight_decay")
    if options.number("start_epoch"):
        stage.remarks.append(f"{modifier.name}: from the beginning here, not from epoch {options['start_epoch']:g}")
    stage.remarks += options.unmapped(*LOG, "end_epoch", "constant_logging")


def _logging(draft: Draft, modifier: Modifier, epochs: float) -> None:
    draft.remarks.append(f"{modifier.name}: rows of training go to a file, TensorBoard or W&B with --log")


def _constant(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(), draft.train()
    if "prune" in stage.settings and options.number("start_epoch"):
        stage.remarks.append(f"{modifier.name}: zeros of pruning stay zeros anyway; keep_zeros holds those before it")
        return
    stage.settings["keep_zeros"] = True
    if selectors(options["params"], modifier, "params") is not None:
        stage.remarks.append(f"{modifier.name} held the zeros of some layers: here those of all that are pruned stay")
    stage.remarks += options.unmapped(*LOG, "start_epoch", "end_epoch", "update_frequency")


def _distil(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(hardness=0.5, temperature=2.0), draft.train()
    hard = options.number("hardness")
    stage.settings["distill"] = {
        **stage.settings.get("distill", {}), "task": 1.0 - hard, "logits": float(hard),
        "temperature": float(options.number("temperature")),
    }  # fmt: skip
    stage.remarks.append(TEACHER)
    if options["distill_output_keys"]:
        stage.remarks.append(f"{modifier.name}: all outputs teach, not only {str(options['distill_output_keys'])[:60]}")
    stage.remarks += options.unmapped(*LOG, "start_epoch", "end_epoch", "update_frequency", "teacher_input_keys")


def _hidden(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(gain=1.0, normalize=True), draft.train()
    distill = stage.settings.setdefault("distill", {"task": 1.0, "logits": 0.0})
    distill |= {
        "hidden": "squarehead" if options["normalize"] else "mse",
        "hidden_weight": float(options.number("gain")),
    }
    names = [options[k] for k in ("student_layer_names", "student_names", "target_layers") if options[k]]
    if names:
        distill["at"] = selectors(names[0], modifier, "student_layer_names")
    others = [options[k] for k in ("teacher_layer_names", "teacher_names") if options[k]]
    if others:
        distill["teacher_at"] = selectors(others[0], modifier, "teacher_layer_names")
    stage.remarks += options.unmapped(
        *LOG, "start_epoch", "end_epoch", "update_frequency", "epsilon", "project_features", "connect_patterns"
    )


def _quantization(draft: Draft, modifier: Modifier, epochs: float) -> None:
    """Translate quantization-aware training, from the start of the modifier on."""
    options, stage = modifier.take(), draft.train()
    start, _ = _span(options, epochs)
    bits, activations = 8, True
    scheme = options["scheme"]
    if isinstance(scheme, Mapping):
        weights, inputs = mapping(scheme.get("weights"), modifier, "weights"), scheme.get("input_activations")
        bits, activations = int(number(weights.get("num_bits", 8), modifier, "num_bits")), inputs is not None
    stage.settings["quantize"] = {"weights": f"int{bits}", "start": min(start, 0.99)}
    ignore, remarks = ignored(options)
    stage.remarks += remarks
    if options["submodules"]:
        parts = name_list(options["submodules"], modifier, "submodules")
        stage.settings["quantize"]["layers"] = [f"re:{re.escape(n)}(\\..*)?" for n in parts]
    classes = options["exclude_module_types"]
    if classes:
        ignore = [*(ignore or []), *name_list(classes, modifier, "exclude_module_types")]
        stage.remarks.append(f"{modifier.name}: of excluded classes those without layers to quantize have to go")
    if ignore:
        stage.settings["quantize"]["ignore"] = ignore
    if activations:
        stage.remarks.append(
            f"{modifier.name} quantized inputs too: activations int8 uses a scale per row, int8-static a calibrated one"
        )
        stage.settings["quantize"]["activations"] = "int8"
    stage.remarks += options.unmapped(
        *LOG, "end_epoch", "model_fuse_fn_name", "reduce_range", "tensorrt", "scheme_overrides"
    )


def _structured(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options = modifier.take()
    last = options["final_sparsity"] if options["final_sparsity"] is not None else options["sparsity"]
    sparsity = fraction(last, modifier, "final_sparsity")
    remarks = [
        f"{modifier.name} made units zero on the way and removed them later: here they are cut at once, then trained"
    ]
    layers = selectors(options["params"], modifier, "params")
    known_ones = (
        "start_epoch", "end_epoch", "update_frequency", "init_sparsity", "inter_func", "mask_type", "score_type",
        "param_group_dependency_map", "leave_enabled", "global_sparsity",
    )  # fmt: skip
    settings: dict[str, Any] = {"keep": round(1.0 - sparsity, 6)}
    if layers is not None:
        settings["layers"] = layers
    draft.stages.insert(0, Stage("cut", settings, remarks + options.unmapped(*LOG, *known_ones)))
    draft.train()


def _thinning(draft: Draft, modifier: Modifier, epochs: float) -> None:
    if not any(s.name == "cut" for s in draft.stages):
        draft.remarks.append(f"{modifier.name} has no effect: no stage of this recipe cuts units")


def _blocks(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options = modifier.take()
    layers = options["layers"]
    count = options.number("num_layers")
    names = name_list(layers, modifier, "layers") if layers is not None else []
    remark = (
        f"{modifier.name} dropped {', '.join(names)[:80] or count} by name: here those whose outputs change least go"
    )
    settings: dict[str, Any] = {"units": ["layer"], "keep": 0.5}
    draft.stages.insert(0, Stage("cut", settings, [remark, "set keep to the share of blocks that stays"]))
    draft.remarks += options.unmapped(*LOG, "start_epoch", "end_epoch", "update_frequency")
    draft.train()


METHODS = {  # pruning methods of modifiers: those of one method can share a stage
    "GMPruningModifier": "gradual", "MagnitudePruningModifier": "gradual", "GlobalMagnitudePruningModifier": "gradual",
    "ACDCPruningModifier": "alternate", "MFACPruningModifier": "second-order", "OBSPruningModifier": "second-order",
    "MovementPruningModifier": "movement", "RigLPruningModifier": "rigl",
}  # fmt: skip
HANDLERS: dict[str, Callable[[Draft, Modifier, float], None]] = {
    "EpochRangeModifier": _range,
    "SetLearningRateModifier": _rate,
    "LearningRateModifier": _rate,
    "LearningRateFunctionModifier": _rate,
    "SetWeightDecayModifier": _decay,
    "SparsificationLoggingModifier": _logging,
    **{name: _plan(method, "global" if "Global" in name else None) for name, method in METHODS.items()},
    "ConstantPruningModifier": _constant,
    "StructuredPruningModifier": _structured,
    "LayerThinningModifier": _thinning,
    "LayerPruningModifier": _blocks,
    "QuantizationModifier": _quantization,
    "DistillationModifier": _distil,
    "PerLayerDistillationModifier": _hidden,
}
FREEZE = "set requires_grad_(False) in Python and train with rarefy.fit_ or rarefy.Sparsifier, which leave such alone"
UNSUPPORTED = {
    "TrainableParamsModifier": FREEZE,
    "SetParamModifier": "it sets any attribute of a model; do that in Python, before rarefy.compress_",
    "GradualParamModifier": "it moves any attribute of a model; do that in a loop of your own, with rarefy.Sparsifier",
    "TopKASTPruningModifier": "nearest is method: rigl (RigLPruningModifier), sparse from the first step on",
    "PowerpropagationModifier": "it trains powers of weights; nearest is method: movement (MovementPruningModifier)",
    "ASRegModifier": "it makes activations sparse, which no engine here skips; nearest is to leave it out",
}  # fmt: skip
