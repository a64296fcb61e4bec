"""Structured pruning of models with weight normalization: exact where it can be, otherwise units stay and say why."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as hooked_weight_norm

import rarefy
from rarefy.dependency.graph import trace


def old_weight_norm(module, dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the hook
        return hooked_weight_norm(module, dim=dim)


NORMS = {"parametrization": parametrizations.weight_norm, "hook": old_weight_norm}


def wav2vec2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
    )
    return transformers.Wav2Vec2Model(config).eval()


def convolutions(norm, dim=0):
    torch.manual_seed(0)
    first = norm(nn.Conv1d(4, 12, 3, padding=1), dim=dim)
    return nn.Sequential(first, nn.ReLU(), nn.Conv1d(12, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval()


@pytest.mark.parametrize("keep", [0.75, 0.5])
def test_wav2vec2_is_cut_and_returns_what_the_masked_model_returns(keep):
    model, audio = wav2vec2(), torch.randn(2, 800)
    masked = copy.deepcopy(model)
    rarefy.cut_(masked, audio, keep=keep, units=["head", "neuron"], mask_only=True)
    report = rarefy.cut_(model, audio, keep=keep, units=["head", "neuron"])
    layer = model.encoder.layers[0]
    assert layer.feed_forward.intermediate_dense.out_features == 48 * keep
    assert layer.attention.q_proj.out_features == 32 * keep
    assert model.encoder.pos_conv_embed.conv.out_channels == 32
    reasons = {row["group"]: row["stays because"] for row in report.rows}
    assert "weight normalization divides by the norm" in reasons["feature_projection.projection.weight:0"]
    with torch.no_grad():
        torch.testing.assert_close(model(audio)[0], masked(audio)[0], atol=1e-5, rtol=1e-4)


def test_parameters_that_the_example_does_not_use_stay():
    graph = trace(wav2vec2(), torch.randn(1, 800))
    locks = {g.name: g.lock for g in graph.groups}
    assert locks["masked_spec_embed:0"] == "the example does not use it"


@pytest.mark.parametrize("norm", NORMS)
def test_outputs_of_a_weight_normalized_convolution_are_pruned(norm):
    model, x = convolutions(NORMS[norm]), torch.randn(2, 4, 9)
    masked = copy.deepcopy(model) if norm == "parametrization" else None  # torch cannot copy its old hook
    rarefy.cut_(model, x, keep=0.5)
    assert model[0].out_channels == 6 and model[2].in_channels == 6 and model[2].out_channels == 3
    assert {tuple(p.shape) for p in model[0].parameters()} == {(6,), (6, 1, 1), (6, 4, 3)}
    if masked is not None:
        rarefy.cut_(masked, x, keep=0.5, mask_only=True)
        with torch.no_grad():
            torch.testing.assert_close(model(x), masked(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [1, 2, None])
def test_normalized_dimensions_stay(norm, dim):
    model, x = convolutions(NORMS[norm], dim), torch.randn(2, 4, 9)
    rarefy.cut_(model, x, keep=0.5)
    assert model[0].out_channels == 12 and model[2].in_channels == 12 and model[2].out_channels == 3


def test_inputs_of_a_weight_normalized_layer_stay_and_its_outputs_go():
    torch.manual_seed(0)
    middle = parametrizations.weight_norm(nn.Linear(8, 12))
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), middle, nn.ReLU(), nn.Linear(12, 2)).eval(), torch.randn(3, 4)
    rarefy.cut_(model, x, keep=0.5)
    assert model[0].out_features == 8 and middle.in_features == 8
    assert middle.out_features == 6 and model[4].in_features == 6
