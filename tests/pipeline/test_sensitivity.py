"""Loss of each layer alone: against masks and quantization done by hand; the model stays as it was; figure and command."""

import copy
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from torch import nn

import rarefy
from conftest import Net, image_batches, sample, text_model, tiny_llama
from rarefy.common.errors import DataError, ModelError, PatternError, SelectorError
from rarefy.common.report import Report
from rarefy.data import builtin, sources
from rarefy.evaluation.quality import Metric
from rarefy.model import hf
from rarefy.pipeline.sensitivity_plot import figure


def bits_of(model) -> dict[str, tuple[int, bytes]]:
    """Return the address and the bytes of each tensor."""
    state = model.state_dict()
    return {name: (t.data_ptr(), t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def distance(dense, model, batches) -> float:
    """Return the mean squared relative distance of the outputs, one sample after the other."""
    values = []
    with torch.no_grad():
        for x, _ in batches:
            for image in x:
                a, b = dense(image[None]).double(), model(image[None]).double()
                values.append(float((a - b).square().sum() / a.square().sum()))
    return sum(values) / len(values)


def loss_of(report, layer, **setting) -> float:
    wanted = {"pattern": None, "sparsity": None, "bits": None, **setting}
    [row] = [r for r in report.rows if r["layer"] == layer and all(r[k] == v for k, v in wanted.items())]
    return row["loss"]


def test_losses_are_those_of_layers_pruned_and_quantized_by_hand():
    dense, batches = Net().eval(), image_batches()
    before = bits_of(dense)
    report = rarefy.sensitivity(dense, batches, patterns=["unstructured", "2:4", "4x1"], ignore="deep")
    assert bits_of(dense) == before
    names = ["conv", "up", "hidden"]
    assert list(dict.fromkeys(r["layer"] for r in report.rows)) == names and len(report.rows) == 3 * 7
    for name in names:
        for pattern, sparsity in (("unstructured", 0.5), ("unstructured", 0.75), ("2:4", 0.5), ("4x1", 0.5)):
            pruned = copy.deepcopy(dense)
            how = {} if pattern == "2:4" else {"sparsity": sparsity}
            rarefy.prune_(pruned, pattern, "wanda", layers=name, data=batches, **how)
            want = distance(dense, pruned, batches)
            assert loss_of(report, name, pattern=pattern, sparsity=sparsity) == pytest.approx(want, rel=1e-4), pattern
        for bits in (8, 4):
            coarse = copy.deepcopy(dense)
            rarefy.quantize_(coarse, f"int{bits}", layers=name)
            want = distance(dense, coarse, batches)
            assert loss_of(report, name, bits=bits) == pytest.approx(want, rel=1e-3, abs=1e-9)
    assert loss_of(report, "hidden", pattern="unstructured", sparsity=0.75) > loss_of(report, "hidden", bits=8)


def test_a_setting_that_does_not_fit_a_layer_is_left_out_and_named():
    report = rarefy.sensitivity(Net(), image_batches(), patterns=["2:4"], bits=[8], layers=["deep", "hidden"])
    assert loss_of(report, "deep", pattern="2:4", sparsity=0.5) is None and loss_of(report, "deep", bits=8) > 0
    [note] = report.notes
    assert note.startswith("deep was not measured at 2:4: pattern 2:4 cannot prune deep")
    deep, hidden = list(report.printed_rows or ())
    assert deep["2:4"] == "-" and float(hidden["2:4"]) > 0


def test_the_report_prints_a_row_for_each_layer():
    report = rarefy.sensitivity(Net(), image_batches(), sparsities=[0.5, 0.9])
    lines = str(report).splitlines()
    assert lines[0] == "sensitivity" and [line.split()[0] for line in lines[1:6]] == [
        "layer",
        "conv",
        "deep",
        "up",
        "hidden",
    ]
    assert all(label in lines[1] for label in ("unstructured 50 %", "unstructured 90 %", "2:4", "8 bits", "4 bits"))
    assert json.loads(report.to_json())["rows"] == [dict(r) for r in report.rows]
    assert set(report.rows[0]) == {"layer", "shape", "weights", "pattern", "sparsity", "bits", "loss"}


def test_losses_by_another_metric():
    net, batches = Net().eval(), image_batches()
    accuracy = rarefy.sensitivity(net, batches, metric="accuracy", sparsities=[1.0], patterns=["unstructured"], bits=[])
    pruned = copy.deepcopy(net)
    with torch.no_grad():
        pruned.hidden.weight.zero_()
        right = [sum(int((m(x).argmax(1) == y).sum()) for x, y in batches) / 12 for m in (net, pruned)]
    assert loss_of(accuracy, "hidden", pattern="unstructured", sparsity=1.0) == pytest.approx(right[0] - right[1])
    assert accuracy.summary == {"metric": "accuracy", "of the dense model": pytest.approx(right[0])}
    size = Metric("size", False, lambda model: float(model.hidden.weight.abs().sum()))
    shrunk = rarefy.sensitivity(net, batches, metric=size, bits=[], patterns=["unstructured"], sparsities=[1.0])
    want = -float(net.hidden.weight.detach().abs().sum())  # lower is better: no loss but a gain
    assert loss_of(shrunk, "hidden", pattern="unstructured", sparsity=1.0) == pytest.approx(want)
    assert loss_of(shrunk, "conv", pattern="unstructured", sparsity=1.0) == 0.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_as_it_was(error):
    net, calls = Net(), []

    def quality(model):
        calls.append(float(model.hidden.weight.detach().abs().sum()))
        if len(calls) == 9:  # in the third layer
            raise error
        return 0.0

    before = bits_of(net)
    with pytest.raises(error if error is KeyboardInterrupt else ModelError):
        rarefy.sensitivity(net, image_batches(), metric=quality, layers=["conv", "hidden"])
    assert len(calls) == 9 and calls[8] != calls[0] and bits_of(net) == before


def test_masks_and_tied_weights_stay():
    model, ids = tiny_llama(), [{"input_ids": torch.randint(0, 64, (2, 8))}]
    rarefy.prune_(model, "2:4", layers="*.q_proj")
    before = bits_of(model)
    report = rarefy.sensitivity(model, ids, layers="*.q_proj")
    assert bits_of(model) == before
    q = "model.layers.0.self_attn.q_proj"
    assert (
        loss_of(report, q, pattern="2:4", sparsity=0.5)
        == 0.0
        < loss_of(report, q, pattern="unstructured", sparsity=0.75)
    )


@pytest.mark.real
def test_a_real_encoder_is_left_as_it_was():
    sample("minilm")
    sample("wiki")
    folder = builtin.model_folder("minilm")
    model, tokenizer = hf.load_folder(folder).eval(), hf.load_tokenizer(folder)
    take = sources.Take(samples=4, tokens=24, batch=4)
    batches = sources.batches("wiki", take, tokenizer=tokenizer)
    before = bits_of(model)
    layers = ["encoder.layer.5.output.dense", "encoder.layer.0.attention.self.key"]
    report = rarefy.sensitivity(model, batches, layers=layers, sparsities=[0.5, 0.9], bits=[8, 4])
    assert bits_of(model) == before
    for name in layers:
        losses = [loss_of(report, name, pattern="unstructured", sparsity=s) for s in (0.5, 0.9)]
        assert 0 < loss_of(report, name, bits=8) < loss_of(report, name, bits=4) < losses[0] < losses[1] < 2
    pruned = copy.deepcopy(model)
    rarefy.prune_(pruned, "2:4", "wanda", layers=layers[0], data=batches)
    with torch.no_grad():
        a, b = (m(**batches[0]).last_hidden_state.double() for m in (model, pruned))
    want = float(((a - b).square().sum(-1) / a.square().sum(-1)).mean())
    assert loss_of(report, layers[0], pattern="2:4", sparsity=0.5) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patterns": "2:4"}, PatternError, r"patterns: expected a list, got '2:4': give \['2:4'\]"),
        ({"patterns": ["3:2"]}, PatternError, "N:M needs"),
        ({"sparsities": [50]}, PatternError, "expected sparsity between 0 and 1, got 50; did you mean 0.5"),
        ({"bits": [16]}, PatternError, "bits: expected numbers from 2 to 8, got 16"),
        ({"patterns": [], "bits": []}, PatternError, "nothing to measure: give patterns with sparsities, or bits"),
        ({"score": "wandda"}, PatternError, "unknown score 'wandda'.*did you mean 'wanda'"),
        ({"score": "taylor"}, DataError, "cannot be called|no loss|integer classes"),
        ({"metric": "distanze"}, DataError, "unknown metric 'distanze'.*did you mean 'distance'"),
        ({"layers": "nowhere"}, SelectorError, "nowhere"),
        ({"data": []}, DataError, "sensitivity needs at least one batch of data"),
        ({"data": torch.ones(2, 3)}, DataError, "expected an iterable of batches, got one tensor"),
        ({"data": [torch.ones(2, 7)]}, DataError, "Linear|cannot be called"),
        ({"metric": lambda model: math.nan}, ModelError, "expected a finite number, got nan"),
    ],
)
def test_wrong_inputs(options, error, message):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    before = bits_of(net)
    data = options.pop("data") if "data" in options else [torch.randn(4, 4)]
    with pytest.raises(error, match=message):
        rarefy.sensitivity(net, data, **options)
    assert bits_of(net) == before


