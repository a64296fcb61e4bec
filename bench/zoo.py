"""The models of zoo/: students of MiniLM that recover.py has trained, packed in 8 bits for the engine.

    python recover.py narrower          first: trains the student, some hours on one core
    python zoo.py narrower              writes zoo/minilm-narrower and its model card
    python zoo.py --cards               only writes the model cards anew, from results/frontier.jsonl

A folder is what `rarefy.save` writes of a compiled model, with the tokenizer's files and a README. Quality and times in
the README are those that frontier.py has measured last; times only of a record that stands (provenance.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import provenance
import rarefy
from frontier import STUDENTS, ZOO, example
from rarefy.checkpoint.export import side_files
from rarefy.data import builtin
from rarefy.model import hf
from records import Row, mark, read, showing
from recover import BATCH, STEPS_PER_EPOCH

HERE = Path(__file__).parent
SEED = 0  # of the student that is published
MAX_MB = 20
ABOUT = {  # what is left of the dense model in each layer
    "narrow": "70 % of the MLP's neurons and 9 of 12 attention heads",
    "narrower": "half of the MLP's neurons and 8 of 12 attention heads",
    "narrowest": "a third of the MLP's neurons and 6 of 12 attention heads",
}
CARD = """# minilm-{name}

all-MiniLM-L6-v2 with {about} in each layer, trained to give the original's embeddings, in 8 bits. It turns English text
into vectors of 384 numbers for search and clustering.

```python
import rarefy
from transformers import AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("zoo/minilm-{name}"), rarefy.load("zoo/minilm-{name}")
words = tokenizer(["a text", "another one"], padding=True, truncation=True, max_length=128, return_tensors="pt")
hidden = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])[0]
mask = words["attention_mask"][..., None]
vectors = (hidden * mask).sum(1) / mask.sum(1)
```

| | original, fp32 | original, OpenVINO int8 | this model |
|---|---|---|---|
{rows}

{where} R@1: how many of 1,000 descriptions of articles find their article first, and how many of 1,000 passages of the
Brown corpus, or of manuals, find the passage that follows. Nothing of these was used for training or calibration.

- **Size**: {megabytes:.1f} MB (original: 90.9 MB).
- **Limits**: English; at most 512 tokens, trained on texts of up to 128. Vectors are near the original's, but not
  equal: compute those of a database anew.
- **How it was made**: `python bench/recover.py {name}` (some hours on one core), then `python bench/zoo.py {name}`.
  Neurons and heads are removed by their effect on the outputs (OBS) on 256 articles. The rest is trained on {texts:,}
  texts: loss on hidden states (SquareHead), on embeddings, and on similarities in a batch. Seed {seed}, commit
  {commit}.
- **Data**: encyclopedia articles (CC BY-SA 4.0), presidential speeches, reviews, editorials, mails, novels,
  definitions, quotations, manuals and other texts of packages, which `bench/texts.py` lists with their licences.
- **Licence**: Apache-2.0, as the original's.
"""


def write(name: str) -> None:
    """Write the packed student with the tokenizer's files."""
    source = builtin.model_folder("minilm")
    dense: Any = hf.load_folder(source).eval()
    model = rarefy.load(STUDENTS / f"{name}-{SEED}", model=dense)
    rarefy.fold_(model)
    fast = rarefy.compile(model, example(hf.load_tokenizer(source), 16), precision="int8", tune=False)
    files = {n: content for n, content in side_files(source).items() if n.startswith(("tokenizer", "vocab", "special"))}
    note = json.loads((STUDENTS / f"{name}-{SEED}.json").read_text())
    run = provenance.begin()
    note |= {"made": run["commit"] + "-dirty" * bool(run["changed"])}
    files["student.json"] = json.dumps(note, indent=1).encode()
    rarefy.save(fast, ZOO / f"minilm-{name}", files=files, overwrite=True)


def card(name: str) -> str:
    """Return a model card with what was measured last."""
    # neither load nor later code changes the quality of a folder that is here; times need a record that stands
    with showing("load", "older"):
        row: Row = read("frontier", run="minilm")[-1]
    folder = ZOO / f"minilm-{name}"
    size = sum(f.stat().st_size for f in folder.iterdir() if f.name != "README.md") / 1e6
    if size > MAX_MB:
        raise SystemExit(f"{folder} has {size:.1f} MB; at most {MAX_MB} are meant to be in the repository")
    models = ("eager", "openvino int8", f"ours, {name}-{SEED}, trained, int8")
    cells = [
        (label, [f"{row['quality'][m][q]:.{digits}f}{unit}" for m in models])
        for label, q, unit, digits in (
            ("R@1, articles", "articles", " %", 1),
            ("R@1, Brown corpus", "brown", " %", 1),
            ("R@1, manuals", "manuals", " %", 1),
            ("mean cosine with the original's embeddings", "cosine", "", 3),
        )
        if q in row["quality"]["eager"]
    ]
    for shape, times in {} if row["marks"] else row["milliseconds"].items():
        cells.append((f"{shape} tokens", [f"{times[m][1]:.1f} ms" if m in times else "" for m in models]))
    note = json.loads((folder / "student.json").read_text())
    return CARD.format(
        name=name,
        about=ABOUT[name],
        rows="\n".join(f"| {label} | {' | '.join(values)} |" for label, values in cells),
        where=f"{row['label']}, {row['threads']} threads. {mark([row])}",
        megabytes=size,
        texts=note["epochs"] * STEPS_PER_EPOCH * BATCH,
        seed=note["seed"],
        commit=note["made"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", choices=[*ABOUT, []], default=[])
    parser.add_argument("--cards", action="store_true")
    args = parser.parse_args()
    hf.no_bars()
    for name in args.students:
        write(name)
    for folder in sorted(ZOO.glob("minilm-*")) if args.cards or args.students else ():
        (folder / "README.md").write_text(card(folder.name.removeprefix("minilm-")))


if __name__ == "__main__":
    main()
