"""Inside the Trainer of Lightning.

from rarefy.integrations.lightning import SparsifyCallback
trainer = lightning.Trainer(max_epochs=3, callbacks=[SparsifyCallback("recipe.yaml")])
trainer.fit(module, loader)
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback

from rarefy.common.errors import RecipeError
from rarefy.integrations import refuse_rewind
from rarefy.model.masks import fold_
from rarefy.pipeline.train_stage import Sparsifier


class SparsifyCallback(Callback):
    """Carry out a recipe's stage `train` in a LightningModule's steps; arguments as of `rarefy.Sparsifier`.

    `of` names the part of the module that is made sparse (default: all of it). Masks are attached before the strategy
    wraps the module, their state goes into Lightning's checkpoints, and `fold` writes them into the weights when
    training ends. Where the recipe says distill, `training_step` returns `callback.sparsifier.loss(output, batch)`.
    """

    def __init__(self, recipe: Any, *, of: str = "", fold: bool = True, **options: Any):
        self.recipe, self.of, self.fold, self.options = recipe, of, fold, options
        self.sparsifier: Sparsifier | None = None
        self._done, self._state = 0, None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the masks, before a checkpoint is loaded."""
        if stage == "fit" and self.sparsifier is None:
            self.sparsifier = Sparsifier(pl_module.get_submodule(self.of), self.recipe, **self.options)
            refuse_rewind(self.sparsifier)
            if self.sparsifier.distiller is not None and len(self.sparsifier.distiller.projectors):
                pl_module.rarefy_projectors = self.sparsifier.distiller.projectors  # its optimizer finds them
            own = pl_module.on_load_checkpoint

            def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
                """Lightning reads the model before its callbacks: what happened to it on the way comes first."""
                self.load_state_dict(checkpoint.get("callbacks", {}).get(self.state_key, {}))
                self._take_up()
                own(checkpoint)

            pl_module.on_load_checkpoint = on_load_checkpoint

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the optimizer, and the state of a checkpoint."""
        assert self.sparsifier is not None
        optimizers = trainer.optimizers
        self.sparsifier.use(optimizers[0] if optimizers else None)
        self._done = trainer.global_step
        self._take_up()
        if not math.isfinite(trainer.estimated_stepping_batches):
            raise RecipeError("Lightning cannot tell how many steps there will be: give max_epochs or max_steps")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One step, where the optimizer made one; its gradients are there still."""
        if trainer.global_step == self._done:
            return  # gradients are being added up
        assert self.sparsifier is not None
        self._done = trainer.global_step
        self.sparsifier.step(trainer.global_step / max(1, trainer.estimated_stepping_batches))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Make an ordinary model of it."""
        assert self.sparsifier is not None
        if self.sparsifier.distiller is not None:
            self.sparsifier.distiller.close()
            pl_module._modules.pop("rarefy_projectors", None)
        if self.fold:
            fold_(self.sparsifier.model)

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's state for a checkpoint."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def _take_up(self) -> None:
        if self._state is not None and self.sparsifier is not None:
            self.sparsifier.load_state_dict(self._state)
            self._state = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts."""
        self._state = state_dict or None
