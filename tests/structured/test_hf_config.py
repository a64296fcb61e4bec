"""Configs of Hugging Face models after a cut."""

import pytest
import torch
from torch import nn

import rarefy
from helpers.structured_models import IDS, language

transformers = pytest.importorskip("transformers")


def test_a_width_cut_after_a_depth_cut_loads(tmp_path):
    def make():
        return language("Llama", num_key_value_heads=2, num_hidden_layers=6).eval()

    torch.manual_seed(0)
    model = make()
    rarefy.drop_layers_(model, IDS, layers=["model.layers.0", "model.layers.3"])
    assert model.rarefy_cut["config"]
    rarefy.cut_(model, IDS, units="neuron", scope="global", keep=0.6)
    assert not model.rarefy_cut["config"]
    rarefy.save(model, tmp_path / "out")
    for again in (rarefy.load(tmp_path / "out"), rarefy.load(tmp_path / "out", model=make())):
        with torch.no_grad():
            assert torch.equal(again.eval()(**IDS).logits, model(**IDS).logits)
        assert again.config.num_hidden_layers == 4


class Strict(nn.Module):
    """Rejects a config with an assert."""

    def __init__(self, config):
        super().__init__()
        assert config.num_hidden_layers % 2 == 0
        self.config = config
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(config.num_hidden_layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_class_that_rejects_a_config_keeps_its_own():
    config = transformers.PretrainedConfig(num_hidden_layers=4)
    model = Strict(config).eval()
    rarefy.drop_layers_(model, torch.randn(3, 2, 8), layers="layers.1")
    assert len(model.layers) == 3 and model.config is config and not model.rarefy_cut["config"]


def test_a_dry_run_keeps_the_config_object():
    model = language("Llama", num_key_value_heads=2).eval()
    config = model.config
    rarefy.drop_layers_(model, IDS, keep=0.5, dry_run=True)
    rarefy.cut_(model, IDS, dry_run=True)
    assert model.config is config


def test_a_saved_config_changes_sizes_and_no_ids():
    from rarefy.structured.hf_config import shrink_config

    model = language("Llama", num_key_value_heads=2)
    before = {k: getattr(model.config, k) for k in ("eos_token_id", "pad_token_id", "max_position_embeddings")}
    shrink_config(model, {"eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 1, "hidden_size": 24})
    assert {k: getattr(model.config, k) for k in before} == before and model.config.hidden_size == 24
