"""Calibration of models that loop, keep values on themselves, mask padding, or nest their lists."""

import copy
import warnings

import pytest
import torch
from torch import nn

import rarefy
from rarefy.calibration.module_state import attributes_set_by
from rarefy.calibration.sequential import calibrate_sequentially, find_blocks, layer_groups
from rarefy.common.errors import DataError, ModelError, PatternError
from rarefy.model.layers import all_layers


class Cell(nn.Module):
    """A recurrent cell whose texts have their tokens first."""

    def __init__(self):
        super().__init__()
        self.x, self.h = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = torch.zeros(x.shape[1], 16)
        for token in x:
            h = torch.tanh(self.x(token) + self.h(h))
        return h


class UNet(nn.Module):
    """Keeps what a later layer adds."""

    def __init__(self, keep="attribute"):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.keep, self.features, self.skip = keep, [], None

    def forward(self, x):
        self.features.clear()
        if self.keep == "list":
            self.features.append(x)
        else:
            self.skip = x
        h = self.b(torch.relu(self.a(x)))
        return self.c(h + (self.features[0] if self.keep == "list" else self.skip))


def grams(model, data):
    """Return the Gram matrix of each layer's inputs, by the passes of solvers."""
    layers = all_layers(model)
    found = {}
    for step in calibrate_sequentially(model, data, layer_groups(model, data[0], layers)):
        found |= {layer.full_name: step.gram.H.clone() for layer in step.group.layers}
    return found


def seen_inputs(model, data):
    """Return the same, by a hook and passes one after the other."""
    sums = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda m, a, n=name: sums.setdefault(n, []).append(a[0].detach().flatten(0, -2))
            )
    with torch.no_grad():
        for batch in data:
            model(batch)
    return {n: (rows := torch.cat(parts)).T @ rows / len(rows) for n, parts in sums.items()}


@pytest.mark.parametrize("make", [Cell, UNet, lambda: UNet("list")])
def test_inputs_are_those_of_passes_one_after_the_other(make):
    torch.manual_seed(0)
    model = make().eval()
    data = [torch.randn(12, 32, 8) * scale for scale in (1.0, 1.0, 5.0)]
    found, wanted = grams(copy.deepcopy(model), data), seen_inputs(model, data)
    assert set(found) == set(wanted)
    for name in wanted:
        got = found[name].squeeze(0)
        torch.testing.assert_close(got / got.diagonal().sum(), wanted[name] / wanted[name].diagonal().sum(),
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


def test_attributes_that_a_forward_sets():
    net = UNet()
    assert [name for _, name in attributes_set_by(net, lambda: net(torch.randn(2, 8)))] == ["skip"]
    plain = nn.Sequential(nn.Linear(4, 4))
    assert attributes_set_by(plain, lambda: pytest.fail("a model of torch is not called")) == []


def test_more_calls_than_on_the_first_batch_are_refused():
    data = [torch.randn(4, 2, 8), torch.randn(6, 2, 8)]
    with pytest.raises(ModelError, match="is called more often on calibration batch 1 than on the first"):
        rarefy.prune_(Cell(), sparsity=0.5, solver="obs", data=data)
    rarefy.prune_(Cell(), sparsity=0.5, solver="obs", data=data[::-1])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, attention_mask):
        return self.encoder(x, src_key_padding_mask=attention_mask == 0)


@pytest.mark.parametrize("change", ["wanda", "obs", "static", "smooth"])
def test_torchs_encoder_with_padding(change):
    model = Padded().eval()
    mask = torch.ones(3, 6)
    mask[0, 4:] = 0
    data = [{"x": torch.randn(3, 6, 16), "attention_mask": mask}] * 2
    if change in ("wanda", "obs"):
        rarefy.prune_(model, sparsity=0.5, data=data, solver="obs" if change == "obs" else None)
    else:
        more = {"smooth": 0.5, "activations": "int8"} if change == "smooth" else {"activations": "int8-static"}
        rarefy.quantize_(model, "int8", data=data, **more)
    assert model(**data[0]).isfinite().all()


class Nested(nn.Module):
    """Blocks are lists of two modules, as in many short implementations of transformers."""

    def __init__(self):
        super().__init__()
        part = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())  # noqa: E731
        self.layers = nn.ModuleList([nn.ModuleList([part(), part()]) for _ in range(3)])

    def forward(self, x):
        for first, second in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = x + first(x)
            x = x + second(x)
        return x


def test_blocks_that_are_lists():
    model = Nested().eval()
    assert [b.name for b in find_blocks(model, all_layers(model))][:3] == ["layers.0.0", "layers.0.1", "layers.1.0"]
    rarefy.quantize_(model, "int4", solver="round", data=[torch.randn(8, 16)] * 2)


def test_masks_of_torch_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(model[2], "weight", 0.3)
    before = copy.deepcopy(model.state_dict())
    for change in (lambda: rarefy.quantize_(model, "int8"), lambda: rarefy.prune_(model, sparsity=0.5)):
        with pytest.raises(ModelError, match=r"masked by torch.nn.utils.prune: call rarefy.adopt_\(model\) first"):
            change()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    rarefy.adopt_(model)
    rarefy.quantize_(model, "int8")
    assert float((model[2].weight == 0).float().mean()) >= 0.29


