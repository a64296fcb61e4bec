"""The walk against a model run from the start for every layer, and Gram matrices against written-out products."""

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import rarefy
from conftest import Attention, Net
from helpers.small_blocks import lin, module, rows
from rarefy.calibration import offload
from rarefy.calibration.gram import MIRROR_COLUMNS, Gram, input_columns
from rarefy.calibration.sequential import calibrate_sequentially, layer_groups
from rarefy.calibration.weight_hooks import weight_hooks
from rarefy.common.errors import DataError, ModelError
from rarefy.model.forward import call
from rarefy.model.layers import all_layers, select_layers
from rarefy.prune.matrices import to_matrix


@pytest.mark.parametrize("C", [5, 2 * MIRROR_COLUMNS, 2 * MIRROR_COLUMNS + 3])
def test_gram_of_pieces_and_parts(C):
    x, dense = torch.randn(2, 9, C), torch.randn(2, 9, C)
    g = Gram()
    g.add(x[:, :4], dense[:, :4])
    g.add(x[:, 4:], dense[:, 4:])
    done = g.finalize()
    torch.testing.assert_close(done.H, x.transpose(1, 2) @ x / 9)
    torch.testing.assert_close(done.cross, (dense - x).transpose(1, 2) @ x / 9)
    assert done.tokens == 9


LAYERS = [
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=(2, 1), groups=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 8)),
    (nn.Conv1d(4, 6, 3, padding=2, stride=2, dilation=2), (2, 4, 11)),
    (nn.Conv3d(2, 4, 2, groups=2), (2, 2, 4, 5, 6)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda v: repr(v))
def test_weights_times_columns_are_the_outputs(module, shape):
    layer = all_layers(module)[0]
    x = torch.randn(shape)
    cols = input_columns(layer, module, x, None)  # [G, n, C]
    out = (to_matrix(layer, module.weight) @ cols.transpose(1, 2)).detach()  # [G, O, n]
    y = (module(x) - module.bias.reshape(-1, *[1] * (module.weight.dim() - 2))).detach()
    if isinstance(module, nn.Linear):
        torch.testing.assert_close(out[0].T.reshape(y.shape), y)
    else:
        y = y if y.dim() == module.weight.dim() else y[None]
        want = y.transpose(0, 1).reshape(layer.layout.shape[0], layer.layout.shape[2], -1)
        torch.testing.assert_close(out, want)


def test_transposed_convolution_is_its_products_before_they_overlap():
    module = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)  # stride = kernel: nothing overlaps
    x = torch.randn(2, 4, 3, 3)
    layer = all_layers(module)[0]
    out = to_matrix(layer, module.weight) @ input_columns(layer, module, x, None).transpose(1, 2)  # [G, K O, n]
    out = out.reshape(2, 2, 2, 3, 2, 3, 3)  # G, kh, kw, O, N, H, W
    want = module(x).reshape(2, 2, 3, 3, 2, 3, 2).permute(1, 4, 6, 2, 0, 3, 5)
    torch.testing.assert_close(out, want)


