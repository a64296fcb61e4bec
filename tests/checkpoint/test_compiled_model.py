"""Compiled models in folders: the same bits without their class, and nothing believed on the way in."""

import json
import subprocess
import sys
from collections import OrderedDict, namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rarefy
from helpers.compile_models import Attends, Gated, Residual, pruned
from helpers.compiled_folders import call, edit, needs_kernels, set_arg, shard, without
from helpers.folders import SHARD, read_index, write_index
from rarefy.checkpoint import compiled_model
from rarefy.cli import shared
from rarefy.common.errors import ContainerError, DataError, FormatError, ModelError
from rarefy.compiler import op_registry, ops, pytree_json
from rarefy.compiler.executor import Compiled
from rarefy.compiler.subgraph import FusedSubgraph, SingleOp
from rarefy.data import builtin
from rarefy.evaluation.profiling import threads
from rarefy.evaluation.receipt import Receipt
from rarefy.formats import container
from rarefy.model import hf
from rarefy.pipeline import train_stage
from rarefy.runtime import bindings


def mlp():
    return pruned(nn.Sequential(nn.Linear(30, 140), nn.GELU(), nn.Linear(140, 7)))


def through(made, folder):
    rarefy.save(made, folder)
    return rarefy.load(folder)


def native_calls(made):
    return [type(i) for i in made.schedule if isinstance(i, FusedSubgraph | SingleOp)]


# ---- what comes back


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("make", [mlp, lambda: pruned(Gated(30, 50)), lambda: nn.Linear(30, 5).eval()])
def test_the_same_bits_for_other_batches(tmp_path, make, precision):
    torch.manual_seed(0)
    made = rarefy.compile(make(), torch.randn(3, 30), precision=precision)
    back = through(made, tmp_path / "out")
    assert type(back) is Compiled and repr(back) == repr(made) and native_calls(back) == native_calls(made)
    for rows in (1, 3, 64, 130):
        x = torch.randn(rows, 30)
        assert torch.equal(back(x), made(x))
    with pytest.raises(DataError, match=r"expected float32 \[any, 30\] on the CPU, got \[2, 31\]: 31 is not 30"):
        back(torch.randn(2, 31))


def test_a_folder_that_is_replaced_while_it_is_loaded(tmp_path, monkeypatch):
    """The graph of one model with the weights of another, or a receipt that is not the model's."""
    folder, nets = tmp_path / "m", [mlp() for _ in range(3)]
    x, read = torch.randn(2, 30), container.read
    for net in nets:
        net.rarefy_receipt = Receipt(name=str(id(net)))

    def load_between(first, second, save, make=lambda: None):
        """Save one, and the other in the middle of a load; return what is loaded."""
        save(first, folder)

        def replaced(path, **options):
            saved = read(path, **options)
            save(second, folder)
            return saved

        with monkeypatch.context() as patch:
            patch.setattr(container, "read", replaced)
            loaded = rarefy.load(folder, make())
        assert torch.allclose(loaded(x), first(x), atol=1e-5)
        assert torch.allclose(rarefy.load(folder, make())(x), second(x), atol=1e-5)
        return loaded

    loaded = load_between(nets[0], nets[1], lambda net, out: rarefy.save(net, out, overwrite=True), mlp)
    assert loaded.rarefy_receipt == nets[0].rarefy_receipt
    load_between(nets[1], nets[2], lambda net, out: rarefy.save(rarefy.compile(net, x), out, overwrite=True))


@pytest.mark.parametrize("how", [{}, {"causal": True}, {"kv_heads": 2}], ids=str)
def test_attention_with_masks_and_other_lengths(tmp_path, how):
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 9, 9) < 0.7
    mask[..., 0] = True
    example = torch.randn(2, 9, 32) if how else {"x": torch.randn(2, 9, 32), "mask": mask}
    made = rarefy.compile(pruned(Attends(**how)), example)
    back = through(made, tmp_path / "out")
    for size in ((2, 9), (3, 70)):
        x = torch.randn(*size, 32)
        more = {} if how else {"mask": torch.ones(size[0], 1, size[1], size[1], dtype=torch.bool).tril()}
        args, kwargs = ((x,), {}) if how else ((), {"x": x, **more})
        assert torch.equal(back(*args, **kwargs), made(*args, **kwargs))


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("how", [{}, {"groups": 2}], ids=str)
def test_convolutions(tmp_path, how, precision):
    torch.manual_seed(2)
    made = rarefy.compile(Residual(**how).eval(), torch.randn(2, 8, 12, 12), precision=precision)
    back = through(made, tmp_path / "out")
    assert native_calls(back) == native_calls(made)
    x = torch.randn(5, 8, 12, 12)
    assert torch.equal(back(x), made(x))
    kept = {r["tensor"] for r in rarefy.inspect(tmp_path / "out").rows}
    assert not any("running" in n or n.startswith("p_na") for n in kept)  # BatchNorms are in the convolutions


