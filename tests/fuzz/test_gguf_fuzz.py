"""Any change of a GGUF file gives a model and a tokenizer, or one of Rarefy's errors, without absurd memory."""

import random
import resource
import struct

import pytest

import rarefy
from checkpoint.test_gguf_export import build, byte_tokenizer, splits
from helpers.mutations import mutate_bytes, seeded
from rarefy.checkpoint import gguf_tokenizer
from rarefy.checkpoint.gguf_load import GgufModel
from rarefy.common.errors import RarefyError

pytest.importorskip("gguf")
NUMBERS = (0, 1, 2, 7, 31, 33, 255, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def change(data: bytes, header: int, rng: random.Random) -> bytes:
    """Return data with a number, some bytes, or a piece of the header changed."""
    action = rng.random()
    if action < 0.4:  # a count, length, size, type or place
        code = rng.choice("IQ")
        at = rng.randrange(4, header - 8)
        number = rng.choice([*NUMBERS, len(data), len(data) - at]) % 2 ** (8 * struct.calcsize(code))
        return data[:at] + struct.pack("<" + code, number) + data[at + struct.calcsize(code) :]
    if action < 0.5:  # a piece in another place
        size = rng.randrange(1, 40)
        at, to = rng.randrange(24, header - size), rng.randrange(24, header - size)
        return data[:to] + data[at : at + size] + data[to + size :]
    return mutate_bytes(data[:header], rng) + data[header:] if action < 0.95 else mutate_bytes(data, rng, header)


def fuzz(tmp_path, rounds: int) -> None:
    file = tmp_path / "m.gguf"
    model = build(
        "Llama", vocab_size=480, hidden_size=32, intermediate_size=32, num_hidden_layers=1, attention_bias=True
    )
    tokenizer = byte_tokenizer(splits()["qwen2"])
    tokenizer.chat_template = "{{ messages }}"
    rarefy.export(model, file, to="gguf", type="q8_0", tokenizer=tokenizer)
    data = file.read_bytes()
    header = data.index(b"blk.0.attn_v.weight") + 200
    outcomes = {"read": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rng in seeded(rounds):
        file.write_bytes(change(data, header, rng))
        try:
            source = GgufModel(file)
            for name in source.names:
                source.weight(name)
            gguf_tokenizer.load(file)
            outcomes["read"] += 1
        except RarefyError as error:
            assert len(str(error)) < 700
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == rounds and min(outcomes.values()) > rounds // 20, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_changed_files(tmp_path):
    fuzz(tmp_path, 200)


@pytest.mark.slow
def test_many_changed_files(tmp_path):
    fuzz(tmp_path, 10_000)
