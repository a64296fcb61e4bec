"""The commands that are killed: small models, an older result at the same place, and what the outputs are."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy
from conftest import text_model, tiny_bert
from helpers.hub_server import Hub
from rarefy.checkpoint.push import write_card
from rarefy.cli.main import main
from rarefy.train import checkpoint
from rarefy.train.sparsity_config import Gradual

Files = dict[str, bytes]
REPOSITORY = "me/model"
PRUNE = "prune: {sparsity: 0.5, solver: {name: admm, steps: 4}}"
RECIPE = f"""\
name: long
data: {{calibrate: text.txt, train: text.txt, samples: 8, train_samples: 8, tokens: 16, batch: 2}}
stages:
  - {PRUNE}
  - train: {{epochs: 2, optimizer: {{name: adamw, lr: 1e-3}}}}
evaluate: {{metric: perplexity, data: text.txt, samples: 4, tokens: 16}}
"""
OLD_RECIPE = "name: half\nstages: [{prune: {score: random, sparsity: 0.5}}]\n"
VARIES = ("seconds", "load", "peak_rss")  # fields of receipts that no two runs have in common
VARIES_IN_TEXT = re.compile(rb"\b[0-9.,]+ (?:s|ms|min)\b|load [0-9.]+|peak RSS of the run +[0-9,]+")


@dataclass(frozen=True)
class Job:
    """A command under test.

    Attributes:
        name: of the command.
        run: runs it: inputs, folder of the output `out`, whether an older output is replaced.
        old: writes the older output.
    """

    name: str
    run: Callable[[Path, Path, bool], Any]
    old: Callable[[Path, Path], Any]

    @property
    def command(self) -> str:
        """Return the command that the job is one of."""
        return self.name.partition(" ")[0]


def cli(*words: Any) -> None:
    """Run the command line in this process; SystemExit for an error."""
    sys.argv = ["rarefy", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def force(replaces: bool) -> list[str]:
    """Return the option for an output that exists."""
    return ["--force"] if replaces else []


def write_inputs(place: Path) -> None:
    """Write models, data and recipes."""
    text_model(place)
    (place / "long.yaml").write_text(RECIPE)
    (place / "half.yaml").write_text(OLD_RECIPE)
    bert = place / "bert"
    tiny_bert().save_pretrained(bert)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).write_bytes((place / "model" / name).read_bytes())
    for name, seed in (("result", "0"), ("older", "1")):
        cli("compress", place / "model", "-r", place / "half.yaml", "-o", place / name, "--seed", seed, "-q")


class Net(nn.Module):
    """A network with dropout, so that random numbers matter, and with weights of some megabytes."""

    def __init__(self, width: int = 64):
        super().__init__()
        torch.manual_seed(2)
        self.hidden, self.drop, self.out = nn.Linear(32, width), nn.Dropout(0.2), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.out(self.drop(self.hidden(x).relu()))


def batches(epoch: int) -> list[Any]:
    """Return the training data of an epoch, shuffled by the epoch."""
    generator = torch.Generator().manual_seed(epoch)
    return [(torch.randn(8, 32, generator=generator), torch.arange(8) % 4) for _ in range(6)]


def compress(inputs: Path, folder: Path, replaces: bool) -> None:
    """Prune with a solver, train, evaluate and save."""
    checkpoint.EVERY = 0.0  # a state after each step
    words = ["compress", inputs / "model", "-r", inputs / "long.yaml", "-o", folder / "out"]
    cli(*words, *force(replaces), "-q")


def optimize(inputs: Path, folder: Path, replaces: bool) -> None:
    """Search for a small model. Each measurement takes the same time, so that no choice depends on the machine."""
    ticks = itertools.count()
    time.perf_counter = lambda: next(ticks) / 1024  # type: ignore[assignment]
    words = ["optimize", inputs / "bert", "--data", inputs / "text.txt", "--tokens", 16, "--samples", 16]
    words += ["--evaluate", "similarity", "--max-loss", "0.05", "--target", "size", "--batch", 1]
    cli(*words, "-o", folder / "out", *force(replaces), "-q")


def fit(inputs: Path, folder: Path, replaces: bool) -> None:
    """Train with dropout while weights are pruned, and save."""
    checkpoint.EVERY = 0.0
    net = Net()
    options = {"prune": Gradual(sparsity=0.5, steps=6), "lr_schedule": "cosine", "seed": 3}
    rarefy.fit_(
        net, batches, epochs=3, **options, validate=lambda m: -float(m.out.bias.detach().sum()), resume_dir=folder / "w"
    )
    rarefy.save(net, folder / "out", overwrite=replaces)


def save(inputs: Path, folder: Path, replaces: bool) -> None:
    """Save some megabytes with a file beside them, compressed and not."""
    net = Net(1 << 14)
    rarefy.save(net, folder / "out", overwrite=replaces, files={"note.txt": b"note" * 1000})


def save_compressed(inputs: Path, folder: Path, replaces: bool) -> None:
    """Save with LZMA."""
    rarefy.save(Net(1 << 11), folder / "out", overwrite=replaces, compress=True)


def old_save(inputs: Path, folder: Path) -> None:
    """Save another model."""
    rarefy.save(nn.Linear(4, 4), folder / "out")


def compile_decoder(inputs: Path, folder: Path, replaces: bool) -> None:
    """Compile a language model, one weight at a time."""
    cli("compile", inputs / "model", "--precision", "int8", "-o", folder / "out", *force(replaces), "-q")


def compile_encoder(inputs: Path, folder: Path, replaces: bool) -> None:
    """Compile an encoder."""
    cli("compile", inputs / "bert", "--tokens", 16, "-o", folder / "out", *force(replaces), "-q")


def push(inputs: Path, folder: Path, replaces: bool) -> None:
    """Publish a folder with its card."""
    cli("push", folder / "out", REPOSITORY, "--licence", "mit", "-q")


def push_old(inputs: Path, hub: Hub) -> None:
    """Put another model's files into the repository."""
    if not (inputs / "older" / "README.md").exists():
        write_card(inputs / "older", REPOSITORY, "mit")
    hub.add(REPOSITORY, {f.name: f.read_bytes() for f in (inputs / "older").iterdir()})


