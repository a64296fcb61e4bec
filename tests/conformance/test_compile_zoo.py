"""Every model that cuts are tested on through `rarefy.compile`, and language models as decoders: eager's numbers, also
at four sizes that the example did not have, or an error that says why not."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import rarefy
import zoo
from helpers.foreign_sizes import FOREIGN, with_sizes, wrong_answers
from helpers.marks import slow_except
from rarefy.common.errors import ModelError
from rarefy.compiler import compile, verify
from rarefy.compiler.subgraph import FusedSubgraph, SingleOp
from rarefy.model.compare import relative_distance

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("timm")

CASES = zoo.transformers_cases() | zoo.torchvision_cases() | zoo.timm_cases() | zoo.held_out_cases()
DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma")
IN_TORCH = ("s3d",)  # convolutions and pools of videos alone, which torch runs
REFUSED: dict[str, str] = {}  # what does not compile, and what the message says


@pytest.mark.parametrize("name", slow_except(CASES, "bert", "opt"))
def test_compiled_equals_eager(name):
    make, x = CASES[name]
    model = zoo.half(make())
    if "use_cache" in inspect.signature(model.forward).parameters:
        x = {**x, "use_cache": False}
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            rarefy.compile(model, x)
        return
    made = rarefy.compile(model, x)
    assert any(isinstance(i, FusedSubgraph | SingleOp) for i in made.schedule) == (name not in IN_TORCH)
    assert verify.distance(model, made, *pytree.tree_flatten(compile.split_example(x))) < 1e-4
    made.branches = None  # other branches are other graphs: this one alone answers, or refuses
    wrong, refused = wrong_answers(model, made, x)
    assert not wrong
    assert all("expected" in why or "compile the model with" in why for why in refused)


@pytest.mark.parametrize("name", slow_except((n for n in DECODERS if n not in ("gpt2", "qwen3")), "opt"))
def test_decoder_equals_eager(name):
    make, x = CASES[name]
    model = zoo.half(make())
    with torch.no_grad():
        want = model(**x, use_cache=False).logits
    made = rarefy.decoder(model)
    assert relative_distance(made(x["input_ids"]), want) < 1e-4
    for sizes in FOREIGN:
        ids = with_sizes(x, *sizes)["input_ids"]
        with torch.no_grad():
            assert relative_distance(made(ids), model(ids, use_cache=False).logits) < 1e-4


def test_biases_that_depend_on_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight, x.mean(0))

    net, x = Net().eval(), torch.randn(5, 8)
    torch.testing.assert_close(rarefy.compile(net, x)(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_decoder_that_cannot_be_made_is_named():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        rarefy.decoder(MambaForCausalLM(config).eval())
