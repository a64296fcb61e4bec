"""SparseML's later recipes and llm-compressor's -> stages `prune`, `quantize`, `train`: one modifier, one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration.recipe_draft import (
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
    solver,
    steps,
)
from rarefy.migration.sparseml import pattern_of

# what a scheme's name means: bits of weights, width of a group (None: an output), symmetric, bits of inputs
SCHEMES: dict[str, tuple[int, int | None, bool, int | None]] = {
    "W8A8": (8, None, True, 8),
    "INT8": (8, None, True, 8),
    "W8A16": (8, None, True, None),
    "W4A16": (4, 128, True, None),
    "W4A16_ASYM": (4, 128, False, None),
    "W4A8": (4, 128, True, 8),
}
# settings that say how the other tool works, not what comes out
PRIVATE = (
    "sequential_update", "sequential_targets", "offload_hessians", "offload_device", "block_size", "update_size",
    "use_sequential_mse", "kv_cache_scheme", "num_calibration_steps", "calibration_function", "batch_size", "observer",
    "disable_quantization_observer_epoch", "bypass_divisibility_checks", "preserve_sparsity_mask",
)  # fmt: skip


def convert(draft: Draft, parts: Sequence[Part], skip: bool) -> None:
    """Add what modifiers ask for to a draft, in order. RecipeError for one that has no counterpart, unless `skip`."""
    smooth: list[Part] = []
    times = [
        float(v) for p in parts for k in ("end", "start") if isinstance(v := p.settings.get(k), int | float) and v > 0
    ]
    epochs = max([1.0, *times])
    for part in parts:
        if refused(draft, part, (HANDLERS, ("SmoothQuantModifier",)), REFUSED, "modifier", skip):
            continue
        if part.name == "SmoothQuantModifier":
            smooth.append(part)
        else:
            before = len(draft.stages)
            HANDLERS[part.name](draft, part, epochs)
            made = [s for s in draft.stages[before:] if s.name == "quantize"]
            if smooth and made:
                _smooth(made, smooth.pop())
    if smooth:
        raise RecipeError(
            "SmoothQuantModifier moves outliers ahead of quantization, and no modifier after it quantizes "
            f"[{smooth[0].where}]"
        )


def _smooth(stages: Sequence[Stage], part: Part) -> None:
    taken = part.take(smoothing_strength=0.5)
    for stage in stages:
        stage.settings["smooth"] = float(taken.number("smoothing_strength"))
    if taken["mappings"]:
        stages[0].remarks.append(
            "SmoothQuantModifier: which norms take part is found from the model, not from mappings"
        )
    stages[0].remarks += taken.left(*PRIVATE, "ignore")


def _where(taken: Taken, settings: dict[str, Any]) -> None:
    layers = selectors(taken["targets"], taken.part, "targets")
    ignore = selectors(taken["ignore"], taken.part, "ignore")
    if layers:
        settings["layers"] = layers
    if ignore:
        settings["ignore"] = ignore


def _one_shot(by: str | None) -> Callable[[Draft, Part, float], None]:
    def handle(draft: Draft, part: Part, epochs: float) -> None:
        taken = part.take(mask_structure="0:0")
        pattern = pattern_of(taken["mask_structure"], part)
        more: dict[str, Any] = {}
        remarks: list[str] = []
        sparsity = taken["sparsity"]
        if isinstance(sparsity, list):
            if not sparsity:
                raise RecipeError(f"{part.name}: sparsity is a number or one for each layer, got [] [{part.where}]")
            numbers = [number(s, part, "sparsity") for s in sparsity]
            sparsity = round(sum(numbers) / len(numbers), 6)
            more["allocate"] = "errors"
            remarks.append(f"{part.name} had a sparsity for each layer: here their mean is spread by measured errors")
        asked = None if ":" in pattern else number(sparsity, part, "sparsity")
        settings = {**shape(pattern, asked), **more}
        settings |= {"score": "wanda"} if by is None else {"solver": solver(by, taken)}
        profile = taken["sparsity_profile"]
        if profile == "owl" and "sparsity" in settings:
            settings["allocate"] = "owl"
            remarks += [
                f"{part.name}: owl has its own constants here" for k in ("owl_m", "owl_lmbda") if taken[k] is not None
            ][:1]
        elif profile is not None:
            remarks.append(f"{part.name}: no counterpart of sparsity_profile {str(profile)[:40]} with this pattern")
        _where(taken, settings)
        if taken["quantize"]:
            remarks.append(
                f"{part.name}: quantize it in a stage of its own, or pattern: in a stage quantize does both at once"
            )
        draft.add("prune", settings, remarks + taken.left(*PRIVATE))

    return handle


def _magnitude(draft: Draft, part: Part, epochs: float) -> None:
    taken = part.take(
        init_sparsity=0.0, mask_structure="unstructured", start=0.0, update_scheduler="cubic", leave_enabled=True
    )
    pattern = pattern_of(taken["mask_structure"], part)
    start = float(taken.number("start"))
    last = ends(taken, start, taken.number("end"), epochs)
    stage = draft.train()
    final = number(taken["final_sparsity"], part, "final_sparsity")
    plan: dict[str, Any] = {"method": "gradual", **shape(pattern, final)}
    plan["first"] = min(float(taken.number("init_sparsity")), plan.get("sparsity", 0.0))
    plan |= {"start": start / epochs, "end": last / epochs}
    every = taken.number("update_frequency")
    plan["steps"] = steps((last - start) / every) if every else 50
    plan["schedule"] = curve(taken, "update_scheduler", stage)
    if taken["apply_globally"] and pattern == "unstructured":
        plan["scope"] = "global"
    _where(taken, plan)
    grows_back(taken, stage)
    stage.remarks += taken.left(*PRIVATE, "update_scheduler_args")
    if "prune" in stage.settings:
        raise RecipeError(f"{part.name} is a second one that prunes in training: one plan a stage [{part.where}]")
    stage.settings = {"epochs": max(1, round(epochs)), **stage.settings, "prune": plan}
    stage.remarks.append("the optimizer was your script's: name it here (optimizer: {name: adamw, lr: 1e-5})")


def _constant(draft: Draft, part: Part, epochs: float) -> None:
    taken = part.take()
    if part.run == "oneshot":
        draft.remarks.append(f"{part.name}: zeros stay zeros in later stages anyway")
        return
    stage = draft.train()
    stage.settings["keep_zeros"] = True
    if selectors(taken["targets"], part, "targets") is not None:
        stage.remarks.append(
            f"{part.name} held the zeros of its targets: here those of all layers that are pruned stay"
        )
    stage.remarks += taken.left(*PRIVATE, "start", "end", "update_frequency", "leave_enabled")


def _distil(draft: Draft, part: Part, epochs: float) -> None:
    taken, stage = part.take(orig_scale=1.0, distill_scale=1.0), draft.train()
    stage.settings["distill"] = {
        "task": float(taken.number("orig_scale")), "logits": float(taken.number("distill_scale")),
    }  # fmt: skip
    if taken["targets"]:
        stage.remarks.append(f"{part.name}: logits teach here; add hidden: squarehead for hidden states")
    stage.remarks.append(TEACHER)
    stage.remarks += taken.left(*PRIVATE, "start", "end", "transforms", "comparison")


def _quantize(by: str | None) -> Callable[[Draft, Part, float], None]:
    def handle(draft: Draft, part: Part, epochs: float) -> None:
        taken = part.take()
        groups = _groups(taken)
        ignore = selectors(taken["ignore"], part, "ignore")
        remarks = taken.left(
            *PRIVATE, "actorder", "dampening_frac", "targets", "scheme", "config_groups", "iters", "submodules"
        )
        for settings, more in groups:
            if by is not None:
                settings["solver"] = solver(by, taken)
            if ignore:
                settings["ignore"] = ignore
            draft.add("quantize", settings, [*more, *remarks])
            remarks = []

    return handle


def _groups(taken: Taken) -> list[tuple[dict[str, Any], list[str]]]:
    """Settings of a stage for each group of layers that has a scheme."""
    part, groups, scheme = taken.part, taken["config_groups"], taken["scheme"]
    found: list[tuple[dict[str, Any], list[str]]] = []
    if groups is not None:
        for name, group in mapping(groups, part, "config_groups").items():
            found.append(_group(mapping(group, part, f"config_groups.{name}"), part))
    elif isinstance(scheme, Mapping):
        for name, targets in scheme.items():
            found.append(_named(str(name), targets, part))
    else:
        found.append(_named(str(scheme or "W8A8"), taken["targets"], part))
    return found


def _named(scheme: str, targets: Any, part: Part) -> tuple[dict[str, Any], list[str]]:
    if scheme.upper() not in SCHEMES:
        kinds = ", ".join(SCHEMES)
        raise RecipeError(
            f"{part.name}: scheme {scheme[:40]} is not of whole numbers; there are {kinds} [{part.where}]"
        )
    bits, group, symmetric, inputs = SCHEMES[scheme.upper()]
    return _settings(bits, group, symmetric, inputs, True, targets, part)


def _group(group: Mapping[str, Any], part: Part) -> tuple[dict[str, Any], list[str]]:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise RecipeError(f"{part.name}: a group of layers has weights: {{num_bits: 4, ...}} [{part.where}]")
    for of in (weights, inputs):
        if isinstance(of, Mapping) and of.get("type", "int") != "int":
            raise RecipeError(
                f"{part.name}: numbers of type {of['type']!r:.20} have no counterpart; int has [{part.where}]"
            )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("channel", "tensor", "group"):
        raise RecipeError(
            f"{part.name}: no counterpart of strategy {str(strategy)[:30]}; channel, tensor, group have [{part.where}]"
        )
    width: Any = {"channel": None, "tensor": "tensor"}.get(str(strategy), weights.get("group_size") or 128)
    bits = int(number(weights.get("num_bits", 8), part, "num_bits"))
    rounded = int(number(inputs.get("num_bits", 8), part, "num_bits")) if isinstance(inputs, Mapping) else None
    dynamic = not isinstance(inputs, Mapping) or bool(inputs.get("dynamic"))
    made, remarks = _settings(
        bits, width, weights.get("symmetric") is not False, rounded, dynamic, group.get("targets"), part
    )
    if group.get("output_activations"):
        remarks.append(f"{part.name}: outputs are not rounded here")
    return made, remarks


def _settings(
    bits: int, group: Any, symmetric: bool, inputs: int | None, dynamic: bool, targets: Any, part: Part
) -> tuple[dict[str, Any], list[str]]:
    if not 2 <= bits <= 8 or inputs not in (None, 8):
        raise RecipeError(f"{part.name}: weights have 2 to 8 bits and inputs 8; got {bits} and {inputs} [{part.where}]")
    made: dict[str, Any] = {"weights": f"int{bits}"}
    if group is not None:
        made["group"] = group
    if not symmetric:
        made["symmetric"] = False
    if inputs is not None:
        made["activations"] = "int8" if dynamic else "int8-static"
    layers = selectors(targets, part, "targets")
    if layers:
        made["layers"] = layers
    remarks = (
        [f"{part.name}: a group of {group} has to divide the inputs of every layer"] if isinstance(group, int) else []
    )
    return made, remarks


HANDLERS: dict[str, Callable[[Draft, Part, float], None]] = {
    "ConstantPruningModifier": _constant,
    "MagnitudePruningModifier": _magnitude,
    "SparseGPTModifier": _one_shot("obs"),
    "WandaPruningModifier": _one_shot(None),
    "GPTQModifier": _quantize("obs"),
    "QuantizationModifier": _quantize(None),
    "LegacyQuantizationModifier": _quantize(None),
    "AutoRoundModifier": _quantize("round"),
    "OutputDistillationModifier": _distil,
}
REFUSED = {
    "LogarithmicEqualizationModifier": "nearest is smooth: 0.5 in a stage quantize (SmoothQuantModifier)",
    "AWQModifier": "nearest is solver: obs in a stage quantize (GPTQModifier), which loses less at 4 bits",
    "SpinQuantModifier": "it rotates weights; nearest is solver: obs in a stage quantize",
    "QuIPModifier": "it rotates weights; nearest is solver: obs in a stage quantize",
    "IMatrixGatherer": "it weighs errors by inputs, as solver: obs does",
    "KVCacheModifier": "keys and values are not rounded here",
}
