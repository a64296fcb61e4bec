"""Peak memory of pruning a checkpoint that stays in its files: it grows with a block, not with depth."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RUN = """
import json, sys
import torch
torch.set_num_threads(2)
import rarefy
from rarefy.calibration import offload as pages
from rarefy.model import hf
from rarefy.evaluation.profiling import peak_rss
source, out, memory, samples, solver = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5])
hf.no_bars()
model = hf.load_folder(source)
g = torch.Generator().manual_seed(0)
data = [{"input_ids": torch.randint(0, 2048, (2, 128), generator=g)} for _ in range(samples // 2)]
prune = {"sparsity": 0.5, "solver": solver, "layers": "model.layers.*"}
recipe = {"name": "deep", "stages": [{"prune": prune}]}
with pages.limiting_resident_weights(model, memory):
    rarefy.compress_(model, recipe, data, memory=memory, resume_dir=out + ".work")
    rarefy.save(model, out)
print(json.dumps({"peak": peak_rss()}))
"""


def checkpoint(folder: Path, blocks: int, width: int, dtype: torch.dtype = torch.float32) -> int:
    """Write a Llama of random weights in shards of half a GB; return its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).state_dict().items()}
    g, index, held = torch.Generator().manual_seed(0), {}, {}
    for name, shape in shapes.items():
        held[name] = (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=g) * 0.02).to(dtype)
        if sum(t.nbytes for t in held.values()) > 1 << 29 or name == list(shapes)[-1]:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            index, held = index | dict.fromkeys(held, file), {}
    size = sum(s.numel() for s in shapes.values()) * dtype.itemsize
    about = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return size


def peak(source: Path, memory: int, samples: int, solver: dict[str, Any]) -> int:
    """Prune and save in a process of its own; return its peak resident bytes."""
    words = [sys.executable, "-c", RUN, source, source.with_suffix(".out"), memory, samples, json.dumps(solver)]
    ran = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])["peak"]


@pytest.mark.slow
def test_memory_is_flat_in_depth(tmp_path):
    peaks = {}
    for blocks in (6, 12, 24):
        checkpoint(tmp_path / f"deep{blocks}", blocks, 1024)
        peaks[blocks] = peak(tmp_path / f"deep{blocks}", 1 << 30, 8, {"name": "refit", "refits": 2})
    print(peaks)
    assert max(peaks.values()) < 1.1 * min(peaks.values()), peaks


@pytest.mark.slow
def test_a_checkpoint_of_twelve_gigabytes_under_four(tmp_path):
    size = checkpoint(tmp_path / "large", 60, 2048)
    most = peak(tmp_path / "large", 3 << 30, 8, {"name": "obs"})
    print(size, most)
    assert size > 12e9 and most < 4e9, most
