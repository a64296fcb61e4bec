"""Benchmarks of JSON lines and receipts as text and as pages."""

import json
import re
from pathlib import Path

import pytest

from page_reader import Reader, centre, marks, plots_of, scale
from rarefy.common.errors import ContainerError
from rarefy.evaluation.receipt import Receipt, receipt_from_dict
from rarefy.evaluation.receipt_page import receipt_page
from rarefy.search.bench_report import bench_from_lines, bench_page

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FRONTIER = (RESULTS / "frontier.jsonl").read_text(encoding="utf-8")
HOSTILE = "<img src=x onerror='a()'>\x07 \N{SNOWMAN}"


def line(**changes) -> str:
    values = {
        "run": "r",
        "quality": {"ours, int8": {"perplexity": 12.0}, "peer": {"perplexity": 13.0}, "eager": {"perplexity": 11.0}},
        "milliseconds": {"1": {"ours, int8": [1.0, 2.0, 3.0], "peer": [4.0, 5.0, 6.0]}},
        "machine": {"cpu": "C", "extensions": []},
    }
    return json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None})


def test_the_last_run_of_each_name_and_machine_counts():
    records = [json.loads(text) for text in FRONTIER.splitlines()]
    bench = bench_from_lines(FRONTIER)
    keys = [(r["run"], r["machine"]["cpu"], *r["machine"]["extensions"]) for r in records]
    assert bench.count == len(records) and len(bench.runs) == len(set(keys))
    for run in bench.runs:
        last = [r for r, key in zip(records, keys) if key == (run.run, run.machine["cpu"], *run.machine["extensions"])][
            -1
        ]
        assert run.quality == last["quality"] and run.commit == last["commit"]
    older = len(records) - len(bench.runs)
    assert f"{older} earlier runs of the same names are left out" in Reader(bench_page(bench)).text


def test_a_page_has_each_timed_model_of_a_run_at_its_values():
    bench = bench_from_lines(FRONTIER)
    page = bench_page(bench)
    plots = plots_of(page)
    assert len(plots) == sum(len(run.milliseconds) for run in bench.runs)
    for plot, (run, batch) in zip(plots, [(r, b) for r in bench.runs for b in r.milliseconds]):
        x, y, metric = scale(plot, "x"), scale(plot, "y"), run.metrics[0]
        expected = {
            (round(x(times[1]), 2), round(y(run.quality[name][metric]), 2)): name.startswith("ours")
            for name, times in run.milliseconds[batch].items()
        }
        shapes = [(m, True) for m in marks(plot, "circle")] + [(m, False) for m in marks(plot, "rect")]
        inside = [(m, ours) for m, ours in shapes if "beyond" not in m.attrib["class"]]
        assert len(shapes) == len(run.milliseconds[batch]) and inside
        for mark, ours in inside:
            place = min(expected, key=lambda p: abs(p[0] - centre(mark)[0]) + abs(p[1] - centre(mark)[1]))
            assert place == pytest.approx(centre(mark), abs=0.03) and expected[place] is ours
    rows = Reader(page).rows
    for run in bench.runs:
        assert all(any(row[0] == name for row in rows) for name in run.quality)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_less_perplexity_is_better_and_models_without_a_time_are_lines():
    (plot,) = plots_of(bench_page(bench_from_lines(line())))
    text = "".join(plot.itertext())
    assert "perplexity (down is better)" in text and "articles (up is better)" in bench_page(bench_from_lines(FRONTIER))
    (reference,) = [e for e in plot.iter("line") if e.get("class") == "reference"]
    assert float(reference.attrib["y1"]) == pytest.approx(scale(plot, "y")(11.0), abs=0.02)


def test_hostile_names_of_a_benchmark():
    text = line(run=HOSTILE, quality={HOSTILE: {HOSTILE: 1.0}}, milliseconds={HOSTILE: {HOSTILE: [1, 2, 3]}})
    page = bench_page(bench_from_lines(text))
    reader = Reader(page)
    assert not reader.inside and "img" not in {tag for tag, _ in reader.elements} and "\x07" not in page
    assert HOSTILE.replace("\x07", "\ufffd") in reader.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "the file is empty: expected JSON lines with run, quality and milliseconds"),
        ("{", "line 1: not JSON"),
        (line() + "\nNaN", "line 2: not JSON: NaN is not a number of JSON"),
        (line().replace("12.0", "1e999"), "line 1: not JSON: 1e999 is not a number of JSON, or too large"),
        ("[1]", "line 1 has no run: expected run, quality and milliseconds"),
        (line(milliseconds=None), "line 1 has no milliseconds"),
        (line(quality={"a": 3}), "line 1: quality: expected numbers by model and metric"),
        (line(quality={"a": {"b": "c"}}), "line 1: quality: expected numbers"),
        (line(milliseconds={"1": {"a": [1, 2]}}), "line 1: milliseconds: expected three quartiles by batch and model"),
        (line(machine=[]), "line 1: machine: expected an object"),
    ],
)
def test_lines_that_are_no_benchmark(text, message):
    with pytest.raises(ContainerError, match=f"^bench: {message}"):
        bench_from_lines(text)