def test_ctrl_c_while_smoothing_leaves_the_model(monkeypatch):
    from rarefy.quantization import smoothquant

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln, self.f, self.g = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.ln(x)
            return self.g(self.f(h) + h)

    for calls in range(1, 6):
        torch.manual_seed(0)
        model, x = Branch().eval(), torch.randn(16, 8)
        wanted, real, count = model(x), smoothquant._outputs, []

        def interrupted(*arguments, real=real, count=count, calls=calls):
            count.append(1)
            if len(count) == calls:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(smoothquant, "_outputs", interrupted)
            try:
                rarefy.quantize_(model, "int8", activations="int8", smooth=0.5, data=[x])
            except KeyboardInterrupt:
                torch.testing.assert_close(model(x), wanted)


def test_blocks_of_zeros_fit_into_groups():
    net, data = nn.Sequential(nn.Linear(96, 8)), [torch.randn(32, 96)]
    with pytest.raises(PatternError, match="group=32 must be a multiple of 12 for pattern 1x12"):
        rarefy.quantize_(net, "int4", solver="obs", pattern="1x12", sparsity=0.5, group=32, data=data)


class Experts(nn.Module):
    """Four blocks, of which a batch passes those with an even number."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x):
        return self.blocks[2](x + self.blocks[0](x))


@pytest.mark.parametrize(
    "compress",
    [
        lambda m, data: rarefy.prune_(m, solver="obs", sparsity=0.5, data=data),
        lambda m, data: rarefy.prune_(m, solver="admm", sparsity=0.5, data=data),
        lambda m, data: rarefy.prune_(m, solver={"name": "admm", "reconstruct": 1}, sparsity=0.5, data=data),
        lambda m, data: rarefy.quantize_(m, weights="int4", group=8, solver="obs", data=data),
        lambda m, data: rarefy.quantize_(
            m, weights="int4", group=8, solver={"name": "obs", "asymmetric": 0}, data=data
        ),
        lambda m, data: rarefy.quantize_(m, weights="int4", group=8, solver={"name": "round", "steps": 4}, data=data),
        lambda m, data: rarefy.factorize_(m, rank=2, data=data),
    ],
    ids=["obs", "admm", "reconstruct", "gptq", "gptq-symmetric", "round", "factorize"],
)
def test_layers_that_the_data_do_not_reach_are_compressed_without_them(compress):
    """Their weights alone tell what can go: no solver stops halfway."""
    torch.manual_seed(0)
    model, data = Experts().eval(), [torch.randn(64, 8) for _ in range(3)]
    before = model.blocks[1](data[0])
    with pytest.warns(UserWarning, match=r"not called on the calibration data.*blocks\.1\.0.*blocks\.3\.2"):
        compress(model, data)
    assert torch.isfinite(model(data[0])).all()
    after = model.blocks[1](data[0])
    assert 0 < (after - before).square().sum() < before.square().sum()


def test_a_resumed_run_names_all_layers_that_the_data_do_not_reach(tmp_path):
    data = [torch.randn(64, 8) for _ in range(2)]
    options = {"solver": "obs", "sparsity": 0.5, "data": data, "resume_dir": tmp_path / "state"}
    torch.manual_seed(0)
    model = Experts().eval()
    killed, whole = copy.deepcopy(model), []
    for net in (killed, model):  # the second one finds all steps done
        with pytest.warns(UserWarning, match=r"not called .*blocks\.1\.0, blocks\.1\.2.*blocks\.3\.2") as caught:
            rarefy.prune_(net, **options)
        whole.append(str(caught[0].message))
    assert whole[0] == whole[1]
    assert all(torch.equal(a, b) for a, b in zip(killed.parameters(), model.parameters()))


@pytest.mark.parametrize("allocate", ["errors", "search"])
def test_errors_of_layers_that_the_data_do_not_reach_are_not_known(allocate):
    model, data = Experts().eval(), [torch.randn(64, 8)]
    loss = lambda out, batch: out.square().mean()  # noqa: E731
    with pytest.raises(DataError, match=r"blocks\.1"):
        rarefy.prune_(model, solver="obs", sparsity=0.5, allocate=allocate, data=data, loss=loss)


class EitherOr(nn.Module):
    """A batch of positive numbers passes a twice, another one b."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(self.a(x)) if bool((x > 0).all()) else self.b(x))


def test_passes_that_are_run_again_keep_the_inputs_of_others():
    """New weights of a layer that is called twice run its passes again; the sums of other passes stay."""
    torch.manual_seed(0)
    model, data = EitherOr().eval(), [torch.rand(64, 8) + 0.1, torch.randn(64, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rarefy.prune_(model, solver="obs", sparsity=0.5, data=data)
    steps = calibrate_sequentially(model, data, layer_groups(model, data[0], all_layers(model)))
    grams = {s.group.layers[0].full_name: s.gram for s in steps}
    torch.testing.assert_close(grams["b"].H[0], data[1].T @ data[1] / 64)
    assert grams["c"].tokens == 128
