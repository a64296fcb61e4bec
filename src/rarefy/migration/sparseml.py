"""SparseML's recipes that train (27 legacy modifiers) -> one stage `train`, with cuts ahead of it.

A legacy recipe is a timeline in epochs: each modifier has its start and end. Here training has a number of epochs, and
what happens on the way a start and end between 0 and 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration.recipe_draft import (
    MOST_STEPS,
    TEACHER,
    Draft,
    Part,
    Stage,
    Taken,
    curve,
    ends,
    grows_back,
    mapping,
    number,
    refused,
    selectors,
    shape,
    steps,
    words,
)

LOG = ("log_types",)


def convert(draft: Draft, parts: Sequence[Part], skip: bool) -> None:
    """Add what legacy modifiers ask for to a draft. RecipeError for one that has no counterpart, unless `skip`."""
    left = [p for p in parts if not refused(draft, p, (HANDLERS,), REFUSED, "modifier", skip)]
    epochs = _epochs(parts)
    for part in sorted(left, key=lambda p: list(HANDLERS).index(p.name)):
        HANDLERS[part.name](draft, part, epochs)
    for stage in draft.stages:
        if stage.name == "train":
            stage.settings = {"epochs": max(1, math.ceil(epochs)), **stage.settings}
            if "optimizer" not in stage.settings:
                stage.remarks.append("the optimizer was your script's: name it here (optimizer: {name: sgd, lr: 0.01})")


def _epochs(parts: Sequence[Part]) -> float:
    """How long training is: what EpochRange says, or the latest end of anything."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for part in parts:
        taken = part.take()
        for name in ("end_epoch", "start_epoch"):
            value = taken.number(name)
            if value is not None and value > 0:
                ends[part.name == "EpochRangeModifier"].append(float(value))
    found = ends[True] or ends[False] or [1.0]
    if max(found) > 1e6:
        raise RecipeError(f"training of {max(found):g} epochs [{parts[0].where}]")
    return max(found)


def _span(taken: Taken, epochs: float) -> tuple[float, float]:
    start = max(0.0, taken.number("start_epoch") or 0.0)
    last = ends(taken, start, taken.number("end_epoch"), epochs)
    return min(1.0, start / epochs), min(1.0, last / epochs)


def _steps(taken: Taken, start: float, end: float, epochs: float, stage: Stage) -> int:
    every = taken.number("update_frequency")
    if every is None or every <= 0:
        stage.remarks.append(f"{taken.part.name} pruned at every step: {MOST_STEPS} times in all here")
        return MOST_STEPS
    count = round((end - start) * epochs / every)
    if count > MOST_STEPS:
        stage.remarks.append(f"{taken.part.name} pruned {count:,} times: {MOST_STEPS} here, more changes nothing")
    return steps(count)


def pattern_of(mask_type: Any, part: Part) -> str:
    """Return the pattern that a mask type means."""
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
        f"{part.name}: no pattern of mask {text[:40]!r}; there are {', '.join(named)}, N:M, [R, C] [{part.where}]"
    )


