"""Small random models from seeds, and a search for compiled ones that answer wrongly.

    python tests/helpers/generated_models.py --seeds 0:2000

A model is a text of Python, which `helpers.python_subset` runs: what is printed is what ran. A compiled model is called
at twenty other sizes. Each answer must be eager's or an error of Rarefy that names a size; see `call_checks.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.python_subset import Program

WIDTH, VOCABULARY, POSITIONS = 8, 32, 16  # features of a token, number of ids, rows of position tables
LIGHT = 100  # seeds below have models of few steps, which `make test` runs
NAME_IN_INIT = re.compile(r"self\.(?:register_buffer\(\")?(\w+)")
EXPORTED = {"torch": torch, "nn": nn, "F": F, "math": math}
BUILTINS = (
    *(abs, bool, dict, divmod, float, int, isinstance, len, list, max, min, range, reversed, round, sum, tuple, zip),
    *(enumerate, AssertionError, RuntimeError, ValueError, slice, str, any, all, pow),
)
NAMES = {**EXPORTED, **{b.__name__: b for b in BUILTINS}}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call: batch, length, length of the second input."""

    b: int
    s: int
    t: int


@dataclass
class Description:
    """The text of a model and of its inputs, from which `build` makes a module."""

    seed: int
    inputs: list[tuple[str, str]] = field(default_factory=list)  # name and kind
    keyword: bool = False  # whether all inputs but the first are passed by name
    helpers: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The model as Python source."""
        optional = "=None" if self.keyword or self.inputs[0][0] == "input_ids" else ""
        names = ", ".join(f"{n}{optional * (i > 0)}" for i, (n, _) in enumerate(self.inputs))
        kinds = ", ".join(f"{n}: {k}" for n, k in self.inputs)
        lines = [*self.helpers, f"class Model(nn.Module):  # seed {self.seed}; {kinds}", "    def __init__(self):"]
        lines += ["        super().__init__()", *(f"        {line}" for line in self.init), ""]
        lines += [f"    def forward(self, {names}):", *(f"        {line}" for line in self.forward)]
        return "\n".join(lines)

    @property
    def program(self) -> str:
        """The functions that `python_subset` runs."""
        names = ", ".join(["self", *(n for n, _ in self.inputs)])
        body = [
            f"def __init__(self):\n    pass\n{indented(self.init)}",
            f"def forward({names}):\n{indented(self.forward)}",
        ]
        return "\n".join([*self.helpers, *body])


def indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


class Generated(nn.Module):
    """A module that runs the text of a description. Subclasses have the signatures."""

    def __init__(self, description: Description):
        super().__init__()
        self.program = Program(description.program, NAMES)
        self.program.call("__init__", self)

    def run(self, *inputs: Any) -> Any:
        return self.program.call("forward", self, *inputs)


class OneInput(Generated):
    def forward(self, x):
        return self.run(x)


class TwoInputs(Generated):
    def forward(self, x, y):
        return self.run(x, y)


class OptionalInput(Generated):
    def forward(self, x, y=None):
        return self.run(x, y)


class Masked(Generated):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids, attention_mask)


def build(description: Description) -> nn.Module:
    """Return the module of a description, in evaluation mode, with random weights and statistics."""
    names = [n for n, _ in description.inputs]
    kind = OneInput if len(names) == 1 else Masked if names[0] == "input_ids" else TwoInputs
    kind = OptionalInput if kind is TwoInputs and description.keyword else kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(description.seed)
        model = kind(description)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.running_mean.uniform_(-0.5, 0.5)
                m.running_var.uniform_(0.5, 1.5)
    return model.eval()


# inputs: kind -> (tensor of sizes and a generator, how it becomes h, layers for that)
Maker = Callable[[Sizes, torch.Generator], Any]


def normal(*shape: int, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def prefix_mask(b: int, s: int, g: torch.Generator) -> Tensor:
    lengths = torch.randint(1, s + 1, (b, 1), generator=g) if s else torch.zeros(b, 1, dtype=torch.long)
    return torch.arange(s)[None] < lengths


FIRST: dict[str, tuple[Maker, str, str]] = {
    "tokens": (lambda z, g: normal(z.b, z.s, WIDTH, g=g), "h = {x}", ""),
    "token ids": (
        lambda z, g: torch.randint(0, VOCABULARY, (z.b, z.s), generator=g),
        "h = self.embed({x})",
        "self.embed = nn.Embedding(32, 8)",
    ),
    "rows": (lambda z, g: normal(z.s, WIDTH, g=g), "h = {x}[None]", ""),
    "columns": (lambda z, g: normal(z.s, WIDTH, g=g), "h = {x}.view(-1, 1, 8)", ""),
    "images": (
        lambda z, g: normal(z.b, 3, 6, 6, g=g),
        "h = self.stem({x}).flatten(2).transpose(1, 2)",
        "self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))",
    ),
    "signals": (
        lambda z, g: normal(z.b, 4, z.s, g=g),
        "h = self.stem({x}).transpose(1, 2)",
        "self.stem = nn.Conv1d(4, 8, 3, padding=1)",
    ),
    "features": (
        lambda z, g: normal(z.b, z.s, g=g),
        "h = {x}.unsqueeze(-1) * self.scale",
        "self.scale = nn.Parameter(torch.randn(8))",
    ),
    "vector": (
        lambda z, g: normal(z.s, g=g),
        "h = {x}.view(1, -1, 1) * self.scale",
        "self.scale = nn.Parameter(torch.randn(8))",
    ),
    "int64 tokens": (lambda z, g: torch.randint(-4, 5, (z.b, z.s, WIDTH), generator=g), "h = {x}.float()", ""),
    "int32 tokens": (
        lambda z, g: torch.randint(-4, 5, (z.b, z.s, WIDTH), generator=g).int(),
        "h = {x} / 2",
        "",
    ),
    "bool tokens": (lambda z, g: normal(z.b, z.s, WIDTH, g=g) > 0, "h = {x}.to(torch.float32)", ""),
    "fp64 tokens": (lambda z, g: normal(z.b, z.s, WIDTH, g=g).double(), "h = {x}.float()", ""),
}

SECOND: dict[str, Maker] = {
    "same": lambda z, g: normal(z.b, z.s, WIDTH, g=g),
    "other": lambda z, g: normal(z.b, z.t, WIDTH, g=g),
    "row": lambda z, g: normal(z.s, WIDTH, g=g),
    "one batch": lambda z, g: normal(1, z.s, WIDTH, g=g),
    "one token": lambda z, g: normal(z.b, 1, WIDTH, g=g),
    "bool mask": lambda z, g: prefix_mask(z.b, z.s, g),
    "int mask": lambda z, g: prefix_mask(z.b, z.s, g).long(),
    "lengths": lambda z, g: prefix_mask(z.b, z.s, g).sum(1),
    "number": lambda z, g: normal(g=g),
    "none": lambda z, g: None,
}


def make_inputs(description: Description, sizes: Sizes, seed: int) -> list[Any]:
    """Return the inputs of a call."""
    g = torch.Generator().manual_seed(seed)
    makers = {**SECOND, **{k: maker for k, (maker, *_) in FIRST.items()}}
    return [makers[kind](sizes, g) for _, kind in description.inputs]


class Generator:
    """Writes one model: random choices, and the lines that they gave so far."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.d = Description(seed)
        self.count = 0
        self.second = ""  # kind of the second input
        self.first = ""

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def add(self, *lines: str) -> None:
        self.d.forward += [part for line in lines for part in line.split("\n")]

    def layer(self, text: str, prefix: str = "layer") -> str:
        """Add a layer and return how forward names it."""
        name = self.name(prefix)
        self.d.init.append(f"self.{name} = {text}")
        return f"self.{name}"

    def table(self) -> str:
        name = self.name("table")
        rows = self.pick("16, 8", "16, 8", "64, 8")
        self.d.init.append(
            self.pick(
                f'self.register_buffer("{name}", torch.randn({rows}))',
                f"self.{name} = nn.Parameter(torch.randn({rows}))",
                f"self.{name} = torch.randn({rows})",
            )
        )
        return f"self.{name}"

    # sizes and conditions

    def atom(self) -> tuple[str, int]:
        """Return an expression of one size, and about how large it is."""
        x = self.d.inputs[0][0]
        b, s = 3, 10
        atoms = [("h.shape[1]", s), ("h.size(1)", s), ("h.shape[-2]", s), ("h.shape[0]", b), ("len(h)", b)]
        dims = {"images": [b, 3, 6, 6], "signals": [b, 4, s], "rows": [s, 8], "columns": [s, 8], "vector": [s]}
        own = dims.get(self.first, [b, s] if self.first in ("features", "token ids") else [b, s, 8])
        for i, size in enumerate(own):
            atoms += [(f"{x}.shape[{i}]", size), (f"{x}.size({i})", size), (f"{x}.shape[{i - len(own)}]", size)]
        atoms += [(f"len({x})", own[0]), (f"{x}.numel()", math.prod(own)), (f"rows({x})", own[0])]
        atoms += [(f"{x}.stride(0)", math.prod(own[1:])), (f"math.prod({x}.shape)", math.prod(own))]
        if self.second in ("same", "other"):
            atoms += [("y.shape[1]", s), ("y.shape[0]", b), ("y.numel()", b * s * 8), ("len(y)", b)] * 2
        text, size = self.pick(*atoms)
        if text.startswith("rows("):
            self.helper("def rows(t):\n    return t.shape[0]\n")
        return text, size

    def helper(self, text: str) -> None:
        if text not in self.d.helpers:
            self.d.helpers.append(text)

    def term(self, depth: int = 0) -> tuple[str, int]:
        """Return an integer expression of sizes, and about how large it is."""
        a, n = self.atom()
        kind = self.rng.randrange(22 if depth == 0 else 4)
        k = self.rng.randrange(2, 5)
        if kind < 4:
            return a, n
        if kind < 6:
            return f"{a} % {k}", k // 2
        if kind < 8:
            return f"{a} // {k}", n // k
        if kind == 8:
            return f"({a} + {k}) // {k} * {k}", n
        if kind == 9:
            return f"int({a} * 0.5)", n // 2
        if kind == 10:
            return f"math.ceil({a} / {k})", n // k + 1
        if kind == 11:
            return f"int(math.sqrt({a}))", math.isqrt(n)
        if kind == 12:
            self.helper("def half(n):\n    return n // 2 if n > 3 else n\n")
            return f"half({a})", n // 2
        if kind == 13:
            return f"round({a} / {k})", n // k
        if kind == 14:
            return f"{a} ** 2", n * n
        if kind == 15:
            return f"-(-{a} // {k})", n // k + 1
        if kind == 16:
            self.helper(
                "def steps(n):\n    count = 0\n    while n > 1:\n        n = n // 2\n        count += 1\n    return count\n"
            )
            return f"steps({a})", 3
        c, m = self.term(depth + 1)
        if kind == 17:
            return f"{a} * {c}", n * m
        if kind == 18:
            return f"{a} + {c}", n + m
        if kind == 19:
            return f"{a} - {c}", n - m
        if kind == 20:
            return f"min({a}, {c})", min(n, m)
        return f"max({a}, {c})", max(n, m)

    def comparison(self) -> str:
        """Return a comparison of sizes."""
        a, n = self.term()
        around = n + self.rng.randrange(-2, 3)
        kind = self.rng.randrange(14)
        if kind < 6:
            return f"{a} {self.pick('==', '!=', '<', '<=', '>', '>=')} {around}"
        if kind < 8:
            return f"({a}) % {self.pick(2, 3, 4)} {self.pick('==', '!=')} {self.pick(0, 0, 1)}"
        c, _ = self.term()
        if kind < 10:
            return f"{a} {self.pick('==', '!=', '<', '<=', '>', '>=')} {c}"
        if kind == 10:
            return f"{around - 2} < {a} < {around + 3}"
        if kind == 11:
            return f"{a} in ({around}, {around + 2}, {around + 4})"
        if kind == 12:
            return f"({a}) / {self.pick(2, 3)} {self.pick('<', '>')} {n / 2 - 0.2:.1f}"
        return f"({a}) % 2"

    def condition(self) -> str:
        kind = self.rng.randrange(10)
        if kind < 6:
            return self.comparison()
        if kind == 6:
            return f"{self.pick('h.shape[0]', 'h.shape[1]')} == 1 {self.pick('and', 'or')} {self.comparison()}"
        if kind == 7:
            return f"not ({self.comparison()} or {self.comparison()})"
        return f"{self.comparison()} {self.pick('and', 'or')} {self.comparison()}"

    def change(self) -> str:
        """Return a line that changes h visibly and keeps its sizes."""
        return self.pick(
            "h = h * 2.0",
            "h = h + 1.0",
            "h = torch.relu(h) - 0.5",
            "h = -h",
            "h = h.flip(1)",
            "h = h.roll(1, 2)",
            "h = torch.tanh(h)",
            "h = h.cumsum(1)",
            f"h = {self.layer('nn.Linear(8, 8)')}(h)",
            f"h = {self.layer('nn.LayerNorm(8)')}(h * 3)",
        )

    # a step keeps h of [batch, any length, 8]

    def branch(self) -> None:
        test, kind = self.condition(), self.rng.randrange(10)
        if kind < 4:
            self.add(f"if {test}:\n    {self.change()}")
        elif kind < 6:
            self.add(f"if {test}:\n    {self.change()}\nelse:\n    {self.change()}")
        elif kind == 6:
            self.add(f"h = h * (2.0 if {test} else -1.0)")
        elif kind == 7:
            self.add(f"if {test}:\n    return h.mean(1)")
        elif kind == 8:
            a, b = self.layer("nn.Linear(8, 8)"), self.layer("nn.Linear(8, 8)")
            self.add(f"layer = {a} if {test} else {b}", "h = layer(h)")
        else:
            self.add(
                f'assert not ({test}), "size"' if self.chance(0.5) else f"if {test}:\n    raise ValueError('size')"
            )

    def size_as_value(self) -> None:
        a, n = self.term()
        self.add(
            self.pick(
                f"h = h / max({a}, 1)",
                f"h = h * ({a})",
                f"h = h + float({a})",
                f"h = h * math.sqrt(abs({a}))",
                f"h = h * torch.tensor({a})",
                f"h = h + torch.full((1,), {a} * 0.1)",
                f"h = h * (1.0 / (1 + abs({a})))",
                f"h = h + torch.arange({a if n < 100 else 'h.shape[1]'}).sum()",
                f"h = h * [1.0, -2.0, 3.0][({a}) % 3]",
                "h = h + torch.linspace(0, 1, h.shape[1])[:, None]",
                f"h = h * int({a} * 0.3)",
                f"h = h + math.log2(1 + abs({a}))",
            )
        )

    def loop(self) -> None:
        self.add(
            self.pick(
                "for i in range(h.shape[1] // 4):\n    h = h + h[:, i : i + 1]",
                "for i in range(h.shape[0]):\n    h = h + i * h[i]",
                "n = h.shape[1]\nwhile n > 2:\n    h = h * 1.5\n    n = n - 3",
                "h = torch.stack([row * (i + 1) for i, row in enumerate(h)])",
                "h = torch.cat([part.sum(1, keepdim=True) for part in h.split(3, dim=1)], 1)",
                "total = 0\nfor part in h.chunk(3, dim=1):\n    total = total + part.sum(1, keepdim=True)\nh = h + total",
                "h = torch.stack([h[:, i] for i in range(h.shape[1])], dim=1).cumsum(1)",
                "for row in h.unbind(1):\n    h = h + 0.1 * row[:, None]",
                "for i in range(0, h.shape[1], 3):\n    h = h + h[:, i : i + 1] * i",
            )
        )

    def reshaping(self) -> None:
        self.add(
            self.pick(
                "h = h.reshape(h.shape[0] * h.shape[1], 8).relu().view(h.shape[0], -1, 8)",
                "h = h.flatten(0, 1).softmax(0).unflatten(0, (h.shape[0], -1))",
                "h = h.reshape(h.shape[0], -1, 2, 8).sum(2)",
                "h = h.unflatten(1, (-1, 3)).amax(2)",
                "h = h.reshape(h.shape[0], 2, h.shape[1] // 2, 8).sum(1)",
                "h = h.transpose(1, 2).reshape(h.shape[0], h.shape[1], 8)",
                "h = h.reshape(h.shape[0], h.shape[1], 2, 4).transpose(2, 3).flatten(2)",
                "h = h.reshape(1, -1, 8)",
                "h = h.transpose(0, 1).contiguous().view(-1, h.shape[0], 8).transpose(0, 1)",
                "h = h.reshape(-1, 4, 8) if h.shape[1] % 4 == 0 else h",
                "h = h.view(len(h), -1).view(len(h), -1, 8) * 2",
                "h = h.reshape(h.shape[0], -1, 16)[..., 8:]",
                "h = h.permute(1, 0, 2).reshape(h.shape[1], -1).T.reshape(h.shape[0], 8, -1).mT",
                "h = h.unsqueeze(0).squeeze()\nh = h.reshape(-1, h.shape[-2] if h.dim() > 1 else 1, 8)",
                "h = h.squeeze(1) if h.dim() == 3 else h\nh = h if h.dim() == 3 else h[:, None] * 2",
                "try:\n    h = h.view(h.shape[0], -1, 4, 8).mean(2)\nexcept RuntimeError:\n    h = h * 2",
                "g = h.view(-1, 2, 8)\nh = (g[:, :1] - g[:, 1:]).view(h.shape[0], -1, 8)",
            )
        )

    def padding(self) -> None:
        k = self.pick(2, 4, 5)
        self.add(
            self.pick(
                f"pad = -h.shape[1] % {k}\nh = F.pad(h, (0, 0, 0, pad))",
                f"pad = ({k} - h.shape[1] % {k}) % {k}\nif pad > 0:\n    h = F.pad(h, (0, 0, 0, pad), value=1.0)",
                f"pad = -h.shape[1] % {k}\nh = F.pad(h, (0, 0, 0, pad)).view(h.shape[0], -1, {k}, 8).mean(2)",
                "n = h.shape[1]\nh = F.pad(h, (0, 0, pad0(n), 0))[:, :n]".replace("pad0(n)", f"n % {k}"),
                f"h = F.pad(h, (0, 0, 0, max(0, {k * 2} - h.shape[1])))",
                f"h = F.pad(h, (0, 0, 0, {k * 2} - h.shape[1]))",
                f"h = torch.cat([h, h.new_zeros(h.shape[0], -h.shape[1] % {k}, 8)], 1)",
                "h = F.pad(h.transpose(1, 2), (2, 1), mode='reflect').transpose(1, 2)",
                "h = F.pad(h.transpose(1, 2), (1, 1), mode='circular').transpose(1, 2)",
            )
        )

    def slicing(self) -> None:
        a, _ = self.term()
        k = self.rng.randrange(1, 5)
        self.add(
            self.pick(
                "n = h.shape[1] // 2\nh = h[:, :n]",
                "n = h.shape[1] // 3\nh = h[:, -n:]",
                "n = h.shape[1] // 2\nh = torch.cat([h[:, n:], h[:, :n]], 1)",
                f"h = h[:, : {a}]",
                f"h = h[:, -({a}) :]",
                f"h = h[:, ::{k}]",
                f"h = h[:, {k}:]",
                f"h = h[:, :-{k}]",
                f"h = h[:, -{k}:]",
                f"h = h[:, {k} : {k + 3}]",
                f"h = h[:, [0, -1, {k}]]",
                "h = h[:, 0].unsqueeze(1) + h",
                "h = h[:, -1:] - h",
                "h = h.narrow(1, 0, min(h.shape[1], 4))",
                "h = h.flip(1)",
                "h = h.flip(0, 1)",
                f"h = h.roll({k}, 1)",
                "h = h.roll(h.shape[1] // 2, 1)",
                f"h = h.unfold(1, {k}, 1).mean(-1)",
                "h = h[:, torch.arange(h.shape[1] - 1, -1, -1)]",
                "h = h[torch.arange(h.shape[0]), torch.zeros(h.shape[0], dtype=torch.long)][:, None] + h",
                "h = h[: h.shape[0] // 2 + 1]",
                "h = h[-2:]",
                "h = h[:, int(h.shape[1] * 0.25) : int(h.shape[1] * 0.75) + 1]",
                "h = h[:, slice(0, h.shape[1], 2)]",
                "h = h.select(1, h.shape[1] // 2)[:, None] + h",
                f"h = h.index_select(1, torch.tensor([0, {k}]))",
                "h = h[:, None, :, None].squeeze().view(h.shape[0], -1, 8)",
            )
        )

    def splitting(self) -> None:
        self.add(
            self.pick(
                "parts = h.chunk(2, dim=1)\nh = torch.cat([parts[-1], parts[0]], 1)",
                "a, b = h.chunk(2, dim=1)\nh = torch.cat([b, a * 2], 1)",
                "parts = h.split(4, dim=1)\nh = torch.cat([p * (i + 1) for i, p in enumerate(parts)], 1)",
                "a, b = h.split([1, h.shape[1] - 1], dim=1)\nh = torch.cat([b, a], 1)",
                "h = torch.cat(h.tensor_split(3, dim=1)[::-1], 1)",
                "a, b = h.chunk(2, dim=-1)\nh = torch.cat([a * torch.sigmoid(b), b], -1)",
                "h = h.chunk(3, dim=1)[0]",
                "h = h.chunk(2, dim=0)[0]",
                "h = torch.stack([h, h * 2], 1).flatten(1, 2)",
                "h = torch.stack(h.unbind(0)[::-1])",
                "h = torch.cat([h, h[:, :1]], 1)",
                "h = torch.cat([h, h.flip(0)], 0)",
                "h = h.repeat(1, 2, 1)",
                "h = h.repeat_interleave(2, dim=1)",
                "h = h.repeat(1, h.shape[0], 1)[:, : h.shape[1]]",
                "parts = h.split(h.shape[1] // 2 + 1, dim=1)\nh = parts[0] * len(parts)",
            )
        )

    def attention(self) -> None:
        q, k, v = (self.layer("nn.Linear(8, 8)", "l") for _ in range(3))
        kind = self.rng.randrange(6)
        if kind == 0:
            self.add(f"h = h + F.scaled_dot_product_attention({q}(h), {k}(h), {v}(h), is_causal={self.chance(0.5)})")
            return
        if kind == 1 and self.d.seed >= LIGHT:
            name = self.layer("nn.MultiheadAttention(8, 2, batch_first=True)", "mha")
            self.add(f"h = h + {name}(h, h, h, need_weights=False)[0]")
            return
        self.add("b, s, c = h.shape")
        self.add(f"q, k, v = [f(h).view(b, s, 2, 4).transpose(1, 2) for f in ({q}, {k}, {v})]")
        mask = self.pick(
            "torch.ones(s, s, dtype=torch.bool).tril()",
            "torch.arange(s)[:, None] >= torch.arange(s)[None, :]",
            "(torch.arange(s)[:, None] - torch.arange(s)[None, :]).abs() <= 2",
            "torch.arange(s)[None, :] < max(s // 2, 1)",
            "torch.zeros(s, s).masked_fill(torch.ones(s, s).triu(1).bool(), -1e9) > -1",
        )
        if kind in (2, 3):
            self.add(f"o = F.scaled_dot_product_attention(q, k, v, attn_mask={mask})")
        else:
            scale = self.pick("math.sqrt(4)", "2.0", "math.sqrt(s)", "q.shape[-1] ** 0.5")
            self.add(f"scores = q @ k.transpose(-1, -2) / {scale}")
            fill = self.pick("-1e9", "float('-inf')", "torch.finfo(scores.dtype).min").replace(
                "float('-inf')", "-math.inf"
            )
            self.add(f"scores = scores.masked_fill(~({mask}), {fill})")
            self.add("o = scores.softmax(-1) @ v")
        self.add("h = h + o.transpose(1, 2).reshape(b, s, c)")

    def positions(self) -> None:
        t = self.table()
        self.add(
            self.pick(
                f"h = h + {t}[: h.shape[1]]",
                f"h = h + {t}[None, : h.shape[1]]",
                f"h = h + {t}[torch.arange(h.shape[1])]",
                f"h = h + {self.layer('nn.Embedding(16, 8)', 'pos')}(torch.arange(h.shape[1]))",
                f"h = h + {self.layer('nn.Embedding(16, 8)', 'pos')}(torch.arange(h.shape[1]).expand(h.shape[0], -1))",
                f"h = h + {self.layer('nn.Embedding(16, 8)', 'pos')}.weight[: h.shape[1]]",
                f"h = h + {t}[:10][-h.shape[1] :]",
                f"h = h + {t}[h.shape[1]]",
                f"h = h * {t}[len(h)]",
                f"i = torch.arange(h.shape[1])\nh = h + {t}[(i[:, None] - i[None]).clamp(-7, 7) + 7].mean(1)",
                f"h = h + F.interpolate({t}.T[None], size=h.shape[1], mode='linear').mT",
                "angle = torch.arange(h.shape[1]).float()[:, None] / 10.0 ** torch.arange(8).float()\nh = h + torch.sin(angle)",
                f"if h.shape[1] > {t}.shape[0]:\n    h = h[:, : {t}.shape[0]]\nh = h + {t}[: h.shape[1]]",
                f"h = torch.cat([{t}[:1].expand(h.shape[0], 1, 8), h], 1)",
                f"h = h + torch.eye(h.shape[1], 8) * {t}[0]",
            )
        )

    def in_place(self) -> None:
        self.add(
            self.pick(
                "t = h.clone()\nt += 1\nt[:, 0] = 0\nh = t",
                "t = h.clone()\nv = t[:, 1:]\nv.mul_(2)\nh = t",
                "t = h.clone()\nt[:, ::2] += 1\nh = t",
                "t = h * 1\nt.transpose(1, 2)[:, 0] -= 3\nh = t",
                "n = h.shape[1] // 2\nt = torch.zeros(h.shape[0], h.shape[1] + 1, 8)\nt[:, 1:] = h\nt[:, :n] *= 2\nh = t",
                f"r = {self.layer('nn.Linear(8, 8)')}(h)\nh = F.relu(r, inplace=True) + r",
                "r = torch.tanh(h)\nq = r\nr += h\nh = q",
                f"h = {self.layer('nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))')}(h)",
                "t = torch.zeros_like(h)\nt.index_add_(1, torch.arange(h.shape[1]) // 2, h)\nh = t",
                "t = h.clone()\nt.masked_fill_(h > 0, 1.0)\nh = t + h",
                "t = h.contiguous().clone().view(h.shape[0], -1)\nt.add_(1)\nh = t.view(h.shape)",
                "t = h.clone()\nt.copy_(h.flip(1))\nh = t - h",
                "t = h.new_empty(h.shape)\nfor i in range(8):\n    t[..., i] = h[..., 7 - i]\nh = t",
                "t = h.clone()\na, b = t.chunk(2, -1)\na.add_(b)\nh = t",
                "t = torch.zeros(h.shape[1])\nt[-1] = 1\nh = h + t[:, None]",
                "t = h.clone()\nt[0].zero_()\nh = t",
                "t = h.clone()\nt[:, h.shape[1] // 2].fill_(2.0)\nh = t",
                "t = h + 0\nu = t.view(-1)\nu[: h.shape[1]] = 5.0\nh = t * 2",
            )
        )

    def layers(self) -> None:
        self.add(
            self.pick(
                f"h = {self.layer('nn.Linear(8, 8)')}(h)",
                f"h = {self.layer('nn.LayerNorm(8)')}(h)",
                f"h = h + {self.layer('nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))')}(h)",
                f"h = {self.layer('nn.Conv1d(8, 8, 3)', 'conv')}(h.transpose(1, 2)).transpose(1, 2)",
                f"h = {self.layer('nn.Conv1d(8, 8, 3, padding=1, stride=2)', 'conv')}(h.mT).mT",
                f"h = {self.layer('nn.Conv1d(8, 8, 5, padding=4)', 'conv')}(h.mT)[..., : h.shape[1]].mT",
                f"h = {self.layer('nn.BatchNorm1d(8)', 'bn')}(h.transpose(1, 2)).transpose(1, 2)",
                f"h = {self.layer('nn.GroupNorm(2, 8)', 'gn')}(h.mT).mT",
                f"h = {self.layer('nn.InstanceNorm1d(8)', 'norm')}(h.mT).mT",
                f"h = {self.layer('nn.Conv2d(1, 1, 3, padding=1)', 'conv')}(h[:, None]).squeeze(1)",
                "h = F.avg_pool1d(h.mT, 2).mT",
                "h = F.max_pool1d(h.mT, 2, ceil_mode=True).mT",
                f"h = F.adaptive_avg_pool1d(h.mT, {self.pick(1, 2, 3)}).mT",
                "h = F.interpolate(h.mT, scale_factor=2.0).mT",
                "h = F.interpolate(h.mT, scale_factor=1.5, mode='linear').mT",
                "h = F.interpolate(h.mT, size=h.shape[1] // 2 + 1).mT",
                "h = h.softmax(1)",
                "h = h.softmax(0) * 2",
                "h = F.normalize(h, dim=1)",
                "h = F.layer_norm(h, h.shape[2:])",
                "h = F.layer_norm(h, h.shape[1:])",
                f"h = {self.layer('nn.Dropout(0.5)')}({self.layer('nn.Linear(8, 8, bias=False)')}(h))",
                f"h = {self.layer('nn.Linear(8, 8)')}(h.view(-1, 8)).view(h.shape)",
                f"h = {self.layer('nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])')}[h.shape[1] % 3](h)",
                f"h = {self.layer('nn.LSTM(8, 8, batch_first=True)', 'lstm')}(h)[0]"
                if self.chance(0.2)
                else "h = F.gelu(h)",
                f"h = {self.layer('nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)', 'block')}(h)"
                if self.d.seed >= LIGHT
                else "h = F.silu(h)",
            )
        )

    def reductions(self) -> None:
        self.add(
            self.pick(
                "h = h - h.mean(1, keepdim=True)",
                "h = h / (1 + h.std(1, keepdim=True, unbiased=False))",
                "h = h + h.var(1, keepdim=True)",
                "h = h + h.amax((0, 1), keepdim=True)",
                "h = h.cumsum(1)",
                "h = h + h.topk(min(3, h.shape[1]), dim=1).values.sum(1, keepdim=True)",
                "h = h.sort(dim=1).values",
                "h = h.gather(1, h.argsort(dim=1))",
                "h = h + torch.gather(h, 1, h.argmax(1, keepdim=True))",
                "h = torch.where(h > 0, h, h.min())",
                "h = h + h.sum() / h.numel()",
                "h = torch.einsum('bsc,btc->bst', h, h).softmax(-1) @ h",
                "h = h @ h.transpose(1, 2) @ h / (h.shape[1] * 8)",
                "h = h + F.one_hot(h.argmax(-1), 8)",
                "h = h.double().mean(1, keepdim=True).float() + h",
                "h = (h * 4).int().float() / 4 + h",
                "h = h + (h > 0).sum(1, keepdim=True)",
                "h = h.to(torch.bfloat16).float() * 0 + h",
                "h = h + torch.cdist(h, h).mean(1, keepdim=True).mT",
                "h = h.median(1, keepdim=True).values + h",
                "h = h * (h.shape[1] - torch.arange(h.shape[1]))[:, None]",
                "h = torch.bmm(h, h.mT).clamp(-1, 1).bmm(h)",
                "h = h + torch.outer(torch.ones(h.shape[1]), torch.arange(8))",
                "h = h + torch.meshgrid(torch.arange(h.shape[1]), torch.arange(8), indexing='ij')[0]",
                "h = h.clone()",
                "h = h.contiguous() + h.expand(h.shape[0], -1, -1)",
                "h = h + torch.zeros(h.shape[0], 1, 8) + h.new_ones(h.shape[1], 1)",
            )
        )

    def second_input(self) -> None:
        """Use the second input, so that every kind of it matters."""
        mask = self.pick(
            "h = h.masked_fill(~y[:, :, None], 0.0)",
            "h = (h * y[..., None]).sum(1, keepdim=True) / y.sum(1)[:, None, None] + h",
            "scores = (h @ h.mT).masked_fill(~y[:, None, :], -1e9)\nh = h + scores.softmax(-1) @ h",
            "h = h + F.scaled_dot_product_attention(h, h, h, attn_mask=y[:, None, :])",
            "h = torch.where(y[..., None], h, h.mean(1, keepdim=True))",
        )
        uses = {
            "same": ("h = h + y", "h = torch.cat([h, y], 1)", "h = torch.stack([h, y]).amax(0)", "h = h * y.flip(1)"),
            "other": (
                "h = torch.cat([h, y], 1)",
                "h = h + F.scaled_dot_product_attention(h, y, y)",
                "n = min(h.shape[1], y.shape[1])\nh = h[:, :n] + y[:, :n]",
                "h = h + y.mean(1, keepdim=True)",
                "h = h + (h @ y.mT).softmax(-1) @ y",
                "if h.shape[1] > y.shape[1]:\n    h = h[:, : y.shape[1]]\nh = torch.cat([y, h], 1)",
                "h = torch.cat([h, y[:, h.shape[1] :]], 1)",
                "h = h * 2 if h.shape == y.shape else h + y.sum(1, keepdim=True)",
            ),
            "row": (
                "h = h + y",
                "h = h * y[None]",
                "h = torch.cat([h, y.expand(h.shape[0], -1, -1)], 1)",
                "h = h @ (y.mT @ y)",
            ),
            "one batch": ("h = h + y", "h = h * y[0]", "h = torch.cat([h, y.expand_as(h)], 1)"),
            "one token": ("h = h * y", "h = torch.cat([y, h], 1)", "h = h + y.squeeze(1)[:, None]"),
            "bool mask": (mask,),
            "int mask": (mask.replace("y", "y.bool()"),),
            "lengths": (
                "keep = torch.arange(h.shape[1])[None] < y[:, None]\nh = h * keep[..., None]",
                "h = h[torch.arange(h.shape[0]), y - 1][:, None] + h",
                "h = h / y[:, None, None]",
            ),
            "number": ("h = h * y", "h = h + y.item() * 0 + y" if self.chance(0.3) else "h = h + y"),
            "none": ("h = h * 2 if y is None else h + y",),
        }
        self.add(self.pick(*uses[self.second]))

    def unusual(self) -> None:
        """Rare things: layouts, buffers that change, inputs that change, values that decide."""
        x = self.d.inputs[0][0]
        name = self.name("count")
        cases = [
            f"if {x}.is_contiguous():\n    h = h * 2",
            "if h.sum() > 0:\n    h = h * 2",
            f"h = h + {x}.stride(0) * 0.01",
            f"h = h + torch.nonzero({x} > 0).shape[0] * 0.01",
            f"h = h + {x}[{x} > 0].sum() + {x}[{x} > 0].numel()",
        ]
        if self.first in ("tokens", "rows", "features"):
            cases += [f"{x}.add_(1)", f"{x}[..., 0] = 7.0"]
        kind = self.rng.randrange(len(cases) + 1)
        if kind == len(cases):
            self.d.init.append(f'self.register_buffer("{name}", torch.zeros(1))')
            self.add(f"h = h + self.{name}\nself.{name} += 1")
        else:
            self.add(cases[kind])

    def output(self) -> None:
        x = self.d.inputs[0][0]
        t = self.table() if self.chance(0.25) else ""
        one = (
            "h",
            "h",
            "h.mean(1)",
            "h[:, -1]",
            "h[:, 0]",
            "h.clone()",
            "h.contiguous()",
            "h.view(h.shape[0], -1)" if self.chance(0.3) else "h.flatten(1)",
            "h.transpose(1, 2)",
            "h.sum()",
            "h > 0",
            "h.argmax(-1)",
            "h.double()",
            "h.half()",
            "h.squeeze()",
            "h.squeeze(0)",
            "h[:, 1:]",
            f"{self.layer('nn.Linear(8, 3)', 'head')}(h)",
            f"{self.layer('nn.Linear(8, 3)', 'head')}(h).clone()",
            f"{self.layer('nn.Linear(8, 3)', 'head')}(h[:, 0]).softmax(-1)",
            f"{self.layer('nn.Linear(8, 3)', 'head')}(h).unsqueeze(0).expand(2, -1, -1, -1)",
        )
        more = (
            "h",
            "h[:, :1]",
            x,
            f"{x}.clone()",
            f"{x}[0]",
            f"{x}.contiguous()",
            f"{x}.detach()",
            f"{x}.view(-1)" if self.first != "token ids" else f"{x} + 1",
            "None",
            f"{x}.shape[0]",
            "h.shape[1]",
            "torch.arange(h.shape[1])",
            "torch.zeros(3)",
            "torch.ones(h.shape[0], 1)",
            "torch.tensor(2.5)",
            "torch.tensor([1, 2])",
            "h * 1",
            "h.unbind(1)" if self.chance(0.3) else "h.chunk(2, -1)",
            *([t, f"{t}[: h.shape[1]]", f"{t}.clone()", f"{t} * 2", f"{t}.T"] * 2 if t else ()),
        )
        if self.second and self.second != "none":
            more += ("y", "y.clone()")
        a, b, c = self.pick(*one), self.pick(*more), self.pick(*more)
        if t:
            b = self.pick(t, f"{t}[: h.shape[1]]", f"{t}.clone()", f"{t} * 2", f"{t}.T", f"{t}[:2]")
        self.add(
            self.pick(
                f"return {a}",
                f"return {a}",
                f"return {a}",
                f"return {a}, {b}",
                f"return {a}, {b}",
                f"return {b}, {a}, {c}",
                f'return {{"a": {a}, "b": {b}}}',
                f"return [{a}, ({b}, None)]",
                "return h, h",
                "o = h * 1\nreturn o, o[:, :1]",
                "o = h + 1\nreturn o, o",
                "o = h + 1\nreturn o, o.view(-1)",
                f"o = {a}\nreturn o, o.clone(), {b}",
            )
        )

    def model(self) -> Description:
        """Return the description of the model."""
        d = self.d
        self.first = self.pick(*FIRST, "tokens", "tokens", "tokens", "token ids")
        masked = self.first == "token ids" and self.chance(0.5)
        d.inputs.append(("input_ids" if masked else "x", self.first))
        batched = self.first not in ("rows", "columns", "vector", "images")
        if masked:
            self.second = "int mask"
            d.inputs.append(("attention_mask", self.second))
            d.keyword = self.chance(0.7)
        elif batched and self.chance(0.45):
            self.second = self.pick(*SECOND, "same", "other", "other")
            d.inputs.append(("y", self.second))
            d.keyword = self.chance(0.3) or self.second == "none"
        _, text, init = FIRST[self.first]
        d.init += [init] if init else []
        self.add(text.format(x=d.inputs[0][0]))
        if masked:
            self.add("y = attention_mask")
        weighted: list[tuple[Callable[[], None], int]] = [
            (self.branch, 6),
            (self.size_as_value, 2),
            (self.loop, 2),
            (self.reshaping, 3),
            (self.padding, 2),
            (self.slicing, 3),
            (self.splitting, 2),
            (self.attention, 1),
            (self.positions, 2),
            (self.in_place, 2),
            (self.layers, 4),
            (self.reductions, 3),
        ]
        most = 2 if d.seed < LIGHT else 4
        steps = self.rng.choices([f for f, _ in weighted], [w for _, w in weighted], k=self.rng.randrange(1, most + 1))
        if self.second:
            steps.insert(self.rng.randrange(len(steps) + 1), self.second_input)
        if self.chance(0.06):
            steps.append(self.unusual)
        if self.chance(0.6) and d.seed >= LIGHT:
            steps.insert(self.rng.randrange(len(steps) + 1), self.layers)
        for step in steps:
            step()
        self.output()
        used = "\n".join(d.forward)  # of the layers that the choices above made, most were not taken
        d.init = [line for line in d.init if re.search(rf"\bself\.{NAME_IN_INIT.search(line)[1]}\b", used)]
        return d


