"""A callback for the Trainer of Lightning.

from rarefy.integrations.lightning import SparsifyCallback
trainer = lightning.Trainer(max_epochs=3, callbacks=[SparsifyCallback("recipe.yaml")])
trainer.fit(module, loader)
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback

from rarefy.common.errors import RecipeError, SelectorError, nearest
from rarefy.integrations.rewind import refuse_rewind
from rarefy.model.masks import fold_
from rarefy.pipeline.train_stage import Sparsifier


class SparsifyCallback(Callback):
    """Run a recipe's `train` stage inside a LightningModule's training.

    Masks are attached before the strategy wraps the module, and their state is saved in Lightning's checkpoints. With
    `fold`, masks are written into the weights when training ends. If the recipe has `distill`, `training_step` returns
    `callback.sparsifier.loss(output, batch)`.

    Args:
        recipe: as for `rarefy.Sparsifier`.
        of: name of the submodule to prune; by default the whole module.
        fold: write masks into the weights when training ends.
        **options: teacher, calibrate, loss, example, cache and new values of the recipe's fields, as for
            `rarefy.Sparsifier`; steps and optimizer are those of the trainer.

    Raises:
        RecipeError: for the method rewind.
        SelectorError: where the module has no part `of`.
    """

    def __init__(self, recipe: Any, *, of: str = "", fold: bool = True, **options: Any):
        self.recipe, self.of, self.fold, self.options = recipe, of, fold, options
        self.sparsifier: Sparsifier | None = None
        self._last_step, self._state = 0, None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the masks, before a checkpoint is loaded."""
        if stage == "fit" and self.sparsifier is None:
            try:
                part = pl_module.get_submodule(self.of)
            except AttributeError:
                near = nearest(self.of, [name for name, _ in pl_module.named_modules()])
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise SelectorError(f"of: {type(pl_module).__name__} has no part {self.of!r}{hint}") from None
            self.sparsifier = Sparsifier(part, self.recipe, **self.options)
            refuse_rewind(self.sparsifier)
            if self.sparsifier.distiller is not None and len(self.sparsifier.distiller.projectors):
                pl_module.rarefy_projectors = self.sparsifier.distiller.projectors  # its optimizer finds them
            original_hook = pl_module.on_load_checkpoint

            def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
                """Restore the sparsifier first: Lightning loads weights before the state of its callbacks."""
                self.load_state_dict(checkpoint.get("callbacks", {}).get(self.state_key, {}))
                self._restore()
                original_hook(checkpoint)

            pl_module.on_load_checkpoint = on_load_checkpoint

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the optimizer, and restore the state of a checkpoint."""
        assert self.sparsifier is not None
        optimizers = trainer.optimizers
        self.sparsifier.use(optimizers[0] if optimizers else None)
        self._last_step = trainer.global_step
        self._restore()
        if not math.isfinite(trainer.estimated_stepping_batches):
            raise RecipeError("Lightning does not know the number of steps: set max_epochs or max_steps")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Do one step if the optimizer did one, before the gradients are cleared."""
        if trainer.global_step == self._last_step:
            return  # gradients are still accumulating
        assert self.sparsifier is not None
        self._last_step = trainer.global_step
        self.sparsifier.step(trainer.global_step / max(1, trainer.estimated_stepping_batches))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold the masks and release the teacher."""
        assert self.sparsifier is not None
        if self.sparsifier.distiller is not None:
            self.sparsifier.distiller.close()
            pl_module._modules.pop("rarefy_projectors", None)
        if self.fold:
            fold_(self.sparsifier.model)

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's state for a checkpoint."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def _restore(self) -> None:
        if self._state is not None and self.sparsifier is not None:
            self.sparsifier.load_state_dict(self._state)
            self._state = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._state = state_dict or None
