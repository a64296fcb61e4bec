"""`rarefy optimize` as users meet it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from conftest import shell, text_model

TIMES = ["--minutes", "0.2", "--tokens", "16", "--samples", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny language model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("place")
    text_model(folder)
    return folder


@pytest.fixture(scope="module")
def ran(place):
    out = place / "fast"
    options = [
        "--evaluate",
        "perplexity",
        "--max-loss",
        "50%",
        *TIMES,
        "--minutes",
        "0.8",
    ]  # a busy machine needs them for two models
    result = shell("optimize", place / "model", "--data", place / "text.txt", "-o", out, "--json", *options)
    return result, out


@pytest.mark.slow
def test_the_folder_has_the_model_its_recipe_and_all_points(ran, place):
    result, out = ran
    assert result.returncode == 0, result.stderr
    frontier = json.loads(result.stdout)
    assert (
        frontier["met"] and frontier["metric"]["name"] == "perplexity" and frontier["batches"] == ["decode", "prompt"]
    )
    assert {p["name"] for p in frontier["points"]} >= {"dense, fp32", "dense, int8"}
    assert json.loads((out / "frontier.json").read_text()) == frontier
    ids = torch.randint(0, 60, (1, 8))
    assert rarefy.load(out)(ids).shape[:2] == (1, 8)
    assert (place / ".fast.work").exists() == (frontier["finished"] != "done")  # more minutes go on from it
    again = shell("compress", place / "model", "--recipe", out / "recipe.yaml", "-o", place / "torch", "-q")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_text_goes_to_standard_output_and_progress_to_standard_error(place, tmp_path):
    result = shell(
        "optimize", place / "model", "--data", place / "text.txt", "-o", tmp_path / "out", "--max-loss", "any",
        "--speedup", "1000", *TIMES, "--minutes", "2",
    )  # fmt: skip
    assert result.returncode == 1 and "Not all limits are kept" in result.stdout
    assert "dense, int8" in result.stderr and "check failed: " in result.stderr and "written to" in result.stderr
    assert (tmp_path / "out" / "recipe.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("metric", [[], ["--evaluate", "retrieval", "--eval-data", "pairs.txt"]])
def test_encoders_get_the_masks_that_their_example_has(metric, place, tmp_path, monkeypatch):
    """Texts are batches of ids, pairs of texts have attention masks as well; an encoder's example has token types."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("bert")
    text = (place / "text.txt").read_text().split()
    Path("pairs.txt").write_text("\n".join(" ".join(text[i : i + 12]) for i in range(0, 240, 12)))
    options = ["--max-loss", "50%", "--batch", "1", *TIMES, "-o", "out"]
    result = shell("optimize", "bert", "--data", place / "text.txt", *metric, *options)
    assert result.returncode == 0 and "All limits are kept" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate", "retrieval"], "--evaluate retrieval needs texts or pairs of its own: give --eval-data FILE"),
        (["--evaluate", "perplexity"], "--evaluate perplexity needs data: give --data or --eval-data"),
        (["--data", "text.txt", "--evaluate", "perplexitty"], "perplexity"),
        (["--data", "text.txt", "--max-loss", "lots"], "max_loss: expected a percentage such as 1%"),
        (["--data", "text.txt", "--max-loss", "any"], "nothing limits the loss"),
        (["--data", "text.txt", "--target", "speed"], "unknown target 'speed'"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "text.txt", "--tokens", "100000"], "--tokens: expected at most"),
        (["--data", "text.txt", "--layers", "nothing.*", *TIMES], "matches no layer"),
        (["--data", "text.txt"], "give more text, or pass --tokens 2"),
        (["--minutes", "0"], "0"),
        (["--evaluate", "similarity"], "--evaluate similarity needs data: give --data or --eval-data"),
        (["--samples", "8"], "--samples has no effect without data: give --data"),
        (["--data", "text.txt", "--eval-samples", "8"], "--eval-samples has no effect without data: give --eval-data"),
        (["--data", "text.txt", *TIMES, "--batch", "2"], "batch has no effect on language models"),
        (["--data", "text.txt", *TIMES, "--evaluate", "kl"], "the dense model's kl, which is 0: give points"),
        (["--data", "text.txt", *TIMES, "--train-data", "text.txt"], "--train-data has no effect without training"),
        (["--data", "text.txt", *TIMES, "--train-samples", "9"], "--train-samples has no effect without training"),
        (["--data", "text.txt", *TIMES, "--train", "1", "--train-samples", "9"], "give --train-data or --eval-data"),
        (["--data", "text.txt", *TIMES, "--train", "1", "--train-data", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_use_is_one_line(run, place, tmp_path, options, message):
    options = [str(place / o) if o == "text.txt" else o for o in options]
    result = run("optimize", place / "model", "-o", tmp_path / "out", *options)
    assert result.code == 2 and message in result.err
    assert "Traceback" not in result.err and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_output_that_exists_is_refused(run, ran, place):
    _, out = ran
    result = run("optimize", place / "model", "--data", place / "text.txt", "-o", out, *TIMES)
    assert result.code == 2 and "--force" in result.err


@pytest.mark.slow
def test_a_search_whose_time_was_over_goes_on_with_more(place, tmp_path):
    options = [
        place / "model",
        "--data",
        place / "text.txt",
        "-o",
        tmp_path / "out",
        "--max-loss",
        "50%",
        *TIMES,
        "--json",
    ]
    first = shell("optimize", *options, "--minutes", "0.1")
    before = json.loads(first.stdout)
    assert before["finished"] == "time" and "with --force and more time to go on" in first.stderr
    again = shell("optimize", *options, "--minutes", "0.15", "--force")
    after = json.loads(again.stdout)
    assert after["points"][0]["seconds"] == before["points"][0]["seconds"]  # it was not measured again


@pytest.mark.slow
def test_ctrl_c_saves_the_best_so_far(place, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "optimize",
        str(place / "model"),
        "--data",
        str(place / "text.txt"),
        "-o",
        str(out),
        "--max-loss",
        "any",
    ]
    arguments += ["--speedup", "1000", "--minutes", "5", "--tokens", "16", "--samples", "8"]
    # a shell's background job ignores SIGINT, and so would Python
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rarefy.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    journal = tmp_path / ".out.work" / "stage-search" / "search.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "interrupted" in stdout, stderr
    assert (out / "frontier.json").is_file() and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("count", "options", "read"),
    [(60, [], (60, None)), (200, [], (128, 72)), (900, [], (128, 512)), (900, ["--samples", "300"], (300, None))],
)
def test_the_command_keeps_samples_for_evaluation(tmp_path, monkeypatch, count, options, read):
    """Without --eval-data up to 512 samples of --data are not calibrated on; the recipe reads those that are."""
    from rarefy.cli.main import main
    from rarefy.common.errors import DataError
    from rarefy.search import optimize as searching

    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((count, 16)).astype("float32"))
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    rarefy.export_onnx(net, torch.randn(4, 16), tmp_path / "net.onnx")
    seen = {}

    def stopped(*arguments, eval_data, data_options, **others):
        seen["read"] = tuple(None if d is None else sum(map(len, d)) for d in (arguments[2], eval_data))
        seen["recipe"] = data_options.samples
        raise DataError("enough")

    monkeypatch.setattr(searching, "optimize", stopped)
    arguments = ["optimize", tmp_path / "net.onnx", "--data", tmp_path / "x.npz", "-o", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", ["rarefy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    assert seen == {"read": read, "recipe": read[0]}