def describe(seed: int) -> Description:
    """Return the model of a seed."""
    return Generator(seed).model()


def example_sizes(seed: int) -> Sizes:
    """Return the sizes at which the model of a seed is compiled; some of them equal each other, as may happen."""
    rng = random.Random(f"sizes {seed}")
    b, s, t = rng.choice((1, 2, 2, 3, 4)), rng.randrange(3, 13), rng.randrange(3, 13)
    same = rng.random()
    return Sizes(b, s, s if same < 0.3 else b if same < 0.4 and b > 1 else t)


def other_sizes(seed: int, count: int) -> list[Sizes]:
    """Return sizes for calls: the example's, each one changed alone, 1, and random ones; some twice."""
    rng = random.Random(f"calls {seed}")
    z = example_sizes(seed)
    one = [z, Sizes(z.b + 1, z.s, z.t), Sizes(z.b, z.s + 1, z.t), Sizes(z.b, z.s, z.t + 1), Sizes(1, z.s, z.t)]
    one += [Sizes(z.b, 1, z.t), Sizes(z.b, z.s + 1, z.t + 1), Sizes(z.b, max(z.s - 1, 1), max(z.t - 1, 1))]
    one += [Sizes(0, z.s, z.t)] if rng.random() < 0.2 else []
    while len(one) < count:
        one.append(
            rng.choice(one) if rng.random() < 0.1 else Sizes(rng.randrange(1, 7), *rng.choices(range(1, 21), k=2))
        )
    return one[:count]


