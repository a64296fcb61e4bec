"""The other side of `oneshot.py`: llmcompressor on the same model and the same batches, in its own venv.

    python llmcompressor_side.py MODEL BATCHES.safetensors METHOD SPARSITY PATTERN OUT

Prints one JSON line: seconds of the compression alone, and peak resident memory.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
    SparseGPTModifier,
    WandaPruningModifier,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    folder, batches, method, sparsity, pattern, out = sys.argv[1:]
    torch.set_num_threads(2)
    ids = load_file(batches)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    rule = METHODS[method](sparsity=float(sparsity), mask_structure=pattern, ignore=["re:.*lm_head"])
    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=data,
        recipe=[rule],
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=8,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins with what the parent held
    peak = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
    model.save_pretrained(out, safe_serialization=True)
    print(
        json.dumps({"method": method, "sparsity": sparsity, "pattern": pattern, "seconds": seconds, "peak_rss": peak})
    )


if __name__ == "__main__":
    main()