class Twice(nn.Module):
    """A layer used twice, one that only some batches reach, and two that share an input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.a(x).relu()
        x = self.a(x).relu()
        x = self.b(x) * self.c(x)
        return self.d(x) if x.sum() > 0 else x


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.layers(x)


MODELS = [
    (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (3, 6)),
    (Net, (3, 3, 8, 8)),
    (Attention, (3, 5, 8)),
    (Twice, (3, 6)),
    (Mixed, (3, 5, 8)),
]


def oracle(make, model, data, name):
    """The mean Gram matrix of the inputs that a layer gets in the model as it is now, over all its calls."""
    fresh = make().eval()
    fresh.load_state_dict(model.state_dict())
    layer = next(l for l in all_layers(fresh) if l.full_name == name)
    found = []
    with torch.no_grad(), weight_hooks(fresh, [layer], lambda l, m, x: found.append(input_columns(l, m, x, None))):
        for batch in data:
            call(fresh, batch)
    x = torch.cat(found, 1)
    return x.transpose(1, 2) @ x / x.shape[1]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_every_layer_sees_the_model_as_it_has_become(make, shape, dense):
    model = make().eval()
    data = [torch.randn(shape) for _ in range(3)]
    layers = all_layers(model)
    groups = layer_groups(model, data[0], layers)
    assert sorted(l.full_name for g in groups for l in g.layers) == sorted(l.full_name for l in layers)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for stop in calibrate_sequentially(model, data, groups, dense=dense):
        for layer in stop.group.layers:
            torch.testing.assert_close(stop.gram.H, oracle(make, model, data, layer.full_name))
            stop.weights[layer.full_name] = layer.original.detach() * 0.8
        if dense and stop.group.calls == 1:
            assert stop.gram.cross is not None
    for layer in layers:
        name = f"{layer.name}.{layer.param}".lstrip(".")
        torch.testing.assert_close(layer.original.detach(), before[name] * 0.8)
    out = model(data[0])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.isfinite(out).all()


def test_the_dense_stream_runs_the_untouched_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = [torch.randn(5, 6) for _ in range(2)]
    x = torch.cat(data)
    dense = model[1](model[0](x)).detach()
    for stop in calibrate_sequentially(model, data, layer_groups(model, data[0], all_layers(model)), dense=True):
        if stop.group.layers[0].name == "0":
            torch.testing.assert_close(stop.gram.cross, torch.zeros(1, 6, 6))
            stop.weights["0"] = model[0].weight.detach() * 0.5
        else:
            now = model[1](model[0](x)).detach()
            torch.testing.assert_close(stop.gram.cross[0], (dense - now).T @ now / 10)


def test_one_forward_pass_is_enough():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    calls = []
    for m in model:
        m.register_forward_hook(lambda *_: calls.append(1))
    data = [torch.randn(2, 4) for _ in range(3)]
    groups = layer_groups(model, data[0], all_layers(model))
    calls.clear()
    for _ in calibrate_sequentially(model, data, groups):
        pass
    assert len(calls) == 4 * 3  # the last layer itself is nobody's concern


def test_layers_with_one_input_share_a_stop():
    model = Twice().eval()
    groups = layer_groups(model, torch.ones(2, 6), all_layers(model))
    assert [[l.name for l in g.layers] for g in groups] == [["a"], ["b", "c"], ["d"]]
    assert groups[0].calls == 2


def test_padding_is_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.fc(x)

    model, x = Masked(), torch.randn(2, 3, 4)
    kept = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": x, "attention_mask": kept}
    [stop] = calibrate_sequentially(model, [batch], layer_groups(model, batch, all_layers(model)))
    rows = x[kept.bool()]
    torch.testing.assert_close(stop.gram.H[0], rows.T @ rows / 3)


def test_what_is_never_reached_and_what_is_not_finite():
    model = Twice().eval()
    with torch.no_grad():
        for layer, bias in ((model.b, -1), (model.c, 1)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
    data = [torch.randn(2, 6)]
    with pytest.warns(UserWarning, match="not called on the calibration data .* same: d$"):
        steps = list(calibrate_sequentially(model, data, layer_groups(model, data[0], all_layers(model))))
    [of_d] = [s for s in steps if s.group.layers[0].full_name == "d"]
    assert torch.equal(of_d.gram.H, torch.eye(6)[None])
    with pytest.raises(ModelError, match="a: NaN or inf in its inputs on calibration batch 1"):
        list(
            calibrate_sequentially(model, [*data, data[0] / 0], layer_groups(model, data[0], select_layers(model, "a")))
        )
    with pytest.raises(DataError, match="no layer is called on the calibration data .*: give other data"):
        list(calibrate_sequentially(model, [], layer_groups(model, data[0], select_layers(model, "a"))))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_walk_that_is_left_early_leaves_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.train()
    steps = calibrate_sequentially(
        model, [torch.randn(2, 4)], layer_groups(model, torch.randn(2, 4), all_layers(model))
    )
    next(iter(steps))
    steps.close()
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert F.mse_loss(model(torch.zeros(1, 4)), model(torch.zeros(1, 4))) == 0


def test_embeddings_leave_memory_once_read(tmp_path):
    words, rows = torch.randn(100_000, 128), nn.Linear(128, 8)
    save_file({"words": words}, tmp_path / "words.safetensors")
    model = nn.Sequential(nn.Embedding(1, 1), rows)
    model[0].weight = nn.Parameter(load_file(tmp_path / "words.safetensors")["words"], requires_grad=False)
    assert torch.equal(model[0].weight, words)  # all of it is in memory
    before = offload.resident_bytes()[1]
    data = [torch.arange(64)]
    with closing(calibrate_sequentially(model, data, layer_groups(model, data[0], select_layers(model)))) as stops:
        next(stops)
        assert before - offload.resident_bytes()[1] > 40 << 20  # of 51 MB
    assert torch.equal(model[0].weight, words)
    own = torch.randn(1 << 20)  # in no file: would be swapped
    assert [
        t is model[0].weight for t in offload.file_backed([own, model[0].weight, torch.empty(2, device="meta")])
    ] == [True]


def test_the_held_out_batch_is_the_first_even_where_others_arrive_before_it():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x) if x.sum() > 0 else x)

    model, data = Skips(), [torch.rand(5, 4), -torch.rand(3, 4), torch.rand(2, 4)]
    groups = layer_groups(model, data[0], select_layers(model, ["a", "b"]))
    with closing(calibrate_sequentially(model, data, groups, dense=True)) as stops:
        grams = [stop.gram for stop in stops]
    with torch.no_grad():
        inputs = [data[0], model.a(data[0])]
    for gram, x, tokens in zip(grams, inputs, [7, 10]):
        assert gram.tokens == tokens and gram.held_out.tokens == 5
        torch.testing.assert_close(gram.held_out.H[0], x.T @ x / 5)


def test_in_place_changes_make_another_input():
    net = module(lambda m, x: m.b((x := x * 1, y := m.a(x), x.add_(5 * y))[0]), a=lin(), b=lin())
    assert [[l.name for l in g.layers] for g in layer_groups(net, rows()[0], select_layers(net))] == [["a"], ["b"]]


def grams(net, data, change=None, **how):
    """Gram matrices by the first layer of each stop; `change` = a layer that is emptied at its stop."""
    found = {}
    for stop in calibrate_sequentially(net, data, layer_groups(net, data[0], select_layers(net), **how), **how):
        found[stop.group.layers[0].name] = stop.gram
        for layer in stop.group.layers:
            if layer.name == change:
                stop.weights[change] = torch.zeros_like(layer.original)
    return found


def test_gram_matrices_of_changed_inputs_are_recomputed():
    def loop(m, x):
        for _ in range(3):
            x = x + m.b(torch.relu(m.a(x)))
        return x

    net, data = module(loop, a=lin(), b=lin()), rows()
    found = grams(net, data, change="a")["b"]
    inside = [torch.relu(net.a.bias).expand(40, 6)] * 9  # a is empty: only its bias is left
    assert found.tokens == 360
    torch.testing.assert_close(found.H[0], sum(x.T @ x for x in inside).detach() / 360)


def test_the_dense_pass_never_sees_changed_weights():
    """kv shares its input with qa but runs after qb: the dense pass must not meet it emptied."""
    net = module(lambda m, x: m.o(m.qb(torch.relu(m.qa(x))) + 2 * m.kv(x)), qa=lin(), qb=lin(), kv=lin(), o=lin())
    data = rows()
    q, kv = [net.qb(torch.relu(net.qa(x))) for x in data], [2 * net.kv(x) for x in data]
    cut = [x @ torch.zeros(6, 6) + 2 * net.kv.bias for x in data]
    want = sum((k - c).T @ (a + c) for a, k, c in zip(q, kv, cut)).detach() / 120
    found = grams(net, data, change="kv", dense=True)["o"]
    torch.testing.assert_close(found.cross[0], want, rtol=1e-4, atol=1e-4)


class Same(nn.Conv2d):
    """Pads inside its forward, as TensorFlow does."""

    def forward(self, x):
        pads = []
        for d in (1, 0):
            size = x.shape[2 + d]
            out = -(-size // self.stride[d])
            need = max((out - 1) * self.stride[d] + self.kernel_size[d] - size, 0)
            pads += [need // 2, need - need // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride)


@pytest.mark.parametrize("size", [9, 2])
def test_convolutions_that_pad_in_their_forward(size):
    conv = Same(2, 4, 3, stride=2)
    data = [torch.randn(3, 2, size, size) for _ in range(2)]
    net = nn.Sequential(conv)
    found = grams(net, data)["0"]
    out = [net(x) for x in data]
    assert found.tokens == sum(o[:, 0].numel() for o in out)
    W = select_layers(net)[0].layout.view(conv.weight.detach()).transpose(1, 2).flatten(2)
    got = (W @ found.H @ W.transpose(1, 2)).diagonal(dim1=-2, dim2=-1).sum()
    want = sum((o - conv.bias[:, None, None]).square().sum() for o in out) / found.tokens
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def test_an_error_leaves_no_hooks_on_the_model(monkeypatch):
    net, data = nn.Sequential(lin(), nn.ReLU(), lin()).train(), [*rows(), rows()[0] * float("nan")]
    with pytest.raises(ModelError) as held:
        rarefy.prune_(net, sparsity=0.5, solver="obs", data=data, progress=True)
    assert held.value and net.training and torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


def test_contexts_inside_a_forward_end_with_it():
    def cast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = m.a(x)
        with torch.enable_grad():
            x = m.b(x.float())
        return m.c(x)

    net = module(cast, a=lin(), b=lin(), c=lin())
    seen = []
    net.c.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))))
    rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows())
    assert set(seen) == {(False, False)} and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_compiled_model():
    net = torch.compile(nn.Sequential(lin(), nn.ReLU(), lin()), backend="eager")
    assert rarefy.prune_(net, sparsity=0.5, solver="obs", data=rows()).summary["sparsity"] == pytest.approx(
        0.5, abs=0.01
    )


def test_a_patched_forward_stays_patched():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    own = experts.forward
    experts.forward = patched = lambda *a, **k: own(*a, **k)
    rarefy.prune_(model, sparsity=0.5, solver="obs", data=[{"input_ids": torch.randint(0, 32, (2, 20))}])
    assert experts.__dict__["forward"] is patched
