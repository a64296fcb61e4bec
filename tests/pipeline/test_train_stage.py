"""The stage `train` of recipes, whole: cut, learn from what the model was, prune, put on a grid, go on after a kill."""

import copy
import json

import pytest
import torch
from torch import nn

import rarefy
from conftest import text_model, tiny_llama
from rarefy.common.errors import DataError, ModelError, RecipeError
from rarefy.model.layers import all_layers
from rarefy.model.quant_grid import get_grid
from rarefy.pipeline import train_stage
from rarefy.pipeline.dry_run import forecast
from rarefy.recipe import parser as recipes
from rarefy.train import checkpoint

pytest.importorskip("transformers")


class Small(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.fc(self.body(x).relu().mean((2, 3)))


def data(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        y = torch.randint(4, (16,), generator=g)
        x = torch.randn(16, 1, 6, 6, generator=g) + y[:, None, None, None]
        batches.append((x, y))
    return batches


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = Small()
    rarefy.fit_(model, data(), epochs=10, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), seed=0)
    return model.eval()


WHOLE = """
name: student
stages:
  - cut: {units: channel, keep: 0.5, repair: false}
  - train: {epochs: 3, optimizer: {name: adam, lr: 0.01}, distill: {logits: 1.0, temperature: 2.0, by: mse}}
  - train:
      epochs: 3
      optimizer: {name: adam, lr: 0.01}
      prune: {method: rigl, sparsity: 0.5, steps: 3, layers: [body, stem]}
      distill: {task: 0.5, logits: 1.0, hidden: cosine, at: norm, cache: true}
      accumulate: 2
      clip: 1.0
      autocast: bf16
  - train:
      epochs: 2
      optimizer: {name: adam, lr: 0.01}
      quantize: {weights: int4, layers: [body, stem, fc], start: 0.5}
      validate: accuracy
      patience: 2
evaluate: {metric: accuracy}
"""


def test_a_student_is_cut_taught_pruned_and_put_on_a_grid(dense, tmp_path):
    model = copy.deepcopy(dense)
    given = {"train": data(), "calibrate": data(2), "validate": data(2, 1), "evaluate": data(3, 2)}
    receipt = rarefy.compress_(model, recipes.from_yaml(WHOLE), given, resume_dir=tmp_path / "work")
    assert model.body.weight.shape == (8, 8, 3, 3)
    assert float((model.body.weight == 0).float().mean()) > 0.45 and model.stem.in_channels == 1
    grids = {l.name: get_grid(l) for l in all_layers(model)}
    assert grids["body"] is not None and grids["body"].bits == 4 and grids["fc"] is not None
    assert receipt.quality["after"] > 0.7
    rarefy.save(model, tmp_path / "out", receipt=receipt)
    again = rarefy.load(tmp_path / "out", Small()).eval()
    x = data(1, 3)[0][0]
    torch.testing.assert_close(again(x), model(x))


def test_training_goes_on_where_it_was_killed(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)

    class Stop(Exception):
        pass

    class Breaking(list):
        def __iter__(self):
            for batch in super().__iter__():
                self.left -= 1
                if self.left < 0:
                    raise Stop
                yield batch

    plan = recipes.from_yaml(
        "stages:\n- train: {epochs: 2, prune: {sparsity: 0.5, steps: 3}}\n"
        "- train: {epochs: 2, distill: {logits: 1.0}, optimizer: {name: sgd, lr: 0.1, momentum: 0.9}}\n"
    )
    want = copy.deepcopy(dense)
    rarefy.compress_(want, plan, {"train": data()})
    for left in (5, 16, 24):
        batches = Breaking(data())
        batches.left = left
        with pytest.raises(Stop):
            rarefy.compress_(copy.deepcopy(dense), plan, {"train": batches}, resume_dir=tmp_path / f"{left}")
        got = copy.deepcopy(dense)
        rarefy.compress_(got, plan, {"train": data()}, resume_dir=tmp_path / f"{left}")
        assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model, folder = tiny_llama(), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "hf")
    rarefy.save(model, folder / "ours", format="dense")
    return model, folder


