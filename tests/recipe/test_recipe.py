"""Recipes: what is written is what is meant, what is wrong is named with its line, and no text does anything else."""

import inspect
import json
import sys

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, Tied, tiny_llama
from helpers.recipes import FULL
from rarefy import Gradual
from rarefy.common.errors import ModelError, PatternError, RecipeError, SelectorError
from rarefy.common.yaml_text import read_yaml
from rarefy.lowrank.svd import FactorizeOptions
from rarefy.pipeline.dry_run import forecast
from rarefy.quantization.codebook import ShareOptions
from rarefy.recipe import parser as recipes
from rarefy.recipe import schema
from rarefy.structured.options import CutOptions, DropLayersOptions
from rarefy.train.fit import FitOptions
from rarefy.train.optimizers import optimizer_of

STAGES = "stages: [{prune: {sparsity: 0.5}}]\n"


def prune(settings: str) -> str:
    return f"stages:\n  - prune:\n      {settings}\n"


def gradual(settings: str) -> str:
    return f"stages:\n  - train:\n      prune:\n        {settings}\n"


def test_every_field_is_read():
    r = recipes.from_yaml(FULL)
    first, train, cast = r.stages
    assert (r.name, r.about, r.seed, r.save.format) == ("full", "every block once", 7, "csr")
    assert r.data == schema.Data(
        calibrate="wiki", train="wiki", samples=8, train_samples=16, tokens=64, batch=2, seed=3
    )
    assert first == schema.PruneOptions(
        layers=("model.*", "re:.*q_proj"), ignore=("lm_head",), pattern="2:4", score="wanda"
    )
    assert isinstance(train, schema.TrainStage) and train.optimizer == schema.Optimizer(
        name="sgd", lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    assert (train.epochs, train.lr_schedule) == (2, "one-cycle")
    assert train.prune == Gradual(
        pattern="4x1", sparsity=0.75, schedule="linear", steps=4, first=0.5, start=0.1, end=0.9,
        regrow=True, reduce="l2", scope="global",
    )  # fmt: skip
    assert cast == schema.CastOptions(dtype="bf16")
    assert r.evaluate and r.evaluate.latency == schema.Latency(batch=(1, 4), repeats=3)
    assert r.evaluate.decode == schema.Decode(prompt=16, new=4, repeats=2) and r.evaluate.max_degradation == 0.15


@pytest.mark.parametrize(
    ("settings", "field", "want"),
    [
        ("{layers: fc, sparsity: 0.5}", "layers", ("fc",)),
        ("{layers: [fc], sparsity: 0.5}", "layers", ("fc",)),
        ("{layers: [conv, fc], sparsity: 0.5}", "layers", ("conv", "fc")),
        ("{layers: null, sparsity: 0.5}", "layers", None),
        ("{sparsity: 5e-1}", "sparsity", 0.5),
        ("{sparsity: 1}", "sparsity", 1.0),
        ("{sparsity: 0}", "sparsity", 0.0),
        ("{pattern: 2:4}", "pattern", "2:4"),
        ("{pattern: 1:16}", "pattern", "1:16"),
        ("{pattern: 16:32}", "pattern", "16:32"),
        ("{pattern: '2:4'}", "pattern", "2:4"),
        ("{pattern: 4x1, sparsity: 0.5}", "pattern", "4x1"),
        ("{pattern: 2:4, sparsity: 0.5}", "sparsity", 0.5),
    ],
)
def test_values_as_people_write_them(settings, field, want):
    [stage] = recipes.from_yaml(prune(settings)).stages
    got = getattr(stage, field)
    assert got == want and type(got) is type(want)


ERRORS = {
    # shape of the text
    "empty": ("", "r.yaml is empty; a recipe has at least stages"),
    "only a comment": ("# nothing\n", "r.yaml is empty; a recipe has at least stages"),
    "not YAML": ("stages:\n  - prune: [\n", "r.yaml line 3: not YAML: expected the node content, but found '<stream end>'"),
    "a tab": ("stages:\n\t- prune\n", "r.yaml line 2: not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs"),
    "a control character": ("\x00", "r.yaml: not YAML: unacceptable character #x0000: special characters are not allowed"),
    "two documents": (STAGES + "---\n" + STAGES, "r.yaml line 2: not YAML: but found another document"),
    "too deep": ("[" * 1000, "r.yaml line 1: nested deeper than a recipe may be (16)"),
    "too deep, closed": ("a: " + "[" * 1000 + "]" * 1000, "r.yaml line 1: nested deeper than a recipe may be (16)"),
    "a list": ("- prune: {}\n", "r.yaml line 1: expected keys and values, got [{'prune': {}}]"),
    "a word": ("\n\nhello", "r.yaml line 3: expected keys and values, got 'hello'"),
    "too long": ("#" * ((1 << 20) + 1), "r.yaml is 1,048,577 characters long; a recipe has at most 65,536"),
    "a key twice": ("name: a\nseed: 1\nname: b\n" + STAGES, "r.yaml line 3: duplicate key 'name'"),
    "a key twice, deep": (prune("sparsity: 0.5\n      sparsity: 0.6"), "r.yaml line 4: duplicate key 'sparsity'"),
    "a list as key": ("? [a]\n: 1\n", "r.yaml line 1: expected a string as key"),
    "an alias": ("name: &n x\nabout: *n\n" + STAGES, "r.yaml line 2: aliases (*name) are not part of a recipe: write the value out"),
    "billion laughs": ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "r.yaml line 2: aliases (*name) are not part of a recipe: write the value out"),
    "a merge key": ("<<: {seed: 1}\n" + STAGES, "r.yaml line 1: unknown field '<<'; choose from about, data, evaluate, name, save, seed, stages"),
    # tags
    "python object, scalar": ("name: a\nabout: !!python/name:os.system x\n" + STAGES, "r.yaml line 2: tag 'tag:yaml.org,2002:python/name:os.system' is not part of a recipe: only strings, numbers and lists"),
    "python object, mapping": ("name: a\ndata: !!python/object:os.system {samples: 3}\n" + STAGES, "r.yaml line 2: tag 'tag:yaml.org,2002:python/object:os.system' is not part of a recipe: only strings, numbers and lists"),
    "python object, list": ("stages: !!python/object/apply:os.system\n  - cast: {dtype: bf16}\n", "r.yaml line 1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not part of a recipe: only strings, numbers and lists"),
    "own tag": ("name: !include other.yaml\n" + STAGES, "r.yaml line 1: tag '!include' is not part of a recipe: only strings, numbers and lists"),
    "binary": ("name: !!binary aGk=\n" + STAGES, "r.yaml line 1: tag 'tag:yaml.org,2002:binary' is not part of a recipe: only strings, numbers and lists"),
    "int that is none": ("seed: !!int x\n" + STAGES, "r.yaml line 1: tag 'tag:yaml.org,2002:int' is not part of a recipe: only strings, numbers and lists"),
    "float that is none": ("seed: !!float x\n" + STAGES, "r.yaml line 1: tag 'tag:yaml.org,2002:float' is not part of a recipe: only strings, numbers and lists"),
    "bool that is none": ("seed: !!bool x\n" + STAGES, "r.yaml line 1: tag 'tag:yaml.org,2002:bool' is not part of a recipe: only strings, numbers and lists"),
    "timestamp that is none": ("seed: !!timestamp x\n" + STAGES, "r.yaml line 1: tag 'tag:yaml.org,2002:timestamp' is not part of a recipe: only strings, numbers and lists"),
    "a number of 5000 digits": ("seed: " + "9" * 5000 + "\n" + STAGES, "r.yaml line 1: '999999999999999999999999999999999999999999999999999999999999' is not a number that can be read"),
    # keys
    "unknown key": ("name: a\nseeed: 3\n" + STAGES, "r.yaml line 2: unknown field 'seeed'; choose from about, data, evaluate, name, save, seed, stages (did you mean 'seed'?)"),
    "unknown field of a stage": (prune("sparsty: 0.5"), "r.yaml line 3: stages[0].prune: unknown field 'sparsty'; choose from allocate, ignore, layers, pattern, per_layer, reduce, scope, score, solver, sparsity (did you mean 'sparsity'?)"),
    "unknown field of data": ("data:\n  calibrat: wiki\n" + STAGES, "r.yaml line 2: data: unknown field 'calibrat'; choose from batch, calibrate, samples, seed, tokens, train, train_samples, validate, validate_samples (did you mean 'calibrate'?)"),
    "unknown key, nothing near": ("zzz: 3\n" + STAGES, "r.yaml line 1: unknown field 'zzz'; choose from about, data, evaluate, name, save, seed, stages"),
    "no stages": ("name: a\n", "r.yaml line 1: stages is required"),
    "no metric": ("evaluate: {data: wiki}\n" + STAGES, "r.yaml line 1: evaluate: metric is required"),
    "no dtype": ("stages:\n  - cast: {}\n", "r.yaml line 2: stages[0].cast: dtype is required"),
    # stages
    "stages null": ("stages:\n", "r.yaml line 1: stages: stages must be a list such as '- prune: {sparsity: 0.5}', got None"),
    "stages empty": ("stages: []\n", "r.yaml line 1: stages: stages must be a list such as '- prune: {sparsity: 0.5}', got []"),
    "stages a mapping": ("stages:\n  prune: {sparsity: 0.5}\n", "r.yaml line 1: stages: stages must be a list such as '- prune: {sparsity: 0.5}', got keys prune"),
    "unknown stage": ("stages:\n  - cast: {dtype: bf16}\n  - prun: {}\n", "r.yaml line 3: stages[1]: unknown stage 'prun'; choose from cast, cut, factorize, permute, prune, quantize, share, tie, train (did you mean 'prune'?)"),
    "a bare stage": ("stages:\n  - prune\n", "r.yaml line 2: stages[0]: expected a stage, one of permute, cut, prune, quantize, factorize, share, tie, train, cast, with its options, got 'prune'"),
    "two stages in one": ("stages:\n  - prune: {sparsity: 0.5}\n    cast: {dtype: bf16}\n", "r.yaml line 2: stages[0]: expected a stage, one of permute, cut, prune, quantize, factorize, share, tie, train, cast, with its options, got keys prune, cast"),
    "settings a number": ("stages:\n  - prune: 0.5\n", "r.yaml line 2: stages[0].prune: expected keys and values, got 0.5"),
    "settings null": ("stages:\n  - prune:\n", "r.yaml line 2: stages[0].prune: pattern 'unstructured' needs a sparsity between 0 and 1"),
    # types
    "name a number": ("name: 3\n" + STAGES, "r.yaml line 1: name: expected a string, got 3"),
    "word for a whole number": ("seed: many\n" + STAGES, "r.yaml line 1: seed: expected a whole number from 0 to 4294967295, got 'many'"),
    "fraction for a whole number": ("data:\n  samples: 1.5\n" + STAGES, "r.yaml line 2: data.samples: expected a whole number of at least 1, got 1.5"),
    "base 60 for a whole number": ("data: {samples: 1:30}\n" + STAGES, "r.yaml line 1: data.samples: expected a whole number of at least 1, got '1:30'"),
    "bool for a whole number": ("data: {samples: yes}\n" + STAGES, "r.yaml line 1: data.samples: expected a whole number of at least 1, got 'yes'"),
    "bool for a number": (prune("sparsity: true"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got True"),
    "word for a number": (prune("sparsity: half"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got 'half'"),
    "number for a bool": (gradual("{sparsity: 0.5, regrow: 1}"), "r.yaml line 4: stages[0].train.prune.regrow: expected true or false, got 1"),
    "list for a word": (prune("score: [wanda]"), "r.yaml line 3: stages[0].prune.score: expected one of magnitude, l2, lamp, random, gradient, taylor, fisher, activation, wanda, ria, got ['wanda']"),
    "list in a list": (prune("{sparsity: 0.5, layers: [[fc]]}"), "r.yaml line 3: stages[0].prune.layers: expected a string or a list of these, got [['fc']]"),
    "number in a list": (prune("{sparsity: 0.5, layers: [fc, 3]}"), "r.yaml line 3: stages[0].prune.layers: expected a string or a list of these, got ['fc', 3]"),
    "mapping for words": (prune("{sparsity: 0.5, layers: {fc: 1}}"), "r.yaml line 3: stages[0].prune.layers: expected a string or a list of these, got keys fc"),
    "word for a block": ("data: wiki\n" + STAGES, "r.yaml line 1: data: expected keys and values, got 'wiki'"),
    "null for a word": ("name: null\n" + STAGES, "r.yaml line 1: name: expected a string, got None"),
    "list for a block": ("save: [csr]\n" + STAGES, "r.yaml line 1: save: expected keys and values, got ['csr']"),
    # choices
    "unknown score": (prune("{sparsity: 0.5, score: wandda}"), "r.yaml line 3: stages[0].prune.score: unknown score 'wandda'; choose from activation, fisher, gradient, l2, lamp, magnitude, random, ria, taylor, wanda (did you mean 'wanda'?)"),
    "unknown scope": (prune("{sparsity: 0.5, scope: layr}"), "r.yaml line 3: stages[0].prune.scope: unknown scope 'layr'; choose from global, layer, row (did you mean 'layer'?)"),
    "unknown reduce": (prune("{pattern: 4x1, sparsity: 0.5, reduce: maxx}"), "r.yaml line 3: stages[0].prune.reduce: unknown reduce 'maxx'; choose from l2, max, mean, sum (did you mean 'max'?)"),
    "unknown schedule": (gradual("{sparsity: 0.5, schedule: cubik}"), "r.yaml line 4: stages[0].train.prune.schedule: unknown schedule 'cubik'; choose from cubic, exponential, linear (did you mean 'cubic'?)"),
    "unknown lr_schedule": ("stages: [{train: {lr_schedule: cosin}}]\n", "r.yaml line 1: stages[0].train.lr_schedule: unknown lr_schedule 'cosin'; choose from constant, cosine, linear, one-cycle (did you mean 'cosine'?)"),
    "unknown metric": ("evaluate: {metric: acuracy}\n" + STAGES, "r.yaml line 1: evaluate.metric: unknown metric 'acuracy'; choose from accuracy, agreement, perplexity, retrieval, similarity (did you mean 'accuracy'?)"),
    "unknown dtype": ("stages: [{cast: {dtype: bf8}}]\n", "r.yaml line 1: stages[0].cast.dtype: unknown dtype 'bf8'; choose from bf16, fp16, fp32 (did you mean 'bf16'?)"),
    "unknown format": ("save: {format: bitmaks}\n" + STAGES, "r.yaml line 1: save.format: unknown format 'bitmaks'; choose from bitmask, bsr, csc, csr, dense, dense+mask, nm, smallest (did you mean 'bitmask'?)"),
    "unknown optimizer": ("stages:\n  - train:\n      optimizer: {name: adamv}\n", "r.yaml line 3: stages[0].train.optimizer.name: unknown optimizer 'adamv'; choose from adam, adamw, sgd (did you mean 'adam'?)"),
    "an option that the optimizer lacks": ("stages:\n  - train:\n      optimizer: {name: adamw, momentum: 0.9}\n", "r.yaml line 3: stages[0].train.optimizer.name: optimizer 'adamw' cannot be made with lr=0.0001, {'momentum': 0.9}"),
    # ranges
    "epochs 0": ("stages:\n  - train:\n      epochs: 0\n", "r.yaml line 3: stages[0].train.epochs: expected a whole number of at least 1, got 0"),
    "samples 0": ("data:\n  samples: 0\n" + STAGES, "r.yaml line 2: data.samples: expected a whole number of at least 1, got 0"),
    "train_samples -1": ("data: {train_samples: -1}\n" + STAGES, "r.yaml line 1: data.train_samples: expected a whole number of at least 1, got -1"),
    "tokens 0": ("data: {tokens: 0}\n" + STAGES, "r.yaml line 1: data.tokens: expected a whole number of at least 1, got 0"),
    "batch 0": ("data: {batch: 0}\n" + STAGES, "r.yaml line 1: data.batch: expected a whole number of at least 1, got 0"),
    "steps 0": (gradual("{sparsity: 0.5, steps: 0}"), "r.yaml line 4: stages[0].train.prune.steps: expected a whole number between 1 and 100,000, got 0"),
    "latency batch 0": ("evaluate: {metric: accuracy, latency: {batch: [1, 0]}}\n" + STAGES, "r.yaml line 1: evaluate.latency.batch[1]: expected a whole number of at least 1, got 0"),
    "repeats 0": ("evaluate: {metric: accuracy, latency: {repeats: 0}}\n" + STAGES, "r.yaml line 1: evaluate.latency.repeats: expected a whole number of at least 1, got 0"),
    "prompt 0": ("evaluate: {metric: accuracy, decode: {prompt: 0}}\n" + STAGES, "r.yaml line 1: evaluate.decode.prompt: expected a whole number of at least 1, got 0"),
    "new 0": ("evaluate: {metric: accuracy, decode: {new: 0}}\n" + STAGES, "r.yaml line 1: evaluate.decode.new: expected a whole number of at least 1, got 0"),
    "sparsity 1.5": (prune("sparsity: 1.5"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got 1.5"),
    "sparsity 50": (prune("sparsity: 50"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got 50; did you mean 0.5?"),
    "sparsity -0.1": (prune("sparsity: -0.1"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got -0.1"),
    "sparsity nan": (prune("sparsity: .nan"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got nan"),
    "sparsity 'nan'": (prune("sparsity: nan"), "r.yaml line 3: stages[0].prune.sparsity: expected a number between 0 and 1, got 'nan'"),
    "end 1.1": (gradual("{sparsity: 0.5, end: 1.1}"), "r.yaml line 4: stages[0].train.prune.end: expected a number between 0 and 1, got 1.1"),
    "lr nan": ("stages: [{train: {optimizer: {lr: .nan}}}]\n", "r.yaml line 1: stages[0].train.optimizer.lr: expected a number of at least 0, got nan"),
    "lr -1": ("stages: [{train: {optimizer: {lr: -1}}}]\n", "r.yaml line 1: stages[0].train.optimizer.lr: expected a number of at least 0, got -1"),
    "precision without the engine": ("evaluate: {metric: accuracy, precision: int8}\n" + STAGES, "r.yaml line 1: evaluate.precision: precision has no effect without engine: true"),
    "accelerate and engine": ("evaluate: {metric: accuracy, latency: {}, engine: true, accelerate: true}\n" + STAGES, "r.yaml line 1: evaluate.accelerate: accelerate and engine exclude each other: the first times eager PyTorch, the second the engine"),
    "precision of no name": ("evaluate: {metric: accuracy, engine: true, precision: int9}\n" + STAGES, "r.yaml line 1: evaluate.precision: unknown precision 'int9'; choose from int8 (did you mean 'int8'?)"),
    "accelerate alone": ("evaluate: {metric: accuracy, accelerate: true}\n" + STAGES, "r.yaml line 1: evaluate.accelerate: accelerate has no effect without latency or decode: give one of them"),
    "max_degradation nan": ("evaluate: {metric: accuracy, max_degradation: .nan}\n" + STAGES, "r.yaml line 1: evaluate.max_degradation: expected a number above -1 and at most 1, got nan"),
    "a seed that torch cannot take": ("seed: 99999999999999999999\n" + STAGES, "r.yaml line 1: seed: expected a whole number from 0 to 4294967295, got 99999999999999999999"),
    # patterns
    "3:2": (prune("pattern: 3:2"), "r.yaml line 3: stages[0].prune.pattern: pattern '3:2' keeps 3 of every 2: N:M needs 1 <= N < M <= 64, such as 2:4 (N counts what is kept)"),
    "0:4": (prune("pattern: 0:4"), "r.yaml line 3: stages[0].prune.pattern: pattern '0:4' keeps 0 of every 4: N:M needs 1 <= N < M <= 64, such as 2:4 (N counts what is kept)"),
    "4:128": (prune("pattern: 4:128"), "r.yaml line 3: stages[0].prune.pattern: pattern '4:128' keeps 4 of every 128: N:M needs 1 <= N < M <= 64, such as 4:8 (N counts what is kept)"),
    "1x1": (prune("{sparsity: 0.5,\n       pattern: 1x1}"), "r.yaml line 4: stages[0].prune.pattern: pattern '1x1': a block RxC has 2 to 4096 entries, such as 4x1 or 1x4"),
    "unknown pattern": (prune("{sparsity: 0.5, pattern: unstructred}"), "r.yaml line 3: stages[0].prune.pattern: unknown pattern 'unstructred'; choose from 1x4, 2:4, 4:8, 4x1, channel, column, row, unstructured (did you mean 'unstructured'?); any N:M, any RxC"),
    "N:M with another sparsity": (prune("sparsity: 0.6\n      pattern: 2:4"), "r.yaml line 4: stages[0].prune.pattern: pattern 2:4 implies sparsity 0.5, got 0.6: leave sparsity out, or use a pattern with another ratio"),
    "N:M with a scope": (prune("{pattern: 2:4, scope: row}"), "r.yaml line 3: stages[0].prune.scope: pattern 2:4 fixes the count in every group: scope 'row' has no effect"),
    "no sparsity": (prune("pattern: 4x1"), "r.yaml line 3: stages[0].prune.pattern: pattern '4x1' needs a sparsity between 0 and 1"),
    "rows of rows": (prune("{pattern: row, sparsity: 0.5, scope: row}"), "r.yaml line 3: stages[0].prune.scope: pattern 'row' prunes whole lines: scope 'row' is impossible; use layer or global"),
    "reduce without units": (prune("{sparsity: 0.5, reduce: l2}"), "r.yaml line 3: stages[0].prune.reduce: pattern unstructured has units of one entry: reduce='l2' has no effect"),
    "reduce with N:M": (prune("{pattern: 2:4, reduce: l2}"), "r.yaml line 3: stages[0].prune.reduce: pattern 2:4 has units of one entry: reduce='l2' has no effect"),
    "start after end": (gradual("sparsity: 0.5\n        start: 0.8\n        end: 0.2"), "r.yaml line 5: stages[0].train.prune.start: expected start <= end, got start 0.8 and end 0.2"),
    "first above last": (gradual("{sparsity: 0.5, first: 0.6}"), "r.yaml line 4: stages[0].train.prune.first: expected 0 <= first <= last <= 1, got first 0.6 and last 0.5"),
    "exponential to 1": (gradual("{sparsity: 1, schedule: exponential}"), "r.yaml line 4: stages[0].train.prune.schedule: an exponential schedule never reaches sparsity 1: use linear or cubic"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_line_and_what_would_do(case):
    text, message = ERRORS[case]
    with pytest.raises(RecipeError) as error:
        recipes.from_yaml(text, "r.yaml")
    assert str(error.value).startswith(message)


DICT_ERRORS = [
    ({}, "recipe: stages is required"),
    ({"stages": [{"prune": {"sparsty": 1}}]}, "recipe: stages[0].prune: unknown field 'sparsty'; choose from allocate, ignore, layers, pattern, per_layer, reduce, scope, score, solver, sparsity (did you mean 'sparsity'?)"),
    ({"stages": [{"cast": {"dtype": "bf16"}}, {"prune": {"sparsity": "x"}}]}, "recipe: stages[1].prune.sparsity: expected a number between 0 and 1, got 'x'"),
    ({"stages": [{"prune": {"sparsity": 2}}]}, "recipe: stages[0].prune.sparsity: expected a number between 0 and 1, got 2"),
    ({"stages": "prune"}, "recipe: stages: stages must be a list such as '- prune: {sparsity: 0.5}', got 'prune'"),
    ({"stages": [{"prune": {"sparsity": 0.5}}], 3: 1}, "recipe: unknown field '3'; choose from about, data, evaluate, name, save, seed, stages"),
    ({"stages": [{"prune": {"sparsity": 0.5, "score": print}}]}, "recipe: stages[0].prune.score: expected one of magnitude, l2, lamp, random, gradient, taylor, fisher, activation, wanda, ria, got "),
    ({"stages": [{"prune": {"sparsity": 0.5}}], "data": {"samples": True}}, "recipe: data.samples: expected a whole number of at least 1, got True"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), DICT_ERRORS)
def test_errors_of_dicts_name_the_path(values, message):
    with pytest.raises(RecipeError) as error:
        recipes.from_dict(values)
    assert str(error.value).startswith(message)


def test_a_recipe_may_be_a_dict_a_file_a_preset_or_itself(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(FULL, encoding="utf-8")
    r = recipes.load(file)
    assert r == recipes.load(str(file)) == recipes.load(r.to_dict()) == recipes.load(r)
    assert recipes.load("smollm2-demo").name == "smollm2-demo"


def test_file_errors(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="latin.yaml: a recipe is UTF-8 text"):
        recipes.load(tmp_path / "latin.yaml")
    (tmp_path / "bad.yaml").write_text("\nseeed: 1\n" + STAGES)
    with pytest.raises(RecipeError, match=r"bad.yaml line 2: unknown field 'seeed'.*did you mean 'seed'\?"):
        recipes.load(tmp_path / "bad.yaml")
    with pytest.raises(
        RecipeError,
        match=r"no recipe file 'smolm2-demo' and no preset of that name \(.*fashion-oneshot-50.*\); did you mean 'smollm2-demo'\?",
    ):
        recipes.load("smolm2-demo")
    with pytest.raises(RecipeError, match=r"no recipe file 'zzz' and no preset of that name \([^;]*\)$"):
        recipes.load("zzz")
    with pytest.raises(RecipeError, match="is a folder; a recipe is a YAML file or a preset"):
        recipes.load(tmp_path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + STAGES.encode())
    assert recipes.load(file).stages == (schema.PruneOptions(sparsity=0.5),)


PRESETS = sorted(recipes.folder().glob("*.yaml"))


def test_there_are_presets_and_each_has_its_own_name():
    assert {p.stem for p in PRESETS} == set(recipes.presets()) >= {"smollm2-demo", "fashion-oneshot-50"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_parses_and_says_what_it_is(path):
    r = recipes.load(path)
    assert r.name == path.stem and len(r.about) > 20 and r == recipes.load(path.stem)


@pytest.mark.parametrize("text", [FULL, STAGES, *(p.read_text(encoding="utf-8") for p in PRESETS)])
def test_round_trips(text):
    r = recipes.from_yaml(text)
    values = r.to_dict()
    assert recipes.from_dict(values) == r
    assert recipes.from_yaml(r.to_yaml()) == r
    assert recipes.from_dict(values).to_dict() == values
    assert all(set(s) <= set(schema.STAGES) for s in values["stages"])
    assert _only_plain(values)


def _only_plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _only_plain(v) for k, v in value.items())
    return (
        all(map(_only_plain, value))
        if isinstance(value, list)
        else value is None or type(value) in (str, int, float, bool)
    )


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"tokens": 32}, lambda r: r.data.tokens == 32 and r.evaluate.tokens == 32),  # wherever it stands
        ({"evaluate.data": "x.txt"}, lambda r: r.evaluate.data == "x.txt" and r.data.calibrate == "wiki"),
        ({"data.tokens": 32}, lambda r: r.data.tokens == 32 and r.evaluate.tokens == 512),
        ({"optimizer.lr": 1e-3}, lambda r: r.stages[1].optimizer.lr == 1e-3),
        ({"optimizer.name": "adam", "momentum": None, "nesterov": None}, lambda r: r.stages[1].optimizer == schema.Optimizer(name="adam", weight_decay=5e-4)),
        ({"seed": 9}, lambda r: r.seed == 9 and r.data.seed == 9),
        ({"calibrate": "a.txt"}, lambda r: r.data.calibrate == "a.txt" and r.data.train == "wiki"),
        ({"ignore": ["a", "b"]}, lambda r: r.stages[0].ignore == ("a", "b") and r.stages[1].prune.ignore is None),
        ({"sparsity": 0.7}, lambda r: r.stages[0].sparsity is None and r.stages[1].prune.sparsity == 0.7),
        ({"dtype": "fp16"}, lambda r: r.stages[2].dtype == "fp16"),
        ({"latency": None}, lambda r: r.evaluate.latency is None),
        ({"train.prune": None}, lambda r: r.stages[1].prune is None and r.stages[0].pattern == "2:4"),
        ({"train.prune.ignore": "a"}, lambda r: r.stages[1].prune.ignore == ("a",) != r.stages[0].ignore),
    ],
)  # fmt: skip
def test_overrides(changes, want):
    r = recipes.from_yaml(FULL)
    assert want(recipes.load(r, **changes))
    assert r == recipes.from_yaml(FULL)  # the old one is not changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsty": 0.4}, r"unknown override 'sparsty'; .*did you mean 'sparsity'\?\) \[recipe full\]"),
        ({"evaluate.dta": "x"}, r"unknown override 'evaluate.dta'"),
        ({"save.data": "x"}, r"unknown override 'save.data'"),
        (
            {"prune.sparsity": 0.4},
            r"recipe: stages\[0\].prune.pattern: pattern 2:4 implies sparsity 0.5, got 0.4",
        ),
        ({"epochs": 0}, r"recipe: stages\[1\].train.epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": True}, r"epochs: expected a whole number of at least 1, got True"),
        ({"stages": []}, r"recipe: stages: stages must be a list .* got \[\]"),
    ],
)
def test_override_errors(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipes.load(recipes.from_yaml(FULL), **changes)


PRUNES = [p.stem for p in PRESETS if "sparsity:" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PRUNES)
@pytest.mark.parametrize("prefix", ["", "prune."])
def test_the_sparsity_of_each_preset_can_be_overridden(name, prefix):
    before, after = recipes.load(name), recipes.load(name, **{f"{prefix}sparsity": 0.4})
    stages = [getattr(s, "prune", s) for s in after.stages]
    assert [s.sparsity for s in stages if isinstance(s, schema.PruneOptions | schema.Gradual)] == [0.4]
    assert [a != b for a, b in zip(before.stages, after.stages)].count(True) == 1


def test_presets_that_prune():
    assert {"smollm2-demo", "sparse50-int8", "balanced", "deep-compression"} <= set(PRUNES)
    assert recipes.load("2of4-int4", sparsity=0.5).stages[0].sparsity == 0.5  # null in the preset
    with pytest.raises(RecipeError, match=r"quantize.pattern: pattern 2:4 implies sparsity 0.5, got 0.4: leave"):
        recipes.load("2of4-int4", sparsity=0.4)


def test_an_override_that_is_set_nowhere():
    recipe = {"stages": [{"prune": {"pattern": "2:4"}}, {"quantize": {}}]}
    with pytest.raises(
        RecipeError, match=r"no effect without pattern; to set it in one stage, name .*: prune.sparsity=0.5$"
    ):
        recipes.load(recipe, sparsity=0.5)
    assert recipes.load(recipe, **{"prune.sparsity": 0.5}).stages[0].sparsity == 0.5
    assert all(s.ignore == ("a",) for s in recipes.load(recipe, ignore="a").stages)


def test_an_override_of_a_section_that_is_not_there():
    plain = {"stages": [{"cast": {"dtype": "bf16"}}]}
    recipe = recipes.load(plain, **{"data.train": "x.txt", "data.tokens": 8, "evaluate.metric": "perplexity"})
    assert (recipe.data.train, recipe.data.tokens, recipe.evaluate.metric) == ("x.txt", 8, "perplexity")
    with pytest.raises(RecipeError, match="evaluate: metric is required"):
        recipes.load(plain, **{"evaluate.data": "y.txt"})
    with pytest.raises(RecipeError, match=r"data: unknown field 'trian'.*did you mean 'train'"):
        recipes.load(plain, **{"data.trian": "x"})
    with pytest.raises(RecipeError, match=r"unknown override 'dta.train'"):
        recipes.load(plain, **{"dta.train": "x"})


def test_a_recipe_never_imports_code(tmp_path, monkeypatch):
    (tmp_path / "evil_rarefy_test.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for tag in ("module", "name", "object", "object/apply", "object/new"):
        for value in ("''", "{}", "[]"):
            suffix = "evil_rarefy_test" + ("" if tag == "module" else ".f")
            with pytest.raises(RecipeError):
                recipes.from_yaml(f"name: !!python/{tag}:{suffix} {value}\n{STAGES}")
    for word in ("evil_rarefy_test", "evil_rarefy_test:f", "evil_rarefy_test.f"):
        with pytest.raises(RecipeError):
            recipes.from_yaml(prune(f"{{sparsity: 0.5, score: '{word}'}}"))
    assert "evil_rarefy_test" not in sys.modules


def test_an_unknown_optimizer():
    with pytest.raises(RecipeError, match="unknown optimizer 'adamv'"):
        optimizer_of("adamv", 0.1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),  # no number to base 60
        ("2024-10-05", "2024-10-05"),  # no date
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("0o17", 15),
        ("010", 10),
        ("~", None),
        ("'0.5'", "0.5"),
        ("1_000", 1000),
    ],
)
def test_scalars_of_yaml_1_2(text, value):
    got = recipes.value(text, "here")
    assert got == value and type(got) is type(value)


def test_numbers_in_quotes_and_booleans_for_numbers_are_refused():
    for text in ('"0.5"', "'1'", "true", "yes"):
        with pytest.raises(RecipeError, match="sparsity: expected a number between 0 and 1, got "):
            recipes.from_yaml(prune(f"sparsity: {text}"))


def test_the_line_is_that_of_the_field_whatever_the_message_says():
    text = "stages:\n- prune:\n    sparsity: 0.5\n    scope: global\n    solver:\n      name: obs\n      damping: 11\n"
    with pytest.raises(
        RecipeError, match=r"r line 7: stages\[0\].prune.solver.damping: expected a number between 0 and"
    ):
        recipes.from_yaml(text, "r")
    with pytest.raises(
        RecipeError,
        match=r"r line 5: stages\[0\].prune.solver: solver obs ranks weights block by block: scope",
    ):
        recipes.from_yaml(text.replace("11", "1"), "r")
    with pytest.raises(
        RecipeError, match=r"r line 4: stages\[0\].train.distill.top: top has no effect: it selects classes"
    ):
        recipes.from_yaml("stages:\n- train:\n    distill: {\n      top: 5,\n      by: mse}\n", "r")


VERBS = [
    (rarefy.prune_, schema.PruneOptions),
    (rarefy.quantize_, schema.QuantizeOptions),
    (rarefy.factorize_, FactorizeOptions),
    (rarefy.share_, ShareOptions),
    (rarefy.tie_layers_, schema.TieOptions),
    (rarefy.cut_, CutOptions),
    (rarefy.drop_layers_, DropLayersOptions),
    (rarefy.permute_, schema.PermuteOptions),
    (rarefy.fit_, FitOptions),
    (rarefy.cast_, schema.CastOptions),
]


@pytest.mark.parametrize(("verb", "options"), VERBS, ids=lambda x: x.__name__)
def test_a_verb_has_the_parameters_and_defaults_of_its_options(verb, options):
    parameters = inspect.signature(verb).parameters
    for name, field in options.model_fields.items():
        assert name in parameters, name
        default = parameters[name].default
        assert field.is_required() if default is inspect.Parameter.empty else default == field.default, name


@pytest.mark.parametrize("options", [*schema.STAGES.values(), schema.Recipe, schema.Evaluate, schema.Data])
def test_every_field_has_a_description(options):
    assert all(field.description for field in options.model_fields.values()) and options.__doc__


def test_options_are_frozen():
    options = schema.PruneOptions(sparsity=0.5)
    with pytest.raises(ValueError, match="frozen"):
        options.sparsity = 0.6
    assert options.replace(sparsity=0.6).sparsity == 0.6 and options.sparsity == 0.5
    with pytest.raises(PatternError, match="sparsity: expected a number between 0 and 1, got 6"):
        options.replace(sparsity=6)


def test_an_error_of_nested_options_names_the_whole_path():
    with pytest.raises(PatternError, match="^solver.damping: expected a number between 0 and 10, got -1$"):
        rarefy.prune_(Net(), sparsity=0.5, solver={"name": "obs", "damping": -1})
    with pytest.raises(PatternError, match="^solver: name is required$"):
        rarefy.prune_(Net(), sparsity=0.5, solver={"damping": 1})
    with pytest.raises(SelectorError, match="^layers: expected a string or a list of these, got 3$"):
        rarefy.prune_(Net(), sparsity=0.5, layers=3)


def test_the_json_schema_allows_what_the_parser_allows():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipes.json_schema())
    for path in PRESETS:
        validator.validate(read_yaml(path.read_text(encoding="utf-8"), path.name).data)
    validator.validate(read_yaml(FULL, "full").data)
    for wrong in ("stages: []", "stages: [{prune: {sparsity: 2}}]", "stages: [{prune: {sparsty: 0.5}}]", "seed: 1"):
        assert not validator.is_valid(read_yaml(wrong, "wrong").data) or wrong == "stages: []"


def test_the_json_schema_describes_every_field():
    text = json.dumps(recipes.json_schema())
    for words in ("fraction of zeros; an N:M pattern determines it", '"exclusiveMinimum"', "unstructured"):
        assert words in text


# forecasts


FORECASTS = {
    "unstructured half": "stages: [{prune: {sparsity: 0.5}}]",
    "unstructured 90 %": "stages: [{prune: {sparsity: 0.9}}]",
    "2:4 in bf16": "stages: [{prune: {pattern: 2:4, ignore: deep}}, {cast: {dtype: bf16}}]",
    "bf16 first": "stages: [{cast: {dtype: bf16}}, {prune: {pattern: 2:4, ignore: deep}}]",
    "blocks": "stages: [{prune: {pattern: 4x1, sparsity: 0.75, ignore: deep}}]",
    "only a cast": "stages: [{cast: {dtype: fp16}}]",
}


class Big(nn.Module):
    """Net's kinds of layers, large enough that an index is a small part of the file."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 64, 3)
        self.deep = nn.Conv2d(64, 64, 3, groups=64)
        self.up = nn.ConvTranspose2d(64, 64, 2, groups=2)
        self.hidden = nn.Linear(64, 256)
        self.fc = nn.Linear(256, 5)


def stored(folder) -> int:
    """Bytes of the tensors alone: the safetensors files without their headers, whose length does not scale."""
    total = 0
    for file in folder.glob("*.safetensors"):
        head = int.from_bytes(file.read_bytes()[:8], "little")
        total += file.stat().st_size - 8 - head
    return total


@pytest.mark.parametrize("make", [Big, Net, tiny_llama], ids=["big", "net", "llama"])
@pytest.mark.parametrize("case", FORECASTS)
def test_forecast_is_what_saving_takes(make, case, tmp_path):
    text = FORECASTS[case] if make is not tiny_llama else FORECASTS[case].replace(", ignore: deep", "")
    model = make()
    plan = recipes.from_yaml(text)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = forecast(model, plan)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    rarefy.compress_(model, plan)
    rarefy.save(model, tmp_path / "out")
    rows = {r["tensor"]: r for r in rarefy.inspect(tmp_path / "out").rows}
    allowed = 0.02 if make is not Net else 0.1  # Net is 2.4 kB: a rounded-up byte counts
    assert report.summary["bytes expected"] == pytest.approx(stored(tmp_path / "out"), rel=allowed)
    assert report.summary["bytes now"] == sum(
        v.numel() * v.element_size() for k, v in before.items() if k != "lm_head.weight"
    )
    for row in report.rows if make is not Net else ():
        got = rows[f"{row['layer']}.weight"]
        assert got["bytes"] <= row["bytes"] and row["shape"] == got["shape"]
        assert row["expected"] == pytest.approx(got["bytes"], rel=0.05, abs=64)


def test_forecast_reads_a_skeleton_without_weights():
    with torch.device("meta"):
        skeleton = Big()
    plan = recipes.from_yaml(FORECASTS["blocks"])
    assert forecast(skeleton, plan) == forecast(Big(), plan)


def test_forecast_rows():
    report = forecast(Big(), recipes.from_yaml("name: x\nstages: [{prune: {layers: hidden, sparsity: 0.5}}]"))
    [row] = report.rows
    size = 64 * 256
    want = {
        "layer": "hidden",
        "shape": "256x64",
        "pattern": "unstructured",
        "asked": 0.5,
        "bytes": 4 * size,
        "expected": size // 8 + 2 * size,
    }
    assert row == want
    assert report.title == "dry run of x: nothing computed" and report.summary["layers"] == "1 of 5"
    now, after = report.summary["bytes now"], report.summary["bytes expected"]
    assert now - after == 4 * size - want["expected"] and report.summary["ratio expected"] == after / now


def test_forecast_takes_the_last_stage_of_a_layer_and_those_of_training():
    text = "stages: [{prune: {sparsity: 0.2}}, {train: {prune: {sparsity: 0.8, layers: hidden}}}]"
    asked = {r["layer"]: r["asked"] for r in forecast(Net(), recipes.from_yaml(text)).rows}
    assert asked == {"conv": 0.2, "deep": 0.2, "up": 0.2, "hidden": 0.8}


def test_forecast_counts_the_stored_format_of_the_recipe(tmp_path):
    plan = recipes.from_yaml("stages: [{prune: {sparsity: 0.5}}]\nsave: {format: dense}")
    model = Big()
    expected = forecast(model, plan).summary["bytes expected"]
    rarefy.compress_(model, plan)
    rarefy.save(model, tmp_path / "out", format=plan.save.format)
    assert expected == pytest.approx(stored(tmp_path / "out"), rel=0.02)


@pytest.mark.parametrize(
    ("model", "text", "error", "message"),
    [
        (Net, "{layers: hiden, sparsity: 0.5}", SelectorError, "layers: 'hiden' matches no layer; nearest: hidden"),
        (Net, "{ignore: hiden, sparsity: 0.5}", SelectorError, "ignore: 'hiden' matches no layer; nearest: hidden"),
        (Net, "{ignore: '*', sparsity: 0.5}", ModelError, "no layer is selected"),
        (Net, "{pattern: 2:4}", PatternError, r"2:4 cannot prune deep \(1 inputs a group\)"),
        (lambda: nn.Sequential(nn.ReLU()), "{sparsity: 0.5}", ModelError, "Sequential has no layer that can be pruned"),
        (Tied, "{layers: 're:(', sparsity: 0.5}", SelectorError, "not a regular expression"),
    ],
)  # fmt: skip
def test_forecast_errors(model, text, error, message):
    with pytest.raises(error, match=message):
        forecast(model(), recipes.from_yaml(f"stages: [{{prune: {text}}}]"))
