"""Beam search: the texts with the highest log probability among those that it extends, as transformers finds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.generation.logits import process
from rarefy.generation.loop import LanguageModel, Task, prompt_of
from rarefy.generation.options import Options
from rarefy.generation.stopping import ended

NEVER = -1.0e9  # the score of a text that does not count


class Finished:
    """The best whole texts of each prompt.

    Attributes:
        ids: int64 [batch, beams, tokens].
        lengths: tokens of each text, [batch, beams].
        scores: [batch, beams], NEVER where there is no text yet.
        stopped: whether each text ended by itself, bool [batch, beams].
    """

    def __init__(self, batch: int, beams: int, tokens: int, pad: int):
        self.pad = pad
        self.ids = torch.full((batch, beams, tokens), pad, dtype=torch.int64)
        self.lengths = torch.zeros(batch, beams, dtype=torch.int64)
        self.scores = torch.full((batch, beams), NEVER, dtype=torch.float32)
        self.stopped = torch.zeros(batch, beams, dtype=torch.bool)

    def add(self, ids: Tensor, scores: Tensor, stopped: Tensor) -> None:
        """Keep the best of these texts [batch, candidates, tokens] and the earlier ones."""
        missing = self.ids.shape[2] - ids.shape[2]
        padded = nn.functional.pad(ids, (0, missing), value=self.pad)
        lengths = torch.full(scores.shape, ids.shape[2], dtype=torch.int64)
        self.scores, order = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        self.ids = _rows_of(torch.cat([self.ids, padded], 1), order)
        self.lengths = torch.cat([self.lengths, lengths], 1).gather(1, order)
        self.stopped = torch.cat([self.stopped, stopped], 1).gather(1, order)


def search(decoder: LanguageModel, task: Task, options: Options) -> tuple[Tensor, tuple[str, ...], Tensor, Tensor]:
    """Return the best texts of each prompt: ids [texts, tokens], why each ended, scores and lengths [texts].

    A candidate that ends counts as a text only if it is among the best `num_beams` candidates of its prompt.

    Cost: as of generating `num_beams` texts for each prompt, and for each token copies of the last 64 tokens of the
    cache, for beams that go on from the same one.
    """
    beams, (batch, prompt) = options.num_beams, task.ids.shape
    tokens = prompt + task.max_new_tokens
    with prompt_of(decoder, task, nn.functional.pad(task.ids, (0, task.max_new_tokens))) as (cache, logits):
        cache, logits = cache.repeated(beams), logits[:, -1].repeat_interleave(beams, 0)
    ids = task.ids[:, None].expand(batch, beams, prompt)
    total = torch.full((batch, beams), NEVER, dtype=torch.float32)
    total[:, 0] = 0.0  # all beams are equal at first: extend one
    finished = Finished(batch, beams, tokens, task.pad_token)
    open_prompts = torch.ones(batch, 1, dtype=torch.bool)  # their texts may still become better
    while True:
        scores = process(task.processors, ids.flatten(0, 1), logits.float().log_softmax(-1))
        sums = (scores.view(batch, beams, -1) + total[..., None]).flatten(1)
        candidates = max(2, 1 + len(task.eos)) * beams
        sums, chosen = _best(sums, candidates, task)
        beam, token = chosen // scores.shape[-1], chosen % scores.shape[-1]
        ids = torch.cat([_rows_of(ids, beam), token[..., None]], 2)
        new = ids.shape[2] - prompt
        stopped = ended(task.criteria, ids.flatten(0, 1)).view(batch, candidates)
        ends = stopped | (ids.shape[2] == tokens)
        _finish(finished, ids, sums, ends, stopped, open_prompts, new, options)
        total, order = (sums + ends * NEVER).topk(beams)
        ids, beam, all_end = _rows_of(ids, order), beam.gather(1, order), bool(ends.all())
        open_prompts = open_prompts & _may_improve(finished, total, new, task.max_new_tokens, options)
        full = options.early_stopping is True and bool((finished.scores > NEVER / 2).all())
        if all_end or full or not bool(open_prompts.any()):
            break
        cache.select_((beam + beams * torch.arange(batch)[:, None]).flatten())
        logits = decoder(ids[..., -1:].flatten(0, 1), cache, last=True)[:, -1]
    return _result(finished, options)


def _best(sums: Tensor, count: int, task: Task) -> tuple[Tensor, Tensor]:
    """Return the largest sums [batch, count], or those of drawn candidates, and where they are."""
    if not task.do_sample:
        return sums.topk(count)
    chosen = sums.softmax(-1).multinomial(count, generator=task.generator)
    drawn, order = sums.gather(1, chosen).sort(descending=True)
    return drawn, chosen.gather(1, order)


def _finish(
    finished: Finished, ids: Tensor, sums: Tensor, ends: Tensor, stopped: Tensor, open_: Tensor, new: int, o: Options
) -> None:
    """Add the candidates that end, if they are among the best `num_beams` of a prompt that may still become better."""
    counts = ends.clone()
    counts[:, o.num_beams :] = False
    counts &= open_
    if o.early_stopping is True:
        counts &= ~(finished.scores > NEVER / 2).all(1, keepdim=True)
    scores = torch.where(counts, sums / new**o.length_penalty, NEVER)
    finished.add(ids, scores, stopped)


def _may_improve(finished: Finished, total: Tensor, new: int, max_new: int, o: Options) -> Tensor:
    """Return whether the best running text of each prompt may become better than its worst whole one, [batch, 1]."""
    length = max_new if o.early_stopping == "never" and o.length_penalty > 0 else new
    worst = finished.scores.amin(1, keepdim=True)
    return total[:, :1] / length**o.length_penalty > worst


def _result(finished: Finished, o: Options) -> tuple[Tensor, tuple[str, ...], Tensor, Tensor]:
    best = slice(o.num_return_sequences)
    ids = finished.ids[:, best, : int(finished.lengths[:, best].max())].flatten(0, 1)
    stopped = finished.stopped[:, best].flatten().tolist()
    reasons = tuple("stop" if s else "length" for s in stopped)
    return ids, reasons, finished.scores[:, best].flatten(), finished.lengths[:, best].flatten()


def _rows_of(ids: Tensor, rows: Tensor) -> Tensor:
    """Return the rows [batch, n] of ids [batch, rows, tokens]."""
    return ids.gather(1, rows[..., None].expand(-1, -1, ids.shape[2]))
