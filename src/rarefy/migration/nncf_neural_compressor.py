"""Configs of NNCF before version 3, Intel Neural Compressor and torch.ao.pruning -> stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.common.errors import RecipeError
from rarefy.migration.recipe_draft import Draft, Modifier, is_unsupported, mapping, number, selectors, shape, steps
from rarefy.migration.sparseml import pattern_of

OPTIMIZER = "the optimizer was your script's: name it here (optimizer: {name: adamw, lr: 1e-4})"


def nncf(draft: Draft, config: Mapping[str, Any], skip: bool) -> None:
    """Add what the `compression` of an NNCF config asks for."""
    algorithms = config.get("compression")
    algorithms = [algorithms] if isinstance(algorithms, Mapping) else algorithms
    if not isinstance(algorithms, list) or not all(isinstance(a, Mapping) and "algorithm" in a for a in algorithms):
        raise RecipeError("an NNCF config has compression: {algorithm: ..., params: {...}} or a list of them")
    for nth, one in enumerate(algorithms):
        modifier = Modifier(str(one["algorithm"]), one, f"compression[{nth}]")
        if not is_unsupported(draft, modifier, (NNCF,), NNCF_UNSUPPORTED, "algorithm", skip):
            NNCF[modifier.name](draft, modifier)


def _nncf_where(modifier: Modifier) -> list[str]:
    """Return a remark for each scope: scopes name modules by class and must be rewritten as selectors."""
    scopes = [k for k in ("ignored_scopes", "target_scopes") if modifier.settings.get(k)]
    return [
        f"{modifier.name}: {k} {str(modifier.settings[k])[:80]} must be rewritten as names in ignore or layers"
        for k in scopes
    ]


def _nncf_sparsity(draft: Draft, modifier: Modifier) -> None:
    params = mapping(modifier.settings.get("params"), modifier, "params")
    options = Modifier(modifier.name, params, modifier.where).take(
        sparsity_target=0.5, schedule="exponential", sparsity_freeze_epoch=100
    )
    target = number(options["sparsity_target"], modifier, "sparsity_target")
    method = "gradual" if modifier.name == "magnitude_sparsity" else "movement"
    freeze, turns = options.number("sparsity_freeze_epoch"), options["multistep_steps"] or []
    if not isinstance(turns, list) or any(isinstance(t, bool) or not isinstance(t, int | float) for t in turns):
        raise RecipeError(f"expected multistep_steps as a list of epochs, got {turns!r:.60} [{modifier.where}]")
    epochs = float(max([1, *(turns or [freeze])]))
    until = float(options.number("sparsity_target_epoch") or epochs)
    first = number(modifier.settings.get("sparsity_init") or 0.0, modifier, "sparsity_init")
    curve = str(options["schedule"])
    plan: dict[str, Any] = {
        "method": method, "sparsity": target, "first": min(first, target), "end": min(1.0, until / epochs),
        "steps": steps(until),
        "schedule": {"polynomial": "cubic", "exponential": "exponential"}.get(curve, "linear"),
    }  # fmt: skip
    if modifier.name == "magnitude_sparsity":
        plan["scope"] = "global"
    stage = draft.add("train", {"epochs": max(1, math.ceil(epochs)), "prune": plan}, [OPTIMIZER])
    if curve not in ("polynomial", "exponential"):
        stage.remarks.append(f"{modifier.name}: schedule {curve[:30]} rises in a straight line here")
    if modifier.name == "rb_sparsity":
        stage.remarks.append("rb_sparsity learned masks by a penalty; movement, with penalty:, is nearest")
    if modifier.name == "movement_sparsity":
        stage.remarks.append("movement_sparsity learned thresholds: give penalty: for that, or the sparsity you want")
    stage.remarks += _nncf_where(modifier)
    stage.remarks += options.unmapped(*NNCF_PRIVATE)


NNCF_PRIVATE = (
    "sparsity_level_setting_mode", "update_per_optimizer_step", "steps_per_epoch", "concave", "power", "patience",
    "multistep_sparsity_levels", "weight_importance", "warmup_start_epoch", "warmup_end_epoch",
    "importance_regularization_factor", "enable_structured_masking",
)  # fmt: skip


def _nncf_constant(draft: Draft, modifier: Modifier) -> None:
    stage = draft.add("train", {"keep_zeros": True}, [OPTIMIZER])
    stage.remarks += _nncf_where(modifier)


def _nncf_filters(draft: Draft, modifier: Modifier) -> None:
    params = mapping(modifier.settings.get("params"), modifier, "params")
    options = Modifier(modifier.name, params, modifier.where).take()
    flops, share = options.number("pruning_flops_target"), options.number("pruning_target")
    level = flops if flops is not None else 0.5 if share is None else share
    settings: dict[str, Any] = {"flops" if flops is not None else "keep": round(1.0 - level, 6)}
    score = str(options["filter_importance"] or "L2")
    settings["score"] = {"L1": "l1", "L2": "magnitude", "geometric_median": "median"}.get(score, "magnitude")
    if options["all_weights"]:
        settings["scope"] = "global"
    if flops is not None and share is not None:
        draft.remarks.append(f"{modifier.name}: pruning_target {share} gives way to pruning_flops_target")
    remarks = [f"{modifier.name} made filters zero over epochs: here they are cut at once, then trained", OPTIMIZER]
    epochs = options.number("num_init_steps") or 0, options.number("pruning_steps") or 1
    draft.add("cut", settings, remarks + _nncf_where(modifier) + options.unmapped())
    draft.add("train", {"epochs": max(1, int(sum(epochs)))})


def _nncf_quantize(draft: Draft, modifier: Modifier) -> None:
    weights, inputs = (
        Modifier(f"{modifier.name}: {k}", mapping(modifier.settings.get(k), modifier, k), modifier.where).take(bits=8)
        for k in ("weights", "activations")
    )
    bits = int(weights.number("bits"))
    settings: dict[str, Any] = {"weights": f"int{bits}", "activations": "int8-static"}
    if weights["per_channel"] is False:
        settings["group"] = "tensor"
    if weights["mode"] == "asymmetric":
        settings["symmetric"] = False
    remarks = _nncf_where(modifier)
    if inputs.number("bits") != 8:
        remarks.append(f"quantization: inputs have 8 bits here, not {inputs['bits']}")
    if inputs["mode"] == "symmetric":
        remarks.append("quantization: inputs have a zero point of their own here, which symmetric ones do not need")
    known = ("algorithm", "weights", "activations", "ignored_scopes", "target_scopes", "initializer")
    remarks += [*weights.unmapped(), *inputs.unmapped(), *modifier.take().unmapped(*known)]
    draft.add(
        "quantize", settings, [*remarks, "to train on the grid, put these settings as quantize: into a stage train"]
    )


def _nncf_teach(draft: Draft, modifier: Modifier) -> None:
    params = {**modifier.settings, **mapping(modifier.settings.get("params"), modifier, "params")}
    kind, scale = (params.get(k) or modifier.settings.get(k, d) for k, d in (("type", "softmax"), ("scale", 1.0)))
    by = "mse" if kind == "mse" else "kl"
    stage = draft.train()
    stage.settings["distill"] = {"logits": number(scale, modifier, "scale"), "by": by}
    if by == "kl" and params.get("temperature") is not None:
        stage.settings["distill"]["temperature"] = number(params["temperature"], modifier, "temperature")
    stage.remarks += (
        Modifier(modifier.name, params, modifier.where)
        .take()
        .unmapped("algorithm", "params", "type", "scale", "temperature")
    )


NNCF: dict[str, Any] = {
    "magnitude_sparsity": _nncf_sparsity,
    "rb_sparsity": _nncf_sparsity,
    "movement_sparsity": _nncf_sparsity,
    "const_sparsity": _nncf_constant,
    "filter_pruning": _nncf_filters,
    "quantization": _nncf_quantize,
    "knowledge_distillation": _nncf_teach,
}
NNCF_UNSUPPORTED = {
    "binarization": "nearest are weights of 2 bits, with training",
    "elasticity": "one network of many sizes; nearest is cut to each of them",
}

INC_SCORES = {
    "magnitude": "magnitude", "magnitude_progressive": "magnitude", "gradient": "gradient", "snip": "taylor",
    "snip_momentum": "taylor", "snip_progressive": "taylor", "snip_momentum_progressive": "taylor",
}  # fmt: skip
INC_PRIVATE = (
    "resume_from_pruned_checkpoint", "criterion_type", "reg_type", "parameters", "criterion_reduce_type",
    "low_memory_usage", "quantization",
)  # fmt: skip


def inc(draft: Draft, config: Mapping[str, Any]) -> None:
    """Add what a WeightPruningConfig of Neural Compressor asks for: its dict of defaults and list of local ones."""
    base = {k: v for k, v in config.items() if k not in ("pruning_configs", "pruning")}
    several = config.get("pruning_configs") or config.get("pruning") or [{}]
    if not isinstance(several, list) or not all(isinstance(c, Mapping) for c in several):
        raise RecipeError("a WeightPruningConfig has pruning_configs: a list of dicts such as {op_names: [...], ...}")
    plans: list[tuple[dict[str, Any], list[str]]] = []
    for nth, local in enumerate(several):
        plan = _inc_one(draft, Modifier("WeightPruningConfig", {**base, **local}, f"pruning_configs[{nth}]"))
        if plan is not None:
            plans.append(plan)
    if not plans:
        return
    (first, remarks), *others = plans
    for plan, more in others:
        differ = [k for k in ("method", "score", "schedule", "steps", "ignore") if plan.get(k) != first.get(k)]
        if differ:
            raise RecipeError(
                f"pruning_configs that differ in {differ[0]} have no counterpart in one stage: write a stage for each"
            )
        if (
            plan["pattern"] != first["pattern"]
            or "layers" not in plan
            or "layers" not in first
            or "sparsity" not in plan
        ):
            raise RecipeError(
                "pruning_configs of several patterns, or without op_names, have no counterpart in one stage: write a "
                "stage for each"
            )
        ends = first.get("ends") or {l: first["sparsity"] for l in first["layers"]}
        first["ends"] = ends | {l: plan["sparsity"] for l in plan["layers"]}
        first["layers"] = [*first["layers"], *plan["layers"]]
        first["sparsity"] = max(first["ends"].values())
        remarks += more
    first.pop("scope", None) if "ends" in first else None
    remarks += [OPTIMIZER, "its steps are those of your loop: here they are spread over epochs, set these"]
    draft.add("train", {"epochs": 1, "prune": first}, remarks)


def _inc_one(draft: Draft, modifier: Modifier) -> tuple[dict[str, Any], list[str]] | None:
    options = modifier.take(
        target_sparsity=0.9, pruning_type="snip_momentum", pattern="4x1", pruning_scope="global",
        sparsity_decay_type="exp", start_step=0, end_step=0, pruning_frequency=1,
    )  # fmt: skip
    kind, form = str(options["pruning_type"]), str(options["pattern"])
    target = number(options["target_sparsity"], modifier, "target_sparsity")
    layers = selectors(options["op_names"], modifier, "op_names")
    ignore = selectors(options["excluded_op_names"], modifier, "excluded_op_names")
    start, end, every = (options.number(k) or 0 for k in ("start_step", "end_step", "pruning_frequency"))
    curve, together = str(options["sparsity_decay_type"]), options["pruning_scope"] == "global"
    remarks = options.unmapped(*INC_PRIVATE)
    if kind == "pattern_lock":
        draft.add("train", {"keep_zeros": True}, [*remarks, OPTIMIZER])
        return None
    where: dict[str, Any] = {**({"layers": layers} if layers else {}), **({"ignore": ignore} if ignore else {})}
    if form in ("channelx1", "1xchannel"):
        draft.add("cut", {"keep": round(1 - target, 6), **where}, remarks)
        return None
    if form == "mha":
        draft.add("cut", {"units": ["head"], "keep": round(1 - target, 6), **where}, remarks)
        return None
    pattern = "unstructured" if form == "1x1" else pattern_of(form, modifier)
    if kind in ("sparse_gpt", "retrain_free", "block_mask"):
        solver = {"solver": "obs"} if kind == "sparse_gpt" else {"score": "fisher"}
        draft.add("prune", {**shape(pattern, target), **solver, **where}, remarks)
        return None
    if kind not in INC_SCORES:
        raise RecipeError(f"unknown pruning_type {kind[:40]!r}; choose from {', '.join(INC_SCORES)} [{modifier.where}]")
    plan: dict[str, Any] = {"method": "gradual", **shape(pattern, target), "score": INC_SCORES[kind]}
    if together and "sparsity" in plan:
        plan["scope"] = "global"
    plan["schedule"] = {"exp": "exponential", "cube": "cubic", "linear": "linear"}.get(curve, "cubic")
    plan["steps"] = steps((end - start) / every) if every and end > start else 10
    if curve not in ("exp", "cube", "linear"):
        remarks.append(f"sparsity_decay_type {curve[:30]} is cubic here")
    if kind.startswith("snip"):
        remarks.append("snip's |gradient x weight| is taylor here, on calibration data, not summed over steps")
    return {**plan, **where}, remarks


def ao(draft: Draft, config: Sequence[Any]) -> None:
    """Add what the config of torch.ao.pruning's WeightNormSparsifier asks for: a list of layers with their settings."""
    for nth, one in enumerate(config):
        if not isinstance(one, Mapping) or "tensor_fqn" not in one:
            raise RecipeError(f"a config of torch.ao.pruning is a list of dicts with tensor_fqn, got {one!r:.60}")
        modifier = Modifier("WeightNormSparsifier", one, f"config[{nth}]")
        if one["tensor_fqn"] is None:
            raise RecipeError(
                f"WeightNormSparsifier: expected tensor_fqn as the name of a weight, got None [{modifier.where}]"
            )
        options = modifier.take(sparsity_level=0.5, sparse_block_shape=[1, 4], zeros_per_block=None)
        level = number(options["sparsity_level"], modifier, "sparsity_level")
        block = options["sparse_block_shape"]
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise RecipeError(f"expected sparse_block_shape as two whole numbers, got {block!r:.40} [{modifier.where}]")
        entries = block[0] * block[1]
        zeros = options.number("zeros_per_block")
        if zeros is not None and int(zeros) != zeros:
            raise RecipeError(f"expected zeros_per_block as a whole number, got {zeros} [{modifier.where}]")
        zeros = entries if zeros is None else int(zeros)
        names = selectors(options["tensor_fqn"], modifier, "tensor_fqn")
        settings: dict[str, Any] = {"layers": names, "score": "magnitude"}
        remarks = options.unmapped()
        if entries == 1:
            settings |= {"pattern": "unstructured", "sparsity": level}
        elif zeros >= entries:
            settings |= {"pattern": f"{block[0]}x{block[1]}", "sparsity": level, "reduce": "l2"}
        elif block[0] == 1:
            settings |= {"pattern": f"{entries - zeros}:{entries}"}
            if level < 1:
                remarks.append(f"sparsity_level {level:g} left some blocks whole: N:M is the same everywhere here")
        else:
            raise RecipeError(
                f"{zeros} zeros in every {block[0]}x{block[1]} are not supported; use 1x{block[1]} [{modifier.where}]"
            )
        draft.add("prune", settings, remarks)
