"""Recipes of other tools: every name is mapped or refused, the results run, and a file runs nothing."""

import copy
import json
import math
import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from helpers.vision_models import Small
from helpers.vision_models import data as batches
from rarefy.common.errors import RecipeError
from rarefy.migration import llm_compressor, nncf_neural_compressor, sparseml
from rarefy.migration.safe_arithmetic import compute
from rarefy.recipe import parser

ALL_LEGACY = [
    "EpochRange",
    "SetLearningRate",
    "LearningRate",
    "LearningRateFunction",
    "TrainableParams",
    "SetParam",
    "GradualParam",
    "SetWeightDecay",
    "SparsificationLogging",
    "ConstantPruning",
    "GMPruning",
    "MagnitudePruning",
    "GlobalMagnitudePruning",
    "ACDCPruning",
    "MFACPruning",
    "MovementPruning",
    "OBSPruning",
    "RigLPruning",
    "TopKASTPruning",
    "StructuredPruning",
    "LayerThinning",
    "LayerPruning",
    "Powerpropagation",
    "ASReg",
    "Quantization",
    "Distillation",
    "PerLayerDistillation",
]
ALL_LATER = [
    "ConstantPruning",
    "MagnitudePruning",
    "SparseGPT",
    "WandaPruning",
    "GPTQ",
    "Quantization",
    "LegacyQuantization",
    "SmoothQuant",
    "LogarithmicEqualization",
    "OutputDistillation",
]