def search(seeds: range, verbose: bool = False) -> tuple[dict[int, Any], Counter[str]]:
    """Return what failed by seed, and how often calls agreed, were refused, and so on."""
    from helpers.call_checks import check_seed

    failures: dict[int, Any] = {}
    counts: Counter[str] = Counter()
    for seed in seeds:
        failure = check_seed(seed, counts)
        if failure is not None:
            failures[seed] = failure
            if verbose:
                print(f"--- seed {seed}: {failure}\n{describe(seed).source}\n", flush=True)
    return failures, counts


def main() -> int:
    """Search a range of seeds; print the source of each failing model."""
    os.environ.setdefault("RAREFY_TUNE", "1")
    parser = argparse.ArgumentParser(description="Search for compiled models that answer wrongly.")
    parser.add_argument("--seeds", required=True, help="one seed, or first:end")
    parser.add_argument("--show", action="store_true", help="print the source of every model, and run none")
    options = parser.parse_args()
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    if options.show:
        for seed in seeds:
            print(f"{describe(seed).source}\n# {example_sizes(seed)}\n")
        return 0
    failures, counts = search(seeds, verbose=True)
    for kind, seeds_of_kind in sorted(by_kind(failures).items()):
        print(f"{len(seeds_of_kind):4} {kind}: {' '.join(map(str, seeds_of_kind[:12]))}")
    print(f"{len(failures)} of {len(seeds)} models failed; calls: {dict(counts)}")
    return int(bool(failures))


def by_kind(failures: dict[int, Any]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for seed, failure in failures.items():
        kinds.setdefault(failure.kind, []).append(seed)
    return kinds


if __name__ == "__main__":
    sys.exit(main())
