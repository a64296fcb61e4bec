"""Students of MiniLM that win back what pruning and cutting cost: trained to give the dense model's embeddings.

    python recover.py narrow                    one student into build/students/narrow-0; goes on after a kill

A student begins as the dense model after the steps of its point (frontier.py), and learns from the dense model on text
of many kinds (texts.py): hidden states, embeddings, and the similarities of the texts in a batch. Texts are cut at
random places; a batch holds texts of about the same length.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import time
from typing import Any

import torch

import rarefy
import texts
from frontier import DO, HEADS, MLP, STUDENTS, Steps, calibration
from rarefy.data import builtin
from rarefy.model import hf
from rarefy.train.fit import Steps as OptimizerSteps
from rarefy.train.optimizers import optimizer_of

BEGINNINGS: dict[str, Steps] = {
    "narrow": [("cut", {"keep": 0.7, **MLP}), ("cut", {"keep": 0.75, **HEADS})],
    "narrower": [("cut", {"keep": 0.5, **MLP}), ("cut", {"keep": 0.67, **HEADS})],
    "narrowest": [("cut", {"keep": 0.334, **MLP}), ("cut", {"keep": 0.5, **HEADS})],
    "blocks": [("prune", {"pattern": "1x4", "sparsity": 0.6, "solver": "admm", "layers": "encoder.layer.*"})],
}
# how often a text is of a kind; a third are of manuals
MIX = {
    "articles": 35, "speeches": 8, "reviews": 8, "editorials": 6, "posts": 3, "mails": 9, "novels": 12,
    "definitions": 4, "politics": 8, "quotations": 5, "jargon": 2,
    "manuals": 25, "code manuals": 25,
}  # fmt: skip
BATCH, STEPS_PER_EPOCH, WORDS = 64, 50, (5, 90)
LR = 3e-4


def cropped(text: str, chance: random.Random) -> str:
    """Return a text, or some words of a long one from a random place."""
    words, most = text.split(), chance.randint(*WORDS)
    if len(words) <= most:
        return text
    first = chance.randrange(len(words) - most + 1)
    return " ".join(words[first : first + most])


def batches(tokenizer: Any, epoch: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return the batches of an epoch, each of texts of about the same length."""
    chance = random.Random(1000 * seed + epoch)
    kinds = chance.choices(list(MIX), list(MIX.values()), k=BATCH * STEPS_PER_EPOCH)
    chosen = sorted((cropped(chance.choice(texts.of_kind(kind)), chance) for kind in kinds), key=len)
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    chance.shuffle(parts)
    how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(part, **how)) for part in parts]


def train(name: str, epochs: int, seed: int) -> None:
    """Train a student and save it with a note of how it was made."""
    source = builtin.model_folder("minilm")
    dense: Any = hf.load_folder(source).eval()
    tokenizer = hf.load_tokenizer(source)
    student = copy.deepcopy(dense)
    for model in (student, dense):
        model.set_attn_implementation("eager")  # trains faster than fused attention
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # the teacher has no dropout either
    data = calibration(tokenizer, 256, seed)
    began = time.perf_counter()
    steps = hashlib.sha256(json.dumps(BEGINNINGS[name]).encode()).hexdigest()[:8]
    start = STUDENTS / f"{name}-{seed}.start-{steps}"  # kept, since another number of threads makes other bits
    if not start.exists():
        for step, options in BEGINNINGS[name]:
            DO[step](student, data=data, **options)
        rarefy.fold_(student)
        rarefy.save(student, start)
    student = rarefy.load(start, model=student)
    if any(step == "prune" for step, _ in BEGINNINGS[name]):
        rarefy.adopt_(student)
    student.embeddings.requires_grad_(False)  # half of all weights, none of them smaller
    config = rarefy.Distill(task=0.0, logits=0.0, hidden="squarehead", embedding=5.0, similarity=10.0)
    distiller = rarefy.Distiller(student, dense, config, example=data[0])
    rarefy.fit_(
        student,
        lambda epoch: batches(tokenizer, epoch, seed),
        epochs=epochs,
        distill=distiller,
        optimizer=optimizer_of("adamw", LR, weight_decay=0.0, betas=(0.9, 0.98)),
        lr_schedule="one-cycle",
        steps=OptimizerSteps(autocast="bf16", clip=1.0),
        seed=seed,
        resume_dir=STUDENTS / f"{name}-{seed}.state",
        progress=True,
    )
    distiller.close()
    rarefy.fold_(student)
    rarefy.save(student.eval(), STUDENTS / f"{name}-{seed}", overwrite=True)
    note = {"student": name, "seed": seed, "epochs": epochs, "seconds": time.perf_counter() - began}
    (STUDENTS / f"{name}-{seed}.json").write_text(json.dumps(note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", choices=BEGINNINGS)
    parser.add_argument("--epochs", type=int, default=60, help=f"of {STEPS_PER_EPOCH} batches of {BATCH} texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hf.no_bars()
    texts.fetch()
    STUDENTS.mkdir(parents=True, exist_ok=True)
    train(args.student, args.epochs, args.seed)


if __name__ == "__main__":
    main()
