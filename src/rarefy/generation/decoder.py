"""Language models on the engine: a decoding step that reads and extends a KV cache, and text generation with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, OutputsDifferError
from rarefy.common.renamed import renamed_parameters
from rarefy.compiler import ops
from rarefy.compiler.calibrate import in_torch
from rarefy.compiler.compile import PASSES
from rarefy.compiler.executor import Compiled
from rarefy.compiler.export import export_graph
from rarefy.compiler.fx_utils import ExportedGraph
from rarefy.compiler.half_precision import copy_in_fp32, precision_to_run
from rarefy.compiler.input_checks import input_spec, readable_guards
from rarefy.compiler.kernel_selection import select_kernels
from rarefy.compiler.model_checks import check_module, check_precision, check_ready, fold_copy
from rarefy.compiler.profile import Profile, Recorder
from rarefy.compiler.program import VECTOR
from rarefy.compiler.row_layout import few_tokens
from rarefy.compiler.tolerance import FAR, check_max_error, tolerance, warn_of_error
from rarefy.compiler.traced_graph import once_more
from rarefy.generation.kv_cache import TILE, Cache, check_cache_precision, slots_of
from rarefy.generation.options import checked_defaults, model_defaults
from rarefy.generation.request import check_ids, generate_ids, stream_steps
from rarefy.generation.token_step import TokenStep
from rarefy.generation.weight_format import pack_weight
from rarefy.model import hf
from rarefy.model.activation_quant import suspended
from rarefy.model.compare import relative_distance
from rarefy.model.layout import is_hf_conv1d
from rarefy.model.quant_grid import Grid, OffsetGrid
from rarefy.runtime.candidates import grid_of
from rarefy.runtime.native_calls import without_modes

RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")  # types of models of transformers
EXAMPLE_TOKENS = 7  # tokens with which a model is exported; three times as many verify the decoder


@renamed_parameters(values="precision")
def decoder(
    model: nn.Module, *, precision: str | None = None, cache_precision: str = "fp32", max_error: float | None = None
) -> Decoder:
    """Return a language model as a decoding step with a KV cache on the engine.

    One packed copy of each weight serves single tokens and whole prompts; zeros are left out where that is faster.
    Logits are compared with the model's before the decoder is returned.

    Args:
        model: a causal language model of transformers in evaluation mode, on the CPU, in fp32, bf16 or fp16. Masks and
            quantization grids that are still attached are folded in a copy, and `print(decoder)` says so; the model
            keeps them.
        precision: None for that of the model, or that which it was quantized to; models in fp16 run in fp32, layers
            whose inputs are rounded (`quantize_(activations="int8")`) in 8 bits. "fp32" runs a model in bf16 in fp32
            too. "bf16" keeps weights in bfloat16, so that single tokens read half the bytes; logits stay in fp32.
            "int8" runs all linear layers in 8 bits, with a scale for each output of a weight and one for each token of
            inputs. The rounding error of the inputs is rounded to 8 bits as well and added, except in layers whose
            zeros are skipped; timing decides which. On AVX-512 without AMX, prompts have a scale for each 32 inputs
            instead, and attention in bf16 unless the cache is in 8 bits.
        cache_precision: of the KV cache, where a call does not say: "fp32", or "int8" for a quarter of its memory.
        max_error: the largest relative distance of logits on random tokens. None for 0.001 in fp32, 0.1 in bf16, and
            0.2 in int8, where there is a warning from 0.1.

    Returns:
        A `Decoder`, which `generate` and `stream` take, and `save` writes.

    Raises:
        ModelError: if this is no language model of transformers, its attention is code that is not known, it is in
            training mode, not on the CPU, has parameters of several types, or logits differ from the model's.
        DataError: if there is no such cache_precision, or not for this model.

    Cost: about ten seconds for the export, and at first half a second for each tenth of zeros. Memory: the packed
    weights beside the model's own, which may be deleted afterwards; a cache takes 4 bytes for each key and value of
    each token and layer, in "int8" hardly more than one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
        >>> step = decoder(model)
        >>> step(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 32])
    """
    check_precision(precision, ("fp32", "bf16", "int8"))
    check_cache_precision(cache_precision)
    check_max_error(max_error)
    check_module(model)
    if not hf.is_causal_lm(model):
        raise ModelError(
            f"expected a language model of transformers, got {type(model).__name__}: use rarefy.compile for it"
        )
    model, notes = fold_copy(model)
    dtype = check_ready(model)
    runs_in = precision_to_run(precision, dtype)
    if dtype != torch.float32:
        model = copy_in_fp32(model)
    with suspended(model) as rounded:
        step = once_more(lambda: _verified(model, runs_in, rounded, notes, cache_precision, max_error))
    step.forget()
    step.cache_precision = cache_precision
    return step


def _verified(
    model: Any,
    precision: str | None,
    rounded: frozenset[str],
    notes: tuple[str, ...],
    cache: str,
    max_error: float | None,
) -> Decoder:
    """Return the decoder of a model, whose logits are compared with the model's; `cache` is its cache's precision."""
    step = _build(model, precision, rounded, notes)
    check_cache_precision(cache, step.slots)
    verify_decoder(model, step, "int8" if rounded else precision, max_error)
    return step


def _build(model: Any, precision: str | None, rounded: frozenset[str], notes: tuple[str, ...]) -> Decoder:
    """Return the decoder of a model. Where numbers are rounded, its graph is first verified without rounding.

    rounded are the names of layers whose inputs are rounded to 8 bits.
    """
    exported = _export(model)
    exported.notes += notes
    specs = [input_spec(n.meta.get("val")) for n in exported.inputs]
    numbers = _token_numbers(model)
    if precision or rounded:
        verify_decoder(model, Decoder(in_torch(exported, specs), **numbers), None)
    weighted = ((n, m) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor))
    grids = {n: _grid_of(m) for n, m in weighted}

    def pack(weight: Tensor, node: Any, _: Grid | None) -> Any:
        layer = exported.layers.get(node, "")
        grid = grids.get(layer)
        if grid is not None and not grid.contains(weight):  # a part of a layer, such as its queries
            grid = None
        return pack_weight(weight, "int8" if layer in rounded else precision, grid, layer in rounded)

    kernels = select_kernels(exported, pack)
    return Decoder(Compiled(exported, kernels, specs), **numbers)


def _check_attention(model: Any) -> None:
    """Raise ModelError for a model whose attention cannot use a KV cache; its export would fail or say less."""
    name, kind = type(model).__name__, getattr(model.config, "model_type", "")
    if kind in RECURRENT:
        raise ModelError(f"{name} has recurrent layers in place of attention, which decoders do not support")
    if getattr(model.config, "alibi", False):
        raise ModelError(f"{name} adds position biases (ALiBi) in attention of its own, which decoders do not support")


class LazyWeights(Protocol):
    """Weights that are read when they are packed; until then the model has placeholders in their place."""

    def is_placeholder(self, t: Tensor) -> bool:
        """Return whether a tensor is a placeholder, or a view of one."""
        ...

    def read(self, t: Tensor) -> tuple[Tensor, Grid | OffsetGrid | None]:
        """Return the values of a placeholder or of its view, in fp32, and the grid that they are on."""
        ...

    def pack(self, t: Tensor) -> Any:
        """Return the packed weight of a linear layer."""
        ...


def build_decoder(model: Any, precision: str | None, weights: LazyWeights, hold: Any = None) -> Decoder:
    """Return the decoder of a model whose large weights are placeholders, not verified.

    Each weight is read and packed before the next is read. In "int8" the embedding is packed too. `hold` stores packed
    weights, as in `select_kernels`.

    Raises:
        ModelError: the engine cannot run the model.
    """
    exported = _export(model, again=False)  # nobody would notice a wrong one
    specs = [input_spec(n.meta.get("val")) for n in exported.inputs]
    constants = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in exported.constants]
    kernels = select_kernels(
        exported,
        lambda weight, node, grid: weights.pack(weight),
        lambda node: "int8" if precision == "int8" and node.target is ops.embedding else None,
        read=lambda t: _values(t, weights),
        hold=hold,
    )
    for node in constants:
        if not all(u in kernels for u in node.users):
            exported.constants[node.name] = _values(exported.constants[node.name], weights)
    return Decoder(Compiled(exported, kernels, specs), **_token_numbers(model))


def _values(t: Tensor, weights: LazyWeights) -> Tensor:
    return weights.read(t)[0] if weights.is_placeholder(t) else t


def _export(model: Any, again: bool = True) -> ExportedGraph:
    """Return the graph of a model's decoding step, `again` one that an earlier model had; ModelError if it cannot use a
    KV cache."""
    _check_attention(model)
    tokens = EXAMPLE_TOKENS
    example = torch.arange(2 * tokens).view(2, tokens), torch.arange(tokens).repeat(2, 1), torch.arange(3)
    with hf.attending(model, _attend), torch.no_grad():
        exported = export_graph(_Step(model), example, {}, PASSES, type(model).__name__, again=again)
    if not exported.cache_features:
        raise ModelError(f"{type(model).__name__} has no attention that can use a KV cache")
    if exported.guards or any(low > 1 for low, _ in exported.ranges.values()):
        names = ("input_ids", "position_ids", "logits_to_keep")
        inputs = [(n, input_spec(i.meta.get("val"))) for n, i in zip(names, exported.inputs)]
        conditions = ", ".join(readable_guards(exported.guards, inputs)) or "not 1"
        raise ModelError(
            f"{type(model).__name__}: its code takes other branches for other numbers of tokens or texts "
            f"({conditions}), which decoders do not support: compile(model, example) compiles it without a KV cache"
        )
    exported.notes += model_defaults(getattr(model, "generation_config", None))[1]
    exported.layers = {n: name.removeprefix("model.") for n, name in exported.layers.items()}  # `_Step` calls it so
    return exported


def _token_numbers(model: Any) -> dict[str, Any]:
    """Return what a `Decoder` needs of a model's configuration."""
    config = model.config.get_text_config()
    settings = getattr(model, "generation_config", config)
    vocab_size = config.vocab_size
    eos = settings.eos_token_id if settings.eos_token_id is not None else []
    eos = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = settings.pad_token_id if settings.pad_token_id is not None else -1
    wrong = next((t for t in (*eos, pad) if isinstance(t, bool) or not isinstance(t, Integral)), None)
    if wrong is not None:
        raise ModelError(f"generation_config: expected token ids as eos_token_id and pad_token_id, got {wrong!r}")
    eos = tuple(e for e in eos if 0 <= e < vocab_size)  # some configurations name tokens outside of the vocabulary
    return {
        "vocab_size": vocab_size,
        "max_tokens": getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None),
        "eos_tokens": eos,
        "pad_token": pad if 0 <= pad < vocab_size else (*eos, 0)[0],
        "generation_defaults": model_defaults(getattr(model, "generation_config", None))[0],
    }


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **options: Any) -> Any:
    """Stand in for transformers' attention with rarefy::cached_attention; q is [batch, heads, tokens, head_dim]."""
    name = type(module).__name__
    for option, feature in (("s_aux", "attention sinks"), ("position_bias", "position biases in attention")):
        if options.get(option) is not None:
            raise ModelError(f"{name} has {feature} ({option}), which decoders do not support")
    if q.shape[3] != v.shape[3] or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{name}: the engine supports only causal attention whose keys and values have equal sizes")
    scale = q.shape[3] ** -0.5 if scaling is None else float(scaling)
    window = int(options.get("sliding_window") or 0)
    cap = float(options.get("softcap") or 0)
    return torch.ops.rarefy.cached_attention(q, k, v, scale, window, cap, float(options.get("max_bias") or 0)), None


