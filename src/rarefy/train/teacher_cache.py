"""A teacher's answers on disk, a sample at a time, so that no sample is asked twice, in whatever order batches come."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rarefy.calibration.resume import digest
from rarefy.common.atomic_io import PARTIAL, blaming
from rarefy.common.errors import ContainerError
from rarefy.model.batches import count_samples, split_batch, tensors_in


class TeacherCache:
    """A folder of answers by the digest of who was asked what, and of the sample; each file is whole or not there.

    Answers are kept in half precision where that holds them: a teacher is an approximation already.
    """

    def __init__(self, folder: Path, who: str):
        with blaming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.who = folder, who

    def of(self, batch: Any, ask: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the answers to a batch; `ask` gives those of all its samples, where one is not known yet."""
        parts = split_batch(batch, count_samples(batch))
        files = [self.folder / f"{digest([self.who, tensors_in(_asked(part))])}.safetensors" for part in parts]
        if not all(f.is_file() for f in files):
            told = ask(batch)
            one = len(files) == 1
            parts = [{k: _short(v if one else v[i : i + 1]) for k, v in told.items()} for i in range(len(files))]
            for file, rows in zip(files, parts):
                self._write(file, rows)
            # rounded as they will be the next time
            return {k: torch.cat([rows[k].float() for rows in parts]) for k in told}
        found = [self._read(f) for f in files]
        return {k: torch.cat([f[k].float() for f in found]) for k in found[0]}

    def _write(self, file: Path, rows: dict[str, Tensor]) -> None:
        with blaming(self.folder):
            save_file(rows, self.folder / PARTIAL)
            os.replace(self.folder / PARTIAL, file)

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise ContainerError(f"{file} is damaged ({error}): remove it, and the teacher is asked again") from None


def _short(answer: Tensor) -> Tensor:
    """In half precision, unless that overflows."""
    half = answer.half()
    return (half if bool(torch.isfinite(half).all()) else answer.float()).contiguous()


def _asked(part: Any) -> Any:
    """What of a sample the teacher sees."""
    if hasattr(part, "keys"):
        return {k: part[k] for k in sorted(part) if k != "labels"}
    return part[0] if isinstance(part, tuple | list) else part
