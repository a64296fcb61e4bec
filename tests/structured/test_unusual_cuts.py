"""Cuts of models with numbers that equal sizes by chance, outputs of other kinds, and layers that few models have."""

import dataclasses

import pytest
import torch
from torch import nn

import rarefy
from rarefy.common.errors import ModelError


def test_the_number_of_a_layer_is_no_size():
    """A model with as many layers as heads has numbers of layers that equal sizes of views; the KV cache needs them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (1, 8))
    rarefy.cut_(model, {"input_ids": ids}, keep=0.5, units="head")
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]
    cached, plain = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_heads_that_modules_share_are_removed_alike():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5EncoderModel(config).eval()
    names = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    example = {"input_ids": torch.randint(0, 60, (1, 8))}
    with pytest.raises(ModelError, match="shares its heads with another module"):
        rarefy.prune_heads_(model, {names[0]: [0], names[1]: [1, 2]}, example)
    rarefy.prune_heads_(model, {name: [0] for name in names}, example)
    assert model.encoder.block[1].layer[0].SelfAttention.q.weight.shape[0] == 24


@dataclasses.dataclass
class Out:
    logits: torch.Tensor


class Sealed:
    def __init__(self, logits):
        self.hidden = logits


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(8, 16), nn.Linear(16, 4), wrap

    def forward(self, x):
        return self.wrap(self.b(torch.relu(self.a(x))))


def test_outputs_in_a_dataclass_stay():
    model = Wrapped(Out)
    rarefy.cut_(model, torch.randn(4, 8), keep=0.5)
    assert model.b.weight.shape == (4, 8)
    with pytest.raises(ModelError, match="the model returns Sealed, in which no tensor is found"):
        rarefy.cut_(Wrapped(Sealed), torch.randn(4, 8), keep=0.5)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


def test_layers_that_the_example_does_not_call_have_a_note():
    report = rarefy.cut_(Auxiliary().eval(), torch.randn(4, 8), keep=0.5)
    assert any("not called on the example" in n and n.endswith(": aux") for n in report.notes)


@pytest.mark.parametrize(
    "options", [{"keep": 0.5, "round_to": 32, "steps": 2}, {"keep": 0.9, "steps": 5}, {"keep": 0.5, "steps": 2}]
)
@pytest.mark.parametrize("mask_only", [False, True])
def test_small_steps_add_up(options, mask_only):
    torch.manual_seed(0)
    width = 64 if "round_to" in options else 16
    at_once, in_steps = (nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)) for _ in range(2))
    in_steps.load_state_dict(at_once.state_dict())
    x = torch.randn(4, 8)
    rarefy.cut_(in_steps, x, mask_only=mask_only, **options)
    rarefy.cut_(at_once, x, mask_only=mask_only, **{**options, "steps": 1})
    kept = [int((m[0].weight != 0).any(1).sum()) for m in (in_steps, at_once)]
    assert kept[0] < width and abs(kept[0] - kept[1]) <= 1


def test_one_group_without_a_reader_does_not_change_the_score_of_the_others():
    """Units that a transposed convolution reads go by magnitude; all others by their fluctuation, as without it."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)]
    with torch.no_grad():
        body[0].weight[:8] *= 10  # large, but constant on the data
        body[0].weight[:8, 2] = 0.0
    data = torch.randn(16, 3, 4, 4)
    data[:, :2] = 1.0
    plain = nn.Sequential(*body).eval()
    rest = [nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)]
    other = nn.Sequential(*(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)), *rest).eval()
    other.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, other):
        rarefy.cut_(model, data[:2], keep=0.5, data=[data], repair=False)
    assert torch.equal(plain[0].weight, other[0].weight)


def test_inputs_without_a_batch():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    rarefy.cut_(net, torch.randn(8), keep=0.5)
    assert net[0].weight.shape == (8, 8)


def test_blocks_with_names_of_their_own(tmp_path):
    """Those that stay take the first names, so that the weights still fit the class of torchvision."""
    torchvision = pytest.importorskip("torchvision")
    make = lambda layers: torchvision.models.VisionTransformer(  # noqa: E731
        image_size=16, patch_size=8, num_layers=layers, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    ).eval()
    torch.manual_seed(0)
    model, x = make(4), torch.randn(2, 3, 16, 16)
    rarefy.cut_(model, x, keep=0.5, units="neuron")
    report = rarefy.drop_layers_(model, x, layers=["encoder.layers.encoder_layer_1"], score="random")
    assert report.rows[0]["block"] == "encoder.layers.encoder_layer_1"
    assert [n for n, _ in model.encoder.layers.named_children()] == [f"encoder_layer_{i}" for i in range(3)]
    assert set(model.state_dict()) == set(make(3).state_dict())
    rarefy.save(model, tmp_path / "vit")
    torch.testing.assert_close(rarefy.load(tmp_path / "vit", model=make(4)).eval()(x), model(x))


def test_blocks_that_share_weights(tmp_path):
    make = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 4, enable_nested_tensor=False)  # noqa: E731
    model, x = make().eval(), torch.randn(3, 2, 8)
    rarefy.tie_layers_(model, 2)
    before = sum(p.numel() for p in model.parameters())
    report = rarefy.drop_layers_(model, x, layers=["layers.1"], score="random")
    assert report.summary["parameters"].startswith(f"{before:,} -> {before:,}")
    rarefy.save(model, tmp_path / "tied")
    again = rarefy.load(tmp_path / "tied", model=make()).eval()
    torch.testing.assert_close(again(x), model(x))
    assert again.layers[1].linear1.weight is again.layers[2].linear1.weight