class _Step(nn.Module):
    """The module that is exported: logits of the tokens that `keep` lists."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits


class Decoder:
    """A language model's decoding step with a KV cache; made by `decoder`, or by `load` from a folder.

    Attributes:
        compiled: the step, from ids, their positions and the tokens whose logits are wanted to logits.
        vocab_size: ids are smaller than this.
        max_tokens: tokens that a text may have, by the model's positions; None where there is no limit.
        eos_tokens: tokens that end a text.
        pad_token: follows a text that has ended.
        generation_defaults: options of `generate` that the model's `generation_config` sets.
        cache_precision: of KV caches, where a call does not say: "fp32" or "int8".
        slots: where a cache stores the keys and values of each layer.
    """

    def __init__(
        self,
        compiled: Compiled,
        vocab_size: int,
        max_tokens: int | None,
        eos_tokens: tuple[int, ...],
        pad_token: int,
        generation_defaults: Mapping[str, Any] | None = None,
        cache_precision: str = "fp32",
    ):
        self.slots = tuple(slots_of(compiled.exported.graph))
        check_cache_precision(cache_precision, self.slots)
        self.compiled, self.vocab_size, self.max_tokens = compiled, vocab_size, max_tokens
        self.eos_tokens, self.pad_token = eos_tokens, pad_token
        self.generation_defaults = checked_defaults(generation_defaults or {})
        self.cache_precision = cache_precision
        self._token_step: TokenStep | None = None  # made by the first token

    def eval(self) -> Decoder:
        """Return the decoder: it is always in evaluation mode. There is no `train()`, because it cannot be trained."""
        return self

    @without_modes
    def cache(self, batch: int, capacity: int, mask: Tensor | None = None, cache_precision: str | None = None) -> Cache:
        """Return an empty KV cache.

        Args:
            batch: number of sequences.
            capacity: most tokens of a sequence.
            mask: [batch, tokens] of prompts of different lengths: 0 for padding, which must be on the left, else 1.
            cache_precision: "fp32", or "int8" for codes with a scale for each token and head; None for the decoder's.

        Raises:
            DataError: if the mask has other numbers, padding elsewhere, or a prompt of padding alone, or if the cache
                cannot have this precision.
            MemoryError: if there is not enough memory.
        """
        starts = None
        if mask is not None:
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise DataError("expected attention_mask with 0 for padding and 1 for tokens, got other numbers")
            starts = (mask == 0).sum(1)
            left_padded = torch.arange(mask.shape[1]) >= starts[:, None]
            if mask.dim() != 2 or len(mask) != batch or not torch.equal(left_padded, mask != 0):
                raise DataError("prompts must be padded on the left: attention_mask has zeros after a one")
            if int(starts.max()) == mask.shape[1]:
                raise DataError("a prompt is empty: its attention_mask has no one")
        padded = starts is not None and bool(starts.any())
        features = self.compiled.exported.cache_features
        precision = self.cache_precision if cache_precision is None else cache_precision
        return Cache(features, batch, capacity, starts if padded else None, self.slots, precision)

    @without_modes
    def __call__(self, ids: Tensor, cache: Cache | None = None, *, last: bool = False) -> Tensor:
        """Return the logits of the next tokens, and append these to the cache.

        Args:
            ids: int64 [batch, tokens].
            cache: from `cache`; None for a text of its own.
            last: return the logits of the last token alone.

        Returns:
            [batch, tokens, vocab_size], or [batch, 1, vocab_size].

        Raises:
            DataError: if ids are outside of the vocabulary, or do not fit the cache.
        """
        return self._run(ids, cache, last, None)

    def profile(
        self, ids: Tensor, cache: Cache | None = None, *, last: bool = True, repeats: int = 20, warmup: int = 3
    ) -> Profile:
        """Return where the time of reading tokens goes: each operator and layer, and what limits it.

        Args:
            ids: int64 [batch, tokens], a prompt or the last token.
            cache: from `cache`, with the tokens before these; it stays as it is. None for a text of its own.
            last: compute the logits of the last token alone.
            repeats: number of timed calls; times are means over the calls in the middle half by their whole time.
            warmup: number of calls before those.

        Returns:
            A `Profile`, as `Compiled.profile` does. `print` it.

        Raises:
            DataError: as a call does, or if repeats or warmup are too small.

        Cost: repeats + warmup + 1 calls, and half a second for the machine's ceilings.
        """
        check_ids(ids)
        cache = self.cache(len(ids), ids.shape[1]) if cache is None else cache
        past, step = cache.past, self._step_of_token(ids, cache)

        def call(recorder: Recorder) -> None:
            self._run(ids, cache, last, recorder)
            cache.past = past

        return (self.compiled if step is None else step.compiled).profile_calls(call, repeats, warmup)

    def forget(self) -> None:
        """Free the working memory of earlier calls; the next call of each shape allocates it again."""
        self.compiled.forget()
        self._token_step = None

    def _step_of_token(self, ids: Tensor, cache: Cache) -> TokenStep | None:
        """Return the step that reads one token of each sequence without padding, None where there are more."""
        if ids.shape[1] != 1 or cache.starts is not None:
            return None
        self._token_step = self._token_step or TokenStep(self.compiled)
        return self._token_step

    def _run(self, ids: Tensor, cache: Cache | None, last: bool, recorder: Recorder | None) -> Tensor:
        check_ids(ids)
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise DataError(f"expected ids in 0..{self.vocab_size - 1}, got {low if low < 0 else high}")
        batch, tokens = ids.shape
        cache = self.cache(batch, tokens) if cache is None else cache
        self._check_cache(cache, batch, tokens)
        step = self._step_of_token(ids, cache)
        if step is not None:
            cache.reserve(1)
            return self._read(cache, 1, 1, step.run(ids, cache, recorder))
        # padding keeps the number of shapes small; what is appended is not read, and overwritten later
        padded = tokens if few_tokens((batch, tokens)) else padded_length(tokens)
        padded = min(padded, cache.capacity - cache.past)
        cache.reserve(padded)
        # padding has the last token's position: a table of positions may end before the padding does
        positions = cache.past + torch.arange(padded).clamp(max=tokens - 1).expand(batch, -1)
        if cache.starts is not None:
            positions = (positions - cache.starts[:, None]).clamp(min=0)
        keep = torch.tensor([tokens - 1], dtype=torch.int64) if last else torch.arange(tokens)
        leaves = [nn.functional.pad(ids, (0, padded - tokens)), positions, keep]
        return self._read(cache, tokens, len(keep), self.compiled.run_leaves(leaves, cache, recorder)[0])

    def _read(self, cache: Cache, tokens: int, count: int, logits: Any) -> Tensor:
        """Return the logits of `count` tokens, and let the cache have as many as were read."""
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (cache.batch, count):
            raise ModelError("the saved graph is inconsistent: its step returns no logits")
        cache.past += tokens
        return logits

    def _check_cache(self, cache: Cache, batch: int, tokens: int) -> None:
        if cache.slots != self.slots:
            raise DataError("the cache is of another model: make one with cache() of this decoder")
        if batch != cache.batch:
            raise DataError(f"the cache is for {cache.batch} sequences, got {batch}: make one for {batch}")
        if cache.past > cache.reserved:
            raise DataError(
                f"the cache has read {cache.reserved} tokens at most, so its past cannot be {cache.past}: it may only "
                "be set back"
            )
        if cache.past + tokens > cache.max_tokens:
            raise DataError(
                f"the cache has room for {cache.max_tokens} tokens; it holds {cache.past}, so {tokens} more are too "
                "many: make it larger, decoder.cache(batch, capacity)"
            )

    def generate(self, ids: Tensor | None = None, **options: Any) -> Any:
        """Return prompts with the text that follows, as `rarefy.generate(decoder, ids, **options)` does."""
        return generate_ids(self, ids, **options)

    def stream(self, ids: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """Yield the next token of each text, as `rarefy.stream(decoder, ids, **options)` does."""
        return (step.tokens for step in stream_steps(self, ids, **options))

    def __repr__(self) -> str:
        features, packed = self.compiled.exported.cache_features, [k.held[0] for k in self.compiled.kernels.values()]
        kinds = Counter(p.kind for p in {p.values.data_ptr(): p for p in packed}.values())
        weights = "".join(f", {count} weights in {kind}" for kind, count in kinds.most_common())
        return f"language model step{weights}, {features} numbers of a token in the cache\n{self.compiled}"


def padded_length(tokens: int) -> int:
    """Return the length to which prompts of so many tokens are padded: a multiple of 16, 32 or 64.

    >>> [padded_length(n) for n in (5, 100, 130, 250, 300)]
    [16, 112, 160, 256, 320]
    """
    step = VECTOR if tokens <= 2 * TILE else 2 * VECTOR if tokens <= 4 * TILE else TILE
    return -(-tokens // step) * step


def _grid_of(module: nn.Module) -> Grid | None:
    """Return the grid of a layer's weight [outputs, inputs], also of a layer that stores it the other way round."""
    grid = grid_of(module)
    return grid.map(Tensor.t) if grid is not None and is_hf_conv1d(module) else grid


