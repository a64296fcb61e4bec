"""ONNX and .pt2 files on the command line: how they are loaded, the sizes of their inputs, and data for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, RecipeError, unknown
from rarefy.data.sources import Take, batches
from rarefy.evaluation.example_inputs import as_example, input_shapes, random_inputs
from rarefy.model.batches import count_samples
from rarefy.model.forward import describe_batch
from rarefy.model.image_config import image_config_of
from rarefy.model.signature import ModelInput, Signature, get_signature, set_signature_

BATCH, TOKENS = 2, 128  # of examples, where neither the file nor the user says otherwise


def is_file(source: Any) -> bool:
    """Return whether a model is named by the path of an ONNX file."""
    return isinstance(source, Path) and source.suffix.lower() == ".onnx" and source.is_file()


def load(path: Path, input_shape: Sequence[str] | None, batch: int | None, tokens: int | None) -> nn.Module:
    """Return the module of an ONNX file, compared with ONNX Runtime on random inputs.

    Their sizes are those of the options; where none is given, some that ONNX Runtime runs.

    Args:
        path: the file.
        input_shape: values of --input-shape.
        batch: the value of --batch.
        tokens: the value of --tokens.

    Raises:
        ModelError: if the file cannot be converted, or ONNX Runtime does not run it with inputs of these sizes.
        RecipeError: for shapes that do not fit the file.
    """
    from rarefy.onnx.load import to_module
    from rarefy.onnx.read import read
    from rarefy.onnx.signature import signature_of

    model = read(path)
    signature = with_shapes(signature_of(model), input_shape or ())
    has_size = input_shape or batch or tokens
    example = random_inputs(signature, tokens or TOKENS, batch or BATCH) if has_size else None
    try:
        return to_module(model, path, example, signature=signature)
    except ModelError as error:
        if example is None or "does not run the example" not in str(error):
            raise
        sizes = ", ".join(f"{n} {describe_batch(t)}" for n, t in example.items())
        raise ModelError(f"{error} ({sizes}): give others, --tokens 128 or --input-shape NAME=1x3x224x224") from None


def with_example_shapes(net: Any, input_shape: Sequence[str] | None) -> Any:
    """Return the module of a file with the shapes of --input-shape in its signature."""
    signature = get_signature(net)
    if signature is not None and input_shape:
        set_signature_(net, with_shapes(signature, input_shape))
    return net


def with_shapes(signature: Signature, texts: Sequence[str]) -> Signature:
    """Return a signature with the shapes of --input-shape; RecipeError for those that do not fit."""
    inputs = {i.name: i for i in signature.inputs}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        name = name if equals or len(inputs) > 1 else next(iter(inputs), "")
        parts = re.split("[x,]", sizes)
        if not name or not all(re.fullmatch("[1-9][0-9]{0,8}", p) for p in parts):
            raise RecipeError(f"--input-shape {text!r}: expected an input and its sizes, as NAME=1x3x224x224")
        if name not in inputs:
            raise RecipeError(f"--input-shape {text!r}: {unknown('input', name, inputs)}")
        shape = tuple(map(int, parts))
        if not _fits(shape, inputs[name]):
            raise RecipeError(f"--input-shape {text!r}: the file's input is {inputs[name]}")
        inputs[name] = replace(inputs[name], example_shape=shape)
    return replace(signature, inputs=tuple(inputs.values()))


def _fits(shape: Sequence[int], described: ModelInput) -> bool:
    """Return whether an input of a file may have a shape."""
    if described.dims is None:
        return True
    same = (isinstance(d, str) or d == n for n, d in zip(shape, described.dims))
    return len(shape) == len(described.dims) and all(same)


def example(signature: Signature, tokens: int | None, batch: int | None, default_batch: int = BATCH) -> Any:
    """Return random inputs that a file's module can be called with; RecipeError for options without effect."""
    smallest = input_shapes(signature, 1, 1)
    for option, value, larger in (("--tokens", tokens, (2, 1)), ("--batch", batch, (1, 2))):
        if value and input_shapes(signature, *larger) == smallest:
            listed = ", ".join(map(str, signature.inputs))
            raise RecipeError(f"{option} has no effect: it fills no open size of the inputs ({listed})")
    return as_example(signature, random_inputs(signature, tokens or TOKENS, batch or default_batch))


