"""Translate SparseML's later recipes and llm-compressor's: each modifier becomes a prune, quantize or train stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration.recipe_draft import (
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
    note_regrowth,
    number,
    selectors,
    shape,
    solver,
    steps,
)
from rarefy.migration.sparseml import pattern_of

# scheme name -> weight bits, group size (None: per output), symmetric, activation bits
SCHEMES: dict[str, tuple[int, int | None, bool, int | None]] = {
    "W8A8": (8, None, True, 8),
    "INT8": (8, None, True, 8),
    "W8A16": (8, None, True, None),
    "W4A16": (4, 128, True, None),
    "W4A16_ASYM": (4, 128, False, None),
    "W4A8": (4, 128, True, 8),
}
# settings that do not change the result
PRIVATE = (
    "sequential_update", "sequential_targets", "offload_hessians", "offload_device", "block_size", "update_size",
    "use_sequential_mse", "kv_cache_scheme", "num_calibration_steps", "calibration_function", "batch_size", "observer",
    "disable_quantization_observer_epoch", "bypass_divisibility_checks", "preserve_sparsity_mask", "target_ids",
    "post_oneshot_calibration", "log_types", "init_sparsity",
)  # fmt: skip


def convert(draft: Draft, modifiers: Sequence[Modifier], skip: bool) -> None:
    """Add the counterparts of modifiers to a draft, in order. RecipeError for one without, unless `skip`."""
    tables = (HANDLERS, ("SmoothQuantModifier",))
    supported = [m for m in modifiers if not is_unsupported(draft, m, tables, UNSUPPORTED, "modifier", skip)]
    times = [
        float(v)
        for m in supported
        for k in ("end", "start")
        if isinstance(v := m.settings.get(k), int | float) and v > 0
    ]
    epochs = max([1.0, *times])
    for stage in dict.fromkeys(m.stage for m in supported):
        _convert_stage(draft, [m for m in supported if m.stage == stage], epochs)
    last = max((i for i, s in enumerate(draft.stages) if s.name != "quantize"), default=0)
    early = [s for s in draft.stages[:last] if s.name == "quantize"]
    if early:
        draft.stages = [*(s for s in draft.stages if s not in early), *early]
        early[0].remarks.append("these layers were quantized before they were pruned or trained: here at the end")


def _convert_stage(draft: Draft, modifiers: Sequence[Modifier], epochs: float) -> None:
    """Add the modifiers of one stage: those that prune or train first, since quantized weights cannot be pruned."""
    quantizers = [m for m in modifiers if m.name in QUANTIZERS]
    smooth = [m for m in modifiers if m.name == "SmoothQuantModifier"]
    for modifier in modifiers:
        if modifier not in quantizers and modifier not in smooth:
            HANDLERS[modifier.name](draft, modifier, epochs)
    before = len(draft.stages)
    schemes = [
        m for m in quantizers if m.name in SCHEME_ONLY or m.settings.get("scheme") or m.settings.get("config_groups")
    ]
    for modifier in schemes or quantizers:
        HANDLERS[modifier.name](draft, modifier, epochs)
    stages = draft.stages[before:]
    if schemes:  # modifiers without a scheme quantize by that of the others
        _refine(stages, [m for m in quantizers if m not in schemes], modifiers)
    if smooth and stages:
        _smooth(stages, smooth[-1])
    elif smooth:
        raise RecipeError(
            "SmoothQuantModifier moves outliers ahead of quantization, and no modifier of its stage quantizes "
            f"[{smooth[0].where}]"
        )


def _refine(stages: Sequence[Stage], solvers: Sequence[Modifier], modifiers: Sequence[Modifier]) -> None:
    """Add the solver of modifiers that quantize by the scheme of another one."""
    solvers = [
        *solvers,
        *(m for m in modifiers if m.name == "SparseGPTModifier" and m.settings.get("quantize") is True),
    ]
    for stage in stages if solvers else ():
        if stage.settings.get("layers") != ["Embedding"]:
            stage.settings.setdefault("solver", solver("obs", solvers[0].take()))


def _smooth(stages: Sequence[Stage], modifier: Modifier) -> None:
    options = modifier.take(smoothing_strength=0.5)
    for stage in stages:
        stage.settings["smooth"] = float(options.number("smoothing_strength"))
    if options["mappings"]:
        stages[0].remarks.append(
            "SmoothQuantModifier: which norms are scaled is found from the model, not from mappings"
        )
    stages[0].remarks += options.unmapped(*PRIVATE, "ignore")


def _where(options: ModifierOptions, settings: dict[str, Any]) -> None:
    layers = selectors(options["targets"], options.modifier, "targets")
    ignore, _ = ignored(options)
    if layers:
        settings["layers"] = layers
    if ignore:
        settings["ignore"] = ignore


def _one_shot(by: str | None) -> Callable[[Draft, Modifier, float], None]:
    def handle(draft: Draft, modifier: Modifier, epochs: float) -> None:
        options = modifier.take(
            mask_structure=f"{modifier.settings.get('prunen') or 0}:{modifier.settings.get('prunem') or 0}"
        )
        pattern = pattern_of(options["mask_structure"], modifier)
        more: dict[str, Any] = {}
        remarks: list[str] = []
        sparsity = options["sparsity"] if options["sparsity"] is not None else options["final_sparsity"]
        if isinstance(sparsity, list):
            if not sparsity:
                raise RecipeError(
                    f"{modifier.name}: expected sparsity as a number or one per layer, got [] [{modifier.where}]"
                )
            numbers = [fraction(s, modifier, "sparsity") for s in sparsity]
            sparsity = round(sum(numbers) / len(numbers), 6)
            more["allocate"] = "errors"
            remarks.append(
                f"{modifier.name} had a sparsity for each layer: here their mean is spread by measured errors"
            )
        target = None if ":" in pattern else fraction(sparsity, modifier, "sparsity")
        settings = {**shape(pattern, target), **more}
        settings |= {"score": "wanda"} if by is None else {"solver": solver(by, options)}
        profile = options["sparsity_profile"]
        if profile == "owl" and "sparsity" in settings:
            settings["allocate"] = "owl"
            remarks += [
                f"{modifier.name}: owl has its own constants here"
                for k in ("owl_m", "owl_lmbda")
                if options[k] is not None
            ][:1]
        elif profile is not None:
            remarks.append(f"{modifier.name}: no counterpart of sparsity_profile {str(profile)[:40]} with this pattern")
        _where(options, settings)
        if options["quantize"]:
            remarks.append(f"{modifier.name}: a stage quantize of its own follows, or has to be added")
        draft.add("prune", settings, remarks + options.unmapped(*PRIVATE, "prunen", "prunem", "percdamp"))

    return handle


def _magnitude(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options = modifier.take(
        init_sparsity=0.0, mask_structure="unstructured", start=0.0, update_scheduler="cubic", leave_enabled=True
    )
    pattern = pattern_of(options["mask_structure"], modifier)
    start = float(options.number("start"))
    last = end_of_span(options, start, options.number("end"), epochs)
    stage = draft.train()
    final = number(options["final_sparsity"], modifier, "final_sparsity")
    plan: dict[str, Any] = {"method": "gradual", **shape(pattern, final)}
    plan["first"] = min(float(options.number("init_sparsity")), plan.get("sparsity", 0.0))
    plan |= {"start": start / epochs, "end": last / epochs}
    every = options.number("update_frequency")
    plan["steps"] = steps((last - start) / every) if every else 50
    plan["schedule"] = curve(options, "update_scheduler", stage)
    if options["apply_globally"] and pattern == "unstructured":
        plan["scope"] = "global"
    _where(options, plan)
    note_regrowth(options, stage)
    stage.remarks += options.unmapped(*PRIVATE, "update_scheduler_args")
    if "prune" in stage.settings:
        raise RecipeError(f"{modifier.name} prunes in training too: a stage has one pruning method [{modifier.where}]")
    stage.settings = {"epochs": max(1, round(epochs)), **stage.settings, "prune": plan}
    stage.remarks.append("the optimizer was your script's: name it here (optimizer: {name: adamw, lr: 1e-5})")


def _constant(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options = modifier.take()
    if modifier.run == "oneshot":
        draft.remarks.append(f"{modifier.name}: zeros stay zeros in later stages anyway")
        return
    stage = draft.train()
    stage.settings["keep_zeros"] = True
    if selectors(options["targets"], modifier, "targets") is not None:
        stage.remarks.append(
            f"{modifier.name} held the zeros of its targets: here those of all layers that are pruned stay"
        )
    stage.remarks += options.unmapped(*PRIVATE, "start", "end", "update_frequency", "leave_enabled")


def _distil(draft: Draft, modifier: Modifier, epochs: float) -> None:
    options, stage = modifier.take(orig_scale=1.0, distill_scale=1.0), draft.train()
    stage.settings["distill"] = {
        "task": float(options.number("orig_scale")), "logits": float(options.number("distill_scale")),
    }  # fmt: skip
    if options["targets"]:
        stage.remarks.append(f"{modifier.name}: logits teach here; add hidden: squarehead for hidden states")
    stage.remarks.append(TEACHER)
    stage.remarks += options.unmapped(*PRIVATE, "start", "end", "transforms", "comparison")


def _quantize(by: str | None) -> Callable[[Draft, Modifier, float], None]:
    def handle(draft: Draft, modifier: Modifier, epochs: float) -> None:
        options = modifier.take()
        groups = _groups(options)
        ignore, remarks = ignored(options)
        if options["start"] is not None:
            remarks.append(f"{modifier.name} began in training, at {options['start']}: here when training has ended")
        remarks += options.unmapped(
            *PRIVATE, "actorder", "dampening_frac", "percdamp", "targets", "scheme", "config_groups", "iters",
            "submodules",
        )  # fmt: skip
        for settings, more in groups:
            if by is not None:
                settings["solver"] = solver(by, options)
            if ignore:
                settings["ignore"] = ignore
            draft.add("quantize", settings, [*more, *remarks])
            remarks = []

    return handle


def _groups(options: ModifierOptions) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the stage settings of each group of layers with its own scheme."""
    modifier, groups, scheme = options.modifier, options["config_groups"], options["scheme"]
    linear, remarks = _overrides(options)
    stages: list[tuple[dict[str, Any], list[str]]] = []
    if groups is not None:
        for name, group in mapping(groups, modifier, "config_groups").items():
            stages.append(_group(mapping(group, modifier, f"config_groups.{name}"), modifier))
    elif isinstance(scheme, Mapping) and "weights" in scheme:  # of early recipes
        stages.append(_group({**scheme, "targets": options["targets"]}, modifier))
    elif scheme is None and linear is not None:
        stages.append(_group(linear, modifier))
    elif isinstance(scheme, Mapping):
        for name, targets in scheme.items():
            stages.append(_named(str(name), targets, modifier))
    else:
        stages.append(_named(str(scheme or "W8A8"), options["targets"], modifier))
    return [(settings, [*more, *remarks]) for settings, more in stages]


