"""Pruning inside a training loop: an object that is told of every step and keeps a plan's events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model import distributed
from rarefy.model.distributed import all_reduce_mean, full_tensor, is_sharded
from rarefy.model.layers import Layer, all_layers, select_layers
from rarefy.model.losses import Loss
from rarefy.model.masks import Mask, check_maskable, dense_mask, get_mask, masks, set_mask_, zero_masked_
from rarefy.prune import prune
from rarefy.prune.scores import SCORES
from rarefy.train.sparsity_config import Gradual, ScheduledConfig, SecondOrder, SparsityConfig, resolve_config
from rarefy.train.sparsity_methods import METHODS, MethodContext, layers_by_final_sparsity, lr_progress

Event = Callable[[nn.Module], Any]
COARSE = ScheduledConfig  # of events that fall between two steps of training, the last one counts
STATE = ("count", "progress", "stride", "sparsity")


class Sparsifier:
    """Carry out a plan while a model trains, in anybody's loop.

        sparsifier = Sparsifier(model, Gradual(sparsity=0.9), steps=1000, optimizer=optimizer)
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()

    model      masks are attached at once, all open: before torch.compile, DDP or FSDP wrap it
    plan       Gradual, Movement, SecondOrder, Rigl, Alternate, Admm or Rewind; None holds the masks that are there
    steps      how many steps the training has; afterwards the masks stay as they are. Without it, `step(progress)` is
               told how far training is
    optimizer  its state of masked weights is set to zero, so that momentum moves nothing that comes back
    calibrate  batches, for scores that read activations or gradients
    loss       of a batch, for gradients; by default the model's own
    at         {progress: function of the model}: what else happens on the way, once, such as `rarefy.quantize_`

    `step()` comes after `optimizer.step()` and before `zero_grad()`: some plans read gradients. With gradient
    accumulation it comes once an optimizer step, with a loss scaler likewise. Masked weights are zero at every moment.
    Raises PatternError for a plan that is impossible, DataError where its score needs data.

    >>> net = nn.Linear(8, 8)
    >>> sparsifier = Sparsifier(net, Gradual(sparsity=0.5, steps=2, end=1.0), steps=4)
    >>> for _ in range(4): sparsifier.step()
    >>> sparsifier.sparsity, int((net.weight == 0).sum()), sparsifier.done
    (0.5, 32, True)
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SparsityConfig | None,
        *,
        steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        calibrate: Iterable[Any] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        at: Mapping[float, Event] | None = None,
    ):
        check_steps(steps)
        self.model, self.plan, self.steps, self.sparsity = model, plan, steps, 0.0
        self.count, self.progress, self.stride, self._scale = 0, 0.0, 0.0, 1.0
        self.optimizer = optimizer
        self._left: list[tuple[float, Any]] = []
        self._layers: list[Layer] = []
        self._at = dict(sorted((at or {}).items()))
        wrong = next((t for t in self._at if not 0 <= t <= 1), None)
        if wrong is not None:
            raise PatternError(f"at: {wrong!r} is not within training, 0 to 1")
        if plan is None:
            self._layers = [l for l in all_layers(model) if get_mask(l) is not None]
            self._clean()
            self._happen()
            return
        told = resolve_config(plan)
        self._layers = select_layers(model, plan.layers, plan.ignore)
        prune.refuse_impossible(self._layers, told.pattern)
        data = list(calibrate) if isinstance(calibrate, Iterator) else calibrate
        self._check(plan, data)
        self._method = METHODS[type(plan)]
        self._left = self._method.events(plan, told.sparsity)
        if steps is not None and len(self._left) > steps + 1 and not isinstance(plan, COARSE):
            raise PatternError(
                f"the plan has {len(self._left)} events and training only {steps} steps: train longer, or give "
                "fewer steps, cycles or rounds"
            )
        seed = plan.seed if plan.seed is not None else seed
        self._work = MethodContext(model, self._layers, plan, told, seed, optimizer, data, loss, self._gradient)
        layers_by_final_sparsity(self._work)  # for its checks
        for layer in self._layers:
            check_maskable(layer)
        for layer in self._layers:
            if get_mask(layer) is None:
                set_mask_(layer, dense_mask(layer))
        self.sparsity = self._work.zeros()
        self._advance(0.0, 0.0)

    @property
    def done(self) -> bool:
        """Whether the sparsity is final."""
        return not self._left

    @property
    def settled(self) -> bool:
        """Whether nothing more happens to the weights but training."""
        return not self._left and not self._at

    @property
    def lr_progress(self) -> float:
        """Where a schedule of the learning rate should stand, 0 to 1: `Rewind` sends it back each round."""
        return lr_progress(self.plan, self.progress)

    def step(self, progress: float | None = None, *, scale: float = 1.0) -> None:
        """Note one step of training, and do what is due. O(1) where nothing is, but for `Movement` and `Admm`.

        `scale` is what a loss scaler has multiplied this step's loss by (`scaler.get_scale()` before its `update()`).
        Raises PatternError where neither `steps` nor `progress` says how far training is.
        """
        if progress is None and self.steps is None:
            raise PatternError("a sparsifier without steps is told how far training is, 0 to 1: step(progress)")
        self.count += 1
        before, now = self.progress, self.count / self.steps if progress is None and self.steps else progress or 0.0
        self.progress = max(before, min(1.0, now))
        self.stride, self._scale = self.progress - before, scale
        self._advance(before, self.progress)

    def use(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Take an optimizer that was made later: its state of masked weights is zeroed from now on, and what comes to
        be trained on the way (the values of codebooks) is added to it."""
        self.optimizer = optimizer
        if self.plan is not None:
            self._work.optimizer = optimizer
        self._clean()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on: numbers, and tensors. The masks are in the model's own state."""
        kept = {} if self.plan is None else {f"kept.{k}": v for k, v in self._work.kept.items()}
        return {**{k: getattr(self, k) for k in STATE}, "left": len(self._left), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same plan; before the model takes its own state up, as what
        happened on the way (`at`) happens to it here. Raises ModelError for a state of another run."""
        events = [] if self.plan is None else self._method.events(self.plan, self._work.asked.sparsity)
        wrong = [k for k in (*STATE, "left") if k not in state]
        if wrong or not 0 <= int(state["left"]) <= len(events):
            what = f"lacks {', '.join(wrong)}" if wrong else f"has {state['left']} events to come of {len(events)}"
            raise ModelError(f"this state is of another run of a sparsifier: it {what}")
        for key in STATE:
            setattr(self, key, state[key])
        self._left = events[len(events) - int(state["left"]) :]
        self._happen()
        if self.plan is not None:
            self._work.kept = {k.removeprefix("kept."): v.clone() for k, v in state.items() if k.startswith("kept.")}
            self._probe()

    def copy_masks_(self, other: nn.Module) -> None:
        """Give another copy of the model (an average of its weights, say) the masks as they are now."""
        here = masks(self.model)
        for layer in all_layers(other):
            name = next((n for n in (layer.full_name, layer.full_name.removeprefix("module.")) if n in here), None)
            if name is not None:
                set_mask_(layer, here[name])

    def _check(self, plan: SparsityConfig, calibrate: Iterable[Any] | None) -> None:
        needs = isinstance(plan, SecondOrder) or (isinstance(plan, Gradual) and SCORES[plan.score].needs)
        if needs and calibrate is None:
            what = f"score {plan.score!r}" if isinstance(plan, Gradual) else "second-order pruning"
            raise DataError(f"{what} reads statistics: give calibrate=batches")
        if needs and next(iter(calibrate or ()), None) is None:
            raise DataError("the calibration data is empty")
        if needs and any(is_sharded(l.original) for l in self._layers):
            raise ModelError(
                "scores of data are not taken from weights that processes share: make the sparsifier before fully_shard"
            )

    def _advance(self, before: float, now: float) -> None:
        if self.plan is None:
            self._happen()
            return
        if self._method.each is not None and now > before and self._left:
            if self._method.gradients:
                self._check_gradients()
            self._method.each(self._work, before, now)
        due = [v for t, v in self._left if t <= now + 1e-9]
        if self._method.gradients == "events" and any(v is not None for v in due) and not self._told():
            due = [v for v in due if v is None]  # the others, with the gradient of the next step
        self._left = self._left[len(due) :]
        for value in due[-1:] if isinstance(self.plan, COARSE) else due:
            self.sparsity = self._method.act(self._work, value)
        if due:
            self._clean()
        self._happen()
        self._probe()

    def rest(self) -> None:
        """Take off what the model carries for reading gradients; masks stay."""
        for layer in self._layers:
            if get_mask(layer) is not None:
                _mask_of(layer).probe = None

    def _happen(self) -> None:
        due = [t for t in self._at if t <= self.progress + 1e-9]
        if not due:
            return
        before = {id(p) for p in self.model.parameters()}
        for when in due:
            self._at.pop(when)(self.model)
        new = [p for p in self.model.parameters() if id(p) not in before and p.requires_grad]
        if new and self.optimizer is not None:
            self.optimizer.add_param_group({"params": new})

    def _clean(self) -> None:
        """Nothing beneath a mask: no weight, no momentum; so none comes back with either."""
        hidden = self.plan is not None and self._method.hidden(self.plan)
        for layer in self._layers:
            mask, weight = get_mask(layer), layer.original
            if mask is None:
                continue
            state = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
            zero_masked_((*state.values(), *(() if hidden else (weight,))), mask)

    def _told(self) -> bool:
        """Whether there are gradients, and all are finite: not where a loss scaler throws the step away."""
        if any(_mask_of(l).probe is None for l in self._layers):
            return False
        self._check_gradients()
        return all(bool(torch.isfinite(self._gradient(l)).all()) for l in self._layers)

    def _probe(self) -> None:
        """Let masks tell gradients at masked places, where they will be read at the next step, a stride ahead."""
        if not self._method.gradients:
            return
        wanted = not self.done
        if self._method.gradients == "events":
            wanted = any(t <= self.progress + 1.5 * self.stride for t, _ in self._left)
        for layer in self._layers:
            mask, W = _mask_of(layer), layer.original
            mask.probe = None
            if wanted:
                mask.probe = torch.zeros(W.shape, dtype=W.dtype, device=W.device, requires_grad=True)
                if self._method.gradients == "steps":
                    mask.probe.register_hook(partial(_times, layer))  # before the optimizer moves it

    def _check_gradients(self) -> None:
        """Raise ModelError where no layer has a gradient, in any process."""
        probes = [_mask_of(l).probe for l in self._layers]
        if not distributed.all_reduce_number(float(any(p is not None and p.grad is not None for p in probes))):
            name = self._layers[0].full_name
            raise ModelError(f"{name} has no gradient: call sparsifier.step() after backward, for each optimizer step")

    def _gradient(self, layer: Layer) -> Tensor:
        """The gradient since the last step, at masked places too (times the weight, where a method reads it at every
        step): zero for a layer that was not used."""
        probe, W = _mask_of(layer).probe, layer.original
        own = None if probe is None else probe.grad
        if own is None:
            own = torch.zeros(W.shape, dtype=W.dtype, device=W.device)
        return all_reduce_mean(own) / self._scale


def _times(layer: Layer, gradient: Tensor) -> Tensor:
    return gradient * full_tensor(layer.original.detach())


def check_steps(steps: Any, what: str = "steps") -> None:
    """Raise PatternError for what is no number of steps."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise PatternError(f"{what} is the number of training steps, at least 1, got {steps!r}")


def _mask_of(layer: Layer) -> Mask:
    parametrizations: Any = layer.module.parametrizations
    return next(p for p in getattr(parametrizations, layer.param) if isinstance(p, Mask))
