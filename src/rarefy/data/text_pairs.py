"""Pairs of texts for retrieval: one asks, the other answers. From pairs in a file, or from texts cut in two.

pairs.jsonl     {"query": ..., "text": ...}, {"question": ..., "answer": ...} or {"anchor": ..., "positive": ...} a line
texts.jsonl     {"text": ...} a line: its first half asks, its second half answers
texts.txt       the same for each paragraph, or each line where no blank lines separate paragraphs
wiki            the same for each built-in article
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import DataError
from rarefy.common.plain_file import read_text
from rarefy.data import builtin
from rarefy.data.sources import Take, check_tokenizer, find, json_lines, read_errors

KEYS = (("query", "text"), ("question", "answer"), ("anchor", "positive"))
MIN_PAIRS = 2
MIN_WORDS = 8  # of a paragraph; shorter ones are headings, whose halves say nothing about each other
Pair = tuple[str, str]
PairBatch = tuple[dict[str, Tensor], dict[str, Tensor]]


def token_batches(
    texts: Sequence[str], tokenizer: Any, *, batch: int = 50, tokens: int = 128
) -> list[dict[str, Tensor]]:
    """Return texts as batches of token ids and attention mask, padded to the longest of a batch.

    Args:
        texts: the texts.
        tokenizer: the model's tokenizer; it needs a padding token.
        batch: texts of a batch.
        tokens: largest number of tokens of a text; the rest is cut off.
    """
    check_tokenizer(tokenizer, "data")
    if getattr(tokenizer, "pad_token", "") is None:
        raise DataError("the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token")
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    parts = (tokenizer(list(texts[i : i + batch]), **options) for i in range(0, len(texts), batch))
    return [{name: part[name] for name in ("input_ids", "attention_mask")} for part in parts]


def text_pairs(
    texts: Sequence[str] | Sequence[Pair], tokenizer: Any, *, batch: int = 50, tokens: int = 128
) -> list[PairBatch]:
    """Return batches (queries, texts) for retrieval.

    Args:
        texts: pairs (query, text), or texts alone: of each the first half of the words asks and the second half
            answers. Of long texts the first `2 * tokens` words count, so that the halves stay neighbours.
        tokenizer: the model's tokenizer.
        batch: pairs of a batch.
        tokens: largest number of tokens of a text; the rest is cut off.

    Raises:
        DataError: for fewer than two pairs, or a text that is empty or of one word.
    """
    if isinstance(texts, str):
        raise DataError("expected a list of texts or of pairs (query, text), got one text")
    pairs = [_pair(text, f"text {i}", 2 * tokens) for i, text in enumerate(texts, 1)]
    if len(pairs) < MIN_PAIRS:
        count = "1 text makes 1 pair" if pairs else "there are no texts"
        raise DataError(f"retrieval needs at least {MIN_PAIRS} pairs of texts, better 1,000; {count}: give more texts")
    sides = (token_batches([p[side] for p in pairs], tokenizer, batch=batch, tokens=tokens) for side in (0, 1))
    return list(zip(*sides))


def pair_batches(
    source: str, take: Take, *, tokenizer: Any, base: Path | None = None, what: str = "data"
) -> list[PairBatch]:
    """Return the batches (queries, texts) of a file or built-in name; the same arguments give the same batches.

    Args:
        source: a path or a built-in name.
        take: samples, tokens, batch and seed count.
        tokenizer: the model's tokenizer.
        base: folder of relative paths.
        what: the data's purpose, for messages.

    Raises:
        DataError: as `text_pairs` does, and for a source that is not found or is no text.
    """
    path = find(source, base, what)
    check_tokenizer(tokenizer, f"{what} {source}")
    texts = _builtin_texts(source) if path is None else _read(path, what)
    if take.samples is not None and len(texts) < take.samples:
        raise DataError(
            f"{what} {source} is too short: {len(texts):,} pairs, {take.samples:,} are needed: add some, or set samples"
        )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(take.seed))[: take.samples]
    try:
        return text_pairs([texts[i] for i in order], tokenizer, batch=take.batch, tokens=take.tokens)
    except DataError as error:
        raise DataError(f"{what} {source}: {error}") from None


def _builtin_texts(source: str) -> list[Any]:
    name, test = source.removesuffix("-test"), source.endswith("-test")
    if name != "wiki":
        raise DataError(f"{source} is no text; retrieval needs pairs of texts")
    return [text for text in builtin.wiki(test) if len(text.split()) >= MIN_WORDS]


def _read(path: Path, what: str) -> list[Any]:
    """Return the texts or pairs of a file."""
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{what}: retrieval needs texts, .txt or .jsonl, got {path}")
    with read_errors(path, what):
        if kind == ".txt":
            return _paragraphs(read_text(path, DataError))
        texts = [_of_row(row, f"{path}, line {number}") for number, row in json_lines(path)]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise DataError(f"{path}: expected pairs in all lines or in none, got both pairs and texts alone")
    return texts


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a text, or its lines where there are no blank lines, without headings."""
    stripped = "\n".join(line.strip() for line in text.strip().splitlines())
    parts = stripped.split("\n\n" if "\n\n" in stripped else "\n")
    return [part for part in parts if len(part.split()) >= MIN_WORDS]


def _of_row(row: Mapping[str, Any], where: str) -> str | Pair:
    """Return the pair or the text of one line of JSON."""
    keys = next((keys for keys in KEYS if all(isinstance(row.get(key), str) for key in keys)), None)
    if keys is not None:
        return row[keys[0]], row[keys[1]]
    if isinstance(row.get("text"), str):
        return row["text"]
    known = " or ".join(f'{{"{a}": "...", "{b}": "..."}}' for a, b in KEYS)
    raise DataError(f'{where}: expected {known}, or {{"text": "..."}}, got the keys {", ".join(row) or "none"}')


def _pair(text: Any, where: str, max_words: int) -> Pair:
    """Return a pair as it is, or the halves of a text."""
    if isinstance(text, str):
        words = text.split()[:max_words]
        if len(words) < 2:
            got = f"one word, {words[0][:40]!r}" if words else "empty"
            raise DataError(f"{where} is {got}: expected at least two words, of which the first half asks")
        return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    if not isinstance(text, tuple | list) or len(text) != 2 or not all(isinstance(side, str) for side in text):
        raise DataError(f"{where}: expected a text or a pair (query, text), got {type(text).__name__}")
    query, answer = text
    if not query.strip() or not answer.strip():
        raise DataError(f"{where}: the query or the text of a pair is empty")
    return query, answer
