"""Pruning inside a training loop: an object that counts the steps and runs the events of a sparsity config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.checks import check_int
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model import distributed
from rarefy.model.distributed import all_reduce_mean, full_tensor, is_sharded
from rarefy.model.forward import check_batches
from rarefy.model.layers import Layer, all_layers, select_layers
from rarefy.model.losses import Loss
from rarefy.model.masks import Mask, check_maskable, dense_mask, get_mask, masks, set_mask_, zero_masked_
from rarefy.prune import prune
from rarefy.prune.scores import SCORES
from rarefy.train.sparsity_config import Gradual, ScheduledConfig, SecondOrder, SparsityConfig, resolve_config
from rarefy.train.sparsity_methods import METHODS, MethodContext, layers_by_final_sparsity, lr_progress

Event = Callable[[nn.Module], Any]
COARSE = ScheduledConfig  # of several events due at one training step, only the last one runs
STATE = ("count", "progress", "stride", "sparsity")


class Sparsifier:
    """Apply a sparsity config while a model trains, in any training loop.

    Call `step()` after `optimizer.step()` and before `zero_grad()`, since some configs read gradients; with gradient
    accumulation or a loss scaler once an optimizer step. Masked weights are zero at every moment.

    Args:
        model: gets masks without zeros at once: create the sparsifier before torch.compile, DDP or FSDP wrap the model.
        config: Gradual, Movement, SecondOrder, Rigl, Alternate, Admm or Rewind; None keeps the present masks.
        steps: Number of training steps; afterwards the masks stay. Without it, call `step(progress)`.
        optimizer: Its state of masked weights is set to zero, so that no momentum moves a weight that grows back.
        calibrate: Batches for scores that read activations or gradients.
        loss: Loss of a batch, for gradients; by default the model's own.
        seed: Seed of random scores, unless the config has one.
        at: {progress: function of the model}, called once at that progress (0 to 1), such as `rarefy.quantize_`.

    Raises:
        PatternError: The config is impossible.
        DataError: The config's score needs data and there is none.

    Example:
        >>> net = nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> sparsifier = Sparsifier(net, Gradual(sparsity=0.5, steps=2, end=1.0), steps=4, optimizer=optimizer)
        >>> for _ in range(4):
        ...     net(torch.randn(2, 8)).sum().backward()
        ...     optimizer.step()
        ...     sparsifier.step()
        ...     optimizer.zero_grad()
        >>> sparsifier.sparsity, int((net.weight == 0).sum()), sparsifier.done
        (0.5, 32, True)
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig | None,
        *,
        steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        calibrate: Iterable[Any] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        at: Mapping[float, Event] | None = None,
    ):
        check_steps(steps)
        self.model, self.config, self.steps, self.sparsity = model, config, steps, 0.0
        self.count, self.progress, self.stride, self._scale = 0, 0.0, 0.0, 1.0
        self.optimizer = optimizer
        self._events: list[tuple[float, Any]] = []  # that are not done yet
        self._layers: list[Layer] = []
        if at is not None and not isinstance(at, Mapping):
            raise PatternError(f"at: expected a dict of functions by training progress, got {type(at).__name__}")
        outside = [t for t in at or {} if isinstance(t, bool) or not isinstance(t, Real) or not 0 <= t <= 1]
        if outside:
            raise PatternError(f"at: expected training progress between 0 and 1, got {outside[0]!r}")
        self._actions = dict(sorted((at or {}).items()))
        if config is None:
            self._layers = [l for l in all_layers(model) if get_mask(l) is not None]
            self._clear_masked()
            self._run_actions()
            return
        resolved = resolve_config(config)
        self._layers = select_layers(model, config.layers, config.ignore)
        prune.refuse_impossible(self._layers, resolved.pattern)
        if calibrate is not None:
            check_batches(calibrate, "calibrate")
        data = list(calibrate) if isinstance(calibrate, Iterator) else calibrate
        self._check(config, data)
        self._method = METHODS[type(config)]
        self._events = self._method.events(config, resolved.sparsity)
        if steps is not None and len(self._events) > steps + 1 and not isinstance(config, COARSE):
            raise PatternError(
                f"{type(config).__name__} has {len(self._events)} events, but training has only {steps} steps: train "
                "longer, or give fewer steps, cycles or rounds"
            )
        seed = config.seed if config.seed is not None else seed
        self._context = MethodContext(
            model, self._layers, config, resolved, seed, optimizer, data, loss, self._gradient
        )
        layers_by_final_sparsity(self._context)  # for its checks
        for layer in self._layers:
            check_maskable(layer)
        for layer in self._layers:
            if get_mask(layer) is None:
                set_mask_(layer, dense_mask(layer))
        self.sparsity = self._context.zeros()
        self._advance(0.0, 0.0)

    @property
    def done(self) -> bool:
        """Return whether the sparsity is final."""
        return not self._events

    @property
    def finished(self) -> bool:
        """Return whether nothing but training changes the weights from now on."""
        return not self._events and not self._actions

    @property
    def lr_progress(self) -> float:
        """Return the progress (0 to 1) of a learning rate schedule: `Rewind` restarts it each round."""
        return lr_progress(self.config, self.progress)

    def step(self, progress: float | None = None, *, scale: float = 1.0) -> None:
        """Count one training step, and run what is due. O(1) where nothing is due, except for `Movement` and `Admm`.

        Args:
            progress: Fraction of training that is done, 0 to 1; by default counted from `steps`.
            scale: Factor of the loss scaler in this step (`scaler.get_scale()` before its `update()`).

        Raises:
            PatternError: Neither `steps` nor `progress` is given.
        """
        if progress is None and self.steps is None:
            raise PatternError("a sparsifier without steps needs the progress of training, 0 to 1: step(progress)")
        self.count += 1
        before, now = self.progress, self.count / self.steps if progress is None and self.steps else progress or 0.0
        self.progress = max(before, min(1.0, now))
        self.stride, self._scale = self.progress - before, scale
        self._advance(before, self.progress)

    def use(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Set an optimizer that was created later.

        From now on its state of masked weights is set to zero, and new parameters (values of codebooks) are added to
        it.
        """
        self.optimizer = optimizer
        if self.config is not None:
            self._context.optimizer = optimizer
        self._clear_masked()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a run needs to be resumed: numbers and tensors. Masks are in the model's own state."""
        method_state = {} if self.config is None else {f"kept.{k}": v for k, v in self._context.state.items()}
        return {**{k: getattr(self, k) for k in STATE}, "left": len(self._events), **method_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`, of a sparsifier with the same config.

        Call it before the model loads its own state: the functions of `at` that already ran are run again here. Raises
        ModelError for a state of another run.
        """
        events = [] if self.config is None else self._method.events(self.config, self._context.resolved.sparsity)
        missing = [k for k in (*STATE, "left") if k not in state]
        if missing or not 0 <= int(state["left"]) <= len(events):
            problem = f"lacks {', '.join(missing)}" if missing else f"has {state['left']} of {len(events)} events left"
            raise ModelError(f"this state is of another run of a sparsifier: it {problem}")
        for key in STATE:
            setattr(self, key, state[key])
        self._events = events[len(events) - int(state["left"]) :]
        self._run_actions()
        if self.config is not None:
            method_state = {k: v for k, v in state.items() if k.startswith("kept.")}
            self._context.state = {k.removeprefix("kept."): v.clone() for k, v in method_state.items()}
            self._update_probes()

    def copy_masks_(self, other: nn.Module) -> None:
        """Set the present masks in another copy of the model, such as an average of its weights."""
        current = masks(self.model)
        for layer in all_layers(other):
            name = next((n for n in (layer.full_name, layer.full_name.removeprefix("module.")) if n in current), None)
            if name is not None:
                set_mask_(layer, current[name])

    def _check(self, config: SparsityConfig, calibrate: Iterable[Any] | None) -> None:
        """Raise DataError for missing calibration data, ModelError for sharded weights."""
        needs = isinstance(config, SecondOrder) or (isinstance(config, Gradual) and SCORES[config.score].needs)
        if needs and calibrate is None:
            reader = f"score {config.score!r}" if isinstance(config, Gradual) else "second-order pruning"
            raise DataError(f"{reader} needs data: give calibrate=batches")
        if needs and next(iter(calibrate or ()), None) is None:
            raise DataError("the calibration data is empty")
        if needs and any(is_sharded(l.original) for l in self._layers):
            raise ModelError(
                "scores that need data do not support sharded weights: create the sparsifier before fully_shard"
            )

    def _advance(self, before: float, now: float) -> None:
        """Run what is due between two moments of training."""
        if self.config is None:
            self._run_actions()
            return
        if self._method.each is not None and now > before and self._events:
            if self._method.gradients:
                self._check_gradients()
            self._method.each(self._context, before, now)
        due = [v for t, v in self._events if t <= now + 1e-9]
        if self._method.gradients == "events" and any(v is not None for v in due) and not self._gradients_ready():
            due = [v for v in due if v is None]  # the others wait for the gradient of the next step
        self._events = self._events[len(due) :]
        for value in due[-1:] if isinstance(self.config, COARSE) else due:
            self.sparsity = self._method.act(self._context, value)
        if due:
            self._clear_masked()
        self._run_actions()
        self._update_probes()

    def remove_probes(self) -> None:
        """Remove the gradient probes from the masks, which stay."""
        for layer in self._layers:
            if get_mask(layer) is not None:
                _mask_of(layer).probe = None

    def _run_actions(self) -> None:
        """Run the functions of `at` that are due, and add new parameters to the optimizer."""
        due = [t for t in self._actions if t <= self.progress + 1e-9]
        if not due:
            return
        before = {id(p) for p in self.model.parameters()}
        for when in due:
            self._actions.pop(when)(self.model)
        new = [p for p in self.model.parameters() if id(p) not in before and p.requires_grad]
        if new and self.optimizer is not None:
            self.optimizer.add_param_group({"params": new})

    def _clear_masked(self) -> None:
        """Set masked weights and their optimizer state to zero."""
        hidden = self.config is not None and self._method.hidden(self.config)
        for layer in self._layers:
            mask, weight = get_mask(layer), layer.original
            if mask is None:
                continue
            state = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
            zero_masked_((*state.values(), *(() if hidden else (weight,))), mask)

    def _gradients_ready(self) -> bool:
        """Return whether all gradients are there and finite: a loss scaler skips a step otherwise."""
        if any(_mask_of(l).probe is None for l in self._layers):
            return False
        self._check_gradients()
        return all(bool(torch.isfinite(self._gradient(l)).all()) for l in self._layers)

    def _update_probes(self) -> None:
        """Attach probes for gradients of masked weights where the next step reads them."""
        if not self._method.gradients:
            return
        needed = not self.done
        if self._method.gradients == "events":
            needed = any(t <= self.progress + 1.5 * self.stride for t, _ in self._events)
        for layer in self._layers:
            mask, W = _mask_of(layer), layer.original
            mask.probe = None
            if needed:
                mask.probe = torch.zeros(W.shape, dtype=W.dtype, device=W.device, requires_grad=True)
                if self._method.gradients == "steps":
                    mask.probe.register_hook(partial(_times_weight, layer))  # before the optimizer moves it

    def _check_gradients(self) -> None:
        """Raise ModelError where no layer has a gradient, in any process."""
        probes = [_mask_of(l).probe for l in self._layers]
        if not distributed.all_reduce_number(float(any(p is not None and p.grad is not None for p in probes))):
            name = self._layers[0].full_name
            raise ModelError(f"{name} has no gradient: call sparsifier.step() after backward, for each optimizer step")

    def _gradient(self, layer: Layer) -> Tensor:
        """Return the gradient since the last step, of masked weights too; zero for a layer that was not used.

        It is multiplied by the weight for methods that read it at every step.
        """
        probe, W = _mask_of(layer).probe, layer.original
        grad = None if probe is None else probe.grad
        if grad is None:
            grad = torch.zeros(W.shape, dtype=W.dtype, device=W.device)
        return all_reduce_mean(grad) / self._scale


def _times_weight(layer: Layer, gradient: Tensor) -> Tensor:
    """Return gradient times weight."""
    return gradient * full_tensor(layer.original.detach())


def check_steps(steps: Any, what: str = "steps") -> None:
    """Raise PatternError unless `steps` is a positive int or None."""
    if steps is not None:
        check_int(what, steps, 1, PatternError)


def _mask_of(layer: Layer) -> Mask:
    """Return the mask module of a layer."""
    parametrizations: Any = layer.module.parametrizations
    return next(p for p in getattr(parametrizations, layer.param) if isinstance(p, Mask))
