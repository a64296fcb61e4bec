"""Small compiled models, and inputs of many sizes for each, for calls from several threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from helpers.compile_models import Attends, Gated, Residual, pruned

VOCABULARY, WIDTH = 100, 32


class Text(nn.Module):
    """An encoder of two blocks whose attention reads no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(nn.ModuleList([Attends(4, 4, 8), Gated(WIDTH, 64)]) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, mask = self.embed(input_ids), attention_mask[:, None, None].bool()
        for attends, gated in self.blocks:  # type: ignore[misc]
            x = gated(attends(x, mask))
        return self.head(x) * attention_mask[..., None]


def texts(count: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return batches of many sizes, some padded."""
    batches = []
    for i in range(count):
        batch = int(torch.randint(1, 5, (), generator=generator))
        tokens = int(torch.randint(2, 70, (), generator=generator))
        ids = torch.randint(VOCABULARY, (batch, tokens), generator=generator)
        lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        lengths[0] = tokens
        mask = torch.ones_like(ids) if i % 3 == 0 else (torch.arange(tokens) < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def images(count: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return batches of one to seven images."""
    return [{"x": torch.randn(1 + i % 7, 8, 12, 12, generator=generator)} for i in range(count)]


@dataclass(frozen=True)
class Model:
    """How a model is made, compiled and called."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], list[dict[str, Tensor]]]
    precision: str | None = None
    calibrated: bool = False

    def compile(self) -> Any:
        """Return the compiled model."""
        torch.manual_seed(0)
        model, example = self.make().eval(), self.inputs(4, torch.Generator().manual_seed(1))
        options: dict[str, Any] = {"precision": self.precision, "tune": False}
        if self.calibrated:
            options["calibrate"] = example
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rarefy.compile(model, example[1], **options)


MODELS = {
    "text": Model(Text, texts),
    "text, sparse": Model(lambda: pruned(Text()), texts),
    "text in int8": Model(Text, texts, "int8"),
    "text, sparse in int8": Model(lambda: pruned(Text()), texts, "int8"),
    "images": Model(Residual, images),
    "images in int8": Model(Residual, images, "int8"),
    "images in int8, calibrated": Model(Residual, images, "int8", calibrated=True),
}
