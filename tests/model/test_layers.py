import pytest
import torch
from torch import nn

from conftest import Attention, Net, Tied, tiny_llama
from rarefy.common.errors import ModelError, SelectorError
from rarefy.model.layers import all_layers, select_layers
from rarefy.model.layout import layout, prunable

NET = ["conv", "deep", "up", "hidden", "fc"]


@pytest.mark.parametrize(
    ("layers", "ignore", "want"),
    [
        (None, None, ["conv", "deep", "up", "hidden"]),  # fc is the output head
        ("fc", None, ["fc"]),
        ("*", None, NET),
        ("*", "fc", ["conv", "deep", "up", "hidden"]),
        ("re:(conv|up)", None, ["conv", "up"]),
        ("re:con", "conv", []),  # the whole name must match
        ("Conv2d", None, ["conv", "deep"]),
        (["Linear", "conv"], None, ["conv", "hidden", "fc"]),
        ("*.weight", None, NET),
        ("conv.weight", None, ["conv"]),
        ("size>=128", None, ["conv", "up", "hidden"]),
        ("size < 1_00", None, ["deep", "fc"]),
        ("*", ["size<100", "ConvTranspose2d"], ["conv", "hidden"]),
    ],
)
def test_selectors(layers, ignore, want):
    if not want:
        with pytest.raises((SelectorError, ModelError)):
            select_layers(Net(), layers, ignore)
    else:
        assert [l.name for l in select_layers(Net(), layers, ignore)] == want


def test_similar_names_are_compared_by_component():
    net = nn.ModuleDict(
        {"embeddings": nn.ModuleDict({"words": nn.Embedding(9, 4)}), "encoder": nn.ModuleDict({"a": nn.Linear(4, 4)})}
    )
    with pytest.raises(SelectorError, match="'encodr.*' matches no layer; nearest: encoder.a "):
        select_layers(net, "encodr.*")


@pytest.mark.parametrize(
    ("layers", "ignore", "error", "message"),
    [
        ("hiden", None, SelectorError, "'hiden' matches no layer; nearest: hidden"),
        ("conv2d", None, SelectorError, "Conv2d"),
        ("hiden.weigth", None, SelectorError, "nearest: hidden .classes"),
        (None, "nothing*", SelectorError, "ignore: 'nothing\\*' matches no layer"),
        ("re:(", None, SelectorError, "not a regular expression"),
        ("size~3", None, SelectorError, "expected a size such as"),
        ([3], None, SelectorError, "expected a selector, which is a string, got 3"),
        ("fc", "fc", ModelError, "no layer is selected"),
    ],
)
def test_selector_errors(layers, ignore, error, message):
    with pytest.raises(error, match=message):
        select_layers(Net(), layers, ignore)


def test_model_without_layers():
    with pytest.raises(ModelError, match="ReLU has no layer that can be pruned"):
        select_layers(nn.ReLU())


def test_tied_weights_are_one_tensor_and_left_alone():
    model = Tied()
    layers = {l.name: l for l in all_layers(model)}
    assert set(layers) == {"embed", "body"}
    assert [n for n, _, _ in layers["embed"].owners] == ["embed", "lm_head"]
    assert [l.name for l in select_layers(model)] == ["body"]
    assert [l.name for l in select_layers(model, "lm_head")] == ["embed"]


def test_hugging_face_head_is_left_alone():
    pytest.importorskip("transformers")
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied: still the head
    assert "lm_head" not in [l.name for l in select_layers(model)]
    assert "lm_head" in [l.name for l in all_layers(model)]


def test_subclass_is_known_by_its_base():
    class Padded(nn.Conv2d):
        pass

    model = nn.Sequential(Padded(4, 4, 3))
    assert [l.name for l in select_layers(model, "Conv2d")] == ["0"] == [l.name for l in select_layers(model, "Padded")]


def modules():
    transformers = pytest.importorskip("transformers")
    conv1d = transformers.pytorch_utils.Conv1D(6, 4)
    conv1d.weight.data = torch.arange(24.0).reshape(4, 6)
    return [
        (nn.Linear(3, 5), (1, 1, 5, 3)),
        (nn.Conv1d(4, 6, 5), (1, 5, 6, 4)),
        (nn.Conv2d(8, 12, (3, 2), groups=4), (4, 6, 3, 2)),
        (nn.Conv3d(2, 4, (1, 2, 3), groups=2), (2, 6, 2, 1)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 3, 6, 4)),
        (nn.ConvTranspose2d(8, 12, 3, groups=2), (2, 9, 6, 4)),
        (nn.Embedding(7, 3), (1, 1, 7, 3)),
        (conv1d, (1, 1, 6, 4)),
        (nn.MultiheadAttention(8, 2), (3, 1, 8, 8)),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=6), (1, 1, 8, 8)),
    ]


def test_layouts_round_trip():
    for module, shape in modules():
        name = prunable(module)[0]
        weight = getattr(module, name)
        plan = layout(module, name)
        assert plan is not None and plan.shape == shape == tuple(plan.view(weight).shape), module
        assert torch.equal(plan.unview(plan.view(weight), tuple(weight.shape)), weight), module


def test_layout_of_a_grouped_convolution_is_the_sum_it_computes():
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    plan = layout(conv, "weight")
    assert plan is not None
    W, x = plan.view(conv.weight), torch.randn(1, 4, 3, 3)
    want = torch.einsum("gkoi,gik->go", W, x.reshape(2, 2, 9)).reshape(1, 6, 1, 1)
    torch.testing.assert_close(conv(x), want)


def test_attention_projections_are_found():
    assert [l.full_name for l in all_layers(Attention())] == ["attn.in_proj_weight", "attn.out_proj"]
    separate = [l.full_name for l in all_layers(Attention(kdim=4, vdim=4))]
    assert separate == ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj"]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_the_head_is_known_inside_a_wrapper(wrap):
    assert not any(l.name.endswith("fc") for l in select_layers(wrap(Net())))


def test_a_convolution_can_be_the_head():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3)
            self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 4, 1))

    assert [l.name for l in select_layers(Squeeze())] == ["features"]


def test_selectors_are_strings():
    with pytest.raises(SelectorError, match="a selector or a list of selectors, got 5"):
        select_layers(Net(), 5)  # type: ignore