@pytest.fixture(scope="module")
def minilm():
    """The real one, nine of ten of its weights zero in blocks of 4x1."""
    model = hf.load_folder(builtin.model_folder("minilm")).eval()
    g = torch.Generator().manual_seed(0)
    for m in model.encoder.modules():
        if isinstance(m, nn.Linear):
            O, I = m.weight.shape
            m.weight.data *= (torch.rand(O // 4, 1, I, generator=g) < 0.1).expand(-1, 4, -1).reshape(O, I)
    return model, hf.load_tokenizer(builtin.model_folder("minilm"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "int8"])
def test_minilm(tmp_path, minilm, precision):
    model, tokenizer = minilm
    some = tokenizer(["A short one.", "Sparse matrices have few values."], padding=True, return_tensors="pt")
    with threads(1):  # packing waits for its slowest thread
        made = rarefy.compile(model, some, precision=precision)
    size = rarefy.save(made, tmp_path / "out")
    dense = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    words = model.embeddings.word_embeddings.weight.nbytes
    assert size - words < (dense - words) * (0.2 if precision is None else 0.15)
    back = rarefy.load(tmp_path / "out")
    for texts in (["One more."], ["A text that is longer than the others", "and another"] * 3):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        want, got = made(**batch), back(**batch)
        assert type(got) is type(want) and torch.equal(got.last_hidden_state, want.last_hidden_state)
        assert torch.equal(got.pooler_output, want.pooler_output)
    assert repr(back) == repr(made) and "37 linear, 13 norm, 6 attention" in repr(back)
    if precision is None:
        _in_a_fresh_process(tmp_path, batch, want)


def _in_a_fresh_process(tmp_path, batch, want):
    save_file(dict(batch), tmp_path / "batch.safetensors")
    code = f"""
import sys
import rarefy
from safetensors.torch import load_file, save_file
out = rarefy.load({str(tmp_path / "out")!r})(**load_file({str(tmp_path / "batch.safetensors")!r}))
assert "transformers" not in sys.modules
assert out["last_hidden_state"] is out.last_hidden_state is out[0] and out.to_tuple()[1] is out.pooler_output
assert list(out) == ["last_hidden_state", "pooler_output"] and not hasattr(out, "logits")
save_file(dict(out), {str(tmp_path / "got.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    got = load_file(tmp_path / "got.safetensors")
    assert all(torch.equal(got[n], want[n]) for n in want) and set(got) == set(want)


Pair = namedtuple("Pair", "left right")


def test_layouts_of_arguments_and_outputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, more, flag=True, rate=0.5):
            y, z = self.a(x), more["z"][0] + 1
            return {"y": y, "rest": [z, (y + 1, None)], "pair": Pair(y, z), "last": OrderedDict(z=z)}

    x, more = torch.randn(3, 8), {"z": [torch.randn(3)]}
    made = rarefy.compile(Net().eval(), {"x": x, "more": more, "flag": False, "rate": 0.25})
    back = through(made, tmp_path / "out")
    want, got = made(x=x, more=more, flag=False, rate=0.25), back(x=x, more=more, flag=False, rate=0.25)
    assert list(got) == list(want) and got["rest"][1][1] is None and type(got["last"]) is OrderedDict
    left, right = got["pair"]
    assert torch.equal(left, want["y"]) and got["pair"].right is right and type(got["rest"][1]) is tuple
    with pytest.raises(DataError, match=r"rate: compiled for 0.25, got 0.5"):
        back(x=x, more=more, flag=False, rate=0.5)
    again = through(back, tmp_path / "again")  # what was loaded can be saved
    assert torch.equal(again(x=x, more=more, flag=False, rate=0.25)["pair"].left, left)


def test_weights_that_several_share_are_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(30, 64), nn.Linear(64, 64)
            self.head = nn.Linear(64, 30, bias=False)
            self.head.weight = self.words.weight
            self.register_buffer("table", torch.randn(64, 3, 5).permute(2, 1, 0))  # not row after row

        def forward(self, ids):
            return self.head(self.inner(self.inner(self.words(ids)))) + (self.table * ids.float().mean()).sum()

    net, ids = Twice().eval(), torch.randint(30, (2, 5))
    made = rarefy.compile(net, ids)
    back = through(made, tmp_path / "out")
    assert torch.equal(back(ids), made(ids))
    packed = json.loads((tmp_path / "out" / compiled_model.GRAPH).read_text())["packed"]
    assert len(packed) == 2 and len(made.kernels) == 3
    kept = next(t for n, t in back.constants.items() if "table" in n)
    assert kept.stride() == net.table.stride() and torch.equal(kept, net.table)


@pytest.mark.parametrize("make", [mlp, Residual], ids=["products", "convolutions"])
def test_without_kernels_torch_runs_the_words(tmp_path, monkeypatch, make):
    x = torch.randn(2, 8, 12, 12) if make is Residual else torch.randn(2, 30)
    made = rarefy.compile(make().eval(), x)
    rarefy.save(made, tmp_path / "out")
    monkeypatch.setattr(bindings, "missing", lambda: "no compiler")
    back = rarefy.load(tmp_path / "out")
    assert not native_calls(back)
    torch.testing.assert_close(back(x), made(x), rtol=1e-4, atol=1e-4)
    assert through(back, tmp_path / "again")(x).shape == back(x).shape  # dense by now


def test_compressed_and_with_a_receipt(tmp_path):
    x = torch.randn(2, 30)
    made = rarefy.compile(mlp(), x)
    rarefy.save(made, tmp_path / "out", compress=True, receipt=rarefy.Receipt(name="mine"), files={"a.txt": b"a"})
    assert torch.equal(rarefy.load(tmp_path / "out")(x), made(x))
    assert {"receipt.json", "a.txt", compiled_model.GRAPH} <= {f.name for f in (tmp_path / "out").iterdir()}
    rarefy.save(made, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "a.txt").exists()


def test_inspect(tmp_path):
    made = rarefy.compile(mlp(), torch.randn(2, 30), precision="int8")
    rarefy.save(made, tmp_path / "out")
    report = rarefy.inspect(tmp_path / "out")
    rows = {r["tensor"]: r for r in report.rows}
    assert rows["p_0_weight"]["format"] == "int8:sell" and rows["p_0_weight"]["shape"] == "140x30"
    assert 0.75 < rows["p_0_weight"]["sparsity"] < 0.85 and rows["p_0_bias"]["format"] == "dense"
    assert report.summary["operators"] == "2 linear" and "a compiled model" in str(report)
    with pytest.raises(ModelError, match="print it"):
        rarefy.inspect(made)


# ---- what cannot be saved


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.randn(3) * 1e-9


class Inverts(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Draws(), r"randn calls aten.randn.default, which saved graphs may not call"),
        (Inverts(), r"calls aten.linalg_inv.default"),
    ],
)
def test_operators_outside_the_list(tmp_path, net, says):
    made = rarefy.compile(net.eval(), torch.randn(3, 3))
    with pytest.raises(ModelError, match=says):
        rarefy.save(made, tmp_path / "out")
    assert not (tmp_path / "out").exists() and made(torch.randn(3, 3)).shape == (3, 3)


def test_layers_that_run_sparse_already_in_eight_bits(tmp_path, monkeypatch):
    net = pruned(nn.Sequential(nn.Linear(64, 64)), 0.9)
    monkeypatch.setattr(op_registry, "ATEN", op_registry.ATEN - {"aten.reshape.default"})
    made = rarefy.compile(net, torch.randn(32, 64))
    made.exported.graph.find_nodes(op="call_function", target=ops.linear)[0].target = torch.ops.rarefy.sparse.default
    with pytest.raises(ModelError, match="compile the model as it was before accelerate_"):
        rarefy.save(made, tmp_path / "out")


def test_options_without_effect(tmp_path):
    made = rarefy.compile(mlp(), torch.randn(2, 30))
    with pytest.raises(FormatError, match="has no effect on a compiled model"):
        rarefy.save(made, tmp_path / "out", format="csr")
    rarefy.save(made, tmp_path / "out")
    with pytest.raises(ContainerError, match="model= has no effect: .*leave it out"):
        rarefy.load(tmp_path / "out", mlp())
    with pytest.raises(ContainerError, match="accelerate= has no effect: .*leave it out"):
        rarefy.load(tmp_path / "out", accelerate=True)
    with pytest.raises(ContainerError, match="exists and is a Rarefy folder; pass overwrite"):
        rarefy.save(made, tmp_path / "out")
    for to in ("hf", "safetensors"):
        with pytest.raises(ModelError, match="Compiled|compiled from"):
            rarefy.export(tmp_path / "out", tmp_path / "dense", to=to)
    with pytest.raises(ContainerError, match="not a Rarefy folder: it does not exist"):
        rarefy.load(tmp_path / "none")


def test_where_modules_are_asked_for(tmp_path):
    rarefy.save(rarefy.compile(mlp(), torch.randn(2, 30)), tmp_path / "out")
    with pytest.raises(ModelError, match="holds a compiled model: give the folder of what it was compiled from"):
        shared.load(tmp_path / "out")
    with pytest.raises(ModelError, match="teacher 'out' is a compiled model"):
        train_stage.load_teacher("out", tmp_path, mlp())


def test_what_the_list_holds_is_pure():
    for name in op_registry.ATEN:
        found = op_registry.find(f"aten.{name}")
        assert found is not None and op_registry.name_of(found) == f"aten.{name}"
        assert not found._schema.is_mutable
        random_ = torch.Tag.nondeterministic_seeded in found.tags
        assert not random_ or f"aten.{name}" in op_registry.PURE_WITH, name
    assert (
        op_registry.find("aten.relu_.default")
        is op_registry.find("rarefy.nothing")
        is op_registry.find("os.system")
        is None
    )
    assert op_registry.find("aten.__class__.mro") is None


# ---- what is no saved model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of words, ATen calls, sizes and constants."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(32, 32), nn.Linear(32, 16), nn.LayerNorm(32)

        def forward(self, x):
            y = self.n(self.a(x) + x)
            return self.b(y).reshape(x.shape[0] * 2, -1).softmax(-1)

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("whole") / "out"
    rarefy.save(rarefy.compile(pruned(Net()), torch.randn(4, 32)), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    (tmp_path / "m").mkdir()
    for file in whole.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "m"


def node_on(graph, weight):
    """Return the name of the node that runs on a packed weight."""
    return next(node for node, name in graph["kernels"].items() if name == weight)


def packed_as(**about):
    return lambda told: told["packed"]["p_a_weight"].update(about)


def target_of(was, now):
    return lambda told: call(told, was).__setitem__(2, now)


def swap_first_two_calls(told):
    at = [i for i, n in enumerate(told["nodes"]) if n[1] == "call_function"]
    told["nodes"][at[-1]], told["nodes"][at[-2]] = told["nodes"][at[-2]], told["nodes"][at[-1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(schema=6), "schema 6 is written by a newer version of Rarefy; this version reads schemas 1 and 2 and 3 and 4 and 5"),
        (lambda t: t.update(guards=["s77.__class__ == 0"]), "expected names of sizes, whole numbers"),
        (lambda t: t.update(guards=["x % 2 == 0"]), "guards: 'x % 2 == 0' reads x, which is no size of an input"),
        (lambda t: t.update(guards=[7]), "guards: expected str, got 7"),
        (lambda t: t.update(guards=["1"] * 10_001), "guards: expected at most 10000 conditions, got 10001"),
        (lambda t: t["names"].update(inputs=["a", "b"]), r"names: expected 1 names of inputs or none, got \['a', 'b'\]"),
        (lambda t: t["names"].update(outputs=[7]), r"names: expected 1 names of outputs or none, got \[7\]"),
        (lambda t: t["names"].update(inputs=["a" * 10_001]), "names: expected 1 names of inputs or none"),
        (lambda t: t["names"].pop("outputs"), "names: expected 1 names of outputs or none, got None"),
        (lambda t: t.update(names=[]), "names: expected dict"),
        (lambda t: t.update(schema="1"), 'whole number "schema"'),
        (lambda t: t.update(code="import os"), "expected an object with schema, inputs"),
        (without("nodes"), "expected an object with schema, inputs"),
        (lambda t: t.update(all=[]), 'expected an object with a whole number "schema"'),
        (lambda t: t.update(text=lambda text: text[:-1]), "not JSON"),
        (lambda t: t.update(text=lambda text: text.replace("1e-05", "1e999")), "1e999 is not a number of JSON"),
        (lambda t: t.update(text=lambda text: "[" * 100_000 + "]" * 100_000), "not JSON"),
        (set_arg("rarefy.norm", 3, "least"), "argument 4: expected a number, got 'least'"),
        (set_arg("rarefy.norm", 0, {"node": "nobody"}), "node 'norm': reads 'nobody', which is not an earlier node"),
        (swap_first_two_calls, "which is not an earlier node"),
        (set_arg("rarefy.norm", 0, {"node": "p_n_weight", "more": 1}), "is not a valid argument"),
        (set_arg("rarefy.norm", 0, {"tensor": "x"}), "is not a valid argument"),
        (set_arg("rarefy.norm", 0, {"dtype": "object"}), "is not a valid argument"),
        (set_arg("rarefy.norm", 0, 1 << 63), "is not a valid argument"),
        (lambda t: call(t, "rarefy.norm")[3].pop(), "expected 6 arguments, got 5"),
        (lambda t: call(t, "rarefy.norm")[3].append(1), "expected 6 arguments, got 7"),
        (lambda t: call(t, "rarefy.norm")[4].update(more=1), "expected 6 arguments, got 7"),
        (set_arg("rarefy.norm", 1, {"node": "x"}), "expected a constant, got"),
        (set_arg("rarefy.norm", 0, {"node": "p_a_weight"}), "expected an earlier tensor, got"),
        (set_arg("rarefy.linear", 1, {"node": "x"}), "expected a weight, got x"),
        (set_arg("rarefy.linear", 4, "tan"), "argument 5: expected None or relu, gelu"),
        (set_arg("rarefy.linear", 4, ["relu"]), "argument 5: expected None or"),
        (set_arg("rarefy.linear", 2, {"node": "p_b_bias"}), r"expected a bias of shape \[32\], got \[16\]"),
        (target_of("aten.softmax.int", "aten.system.default"), "'aten.system.default' is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "aten.relu_.default"), "is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "os.system"), "is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "aten.__class__.mro"), "is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "rarefy.__globals__"), "is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "aten.from_file.default"), "is not allowed in a saved graph"),
        (target_of("aten.softmax.int", "rarefy.norm"), "expected 6 arguments, got 2"),
        (lambda t: call(t, "aten.softmax.int").__setitem__(1, "call_method"), "is not allowed in a saved graph"),
        (lambda t: call(t, "aten.softmax.int")[3].append(1.5), "argument dtype: expected .* got 1.5"),
        (lambda t: call(t, "aten.softmax.int")[3].extend([None, None]), "expected at most 3 arguments, got 4"),
        (lambda t: call(t, "aten.softmax.int")[4].update(dim=1), "has no argument 'dim' here"),
        (lambda t: call(t, "aten.softmax.int")[3].pop(), "the argument dim is missing"),
        (set_arg("aten.reshape.default", 1, [{"node": "x"}, -1]), r"argument shape: expected List\[int\], got \[x, -1\]"),
        (set_arg("aten.softmax.int", 1, {"node": "softmax"}), "reads 'softmax', which is not an earlier node"),
        (set_arg("operator.mul", 1, {"node": "x"}), "expected 2 numbers"),
        (set_arg("operator.mul", 1, "a"), "expected 2 numbers"),
        (lambda t: t["nodes"].append(t["nodes"][0]), "the output must be the last node"),
        (lambda t: t["nodes"].pop(), "the last node must be the output"),
        (lambda t: t["nodes"].clear(), "the last node must be the output"),
        (lambda t: t["nodes"].insert(0, t["nodes"][0]), "expected an unused name"),
        (lambda t: t["nodes"][0].__setitem__(0, "__import__('os')"), "expected an unused name of letters"),
        (lambda t: t["nodes"].__setitem__(0, 7), r"expected \[name, op, target, args, kwargs\]"),
        (lambda t: t["nodes"][-1].__setitem__(3, [[{"node": "p_a_weight"}]]), "outputs, got p_a_weight"),
        (lambda t: t["inputs"][0][1].update(dtype="object"), "expected dtype and sizes"),
        (lambda t: t["inputs"][0][1].update(sizes=[-1, 32]), "expected sizes as numbers and names of open sizes"),
        (lambda t: t["inputs"].append(t["inputs"][0]), "a name occurs twice"),
        (lambda t: t["inputs"][0].__setitem__(0, "y"), "argument self: expected Tensor, got x"),
        (lambda t: t["ranges"].update(s0=[5, 2]), r"ranges\['s0'\]: expected \[smallest, largest\]"),
        (lambda t: t["ranges"].update(s0=[0, 1 << 63]), r"ranges\['s0'\]: expected \[smallest, largest\]"),
        (lambda t: t.update({"in": "*"}), "expected arguments as a tuple and a dict of keywords"),
        (lambda t: t.update({"in": {"tuple": [{"tuple": []}, {"dict": [[], []]}]}}), "expected a structure of 1 tensors, got one of 0"),
        (lambda t: t.update(out={"set": ["*"]}), "'set' is not a valid structure"),
        (lambda t: t.update(out={"outputs": ["os.system", ["a", "a"], ["*", "*"]]}), "has no valid names for its entries"),
        (lambda t: t.update(notes=[1]), "notes: expected str, got 1"),
        (without("constants", "p_n_bias"), "expected a constant, got"),
        (lambda t: t["constants"].update(x=None), "'x' is not a placeholder"),
        (lambda t: t["constants"].update(p_n_bias=[1]), "is not a permutation of dimensions"),
        (lambda t: t["constants"].update(p_n_bias=[0, 1]), r"\[0, 1\] are not the dimensions of \[32\]"),
        (lambda t: t["kernels"].pop(node_on(t, "p_a_weight")), "its weight p_a_weight is missing"),
        (lambda t: t["kernels"].update(x="p_a_weight"), "kernels: 'x' is not an operator"),
        (lambda t: t["kernels"].update(norm="p_a_weight"), "which only linear, conv2d, embedding have"),
        (lambda t: t["kernels"].update({node_on(t, "p_a_weight"): ["p_a_weight"]}), "expected str"),
        (lambda t: t["kernels"].update({node_on(t, "p_a_weight"): "p_c_weight"}), "are not the weights that kernels name"),
        (lambda t: t["grids"].update(nobody=[1.0, 0]), "grids: 'nobody': expected an operator with a kernel"),
        (lambda t: t["grids"].update(x=[1.0, 0]), "grids: 'x': expected an operator with a kernel and a scale"),
        (lambda t: t["grids"].update({node_on(t, "p_a_weight"): [0.0, 0]}), "expected an operator with a kernel"),
        (lambda t: t["grids"].update({node_on(t, "p_a_weight"): [0.5, 256]}), "expected a zero point from 0 to 255"),
        (lambda t: t["grids"].update({node_on(t, "p_a_weight"): [0.5, 1, 0.5]}), "expected an operator with a kernel"),
        (lambda t: t["grids"].update({node_on(t, "p_a_weight"): [0.5, 1, 0.5, -1]}), "zero point from 0 to 255, got -1"),
        (lambda t: t["grids"].update({node_on(t, "p_a_weight"): [0.5, 9]}), "does not read int8 codes with one scale"),
        (packed_as(format="csr"), "expected the fields of a packed weight"),
        (packed_as(format=["sell"]), "packed 'p_a_weight': "),
        (packed_as(kind="fp8"), "expected the fields of a packed weight"),
        (packed_as(kind="int8"), "packed 'p_a_weight': "),
        (packed_as(code=1), "expected the fields of a packed weight"),
        (packed_as(shape=[32, 64]), "packed 'p_a_weight': |damaged"),
        (packed_as(shape=[1 << 40, 32]), "shape: expected whole numbers from 1 to"),
        (packed_as(shape="32"), "shape: expected whole numbers from 1 to"),
        (packed_as(block=0), "block: expected whole numbers from 1 to"),
        (packed_as(block=1.5), "block: expected whole numbers from 1 to"),
        (packed_as(values=3), "expected the fields of a packed weight"),
    ],
)  # fmt: skip
@needs_kernels
def test_graphs_that_no_model_has(folder, change, says):
    edit(folder, change)
    with pytest.raises(ContainerError, match=says) as caught:
        rarefy.load(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(ContainerError):
        rarefy.inspect(folder)
        rarefy.load(folder)


@needs_kernels
def test_a_bias_that_is_named_as_a_packed_weight(tmp_path):
    made, x = rarefy.compile(nn.Linear(30, 5).eval(), torch.randn(3, 30)), torch.randn(3, 30)
    rarefy.save(made, tmp_path / "m")
    edit(tmp_path / "m", lambda told: call(told, "rarefy.linear")[3].__setitem__(1, call(told, "rarefy.linear")[3][2]))
    assert torch.equal(rarefy.load(tmp_path / "m")(x), made(x))


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("columns", lambda t: t | 0x7F00, "is damaged"),
        ("starts", lambda t: t + 1000, "is damaged"),
        ("starts", lambda t: t - 1, "is damaged"),
        ("counts", lambda t: t + 1, "is damaged"),
        ("order", lambda t: t | 128, "is damaged"),
        ("columns", lambda t: t.to(torch.int32), "tensor|columns"),
        ("values", lambda t: t[:-1].clone(), "tensor|values|columns"),
        ("values", lambda t: t.float(), "tensor|values"),
    ],
)
@needs_kernels
def test_packed_weights_that_lead_outside(folder, part, change, says):
    name = f"packed.p_a_weight.{part}.values"
    t = change(load_file(folder / SHARD)[name])
    shard(folder, **{name: t})
    index = read_index(folder)
    entry = index["tensors"][f"packed.p_a_weight.{part}"]
    entry |= {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
    write_index(folder, index)
    with pytest.raises(ContainerError, match=says):
        rarefy.load(folder)


def test_packed_weights_that_lead_outside_where_there_are_no_kernels(folder, monkeypatch):
    monkeypatch.setattr(bindings, "missing", lambda: "no compiler")
    columns = load_file(folder / SHARD)["packed.p_a_weight.columns.values"]
    shard(folder, **{"packed.p_a_weight.columns.values": columns | 0x7F00})
    with pytest.raises(ContainerError, match="packed p_a_weight is damaged"):
        rarefy.load(folder)


def test_files_that_were_cut_or_changed(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-100])
    with pytest.raises(ContainerError, match="was it truncated"):
        rarefy.load(folder)
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ContainerError, match="sha256"):
        rarefy.load(folder)
    (folder / SHARD).write_bytes(data)
    graph = (folder / compiled_model.GRAPH).read_text()
    (folder / compiled_model.GRAPH).write_text(graph.replace("softmax", "sigmoid"))
    with pytest.raises(ContainerError, match="sha256"):
        rarefy.load(folder)
    (folder / compiled_model.GRAPH).unlink()
    with pytest.raises(ContainerError, match="graph.json: missing"):
        rarefy.load(folder)


@pytest.mark.parametrize("about", [7, {}, {"graph.json": 1}, {"graph.json": {"bytes": 1 << 40, "sha256": ""}}], ids=str)
def test_indices_that_no_model_has(folder, about):
    index = read_index(folder)
    index["meta"]["compiled"] = about
    write_index(folder, index)
    with pytest.raises(ContainerError, match=r"graph\.json"):
        rarefy.load(folder)


def test_tensors_too_many_or_too_few(folder):
    index = read_index(folder)
    for name, says in (("constant.p_n_bias", "constants are not those"), ("packed.p_a_weight.columns", "packed")):
        less = {**index, "tensors": {n: t for n, t in index["tensors"].items() if n != name}}
        write_index(folder, less)
        with pytest.raises(ContainerError, match=says):
            rarefy.load(folder)
    more = {**index, "tensors": {**index["tensors"], "packed.other.columns": index["tensors"]["constant.p_n_bias"]}}
    write_index(folder, more)
    with pytest.raises(ContainerError, match="the shards hold packed weights that no operator uses"):
        rarefy.load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_arg("rarefy.norm", 0, {"node": "wide"}), r"norm cannot run on shapes \[\(4, 64\)\]"),
        (set_arg("rarefy.linear", 0, {"node": "wide"}), r"linear_\d cannot run on shapes \[\(4, 64\)"),
        (set_arg("rarefy.linear", 3, {"node": "wide"}), r"linear_\d cannot run on shapes \[\(4, 32\), \(4, 64\)\]"),
        (set_arg("rarefy.linear", 0, {"node": "whole"}), r"expected fp32 rows, got whole int64 \[4, 32\]"),
        (set_arg("rarefy.linear", 3, {"node": "none"}), r"expected fp32 rows, got none float32 \[\]"),
    ],
)
@needs_kernels
def test_words_on_sizes_that_do_not_fit_are_not_run(folder, change, says):
    def widened(told):
        at = next(i for i, n in enumerate(told["nodes"]) if n[1] == "call_function")
        x = {"node": told["inputs"][0][0]}
        told["nodes"][at:at] = [
            ["wide", "call_function", "aten.cat.default", [[x, x], 1], {}],
            ["whole", "call_function", "aten.to.dtype", [x, {"dtype": "int64"}], {}],
            ["none", "call_function", "aten.sum.default", [x], {}],
        ]
        change(told)

    edit(folder, widened)
    made = rarefy.load(folder)
    with pytest.raises(ModelError, match=f"the saved graph is inconsistent: {says}"):
        made(torch.randn(4, 32))


@pytest.mark.parametrize(
    ("places", "fits"),
    [({}, True), ({4: 3}, False), ({5: 8}, False), ({0: {"node": "wide"}}, False), ({1: {"node": "long"}}, False),
     ({3: {"node": "odd"}}, False), ({3: {"node": "large"}}, False), ({3: {"node": "x"}}, False)],
    ids=str,
)  # fmt: skip
@needs_kernels
def test_attention_on_sizes_that_do_not_fit_is_not_run(tmp_path, places, fits):
    made = rarefy.compile(pruned(Attends()), (torch.randn(2, 9, 32), torch.ones(2, 1, 9, 9, dtype=torch.bool)))
    rarefy.save(made, tmp_path / "out")

    def change(told):
        at = next(i for i, n in enumerate(told["nodes"]) if n[2] == "rarefy.attention")
        additive = call(told, "rarefy.additive_mask")[0]
        told["nodes"][at:at] = [
            ["wide", "call_function", "aten.cat.default", [[{"node": "x"}, {"node": "x"}], 2], {}],
            ["long", "call_function", "aten.cat.default", [[{"node": "x"}, {"node": "x"}], 1], {}],
            ["odd", "call_function", "aten.repeat.default", [{"node": additive}, [1, 3, 1, 1]], {}],
            ["large", "call_function", "aten.repeat.default", [{"node": additive}, [1, 1, 1, 2]], {}],
        ]
        for i, value in places.items():
            call(told, "rarefy.attention")[3][i] = value

    edit(tmp_path / "out", change)
    back = rarefy.load(tmp_path / "out")
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    if fits:
        assert torch.equal(back(x, mask), made(x, mask))
        return
    with pytest.raises(ModelError, match="the saved graph is inconsistent"):
        back(x, mask)


def test_outputs_of_transformers_are_looked_up_by_no_other_name():
    pytest.importorskip("transformers.modeling_outputs")
    leaf = torch.empty(0)
    for name, real in (
        ("transformers.modeling_outputs.BaseModelOutput", True),
        ("transformers.modeling_outputs.ModelOutput", False),
        ("transformers.modeling_outputs.NoOutput", False),
        ("transformers.modeling_outputs.torch.Output", False),
        ("os.Output", False),
        ("transformers.modeling_outputs.MaskedLMOutput", False),  # has no such field
    ):
        made = pytree_json._example_of({"outputs": [name, ["last_hidden_state"], ["*"]]}, 0)
        assert (type(made).__name__ == "BaseModelOutput") == real and made[0].shape == leaf.shape
        assert (type(made) is pytree_json.Outputs) != real
