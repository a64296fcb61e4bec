"""`rarefy.optimize` on real models: what it finds, beside uniform models of the same methods and other engines.

    python optimize.py minilm           at most one point of R@1 lost; 30 minutes
    python optimize.py smollm2          at most 3 % of perplexity lost, the fastest tokens; 45 minutes
    python optimize.py smollm2-10       at most 10 %
    python optimize.py efficientnet fashion
    python optimize.py minilm --minutes 15 --train 20
    python optimize.py fashion --minutes 3 --train 4
    python optimize.py minilm --minutes 10 --seeds 1 2
    python optimize.py --table          only print what was measured last

After the search the best model, the dense one in fp32 and in 8 bits, a uniform one, and other engines in 8 bits (where
they run the model) are measured in turns. The uniform model loses the same share by each method in every group or
layer.
As many of its layers stay in fp32 or 16 bits as in the model that was found, spread evenly, and its KV cache has the
same precision.
Qualities in the table are of data that neither the search nor its calibration has seen, and so are distances: mean
squared relative distances from the dense model's outputs, which differ where qualities are equal by chance. State is
kept in build/optimize, so that a killed run goes on. Appends one JSON line a run to results/optimize.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import frontier
import frontier_images
import peers
import photos
import rarefy
import recover
import tables
import texts
import vision
import vision_net
from rarefy.data import builtin, sources
from rarefy.data.text_pairs import text_pairs, token_batches
from rarefy.dependency.graph import trace
from rarefy.evaluation.profiling import PAUSE
from rarefy.evaluation.quality import Metric, metric_of
from rarefy.model import hf
from rarefy.model.layers import all_layers
from rarefy.recipe.schema import Recipe
from rarefy.search import space
from rarefy.search.deploy import deploy, sizes_of, times_of
from rarefy.search.frontier import Point
from rarefy.search.points import trains
from rarefy.search.solve import in_spread_order
from rarefy.search.targets import DECODE, parse_targets, times_tokens
from recording import keep
from runtime import alternate, keep_memory

HERE = Path(__file__).parent
RESULTS, BUILD = HERE / "results" / "optimize.jsonl", HERE / "build" / "optimize"


@dataclass(frozen=True)
class Task:
    """A model, its data, and how it is judged and limited.

    Attributes:
        model: the dense model.
        example: what it is timed with.
        data: calibration batches.
        evaluate: the metric.
        eval_data: batches for it, in the search, which holds a third of them back for its last choice.
        judged: other batches, which the search has not seen.
        unseen: the inputs of some of these.
        max_loss: what may be lost.
        batch: batch sizes that are timed.
        minutes: of the search.
        peers: whether other engines run the model.
        train: makes batches to train on.
        target: what is made as small as possible.
    """

    model: nn.Module
    example: Any
    data: list[Any]
    evaluate: str
    eval_data: list[Any]
    judged: list[Any]
    unseen: list[Any]
    max_loss: str
    batch: tuple[int, ...]
    minutes: float
    peers: bool = True
    train: Callable[[], list[Any]] | None = None
    target: str = "latency"


def minilm(seed: int) -> Task:
    """MiniLM, judged by descriptions that find their article."""
    folder = builtin.model_folder("minilm")
    tokenizer, model = hf.load_tokenizer(folder), hf.load_folder(folder).eval()
    data = frontier.calibration(tokenizer, 128, seed)
    short = [t for t in texts.of_kind("articles") if 8 < len(t) <= 120]  # as the texts that are searched for
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(seed))
    some = token_batches([short[i] for i in order[: 24 * len(data)]], tokenizer, batch=24, tokens=frontier.TOKENS)
    data = [batch for pair in zip(data, some) for batch in pair]
    searched, judged = (text_pairs(pairs, tokenizer) for pairs in (texts.other_articles(), texts.judged_articles()))
    train = lambda: [b for epoch in range(40) for b in recover.batches(tokenizer, epoch, seed)]  # noqa: E731
    unseen = token_batches(
        [text for _, text in texts.judged_articles()[:256]], tokenizer, batch=32, tokens=frontier.TOKENS
    )
    example = frontier.example(tokenizer, 16)
    return Task(model, example, data, "retrieval", searched, judged, unseen, "1 point", (1, 16), 30, train=train)


def off_grid(model: Any, seed: int) -> Any:
    """Return SmolLM2 off the 4-bit grid that its packaged weights come from.

    Each layer's weights are multiplied by random factors near one, a factor for each input, which the norm or the layer
    before divides out: the function stays.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                factor = torch.exp(0.1 * torch.randn(len(norm.weight), generator=random))
                norm.weight /= factor
                for layer in readers:
                    layer.weight *= factor
            factor = torch.exp(0.1 * torch.randn(block.mlp.down_proj.in_features, generator=random))
            block.mlp.up_proj.weight /= factor[:, None]
            block.mlp.down_proj.weight *= factor
    return model