def _overrides(options: ModifierOptions) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Return the scheme that early recipes have for linear layers in `scheme_overrides`, and remarks on the others.

    Inputs are rounded to 8 bits by default there; `input_activations: null` keeps them.
    """
    overrides = mapping(options["scheme_overrides"], options.modifier, "scheme_overrides")
    weighted = {k: v for k, v in overrides.items() if isinstance(v, Mapping) and v.get("weights")}
    linear = weighted.pop("Linear", None)
    if linear and "input_activations" not in linear:
        linear = {**linear, "input_activations": {"num_bits": 8, "dynamic": True}}
    remarks = [f"{options.modifier.name}: no counterpart of scheme_overrides of {', '.join(weighted)[:80]}"]
    return linear and {**linear, "targets": ["Linear"]}, remarks if weighted else []


def _named(scheme: str, targets: Any, modifier: Modifier) -> tuple[dict[str, Any], list[str]]:
    if scheme.upper() not in SCHEMES:
        kinds = ", ".join(SCHEMES)
        raise RecipeError(
            f"{modifier.name}: scheme {scheme[:40]} is not an integer scheme; supported are {kinds} [{modifier.where}]"
        )
    bits, group, symmetric, inputs = SCHEMES[scheme.upper()]
    return _settings(bits, group, symmetric, inputs, True, targets, modifier)


def _group(group: Mapping[str, Any], modifier: Modifier) -> tuple[dict[str, Any], list[str]]:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise RecipeError(
            f"{modifier.name}: expected weights: {{num_bits: 4, ...}} for each group of layers [{modifier.where}]"
        )
    for of in (weights, inputs):
        if isinstance(of, Mapping) and of.get("type", "int") != "int":
            raise RecipeError(
                f"{modifier.name}: numbers of type {of['type']!r:.20} are not supported; int is [{modifier.where}]"
            )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("channel", "tensor", "group"):
        raise RecipeError(
            f"{modifier.name}: no counterpart of strategy {str(strategy)[:20]}; use channel, tensor, group "
            f"[{modifier.where}]"
        )
    width: Any = {"channel": None, "tensor": "tensor"}.get(str(strategy), weights.get("group_size") or 128)
    bits = int(number(weights.get("num_bits", 8), modifier, "num_bits"))
    rounded = int(number(inputs.get("num_bits", 8), modifier, "num_bits")) if isinstance(inputs, Mapping) else None
    dynamic = not isinstance(inputs, Mapping) or bool(inputs.get("dynamic"))
    settings, remarks = _settings(
        bits, width, weights.get("symmetric") is not False, rounded, dynamic, group.get("targets"), modifier
    )
    if group.get("output_activations"):
        remarks.append(f"{modifier.name}: outputs are not rounded here")
    return settings, remarks


def _settings(
    bits: int, group: Any, symmetric: bool, inputs: int | None, dynamic: bool, targets: Any, modifier: Modifier
) -> tuple[dict[str, Any], list[str]]:
    if not 2 <= bits <= 8 or inputs not in (None, 8):
        raise RecipeError(
            f"{modifier.name}: weights have 2 to 8 bits and inputs 8; got {bits} and {inputs} [{modifier.where}]"
        )
    settings: dict[str, Any] = {"weights": f"int{bits}"}
    if group is not None:
        settings["group"] = group
    if not symmetric:
        settings["symmetric"] = False
    if inputs is not None:
        settings["activations"] = "int8" if dynamic else "int8-static"
    layers = selectors(targets, modifier, "targets")
    if layers:
        settings["layers"] = layers
    remarks = (
        [f"{modifier.name}: a group of {group} has to divide the inputs of every layer"]
        if isinstance(group, int)
        else []
    )
    return settings, remarks


HANDLERS: dict[str, Callable[[Draft, Modifier, float], None]] = {
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
QUANTIZERS = ("GPTQModifier", "QuantizationModifier", "LegacyQuantizationModifier", "AutoRoundModifier")
SCHEME_ONLY = ("QuantizationModifier", "LegacyQuantizationModifier")  # they have a scheme even where they name none
UNSUPPORTED = {
    "LogarithmicEqualizationModifier": "nearest is smooth: 0.5 in a stage quantize (SmoothQuantModifier)",
    "AWQModifier": "nearest is solver: obs in a stage quantize (GPTQModifier), which loses less at 4 bits",
    "SpinQuantModifier": "it rotates weights; nearest is solver: obs in a stage quantize",
    "QuIPModifier": "it rotates weights; nearest is solver: obs in a stage quantize",
    "IMatrixGatherer": "it weighs errors by inputs, as solver: obs does",
    "KVCacheModifier": "keys and values are not rounded here",
}
