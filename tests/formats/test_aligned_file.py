"""Files of safetensors whose tensors begin at multiples of 64 bytes."""

import torch
from safetensors.torch import load_file

from rarefy.formats.aligned_file import write_aligned


def test_tensors_of_any_strides_are_written(tmp_path):
    numbers = torch.arange(24).view(2, 3, 4)
    tensors = {
        "turned": numbers.permute(2, 0, 1),
        "every second": numbers.flatten()[::2],
        "one number": numbers[:1, 1:2, 2:3].transpose(0, 2)[:, 0],
        "one of a column": numbers.flatten()[::8][1:2],
        "none": numbers[:0],
        "scalar": torch.tensor(2.5),
        "bf16": torch.randn(3, 5).bfloat16().T,
    }
    write_aligned(tensors, tmp_path / "x", {})
    loaded = load_file(tmp_path / "x")
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())
    assert loaded.keys() == tensors.keys()
