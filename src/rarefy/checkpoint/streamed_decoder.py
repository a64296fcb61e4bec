"""Decoders of models that are larger than memory: each weight is read, packed and released before the next."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.offload import trim_heap
from rarefy.checkpoint.engine_files import engine_files
from rarefy.checkpoint.packed_store import START_OVER, packed_store
from rarefy.checkpoint.save import save_compiled
from rarefy.checkpoint.weight_files import WeightFiles, fingerprint, open_weights, parameter_names
from rarefy.common.errors import ContainerError, FormatError, ModelError, unknown
from rarefy.common.version import __version__
from rarefy.compiler.half_precision import PRECISION_OF
from rarefy.compiler.tolerance import check_max_error
from rarefy.generation.decoder import Decoder, build_decoder, verify_decoder
from rarefy.generation.kv_cache import check_cache_precision
from rarefy.generation.weight_format import pack_weight
from rarefy.model import hf
from rarefy.model.layout import is_hf_conv1d
from rarefy.model.quant_grid import Grid, OffsetGrid
from rarefy.quantization.config import QuantizeConfig
from rarefy.quantization.grids import fit_grid
from rarefy.runtime.pack_panels import PIECE, join_rows
from rarefy.runtime.packed_formats import QuantizedPanels

NORESERVE = 0x4000  # MAP_NORESERVE of Linux: addresses without memory behind them
ROUNDED = {  # grids of linear layers that are not on one yet
    "int4": QuantizeConfig(bits=4, group=32, symmetric=False),
    "int5": QuantizeConfig(bits=5, group=32),
    "int6": QuantizeConfig(bits=6, group=32),
}
CHOICES = ("fp32", "bf16", "int8", *ROUNDED)


def decoder_from_files(
    path: str | Path,
    *,
    precision: str | None = None,
    cache_precision: str = "fp32",
    out: str | Path | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    max_error: float | None = None,
) -> Decoder:
    """Return the decoder of a model that need not fit in memory.

    Weights are read one at a time, and only their packed form stays. The graph is exported from a model without
    weights. With `out`, each packed weight is written to disk at once, and memory holds none of them: the decoder reads
    them from the files. A run that was killed resumes when it is called again, to the same bytes.

    Args:
        path: a Hugging Face folder with safetensors files, a folder that `save` wrote, or a GGUF file.
        precision: None for that of the files: "bf16" for bf16, "fp32" for fp32 and fp16, "int8" for GGUF files with
            quantized weights. "int6" and "int5" round linear layers to 6 and 5 bits with a scale for 32 inputs, "int4"
            to 4 bits with a scale and a zero point for 32 inputs; the embedding and the output head have 8 bits. Layers
            that are already on a grid of up to 6 bits keep it in all of these, and in "int8".
        cache_precision: of the KV cache, where a call does not say: "fp32", or "int8" for a quarter of its memory.
        out: a folder to write, as `save` does, with the files of the tokenizer. It appears whole or not at all.
            Until then weights are in the folder `.NAME.packing` beside it.
        overwrite: replace an older folder at `out`.
        fresh: with `out`: remove the state of an earlier run, and start anew.
        max_error: the largest relative distance of logits, as `decoder` has it.

    Returns:
        A `Decoder`, as `decoder` returns it. The logits of a few tokens were compared with those of the model in torch,
        whose weights are read once more for that, layer by layer.

    Raises:
        ModelError: no language model that the engine supports, or its logits differ.
        ContainerError: the files are damaged; `out` exists or cannot be written; or an unfinished run had other files
            or options.
        DataError: there is no such cache_precision, or not for this model.

    Cost: the packed weights and less than 1.5 GB of memory; two passes over the files. With `out` 1.5 GB and four times
    the largest weight in fp32; pages of files that are mapped are extra, and the system frees them where it needs
    memory.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder)
        >>> decoder_from_files(folder, precision="int8")(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 32])
    """
    check_choice(precision)
    check_cache_precision(cache_precision)
    check_max_error(max_error)
    if out is None and (overwrite or fresh):
        raise ModelError(f"{'overwrite' if overwrite else 'fresh'}= has no effect without out=: leave it out")
    files = language_model_weights(path)
    if out is None:
        return decoder_of_weights(files, precision, cache_precision, max_error=max_error)
    more: dict[str, Any] = {"overwrite": overwrite, "fresh": fresh, "max_error": max_error}
    return write_decoder(files, Path(path), precision, out, cache_precision, **more)[0]


def streamed_weights(path: str | Path) -> WeightFiles | None:
    """Return the weights of a language model that can be packed one at a time, None where a path has other things.

    Raises:
        ContainerError: the files are damaged.
    """
    try:
        return language_model_weights(path)
    except ModelError:
        return None


def language_model_weights(path: str | Path) -> WeightFiles:
    """Return the weights of a language model without reading them; see `decoder_from_files` for what is raised."""
    files = open_weights(path)
    name = type(files.model).__name__
    if not hf.is_causal_lm(files.model):
        raise ModelError(f"{path} holds a {name}, which is no causal language model")
    if any(is_hf_conv1d(m) for m in files.model.modules()):
        raise ModelError(
            f"{name} stores its weights transposed (Conv1D): load it with transformers, and pass the model"
        )
    return files


def check_choice(precision: str | None) -> None:
    """Raise ModelError for a precision in which weights are not packed."""
    if precision is not None and precision not in CHOICES:
        raise ModelError(unknown("precision", precision, CHOICES))


def decoder_of_weights(
    files: WeightFiles,
    precision: str | None,
    cache_precision: str = "fp32",
    hold: Any = None,
    max_error: float | None = None,
) -> Decoder:
    """Return the decoder of a language model's weights, as `decoder_from_files` does; `hold` stores packed weights, as
    in `select_kernels`."""
    weights = _Weights(files, precision or _own_precision(files))
    step = build_decoder(files.model, weights.precision, weights, hold)
    check_cache_precision(cache_precision, step.slots)
    with weights.reading():
        verify_decoder(files.model, step, weights.precision, max_error)
    step.forget()
    step.cache_precision = cache_precision
    trim_heap()
    return step


def write_decoder(
    files: WeightFiles,
    source: Path,
    precision: str | None,
    out: str | Path,
    cache_precision: str = "fp32",
    *,
    overwrite: bool,
    fresh: bool,
    max_error: float | None = None,
) -> tuple[Decoder, int]:
    """Write the decoder of a language model's weights to a folder; see `decoder_from_files`.

    Args:
        files: the weights.
        source: the folder or file that they are in.
        precision: as for `decoder_from_files`.
        out: the folder.
        cache_precision: as for `decoder_from_files`. A run that was killed resumes with another one as well.
        overwrite: replace an older folder.
        fresh: remove the state of an earlier run.
        max_error: as for `decoder_from_files`.

    Returns:
        The decoder, and the bytes of weights and index on disk.
    """
    before = fingerprint(source)
    key = {"rarefy": __version__, "precision": precision or _own_precision(files) or "fp32", "source": before}
    with packed_store(out, key, overwrite, fresh) as store:
        beside = engine_files(source)  # errors first
        try:
            step = decoder_of_weights(files, precision, cache_precision, store.hold, max_error)
        except FormatError as error:  # of a kernel, which has checked all indices of a file
            raise ContainerError(f"{store.folder}: {error}: {START_OVER.format(store.folder)}") from error
        if fingerprint(source) != before:
            raise ContainerError(f"{source} has changed while it was read: run again with files that do not change")
        receipt = getattr(files.model, "rarefy_receipt", None)
        size = save_compiled(step, out, receipt, None, beside, file_of=store.file_of, overwrite=overwrite)
    return step, size


def _own_precision(files: WeightFiles) -> str | None:
    quantized = getattr(files, "is_quantized", False)
    return "int8" if quantized else PRECISION_OF.get(files.dtype)


class _Weights:
    """The weights of a model whose parameters are addresses without memory, found again by these addresses."""

    def __init__(self, files: WeightFiles, precision: str | None):
        self.files, self.rounded = files, ROUNDED.get(precision or "")
        self.precision = "int8" if self.rounded else None if precision == "fp32" else precision
        model = files.model
        self.names: dict[int, str] = {}  # of placeholders, by their address
        self.mappings: list[mmap.mmap] = []
        ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        self.ends = {n for i, names in parameter_names(model).items() if i in ends for n in names}
        tied = model.config.tie_word_embeddings
        for name, old in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            if tied and name == "lm_head.weight":
                continue
            large = old.dim() > 1
            value = self._placeholder(name, old.shape) if large else files.weight(name)[0].float()
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        model.tie_weights()
        absent = next((n for n, b in model.named_buffers() if b.is_meta), None)
        if absent is not None:
            raise ModelError(f"{type(model).__name__} has the buffer {absent}, which cannot be built without weights")

    def _placeholder(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor at addresses that have no memory; it is never read."""
        memory = mmap.mmap(-1, max(4 * shape.numel(), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        self.mappings.append(memory)
        t = torch.frombuffer(memory, dtype=torch.float32).view(shape)
        self.names[t.untyped_storage().data_ptr()] = name
        return t

    def is_placeholder(self, t: Tensor) -> bool:
        """Return whether a tensor is a view of a weight that is not read yet."""
        return t.untyped_storage().data_ptr() in self.names

    def read(self, t: Tensor) -> tuple[Tensor, Grid | OffsetGrid | None]:
        """Return the values of a placeholder or of a view of one, in fp32, and the grid that they are on."""
        name = self.names[t.untyped_storage().data_ptr()]
        weight, grid = self._rounded(name)
        if t.dim() == weight.dim() == 2 and t.stride() == weight.stride() and t.shape[1] == weight.shape[1]:
            start = int(t.storage_offset()) // t.shape[1]
            rows = slice(start, start + len(t))
            return weight[rows], grid if grid is None or len(grid.scale) == 1 else grid.map(lambda s: s[rows])
        return weight.as_strided(t.shape, t.stride(), t.storage_offset()).contiguous(), None

    def _rounded(self, name: str) -> tuple[Tensor, Grid | OffsetGrid | None]:
        weight, grid = self.files.weight(name)
        weight = weight.float().contiguous()
        if self.rounded is None or grid is not None or name in self.ends or weight.dim() != 2:
            return weight, grid
        if weight.shape[1] % 32 == 0:
            grid = fit_grid(weight, (len(weight), weight.shape[1] // 32), self.rounded)
            weight = grid.snap(weight)
        return weight, grid

    def pack(self, t: Tensor) -> Any:
        """Return the packed form of a weight, made piece by piece of its rows."""
        weight, grid = self.read(t) if self.is_placeholder(t) else (t, None)
        if self.precision != "int8":
            return pack_weight(weight, self.precision, grid, False)
        rows = max(PIECE // weight.shape[1] // 64 * 64, 64)
        pieces = [self._pack_rows(weight, grid, start, rows) for start in range(0, len(weight), rows)]
        if len(pieces) > 1 and not all(isinstance(p, QuantizedPanels) for p in pieces):  # zeros are left out of some
            return pack_weight(weight, self.precision, grid, False)
        return pieces[0] if len(pieces) == 1 else join_rows(pieces)

    def _pack_rows(self, weight: Tensor, grid: Grid | OffsetGrid | None, start: int, rows: int) -> Any:
        part = grid if grid is None or len(grid.scale) == 1 else grid.map(lambda s: s[start : start + rows])
        return pack_weight(weight[start : start + rows], self.precision, part, False)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Have each module of the model read its weights when it runs, and release them afterwards."""
        hooks = []

        def load(module: nn.Module, _: Any) -> None:
            for p in module.parameters(recurse=False):
                if self.is_placeholder(p.data):
                    module._placeholders = [*getattr(module, "_placeholders", []), (p, p.data)]  # type: ignore[assignment]
                    p.data = self.read(p.data)[0]

        def release(module: nn.Module, *_: Any) -> None:
            for p, data in module.__dict__.pop("_placeholders", []):
                p.data = data

        for module in self.files.model.modules():
            hooks += [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
