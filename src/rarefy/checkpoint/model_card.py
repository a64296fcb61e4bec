"""The model card of a saved folder: licence, recipe, what was measured and where, and how to run the model."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rarefy.checkpoint import compiled_model
from rarefy.checkpoint.load import MAX_RECEIPT_BYTES
from rarefy.checkpoint.origin import FROM_CARD, read_origin
from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.extras import install
from rarefy.common.json_text import read_json_file
from rarefy.evaluation.receipt import Receipt, receipt_from_dict
from rarefy.formats import container
from rarefy.model import hub

RECIPE = "recipe.yaml"  # of a search
RUN = {
    "decoder": 'rarefy generate {name} --prompt "The capital of France is"',
    "compiled model": "rarefy bench {name}",
    "model": "rarefy bench {name}",
}


def model_card(folder: str | Path, name: str, licence: str | None = None) -> str:
    """Return the model card of a saved folder as Markdown.

    Args:
        folder: a folder that Rarefy saved. All of it is checked.
        name: ORG/NAME under which it is published.
        licence: the licence; by default that of the model which was compressed, as source.json has it.

    Returns:
        Metadata for the hub, and sections: how to run, measurements, recipe, licence. Numbers are those of
        receipt.json; a folder without one says so.

    Raises:
        ContainerError: the folder is damaged, or no folder of Rarefy.
        ModelError: the licence is not known.
    """
    folder = Path(folder)
    saved = container.read(folder)
    origin = read_origin(folder)
    if licence is None and "licence" not in origin:
        raise ModelError(
            f"{folder}: the licence of the model is not known: pass licence=NAME, such as 'mit' (shell: --licence NAME)"
        )
    facts = {**origin, **({} if licence is None else {"licence": licence})}
    receipt = _receipt(folder)
    kind = _kind(saved)
    parts = [
        f"---\n{_yaml(_metadata(facts, saved))}---\n",
        f"# {name.rpartition('/')[2]}\n",
        _summary(facts, kind),
        _how_to_run(name, kind, saved.meta.get("structure") or {}),
        _measured(receipt),
        _recipe(folder, saved.meta.get("recipe")),
        _licence(facts),
    ]
    return "\n".join(part for part in parts if part)


def _receipt(folder: Path) -> Receipt | None:
    file = folder / "receipt.json"
    if not file.is_file() or file.is_symlink() or file.stat().st_size >= MAX_RECEIPT_BYTES:
        return None
    return receipt_from_dict(read_json_file(file, MAX_RECEIPT_BYTES))


def _kind(saved: container.Container) -> str:
    if not compiled_model.is_compiled(saved):
        return "model"
    return "decoder" if saved.meta.get(compiled_model.DECODER) is not None else "compiled model"


def _metadata(facts: Mapping[str, Any], saved: container.Container) -> dict[str, Any]:
    """Return the front matter: what was carried over, the model it was made from, and tags."""
    data: dict[str, Any] = {key: facts[name] for key, name in FROM_CARD.items() if name in facts}
    if hub.parse_hub_name(str(facts.get("model"))) and not str(facts["model"]).startswith("torchvision/"):
        data["base_model"] = facts["model"]
    stages = (saved.meta.get("recipe") or {}).get("stages", [])
    verbs = {verb for stage in stages if isinstance(stage, Mapping) for verb in stage}
    return {**data, "library_name": "rarefy", "tags": ["rarefy", "compressed", *sorted(map(str, verbs))]}


def _yaml(data: Any) -> str:
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(data, text)
    return text.getvalue()


def _summary(facts: Mapping[str, Any], kind: str) -> str:
    model = facts.get("model")
    of = "" if model is None else f" It was made from `{model}`"
    at = f" at revision `{facts['revision']}`" if of and "revision" in facts else ""
    weights = f" with the weights `{facts['weights']}`" if of and "weights" in facts else ""
    end = f"{of}{at}{weights}." if of else ""
    return f"A {kind} for CPUs, written by [Rarefy](https://pypi.org/project/rarefy/).{end}\n"


def _how_to_run(name: str, kind: str, structure: Mapping[str, Any]) -> str:
    library = structure.get("library")
    by_library = {"transformers": "hf", "timm": "vision", "torchvision": "vision"}
    extras = ["hub", *([by_library[str(library)]] if library in by_library else [])]
    python = f'import rarefy\nfrom rarefy.model.hub import download\n\nmodel = rarefy.load(download("{name}"))'
    needs = library is None and kind == "model"
    note = f"\nThe model is built in Python: pass `model={structure.get('class')}(...)` to `rarefy.load`.\n"
    shell = f"{install(*extras)}\n" + ("" if needs else RUN[kind].format(name=name))
    return f"## How to run\n\n```sh\n{shell.rstrip()}\n```\n\n```python\n{python}\n```\n{note if needs else ''}"


def _measured(receipt: Receipt | None) -> str:
    if receipt is None or not receipt.rows():
        return "## Measurements\n\nThis folder has no receipt: neither quality nor speed was measured.\n"
    columns = ("measured", "before", "after", "change")
    table = [
        " | ".join(columns),
        "---|---|---|---",
        *(" | ".join(_cell(r[c]) for c in columns) for r in receipt.rows()),
    ]
    machine, runs = receipt.settings.get("machine", {}), receipt.settings.get("runs")
    text = f"Measured on {machine.get('cpu', '?')}, {machine.get('threads', '?')} threads."
    text += f" Before: {runs['before']}. After: {runs['after']}." if runs else ""
    text += "" if receipt.quality else " The quality was not measured."
    notes = ["", *(f"- {_cell(n)}" for n in receipt.notes)] if receipt.notes else []
    return "\n".join(["## Measurements", "", *(f"| {line} |" for line in table), "", text, *notes, ""])


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _recipe(folder: Path, recipe: Any) -> str:
    file = folder / RECIPE
    if file.is_file() and not file.is_symlink():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ContainerError(f"{file}: expected a text in UTF-8: {error}") from None
    elif isinstance(recipe, Mapping):
        text = _yaml(dict(recipe))
    else:
        return ""
    if "```" in text:
        raise ContainerError(f"{folder}: the recipe holds ```, which no recipe needs: it cannot be shown in the card")
    return f"## Recipe\n\n```yaml\n{text.rstrip()}\n```\n"


def _licence(facts: Mapping[str, Any]) -> str:
    more = [str(facts[n]) for n in ("licence_name", "licence_link") if n in facts]
    licence = facts["licence"] if isinstance(facts["licence"], str) else ", ".join(facts["licence"])
    text = f"`{licence}`" + (f" ({', '.join(more)})" if more else "")
    source = ", the licence of the model it was made from" if "model" in facts else ""
    return f"## Licence\n\n{text}{source}.\n"
