"""What `rarefy generate` prints: texts while they are generated, results as JSON, the speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Text:
    """The tokens and the text generated after one prompt.

    Attributes:
        prompt: its ids.
        ids: of the new tokens.
        pieces: of the text, without stop strings.
        ended: whether the text has ended by itself.
        steps: what was returned for each token beside its id.
    """

    def __init__(self, prompt: list[int], tokenizer: Any, stop_strings: Sequence[str]):
        from rarefy.generation import tokenization

        self.prompt, self.ids, self.pieces, self.ended = prompt, list[int](), list[str](), False
        self.steps: list[dict[str, Any]] = []
        self.decoded = tokenization.Text(tokenizer, prompt)
        self.shown = tokenization.StopText(stop_strings)

    def add(self, token: int, ended: bool) -> str:
        """Add the next token unless the text has ended; return the text it adds."""
        if self.ended:
            return ""
        self.ids.append(token)
        self.ended = ended
        self.pieces.append(self.shown.add(self.decoded.add(token)))
        return self.pieces[-1]

    def close(self) -> str:
        """Return the rest of the text, held back until its last character was complete."""
        self.pieces.append(self.shown.add(self.decoded.rest()) + self.shown.rest())
        return self.pieces[-1]


@dataclass
class Run:
    """How a generation went.

    Attributes:
        seconds: of each step; of a beam search of all.
        stopped: the exit code if it was stopped; None if it was not.
        proposer: what guessed tokens, with its counts; None without guesses.
        scores: of the texts of a beam search.
    """

    seconds: list[float] = field(default_factory=list)
    stopped: int | None = None
    proposer: Any = None
    scores: list[float] | None = None


def run_steps(decoder: Any, ids: Any, options: dict[str, Any], texts: list[Text], streaming: bool) -> Run:
    """Generate texts until the end or Ctrl-C, and print them as they come if `streaming`."""
    from rarefy.generation import request
    from rarefy.generation.loop import generate_steps

    run = Run()
    prepared = request.prepare(decoder, ids, **options)
    run.proposer = prepared.task.proposer
    try:
        if prepared.options.num_beams > 1:
            _search(run, prepared, texts)
        else:
            steps = generate_steps(decoder, prepared.task)
            while True:
                began = time.perf_counter()
                step = next(steps, None)
                if step is None:
                    break
                run.seconds.append(time.perf_counter() - began)
                _add(step, texts, streaming)
    except (KeyboardInterrupt, SystemExit) as end:
        run.stopped = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
    for text in texts:
        piece = text.close()
        if streaming:
            print(piece, flush=True)
    return run


def _search(run: Run, prepared: Any, texts: list[Text]) -> None:
    from rarefy.generation.beam_search import search

    began = time.perf_counter()
    ids, reasons, scores, lengths = search(prepared.decoder, prepared.task, prepared.options)
    run.seconds.append(time.perf_counter() - began)
    run.scores = scores.tolist()
    for text, reason, row, length in zip(texts, reasons, ids.tolist(), lengths.tolist()):
        new = row[prepared.task.ids.shape[1] : length]  # padding follows
        for i, token in enumerate(new, 1):
            text.add(token, reason == "stop" and i == len(new))


def _add(step: Any, texts: list[Text], streaming: bool) -> None:
    """Add a step's tokens to the texts."""
    for row, (text, token, ended) in enumerate(zip(texts, step.tokens.tolist(), step.ended.tolist())):
        if step.logprobs is not None and not text.ended:
            top = zip(step.top_tokens[row].tolist(), step.top_logprobs[row].tolist())
            text.steps.append({"logprob": float(step.logprobs[row]), "top": [list(pair) for pair in top]})
        began_text = any(text.pieces)
        piece = text.add(token, ended)
        if streaming:
            print(piece if began_text else piece.lstrip(" "), end="", flush=True)


def print_results(run: Run, texts: list[Text], streaming: bool, as_json: bool, quiet: bool, count: int) -> None:
    """Print the texts that were not streamed, and the speed.

    Args:
        run: how the generation went.
        texts: `count` for each prompt.
        streaming: whether they were printed already.
        as_json: print them as JSON, a list if there are several.
        quiet: do not print the speed.
        count: texts for each prompt.
    """
    rows = [_row(run, text, i) for i, text in enumerate(texts)]
    if as_json:
        print(json.dumps(rows if len(rows) > 1 else rows[0], indent=1))
        return
    if len(rows) > 1:
        for i, row in enumerate(rows):
            label = f"{i // count + 1}.{i % count + 1}" if 1 < count < len(rows) else f"{i + 1}"
            print(f"[{label}]{row['text']}" if row["text"].startswith(" ") else f"[{label}] {row['text']}")
    elif not streaming:
        print(rows[0]["text"].lstrip(" "))
    if not quiet:
        _print_speed(run, texts, rows, count)


def _row(run: Run, text: Text, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": "".join(text.pieces),
        "ids": text.ids,
        "prompt_tokens": len(text.prompt),
        "new_tokens": len(text.ids),
        "finish_reason": "stop" if text.ended else "length",
        "seconds_prefill": sum(run.seconds[:1]),
        "seconds_decode": sum(run.seconds[1:]),
    }
    if text.steps:
        row["logprobs"] = [{"token": t, **step} for t, step in zip(text.ids, text.steps)]
    if run.scores is not None:
        row["score"] = run.scores[index]
    if run.proposer is not None:
        row |= {"guessed_tokens": run.proposer.guessed, "accepted_tokens": run.proposer.accepted}
    return row


def _print_speed(run: Run, texts: list[Text], rows: list[dict[str, Any]], count: int) -> None:
    first, rest = sum(run.seconds[:1]), sum(run.seconds[1:])
    empty = [number for number, row in enumerate(rows, 1) if not row["text"].strip()]
    if empty:
        which = f" for prompt {', '.join(map(str, empty))}" if len(rows) > 1 else ""
        print(f"no text was generated{which}: the model ended at once; --chat may help", file=sys.stderr)
    new, read = sum(len(t.ids) for t in texts), sum(len(t.prompt) for t in texts[::count])
    later = new - sum(1 for t in texts if t.ids)
    if run.scores is not None:
        print(f"prompt: {read} tokens; generated: {new} tokens, {first:.1f} s of beam search", file=sys.stderr)
        return
    line = f"prompt: {read} tokens" + (f", {read / first:.1f} tokens/s" if first else "")
    line += f"; generated: {new} tokens" + (f", {later / rest:.1f} tokens/s after the first" if later and rest else "")
    if run.proposer is not None and run.proposer.guessed:
        line += f"; {run.proposer.accepted / run.proposer.guessed:.0%} of {run.proposer.guessed} guesses were right"
    print(line, file=sys.stderr)
