"""Shared small models, and real ones that skip visibly where their package is missing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAREFY_CACHE"] = tempfile.mkdtemp(prefix="rarefy-test-")  # not the user's
os.environ["RAREFY_TUNE"] = "0"  # what runs where does not depend on the load of the machine

import pytest
import torch
from torch import Tensor, nn

from helpers.marks import slow_case
from rarefy.cli.main import main
from rarefy.common.errors import DataError, FormatError
from rarefy.compiler import traced_graph
from rarefy.data import builtin
from rarefy.runtime import bindings

collect_ignore = ["fixtures"]  # scripts of earlier versions
# torch.export takes most of the time of a test; a graph that is used again is compared with the model like a new one
traced_graph.REMEMBERED = 100
traced_graph.LIBRARIES += ("helpers", "zoo")


FIRST = (
    "test_docs.py",
    "test_decoder.py",
    "test_dependency_zoo.py",
    "test_onnx_cycle.py",
    "test_cli.py",
    "test_hub.py",
)
SIXTHS = 6


def pytest_addoption(parser):
    parser.addoption(
        "--sixth",
        type=int,
        choices=range(SIXTHS),
        metavar="K",
        help="run only sixth K of the slow tests, 0 to 5; each slow test is in exactly one of them",
    )
    parser.addoption(
        "--minutes", type=float, metavar="M", help="start no test after M minutes; those that are left are skipped"
    )


def sixth_of(node_id: str) -> int:
    """Return the sixth of the slow tests that a test belongs to; other tests do not change it."""
    return zlib.crc32(node_id.encode()) % SIXTHS


STARTED = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"not run: the {minutes:g} minutes of --minutes are over")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Select a sixth of the slow tests. The longest files begin first, so that no core waits for one."""
    sixth = config.getoption("sixth")
    if sixth is not None:
        selected = [i for i in items if i.get_closest_marker("slow") and sixth_of(i.nodeid) == sixth]
        kept = set(selected)
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = selected
    items.sort(key=lambda item: item.path.name not in FIRST)


def has_isa(name: str, *conditions: Callable[[], bool]) -> bool:
    """Return whether this CPU runs the kernels of an instruction set, and conditions hold while they are in use."""
    before = bindings.isa()
    try:
        bindings.use(name)
    except FormatError:
        return False
    holds = all(condition() for condition in conditions)
    bindings.use(str(before))
    return holds


def pytest_generate_tests(metafunc):
    """Run what takes `isa` with each instruction set of this CPU; runtime/test_kernels.py names those that it lacks.

    AMX has no kernels of single layers. Compiled models and decoders on the portable kernels are slow tests where the CPU has better
    ones, since each kernel is tested by itself.
    """
    if "isa" not in metafunc.fixturenames:
        return
    folder = metafunc.definition.path.parent.name
    marks = [mark.args[0] for mark in metafunc.definition.iter_markers("isa_if")]
    isas = [name for name in bindings.ISAS if has_isa(name, *marks) and (name, folder) != ("amx", "runtime")]
    portable_is_slow = folder in ("compiler", "generation") and len(isas) > 1
    values = [slow_case(name) if name == "portable" and portable_is_slow else name for name in isas]
    metafunc.parametrize("isa", values, indirect=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def isa(request):
    """Run with the kernels of one instruction set; see `pytest_generate_tests`."""
    before = bindings.isa()
    bindings.use(request.param)
    yield request.param
    bindings.use(str(before))


class Net(nn.Module):
    """One of each: convolution with stride and padding, depthwise, transposed with groups, linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.deep(self.conv(x).relu()).relu()).mean((2, 3))
        return self.fc(self.hidden(x).relu())


class Tied(nn.Module):
    """A small language model with its output head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.body(self.embed(ids))))


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, q: Tensor, kv: Tensor | None = None) -> Tensor:
        kv = q if kv is None else kv
        return self.attn(q, kv, kv)[0]


def image_batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 9, 9, generator=g), torch.randint(0, 5, (size,), generator=g)) for _ in range(count)]


@pytest.fixture
def same_draws(monkeypatch):
    """Have transformers draw tokens as `rarefy.generate` does, so that sampled texts can be compared."""
    from rarefy.generation.loop import draw

    original = torch.multinomial

    def multinomial(probabilities, num_samples, **options):
        one = num_samples == 1 and not options
        return draw(probabilities)[:, None] if one else original(probabilities, num_samples, **options)

    monkeypatch.setattr(torch, "multinomial", multinomial)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor]]:
    return image_batches()


def tiny_llama(dtype: torch.dtype = torch.float32, *, tie: bool = True):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return BertModel(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)).eval()


def text_model(folder: Path) -> None:
    """Put a tiny language model with its tokenizer, and a text of its words, into a folder."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(61))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    tiny_llama().save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{rng.randrange(61)}" for _ in range(400)), encoding="utf-8")


def sample(name: str):
    """Skip, visibly, where the package of a real model or data set is missing."""
    try:
        return builtin.find(name)
    except DataError as error:
        pytest.skip(str(error))


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run the command line in this process."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["rarefy", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as error:
            code = error.code
        return Ran(code or 0, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def _choices(request, monkeypatch):
    """Let tests that are marked `tuned` time what runs where, as users do; nothing is timed in others."""
    if request.node.get_closest_marker("tuned"):
        monkeypatch.delenv("RAREFY_TUNE")


@pytest.fixture(scope="module")
def one_line():
    """Predict along one line in each search of a file: others are tried in search/test_optimize.py."""
    from rarefy.search import search

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "UNIFORM", (1.0,))
        patch.setattr(search, "BALANCES", ())
        yield


def shell(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rarefy.cli.main", *map(str, words)], capture_output=True, text=True, timeout=400
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
