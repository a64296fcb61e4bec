"""The extras of pyproject.toml that messages name, and the one command that installs them."""

from __future__ import annotations

EXTRAS = ("hf", "json", "embeddings", "lm-eval", "vision", "hub", "onnx")


def install(*extras: str) -> str:
    """Return the command that installs extras of Rarefy, wherever Rarefy was installed from.

    Args:
        *extras: names in `EXTRAS`; a KeyError for others.

    Example:
        >>> install("hub", "hf")
        'pip install "rarefy[hub,hf]"'
    """
    missing = [name for name in extras if name not in EXTRAS]
    if missing:
        raise KeyError(missing[0])
    return f'pip install "rarefy[{",".join(extras)}]"'