def _plan(method: str, scope: str | None = None) -> Callable[[Draft, Part, float], None]:
    """A handler of modifiers that put zeros in."""

    def handle(draft: Draft, part: Part, epochs: float) -> None:
        taken, stage = part.take(init_sparsity=0.05, leave_enabled=True), draft.train()
        start, end = _span(taken, epochs)
        layers, pattern = selectors(taken["params"], part, "params"), pattern_of(taken["mask_type"], part)
        asked = [taken[k] for k in ("final_sparsity", "compression_sparsity", "sparsity")]
        last = next((s for s in asked if s is not None), None)
        groups = _group_ends(last, part)
        final = max(groups.values()) if groups else number(last, part, "final_sparsity")
        plan: dict[str, Any] = {"method": method, **shape(pattern, final)}
        shared = taken["global_sparsity"]
        together = scope == "global" if shared is None else bool(shared)
        if together and (pattern == "unstructured" or "x" in pattern):
            plan["scope"] = "global"
        if method in ("gradual", "movement", "second-order"):
            first = taken.number("init_sparsity")
            plan["first"] = min(float(first or 0.0), float(plan.get("sparsity", 0.0)))
            plan["steps"] = _steps(taken, start, end, epochs, stage)
            plan["schedule"] = curve(taken, "inter_func", stage)
        elif method == "rigl":
            plan["steps"] = _steps(taken, start, end, epochs, stage)
        if method == "alternate":
            every = taken.number("update_frequency") or 5
            plan["cycles"] = max(1, round((end - start) * epochs / (2 * every)))
        plan |= {"start": start, "end": end}
        if method == "second-order":
            plan |= {k: v for k, v in {
                "gradients": taken.number("num_grads"), "block": taken.number("fisher_block_size"),
                "damp": taken.number("damp"),
            }.items() if v is not None}  # fmt: skip
        if layers is not None:
            plan["layers"] = layers
        if groups:
            stage.remarks.append(f"{part.name} had a sparsity for each group of layers: see ends")
            plan["ends"] = groups
        grows_back(taken, stage)
        stage.remarks += taken.left(
            *LOG, "phased", "score_type", "num_recomputations", "grad_sampler_kwargs", "num_pages"
        )
        score = taken.given.get("score_type")
        if score not in (None, "magnitude"):
            stage.remarks.append(f"{part.name}: score_type {str(score)[:40]} is the method's own here")
        _join(stage, plan, part)

    return handle


def _group_ends(value: Any, part: Part) -> dict[str, float]:
    """Final sparsities by group: {0.8: [names], 0.9: [names]}."""
    if not isinstance(value, Mapping):
        return {}
    found: dict[str, float] = {}
    for sparsity, names in value.items():
        try:
            share = float(sparsity)
        except ValueError:
            raise RecipeError(f"{part.name}: {sparsity!r:.40} is no sparsity [{part.where}]") from None
        chosen = selectors(names, part, "final_sparsity")
        if chosen is None:  # all, but for those that others name
            found = {"*": share, **found}
        else:
            found |= dict.fromkeys(chosen, share)
    return found


def _join(stage: Stage, plan: dict[str, Any], part: Part) -> None:
    """Put a plan into the stage; a second one of the same method becomes its `ends`."""
    had = stage.settings.get("prune")
    if had is None:
        stage.settings["prune"] = plan
        return
    alike = had["method"] == plan["method"] == "gradual" and had["pattern"] == plan["pattern"] == "unstructured"
    if not alike or not had.get("layers") or not plan.get("layers"):
        raise RecipeError(
            f"{part.name} is a second one that prunes: one plan a stage, or several gradual ones with params of their "
            f"own [{part.where}]"
        )
    groups = had.pop("ends", None) or {l: had["sparsity"] for l in had["layers"]}
    groups |= plan.get("ends") or {l: plan["sparsity"] for l in plan["layers"]}
    if any(had[k] != plan[k] for k in ("start", "end", "steps", "first", "schedule")):
        stage.remarks.append(f"{part.name} had a span of its own: all groups rise together here, the longer time")
    had |= {"start": min(had["start"], plan["start"]), "end": max(had["end"], plan["end"]), "ends": groups,
            "layers": had["layers"] + plan["layers"], "sparsity": max(groups.values()),
            "steps": max(had["steps"], plan["steps"]), "first": min(had["first"], plan["first"])}  # fmt: skip
    had.pop("scope", None)


def _range(draft: Draft, part: Part, epochs: float) -> None:
    draft.train()


