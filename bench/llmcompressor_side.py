"""The other side of `oneshot.py` and `values.py`: llmcompressor on the same model and batches, in its own venv.

    python llmcompressor_side.py MODEL BATCHES.safetensors sparsegpt|wanda SPARSITY PATTERN OUT
    python llmcompressor_side.py MODEL BATCHES.safetensors gptq|awq GROUP int4|uint4 OUT

The folder OUT holds the weights as the compressed model computes with them. Prints one JSON line: seconds of the
compression alone, and peak resident memory.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
    QuantizationArgs,
    QuantizationScheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
    SparseGPTModifier,
    WandaPruningModifier,
)
from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SPARSE = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
HEAD = ["re:.*lm_head"]


def rules(method: str, setting: str, shape: str) -> list:
    if method in SPARSE:
        return [SPARSE[method](sparsity=float(setting), mask_structure=shape, ignore=HEAD)]
    grid: Any = {"num_bits": 4, "symmetric": shape == "int4", "strategy": "group", "group_size": int(setting)}
    weights = QuantizationArgs(**grid)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=HEAD)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=HEAD)]


def effective(model: Any) -> dict[str, torch.Tensor]:
    """Return the state dict without quantization parameters, weights rounded."""
    state = {n: t for n, t in model.state_dict().items() if not n.rpartition(".")[2].startswith("weight_")}
    for name, layer in model.named_modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            order = getattr(layer, "weight_g_idx", None)
            grid = layer.weight_scale, layer.weight_zero_point
            state[f"{name}.weight"] = fake_quantize(layer.weight, *grid, scheme.weights, order)
    return {n: t.detach().contiguous().clone() for n, t in state.items() if "lm_head" not in n}


def main() -> None:
    folder, batches, method, sparsity, pattern, out = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]  # AWQ asks for it where no GPU is
    ids = load_file(batches)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=data,
        recipe=rules(method, sparsity, pattern),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=8,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would include the parent's peak
    peak = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
    if method in SPARSE:
        model.save_pretrained(out, safe_serialization=True)
    else:
        Path(out).mkdir()
        save_file(effective(model), f"{out}/effective.safetensors")
    print(
        json.dumps({"method": method, "sparsity": sparsity, "pattern": pattern, "seconds": seconds, "peak_rss": peak})
    )


if __name__ == "__main__":
    main()
