"""A callback for the Trainer of Hugging Face transformers.

from rarefy.integrations.hf_trainer import SparsifyCallback
trainer = Trainer(model, args, train_dataset=data, callbacks=[SparsifyCallback("recipe.yaml")])
trainer.train()
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import TrainerCallback

from rarefy.common.atomic_io import write_bytes_atomic
from rarefy.common.errors import ContainerError, ModelError, RecipeError, first_line
from rarefy.common.plain_file import plain_file
from rarefy.integrations.rewind import refuse_rewind
from rarefy.model.layers import unwrap
from rarefy.model.masks import fold_
from rarefy.pipeline.train_stage import Sparsifier

FILE = "rarefy_sparsifier.safetensors"


class SparsifyCallback(TrainerCallback):
    """Run a recipe's `train` stage inside a Trainer: pass it when you create the Trainer, callbacks=[...].

    Masks are attached when the Trainer is created. Their state is saved in its checkpoints and restored on resume. With
    `fold`, masks are written into the weights when training ends, so `save_model` writes an ordinary model. If the
    recipe has `distill`, the model returns the distillation loss while it trains.

    Args:
        recipe: as for `rarefy.Sparsifier`.
        fold: write masks into the weights when training ends.
        **options: teacher, calibrate, loss, example, cache and new values of the recipe's fields, as for
            `rarefy.Sparsifier`; steps and optimizer are those of the Trainer.

    Raises:
        RecipeError: for the method rewind, and for load_best_model_at_end where pruning is not finished at the start.
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
        if args.load_best_model_at_end and not self.sparsifier.finished:
            raise RecipeError(
                "load_best_model_at_end could restore weights from before pruning ended: turn it off, and evaluate "
                "afterwards"
            )
        if self.sparsifier.distiller is not None:
            if len(self.sparsifier.distiller.projectors):
                model.rarefy_projectors = self.sparsifier.distiller.projectors  # the Trainer's optimizer finds them
            # the model's own loss covers all batches of a step if the Trainer passes the number of tokens
            num_batches = args.gradient_accumulation_steps
            self._hook = model.register_forward_hook(
                partial(self._add_distillation_loss, num_batches), with_kwargs=True
            )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Register the optimizer, and restore the state when training resumes from a checkpoint."""
        if self.sparsifier is None:
            raise ModelError(
                "SparsifyCallback was added to a Trainer that existed already, so it has no masks: pass it when you "
                "create the Trainer, callbacks=[SparsifyCallback(recipe)]"
            )
        if model is not None and unwrap(model) is not self.sparsifier.model:
            raise ModelError("the Trainer trains another model than it was created with: pass model=, not model_init=")
        self._scaler = getattr(optimizer, "scaler", None)
        self.sparsifier.use(getattr(optimizer, "optimizer", optimizer))
        if not state.global_step:
            return
        named = args.resume_from_checkpoint
        folders = [Path(named)] if isinstance(named, str) else []
        folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        file = next((p / FILE for p in folders if (p / FILE).is_file()), None)
        if file is None:
            raise ContainerError(f"no {FILE} in {folders[-1]}: the checkpoint was saved without this callback")
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                numbers = json.loads((opened.metadata() or {}).get("numbers", "{}"))
        except (SafetensorError, ValueError) as error:
            hint = "remove this checkpoint, and resume from an earlier one"
            raise ContainerError(f"{file} is damaged or cut short: {hint} ({first_line(error)})") from None
        before = set(self.sparsifier.model.state_dict())
        self.sparsifier.load_state_dict({**numbers, **tensors})
        if (
            set(self.sparsifier.model.state_dict()) != before
        ):  # quantization changed the parameter names: load the weights again
            _reread(self.sparsifier.model, file.parent)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do one step, before the gradients are cleared."""
        assert self.sparsifier is not None
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        self.sparsifier.step((state.global_step + 1) / max(1, state.max_steps), scale=scale)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the state next to the model's checkpoint."""
        assert self.sparsifier is not None
        state_dict = self.sparsifier.state_dict()
        tensors = {k: v.contiguous() for k, v in state_dict.items() if isinstance(v, Tensor)}
        numbers = json.dumps({k: v for k, v in state_dict.items() if k not in tensors})
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_bytes_atomic(folder / FILE, save(tensors, {"numbers": numbers}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the sparsity to the logs."""
        for row in (logs, state.log_history[-1] if state.log_history else None):
            if row is not None and self.sparsifier is not None:
                row["sparsity"] = self.sparsifier.sparsity

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Fold the masks and release the teacher."""
        assert self.sparsifier is not None
        if self.sparsifier.distiller is not None:
            self.sparsifier.distiller.close()
            self._hook.remove()
            self.sparsifier.model._modules.pop("rarefy_projectors", None)
        if self.fold:
            fold_(self.sparsifier.model)

    def _add_distillation_loss(
        self, num_batches: int, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any
    ) -> None:
        if not model.training or self.sparsifier is None:
            return
        batch = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k != "num_items_in_batch"}
        accumulated = num_batches if kwargs.get("num_items_in_batch") is not None else 1
        if getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss * accumulated
        outputs.loss = self.sparsifier.loss(outputs, batch) / accumulated


def _reread(model: Any, folder: Path) -> None:
    """Load a checkpoint's weights again, now that the model has the structure they were saved with."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ContainerError(f"{folder} has no model.safetensors: save checkpoints as safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(plain_file(file), "pt") as opened:
            state.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
    lost = model.load_state_dict(state, strict=False)
    known = {t.data_ptr() for n, t in model.state_dict().items() if n in state}
    missing = [
        n for n in lost.missing_keys if model.state_dict()[n].data_ptr() not in known
    ]  # tied ones are saved once
    if missing or lost.unexpected_keys:
        raise ContainerError(f"{folder} belongs to another model: {', '.join([*missing, *lost.unexpected_keys][:4])}")
