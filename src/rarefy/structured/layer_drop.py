"""`drop_layers_`: remove whole blocks from lists of equal blocks, those that matter least.

similarity  1 - cos(input, output) of a block, averaged over tokens (block influence; ShortGPT, Men 2024, eq. 1)
loss        increase of the loss when the block is skipped
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, SelectorError, nearest
from rarefy.common.progress import track
from rarefy.common.report import Report
from rarefy.model.attached_receipt import forget_receipt
from rarefy.model.batches import count_tokens, tensors_in
from rarefy.model.block_lists import TIED, block_indices, block_lists
from rarefy.model.forward import call, evaluating, on_device, temporary_hooks
from rarefy.model.layers import unwrap
from rarefy.model.losses import Loss, check_finite, resolve_loss
from rarefy.structured.consumers import run_batches
from rarefy.structured.hf_config import shrink_config_lists, update_config
from rarefy.structured.optimizer_state import check_optimizer, remove_parameters
from rarefy.structured.options import DropLayersOptions, check_repeatable, check_unmasked
from rarefy.structured.structure_record import NUMBERS, keep_blocks, record_kept_blocks, record_restorer
from rarefy.structured.surgery import Removal, outputs, verify


@dataclass(frozen=True, eq=False)
class Block:
    """A member of a list of blocks."""

    stack: str
    number: int
    module: nn.Module
    key: str  # its own name in the list, in most lists the number

    @property
    def name(self) -> str:
        """Return the block's name."""
        return f"{self.stack}.{self.key}" if self.stack else self.key


