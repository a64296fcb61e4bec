"""lm-evaluation-harness on the engine.

import lm_eval
from rarefy.integrations.lm_eval import lm
results = lm_eval.simple_evaluate(lm("smollm2-135m", precision="int8"), tasks=["arc_easy"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.common.extras import install


def lm(model: Any, *, precision: str | None = None, tokenizer: Any = None, batch_size: int = 1, **options: Any) -> Any:
    """Return a language model on the engine, which `lm_eval.simple_evaluate` takes.

    Args:
        model: a folder, a built-in model such as "smollm2-135m", or a causal language model of transformers.
        precision: as for `rarefy.decoder`; None for a compiled folder.
        tokenizer: the tokenizer; by default that of the folder.
        batch_size: prompts that are read at once.
        **options: more options of `lm_eval.models.huggingface.HFLM`, such as max_length.

    Raises:
        ModelError: as `rarefy.integrations.transformers.load` does, and for other models.

    Cost: that of `rarefy.decoder`.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ModelError(f"evaluation tasks need lm-evaluation-harness: {install('lm-eval')}") from None
    from rarefy.integrations.transformers import load

    fast, parts = load(model, task="text-generation", precision=precision, tokenizer=tokenizer)
    if not fast.can_generate() or parts["tokenizer"] is None:
        raise ModelError("expected a causal language model and its tokenizer: pass tokenizer=...")
    if isinstance(model, str | Path):
        fast.name_or_path = str(model)
    make: Any = HFLM  # a decorator hides its parameters
    return make(pretrained=fast, tokenizer=parts["tokenizer"], device="cpu", batch_size=batch_size, **options)