def verify_decoder(model: Any, step: Decoder, precision: str | None, max_error: float | None = None) -> None:
    """Read a text of random tokens at once, in pieces and token by token; OutputsDifferError unless all logits are the
    model's, and a warning where they are far from them in 8 bits."""
    generator = torch.Generator().manual_seed(0)
    tokens = min(3 * EXAMPLE_TOKENS, step.max_tokens or 3 * EXAMPLE_TOKENS)
    ids = torch.randint(0, step.vocab_size, (1, tokens), generator=generator)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    cache = step.cache(1, tokens)
    ends = sorted({tokens * 13 // 21, tokens * 20 // 21, tokens} - {0})
    pieces = [step(ids[:, a:b], cache) for a, b in zip([0, *ends], ends)]
    d = max(relative_distance(logits, want) for logits in (step(ids), torch.cat(pieces, 1)))
    allowed = tolerance(step.compiled.exported, precision, max_error)
    if not d <= allowed:
        raise OutputsDifferError(
            f"logits of the decoder of {type(model).__name__} differ: relative distance {d:.2g}, "
            f"at most {allowed:g} is allowed: choose a more exact precision, or accept more with max_error="
        )
    if precision == "int8" and max_error is None and d > FAR:
        warn_of_error(d, "What helps: precision='bf16'; max_error= accepts more")
