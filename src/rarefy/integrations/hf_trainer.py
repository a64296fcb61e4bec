"""Inside the Trainer of Hugging Face transformers.

from rarefy.integrations.hf_trainer import SparsifyCallback
trainer = Trainer(model, args, train_dataset=data, callbacks=[SparsifyCallback("recipe.yaml")])
trainer.train()
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from rarefy.common.errors import ContainerError, ModelError, RecipeError
from rarefy.integrations import refuse_rewind
from rarefy.model.layers import unwrap
from rarefy.model.masks import fold_
from rarefy.pipeline.train_stage import Sparsifier

FILE = "rarefy_sparsifier.safetensors"


class SparsifyCallback(TrainerCallback):
    """Carry out a recipe's stage `train` in a Trainer's steps; arguments as of `rarefy.Sparsifier`.

    Masks are attached when the Trainer is made, their state goes into its checkpoints and comes out of them when it
    resumes, and `fold` writes them into the weights when training ends, so that `save_model` writes an ordinary model.
    Where the recipe says distill, the loss that the model returns while it trains is that with its teacher.
    """

    def __init__(self, recipe: Any, *, fold: bool = True, **options: Any):
        self.recipe, self.fold, self.options = recipe, fold, options
        self.sparsifier: Sparsifier | None = None
        self._hook: Any = None
        self._scaler: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach the masks, before anything wraps the model or loads a checkpoint into it."""
        self.sparsifier = Sparsifier(model, self.recipe, **self.options)
        refuse_rewind(self.sparsifier)
        if args.load_best_model_at_end and not self.sparsifier.settled:
            raise RecipeError(
                "load_best_model_at_end may take the model back to before its zeros: leave it out, evaluate afterwards"
            )
        if self.sparsifier.distiller is not None:
            if len(self.sparsifier.distiller.projectors):
                model.rarefy_projectors = self.sparsifier.distiller.projectors  # the Trainer's optimizer finds them
            # the model's own loss counts all batches of a step together, where the Trainer tells it how many tokens
            many = args.gradient_accumulation_steps
            self._hook = model.register_forward_hook(partial(self._taught, many), with_kwargs=True)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Take the optimizer, and the state of a checkpoint that training goes on from."""
        assert self.sparsifier is not None
        if model is not None and unwrap(model) is not self.sparsifier.model:
            raise ModelError("the Trainer trains another model than it was made with: give it a model, not model_init")
        self._scaler = getattr(optimizer, "scaler", None)
        self.sparsifier.use(getattr(optimizer, "optimizer", optimizer))
        if not state.global_step:
            return
        named = args.resume_from_checkpoint
        places = [Path(named)] if isinstance(named, str) else []
        places.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        file = next((p / FILE for p in places if (p / FILE).is_file()), None)
        if file is None:
            raise ContainerError(f"no {FILE} in {places[-1]}: the checkpoint was made without this callback")
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            numbers = json.loads((opened.metadata() or {}).get("numbers", "{}"))
        before = set(self.sparsifier.model.state_dict())
        self.sparsifier.load_state_dict({**numbers, **tensors})
        if set(self.sparsifier.model.state_dict()) != before:  # weights came onto a grid on the way, and were not read
            _reread(self.sparsifier.model, file.parent)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step, while its gradients are there still."""
        assert self.sparsifier is not None
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        self.sparsifier.step((state.global_step + 1) / max(1, state.max_steps), scale=scale)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the state beside the model's."""
        assert self.sparsifier is not None
        kept = self.sparsifier.state_dict()
        tensors = {k: v.contiguous() for k, v in kept.items() if isinstance(v, Tensor)}
        numbers = json.dumps({k: v for k, v in kept.items() if k not in tensors})
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file(tensors, folder / FILE, {"numbers": numbers})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the sparsity to what is logged."""
        for row in (logs, state.log_history[-1] if state.log_history else None):
            if row is not None and self.sparsifier is not None:
                row["sparsity"] = self.sparsifier.sparsity

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make an ordinary model of it."""
        assert self.sparsifier is not None
        if self.sparsifier.distiller is not None:
            self.sparsifier.distiller.close()
            self._hook.remove()
            self.sparsifier.model._modules.pop("rarefy_projectors", None)
        if self.fold:
            fold_(self.sparsifier.model)

    def _taught(self, many: int, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if not model.training or self.sparsifier is None:
            return
        batch = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "num_items_in_batch"}
        together = many if kwargs.get("num_items_in_batch") is not None else 1
        if getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss * together
        outputs.loss = self.sparsifier.loss(outputs, batch) / together


def _reread(model: Any, folder: Path) -> None:
    """Read a checkpoint's weights once more, now that the model has the structure they were saved with."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ContainerError(f"{folder} has no model.safetensors: save checkpoints as safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            state.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
    lost = model.load_state_dict(state, strict=False)
    known = {t.data_ptr() for n, t in model.state_dict().items() if n in state}
    missing = [
        n for n in lost.missing_keys if model.state_dict()[n].data_ptr() not in known
    ]  # tied ones are saved once
    if missing or lost.unexpected_keys:
        raise ContainerError(f"{folder} is of another model: {', '.join([*missing, *lost.unexpected_keys][:4])}")
