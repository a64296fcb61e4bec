"""Layers of language models in 6, 5 and 4 bits: what a search predicts of them, and the recipe that it writes."""

import pytest
import torch

import rarefy
from conftest import tiny_llama
from helpers.language_models import small
from helpers.marks import slow_case
from rarefy.model.layers import all_layers
from rarefy.recipe.schema import Recipe
from rarefy.search import space
from rarefy.search.deploy import Variant, distance, outputs_of
from rarefy.search.describe import describe, rows_of
from rarefy.search.frontier import Point
from rarefy.search.journal import Journal
from rarefy.search.parts import GAIN, PartMeasurer
from rarefy.search.solve import Choice
from rarefy.search.space import BIT_LEVELS, BITS, HEAD_BITS, RANK, RANK_LEVELS, Part
from rarefy.search.stages import stages_of, weight_stages

pytest.importorskip("transformers")
LAYERS = [f"model.layers.0.self_attn.{n}_proj" for n in ("q", "k", "v", "o")]
INT8 = Variant("int8", "int8")


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (4, 16), generator=generator)} for _ in range(3)]


def parts():
    return [Part(BITS, n, 100, BIT_LEVELS, (0.1, 0.4, 1.6), {"decode": (0.01, 0.02, 0.03)}) for n in LAYERS]


def choice(*amounts):
    return Choice({(BITS, n): a for n, a in zip(LAYERS, amounts) if a}, 0.1, 0.1)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"])
def test_losses_are_in_proportion_to_rounding_errors(model, data, name):
    layer = next(l for l in all_layers(model) if l.full_name == name)
    wanted = outputs_of(model, data)
    losses = [
        space.measured_layer_loss(model, layer, space.setting_of(BITS, level), {}, "magnitude", data, wanted)
        for level in BIT_LEVELS
    ]
    errors = [space.rounding_error(layer, level) for level in BIT_LEVELS]
    assert errors[0] < errors[1] < errors[2]
    for loss, error in zip(losses[:2], errors[:2]):
        assert losses[2] is not None and losses[2] * error / errors[2] == pytest.approx(loss, rel=0.5)


def test_all_numbers_of_bits_are_one_stage_of_the_recipe():
    stages = weight_stages(BITS, dict(zip(LAYERS, (0.5, 0.25, 0.375, 0.25))), has_data=True)
    few = {"weights": "int6", "group": 32, "layers": LAYERS, "solver": {"name": "obs", "asymmetric": 0.5}}
    assert stages == [{"quantize": {**few, "per_layer": {LAYERS[0]: "int4", LAYERS[2]: "int5"}}}]
    assert weight_stages(BITS, dict.fromkeys(LAYERS, 0.25), has_data=True) == [{"quantize": few}]


@pytest.mark.parametrize("smooth", [slow_case(False), True])
def test_the_recipe_runs_in_these_bits(data, smooth):
    made = small()
    variant = Variant("int8", "int8", smooth)
    stages = stages_of(choice(0.25, 0.375, 0.5, 0.0).amounts, parts(), variant, {}, has_data=True)
    rarefy.compress_(made, Recipe(stages=stages, seed=0), {"calibrate": data})
    step = rarefy.decoder(made, precision="int8")
    layers, kernels = step.compiled.exported.layers, step.compiled.kernels
    kinds = {layers[node]: k.held[0].kind for node, k in kernels.items() if layers.get(node) in LAYERS}
    assert kinds == dict(zip(LAYERS, ("int6", "int5", "int4", "int8")))
    with torch.no_grad():
        lost = distance(made, outputs_of(small(), data), data)
    assert lost is not None and lost < 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_a_part_too(data, tied):
    made = tiny_llama(tie=tied)
    name = "model.embed_tokens" if tied else "lm_head"
    heads = space.chosen_layers(made, HEAD_BITS, None, None)
    assert [h.full_name for h in heads] == [name] and space.shares_of_layers(made, heads, data[0]) == {name: 1.0}
    assert space.chosen_layers(made, HEAD_BITS, "model.layers.*", None) == []
    assert space.chosen_layers(made, HEAD_BITS, None, "lm_head") == []
    named = ["model.layers.*", "lm_head"]
    assert [h.full_name for h in space.chosen_layers(made, HEAD_BITS, named, None)] == [name]
    assert name not in [l.full_name for l in space.chosen_layers(made, BITS, named, None)]
    assert name not in [l.full_name for l in space.chosen_layers(made, BITS, None, None)]
    stages = weight_stages(BITS, {name: 0.25, LAYERS[0]: 0.375}, has_data=True)
    rarefy.compress_(made, Recipe(stages=[*stages, *INT8.stages([name, LAYERS[0]])], seed=0), {"calibrate": data})
    step = rarefy.decoder(made, precision="int8")
    layers, kernels = step.compiled.exported.layers, step.compiled.kernels
    kinds = {layers[n]: k.held[0].kind for n, k in kernels.items() if n in layers}
    assert kinds["lm_head"] == "int6" and kinds[LAYERS[0]] == "int5" and kinds[LAYERS[1]] == "int8"


