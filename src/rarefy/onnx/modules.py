"""Modules of the torch graph that are no layers of torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rarefy.model.activation_quant import ActivationQuant
from rarefy.onnx.operators.signature import Function


class Operator(nn.Module):
    """An ONNX operator with its constants as attributes, so that a cut finds the sizes among them and updates them."""

    def __init__(self, kind: str, function: Function, constants: dict[str, Any]):
        super().__init__()
        self.kind, self.function = kind, function
        # an attribute must not hide one of nn.Module, such as `to`
        self._names = {n: f"{n}_" if hasattr(self, n) else n for n in constants}
        for name, value in constants.items():
            setattr(self, self._names[name], value)

    def forward(self, *inputs: Any, **more: Any) -> Any:
        return self.function(*inputs, **{n: getattr(self, a) for n, a in self._names.items()}, **more)

    def _get_name(self) -> str:
        return self.kind

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={getattr(self, a)!r}" for n, a in self._names.items())


class Reshape(nn.Module):
    """Reshape to sizes of which -1 takes what remains and 0 keeps a size of the input; None is a size that is given."""

    def __init__(self, shape: tuple[int | None, ...]):
        super().__init__()
        self.open = tuple(n is None for n in shape)
        self.shape = tuple(-2 if n is None else n for n in shape)

    def forward(self, x: Tensor, *sizes: int) -> Tensor:
        rest = iter(sizes)
        return x.reshape([next(rest) if n == -2 else x.shape[d] if n == 0 else n for d, n in enumerate(self.shape)])

    def extra_repr(self) -> str:
        return ", ".join("?" if n == -2 else str(n) for n in self.shape)


class Recurrent(nn.Module):
    """An LSTM, GRU or RNN of torch, with ONNX's outputs: [steps, directions, batch, hidden] and the last states."""

    def __init__(self, layer: nn.RNNBase, outputs: int):
        super().__init__()
        self.layer, self.outputs = layer, outputs

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        initial = None if not states else states if isinstance(self.layer, nn.LSTM) else states[0]
        y, last = self.layer(x, initial)
        y = y.unflatten(-1, (1 + int(self.layer.bidirectional), -1)).transpose(1, 2)
        lasts = last if isinstance(last, tuple) else (last,)
        return y if self.outputs == 1 else (y, *lasts)[: self.outputs]


class FakeQuantize(nn.Module):
    """Round values to those that codes can represent."""

    def __init__(self, inputs: ActivationQuant):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def extra_repr(self) -> str:
        return repr(self.inputs)
