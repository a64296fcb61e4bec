"""Tokens per second of SmolLM2-135M in 8 bits with guessed tokens, and of several sequences at once.

    python speculation.py            guesses from earlier text on text that repeats its prompt, and 1 to 16 sequences;
                                     2 minutes on two idle cores
    python speculation.py --rounds 9

Variants are timed alternately, greedy, on the same prompt. Appends one JSON line to results/speculation.jsonl.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import rarefy
from rarefy.data import builtin
from rarefy.evaluation.profiling import quartiles
from rarefy.model import hf
from recording import keep

RESULTS = Path(__file__).parent / "results" / "speculation.jsonl"
GUESSES = (0, 3, 7, 15)
BATCHES = (1, 4, 16)
NEW = 128
ROWS = "\n".join(f'{{"id": {i}, "city": "Lyon", "country": "France", "open": true}}' for i in range(12)) + "\n"


def guessed(decoder: Any, ids: Any, rounds: int) -> dict[str, Any]:
    """Return quartiles of tokens per second by number of guesses, the share of right ones, and whether texts agree."""
    rates: dict[int, list[float]] = {count: [] for count in GUESSES}
    results: dict[int, Any] = {}
    for round_ in range(rounds + 1):
        for count in GUESSES:
            began = time.perf_counter()
            results[count] = decoder.generate(
                ids, max_new_tokens=NEW, eos_token_id=[], prompt_lookup_num_tokens=count, details=True
            )
            if round_:  # the first round warms up
                rates[count].append(NEW / (time.perf_counter() - began))
    same = [torch.equal(results[count].sequences, results[0].sequences) for count in GUESSES]
    return {
        "tokens_per_second": {c: [(q := quartiles(v)).low, q.median, q.high] for c, v in rates.items()},
        "acceptance": {c: results[c].acceptance for c in GUESSES},
        "same_text": all(same),
    }


def batches(decoder: Any, ids: Any, rounds: int) -> dict[int, list[float]]:
    """Return quartiles of tokens per second of all sequences together, by their number."""
    rates: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for round_ in range(rounds + 1):
        for batch in BATCHES:
            cache = decoder.cache(batch, ids.shape[1] + 33)
            token = decoder(ids.expand(batch, -1), cache, last=True)[:, -1].argmax(-1, keepdim=True)
            began = time.perf_counter()
            for _ in range(32):
                token = decoder(token, cache, last=True)[:, -1].argmax(-1, keepdim=True)
            if round_:
                rates[batch].append(32 * batch / (time.perf_counter() - began))
    return {b: [(q := quartiles(v)).low, q.median, q.high] for b, v in rates.items()}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = builtin.model_folder("smollm2-135m")
    tokenizer: Any = hf.load_tokenizer(folder)
    model: Any = hf.load_folder(folder).float()
    decoder = rarefy.compile(model, precision="int8")
    ids = tokenizer(ROWS, return_tensors="pt")["input_ids"]
    record: dict[str, Any] = {"guesses": guessed(decoder, ids, args.rounds)}
    record["batches"] = batches(decoder, ids[:, :32], args.rounds)
    keep(RESULTS, [lambda: [record]])
    for count, (_, rate, _) in record["guesses"]["tokens_per_second"].items():
        share = record["guesses"]["acceptance"][count]
        print(f"{count} guesses: {rate:.0f} tokens/s" + (f", {share:.0%} right" if share is not None else ""))
    print(f"the same text: {record['guesses']['same_text']}")
    for batch, (_, rate, _) in record["batches"].items():
        print(f"{batch} sequences: {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