def smollm2(seed: int, max_loss: str = "3%") -> Task:
    """SmolLM2 off its grid, judged by perplexity on articles, and by the time of a token."""
    folder = builtin.model_folder("smollm2-135m")
    tokenizer, model = hf.load_tokenizer(folder), off_grid(hf.load_folder(folder).eval(), seed)
    data: Any = sources.batches("wiki", sources.Take(samples=32, tokens=512, batch=4, seed=seed), tokenizer=tokenizer)
    held_out: Any = sources.batches("wiki-test", sources.Take(samples=48, tokens=512, batch=8), tokenizer=tokenizer)
    searched, judged = held_out[::2], held_out[1::2]
    task = Task(model, data[0], data, "perplexity", searched, judged, judged, max_loss, (1,), 45)
    return replace(task, peers=False, target="decode")


def images(
    name: str,
    data: Any,
    evaluate: str,
    eval_data: list[Any],
    judged: list[Any],
    max_loss: str,
    minutes: float,
    seed: int,
) -> Task:
    """A task of frontier_images.py."""
    task = frontier_images.TASKS[name]
    batches, batch = tuple(task.batches), data[: max(task.batches)].contiguous()
    unseen = [x[0] if isinstance(x, tuple) else x for x in judged[: -(-1000 // len(judged[0]))]]
    model = task.dense(seed)
    return Task(model, batch, list(data.split(16)), evaluate, eval_data, judged, unseen, max_loss, batches, minutes)


def efficientnet(seed: int) -> Task:
    """EfficientNet-Lite0, judged by its agreement with the dense model on photographs."""
    data, more = photos.crops(128, judged=False, seed=seed), photos.crops(1000, judged=False, seed=seed + 1000)
    searched, judged = list(more.split(50)), list(frontier_images.judged_photos().split(50))
    return images("efficientnet", data, "agreement", searched, judged, "3%", 20, seed)


def fashion(seed: int) -> Task:
    """The small ResNet, judged by its accuracy on one half of the test images, searched on the other."""
    _, _, x, y = vision_net.load()
    batches, data = list(zip(x.split(250), y.split(250))), frontier_images.TASKS["fashion"].calibration(seed)
    searched, judged = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    train = lambda: [b for epoch in range(4) for b in vision.data_of(vision_net.load(), seed)["train"](epoch)]  # noqa: E731
    return replace(images("fashion", data, "accuracy", searched, judged, "1%", 15, seed), train=train)


TASKS: dict[str, Callable[[int], Task]] = {
    "minilm": minilm, "smollm2": smollm2, "smollm2-10": partial(smollm2, max_loss="10%"),
    "efficientnet": efficientnet, "fashion": fashion,
}  # fmt: skip


FOUR_BITS = {"weights": "int4", "group": 32, "symmetric": False, "solver": {"name": "obs", "asymmetric": 0.5}}


def uniform(model: nn.Module, example: Any, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that removes the same share by each method in every group; few bits are spread evenly."""
    graph, stages = trace(model, example), list[Any]()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    for stage in copy.deepcopy(list(recipe["stages"])):
        options = next(iter(stage.values()))
        if "counts" in options:
            groups = space.cuttable_groups(model, graph, options["units"], None, None)
            lost = sum(g.size - options["counts"].get(g.name, g.size) for g in groups)
            share = lost / sum(g.size for g in groups)
            options["counts"] = {g.name: max(1, round(g.size * (1 - share))) for g in groups}
            if all(options["counts"][g.name] == g.size for g in groups):
                continue  # too small a share for one unit of each group
        elif "weights" in options and "layers" in options:
            bits = {n: options.get("per_layer", {}).get(n, options["weights"]) for n in options["layers"]}
            options |= spread_evenly(model, linear, bits, options["weights"])
        elif "per_layer" in options:
            weights = {n: model.get_submodule(n).weight.numel() for n in options["per_layer"]}  # type: ignore[union-attr]
            mean = sum(options["per_layer"][n] * w for n, w in weights.items()) / sum(weights.values())
            options["per_layer"] = dict.fromkeys(options["per_layer"], mean)
        stages.append(stage)
    return {**recipe, "stages": stages}


def spread_evenly(model: nn.Module, linear: Sequence[str], bits: Mapping[str, str], most: str) -> dict[str, Any]:
    """Return layers and their bits: as many weights in each number of bits, spread evenly over the linear layers.

    The output head has the same bits.
    """
    size = {n: model.get_submodule(n).weight.numel() for n in {*linear, *bits}}  # type: ignore[union-attr]
    even = {n: b for n, b in bits.items() if n not in linear}
    for each in dict.fromkeys(bits.values()):
        remaining = sum(size[n] for n, b in bits.items() if b == each and n in linear)
        for name in in_spread_order([n for n in linear if n not in even]):
            if remaining >= size[name] / 2:
                even[name] = each
                remaining -= size[name]
    other = {n: b for n, b in even.items() if b != most}
    return {"layers": list(even), "per_layer": other or None}


def own_precisions(point: Point) -> dict[str, Any]:
    """Return options of `deploy`: the layers of a point that are more exact than 8 bits."""
    return {"ignore": point.ignore, "per_layer": point.per_layer}


def evenly_more_exact(model: nn.Module, point: Point) -> dict[str, Any]:
    """Return options of `deploy`: as many layers more exact than 8 bits as in a point, spread evenly over the model."""
    names = in_spread_order([l.name for l in all_layers(model)])
    stay, own = len(point.ignore), [*point.per_layer.values()]
    return {"ignore": tuple(sorted(names[:stay])), "per_layer": dict(zip(names[stay:], own))}


@torch.no_grad()
def measure(name: str, seed: int, minutes: float | None, train: float) -> Iterator[dict[str, Any]]:
    """Yield one record: what the search found, and what stands beside it, measured in turns."""
    task = TASKS[name](seed)
    training = {"train_minutes": train, "train_data": task.train()} if train and task.train else {}
    with torch.enable_grad():
        found = rarefy.optimize(
            task.model, task.example, task.data, task.evaluate, eval_data=task.eval_data, max_loss=task.max_loss,
            target=task.target, batch=task.batch, minutes=minutes or task.minutes, seed=seed,
            resume_dir=BUILD / f"{name}-{seed}", progress=True, **training,
        )  # fmt: skip
        print(found, flush=True)
        point = found.points[found.best_index or 0]
        untrained = point
        if trains(point.recipe):
            plain = [p for p in found.points if not trains(p.recipe)]
            untrained = plain[parse_targets(task.max_loss, task.target).best(plain)[0] or 0]
        recipes = {"uniform": uniform(task.model, task.example, untrained.recipe)}
        if task.target == "decode":
            recipes["dense, int4"] = {"stages": [{"quantize": FOUR_BITS}], "seed": seed}
        if untrained is not point:
            recipes["found, before training"] = dict(untrained.recipe)
        others = {n: copy.deepcopy(task.model) for n in recipes}
        for label, recipe in recipes.items():
            rarefy.compress_(others[label], Recipe(**recipe), {"calibrate": task.data})
    assert found.best is not None
    more_exact = {n: own_precisions(untrained) for n in others}
    more_exact["uniform"] = evenly_more_exact(task.model, untrained)
    make = partial(deploy, example=task.example, calibration=task.data)
    cache = point.cache_precision
    models = {
        "dense, fp32": make(task.model, precision=None),
        "dense, int8": make(task.model, precision="int8"),
        **{
            n: make(m, precision=untrained.precision, cache_precision=cache, **more_exact[n]) for n, m in others.items()
        },
        "found": make(found.best.compressed, precision=point.precision, cache_precision=cache, **own_precisions(point)),
    }
    if cache != "fp32":
        models["dense, int8, 8-bit cache"] = make(task.model, precision="int8", cache_precision=cache)
        if "dense, int4" in others:
            models["dense, int4, 8-bit cache"] = models["dense, int4"]
            models["dense, int4"] = make(others["dense, int4"], precision="int8")
    judge, distance = metric_of(task.evaluate, task.model, task.judged), metric_of("distance", task.model, task.unseen)
    compared: dict[str, Any] = {
        n: {"quality": judge.measure(m), "distance": distance.measure(m), "bytes": sizes_of(m)["disk"]}
        for n, m in models.items()
    }
    decodes = times_tokens(found.batches)
    times = times_of(models, task.example, DECODE) if decodes else _beside_peers(task, models, judge, compared)
    for label, entry in compared.items():
        entry["milliseconds"] = {b: t[label] for b, t in times.items()}
    yield {
        "run": name, "seed": seed, "minutes": minutes or task.minutes, "train_minutes": train, "seconds": found.seconds,
        "finished": found.finished, "metric": dict(found.metric), "targets": dict(found.targets),
        "tried": len(found.points), "met": found.met, "best": point.name, "predicted": dict(point.predicted),
        "measured": {"loss": point.loss, "milliseconds": {b: t["median"] for b, t in point.milliseconds.items()}},
        "checked_loss": point.checked_loss, "speedup": dict(point.speedup), "disk_bytes": point.disk_bytes,
        "compared": compared,
    }  # fmt: skip


def _beside_peers(task: Task, models: Mapping[str, Any], judge: Metric, compared: dict[str, Any]) -> dict[str, Any]:
    """Return quartiles of milliseconds of our models and of other engines in 8 bits, in turns; add their qualities."""
    from rarefy.pipeline.speed import resize_batch

    examples = {b: resize_batch(task.example, b) for b in task.batch}
    times: dict[str, Any] = {}
    with TemporaryDirectory() as place:
        singles = task.data if hasattr(task.example, "keys") else [x for b in task.data for x in b.split(1)]
        file = Path(place) / "model.onnx"
        peers.exported(task.model, singles[0], file)
        others = peers.engines(file, singles, examples, peers.IN_8_BITS)
        for name, engine in others.items():
            called: Any = lambda *images, e=engine, **inputs: e.encode(inputs or images[0])  # noqa: E731
            compared[name] = {"quality": judge.measure(called), "settings": engine.settings}
        for batch, x in examples.items():
            runs: dict[str, Callable[[], Any]] = {
                n: partial(m, **x) if hasattr(x, "keys") else partial(m, x) for n, m in models.items()
            }
            runs |= {name: engine.timed[batch] for name, engine in others.items()}
            repeats = 15 if batch > 1 else 60
            times[str(batch)] = {n: {"median": t[1], "low": t[0], "high": t[2]} for n, t in
                                 alternate(runs, repeats, PAUSE).items()}  # fmt: skip
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--train", type=float, default=0.0, help="minutes of training afterwards (MiniLM, fashion)")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    keep_memory()
    texts.fetch()
    runs = [partial(measure, t, s, args.minutes, args.train) for t in args.tasks for s in args.seeds if not args.table]
    keep(RESULTS, runs)
    tables.show("optimize")


if __name__ == "__main__":
    main()
