"""The three trained files of an OCR system in the engine and in ONNX Runtime: times, and how well each reads.

    python ocr.py            five minutes on two idle cores
    python ocr.py --table    only print what was measured last

The files come with `pip install --no-deps rapidocr-onnxruntime==1.4.4`: they find lines of text on a page, read a line,
and tell whether it is upside down. Pages and lines are rendered from words of the Brown corpus in the fonts of
Matplotlib. Judged: the share of lines that are read exactly, of lines whose direction is right, and how well the pixels
found on a page agree with those that the file finds in ONNX Runtime (F1). 8 bits are calibrated on 32 other images.
Appends one JSON line per file to results/onnx_models.jsonl.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rarefy
import tables
import texts
from onnx_models import RESULTS
from peers import errors_alone, in_8_bits, onnxruntime, settings_of
from rarefy.common.errors import ModelError, first_line
from rarefy.evaluation.profiling import PAUSE
from rarefy.model.compare import relative_distance
from recording import keep
from runtime import alternate, keep_memory

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic")
LINE, PAGE = (48, 320), (640, 640)  # height and width that the files read
JUDGED, CALIBRATION = 200, 32
SPARSITY = 0.8


@cache
def words() -> list[str]:
    """Return words of the Brown corpus."""
    return [w for passage in texts.brown()[:400] for w in passage.split() if w.isalpha() and 3 <= len(w) <= 10]


@cache
def font(name: str, size: int) -> Any:
    folder = Path(str(import_module("matplotlib").get_data_path())) / "fonts" / "ttf"
    return import_module("PIL.ImageFont").truetype(str(folder / f"{name}.ttf"), size)


def tensor_of(picture: Any) -> Tensor:
    """Return a picture as the files read it, [3, height, width] from -1 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def line(text: str, rng: random.Random) -> Tensor:
    """Render a line."""
    size, shade = rng.randint(22, 32), rng.randint(0, 90)
    picture = import_module("PIL.Image").new("RGB", LINE[::-1], (rng.randint(200, 255),) * 3)
    draw = import_module("PIL.ImageDraw").Draw(picture)
    draw.text((6, rng.randint(2, 10)), text, fill=(shade,) * 3, font=font(rng.choice(FONTS), size))
    return tensor_of(picture)


def page(rng: random.Random) -> Tensor:
    """Render a page of some lines."""
    picture = import_module("PIL.Image").new("RGB", PAGE[::-1], (rng.randint(200, 255),) * 3)
    draw = import_module("PIL.ImageDraw").Draw(picture)
    for y in range(20, PAGE[0] - 50, rng.randint(45, 90)):
        text = " ".join(rng.sample(words(), rng.randint(1, 4)))
        draw.text((rng.randint(10, 120), y), text, fill=(rng.randint(0, 90),) * 3, font=font(rng.choice(FONTS), 26))
    return tensor_of(picture)


@dataclass(frozen=True)
class Task:
    """One file, and how it is judged.

    Attributes:
        file: its name.
        images: (number, seed) -> images, and what is right for each.
        quality: (outputs, what is right, outputs of the file in ONNX Runtime) -> percent.
    """

    file: str
    images: Callable[[int, int], tuple[Tensor, list[Any]]]
    quality: Callable[[Tensor, list[Any], Tensor, list[str]], float]


def lines(count: int, seed: int) -> tuple[Tensor, list[Any]]:
    rng = random.Random(seed)
    chosen = [" ".join(rng.sample(words(), rng.randint(1, 2))) for _ in range(count)]
    return torch.stack([line(text, rng) for text in chosen]), chosen


def directions(count: int, seed: int) -> tuple[Tensor, list[Any]]:
    """Return lines of 192 pixels, half of them upside down."""
    x, _ = lines(count, seed)
    x = x[..., :192].contiguous()
    turned = [i % 2 for i in range(count)]
    return torch.stack([t.flip(1, 2) if down else t for t, down in zip(x, turned)]), turned


def pages(count: int, seed: int) -> tuple[Tensor, list[Any]]:
    rng = random.Random(seed)
    return torch.stack([page(rng) for _ in range(count)]), []


def read_exactly(outputs: Tensor, right: list[Any], _: Tensor, characters: list[str]) -> float:
    """Return how many lines are read exactly: the most likely character of each column, repetitions once."""
    read = []
    for row in outputs.argmax(-1).tolist():
        kept = [c for i, c in enumerate(row) if c and (i == 0 or c != row[i - 1])]
        read.append("".join(characters[c - 1] for c in kept).strip())
    return 100 * sum(a.replace(" ", "") == b.replace(" ", "") for a, b in zip(read, right)) / len(right)


