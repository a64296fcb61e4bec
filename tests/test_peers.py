"""Other engines in benchmarks: which setting counts, what is judged, and what tables say of both."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind tests/, which has a module zoo too

import peers
import provenance
import records
import speed_tables
import tables

EXAMPLES = {"1": torch.ones(1, 3, 4, 4), "4": torch.ones(4, 3, 4, 4)}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    monkeypatch.setattr(peers, "CHOICE_REPEATS", 3)


def engine(seconds: float, error: float = 0.0):
    """Return what starts an engine that sums each image, with an error for the first of a batch."""

    def start(x):
        def run(arrays):
            time.sleep(seconds)
            sums = arrays["x"].sum((1, 2, 3))
            sums[0] += error
            return sums

        return run

    return start


def broken(x):
    raise ValueError("no such kernel\nmore")


def test_the_fastest_setting_counts_and_all_are_recorded():
    found = peers.fastest({"slow": engine(0.01), "fast": engine(0.0), "broken": broken}, EXAMPLES)
    assert found.settings["setting"] == {"1": "fast", "4": "fast"}
    assert found.settings["tried"]["broken"] == "ValueError: no such kernel"
    assert set(found.settings["tried"]["slow"]) == {"1", "4"} and found.settings["tried"]["slow"]["1"] >= 10


def test_a_fast_setting_with_other_outputs_does_not_count():
    starts = {"exact": engine(0.01), "wrong": engine(0.0, error=1e4)}
    found = peers.fastest(starts, EXAMPLES, want=torch.full((4,), 48.0))
    assert found.settings["setting"] == {"1": "exact", "4": "exact"} and found.settings["cosines"]["exact"] > 0.999
    assert list(found.settings["refused"]) == ["wrong"] and found.settings["refused"]["wrong"] < 0.9
    assert peers.fastest(starts, EXAMPLES).settings["setting"] == {"1": "wrong", "4": "wrong"}


def test_each_size_has_the_fastest_setting_and_the_largest_is_judged():
    def start(factor, slow_at):
        def started(x):
            def run(arrays):
                time.sleep(0.01 if len(arrays["x"]) == slow_at else 0.0)
                return factor * arrays["x"].sum((1, 2, 3))

            return run

        return started

    found = peers.fastest({"a": start(1, slow_at=4), "b": start(2, slow_at=1)}, EXAMPLES)
    assert found.settings["setting"] == {"1": "a", "4": "b"}
    assert (found.timed["1"]()[0], found.timed["4"]()[0]) == (48, 96)
    assert torch.equal(found.encode(EXAMPLES["4"]), torch.full((4,), 96.0))


def test_engines_that_do_not_run_are_an_error():
    with pytest.raises(RuntimeError, match="no setting runs: .*no such kernel"):
        peers.fastest({"a": broken}, EXAMPLES)


def test_what_is_judged_is_the_network_of_the_largest_example():
    shapes = []

    def start(x):
        def run(arrays):
            shapes.append(arrays["x"].shape)
            return arrays["x"].sum((1, 2, 3))

        return run

    found = peers.fastest({"a": start}, EXAMPLES)
    shapes.clear()
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 4, 4)
    assert torch.equal(found.encode(images), 48 * torch.arange(6.0))
    assert shapes == [(4, 3, 4, 4), (4, 3, 4, 4)]


def test_texts_are_padded_to_the_tokens_of_the_network_and_longer_ones_refused():
    examples = {"a": {"input_ids": torch.ones(2, 5, dtype=torch.long)}}
    found = peers.fastest({"a": lambda x: lambda arrays: arrays["input_ids"][..., None].astype("float32")}, examples)
    ids = torch.arange(12).view(4, 3)
    assert torch.equal(found.encode({"input_ids": ids}), ids[..., None].float())
    with pytest.raises(ValueError, match="at most 5 tokens, which the network is started for, got 6"):
        found.encode({"input_ids": torch.ones(2, 6, dtype=torch.long)})


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 8)

    def forward(self, x):
        x = self.wide(x.flatten(2).transpose(1, 2))
        scores = torch.softmax(x @ x.transpose(1, 2), -1)
        return scores.masked_fill(scores.isnan(), 0.0) @ x


def test_onnx_runtime_and_openvino_run_a_model_with_attention(tmp_path):
    for name in ("onnx", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(name)
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 8, 4, 4)
    peers.exported(model, x, tmp_path / "m.onnx")
    found = peers.engines(tmp_path / "m.onnx", [torch.randn(1, 8, 4, 4) for _ in range(4)], {"1": x[:1], "2": x})
    with torch.no_grad():
        for name, other in found.items():
            assert peers.cosine(other.encode(x), model(x)) > (0.9 if "int8" in name else 0.999), name
    tried = found["onnxruntime int8"].settings["tried"]
    files = ("static", "static, weights", "dynamic")
    assert {f"{file}, threads {wait}" for file in files for wait in ("spin", "sleep")} == {*tried}
    assert all(isinstance(ms, dict) for ms in tried.values())
    assert set(found["openvino int8"].settings["setting"]) == {"1", "2"}
    assert "precision f32" in found["openvino int8"].settings["tried"]


def test_layers_with_weights_alone_leave_products_of_activations_as_they_are(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4)
    peers.exported(Attention().eval(), x, tmp_path / "m.onnx")
    counts = {}
    for label, make in peers.in_8_bits(tmp_path / "m.onnx", [{"x": x[:1].numpy()}]).items():
        counts[label] = [n.op_type for n in onnx.load(make()).graph.node].count("QuantizeLinear")
    assert counts["dynamic"] == 0 < counts["static, weights"] < counts["static"]


def test_attention_is_recognized_in_a_file(tmp_path):
    pytest.importorskip("onnx")
    peers.exported(Attention().eval(), torch.randn(2, 8, 4, 4), tmp_path / "a.onnx")
    assert peers.has_attention(tmp_path / "a.onnx")
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Softmax(-1)).eval()
    peers.exported(model, torch.randn(2, 3, 4, 4), tmp_path / "m.onnx")
    assert not peers.has_attention(tmp_path / "m.onnx")


def test_records_name_the_versions_of_engines():
    import recording

    line = recording.recorded({"model": "a"})
    assert line["versions"]["torch"] == torch.__version__ and line["model"] == "a"
    assert set(line["versions"]) <= set(recording.ENGINES)


# Tables


def settings(setting: str) -> dict:
    return {"setting": {"1": setting}, "tried": {"threads spin": {"1": 1.0}, "threads sleep": {"1": 1.1}}}


def test_tables_say_which_settings_were_tried():
    one = {"settings": {"onnxruntime int8": settings("threads spin"), "compiled": {"setting": "a", "tried": {"a": {}}}}}
    assert records.tried([one, one]) == (
        "Settings of other engines: ONNX Runtime, 8 bits: threads spin (also tried: threads sleep)."
    )
    other = {"settings": {"onnxruntime int8": settings("threads sleep")}}
    assert records.tried([one, one, other]) == (
        "Settings of other engines, with sizes or the number of cases where they differ: "
        "ONNX Runtime, 8 bits: threads spin 2, threads sleep 1."
    )
    by_size = {"setting": {"1 x 16": "a", "1 x 128": "b", "16 x 128": "b"}, "tried": {"a": {}, "b": {}, "c": {}}}
    assert "x: b for 1 x 128, 16 x 128, a for 1 x 16 (also tried: c)." in records.tried([{"settings": {"x": by_size}}])
    refused = {"setting": {"1": "dynamic"}, "tried": {"static": {}, "dynamic": {}}, "refused": {"static": 0.4}}
    assert "dynamic (also tried: static, refused: cosine 0.40)." in records.tried([{"settings": {"a": refused}}])
    assert records.tried([{}]) == ""


def test_what_the_cut_and_what_the_engine_give_stand_apart():
    times = {
        "openvino int8": [0, 12.0, 0],
        "onnxruntime int8": [0, 16.0, 0],
        "openvino int8, narrower-0, trained": [0, 8.0, 0],
        "onnxruntime int8, narrower-0, trained": [0, 6.0, 0],
        "ours, int8": [0, 9.0, 0],
        "ours, narrower-0, trained, int8": [0, 4.0, 0],
    }
    row = {"quality": {name: {} for name in times}, "milliseconds": {"1 x 16": times}}
    text = speed_tables._model_and_engine(row)
    assert "| 2.00x · 1.50x = 3.00x |" in text and text.count("neurons") == 1
    assert speed_tables._fastest_rival(times)[1] == 12.0


def test_a_row_stands_beside_the_fastest_file_of_its_size():
    def row(engine, file, decode, prefill):
        return {"engine": engine, "file": file, "run_key": "1", "decode": [0, decode, 0], "prefill": [0, prefill, 0]}

    ours = row("rarefy", "4 bits", 150.0, 600.0)
    rows = [ours, row("llama.cpp", "Q4_0", 100.0, 300.0), row("llama.cpp", "IQ4_NL", 75.0, 1200.0)]
    assert speed_tables._beside_rivals(ours, rows) == {"decode": 1.5, "prefill": 0.5}
    assert "prompts (0.50x)" in speed_tables._losses(rows, "llama.cpp is faster")


def test_a_measurement_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if commit.returncode:
        pytest.skip("no repository")
    monkeypatch.setattr(tables, "MEASURED", tmp_path / "build" / "measured.json")
    (tmp_path / "build").mkdir()
    log, file = tmp_path / "log", tmp_path / "results" / "memory.jsonl"
    file.parent.mkdir()
    monkeypatch.setattr(tables, "RESULTS", file.parent)
    monkeypatch.setattr(records, "RESULTS", file.parent)
    monkeypatch.setattr(provenance, "is_in_history", lambda commit: True)
    monkeypatch.setattr(provenance, "changed_since", lambda commit, paths: "")
    machine = {"cpu": "AMD EPYC", "extensions": ["avx2"], "threads": 2, "load": 1.0}
    line = {"model": "a", "run_id": "1", "started": "", "changed": [], "load": 0.1, "commit": commit.stdout.strip()}
    script = tmp_path / "script.py"
    script.write_text(
        f"open({str(log)!r}, 'a').write('ran ')\nopen({str(file)!r}, 'a').write({json.dumps({**line, 'machine': machine}) + chr(10)!r})\n"
    )
    fails = tmp_path / "fails.py"
    fails.write_text("raise SystemExit(3)")
    memory = provenance.Benchmark(f"python {script}", 1, (), timed=False)
    spread = provenance.Benchmark(f"python {fails}", 1, ())
    monkeypatch.setitem(provenance.BENCHMARKS, "memory", memory)
    monkeypatch.setitem(provenance.BENCHMARKS, "spread", spread)
    assert tables.measure(["memory", "spread"]) == [spread.command]
    assert tables.measure(["memory"]) == [] and log.read_text() == "ran "
    tables.MEASURED.write_text(json.dumps({memory.command: "another"}))
    assert tables.measure(["memory"]) == [] and log.read_text() == "ran ran "


def test_llama_cpp_counts_with_or_without_flash_attention_for_each_phase(monkeypatch):
    import language

    class Fake:
        def __init__(self, make, *args):
            self.args, self.record = args, {"engine": make.__name__, "file": args[-1] if len(args) == 1 else args[1]}

        def perplexity(self, text):
            return 14.0 + 0.25 * (self.args[-1] == "no flash attention")

        def close(self):
            pass

    def rates(models, ids, repeats):
        speeds = {"flash attention": (90.0, 600.0), "no flash attention": (100.0, 500.0), "8 bits": (130.0, 1600.0)}
        found = {name: speeds[name[-1]] for name in models}
        return {n: {"decode": [0, d, 0], "prefill": [0, p, 0]} for n, (d, p) in found.items()}

    monkeypatch.setattr(language, "Isolated", Fake)
    monkeypatch.setattr(language, "rates", rates)
    monkeypatch.setattr(language, "windows", lambda: torch.zeros(1, 4, dtype=torch.long))
    monkeypatch.setattr(language, "gguf_files", lambda: {"Q8_0": Path("a"), "Q4_1": Path("b")})
    monkeypatch.setattr(language, "libraries", lambda: {"node-llama-cpp": Path("c")})
    ours, q8, q4 = language.engines([], [], ["8 bits"])
    assert (ours["engine"], q8["file"], q4["file"]) == ("ours", "Q8_0", "Q4_1")
    assert q8["decode"][1] == 100.0 and q8["prefill"][1] == 600.0 and q8["perplexity"] == 14.0
    assert [q8["settings"][p]["setting"] for p in ("decode", "prefill")] == ["no flash attention", "flash attention"]
    assert q8["settings"]["decode"]["tried"] == {"flash attention": 90.0, "no flash attention": 100.0}