def _rate(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(), draft.train()
    first = taken.number("init_lr") if taken["init_lr"] is not None else taken.number("learning_rate")
    falls = str(taken["lr_func"] or taken["lr_class"] or "constant")
    schedule = {
        "constant": "constant", "linear": "linear", "cosine": "cosine", "CosineAnnealingWarmRestarts": "cosine",
        "cyclic_linear": "linear", "StepLR": "cosine", "MultiStepLR": "cosine", "ExponentialLR": "cosine",
    }.get(falls, "cosine")  # fmt: skip
    optimizer = stage.settings.setdefault("optimizer", {"name": "adamw"})
    if first is not None:
        optimizer["lr"] = max(float(first), float(optimizer.get("lr", 0.0)))
    if stage.settings.get("lr_schedule", "constant") == "constant":
        stage.settings["lr_schedule"] = schedule
    if falls not in ("constant", "linear", "cosine"):
        stage.remarks.append(f"{part.name}: {falls} is {schedule} here, over all epochs")
    final = taken.number("final_lr")
    if final:
        stage.remarks.append(f"{part.name}: the rate falls to 0 here, not to {final:g}")
    stage.remarks.append("the optimizer was your script's: adamw is assumed")
    stage.remarks += taken.left(
        *LOG, "start_epoch", "end_epoch", "lr_kwargs", "cycle_epochs", "constant_logging", "update_frequency"
    )


def _decay(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(), draft.train()
    stage.settings.setdefault("optimizer", {"name": "adamw"})["weight_decay"] = taken.number("weight_decay")
    if taken.number("start_epoch"):
        stage.remarks.append(f"{part.name}: from the beginning here, not from epoch {taken['start_epoch']:g}")
    stage.remarks += taken.left(*LOG, "end_epoch", "constant_logging")


def _logging(draft: Draft, part: Part, epochs: float) -> None:
    draft.remarks.append(f"{part.name}: rows of training go to a file, TensorBoard or W&B with --log")


def _constant(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(), draft.train()
    stage.settings["keep_zeros"] = True
    if selectors(taken["params"], part, "params") is not None:
        stage.remarks.append(f"{part.name} held the zeros of some layers: here those of all that are pruned stay")
    stage.remarks += taken.left(*LOG, "start_epoch", "end_epoch", "update_frequency")


def _distil(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(hardness=0.5, temperature=2.0), draft.train()
    hard = taken.number("hardness")
    stage.settings["distill"] = {
        **stage.settings.get("distill", {}), "task": 1.0 - hard, "logits": float(hard),
        "temperature": float(taken.number("temperature")),
    }  # fmt: skip
    stage.remarks.append(TEACHER)
    if taken["distill_output_keys"]:
        stage.remarks.append(f"{part.name}: all outputs teach, not only {str(taken['distill_output_keys'])[:60]}")
    stage.remarks += taken.left(*LOG, "start_epoch", "end_epoch", "update_frequency", "teacher_input_keys")


def _hidden(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(gain=1.0, normalize=True), draft.train()
    distill = stage.settings.setdefault("distill", {"task": 1.0, "logits": 0.0})
    distill |= {"hidden": "squarehead" if taken["normalize"] else "mse", "hidden_weight": float(taken.number("gain"))}
    names = [taken[k] for k in ("student_layer_names", "student_names", "target_layers") if taken[k]]
    if names:
        distill["at"] = selectors(names[0], part, "student_layer_names")
    others = [taken[k] for k in ("teacher_layer_names", "teacher_names") if taken[k]]
    if others:
        distill["teacher_at"] = selectors(others[0], part, "teacher_layer_names")
    stage.remarks += taken.left(
        *LOG, "start_epoch", "end_epoch", "update_frequency", "epsilon", "project_features", "connect_patterns"
    )


def _quantization(draft: Draft, part: Part, epochs: float) -> None:
    """QAT: weights on grids from the start of the modifier on."""
    taken, stage = part.take(), draft.train()
    start, _ = _span(taken, epochs)
    bits, activations = 8, True
    scheme = taken["scheme"]
    if isinstance(scheme, Mapping):
        weights, inputs = mapping(scheme.get("weights"), part, "weights"), scheme.get("input_activations")
        bits, activations = int(number(weights.get("num_bits", 8), part, "num_bits")), inputs is not None
    stage.settings["quantize"] = {"weights": f"int{bits}", "start": min(start, 0.99)}
    ignore = selectors(taken["ignore"], part, "ignore")
    if ignore:
        stage.remarks.append(
            f"{part.name}: of ignored names those that match no layer have to go: {', '.join(ignore)[:80]}"
        )
        stage.settings["quantize"]["ignore"] = ignore
    if activations:
        stage.remarks.append(
            f"{part.name} rounded inputs as well: activations: int8 rounds them row by row, int8-static by calibration"
        )
        stage.settings["quantize"]["activations"] = "int8"
    stage.remarks += taken.left(
        *LOG, "end_epoch", "submodules", "model_fuse_fn_name", "freeze_bn_stats_epoch", "quantizer_freeze_epoch",
        "disable_quantization_observer_epoch", "reduce_range", "tensorrt", "scheme_overrides",
    )  # fmt: skip


def _structured(draft: Draft, part: Part, epochs: float) -> None:
    taken = part.take()
    last = taken["final_sparsity"] if taken["final_sparsity"] is not None else taken["sparsity"]
    sparsity = number(last, part, "final_sparsity")
    remarks = [
        f"{part.name} made units zero on the way and removed them later: here they are cut at once, then trained"
    ]
    layers = selectors(taken["params"], part, "params")
    known_ones = (
        "start_epoch", "end_epoch", "update_frequency", "init_sparsity", "inter_func", "mask_type", "score_type",
        "param_group_dependency_map", "leave_enabled", "global_sparsity",
    )  # fmt: skip
    settings: dict[str, Any] = {"keep": round(1.0 - sparsity, 6)}
    if layers is not None:
        settings["layers"] = layers
    draft.stages.insert(0, Stage("cut", settings, remarks + taken.left(*LOG, *known_ones)))
    draft.train()


def _thinning(draft: Draft, part: Part, epochs: float) -> None:
    if not any(s.name == "cut" for s in draft.stages):
        draft.remarks.append(f"{part.name}: what is cut is removed at once, but nothing is cut here")


def _blocks(draft: Draft, part: Part, epochs: float) -> None:
    taken = part.take()
    layers = taken["layers"]
    count = taken.number("num_layers")
    names = words(layers, part, "layers") if layers is not None else []
    remark = f"{part.name} dropped {', '.join(names)[:80] or count} by name: here those whose outputs change least go"
    settings: dict[str, Any] = {"units": ["layer"], "keep": 0.5}
    draft.stages.insert(0, Stage("cut", settings, [remark, "set keep to the share of blocks that stays"]))
    draft.remarks += taken.left(*LOG, "start_epoch", "end_epoch", "update_frequency")
    draft.train()


HANDLERS: dict[str, Callable[[Draft, Part, float], None]] = {
    "EpochRangeModifier": _range,
    "SetLearningRateModifier": _rate,
    "LearningRateModifier": _rate,
    "LearningRateFunctionModifier": _rate,
    "SetWeightDecayModifier": _decay,
    "SparsificationLoggingModifier": _logging,
    "ConstantPruningModifier": _constant,
    "GMPruningModifier": _plan("gradual"),
    "MagnitudePruningModifier": _plan("gradual"),
    "GlobalMagnitudePruningModifier": _plan("gradual", "global"),
    "ACDCPruningModifier": _plan("alternate"),
    "MFACPruningModifier": _plan("second-order"),
    "OBSPruningModifier": _plan("second-order"),
    "MovementPruningModifier": _plan("movement"),
    "RigLPruningModifier": _plan("rigl"),
    "StructuredPruningModifier": _structured,
    "LayerThinningModifier": _thinning,
    "LayerPruningModifier": _blocks,
    "QuantizationModifier": _quantization,
    "DistillationModifier": _distil,
    "PerLayerDistillationModifier": _hidden,
}
FREEZE = "set requires_grad_(False) in Python and train with rarefy.fit_ or rarefy.Sparsifier, which leave such alone"
REFUSED = {
    "TrainableParamsModifier": FREEZE,
    "SetParamModifier": "it sets any attribute of a model; do that in Python, before rarefy.compress_",
    "GradualParamModifier": "it moves any attribute of a model; do that in a loop of your own, with rarefy.Sparsifier",
    "TopKASTPruningModifier": "nearest is method: rigl (RigLPruningModifier), sparse from the first step on",
    "PowerpropagationModifier": "it trains powers of weights; nearest is method: movement (MovementPruningModifier)",
    "ASRegModifier": "it makes activations sparse, which no engine here skips; nearest is to leave it out",
}  # fmt: skip
