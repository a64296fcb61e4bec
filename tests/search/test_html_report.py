"""Pages of frontiers: marks stand where their values are, text stays text, and a browser shows them without errors."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest

import frontier_samples as samples
from page_reader import Reader, centre, marks, plots_of, scale
from rarefy.common.errors import ContainerError
from rarefy.recipe import parser as recipes
from rarefy.search.frontier import Frontier, frontier_from_dict
from rarefy.search.html_report import frontier_page
from rarefy.search.report_text import loss_is_relative

FRONTIERS = {
    "realistic": samples.realistic(),
    "hostile": samples.hostile(),
    "no points": samples.small(0),
    "one point": samples.small(1),
    "two points": samples.small(2),
}


@pytest.mark.parametrize("name", FRONTIERS)
def test_each_measured_point_is_a_circle_at_its_values(name):
    frontier = FRONTIERS[name]
    plots = plots_of(frontier_page(frontier))
    assert len(plots) == len(frontier.batches) == 2
    for plot, batch in zip(plots, frontier.batches):
        x, y = scale(plot, "x"), scale(plot, "y")
        measured = {str(i): p for i, p in enumerate(frontier.points, 1) if p.quality is not None}
        circles = {c.attrib["data-point"]: c for c in marks(plot, "circle")}
        assert len(marks(plot, "circle")) == len(circles) and circles.keys() == measured.keys()
        for number, circle in circles.items():
            point = measured[number]
            values = (point.milliseconds[batch]["median"], point.quality)
            assert (float(circle.attrib["data-x"]), float(circle.attrib["data-y"])) == values
            if "beyond" not in circle.attrib["class"]:
                assert centre(circle) == pytest.approx((x(values[0]), y(values[1])), abs=0.02)
        dense, peers = marks(plot, "polygon"), marks(plot, "rect")
        assert len(dense) == 1 and len(peers) == len(frontier.peers)
        dense_values = (frontier.dense.milliseconds[batch]["median"], frontier.dense.quality)
        assert centre(dense[0]) == pytest.approx((x(dense_values[0]), y(dense_values[1])), abs=0.02)


def test_the_best_point_and_the_front_are_marked():
    frontier = samples.realistic()
    for plot in plots_of(frontier_page(frontier)):
        by_kind = {}
        for circle in marks(plot, "circle"):
            by_kind.setdefault(circle.attrib["class"].split()[1], set()).add(int(circle.attrib["data-point"]) - 1)
        front = {i for i, p in enumerate(frontier.points) if any(p is f for f in frontier.front())}
        assert by_kind["best"] == {frontier.best_index} and by_kind["on-front"] == front - {frontier.best_index}
        labels = [t.text for t in plot.iter("text") if t.get("class") == "label best"]
        assert labels == ["4. 8 bits, 25 % fewer neurons"]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_line_of_the_front_leaves_no_better_point_outside(higher_is_better):
    frontier = samples.realistic()
    frontier = replace(frontier, metric={**frontier.metric, "higher_is_better": higher_is_better}, limits={})
    for plot, batch in zip(plots_of(frontier_page(frontier)), frontier.batches):
        (line,) = [e for e in plot.iter("path") if e.get("class") == "front"]
        numbers = re.findall(r"M([\d.]+) ([\d.]+)|H([\d.]+)V([\d.]+)", line.attrib["d"])
        corners = {(float(a or c), float(b or d)) for a, b, c, d in numbers}
        points = [(p.milliseconds[batch]["median"], p.quality) for p in frontier.points if p.quality is not None]
        sign = 1 if higher_is_better else -1
        best = {p for p in points if not any(o != p and o[0] <= p[0] and sign * o[1] >= sign * p[1] for o in points)}
        x, y = scale(plot, "x"), scale(plot, "y")
        top, bottom = 34, 306
        expected = sorted((round(x(a), 2), min(max(y(b), top), bottom)) for a, b in best)
        assert len(corners) == len(expected)
        for corner, point in zip(sorted(corners), expected):
            assert corner == pytest.approx(point, abs=0.02)


def test_targets_are_lines_at_their_values():
    frontier = samples.realistic()
    for plot, batch in zip(plots_of(frontier_page(frontier)), frontier.batches):
        lines = [e for e in plot.iter("line") if e.get("class") == "limit"]
        across, along = sorted(lines, key=lambda e: e.attrib["y1"] != e.attrib["y2"])
        assert float(across.attrib["y1"]) == pytest.approx(scale(plot, "y")(60.8), abs=0.02)
        assert float(along.attrib["x1"]) == pytest.approx(
            scale(plot, "x")(frontier.limits["milliseconds"][batch]), abs=0.02
        )
    assert not [
        e
        for plot in plots_of(frontier_page(replace(frontier, limits={})))
        for e in plot.iter()
        if e.get("class") == "limit"
    ]


def test_an_extreme_point_is_drawn_on_the_edge_and_does_not_stretch_the_axis():
    frontier = samples.realistic()
    wild = samples.point("wild", 1e6, (4.0, 6.0), 1e7)
    plot = plots_of(frontier_page(replace(frontier, points=(*frontier.points, wild))))[0]
    circle = next(c for c in marks(plot, "circle") if c.attrib["data-point"] == "26")
    assert "beyond" in circle.attrib["class"] and centre(circle)[1] == 306
    assert "beyond the axes, drawn on the edge" in "".join(plot.itertext())
    inner = [c for c in marks(plot, "circle") if "beyond" not in c.attrib["class"]]
    assert max(centre(c)[1] for c in inner) - min(centre(c)[1] for c in inner) > 100


@pytest.mark.parametrize("name", FRONTIERS)
def test_plots_are_described_for_screen_readers(name):
    frontier = FRONTIERS[name]
    page = frontier_page(frontier)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for plot in plots_of(page):
        assert plot.attrib["role"] == "img"
        texts = {e.attrib["id"]: e.text for e in plot if e.tag in ("title", "desc")}
        assert plot.attrib["aria-labelledby"].split() == list(texts) and all(texts.values())
    tables = [a for tag, a in Reader(page).elements if tag == "th"]
    assert tables and all(a["scope"] in ("col", "row") for a in tables)


@pytest.mark.parametrize("name", FRONTIERS)
def test_a_page_loads_nothing_and_runs_its_own_script_alone(name):
    page = frontier_page(FRONTIERS[name])
    reader = Reader(page)
    assert not reader.inside and len(reader.scripts) == 1
    policy = next(a["content"] for tag, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    sources = dict(part.split(" ", 1) for part in policy.split("; "))
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    for kind, text in (("script-src", reader.scripts[0]), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert sources[kind] == f"'sha256-{digest}'"
    assert {k: v for k, v in sources.items() if k not in ("script-src", "style-src")} == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    names = {key for _, attributes in reader.elements for key in attributes}
    assert not {n for n in names if n.startswith("on")} and not names & {"src", "href", "xlink:href", "style", "srcdoc"}
    assert "http" not in style + reader.scripts[0] and "url(" not in style and "@import" not in style
    assert {tag for tag, _ in reader.elements} <= set(
        [
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "h1",
            "h2",
            "p",
            "strong",
            "ul",
            "li",
            "span",
            "small",
            "section",
            "dl",
            "div",
            "dt",
            "dd",
            "figure",
            "svg",
            "g",
            "desc",
            "text",
            "line",
            "rect",
            "circle",
            "polygon",
            "path",
            "table",
            "caption",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "wbr",
            "pre",
            "footer",
            "script",
        ]
    )


def test_hostile_text_stays_text():
    page = frontier_page(samples.hostile())
    page.encode()  # no lone surrogates
    reader = Reader(page)
    assert not re.search("[\x00-\x08\u202e]", page)
    shown = samples.HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").replace("\u202e", "\ufffd")
    assert reader.text.count(shown.strip()) > 60


def test_the_table_has_every_point_with_its_numbers():
    frontier = samples.realistic()
    rows = {row[0]: row for row in Reader(frontier_page(frontier)).rows}
    best = next(row for name, row in rows.items() if name.startswith("4. 8 bits, 25 % fewer neurons"))
    assert best[0].endswith("best") and best[1:3] == ["61.20 %", "+0.60"]
    assert best[3] == "4.66 (3.12x)4.47-4.99" and best[5:7] == ["20.0", "22.0"]
    assert best[7:10] == ["-", "-", "-"] and best[10] == "20"
    eighth = next(row for name, row in rows.items() if name.startswith("8. "))
    assert eighth[7] == "+4.79"  # 5.1 * 0.94
    assert eighth[8] == "4.58 (-4%)"  # predicted 4 % too slow
    failed = next(row for name, row in rows.items() if name.startswith("10. "))
    assert failed[0].endswith("not made: ModelError: encoder.layer.2 has no channels left") and failed[1:5] == ["-"] * 4
    assert sum(re.match(r"\d+\. ", name) is not None for name in rows) == 25
    assert rows["OpenVINO int8"][1:] == ["62.30 %", "8.48", "86.2"]


def test_the_layers_of_the_best_point():
    rows = Reader(page := frontier_page(samples.realistic())).rows
    head = next(row for row in rows if row[0] == "layer")
    assert head == ["layer", "choice", "sparsity", "pattern", "bits", "kept units", "ms", "sensitivity", "why"]
    layer = next(row for row in rows if row[0] == "encoder.layer.1.intermediate.dense")
    assert layer == [
        "encoder.layer.1.intermediate.dense", "8 bits, fewer neurons", "30.0%", "neuron", "8", "1,440", "1.80", "0.0400",
        "the next cut would lose more than its time is worth",
    ]  # fmt: skip
    widths = [float(w) for w in re.findall(r'<rect x="0" y="4" width="([\d.]+)"', page)]
    assert max(widths) == 100 and 30.0 in widths


def test_the_recipe_can_be_copied_and_parsed():
    frontier = samples.realistic()
    best = replace(frontier.best_point, precision="int8")
    frontier = replace(frontier, points=(*frontier.points[:3], best, *frontier.points[4:]))
    page = frontier_page(replace(frontier, model="my model; rm -rf"))
    yaml, commands = [Reader(f"<pre>{text}</pre>").text for text in re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)]
    stages = recipes.from_yaml(yaml).to_dict()["stages"]
    assert recipes.from_dict(dict(frontier.best_point.recipe)).to_dict()["stages"] == stages and len(stages) == 2
    assert commands.splitlines() == [
        "rarefy compress 'my model; rm -rf' --recipe recipe.yaml --out torch/",
        "rarefy compile torch/ --precision int8 --out fast/",
    ]
    text = Reader(frontier_page(replace(frontier, model=""))).text
    assert "Then run in Python:" in text and "rarefy.compile(model, example, precision='int8')" in text


def test_the_verdict_comes_first():
    for frontier, words in ((samples.realistic(), "Targets met."), (samples.small(1), "Targets not met.")):
        text = Reader(frontier_page(frontier)).text
        assert text.index(words) < text.index(frontier.verdict) < text.index("Quality against time")
    assert "The search ended at its time limit." in Reader(frontier_page(samples.realistic())).text


@pytest.mark.parametrize(("relative", "text"), [(True, "+2.00"), (False, "+1.24")])
def test_the_unit_of_losses_is_read_from_the_points(relative, text):
    point = replace(samples.point("p", 1.236, (2.0, 2.0), 1e6), quality=61.8 - 1.236)
    frontier = replace(samples.small(0), points=(replace(point, loss=0.02) if relative else point,))
    assert loss_is_relative(frontier) is relative
    rows = Reader(frontier_page(frontier)).rows
    head = next(row for row in rows if row[0] == "model")
    assert head[2] == ("loss, %" if relative else "loss, points")
    assert next(row for row in rows if row[0].startswith("1. p"))[2] == text


def test_batches_of_language_models_have_their_names():
    frontier = samples.realistic()

    def renamed(values):
        return {{"1": "decode", "16": "prompt"}[batch]: value for batch, value in values.items()}

    def renamed_point(point):
        return replace(point, milliseconds=renamed(point.milliseconds), speedup=renamed(point.speedup), predicted={})

    points = tuple(map(renamed_point, frontier.points))
    page = frontier_page(
        replace(frontier, batches=("decode", "prompt"), dense=renamed_point(frontier.dense), points=points)
    )
    titles = [e.text for plot in plots_of(page) for e in plot.iter("title") if e.get("id")]
    assert titles == ["R@1, decode", "R@1, prompt"] and "batch decode" not in page
    assert {"ms, decode", "predicted ms, prompt (error)"} <= set(next(r for r in Reader(page).rows if r[0] == "model"))


def test_the_same_frontier_gives_the_same_page():
    again = frontier_from_dict(json.loads(samples.realistic().to_json()))
    assert again == replace(samples.realistic(), points=again.points, dense=again.dense)
    assert frontier_page(again) == frontier_page(samples.realistic())


def test_a_frontier_writes_its_page(tmp_path):
    frontier, file = samples.realistic(), tmp_path / "report.html"
    assert frontier.report(str(file)) == file and file.read_text(encoding="utf-8") == frontier_page(frontier)
    with pytest.raises(ContainerError, match=r"report.html exists: pass overwrite=True \(shell: pass --force\)"):
        frontier.report(file)
    samples.small(0).report(file, overwrite=True)
    assert file.read_text(encoding="utf-8") == frontier_page(samples.small(0)) and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ContainerError, match="is a folder: give the name of a file"):
        frontier.report(tmp_path, overwrite=True)
    with pytest.raises(ContainerError, match="cannot write .*nothing was written"):
        frontier.report(tmp_path / "none" / "report.html")


def changed(path: str, value: object) -> dict:
    """Return a frontier as data with one value replaced; "points.0.name" names it."""
    data = samples.realistic().to_dict()
    *outer, last = path.split(".")
    inner = data
    for key in outer:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not written by rarefy.optimize: expected an object with schema and points"),
        ({"schema": 1}, "not written by rarefy.optimize"),
        (changed("schema", 2), "schema 2 is of a newer Rarefy, this one reads up to 1: upgrade it"),
        (changed("schema", "x"), "expected schema 1, got 'x'"),
        (changed("verdict", KeyError), "verdict is missing"),
        (changed("verdict", 3), "verdict: expected text, got 3"),
        (changed("extra", 3), "unknown field extra: of a newer Rarefy"),
        (changed("best_index", 25), "best_index 25 is not the number of a point"),
        (changed("best_index", True), "best_index: expected the number of a point or null, got True"),
        (changed("points", {}), "points: expected a list of objects"),
        (changed("points.0.quality", "good"), r"points\[0\]\.quality: expected a number or null, got 'good'"),
        (changed("points.0.quality", 10**400), r"points\[0\]\.quality: expected a number or null"),
        (changed("points.3.milliseconds.1", {}), r"points\[3\]\.milliseconds: expected an object of batches"),
        (changed("points.3.milliseconds.1.low", "0"), r"points\[3\]\.milliseconds"),
        (changed("points.3.disk_bytes", -1), r"points\[3\]\.disk_bytes: expected a number of bytes, got -1"),
        (changed("points.3.layers", [3]), r"points\[3\]\.layers: expected a list of objects"),
        (changed("points.3.layers.0.loss", float("inf")), r"points\[3\]\.layers: a number is not finite"),
        (changed("points.5.predicted", {"loss": "low"}), r"points\[5\]\.predicted: expected an object of loss"),
        (changed("dense.seconds", None), r"dense\.seconds: expected a number, got None"),
        (changed("metric", {"name": "R@1"}), "metric: expected an object with name and higher_is_better"),
        (changed("peers", [{"name": "x"}]), "peers: expected a list of objects with name, quality and milliseconds"),
        (changed("peers", [{"name": "x", "quality": 1.0, "speedup": [1]}]), "peers: expected a list of objects"),
        (changed("peers", [{"name": 3}]), "peers: expected a list of objects with name, quality and milliseconds"),
        (changed("limits", {"quality": "high"}), "limits: expected an object of quality and milliseconds"),
        (changed("notes", "text"), "notes: expected a list of texts"),
    ],
)
def test_data_that_is_no_frontier(data, message):
    with pytest.raises(ContainerError, match=f"^frontier: {message}"):
        frontier_from_dict(data)


def test_older_files_without_newer_fields_are_read():
    data = samples.realistic().to_dict()
    for name in ("peers", "notes", "model", "limits"):
        del data[name]
    frontier = frontier_from_dict(data)
    assert isinstance(frontier, Frontier) and frontier.peers == () and frontier.limits == {}
    assert frontier_page(frontier)