# figure


def test_the_figure_has_a_point_for_each_loss():
    report = rarefy.sensitivity(Net(), image_batches())
    root = ET.fromstring(figure(report))
    tips = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    for row in report.rows:
        if row["loss"] is not None:
            assert any(t.startswith(f"{row['layer']}, ") and t.endswith(f"{row['loss']:.4g}") for t in tips), row
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"8 bits", "2:4", "unstructured 50 %"} <= set(texts)
    heights = [float(c.get("cy")) for c in root.iter("{http://www.w3.org/2000/svg}circle") if c.find("*") is not None]
    assert all(50 <= y <= 420 for y in heights) and len(set(heights)) > 10


def test_a_figure_of_gains_and_of_nothing():
    rows = [{"layer": f"<{i}>", "pattern": None, "sparsity": None, "bits": 8, "loss": (-1.0) ** i} for i in range(3)]
    report = Report("sensitivity", tuple(rows), {"metric": "a & b"})
    assert "&lt;0&gt;" in figure(report) and "a &amp; b" in figure(report)
    ET.fromstring(figure(report))
    ET.fromstring(figure(replace(report, rows=({**rows[0], "loss": None},))))


# command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    text_model(folder)
    return folder


def test_the_command_prints_a_table_json_and_a_figure(run, folder, tmp_path):
    words = ("sensitivity", folder / "model", "--data", folder / "text.txt", "--samples", 4, "--tokens", 16)
    words = (*words, "--layers", "*.q_proj", "--pattern", "2:4", "--bits", 4, "--metric", "kl")
    ran = run(*words, "--plot", tmp_path / "layers.svg")
    assert ran.code == 0 and "measuring layers" in ran.err
    assert "model.layers.1.self_attn.q_proj" in ran.out and "metric: kl" in ran.out and "4 bits" in ran.out
    ET.fromstring((tmp_path / "layers.svg").read_text())
    ran = run(*words, "--json", "--quiet", "--plot", tmp_path / "layers.svg", "--force")
    assert ran.code == 0 and ran.err == ""
    assert [(r["pattern"], r["bits"]) for r in json.loads(ran.out)["rows"]] == [("2:4", None), (None, 4)] * 2
    assert run(*words, "--quiet").out == ""


