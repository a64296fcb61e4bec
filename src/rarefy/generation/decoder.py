"""Language models: a step that reads the next tokens of a cache, and writing with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, unknown
from rarefy.compiler import compile
from rarefy.compiler import export as rules
from rarefy.compiler.compile import EXACT, ROUNDED, check_module, check_ready, in_torch
from rarefy.compiler.executor import Compiled, expected
from rarefy.compiler.kernel_selection import kernels_of
from rarefy.compiler.program import MOST_FEW
from rarefy.compiler.verify import apart
from rarefy.generation.kv_cache import TILE, Cache
from rarefy.model import hf
from rarefy.model.activation_quant import suspended
from rarefy.model.quant_grid import Grid
from rarefy.runtime.candidates import MIN_ZEROS, grid_of, why_not_quantized
from rarefy.runtime.packing import pack_bitmask, pack_panels

SHOWN = 7  # tokens that a model is exported and proved with


def decoder(model: nn.Module, *, values: str | None = None) -> Decoder:
    """Return a language model of transformers' as a step that reads the next tokens of a cache, and writes text.

    values  "int8": products run in 8 bits, weights with a scale for each output and inputs with one for each token;
            None: fp32, or the numbers that the model was quantized to; layers whose inputs are rounded
            (`quantize_(activations="int8")`) run in 8 bits
    One packed copy of each weight, its zeros left out, serves single tokens and whole prompts. Raises ModelError for
    what is no language model, whose attention is its own code, in training mode, or with masks not folded. O(weights),
    and ten seconds for the export.
    """
    if values not in (None, "int8"):
        raise ModelError(unknown("values", str(values), ["int8"]))
    check_module(model)
    if not hf.is_causal_lm(model):
        raise ModelError(f"{type(model).__name__} is no language model of transformers: rarefy.compile takes others")
    check_ready(model)
    with suspended(model) as rounded:
        made = _made(model, values, rounded)
        _prove(model, made, ROUNDED if values or rounded else EXACT)
    made.compiled.forget()
    return made


def _made(model: Any, values: str | None, rounded: frozenset[str]) -> Decoder:
    """The decoder of a model; where numbers are rounded, its graph is proved without them first."""
    with hf.attending(model, _attend), torch.no_grad():
        shown = torch.arange(2 * SHOWN).view(2, SHOWN), torch.arange(SHOWN).repeat(2, 1), torch.arange(3)
        traced = rules.trace(Step(model), shown, {}, compile.PASSES, type(model).__name__)
    if not traced.kept:
        raise ModelError(f"{type(model).__name__} has no attention that a cache can serve")
    grids = {
        f"model.{n}": grid_of(m) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)
    }
    config = model.config.get_text_config()
    settings = getattr(model, "generation_config", config)
    ends = settings.eos_token_id if settings.eos_token_id is not None else []
    many, first = config.vocab_size, tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    known = tuple(e for e in first if 0 <= e < many)  # some configs name tokens that no logit is for
    pad = settings.pad_token_id if settings.pad_token_id is not None else -1
    pad = pad if 0 <= pad < many else (*known, 0)[0]
    about = many, getattr(config, "max_position_embeddings", None), known, pad
    want = [expected(n.meta.get("val")) for n in traced.inputs]
    if values or rounded:
        _prove(model, Decoder(in_torch(traced, want), *about), EXACT)

    def pack(weight: Tensor, name: str) -> Any:
        layer = name.removesuffix(".weight")
        precision = "int8" if layer.removeprefix("model.") in rounded else values
        return _packed(weight, precision, grids.get(layer))

    kernels = kernels_of(traced, pack)
    return Decoder(Compiled(traced, kernels, want), *about)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **how: Any) -> Any:
    """transformers' attention as a call of rarefy::recall."""
    for name in ("softcap", "s_aux", "position_bias"):
        if how.get(name) is not None:
            raise ModelError(f"{type(module).__name__} has {name}: no kernel for that yet")
    if q.shape[3] != v.shape[3] or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} is no causal attention of keys as wide as values")
    scale = q.shape[3] ** -0.5 if scaling is None else float(scaling)
    return torch.ops.rarefy.recall(q, k, v, scale, int(how.get("sliding_window") or 0)), None