class Net(Small):
    """With a list of blocks ahead of the head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        x = self.features(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def run(made, model=None):
    """Compress a small model by a migrated recipe, in as few epochs as will do."""
    torch.manual_seed(0)
    model = Net().eval() if model is None else model
    few = {"epochs": 2} if any(type(s).__name__ == "Train" for s in made.recipe.stages) else {}
    rarefy.compress_(model, made.recipe, {"calibrate": batches(), "train": batches()}, **few)
    return model


def zeros(weight):
    return float((weight == 0).float().mean())


def legacy(*modifiers, head=""):
    return f"{head}\npruning_modifiers:\n" + "\n".join(f"  - !{m}" for m in modifiers)


RANGE = "EpochRangeModifier {start_epoch: 0.0, end_epoch: 10.0}"
GMP = "{params: ['hidden.weight', 'more.weight'], init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 1.0, end_epoch: 8.0, update_frequency: 0.5}"
LEGACY = {
    "gradual": (legacy(RANGE, f"GMPruningModifier {GMP}"), {"hidden": 0.8, "more": 0.8}),
    "magnitude": (legacy(RANGE, f"MagnitudePruningModifier {GMP}"), {"hidden": 0.8}),
    "global": (legacy(RANGE, "GlobalMagnitudePruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0.05, final_sparsity: 0.7, start_epoch: 0, end_epoch: 5, update_frequency: 1.0}"), {}),
    "4 in a row": (legacy(RANGE, "GMPruningModifier {params: ['re:hid.*', 'more'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1.0, mask_type: block4}"), {"hidden": 0.5}),
    "blocks": (legacy(RANGE, "GMPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1.0, mask_type: [4, 1]}"), {"hidden": 0.5}),
    "2:4": (legacy(RANGE, "GMPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1.0, mask_type: 2:4}"), {"hidden": 0.5}),
    "tensorrt": (legacy(RANGE, "MFACPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 2.0, mask_type: tensorrt, num_grads: 8}"), {"hidden": 0.5}),
    "filters": (legacy(RANGE, "GMPruningModifier {params: ['conv'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1.0, mask_type: filter}"), {"conv": 0.5}),
    "obs": (legacy(RANGE, "OBSPruningModifier {params: ['hidden', 'more'], init_sparsity: 0.3, final_sparsity: 0.7, start_epoch: 2, end_epoch: 8, update_frequency: 2.0, inter_func: cubic, global_sparsity: True, mask_type: unstructured, num_grads: 16, damp: 1e-7, fisher_block_size: 8}"), {}),
    "acdc": (legacy(RANGE, "ACDCPruningModifier {params: ['hidden'], compression_sparsity: 0.5, final_sparsity: 0.5, start_epoch: 0, end_epoch: 8, update_frequency: 2}"), {"hidden": 0.5}),
    "movement": (legacy(RANGE, "MovementPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 1, end_epoch: 8, update_frequency: 1}"), {"hidden": 0.5}),
    "rigl": (legacy(RANGE, "RigLPruningModifier {params: ['hidden'], sparsity: 0.5, start_epoch: 0, end_epoch: 8, update_frequency: 1, momentum_buffer_reset: True}"), {"hidden": 0.5}),
    "several groups": (legacy(RANGE, "GMPruningModifier {params: ['hidden'], init_sparsity: 0.05, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1.0}", "GMPruningModifier {params: ['more'], init_sparsity: 0.05, final_sparsity: 0.75, start_epoch: 0, end_epoch: 6, update_frequency: 1.0}"), {"hidden": 0.5, "more": 0.75}),
    "sparsities by group": (legacy(RANGE, "GMPruningModifier {params: ['hidden', 'more'], init_sparsity: 0.05, final_sparsity: {0.5: ['hidden'], 0.75: ['more']}, start_epoch: 0, end_epoch: 5, update_frequency: 1.0}"), {"hidden": 0.5, "more": 0.75}),
    "rates": (legacy(RANGE, f"GMPruningModifier {GMP}", "LearningRateFunctionModifier {start_epoch: 0, end_epoch: 10, lr_func: cosine, init_lr: 0.001, final_lr: 0.0}", "SetWeightDecayModifier {start_epoch: 0, weight_decay: 0.01}", "SparsificationLoggingModifier {}"), {"hidden": 0.8}),
    "steps of the rate": (legacy(RANGE, f"GMPruningModifier {GMP}", "LearningRateModifier {start_epoch: 0, end_epoch: 10, lr_class: StepLR, lr_kwargs: {step_size: 1}, init_lr: 0.001}", "SetLearningRateModifier {start_epoch: 0, learning_rate: 0.002}"), {"hidden": 0.8}),
    "distillation": (legacy(RANGE, f"GMPruningModifier {GMP}", "DistillationModifier {hardness: 1.0, temperature: 2.0, distill_output_keys: [logits]}", "PerLayerDistillationModifier {gain: 2.0, normalize: true, student_layer_names: ['hidden', 'more'], teacher_layer_names: ['hidden', 'more']}"), {"hidden": 0.8}),
    "quantization": (legacy(RANGE, f"GMPruningModifier {GMP}", "QuantizationModifier {start_epoch: 8.0, freeze_bn_stats_epoch: 9.0, submodules: [hidden]}"), {}),
    "4 bits": (legacy(RANGE, "QuantizationModifier {start_epoch: 1.0, scheme: {weights: {num_bits: 4}, input_activations: null}, ignore: [conv]}"), {}),
    "structured": (legacy(RANGE, "StructuredPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 5, update_frequency: 1, mask_type: filter, param_group_dependency_map: '{}'}", "LayerThinningModifier {start_epoch: 6}"), {}),
    "tags with a path": (legacy("pytorch.EpochRangeModifier {end_epoch: 4}", "pytorch.GMPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 2, update_frequency: 1.0}"), {"hidden": 0.5}),
    "variables": (
        legacy("EpochRangeModifier {start_epoch: 0, end_epoch: eval(num_epochs)}", "GMPruningModifier {params: $layers, init_sparsity: 0.0, final_sparsity: eval(target), start_epoch: eval(num_epochs * start), end_epoch: eval(last), update_frequency: 1.0}".replace("$layers", "['hidden']"), head="num_epochs: 20\nstart: 0.1\ntarget: 0.6\nlast: eval(max(num_epochs - 4, 2))"),
        {"hidden": 0.6},
    ),
    "anchors": (legacy("EpochRangeModifier {end_epoch: *n}", "GMPruningModifier {params: ['hidden'], init_sparsity: 0.0, final_sparsity: *s, start_epoch: 0, end_epoch: *n, update_frequency: 1.0}", head="n: &n 6\ns: &s 0.6"), {"hidden": 0.6}),
    "stages": (f"dense_stage:\n  training_modifiers:\n  - !EpochRangeModifier {{end_epoch: 4}}\nsparse_stage:\n  pruning_modifiers:\n  - !GMPruningModifier {GMP}\n", {"hidden": 0.8}),
    "settings in a block": ("modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoch: 3\n  - !GMPruningModifier\n    params:\n      - hidden.weight\n    init_sparsity: 0.05\n    final_sparsity: 0.5\n    start_epoch: 0.0\n    end_epoch: 2.0\n    update_frequency: 0.01\n    inter_func: inverse_cubic\n    leave_enabled: False\n", {"hidden": 0.5}),
}  # fmt: skip

LATER = {
    "sparsegpt": ("sparsity_stage: {run_type: oneshot, sparsity_modifiers: {SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4', sequential_update: false}}}", {"hidden": 0.5}),
    "unstructured": ("test_stage: {obcq_modifiers: {SparseGPTModifier: {sparsity: 0.6, block_size: 128, dampening_frac: 0.01, mask_structure: '0:0', targets: [Linear], ignore: ['re:.*out']}}}", {"hidden": 0.6, "more": 0.6}),
    "owl": ("a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: 0.6, mask_structure: '0:0', sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.08}}}", {}),
    "each layer": ("a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: [0.5, 0.7], mask_structure: '0:0'}}}", {}),
    "wanda": ("a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: '0:0', targets: ['re:blocks.0$']}}}", {"blocks.0.0": 0.5}),
    "wanda 4:8": ("a_stage: {x_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: '4:8', ignore: [conv]}}}", {"hidden": 0.5}),
    "gptq": ("quant_stage: {quant_modifiers: {GPTQModifier: {ignore: [out], config_groups: {group_0: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}}}}}}", {}),
    "gptq scheme": ("quant_stage: {quant_modifiers: {GPTQModifier: {targets: Linear, scheme: W8A16, ignore: [out], dampening_frac: 0.05, actorder: static}}}", {}),
    "int8": ("quant_stage: {quant_modifiers: {QuantizationModifier: {targets: Linear, scheme: W8A8, ignore: [out]}}}", {}),
    "static": ("quant_stage: {quant_modifiers: {QuantizationModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: 8, strategy: channel}, input_activations: {num_bits: 8, dynamic: false}, output_activations: null}}}}}", {}),
    "tensor": ("quant_stage: {quant_modifiers: {LegacyQuantizationModifier: {scheme: {W8A16: [hidden], INT8: [more]}}}}", {}),
    "smooth": ("quant_stage: {quant_modifiers: {SmoothQuantModifier: {smoothing_strength: 0.5, mappings: [[a, b]]}, QuantizationModifier: {scheme: W8A8, targets: [more]}}}", {}),
    "in training": ("train_stage: {run_type: train, m_modifiers: {MagnitudePruningModifier: {init_sparsity: 0.1, final_sparsity: 0.5, start: 0, end: 4, update_frequency: 0.5, targets: ['re:hidden.weight'], mask_structure: unstructured, leave_enabled: false}}}", {"hidden": 0.5}),
    "in training, together": ("train_stage: {run_type: train, m_modifiers: {MagnitudePruningModifier: {init_sparsity: 0.1, final_sparsity: 0.5, start: 0, end: 4, update_scheduler: linear, targets: __ALL_PRUNABLE__, apply_globally: true}}}", {}),
    "polynomial": ("train_stage: {m_modifiers: {MagnitudePruningModifier: {final_sparsity: 0.5, end: 4, update_scheduler: polynomial_decay, update_scheduler_args: {exponent: 2}, mask_structure: block_4x1, targets: [hidden]}}}", {"hidden": 0.5}),
    "teacher": ("train_stage: {m_modifiers: {MagnitudePruningModifier: {final_sparsity: 0.5, end: 4, targets: [hidden]}, OutputDistillationModifier: {targets: [[a, b]], orig_scale: 0.5, distill_scale: 1.0, comparison: kl_divergence}}}", {"hidden": 0.5}),
    "three stages": ("sparsity_stage: {run_type: oneshot, sparsity_modifiers: {SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4', targets: [Linear], ignore: [out]}}}\nfinetuning_stage: {run_type: train, finetuning_modifiers: {ConstantPruningModifier: {targets: ['re:.*q_proj.weight'], start: 0}}}\nquantization_stage: {run_type: oneshot, quantization_modifiers: {GPTQModifier: {ignore: [out], config_groups: {group_0: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}}}}}}", {"hidden": 0.5}),
    "without stages": ("pruning_modifiers:\n  SparseGPTModifier:\n    sparsity: eval(level)\n    mask_structure: '0:0'\nlevel: 0.5\n", {"hidden": 0.5}),
    "in a stage": ("a_stage:\n  run_type: oneshot\n  level: 0.25\n  x_modifiers:\n    ConstantPruningModifier: {targets: __ALL__}\n    SparseGPTModifier: {sparsity: eval(2 * level), mask_structure: '0:0'}\n", {"hidden": 0.5}),
    "rounding": ("a_stage: {x_modifiers: {AutoRoundModifier: {scheme: W8A16, targets: ['re:blocks.*'], iters: 2}}}", {}),
}  # fmt: skip

CONFIGS = {
    "nncf magnitude": ({"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.1, "params": {"schedule": "multistep", "multistep_steps": [2, 4], "multistep_sparsity_levels": [0.3, 0.5, 0.6], "sparsity_target": 0.6, "sparsity_target_epoch": 3, "sparsity_freeze_epoch": 5}}}, {}),
    "nncf rb": ({"compression": [{"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 3, "sparsity_freeze_epoch": 5, "schedule": "polynomial"}}]}, {}),
    "nncf filters": ({"compression": [{"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "filter_importance": "L2", "num_init_steps": 1, "pruning_steps": 2}}, {"algorithm": "knowledge_distillation", "type": "softmax", "scale": 2}]}, {}),
    "nncf int8": ({"compression": {"algorithm": "quantization", "weights": {"mode": "symmetric", "bits": 8}, "activations": {"mode": "asymmetric"}, "ignored_scopes": ["Net/Conv2d[conv]"]}}, {}),
    "inc": ({"pruning_configs": [{"op_names": ["hidden"], "target_sparsity": 0.5, "pattern": "4x1", "pruning_type": "snip_momentum", "start_step": 1, "end_step": 20, "pruning_frequency": 5, "sparsity_decay_type": "exp", "pruning_scope": "global", "max_sparsity_ratio_per_op": 0.98}]}, {"hidden": 0.5}),
    "inc defaults": ({"target_sparsity": 0.5, "pattern": "2:4", "pruning_type": "magnitude", "pruning_configs": [{"op_names": ["hidden", "more"]}]}, {"hidden": 0.5}),
    "inc groups": ({"pattern": "1x1", "pruning_type": "magnitude", "pruning_configs": [{"op_names": ["hidden"], "target_sparsity": 0.5}, {"op_names": ["more"], "target_sparsity": 0.75}]}, {"hidden": 0.5, "more": 0.75}),
    "inc sparse_gpt": ({"pruning_type": "sparse_gpt", "target_sparsity": 0.5, "pattern": "1x1", "pruning_configs": [{"op_names": ["hidden"]}]}, {"hidden": 0.5}),
    "inc retrain-free": ({"pruning_type": "retrain_free", "target_sparsity": 0.5, "pattern": "4x1", "pruning_configs": [{"op_names": ["hidden"]}]}, {"hidden": 0.5}),
    "inc channels": ({"pruning_type": "magnitude", "target_sparsity": 0.5, "pattern": "channelx1", "pruning_configs": [{"op_names": ["hidden"]}]}, {}),
    "ao 2:4": ([{"tensor_fqn": "hidden.weight", "sparsity_level": 1.0, "sparse_block_shape": [1, 4], "zeros_per_block": 2}], {"hidden": 0.5}),
    "ao": ([{"tensor_fqn": "hidden.weight", "sparsity_level": 0.5, "sparse_block_shape": [1, 1]}, {"tensor_fqn": "more.weight", "sparsity_level": 0.5, "sparse_block_shape": [4, 1]}], {"hidden": 0.5, "more": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LEGACY, *LATER])
def test_recipes_run_and_do_what_they_said(name, tmp_path):
    text, want = (LEGACY | LATER)[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    made = rarefy.migrate(file)
    assert made.tool == ("sparseml" if name in LEGACY else "llm-compressor")
    model = run(made)
    for layer, sparsity in want.items():
        assert zeros(model.get_submodule(layer).weight) == pytest.approx(sparsity, abs=0.02)
    assert parser.from_yaml(made.text) == made.recipe
    (tmp_path / "recipe.md").write_text(f"---\n{text}\n---\n# A model\n- some: words\n")
    assert rarefy.migrate(tmp_path / "recipe.md").text == made.text


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_run_and_do_what_they_said(name, tmp_path):
    config, want = CONFIGS[name]
    made = rarefy.migrate(config)
    told = [l for l in made.text.splitlines() if "no counterpart" in l]
    assert len(told) == (name == "inc") and all("max_sparsity_ratio_per_op" in l for l in told)
    model = run(made)
    for layer, sparsity in want.items():
        assert zeros(model.get_submodule(layer).weight) == pytest.approx(sparsity, abs=0.02)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert rarefy.migrate(tmp_path / "config.json").text == made.text


JUNK = [
    None,
    True,
    3,
    -1,
    0,
    2.5,
    1e300,
    float("nan"),
    "word",
    "eval(1",
    "re:(",
    "",
    [],
    [1],
    ["a", 2],
    {},
    {"a": {"b": 1}},
]


def broken(value, rng):
    """Plain data with one value in it replaced, or one key gone."""
    value = copy.deepcopy(value)
    places = []

    def walk(v):
        for key in v if isinstance(v, dict) else range(len(v)):
            places.append((v, key))
            if isinstance(v[key], dict | list):
                walk(v[key])

    walk(value)
    holder, key = rng.choice(places)
    if isinstance(holder, dict) and rng.random() < 0.1:
        del holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    return value


@pytest.mark.parametrize("name", [*LEGACY, *LATER, *CONFIGS])
def test_broken_ones_give_a_recipe_or_a_recipe_error(name):
    from rarefy.common.yaml_text import read_yaml

    known = CONFIGS.get(name) or (LEGACY | LATER)[name]
    whole = known[0] if name in CONFIGS else read_yaml(known[0], "r.yaml", foreign=True).data
    rng, made = random.Random(name), 0
    for _ in range(60):
        try:
            rarefy.migrate(broken(whole, rng), skip=rng.random() < 0.5)
            made += 1
        except RecipeError as error:
            assert len(str(error)) < 600
    assert made or name in CONFIGS


def test_zeros_that_are_there_are_held():
    model = Net()
    rarefy.prune_(model, sparsity=0.5, layers=["hidden", "more"])
    rarefy.fold_(model)
    made = rarefy.migrate(
        {"modifiers": [{"!ConstantPruningModifier": {"params": "__ALL_PRUNABLE__", "start_epoch": 0}}]}
    )
    assert made.recipe.stages[0].keep_zeros
    run(made, model)
    assert zeros(model.hidden.weight) == 0.5 and zeros(model.conv.weight) == 0


@pytest.mark.parametrize("name", ALL_LEGACY)
def test_every_legacy_name_is_mapped_or_refused_with_the_nearest_thing(name):
    part = f"{name}Modifier"
    assert (part in sparseml.HANDLERS) != (part in sparseml.UNSUPPORTED)
    if part in sparseml.UNSUPPORTED:
        text = legacy(RANGE, f"GMPruningModifier {GMP}", f"{part} {{start_epoch: 0}}")
        with pytest.raises(RecipeError, match=rf"{part} has no counterpart: .* line 5\]"):
            migrate_text(text)
        made = migrate_text(text, skip=True)
        assert f"# {part} has no counterpart" in made.text


@pytest.mark.parametrize("name", ALL_LATER)
def test_every_later_name_is_mapped_or_refused_with_the_nearest_thing(name):
    part = f"{name}Modifier"
    assert part in llm_compressor.HANDLERS or part in llm_compressor.UNSUPPORTED or part == "SmoothQuantModifier"
    for reason in llm_compressor.UNSUPPORTED.values():
        assert "nearest" in reason or "here" in reason or "as solver" in reason


def migrate_text(text, name="r.yaml", **options):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / name
        file.write_text(text)
        return rarefy.migrate(file, **options)


def test_what_changed_is_said():
    made = migrate_text(legacy(RANGE, "OBSPruningModifier {params: ['hidden'], init_sparsity: 0.3, final_sparsity: 0.7, start_epoch: 2, end_epoch: 8, update_frequency: 0.01, inter_func: inverse_cubic, leave_enabled: False, cache_grads: True}"))  # fmt: skip
    for said in (
        "inter_func inverse_cubic is cubic here",
        "pruned 600 times: 200 here",
        "let zeros grow back",
        "no counterpart of cache_grads: true",
        "the optimizer was your script's",
    ):
        assert any(l.startswith("#") and said in l for l in made.text.splitlines()), said
    plan = made.recipe.stages[0].prune
    assert (plan.first, plan.sparsity, plan.start, plan.end, plan.steps) == (0.3, 0.7, 0.2, 0.8, 200)


NUMBERS = {"a": 3, "b": 0.5}


@pytest.mark.parametrize("text", ["1 + 2 * a", "(a - 1) / b", "-a ** 2", "max(1, a, b)", "round(a * b) % 2", "7 // a", "int(2.9)", "ceil(b) + floor(b)", "1e-3 * a"])  # fmt: skip
def test_arithmetic_is_pythons(text):
    assert compute(text, NUMBERS, "x") == eval(text, {"__builtins__": {}}, {**NUMBERS, "max": max, "round": round, "int": int, "ceil": math.ceil, "floor": math.floor})  # fmt: skip


ATTACKS = [
    "__import__('os').system('touch {file}')", "().__class__.__bases__[0].__subclasses__()", "open('{file}', 'w')", "a.real", "a[0]",
    "[x for x in (1,)]", "lambda: 1", "'a' * 10", "9 ** 9 ** 9", "10.0 ** 400", "1 / 0", "(" * 150 + "1" + ")" * 150, "1 if a else 2",
    "f'{a}'", "a := 2", "eval('1')", "max(key=a)", "max(*a)", "True", "None", "1j", "", "nosuch + 1", "1" * 300, "-" * 190 + "1", "a < b",
    "round(5, -999999999)", "round(5, 1e300)", "a ** 30 * 1e14", "9" * 16, "int('7')", "float('nan')", "float('1e5')", "min()",
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_else_is_computed_and_nothing_runs(text, tmp_path):
    file = tmp_path / "touched"
    began = time.process_time()
    recipe = legacy("EpochRangeModifier {end_epoch: 3}", f"GMPruningModifier {{params: [hidden], final_sparsity: {json.dumps('eval(' + text.replace('{file}', str(file)) + ')')}}}", head="a: 3\nb: 0.5")  # fmt: skip
    if text == "-" * 190 + "1":
        assert compute(text, NUMBERS, "x") == 1
        return
    with pytest.raises(RecipeError):
        migrate_text(recipe)
    assert time.process_time() - began < 5 and not file.exists()


def laughs(levels):
    return "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(levels))


HOSTILE = {
    "an object": "modifiers:\n  - !!python/object/apply:os.system ['touch {file}']",
    "an object for a tag": "modifiers:\n  - !GMPruningModifier {params: !!python/name:os.system ''}",
    "an object for a key": "!!python/object/new:type {}: 1\nmodifiers: []",
    "laughs": laughs(12),
    "laughs that rename": "a: &x 1\nb: &x [*x, *x]\nmodifiers: [*x]",
    "laughs in a tag": f"{laughs(9)}\nmodifiers:\n  - !GMPruningModifier {{params: *a8}}",
    "depth": "modifiers: " + "[" * 5000,
    "depth of tags": "modifiers: " + "!a {b: " * 2000,
    "merge": "base: &b {a: 1}\nmodifiers:\n  - !GMPruningModifier {<<: *b}",
    "size": "modifiers:\n" + "  - !GMPruningModifier {params: [hidden]}\n" * 3000,
    "a circle": "a: eval(b)\nb: eval(a)\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(a)}",
    "huge": "end: 1e300\nmodifiers:\n  - !EpochRangeModifier {end_epoch: 1e300}\n  - !GMPruningModifier {params: [hidden], final_sparsity: 0.5}",
    "control characters": "modifiers:\n  - !GMPruningModifier {params: [hidden], final_sparsity: 0.5, x: \"a\\nstages: [1]\"}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_an_error_at_once(name, tmp_path):
    touched = tmp_path / "touched"
    began = time.process_time()
    text = HOSTILE[name].replace("{file}", str(touched))
    if name == "control characters":
        made = migrate_text(text)  # a remark stays a comment
        assert (
            all(l.startswith(("#", "-", " ", "stages:")) for l in made.text.splitlines())
            and len(made.recipe.stages) == 1
        )
    else:
        with pytest.raises(RecipeError):
            migrate_text(text)
    assert time.process_time() - began < 5 and not touched.exists()


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "huge.yaml"
    with file.open("wb") as f:
        f.truncate(8 << 30)  # sparse
    began = time.process_time()
    with pytest.raises(RecipeError, match="8,589,934,592 bytes; a recipe has at most 65,536"):
        rarefy.migrate(file)
    assert time.process_time() - began < 5


MISTAKES = {
    "no modifier of that name": (legacy("GMPruneModifier {}"), r"unknown modifier 'GMPruneModifier'.*did you mean 'GMPruningModifier'"),
    "two kinds": (legacy(RANGE) + "\na_stage: {x_modifiers: {GPTQModifier: {}}}", "two kinds of recipe"),
    "nothing known": ("learning_rate: 0.1", "neither modifiers nor a config of a known tool: SparseML"),
    "a list": ("[1, 2]", "not a recipe or config of a known tool"),
    "settings a number": ("a_stage: {x_modifiers: {GPTQModifier: 3}}", r"GPTQModifier has settings, as keys and values \[r.yaml line 1\]"),
    "no tag": ("modifiers:\n  - GMPruningModifier", r"modifiers is a list of modifiers such as - !GMPruningModifier \[r.yaml line 2\]"),
    "tag with a list": ("modifiers:\n  - !GMPruningModifier [1]", r"r.yaml line 2: expected the settings of !GMPruningModifier as keys and values"),
    "sparsity a word": (legacy("GMPruningModifier {params: [hidden], final_sparsity: much}"), r"GMPruningModifier: expected final_sparsity as a number, got 'much' \[r.yaml line 3\]"),
    "sparsity of 90": (legacy(RANGE, "GMPruningModifier {params: [hidden], init_sparsity: 0.0, final_sparsity: 90, update_frequency: 1}"), "expected final_sparsity between 0 and 1, got 90"),
    "ends before it starts": (legacy(RANGE, "GMPruningModifier {params: [hidden], final_sparsity: 0.5, start_epoch: 5, end_epoch: 2}"), "ends at 2, before it starts at 5"),
    "mask of no kind": (legacy(RANGE, "GMPruningModifier {params: [hidden], final_sparsity: 0.5, mask_type: round}"), "no pattern of mask 'round'; use unstructured"),
    "params a number": (legacy(RANGE, "GMPruningModifier {params: 3, final_sparsity: 0.5}"), "expected params as a list of names, got 3"),
    "two of a kind": (legacy(RANGE, f"GMPruningModifier {GMP}", f"OBSPruningModifier {GMP}"), "prunes too: in a span of training there is one pruning method"),
    "fp8": ("a_stage: {x_modifiers: {QuantizationModifier: {scheme: FP8_DYNAMIC}}}", "scheme FP8_DYNAMIC is not an integer scheme; supported are W8A8"),
    "float groups": ("a_stage: {x_modifiers: {QuantizationModifier: {config_groups: {g: {weights: {num_bits: 4, type: float}}}}}}", "numbers of type 'float' are not supported"),
    "16 bits": ("a_stage: {x_modifiers: {QuantizationModifier: {config_groups: {g: {weights: {num_bits: 16}}}}}}", "weights have 2 to 8 bits"),
    "groups a word": ("a_stage: {x_modifiers: {GPTQModifier: {config_groups: hello}}}", "expected config_groups with keys and values, got 'hello'"),
    "blocks": ("a_stage: {x_modifiers: {QuantizationModifier: {config_groups: {g: {weights: {num_bits: 4, strategy: block}}}}}}", "no counterpart of strategy block; use channel, tensor, group"),
    "no sparsities": ("a_stage: {x_modifiers: {SparseGPTModifier: {sparsity: []}}}", r"expected sparsity as a number or one per layer, got \[\]"),
    "smooth alone": ("a_stage: {x_modifiers: {SmoothQuantModifier: {}}}", "no modifier of its stage quantizes"),
    "awq": ("a_stage: {x_modifiers: {AWQModifier: {}}}", "AWQModifier has no counterpart: nearest is solver: obs"),
    "nothing left": ("a_stage: {run_type: oneshot, x_modifiers: {ConstantPruningModifier: {}}}", "has no setting that a recipe supports"),
    "a number of 400 digits": (legacy(RANGE, f"GMPruningModifier {{params: [hidden], final_sparsity: 0.5, end_epoch: {'9' * 400}}}"), "a number is too large to compute with"),
    "an update in no time": (legacy(RANGE, "GMPruningModifier {params: [hidden], final_sparsity: 0.5, start_epoch: 0, end_epoch: 2, update_frequency: 5.0e-324}"), "a number is too large to compute with"),
    "not yaml": ("modifiers: [", "not YAML"),
    "empty": ("", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    text, says = MISTAKES[name]
    with pytest.raises(RecipeError, match=says):
        migrate_text(text)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"compression": {"algorithm": "magnitude"}}, "unknown algorithm 'magnitude'.*magnitude_sparsity"),
        ({"compression": {"algorithm": "binarization"}}, "binarization has no counterpart: nearest"),
        ({"compression": 3}, "an NNCF config has compression"),
        ({"pruning_configs": 3}, "pruning_configs: a list of dicts"),
        ({"pruning_configs": [{"pruning_type": "magic"}]}, "unknown pruning_type 'magic'; choose from magnitude"),
        ({"pruning_configs": [{"pattern": "4x1"}, {"pattern": "1x1"}]}, "several patterns, or without op_names"),
        ([{"tensor_fqn": "a.weight", "sparse_block_shape": [4, 4], "zeros_per_block": 3}], "3 zeros in every 4x4"),
        (
            [{"tensor_fqn": "a.weight", "sparse_block_shape": 4}],
            "expected sparse_block_shape as two whole numbers, got 4",
        ),
        ([{"tensor_fqn": None}], "expected tensor_fqn as the name of a weight, got None"),
        ([{"tensor_fqn": "a.weight", "zeros_per_block": 2.7}], "expected zeros_per_block as a whole number, got 2.7"),
        (
            {"pruning_configs": [{"op_names": ["a"], "pruning_type": "magnitude"}, {"op_names": ["b"]}]},
            "that differ in score have no counterpart in one stage",
        ),
        ({"compression": torch.ones(2)}, "expected text, numbers, lists and dicts in a config, got Tensor"),
    ],
)
def test_mistakes_of_configs(config, says):
    with pytest.raises(RecipeError, match=says):
        rarefy.migrate(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"compression": {"algorithm": "filter_pruning", "params": {"pruning_target": 0.4, "pruning_flops_target": 0.5, "schedule": "exponential", "prune_first_conv": True}}},
            ["pruning_target 0.4 gives way to pruning_flops_target", 'no counterpart of schedule: "exponential"', "no counterpart of prune_first_conv: true"],
        ),
        (
            {"compression": {"algorithm": "quantization", "preset": "mixed", "overflow_fix": "disable", "activations": {"mode": "symmetric"}, "weights": {"signed": True}}},
            ['no counterpart of preset: "mixed"', 'no counterpart of overflow_fix: "disable"', "no counterpart of signed: true", "zero point of their own"],
        ),
        ({"pruning_configs": [{"pattern": "mha", "op_names": ["a"], "excluded_op_names": ["b"]}]}, ["layers:", "ignore:"]),
    ],
)  # fmt: skip
def test_what_configs_lose_is_said(config, says):
    text = rarefy.migrate(config).text
    assert all(s in text for s in says), text


def test_a_temperature_and_a_share_for_all():
    made = rarefy.migrate(
        {
            "compression": [
                {"algorithm": "magnitude_sparsity"},
                {"algorithm": "knowledge_distillation", "temperature": 3.0},
            ]
        }
    )
    assert "temperature: 3.0" in made.text
    text = migrate_text(
        legacy(
            RANGE,
            "GMPruningModifier {init_sparsity: 0.0, final_sparsity: {0.8: __ALL__, 0.9: [hidden]}, update_frequency: 1}",
        )
    )
    assert "'*': 0.8" in str(text) and "hidden: 0.9" in str(text)


@pytest.mark.parametrize("source", [None, 3, b"x"])
def test_no_recipe_at_all(source):
    with pytest.raises(
        RecipeError, match=f"expected a recipe as a file, a dict or a list, got {type(source).__name__}"
    ):
        rarefy.migrate(source)


def test_files_that_are_none(tmp_path):
    with pytest.raises(RecipeError, match="no file 'nowhere.yaml'"):
        rarefy.migrate("nowhere.yaml")
    (tmp_path / "r.md").write_text("# only words")
    with pytest.raises(RecipeError, match="holds no recipe: expected YAML with modifiers between two lines of ---"):
        rarefy.migrate(tmp_path / "r.md")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(RecipeError, match="UTF-8"):
        rarefy.migrate(tmp_path / "r.yaml")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(RecipeError, match="not JSON"):
        rarefy.migrate(tmp_path / "r.json")


def test_from_the_command_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(LEGACY["gradual"][0])
    shown = run("migrate", "old.yaml")
    assert shown.code == 0 and shown.out == rarefy.migrate("old.yaml").text
    assert run("migrate", "old.yaml", "--out", "new.yaml").code == 0
    assert Path("new.yaml").read_text() == shown.out
    again = run("migrate", "old.yaml", "--out", "new.yaml")
    assert again.code == 2 and "new.yaml exists: pass --force" in again.err
    assert json.loads(run("migrate", "old.yaml", "--json").out)["tool"] == "sparseml"
    Path("bad.yaml").write_text("modifiers:\n  - !NoModifier {}")
    wrong = run("migrate", "bad.yaml")
    assert wrong.code == 2 and "unknown modifier 'NoModifier'" in wrong.err and not wrong.out


def test_output_files_and_folders(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(LEGACY["gradual"][0])
    for out, file in (("deep/new.yaml", "deep/new.yaml"), ("there/", "there/old.yaml"), ("deep", "deep/old.yaml")):
        ran = run("migrate", "old.yaml", "--out", out)
        assert ran.code == 0 and f"written to {file}" in ran.err and Path(file).is_file()
    ran = run("migrate", "deep/new.yaml", "--out", "deep/new.yaml", "--force")
    assert ran.code == 2 and "deep/new.yaml is the recipe that is read: give another name" in ran.err
    ran = run("migrate", "old.yaml", "--out", "old.yaml/new.yaml")
    assert ran.code == 2 and "cannot write old.yaml/new.yaml: " in ran.err and ".yaml." not in ran.err


@pytest.mark.parametrize(
    ("text", "has", "lacks"),
    [
        (
            "modifiers:\n- !EpochRangeModifier {start_epoch: 0, end_epoch: 10}\n- !QuantizationModifier {start_epoch: 5, "
            "submodules: [layer1], exclude_module_types: [Linear], freeze_bn_stats_epoch: 7, "
            "disable_quantization_observer_epoch: 6}\n",
            ["- re:layer1(\\..*)?", "- Linear", "no counterpart of freeze_bn_stats_epoch: 7",
             "no counterpart of disable_quantization_observer_epoch: 6", "of excluded classes"],
            ["no counterpart of submodules", "no counterpart of exclude"],
        ),
        (
            "modifiers:\n- !EpochRangeModifier {start_epoch: 0, end_epoch: 30}\n- !LearningRateFunctionModifier "
            "{start_epoch: 0, end_epoch: 2, lr_func: linear, init_lr: 0.1, final_lr: 0.001}\n- !SetLearningRateModifier "
            "{start_epoch: 5, learning_rate: 0.01}\n",
            ["the rate falls over all 30 epochs here, not until 2", "a rate of 0.01 too: a stage has one, the largest"],
            [],
        ),
        (
            "modifiers:\n- !GMPruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0, final_sparsity: 0.8, "
            "start_epoch: 0, end_epoch: 5, update_frequency: 1}\n",
            ["the last layer stays dense here"],
            ["layers:"],
        ),
        (
            "a_stage:\n  run_type: oneshot\n  a_modifiers:\n    QuantizationModifier:\n      scheme_overrides:\n        Linear:\n"
            "          weights: {num_bits: 8, symmetric: true, strategy: channel}\n",
            ["weights: int8", "activations: int8"],
            [],
        ),
        (
            "a_stage:\n  run_type: oneshot\n  a_modifiers:\n    QuantizationModifier:\n      scheme_overrides:\n        Linear:\n"
            "          input_activations: null\n          weights: {num_bits: 8, symmetric: true, strategy: channel}\n",
            ["weights: int8"],
            ["activations"],
        ),
    ],
)  # fmt: skip
def test_settings_that_change_results_are_translated_or_named(tmp_path, text, has, lacks):
    (tmp_path / "old.yaml").write_text(text)
    migrated = rarefy.migrate(tmp_path / "old.yaml").text
    assert [h for h in has if h not in migrated] == [], migrated
    assert [w for w in lacks if w in migrated] == [], migrated


def test_wrong_settings_are_named_in_the_file_that_was_read(tmp_path):
    for setting, message in (
        (
            "final_sparsty: 0.9",
            "expected final_sparsity as a number, got None, and 'final_sparsty', which is no setting",
        ),
        ("final_sparsity: -0.9", "expected final_sparsity between 0 and 1, got -0.9"),
    ):
        options = f"start_epoch: 0, end_epoch: 5, init_sparsity: 0, update_frequency: 1, {setting}"
        (tmp_path / "old.yaml").write_text(f"modifiers:\n- !MagnitudePruningModifier {{{options}}}\n")
        with pytest.raises(RecipeError, match=f"MagnitudePruningModifier: {message} .*old.yaml line 2"):
            rarefy.migrate(tmp_path / "old.yaml")


def test_tables_name_reasons():
    assert {f"{n}Modifier" for n in ALL_LEGACY} == set(sparseml.HANDLERS) | set(sparseml.UNSUPPORTED)
    assert nncf_neural_compressor.NNCF and copy.copy(nncf_neural_compressor.NNCF_UNSUPPORTED)