def test_the_command_without_data(run, folder):
    ran = run("sensitivity", folder / "model", "--samples", 3, "--batch", 2, "--tokens", 9, "--layers", "*.q_proj")
    assert ran.code == 0 and "note: inputs were random and weights ranked by magnitude" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "a.png"], "--plot a.png: expected a name that ends in .svg"),
        (["--plot", "{text}"], "expected a name that ends in .svg"),
        (["--plot", "{svg}"], "exists: pass --force, or give another name"),
        (["--force"], "--force has no effect without --plot"),
        (["--metric", "perplexity"], "--metric perplexity needs real inputs: give --data FILE"),
        (["--score", "wanda"], "--score wanda needs real inputs: give --data FILE, or --score magnitude"),
        (["--metric", "klo"], "unknown metric 'klo'"),
        (["--data", "none.txt"], "no file 'none.txt'"),
        (["--sparsity", "50"], "did you mean 0.5?"),
        (["--bits", "1"], "bits: expected numbers from 2 to 8, got 1"),
        (["--layers", "no"], "no"),
        (["--samples", "0"], "--samples"),
        (["--tokens", "500"], "--tokens: expected at most 128"),
    ],
)
def test_wrong_use_of_the_command(run, folder, words, message):
    (folder / "there.svg").write_text("")
    words = [w.format(text=folder / "text.txt", svg=folder / "there.svg") for w in words]
    ran = run("sensitivity", folder / "model", *words)
    assert ran.code == 2 and message in ran.err and ran.out == ""