class Step(nn.Module):
    """What is exported: logits of tokens `keep`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        return self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits


def check_ids(ids: Any) -> None:
    """Raise DataError for what are no tokens of texts."""
    if not isinstance(ids, Tensor):
        raise DataError(f"ids are an int64 tensor [batch, tokens], got {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise DataError(f"ids are int64 [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    if not ids.numel():
        raise DataError(f"the prompt is empty: ids are {list(ids.shape)}")


class Decoder:
    """A language model with a cache; see `decoder`.

    compiled    the step: logits of ids, their positions, and which of them are asked for
    vocabulary  ids are below it
    most        tokens of a text, by the model's positions; None where they have no end
    ends        tokens that end a text
    pad         what lies behind a text that has ended
    """

    def __init__(self, made: Compiled, vocabulary: int, most: int | None, ends: tuple[int, ...], pad: int):
        self.compiled, self.vocabulary, self.most, self.ends, self.pad = made, vocabulary, most, ends, pad

    def cache(self, batch: int, capacity: int, mask: Tensor | None = None) -> Cache:
        """Return an empty cache for so many sequences of at most so many tokens. mask [batch, tokens]: 0 where a prompt
        was filled up on the left. DataError for one that has zeros elsewhere, or other numbers than zeros and ones;
        MemoryError where there is no room."""
        starts = None
        if mask is not None:
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise DataError("attention_mask is 0 where a prompt was filled up, and 1 elsewhere; got other numbers")
            starts = (mask == 0).sum(1)
            filled = torch.arange(mask.shape[1]) >= starts[:, None]
            if mask.dim() != 2 or len(mask) != batch or not torch.equal(filled, mask != 0):
                raise DataError("prompts are to be filled up on the left: mask has zeros after a one")
            if int(starts.max()) == mask.shape[1]:
                raise DataError("a prompt is empty: its mask has no one")
        return Cache(
            self.compiled.exported.kept, batch, capacity, starts if starts is not None and starts.any() else None
        )

    def __call__(self, ids: Tensor, cache: Cache | None = None, *, last: bool = False) -> Tensor:
        """Return the logits [batch, tokens, vocabulary] of the next tokens; of the last one alone if asked for.

        Without a cache they are a text of their own. DataError where ids are none of the vocabulary, or do not fit the
        cache.
        """
        check_ids(ids)
        least, most = (int(i) for i in ids.aminmax())
        if least < 0 or most >= self.vocabulary:
            raise DataError(f"ids lie in 0..{self.vocabulary - 1}, got {least if least < 0 else most}")
        batch, tokens = ids.shape
        cache = self.cache(batch, tokens) if cache is None else cache
        if batch != cache.batch or cache.features != self.compiled.exported.kept:
            raise DataError(f"the cache is for {cache.batch} sequences, got {batch}, or for another model")
        if cache.past + tokens > cache.most:
            raise DataError(
                f"the cache holds {cache.most} tokens, {cache.past} are there and {tokens} more are too many: "
                "make it larger, decoder.cache(batch, capacity)"
            )
        # fewer sizes, fewer plans: what is added is read by nobody, and overwritten
        wide = -(-tokens // TILE) * TILE if batch * tokens > MOST_FEW else tokens
        wide = min(wide, cache.capacity - cache.past)
        padded = nn.functional.pad(ids, (0, wide - tokens))
        positions = cache.past + torch.arange(wide).expand(batch, -1)
        if cache.starts is not None:
            positions = (positions - cache.starts[:, None]).clamp(min=0)
        keep = torch.tensor([tokens - 1]) if last else torch.arange(tokens)
        logits = self.compiled.run([padded, positions, keep], cache)[0]
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (batch, len(keep)):
            raise ModelError("the saved graph does not fit together: its step gives no logits")
        cache.past += tokens
        return logits

    def stream(self, ids: Tensor, new: int, choose: Any, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the next token [batch] of each sequence, up to `new` of them, as `choose(logits, ids so far)` picks
        them; until all have ended."""
        batch, tokens = ids.shape
        cache = self.cache(batch, tokens + new, mask)
        done = torch.zeros(batch, dtype=torch.bool)
        ends = torch.tensor(self.ends, dtype=torch.int64)
        so_far, fed = ids if mask is None else torch.where(mask == 0, ids[:, -1:], ids), ids  # filling is no text
        for _ in range(new):
            logits = self(fed, cache, last=True)[:, -1]
            token = torch.where(done, self.pad, choose(logits, so_far))
            yield token
            done = done | torch.isin(token, ends)
            if done.all():
                return
            fed = token[:, None]
            so_far = torch.cat([so_far, fed], 1)

    def __repr__(self) -> str:
        return f"a language model's step, {self.compiled.exported.kept} numbers kept of a token\n{self.compiled}"


def _packed(weight: Tensor, values: str | None, grid: Grid | None) -> Any:
    """A weight for few inputs: as panels where it is whole numbers with few zeros among them, else as a bitmask."""
    zeros = float((weight == 0).float().mean())
    if grid is not None and why_not_quantized(weight, grid) is None and (zeros < MIN_ZEROS or grid.scale.shape[1] > 1):
        return pack_panels(weight, grid, values is None)
    if values is None:
        return pack_bitmask(weight)
    if zeros >= MIN_ZEROS:
        return pack_bitmask(weight, values, grid)
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return pack_panels(weight, Grid(8, scale), False)


def _prove(model: Any, made: Decoder, most: float) -> None:
    """Read a text at once, in pieces and token by token; ModelError if logits are further apart than `most`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, made.vocabulary, (1, 3 * SHOWN), generator=generator)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    cache = made.cache(1, ids.shape[1])
    pieces = [made(ids[:, a:b], cache) for a, b in ((0, 13), (13, 20), (20, 21))]
    for got in (made(ids), torch.cat(pieces, 1)):
        far = apart(want, got)
        if not far <= most:
            raise ModelError(
                f"the decoder of {type(model).__name__} gives other logits, {far:.2g} of their length apart"
            )