def test_the_output_head_is_timed_alone(data, monkeypatch):
    """Its part has its own time; the layers share theirs. Times of so small a model vary, so they are set here."""
    made = tiny_llama()
    timed = {BITS: 0.4, HEAD_BITS: 0.1}
    monkeypatch.setattr(
        PartMeasurer,
        "_saved",
        lambda self, method, smaller, level=None: {"decode": timed.get(method, 0) * (level or 0)},
    )
    measurer = PartMeasurer(
        made,
        data[0],
        [*data, *data, *data, *data],
        INT8,
        ["decode"],
        Journal(None, {}),
        None,
        None,
        lambda *k: True,
        False,
    )
    made_parts = {p.name: p for p in measurer.measure()}
    head = made_parts.pop("model.embed_tokens")
    assert head.method == BITS and head.savings["decode"] == pytest.approx([0.025, 0.0375, 0.05])
    assert sum(p.savings["decode"][-1] for p in made_parts.values()) == pytest.approx(0.2)
    wanted = outputs_of(made, measurer.few)
    layer = next(l for l in all_layers(made) if l.full_name == "model.embed_tokens")
    loss = space.measured_layer_loss(made, layer, space.setting_of(BITS, 0.5), {}, "magnitude", measurer.few, wanted)
    gain = measurer.journal.values[GAIN]
    assert 0 < gain < 1  # the solver loses less than the nearest values
    assert head.losses[-1] == pytest.approx(gain * loss) and head.losses[0] < head.losses[1] < head.losses[2]


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_low_rank_is_tried_on_some_layers_first(data, monkeypatch, limit):
    """The others are measured where one of these costs little enough beside other methods."""
    made = small(num_hidden_layers=8)
    names = [l.full_name for l in space.chosen_layers(made, RANK, None, None)]
    monkeypatch.setattr(PartMeasurer, "_saved", lambda self, method, smaller, level=None: {"decode": level or 0.5})
    other = Part(BITS, "other", 1, (0.5,), (limit,), {"decode": (0.5,)})
    journal = Journal(None, {})
    measurer = PartMeasurer(made, data[0], data, INT8, ["decode"], journal, None, None, lambda *k: True, False)
    found = measurer._low_rank([other], *measurer._timed_layers(RANK))
    tried = {key.split()[-1] for key in journal.values if key.startswith("loss of low rank 0.3")}
    if limit:
        assert tried == set(names) == {p.name for p in found}
    else:
        assert not found and len(tried) == 3 * 7 and len(names) == 8 * 7
        assert {space.kind_of(name) for name in tried} == {space.kind_of(name) for name in names}


def test_low_rank_that_cannot_be_timed_costs_no_losses(data, monkeypatch):
    """A level that the engine refuses is not used, so that no layer's loss at others is of use."""
    made, refused = small(), []

    def saved(self, method, smaller, level=None):
        refused.append(level)
        return {"decode": 0.4 if level == RANK_LEVELS[-1] else 0.0}

    monkeypatch.setattr(PartMeasurer, "_saved", saved)
    journal = Journal(None, {})
    measurer = PartMeasurer(made, data[0], data, INT8, ["decode"], journal, None, None, lambda *k: True, False)
    assert measurer._low_rank([], *measurer._timed_layers(RANK)) == []
    assert refused == [*RANK_LEVELS[:0:-1]] and not journal.values


def test_a_choice_in_words():
    chosen = choice(0.25, 0.5, 0.25, 0.0)
    assert describe(chosen, parts(), INT8) == "int8, 50 % in 6 bits, 25 % in 4 bits"
    base = Point("dense", 1.0, 0.0, {"decode": {"median": 2.0}}, {"decode": 1.0}, 1, 1, {}, "int8")
    rows = rows_of(chosen, parts(), INT8, base)
    assert [(r["choice"], r["bits"]) for r in rows] == [(BITS, 6), (BITS, 4), (BITS, 6), ("as it is", 8)]
    assert [r["milliseconds"] for r in rows] == [0.02, 0.06, 0.02, 0.0]
