"""Random changes of files, for the tests in tests/fuzz."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = (None, True, -1, 0, 3, 1 << 40, 10**30, 0.5, -0.0, 1e308, "", "x", "fp32", [], {}, [[]], {"node": "x"})


def mutate_json(value: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Return a copy of plain data with one of its values replaced, removed, doubled or exchanged for another."""
    value = json.loads(json.dumps(value))
    slots: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, inner in items:
            slots.append((part, key))
            walk(inner)

    walk(value)
    (part, key), (other, other_key) = rng.choice(slots), rng.choice(slots)
    action = rng.random()
    if action < 0.3:
        part[key] = copy.deepcopy(other[other_key])
    elif action < 0.4 and isinstance(part, list):
        part.insert(key, copy.deepcopy(part[key]))
    elif action < 0.5:
        del part[key]
    elif action < 0.6 and isinstance(part, dict):
        part[str(rng.choice(values))] = part.pop(key)
    elif action < 0.8 and type(part[key]) in (int, float):
        part[key] += rng.choice((-1, 1, 2, 0.5))
    else:
        part[key] = copy.deepcopy(rng.choice(values))
    return value


def mutate_bytes(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    """Return data with one to eight bytes changed, cut or doubled from `start` on."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(start, len(changed))
        changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1, ord("0") + rng.randrange(10)])
    action, at = rng.random(), rng.randrange(start, len(changed))
    if action < 0.1:
        return bytes(changed[:at])
    if action < 0.2:
        return bytes(changed[:at] + changed[at : at + 9] + changed[at:])
    return bytes(changed)


def seeded(count: int, seed: object = 0) -> Iterator[random.Random]:
    """Yield generators with seeds of their own, so that a failing round can be run alone."""
    for i in range(count):
        yield random.Random(f"{seed} {i}")