def read_batches(net: Any, source: str, take: Take, tokenizer: Any, what: str) -> Sequence[Any]:
    """Return the batches of a source as a model is called with them; see `rarefy.data.sources.batches`."""
    signature = get_signature(net)
    if signature is None:
        take = replace(take, images=image_config_of(net) or take.images)
        return batches(source, take, tokenizer=tokenizer, what=what)
    read = batches(source, fitting_take(signature, take), tokenizer=tokenizer, what=what)
    return fit_batches(signature, read, what)


def fitting_take(signature: Signature, take: Take) -> Take:
    """Return how samples are read with the batch and the image size that a file fixes."""
    first = signature.inputs[0].dims or ()
    batch = first[0] if first and isinstance(first[0], int) else take.batch
    sizes = [n for n in first[1:3] if isinstance(n, int)] if signature.inputs[0].channels_last else list(first[2:4])
    square = signature.inputs[0].is_image and len(set(sizes)) == 1 and isinstance(sizes[0], int)
    size = sizes[0] if square else take.images.size
    return replace(take, batch=batch, images=replace(take.images, size=size, resize=size))


def fit_batches(signature: Signature, data: Sequence[Any], what: str) -> list[Any]:
    """Return batches of data as a file's module is called with them; the last one is left out where it is too small.

    Args:
        signature: the file's inputs.
        data: pairs (images, classes), or dicts of tensors by the names of the inputs. Text has input_ids alone:
            masks become ones, other integers zeros.
        what: what messages call the data.

    Raises:
        DataError: if they do not fit.
    """
    size = next(iter(signature.inputs[0].dims or ()), "")
    whole = [b for b in data if count_samples(b) == size] if isinstance(size, int) else data
    return [_fitted(signature, b, what) for b in whole or data]


def _fitted(signature: Signature, batch: Any, what: str) -> Any:
    if isinstance(batch, tuple):
        x, *targets = batch
        if len(signature.inputs) != 1:
            names = ", ".join(i.name for i in signature.inputs)
            raise DataError(f"{what}: the model takes {names}: give an .npz with an array for each")
        return (_converted(signature.inputs[0], x, what), *targets)
    tensors = _named(signature, batch, what)
    return as_example(signature, {i.name: _converted(i, tensors[i.name], what) for i in signature.inputs})


def _named(signature: Signature, batch: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the tensors of a batch by the names of a file's inputs."""
    names, tensors = [i.name for i in signature.inputs], dict(batch)
    if len(names) == len(tensors) == 1:
        return dict(zip(names, tensors.values()))
    if set(tensors) == {"input_ids"} and "input_ids" in names:
        ids = tensors["input_ids"]
        for i in (i for i in signature.inputs if i.name != "input_ids" and not i.dtype.is_floating_point):
            tensors[i.name] = ids.new_ones(ids.shape) if "mask" in i.name.lower() else ids.new_zeros(ids.shape)
    if set(tensors) != set(names):
        raise DataError(f"{what} has {', '.join(tensors)}: expected an array for each input, {', '.join(names)}")
    return tensors


def _misfit(x: Tensor, described: ModelInput) -> str:
    """Return what is wrong with the shape of a batch, and what to give."""
    dims = described.dims or ()
    if x.dim() != len(dims):
        return f"expected {len(dims)} dimensions; an .npz holds arrays of any shape"
    where = next(d for d, n in enumerate(dims) if isinstance(n, int) and n != x.shape[d])
    return f"{x.shape[where]} is not {dims[where]} in dimension {where}"


def _converted(described: ModelInput, x: Tensor, what: str) -> Tensor:
    """Return a tensor in the type and layout of an input."""
    if described.channels_last and x.dim() == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        x = x.permute(0, 2, 3, 1).contiguous()
    if x.is_floating_point() != described.dtype.is_floating_point:
        dtype = str(described.dtype).removeprefix("torch.")
        raise DataError(f"{what}: {describe_batch(x)} for the input {described}: expected {dtype}")
    if not _fits(x.shape, described):
        raise DataError(f"{what}: {describe_batch(x)} does not fit the input {described}: {_misfit(x, described)}")
    return x.to(described.dtype)