# receipts


def demo() -> Receipt:
    data = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return receipt_from_dict({k: v for k, v in data.items() if k in Receipt.__dataclass_fields__})


def test_the_page_of_a_receipt_has_its_numbers():
    receipt = demo()
    reader = Reader(receipt_page(receipt))
    rows = {row[0]: row for row in reversed(reader.rows)}  # a stage has rows of the same layers
    for row in receipt.rows():
        assert rows[row["measured"].strip()][1:4] == [row["before"], row["after"], row["change"]]
    for layer in receipt.sparsity["layers"]:
        cells = rows[layer["layer"]]
        assert (
            cells[1] == layer["shape"] and cells[-1] == f"{layer['bytes']:,}" and cells[4] == f"{layer['sparsity']:.2%}"
        )
    assert "Within the limit." in reader.text and receipt.settings["machine"]["cpu"] in reader.text
    assert all(note in reader.text for note in receipt.notes) and all(s["title"] in reader.text for s in receipt.stages)


def test_bars_are_as_long_as_their_numbers():
    sizes = {"before": 200, "after": 50}
    page = receipt_page(Receipt(name="r", disk=sizes))
    bars = re.findall(r'<rect x="0" y="[\d.]+" width="([\d.]+)"', page)
    assert [float(width) for width in bars] == [100.0, 25.0]


QUALITY = {"metric": "perplexity", "before": 10.0, "after": 12.0, "change": 0.2}


@pytest.mark.parametrize(
    ("quality", "label", "kind"),
    [
        ({}, "Not evaluated.", "plain"),
        ({**QUALITY, "allowed": None, "passed": None}, "Measured.", "plain"),
        ({**QUALITY, "allowed": 0.3, "passed": True}, "Within the limit.", "good"),
        ({**QUALITY, "allowed": 0.1, "passed": False}, "Over the limit.", "bad"),
    ],
)
def test_the_verdict_of_a_receipt(quality, label, kind):
    page = receipt_page(Receipt(name="r", quality=quality))
    assert f'<p class="verdict {kind}" role="status"><strong>{label}</strong>' in page


def test_hostile_text_in_a_receipt():
    layer = {"layer": HOSTILE, "shape": HOSTILE, "pattern": HOSTILE, "asked": 0.5, "sparsity": 0.5, "kept": 1}
    layer |= {"format": HOSTILE, "bytes": 1, "dense_bytes": 2}
    whole = {"asked": 0.5, "achieved": 0.5, "model_before": 0, "model_after": 0.5, "layers": [layer]}
    times = {"median": 1.0, "low": 1.0, "high": 1.0}
    receipt = Receipt(
        name=HOSTILE,
        quality={**QUALITY, "metric": HOSTILE, "allowed": None},
        sparsity=whole,
        speed=({"what": HOSTILE, "unit": "ms", "before": times, "after": times, "accelerated": times},),
        stages=({"title": HOSTILE, "rows": [{HOSTILE: HOSTILE}], "summary": {HOSTILE: HOSTILE}, "notes": [HOSTILE]},),
        samples=({"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE},),
        notes=(HOSTILE,),
        settings={"seconds": 1.0, "machine": {HOSTILE: HOSTILE}},
    )
    page = receipt_page(receipt_from_dict(receipt.to_dict()))
    reader = Reader(page)
    assert not reader.inside and "img" not in {tag for tag, _ in reader.elements} and "\x07" not in page
    assert reader.text.count(HOSTILE.replace("\x07", "\ufffd")) > 15


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "r", "new": 1}, "unknown field 'new': not a receipt, or of a newer Rarefy"),
        ({}, "not written by Rarefy"),
        ([], "not written by Rarefy"),
        ({"name": "r", "disk": {"before": "many", "after": 1}}, "not written by Rarefy"),
        ({"name": "r", "stages": [3]}, "not written by Rarefy"),
        ({"name": "r", "disk": {"before": float("inf"), "after": 1}}, "not written by Rarefy"),
        (
            {
                "name": "r",
                "sparsity": {
                    **dict.fromkeys(("asked", "achieved", "model_before", "model_after"), 0.5),
                    "layers": [{"layer": "l", "shape": "1", "pattern": 3, "asked": 0, "sparsity": 0, "format": "d", "bytes": 1, "dense_bytes": 1}],
                },
            },
            "a layer's name or pattern is not text",
        ),
    ],
)  # fmt: skip
def test_data_that_is_no_receipt(data, message):
    with pytest.raises(ContainerError, match=f"^receipt: .*{message}"):
        receipt_from_dict(data)