def droppable(model: nn.Module, example: Any) -> list[Block]:
    """Return the blocks whose output has the shape of their input: the rest of the model still fits without them."""
    blocks = [Block(n, i, s[i], list(s._modules)[i]) for n, s in block_lists(model).items() for i in block_indices(s)]
    fits: dict[nn.Module, bool] = {}

    def compare(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        x, y = _first([args, kwargs]), _first(out)
        same = x is not None and y is not None and (x.shape, x.dtype) == (y.shape, y.dtype)
        fits[module] = fits.get(module, True) and same

    with temporary_hooks([b.module.register_forward_hook(compare, with_kwargs=True) for b in blocks]):
        outputs(model, example)
    return [b for b in blocks if fits.get(b.module)]


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of a value, or None."""
    tensors = tensors_in(value)
    return tensors[0] if tensors else None


@contextmanager
def skipping(blocks: Iterable[Block]) -> Iterator[None]:
    """Run with blocks that return their input."""

    def skip(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x = _first([args, kwargs])
        if isinstance(out, tuple | list):
            rest = [x, *out[1:]]
            return type(out)(*rest) if hasattr(out, "_fields") else type(out)(rest)
        return x

    with temporary_hooks([b.module.register_forward_hook(skip, with_kwargs=True) for b in blocks]):
        yield


def layer_scores(
    model: nn.Module,
    blocks: Sequence[Block],
    score: str,
    data: Iterable[Any],
    loss: Loss | None,
    seed: int,
    *,
    progress: bool = False,
) -> Tensor:
    """Return the importance of each block, fp64 [blocks]. O(calls), for `loss` times the blocks."""
    if score == "random":
        return torch.rand(len(blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if score == "similarity":
        return _similarity(model, blocks, data)
    base = _loss(model, data, loss)
    out = []
    for block in track(blocks, "skipping blocks", progress):
        with skipping([block]):
            out.append(_loss(model, data, loss) - base)
    return torch.tensor(out, dtype=torch.float64)


def _loss(model: nn.Module, data: Iterable[Any], loss: Loss | None) -> float:
    """Return the mean loss over the data, weighted by tokens."""
    total, weight = 0.0, 0
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(data):
            batch = on_device(model, batch)
            num_tokens = count_tokens(batch)
            total += num_tokens * float(check_finite(resolve_loss(loss)(call(model, batch), batch), index))
            weight += num_tokens
    if not weight:
        raise DataError("the data is empty: the score needs at least one batch")
    return total / weight


def _similarity(model: nn.Module, blocks: Sequence[Block], data: Iterable[Any]) -> Tensor:
    """Return 1 - cos(input, output) of each block, averaged over tokens."""
    sums, counts = torch.zeros(len(blocks), dtype=torch.float64), torch.zeros(len(blocks), dtype=torch.float64)
    padding: list[Tensor | None] = [None]

    def recorder(i: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            x, y = _first([args, kwargs]), _first(out)
            assert x is not None and y is not None
            axis = 1 if x.dim() == 4 and images[i] else -1
            distance = 1 - F.cosine_similarity(x.float(), y.float(), dim=axis)
            mask = padding[0]
            distance = distance[mask] if mask is not None and mask.shape == distance.shape else distance
            sums[i] += float(distance.sum(dtype=torch.float64))
            counts[i] += distance.numel()

        return hook

    images = [any(isinstance(m, nn.Conv2d) for m in b.module.modules()) for b in blocks]
    with temporary_hooks([b.module.register_forward_hook(recorder(i), with_kwargs=True) for i, b in enumerate(blocks)]):
        run_batches(model, data, padding)
    unreached = [b.name for b, n in zip(blocks, counts) if not n]
    if unreached:
        raise DataError(f"no batch of the data reaches {unreached[0]}: the score needs at least one")
    return sums / counts


def drop_blocks(model: nn.Module, example: Any, blocks: Sequence[Block], *, stay: bool = False) -> Removal:
    """Remove blocks, and verify that the model returns what it does when it skips them.

    With `stay` they are put back. Raises ModelError; the model is then unchanged.
    """
    with skipping(blocks):
        reference = outputs(model, example)
    removal = Removal(model)
    removal.undo.append(record_restorer(model))
    try:
        for name, block_list in block_lists(model).items():
            dropped = {b.number for b in blocks if b.stack == name}
            if dropped:
                kept_blocks = [i for i in range(len(block_list)) if i not in dropped]
                removal.undo += shrink_config_lists(model, kept_blocks, len(block_list))
                keys = list(block_list._modules)
                removal.undo.append(keep_blocks(block_list, kept_blocks))
                numbers = _renumber(name, block_list, kept_blocks, removal)
                record_kept_blocks(model, name, keys, kept_blocks, numbers)
                removal.undo.append(_renumber_tied(model, name, kept_blocks))
        verify(model, example, reference)
    except BaseException:
        removal.put_back()
        raise
    if stay:
        removal.put_back()
    return removal


def _renumber(name: str, block_list: Any, kept_blocks: list[int], removal: Removal) -> dict[str, int]:
    """Set the block indices that modules store; return the changed attributes."""
    numbers: dict[str, int] = {}
    keys = list(block_list._modules)
    for new, old in enumerate(kept_blocks):
        for path, module in block_list[new].named_modules():
            for attribute in NUMBERS:
                if vars(module).get(attribute) == old and new != old:
                    setattr(module, attribute, new)
                    removal.undo.append(lambda m=module, a=attribute, v=old: setattr(m, a, v))
                    numbers[".".join(p for p in (name, keys[new], path, attribute) if p)] = new
    return numbers


def _renumber_tied(model: nn.Module, name: str, kept_blocks: list[int]) -> Any:
    """Renumber the blocks of a list that share weights, as `tie_layers_` records them; return what undoes it."""
    before = model.__dict__.get(TIED)
    if before and name in before:
        groups = [[kept_blocks.index(i) for i in group if i in kept_blocks] for group in before[name]]
        left = {**before, name: [group for group in groups if len(group) > 1]}
        model.__dict__[TIED] = {n: g for n, g in left.items() if g}
    return lambda: None if before is None else model.__dict__.update({TIED: before})


def choose_blocks(model: nn.Module, blocks: Sequence[Block], scores: Tensor, count: int) -> list[Block]:
    """Return the `count` blocks with the lowest scores, keeping one of each list."""
    remaining = {name: len(parts) for name, parts in block_lists(model).items()}
    dropped: list[Block] = []
    for i in scores.argsort(stable=True).tolist():
        block = blocks[i]
        if len(dropped) < count and remaining[block.stack] > 1:
            remaining[block.stack] -= 1
            dropped.append(block)
    if len(dropped) < count:
        raise ModelError(f"{count} blocks would be removed, but only {len(dropped)} can be: each list keeps one")
    return dropped


def drop_layers_(
    model: nn.Module,
    example: Any,
    keep: float | None = None,
    *,
    score: str = "similarity",
    layers: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    mask_only: bool = False,
    dry_run: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Remove the blocks of a model that matter least, in place: of lists of equal blocks, such as transformer layers.

    The model must then return what the dense one returns when it skips those blocks, or everything is restored. Blocks
    are renumbered, and a Hugging Face config follows. Costs a few calls, for score="loss" one pass a block.

    Args:
        model: a model with a list of equal blocks that return what has the shape of their input.
        example: a batch, as for `rarefy.cut_`; also the data, where none is given.
        keep: fraction of such blocks that stays; by default 0.75, or without those that `layers` names.
        score: "similarity" of a block's input and output (ShortGPT, Men 2024), "loss" (its rise without the block;
            slow) or "random".
        layers: names or globs of blocks that may go, such as "model.layers.1*".
        ignore: names or globs of blocks that stay.
        data: batches for the score.
        loss: for score="loss", a function of (output, batch) or a criterion (logits, target); see `rarefy.fit_`.
        optimizer: one that trains the model: it forgets the parameters that go.
        mask_only: the same as dry_run, as an option of `cut_`.
        dry_run: verify the removal, report it, and restore the model.
        seed: of score="random".
        progress: show progress bars.

    Returns:
        One row per block: its score and whether it is removed.

    Raises:
        ModelError: for options or a model that do not fit; the model is then unchanged.
        SelectorError: where `layers` or `ignore` matches nothing.
        DataError: for data that does not fit.

    Example:
        >>> net = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(4)]).eval()
        >>> drop_layers_(net, torch.randn(5, 1, 8), keep=0.5).summary["blocks"], len(net)
        ('4 -> 2', 2)
    """
    options = DropLayersOptions(keep=keep, score=score, layers=layers, ignore=ignore)
    return run_drop_layers(
        model, example, options, data, loss=loss, optimizer=optimizer, stay=mask_only or dry_run, seed=seed,
        progress=progress,
    )  # fmt: skip


def run_drop_layers(
    model: nn.Module,
    example: Any,
    options: DropLayersOptions,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    stay: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Drop layers by checked options; `stay`: only report what would go. See `drop_layers_`."""
    inner, score = unwrap(model), options.score
    check_unmasked(inner, whole=True)
    if data is not None:
        check_repeatable(data)
        if score == "random":
            raise DataError("data has no effect with score random: leave data out")
    check_optimizer(optimizer, inner)
    candidates = droppable(inner, example)
    blocks = _named(inner, candidates, options.layers, options.ignore)
    count = _how_many(len(candidates), len(blocks) if options.layers else None, options.keep)
    scores = layer_scores(inner, blocks, score, [example] if data is None else data, loss, seed, progress=progress)
    dropped = choose_blocks(inner, blocks, scores, count)
    before = list(inner.parameters())
    _drop_and_update_config(inner, example, dropped, stay)
    if optimizer is not None:
        remove_parameters(optimizer, {id(p) for p in before} - {id(p) for p in inner.parameters()})
    if not stay:
        forget_receipt(inner)
    column = {"similarity": "change", "loss": "loss rises by"}.get(score, score)
    rows = [{"block": b.name, column: float(s), "goes": b in dropped} for b, s in zip(blocks, scores)]
    notes = ("scored on the example: no data was given",) if data is None and score != "random" else ()
    gone = {id(m) for b in dropped for m in b.module.modules()}
    stay_in_use = {id(p) for m in inner.modules() if id(m) not in gone for p in m.parameters(recurse=False)}
    size, rest = sum(p.numel() for p in before), sum(p.numel() for p in before if id(p) in stay_in_use)
    summary = {
        "blocks": f"{len(candidates)} -> {len(candidates) - count}",
        "parameters": f"{size:,} -> {rest:,} ({rest / size:.3f})",
    }
    return Report("layers" + (": nothing done" if stay else ""), tuple(rows), summary, notes)


def _drop_and_update_config(model: nn.Module, example: Any, dropped: Sequence[Block], stay: bool) -> None:
    """Drop blocks and let the model's config follow; restore everything where that fails."""
    lengths = {name: len(parts) for name, parts in block_lists(model).items()}
    removal = drop_blocks(model, example, dropped, stay=stay)
    try:
        shorter: dict[int, set[int]] = {}
        for name, length in lengths.items():
            shorter.setdefault(length, set()).add(length - sum(b.stack == name for b in dropped))
        if not stay:
            update_config(model, example, shorter)
    except BaseException:
        removal.put_back()
        raise


def _how_many(blocks: int, named: int | None, keep: float | None) -> int:
    """Return how many blocks are removed: a fraction of `blocks`, or all that were named."""
    count = named if keep is None and named is not None else blocks - round(blocks * (0.75 if keep is None else keep))
    if not count:
        raise ModelError(f"nothing would be removed: all {blocks} blocks stay")
    return count


def _named(model: nn.Module, blocks: list[Block], layers: Any, ignore: Any) -> list[Block]:
    """Return the blocks that may go, by name."""
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no list of blocks whose output has the shape of their input")
    names = [b.name for b in blocks]

    def matching(globs: Any, option: str) -> set[str]:
        matched: set[str] = set()
        for glob in globs or ():
            hits = [n for n in names if fnmatchcase(n, glob)]
            if not hits:
                nearest_names = nearest(glob, names, count=3) or names[:3]
                raise SelectorError(f"{option}: {glob!r} matches no block; nearest: {', '.join(nearest_names)}")
            matched |= set(hits)
        return matched

    allowed = (matching(layers, "layers") if layers else set(names)) - matching(ignore, "ignore")
    candidates = [b for b in blocks if b.name in allowed]
    if not candidates:
        raise ModelError(f"no block is selected: layers={layers!r}, ignore={ignore!r}")
    return candidates