def texts(n=4):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 12), generator=g)} for _ in range(n)]


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_a_teacher_may_come_from_a_folder(llama, kind, monkeypatch):
    model, folder = llama
    student = copy.deepcopy(model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    far = (student.lm_head.weight - model.lm_head.weight).norm()
    recipe = {
        "stages": [
            {
                "train": {
                    "epochs": 6, "optimizer": {"lr": 2e-3},
                    "distill": {
                        "teacher": str(folder / kind), "task": 0, "hidden": "squarehead", "relations": 0.1, "heads": 4,
                        "logits": 1.0, "top": 16,
                    },
                }
            }
        ]
    }  # fmt: skip
    losses = []
    fit = train_stage.run_fit
    monkeypatch.setattr(
        "rarefy.pipeline.train_stage.run_fit", lambda *a, **k: losses.append(fit(*a, **k)) or losses[-1]
    )
    rarefy.compress_(student, recipe, {"train": texts()})
    rows = losses[0].rows
    assert rows[-1]["loss"] < rows[0]["loss"] / 2 and far > 0


ERRORS = {
    "no folder": ("stages: [{train: {distill: {teacher: nowhere}}}]", ModelError, "teacher 'nowhere' is not a model folder"),
    "no data to validate": ("stages: [{train: {validate: accuracy}}]", DataError, "no validate data: name it in the recipe"),
    "method": ("stages:\n- train:\n    prune: {method: acdc, sparsity: 0.5}", RecipeError, r"r.yaml line 3: .*unknown method 'acdc'; acdc is called 'alternate' here"),
    "constant": ("stages:\n- train:\n    prune: {method: constant}", RecipeError, r"r.yaml line 3: .*no method 'constant': leave prune out to keep the masks unchanged"),
    "option of another method": ("stages:\n- train:\n    prune: {method: rigl, regrow: true}", RecipeError, r"r.yaml line 3: .*unknown field 'regrow'"),
    "patience": ("stages:\n- train:\n    patience: 3", RecipeError, r"r.yaml line 3: .*patience needs a validation metric: give validate"),
    "metric": ("stages:\n- train:\n    validate: acuracy", RecipeError, r"r.yaml line 3: .*unknown validate 'acuracy'.*did you mean 'accuracy'"),
    "autocast": ("stages:\n- train:\n    autocast: bf8", RecipeError, r"r.yaml line 3: .*unknown autocast 'bf8'"),
    "accumulate": ("stages:\n- train:\n    accumulate: 0", RecipeError, r"r.yaml line 3: .*accumulate: expected a whole number of at least 1, got 0"),
    "distill": ("stages:\n- train:\n    distill: {logits: 0}", RecipeError, r"r.yaml line 3: .*the teacher has no effect"),
    "hidden": ("stages:\n- train:\n    distill: {hidden: squarehaed}", RecipeError, r"r.yaml line 3: .*unknown hidden 'squarehaed'.*did you mean 'squarehead'"),
    "bits": ("stages:\n- train:\n    quantize: {weights: int9}", RecipeError, r"r.yaml line 3: .*unknown weights 'int9'"),
    "ends": ("stages:\n- train:\n    prune: {sparsity: 0.5, ends: {fc: 2.0}}", RecipeError, r"r.yaml line 3: .*ends: expected a sparsity between first .0. and 1 for 'fc', got 2.0"),
    "ends of words": ("stages:\n- train:\n    prune: {sparsity: 0.5, ends: {fc: much}}", RecipeError, r"r.yaml line 3: .*ends.fc: expected a number, got 'much'"),
    "cut after a grid": ("stages:\n- train: {quantize: {weights: int4}}\n- cut: {keep: 0.5}", RecipeError, "a cut must come before train"),
    "beyond the end": ("stages:\n- train:\n    prune: {sparsity: 0.5, end: 1.5}", RecipeError, r"r.yaml line 3: .*end: expected a number between 0 and 1, got 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_recipes_that_cannot_be(dense, case):
    text, error, message = ERRORS[case]
    model = copy.deepcopy(dense)
    with pytest.raises(error, match=message):
        rarefy.compress_(model, recipes.from_yaml(text, "r.yaml"), {"train": data()})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values()))


REFUSED_EARLY = {
    "quantized twice": ("- quantize: {layers: fc}\n- quantize: {layers: fc}", "fc is already quantized or shared by an earlier stage"),
    "shared, then quantized": ("- share: {layers: fc}\n- train: {quantize: {layers: fc}}", "fc is already quantized or shared by an earlier stage"),
    "pruned, then factorized": ("- prune: {sparsity: 0.5, layers: fc}\n- factorize: {keep: 0.5, layers: fc}", "fc has zeros at this stage, and factors would lose that"),
    "solved on a grid": ("- quantize: {layers: fc}\n- prune: {sparsity: 0.5, layers: fc, solver: obs}", "fc is already quantized at this stage, and a solver changes weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_EARLY)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(dense, case):
    stages, message = REFUSED_EARLY[case]
    model, plan = copy.deepcopy(dense), recipes.from_yaml(f"stages:\n{stages}\n", "r.yaml")
    with pytest.raises(ModelError, match=f"{message}.*stage 2"):
        rarefy.compress_(model, plan, data())
    with pytest.raises(ModelError, match=message):
        forecast(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), dense.state_dict().values()))


def test_a_metric_that_cannot_be_measured_is_found_before_training(llama):
    recipe = {"stages": [{"train": {"epochs": 3, "validate": "accuracy"}}]}
    with pytest.raises(DataError, match="accuracy needs"):
        rarefy.compress_(copy.deepcopy(llama[0]), recipe, {"train": texts(), "validate": texts()})
    with pytest.raises(DataError, match="data has trian.*did you mean 'train'"):
        rarefy.compress_(copy.deepcopy(llama[0]), recipe, {"trian": texts()})


def test_a_dry_run_and_a_receipt_say_what_is_trained(dense):
    text = "stages:\n- train: {epochs: 2, prune: {method: rigl, sparsity: 0.5, steps: 2}, distill: {logits: 1.0}, quantize: {layers: fc}}"
    plan = recipes.from_yaml(text)
    (note,) = forecast(dense, plan).notes
    assert (
        note
        == "stage 1 trains 2 epochs by adamw at 0.0001, pruned by rigl, distilled from the original model, int8 from 50% on"
    )
    receipt = str(rarefy.compress_(copy.deepcopy(dense), plan, {"train": data()}))
    assert "trained: epochs 2, loss " in receipt and "quantized: " in receipt


def test_all_that_a_recipe_can_say(run):
    ran = run("recipes", "--fields", "--json")
    rows = {r["where"]: r for r in json.loads(ran.out)["rows"]}
    assert rows["train.prune (rigl).drop"]["default"] == "0.3" and "train.distill.hidden" in rows
    assert rows["quantize.fit"]["what"] == "one of minmax, mse, hqq" and rows["data.validate"]["default"] == "null"
    assert run("recipes", "int8", "--fields").code == 2
    lines = run("recipes", "--fields").out.splitlines()
    assert max(map(len, lines)) <= 100
    at = lines.index("prune.sparsity: a number between 0 and 1, default null")
    assert lines[at + 1].startswith("    fraction of zeros") or lines[at + 1].startswith("    ")
    assert {line.split(":")[0] for line in lines} >= set(rows)


def test_a_resolved_recipe_reads_back():
    plan = recipes.from_yaml(WHOLE)
    assert recipes.from_yaml(plan.to_yaml()) == plan
    ends = recipes.from_yaml("stages: [{train: {prune: {sparsity: 0.9, ends: {fc: 0.5, 'body*': 0.8}}}}]")
    assert recipes.from_yaml(ends.to_yaml()) == ends and ends.stages[0].prune.ends == {"fc": 0.5, "body*": 0.8}


def test_a_log_without_training_has_no_effect(dense):
    with pytest.raises(RecipeError, match="log has no effect: recipe recipe has no stage train"):
        rarefy.compress_(copy.deepcopy(dense), {"stages": [{"prune": {"sparsity": 0.5}}]}, log="x.jsonl")


def test_rows_of_the_command_line_go_to_a_file(run, tmp_path):
    text_model(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "data: {train: text.txt, tokens: 8, batch: 2, train_samples: 4}\n"
        "stages: [{train: {epochs: 2, prune: {sparsity: 0.5}}}]\n"
    )
    log = tmp_path / "rows.jsonl"
    ran = run("compress", tmp_path / "model", "-r", tmp_path / "r.yaml", "-o", tmp_path / "out", "--log", log)
    assert ran.code == 0, ran
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2] and rows[-1]["sparsity"] == 0.5
    assert not (tmp_path / ".out.work").exists()