def by_recipe(inputs: Path, folder: Path) -> None:
    """Compress by another recipe."""
    cli("compress", inputs / "model", "-r", inputs / "half.yaml", "-o", folder / "out", "-q")


def compiled_before(inputs: Path, folder: Path) -> None:
    """Compile in another precision."""
    cli("compile", inputs / "model", "--precision", "fp32", "-o", folder / "out", "-q")


JOBS = (
    Job("compress", compress, by_recipe),
    Job("optimize", optimize, by_recipe),
    Job("fit_", fit, old_save),
    Job("save", save, old_save),
    Job("save compressed", save_compressed, old_save),
    Job("compile decoder", compile_decoder, compiled_before),
    Job("compile encoder", compile_encoder, compiled_before),
    Job("push", push, push_old),  # type: ignore[arg-type]
)


def content(folder: Path) -> Files | None:
    """Return the files of an output, None where there is none; what was timed is replaced by nothing."""
    if not folder.exists():
        return None
    return {str(f.relative_to(folder)): without_times(f.name, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


def without_times(name: str, data: bytes) -> bytes:
    """Return the bytes of a file without the times that it reports, which differ from run to run."""
    if name in ("receipt.json", "frontier.json"):
        return json.dumps(_untimed(json.loads(data))).encode()
    return VARIES_IN_TEXT.sub(b"", data) if name.endswith((".txt", ".md")) else data


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in VARIES}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def negative_times(folder: Path) -> list[str]:
    """Return the times in a receipt that are below 0."""
    found = list[str]()

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, key)
        elif isinstance(value, list):
            for inner in value:
                look(inner, name)
        elif name in ("seconds", "median", "low", "high") and isinstance(value, int | float) and value < 0:
            found.append(f"{name} {value}")

    for file in folder.glob("*.json"):
        look(json.loads(file.read_text()), "")
    return found
