"""The models that cuts are tested on: a maker and the smallest example that runs, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[Callable[[], nn.Module], Any]


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def ids(high: int = 99) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, high, (2, 10), generator=torch.Generator().manual_seed(1))}


def half(model: nn.Module) -> nn.Module:
    """Half of the weights zero: some convolutions have kernels then."""
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            m.weight.data *= torch.rand(m.weight.shape, generator=g) < 0.5
    return model.eval()


def lively(model: nn.Module) -> nn.Module:
    """Give a fresh model numbers that matter: heads and scales that start at zero would prove nothing."""
    with torch.no_grad():
        for p in model.parameters():
            if float(p.abs().max()) < 1e-3:
                nn.init.normal_(p, std=0.05)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                nn.init.normal_(m.running_mean, std=0.1)
                nn.init.uniform_(m.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def torchvision_cases() -> dict[str, Case]:
    """All classifiers, segmentation, the backbones of detection, RAFT."""
    import torchvision.models as models
    from torchvision.models import detection, optical_flow, segmentation

    found: dict[str, Case] = {}
    for name in models.list_models(module=models):
        how: dict[str, Any] = {"weights": None}
        size = 64
        if name.startswith("vit_"):
            how["image_size"] = 56 if name == "vit_h_14" else 64
        if name in ("googlenet", "inception_v3"):
            how |= {"init_weights": False, "aux_logits": False}
        if name == "inception_v3":
            size = 96
        if name.startswith("maxvit"):
            how["input_size"], size = (224, 224), 224
        size = 56 if name == "vit_h_14" else size
        found[name] = (lambda n=name, h=how: lively(models.get_model(n, **h)), images(size))
    for name in models.list_models(module=segmentation):
        how = {"weights": None, "weights_backbone": None, "num_classes": 21}
        found[name] = (lambda n=name, h=how: lively(models.get_model(n, **h)), images(64))
    for name in models.list_models(module=detection):
        how = {"weights": None, "weights_backbone": None}
        size = 300 if name.startswith("ssd300") else 64
        found[f"{name}.backbone"] = (lambda n=name, h=how: lively(models.get_model(n, **h).backbone), images(size, 1))
    for name in models.list_models(module=optical_flow):
        one, two = images(128).split(1)
        x = {"image1": one, "image2": two, "num_flow_updates": 2}
        found[name] = (lambda n=name: lively(models.get_model(n, weights=None)), x)
    return found


def transformers_cases() -> dict[str, Case]:
    """Tiny configs of sixteen families."""
    import transformers as t

    text = {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sight = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sight |= {"intermediate_size": 96}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    grouped, picture = {**text, "num_key_value_heads": 2}, {"pixel_values": images(32)}
    towers = {"text_config": {**text, "projection_dim": 16}, "vision_config": {**sight, "projection_dim": 16}}
    sound = {"input_features": torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(1))}

    def case(model: str, config: Any, x: Any) -> Case:
        def make() -> nn.Module:
            net = getattr(t, model)(config)
            with torch.no_grad():
                for p in net.parameters():
                    p += torch.randn_like(p) * 0.05
            return net.eval()

        return make, x

    whisper = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    whisper |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16}
    whisper |= {"max_source_positions": 20, "pad_token_id": 0, "decoder_start_token_id": 1, "vocab_size": 100}
    return {
        "bert": case("BertForSequenceClassification", t.BertConfig(**text), ids()),
        "roberta": case("RobertaForMaskedLM", t.RobertaConfig(**text), ids()),
        "distilbert": case("DistilBertForSequenceClassification", t.DistilBertConfig(vocab_size=100, dim=48, n_layers=2, n_heads=4, hidden_dim=96), ids()),
        "vit": case("ViTForImageClassification", t.ViTConfig(**sight), picture),
        "deit": case("DeiTForImageClassification", t.DeiTConfig(**sight), picture),
        "swin": case("SwinForImageClassification", t.SwinConfig(image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4), picture),
        "clip": case("CLIPModel", t.CLIPConfig(**towers, projection_dim=16), {**ids(), **picture}),
        "gpt2": case("GPT2LMHeadModel", t.GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4, **special), ids()),
        "opt": case("OPTForCausalLM", t.OPTConfig(vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=48), ids()),
        "llama": case("LlamaForCausalLM", t.LlamaConfig(**grouped), ids()),
        "qwen2": case("Qwen2ForCausalLM", t.Qwen2Config(**grouped), ids()),
        "qwen3": case("Qwen3ForCausalLM", t.Qwen3Config(**grouped, head_dim=12), ids()),
        "mistral": case("MistralForCausalLM", t.MistralConfig(**grouped), ids()),
        "gemma": case("GemmaForCausalLM", t.GemmaConfig(**grouped, head_dim=12), ids()),
        "t5": case("T5ForConditionalGeneration", t.T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4), {**ids(), "decoder_input_ids": ids()["input_ids"]}),
        "whisper": case("WhisperForConditionalGeneration", t.WhisperConfig(**whisper), {**sound, "decoder_input_ids": ids()["input_ids"][:1]}),
    }  # fmt: skip


TIMM = [
    "convnext_atto",
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "regnety_002",
    "mixer_s32_224",
    "resmlp_12_224",
    "beit_base_patch16_224",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
    "poolformer_s12",
    "pit_ti_224",
    "levit_128s",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "crossvit_tiny_240",
    "xcit_nano_12_p16_224",
    "visformer_tiny",
    "nfnet_l0",
    "repvgg_a0",
    "ghostnet_050",
    "mobilevit_xxs",
    "edgenext_xx_small",
    "efficientformer_l1",
    "maxvit_rmlp_pico_rw_256",
    "inception_v4",
    "xception41",
    "res2net50_14w_8s",
    "resnest14d",
    "tinynet_e",
    "gmlp_s16_224",
    "convmixer_768_32",
    "twins_svt_small",
    "mvitv2_tiny",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "hgnet_tiny",
    "hiera_tiny_224",
    "starnet_s1",
    "rdnet_tiny",
]


def timm_cases() -> dict[str, Case]:
    """Forty-three families."""
    import timm

    found: dict[str, Case] = {}
    for name in TIMM:
        last = name.rpartition("_")[2]
        size = int(last) if last in ("224", "240", "256") else 299 if name == "inception_v4" else 224
        size = 256 if name == "mobilevit_xxs" else size
        found[f"timm.{name}"] = (lambda n=name: lively(timm.create_model(n, pretrained=False)), images(size))
    return found


HELD_OUT = [
    "convnextv2_atto",
    "pvt_v2_b0",
    "coatnet_nano_rw_224",
    "davit_tiny",
    "focalnet_tiny_srf",
    "mobilevitv2_050",
    "repvit_m0_9",
    "shvit_s1",
    "tiny_vit_5m_224",
]


def held_out_cases() -> dict[str, Case]:
    """Models that no pass was written for: more timm families, and classifiers of videos."""
    import timm
    import torchvision.models as models

    found: dict[str, Case] = {}
    for name in HELD_OUT:
        found[f"timm.{name}"] = (lambda n=name: lively(timm.create_model(n, pretrained=False)), images(224))
    video = images(112, 16).movedim(0, 1)[None]
    for name in ("s3d", "r3d_18", "mc3_18", "r2plus1d_18", "swin3d_t", "mvit_v1_b", "mvit_v2_s"):
        large = name == "s3d" or name.startswith("mvit")
        x = torch.cat([video, video], 3).repeat(1, 1, 1, 1, 2) if large else video
        found[name] = (lambda n=name: lively(models.get_model(n, weights=None)), x)
    return found


BREAKS = " with graph breaks"
DYNAMO = [  # models for torch.compile(backend="rarefy")
    "bert",
    "roberta",
    "distilbert" + BREAKS,
    "vit" + BREAKS,
    "deit",
    "swin",
    "clip",
    "gpt2",
    "opt",
    "llama",
    "qwen3" + BREAKS,
    "gemma",
    "t5",
    "whisper",
    "resnet18",
    "squeezenet1_1" + BREAKS,
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "timm.convnext_atto" + BREAKS,
    "timm.vit_tiny_patch16_224",
]


def dynamo_cases() -> dict[str, Case]:
    """The models of `DYNAMO`. Those with graph breaks have one behind each child of their longest lists of blocks."""
    cases = transformers_cases() | torchvision_cases() | timm_cases()

    def make(name: str) -> nn.Module:
        model = cases[name.removesuffix(BREAKS)][0]()
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
        for block in max(lists, key=len) if name.endswith(BREAKS) else ():
            block.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        return model

    return {n: (lambda n=n: make(n), example_without_cache(n, cases)) for n in DYNAMO}


def example_without_cache(name: str, cases: dict[str, Case]) -> Any:
    """Return the example of a case; language models return no keys and values."""
    x = cases[name.removesuffix(BREAKS)][1]
    return {**x, "use_cache": False} if name.removesuffix(BREAKS) in CACHING else x


CACHING = ("gpt2", "opt", "llama", "qwen3", "gemma", "t5", "whisper")
