"""LSTM, GRU and RNN, step by step: for forms that no torch module has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.onnx.operators.signature import require

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]  # (input, states) to new states


def activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Tensor], Tensor]:
    """Return an activation of a recurrent operator by its name."""
    a, b = alpha, beta
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "Relu": torch.relu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "Affine": lambda x: (1.0 if a is None else a) * x + (0.0 if b is None else b),
        "LeakyRelu": lambda x: torch.nn.functional.leaky_relu(x, 0.01 if a is None else a),
        "ThresholdedRelu": lambda x: torch.where(x > (1.0 if a is None else a), x, 0.0),
        "ScaledTanh": lambda x: (1.0 if a is None else a) * torch.tanh((1.0 if b is None else b) * x),
        "HardSigmoid": lambda x: torch.clamp((0.2 if a is None else a) * x + (0.5 if b is None else b), 0, 1),
        "Elu": lambda x: torch.nn.functional.elu(x, 1.0 if a is None else a),
        "Softsign": torch.nn.functional.softsign,
        "Softplus": torch.nn.functional.softplus,
    }
    require(name in known, f"the activation {name!r} of a recurrent operator is not supported")
    return known[name]


def _activations(names: Any, alphas: Any, betas: Any, default: Sequence[str], directions: int) -> list[Any]:
    """Return the activations of each direction."""
    names = [n.decode() if isinstance(n, bytes) else n for n in (names or list(default) * directions)]
    values = [iter(v or ()) for v in (alphas, betas)]
    functions = []
    for name in names:
        takes_alpha = name not in ("Relu", "Tanh", "Sigmoid", "Softsign", "Softplus")
        takes_beta = name in ("Affine", "ScaledTanh", "HardSigmoid")
        alpha = next(values[0], None) if takes_alpha else None
        functions.append(activation(name, alpha, next(values[1], None) if takes_beta else None))
    count = len(default)
    return [functions[i * count : (i + 1) * count] for i in range(directions)]


def _run(x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, backward: bool, step: Step) -> Any:
    """Run over a sequence [steps, batch, inputs]; return the outputs of all steps, and the last states."""
    outputs: list[Tensor] = []
    steps = range(x.shape[0])
    for t in reversed(steps) if backward else steps:
        new = step(x[t], states)
        if lengths is None:
            outputs.append(new[0])
        else:
            runs = (t < lengths)[:, None]
            outputs.append(torch.where(runs, new[0], 0.0))
            new = tuple(torch.where(runs, n, s) for n, s in zip(new, states))
        states = new
    return torch.stack(outputs[::-1] if backward else outputs), states


def _all_directions(
    x: Tensor, w: Tensor, lengths: Tensor | None, initial: Sequence[Tensor | None], hidden: int, direction: str,
    layout: int, outputs: int, make_step: Callable[[int], Step],
) -> Any:  # fmt: skip
    """Run each direction; return the outputs [steps, directions, batch, hidden] and the last states."""
    require(direction in ("forward", "reverse", "bidirectional"), f"direction {direction!r} is not known")
    x = x.transpose(0, 1) if layout else x
    count, batch = w.shape[0], x.shape[1]
    ys, lasts = [], []
    for d in range(count):
        states = tuple(x.new_zeros(batch, hidden) if s is None else (s[:, d] if layout else s[d]) for s in initial)
        y, last = _run(x, states, lengths, direction == "reverse" or d == 1, make_step(d))
        ys.append(y)
        lasts.append(last)
    y = torch.stack(ys, 1)
    y = y.permute(2, 0, 1, 3) if layout else y
    ends = [torch.stack([last[i] for last in lasts], 1 if layout else 0) for i in range(len(initial))]
    return y if outputs == 1 else (y, *ends)[:outputs]


def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, initial_c: Tensor | None = None, p: Tensor | None = None, *, hidden_size: int,
    direction: str = "forward", layout: int = 0, input_forget: int = 0, clip: float | None = None,
    activations: Any = None, activation_alpha: Any = None, activation_beta: Any = None, outputs: int = 1,
) -> Any:  # fmt: skip
    n = hidden_size
    kinds = _activations(activations, activation_alpha, activation_beta, ("Sigmoid", "Tanh", "Tanh"), w.shape[0])

    def bound(z: Tensor) -> Tensor:
        return z if clip is None else z.clamp(-clip, clip)

    def make_step(d: int) -> Step:
        f, g, h = kinds[d]
        bias = 0 if b is None else b[d, : 4 * n] + b[d, 4 * n :]
        peep = [torch.zeros(n, dtype=torch.float32)] * 3 if p is None else list(p[d].split(n))  # of i, o and f

        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            ht, ct = states
            i, o, forget, cell = (xt @ w[d].T + ht @ r[d].T + bias).split(n, 1)
            i = f(bound(i + peep[0] * ct))
            forget = 1 - i if input_forget else f(bound(forget + peep[2] * ct))
            c = forget * ct + i * g(bound(cell))
            return f(bound(o + peep[1] * c)) * h(c), c

        return step

    return _all_directions(x, w, sequence_lens, (initial_h, initial_c), n, direction, layout, outputs, make_step)


def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *, hidden_size: int, direction: str = "forward", layout: int = 0,
    linear_before_reset: int = 0, clip: float | None = None, activations: Any = None, activation_alpha: Any = None,
    activation_beta: Any = None, outputs: int = 1,
) -> Any:  # fmt: skip
    n = hidden_size
    kinds = _activations(activations, activation_alpha, activation_beta, ("Sigmoid", "Tanh"), w.shape[0])

    def bound(z: Tensor) -> Tensor:
        return z if clip is None else z.clamp(-clip, clip)

    def make_step(d: int) -> Step:
        f, g = kinds[d]
        of_input = torch.zeros(3 * n, dtype=torch.float32) if b is None else b[d, : 3 * n]
        of_state = torch.zeros(3 * n, dtype=torch.float32) if b is None else b[d, 3 * n :]

        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = states
            inputs = xt @ w[d].T + of_input
            gates = inputs[:, : 2 * n] + h @ r[d, : 2 * n].T + of_state[: 2 * n]
            update, reset = (f(bound(z)) for z in gates.split(n, 1))
            if linear_before_reset:
                hidden = reset * (h @ r[d, 2 * n :].T + of_state[2 * n :])
            else:
                hidden = (reset * h) @ r[d, 2 * n :].T + of_state[2 * n :]
            return ((1 - update) * g(bound(inputs[:, 2 * n :] + hidden)) + update * h,)

        return step

    return _all_directions(x, w, sequence_lens, (initial_h,), n, direction, layout, outputs, make_step)


def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None, *, hidden_size: int, direction: str = "forward", layout: int = 0,
    clip: float | None = None, activations: Any = None, activation_alpha: Any = None, activation_beta: Any = None,
    outputs: int = 1,
) -> Any:  # fmt: skip
    n = hidden_size
    kinds = _activations(activations, activation_alpha, activation_beta, ("Tanh",), w.shape[0])

    def make_step(d: int) -> Step:
        bias = 0 if b is None else b[d, :n] + b[d, n:]

        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = xt @ w[d].T + states[0] @ r[d].T + bias
            return (kinds[d][0](z if clip is None else z.clamp(-clip, clip)),)

        return step

    return _all_directions(x, w, sequence_lens, (initial_h,), n, direction, layout, outputs, make_step)
