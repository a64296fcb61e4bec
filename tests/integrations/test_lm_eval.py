"""lm-evaluation-harness on the engine, against its own results with the dense model; a local task, offline."""

import json

import pytest
import torch

from conftest import text_model, tiny_llama
from rarefy.common.errors import ModelError

lm_eval = pytest.importorskip("lm_eval")
ConfigurableTask = pytest.importorskip("lm_eval.api.task").ConfigurableTask
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

from rarefy.integrations.lm_eval import lm


def task_of(folder, kind):
    rows = [
        {"text": f"w{i} w{i + 1} w{i + 2}", "options": [f"w{i + 3}", f"w{7 * i % 50} w4"], "answer": i % 2}
        for i in range(6)
    ]
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": f"local_{kind}", "output_type": kind, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)}, "doc_to_text": "{{text}}",
    }  # fmt: skip
    more = {
        "multiple_choice": {"doc_to_choice": "{{options}}", "doc_to_target": "{{answer}}"},
        "generate_until": {
            "doc_to_target": "{{options[0]}}",
            "generation_kwargs": {"until": ["w9"], "max_gen_toks": 5},
        },
        "loglikelihood_rolling": {"doc_to_target": "{{text}}", "doc_to_text": ""},
    }
    return ConfigurableTask(config={**config, **more[kind]})


@pytest.mark.slow
def test_results_are_those_of_the_dense_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text_model(tmp_path)
    folder = tmp_path / "model"
    dense = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in dense.parameters():
            if p.dim() == 2:
                p.mul_(4)
    dense.save_pretrained(folder)
    theirs = HFLM(pretrained=dense.eval(), tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", batch_size=3)
    ours = lm(folder, batch_size=3)
    for kind in ("multiple_choice", "generate_until", "loglikelihood_rolling"):
        task = task_of(tmp_path, kind)
        want, got = (
            lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0, log_samples=True)["samples"][
                f"local_{kind}"
            ]
            for model in (theirs, ours)
        )
        for a, b in zip(want, got, strict=True):
            if kind == "generate_until":
                assert a["resps"] == b["resps"]
            else:
                flat = [
                    [
                        float(str(v[0]).strip("()").split(",")[0])
                        for r in s["resps"]
                        for v in [r[0] if isinstance(r[0], (tuple, list)) else r]
                    ]
                    for s in (a, b)
                ]
                assert flat[0] == pytest.approx(flat[1], abs=1e-4)
    with pytest.raises(ModelError, match="expected a causal language model and its tokenizer"):
        lm(tiny_llama())
