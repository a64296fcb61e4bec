"""A cache of teacher outputs on disk, one file a sample, independent of how samples are batched."""

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
from rarefy.common.atomic_io import PARTIAL, container_errors
from rarefy.common.errors import ContainerError
from rarefy.common.machine_errors import raise_memory_error
from rarefy.model.batches import count_samples, split_batch, tensors_in


class TeacherCache:
    """A folder of teacher outputs, by the digest of teacher, configuration and sample. Files are written atomically.

    Outputs are stored in half precision where they fit.
    """

    def __init__(self, folder: Path, teacher_digest: str):
        with container_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.teacher_digest = folder, teacher_digest

    def outputs(self, batch: Any, run_teacher: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the teacher's outputs for a batch; `run_teacher` computes those of all samples if one is missing."""
        parts = split_batch(batch, count_samples(batch))
        files = [self._file(part) for part in parts]
        if not all(f.is_file() for f in files):
            computed = run_teacher(batch)
            single = len(files) == 1
            parts = [
                {k: _to_half(v if single else v[i : i + 1]) for k, v in computed.items()} for i in range(len(files))
            ]
            for file, rows in zip(files, parts):
                self._write(file, rows)
            # rounded as when they are read back
            return {k: torch.cat([rows[k].float() for rows in parts]) for k in computed}
        stored = [self._read(f) for f in files]
        return {k: torch.cat([s[k].float() for s in stored]) for k in stored[0]}

    def _file(self, sample: Any) -> Path:
        """Return the file of a sample."""
        return self.folder / f"{digest([self.teacher_digest, tensors_in(_teacher_inputs(sample))])}.safetensors"

    def _write(self, file: Path, rows: dict[str, Tensor]) -> None:
        """Write the outputs of a sample."""
        with container_errors(self.folder):
            save_file(rows, self.folder / PARTIAL)
            os.replace(self.folder / PARTIAL, file)

    def _read(self, file: Path) -> dict[str, Tensor]:
        """Return the outputs of a sample. Raises ContainerError for a damaged file."""
        try:
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise_memory_error(error)
            raise ContainerError(f"{file} is damaged ({error}): remove it, and the teacher runs again") from None


def _to_half(output: Tensor) -> Tensor:
    """Return a tensor in half precision, or in fp32 where half overflows."""
    half = output.half()
    return (half if bool(torch.isfinite(half).all()) else output.float()).contiguous()


def _teacher_inputs(part: Any) -> Any:
    """Return the part of a sample that the teacher reads."""
    if hasattr(part, "keys"):
        return {k: part[k] for k in sorted(part) if k != "labels"}
    return part[0] if isinstance(part, tuple | list) else part