def right_directions(outputs: Tensor, right: list[Any], _: Tensor, characters: list[str]) -> float:
    return 100 * float((outputs.argmax(-1) == torch.tensor(right)).float().mean())


def found_alike(outputs: Tensor, _: list[Any], dense: Tensor, characters: list[str]) -> float:
    """Return the F1 score of the pixels that are text, in percent."""
    a, b = outputs > 0.3, dense > 0.3
    return 200 * float((a & b).sum()) / max(1.0, float(a.sum() + b.sum()))


TASKS = {
    "find lines": Task("ch_PP-OCRv4_det_infer", pages, found_alike),
    "read a line": Task("ch_PP-OCRv4_rec_infer", lines, read_exactly),
    "direction": Task("ch_ppocr_mobile_v2.0_cls_infer", directions, right_directions),
}


def characters_of(file: Path) -> list[str]:
    """Return the characters that a file reads; " " comes last."""
    about = {p.key: p.value for p in import_module("onnx").load(file).metadata_props}
    return [*about.get("character", "").split("\n"), " "]


@torch.no_grad()
def measure(name: str) -> Iterator[dict[str, Any]]:
    """Yield one record: quality and times of each way to run a file."""
    task = TASKS[name]
    folder = Path(str(import_module("importlib.util").find_spec("rapidocr_onnxruntime").origin)).parent / "models"
    file = folder / f"{task.file}.onnx"
    (calibration, _), (x, right) = task.images(CALIBRATION, 1), task.images(JUDGED if name != "find lines" else 20, 2)
    one = x[:1].contiguous()
    load = partial(rarefy.from_onnx, file, example=one)
    sparse = load()
    rarefy.prune_(sparse, "unstructured", "magnitude", SPARSITY)
    rarefy.fold_(sparse)
    with TemporaryDirectory() as place, errors_alone():
        newer = Path(place) / "net.onnx"  # scales for each channel need opset 13
        onnx: Any = import_module("onnx")
        onnx.save(import_module("onnx.version_converter").convert_version(onnx.load(file), 13), newer)
        batches = [{"x": t.numpy()} for t in calibration.split(1)]
        others = {
            "ONNX Runtime": onnxruntime({"": lambda: file}, {1: one}),
            "ONNX Runtime, 8 bits": onnxruntime(in_8_bits(newer, batches), {1: one}, want=torch.as_tensor(load()(one))),
        }
        runs: dict[str, Callable[[Tensor], Any]] = {
            **{n: other.encode for n, other in others.items()},
            "compiled": rarefy.compile(load(), one),
            "compiled, 80 % zeros": rarefy.compile(sparse, one),
        }
        try:
            fast = rarefy.compile(load(), one, precision="int8", calibrate=list(calibration.split(1)))
            runs["compiled, 8 bits"] = fast
        except ModelError as error:  # outputs are too far from the model's
            print(f"{name}: not in 8 bits: {first_line(error)}", flush=True)
        outputs = {n: torch.cat([torch.as_tensor(run(t.contiguous())) for t in x.split(1)]) for n, run in runs.items()}
        dense = outputs["ONNX Runtime"]
        calls: dict[str, Callable[[], Any]] = {n: partial(run, one) for n, run in runs.items()}
        times = alternate(calls | {n: other.timed[1] for n, other in others.items()}, 30, PAUSE)
    quality = {n: task.quality(o, right, dense, characters_of(file)) for n, o in outputs.items()}
    exact = torch.as_tensor(load().double()(one.double()))  # the file in fp64
    names = {"ONNX Runtime": "onnxruntime", "compiled": "compiled"}
    apart = {short: relative_distance(outputs[n][:1].double(), exact, norm=math.inf) for n, short in names.items()}
    apart["each other"] = relative_distance(outputs["compiled"], dense, norm=math.inf)
    record = {"run": "ocr", "model": name, "file": task.file, "apart": apart, "quality": quality}
    yield {**record, "milliseconds": times, "settings": settings_of(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    keep_memory()
    texts.fetch()
    keep(RESULTS, [] if args.table else [partial(measure, name) for name in args.only])
    tables.show("ocr")


if __name__ == "__main__":
    main()
