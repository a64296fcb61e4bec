"""Files of torch.export: read without unpickling, compiled, pruned, and written."""

import json
import pickle
import zipfile

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import rarefy
from helpers.compile_models import Residual
from rarefy.checkpoint import pt2_archive
from rarefy.checkpoint.export import export
from rarefy.common.errors import ContainerError, DataError, ModelError

D = torch.export.Dim


class Texts(nn.Module):
    """Takes inputs by position and keyword, a constant, and returns a nested dict."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.table.weight
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.register_buffer("table2", torch.randn(3, 8))

    def forward(self, ids, scale=None, *, mask):
        x = self.norm(self.drop(self.layer(self.table(ids))))
        x = self.act(x * ids.shape[1]) * mask[..., None] + self.table2[0] + torch.tensor(range(8))
        a, b = x.chunk(2, -1)
        return {
            "logits": self.head(torch.cat([b, a], -1)),
            "largest": tuple(a.max(1)),
            "sum": x.to(torch.float64).sum(),
        }


def texts():
    ids = torch.randint(0, 50, (2, 6))
    return (ids, None), {"mask": torch.ones(2, 6)}


def saved(model, args, kwargs=None, place=None, dynamic=None):
    program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic)
    torch.export.save(program, place)
    return place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of a network on images with an open batch, and of one on texts with open sizes."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("pt2")
    net, x = Residual().eval(), torch.randn(2, 8, 12, 12)
    saved(net, (x,), place=place / "net.pt2", dynamic={"x": {0: D.AUTO}})
    model, (args, kwargs) = Texts().eval(), texts()
    open_sizes = {0: D.AUTO, 1: D.AUTO}
    saved(model, args, kwargs, place / "texts.pt2", {"ids": open_sizes, "scale": None, "mask": open_sizes})
    return place, net, model


def leaves(outputs):
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def equal(a, b, **tolerance):
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_outputs_are_those_of_torchs_own_reader(files):
    place, _, model = files
    for count in (2, 3):
        ids, mask = torch.randint(0, 50, (count, 7)), torch.ones(count, 7)
        theirs = torch.export.load(place / "texts.pt2").module()(ids, None, mask=mask)
        ours = rarefy.load(place / "texts.pt2")(ids, mask=mask)
        assert list(ours) == list(theirs) and type(ours["largest"]) is tuple
        assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(theirs), strict=True))
        assert equal(ours, model(ids, mask=mask), atol=1e-6)


def test_layers_have_their_names_and_are_torchs(files):
    place, net, _ = files
    ours = rarefy.load(place / "net.pt2")
    names = {n: type(m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)}
    assert names == {n: type(m) for n, m in ours.named_modules() if n in names} and not ours.training
    assert {n: t.shape for n, t in net.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    texts = rarefy.load(place / "texts.pt2")
    assert isinstance(texts.table, nn.Embedding) and isinstance(texts.norm, nn.LayerNorm)
    assert isinstance(texts.head, nn.Linear) and texts.head.weight is texts.table.weight


def test_a_file_is_pruned_cut_and_compiled(files):
    place, net, _ = files
    x = torch.randn(3, 8, 12, 12)
    model = rarefy.load(place / "net.pt2")
    fast = rarefy.compile(model, torch.randn(2, 8, 12, 12), tune=False)
    assert equal(fast(x), net(x), atol=1e-4) and fast.exported.input_names == ("x",)
    rarefy.prune_(model, sparsity=0.5, score="magnitude")
    rarefy.fold_(model)
    assert (model.b.weight == 0).float().mean() >= 0.5
    before = sum(p.numel() for p in model.parameters())
    rarefy.cut_(model, x, keep=0.5)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before and model(x).shape == (3, 5)


def test_programs_in_memory(files):
    _, net, model = files
    x = torch.randn(2, 8, 12, 12)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: D.AUTO}})
    assert equal(rarefy.compile(program, tune=False)(torch.cat([x, x])), net(torch.cat([x, x])), atol=1e-4)
    fixed = rarefy.compile(torch.export.export(net, (x,)), x, tune=False)
    assert equal(fixed(x), net(x), atol=1e-4)
    with pytest.raises(DataError):
        fixed(torch.cat([x, x]))
    args, kwargs = texts()
    with pytest.raises(ModelError, match="by position and by keyword: export the model with all of them by keyword"):
        rarefy.compile(torch.export.export(model, args, kwargs))
    program._example_inputs = None
    with pytest.raises(DataError, match="no example inputs: compile"):
        rarefy.compile(program)


def test_sizes_that_were_fixed_stay_fixed(files, tmp_path):
    net, x = files[1], torch.randn(2, 8, 12, 12)
    model = rarefy.load(saved(net, (x,), place=tmp_path / "fixed.pt2"))
    with pytest.raises(DataError, match="expected the input x float32 2x8x12x12, got float32 3x8x12x12"):
        model(torch.randn(3, 8, 12, 12))
    with pytest.raises(DataError, match="expected the input mask"):
        rarefy.load(files[0] / "texts.pt2")(torch.ones(2, 5).long(), mask=torch.ones(2, 6))
    with pytest.raises(DataError):
        rarefy.compile(model, x, tune=False)(torch.randn(3, 8, 12, 12))


def test_saved_weights_load_into_the_graph_of_the_file(files, tmp_path):
    model = rarefy.load(files[0] / "net.pt2")
    rarefy.prune_(model, sparsity=0.5, score="magnitude")
    rarefy.save(model, tmp_path / "out")
    x = torch.randn(2, 8, 12, 12)
    again = rarefy.load(tmp_path / "out", model=rarefy.load(files[0] / "net.pt2"))
    assert torch.equal(again(x), model(x))
    with pytest.raises(ModelError, match=r"weights of a .pt2 file.*model=rarefy.load\('FILE.pt2'\)"):
        rarefy.load(tmp_path / "out")
    with pytest.raises(ModelError, match="model= has no effect"):
        rarefy.load(files[0] / "net.pt2", model=model)


def test_export_writes_what_torch_reads(files, tmp_path):
    net, x = Residual().eval(), torch.randn(2, 8, 12, 12)
    rarefy.prune_(net, sparsity=0.5, score="magnitude")
    rarefy.quantize_(net, activations="int8-static", data=[x])
    file = export(net, tmp_path / "net.pt2", to="pt2", example=x)
    theirs, more = torch.export.load(file).module(), torch.randn(5, 8, 12, 12)
    assert equal(theirs(x), net(x), atol=1e-5) and equal(theirs(more), net(more), atol=1e-5)
    assert (theirs.state_dict()["b.weight"] == 0).float().mean() >= 0.5 and list(tmp_path.iterdir()) == [file]
    ours = rarefy.load(file)
    assert equal(ours(more), net(more), atol=1e-5)
    assert repr(rarefy.compile(ours, x, tune=False)) == repr(rarefy.compile(net, x, tune=False)).rpartition("\n")[0]


@pytest.mark.slow
def test_export_of_folders_and_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=None, **sizes)).eval()
    rarefy.save(model, tmp_path / "folder")
    file = export(tmp_path / "folder", tmp_path / "model.pt2", to="pt2")
    ids = torch.randint(0, 32, (3, 9))
    want = model(input_ids=ids).logits
    assert equal(torch.export.load(file).module()(input_ids=ids, use_cache=False).logits, want, atol=1e-5)
    assert equal(rarefy.load(file)(input_ids=ids), {"logits": want}, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x, p: export(m, p / "x.pt", to="pt2", example=x), "ends in .pt2"),
        (lambda m, x, p: export(m, p / "there.pt2", to="pt2", example=x), "there.pt2 exists: pass overwrite=True"),
        (lambda m, x, p: export(m, p / "x.pt2", to="pt2"), "pass example=, what the model is called with"),
        (lambda m, x, p: export(m.train(), p / "x.pt2", to="pt2", example=x), "call eval"),
        (
            lambda m, x, p: export(rarefy.compile(m, x, tune=False), p / "x.pt2", to="pt2", example=x),
            "compiled already",
        ),
        (lambda m, x, p: export(m, p / "x", example=x), r"example= is for to='pt2'"),
        (
            lambda m, x, p: export(m, p / "x.pt2", to="pt2", type="f16"),
            r"are for to='gguf': leave them out with to='pt2'",
        ),
    ],
)
def test_exports_that_are_refused(call, message, tmp_path):
    (tmp_path / "there.pt2").write_bytes(b"")
    with pytest.raises((ContainerError, DataError, ModelError), match=message):
        call(Residual().eval(), torch.randn(2, 8, 12, 12), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["there.pt2"]


def test_the_command_line(files, tmp_path, run):
    place, net, _ = files
    assert run("compile", place / "net.pt2", "--out", tmp_path / "fast", "-q").code == 0
    x = torch.randn(2, 8, 12, 12)
    assert equal(rarefy.load(tmp_path / "fast")(x), net(x), atol=1e-4)
    refused = run("export", tmp_path / "fast", "--to", "pt2", "--out", tmp_path / "a.pt2")
    assert refused.code == 2 and "compiled" in refused.err
    assert run("export", place / "net.pt2", "--to", "pt2", "--out", tmp_path / "b.pt2").code == 0
    assert equal(torch.export.load(tmp_path / "b.pt2").module()(x), net(x), atol=1e-5)
    assert "a.weight" in run("inspect", place / "net.pt2").out
    missing = run("compile", place / "met.pt2", "--out", tmp_path / "c")
    assert missing.code == 2 and "did you mean" in missing.err


# ---- what models do -------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """Calls a function, with a buffer."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x):
        return self.function(x, self.state)


def loaded(function, place, dynamic=None):
    return rarefy.load(saved(Function(function), (torch.ones(2, 4),), None, place / "f.pt2", dynamic))


def test_outputs_may_be_constants_but_no_numbers_of_the_inputs(tmp_path):
    model, x = loaded(lambda x, state: {"a": x + state, "n": 3, "b": (True, None, "text")}, tmp_path), torch.ones(2, 4)
    outputs = model(x)
    assert torch.equal(outputs.pop("a"), x) and outputs == {"n": 3, "b": (True, None, "text")}
    with pytest.raises(ModelError, match="returns a number that depends on its inputs"):
        loaded(lambda x, state: (x + state, x.shape[0]), tmp_path, ({0: D.AUTO},))


@pytest.mark.parametrize(
    "function",
    [lambda x, s: s.add_(1) + x, lambda x, s: x + s.view(2, 2)[0].mul_(2).sum(), lambda x, s: s[:2].fill_(3).sum() + x],
)
def test_programs_that_change_buffers_are_refused(function, tmp_path):
    with pytest.raises(ModelError, match=r"f.pt2: the program (changes its buffers|has a buffer mutation)"):
        loaded(function, tmp_path)


def change_copies(x, s):
    copy = s.clone()
    copy[:2] = x[0, :2]
    (s * 2).view(2, 2)[0].add_(1)
    return x + copy


def test_copies_of_buffers_may_change(tmp_path):
    model, x = loaded(change_copies, tmp_path), torch.ones(2, 4)
    for _ in range(2):
        assert torch.equal(model(x), x + torch.tensor([1.0, 1, 0, 0]))


def test_control_flow_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="the operator torch.ops.higher_order.cond is not supported"):
        loaded(lambda x, s: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), tmp_path)


def test_limits_of_open_sizes(tmp_path):
    model = loaded(lambda x, s: x + s if x.shape[0] <= 4 else x - s, tmp_path, ({0: D("batch", max=4)},))
    assert model(torch.ones(4, 4)).shape == (4, 4)
    with pytest.raises(DataError, match=r"was exported for s\d+ of 1 to 4, got 5"):
        model(torch.ones(5, 4))
    with pytest.raises(DataError, match="expected the input x .*, got ndarray: pass a torch tensor"):
        model(torch.ones(4, 4).numpy())


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        (lambda x, y: x.shape[1] % 4 == 0, r"\(x.shape\[1\] % 4\) == 0, got float32 2x9 and float32 3x6"),
        (lambda x, y: x.shape[1] - y.shape[1] == 2, "exported"),
        (lambda x, y: x.shape[1] * 0.3 < 2.5, r"x.shape\[1\] == 8, got"),  # the grammar has no 0.3
    ],
)
def test_sizes_of_other_branches_are_refused_also_when_compiled(condition, says, tmp_path):
    class Branch(nn.Module):
        def forward(self, x, y):
            return x * 2 + y.sum() if condition(x, y) else x - y.sum()

    auto = [torch.export.Dim.AUTO] * 2
    model, example = Branch().eval(), (torch.randn(2, 8), torch.randn(3, 6))
    torch.export.save(torch.export.export(model, example, dynamic_shapes=(auto, auto)), tmp_path / "b.pt2")
    module = rarefy.load(tmp_path / "b.pt2")
    for run in (module, rarefy.compile(module, example)):
        for batch in (2, 5):
            x, y = torch.randn(batch, 8), torch.randn(batch, 6)
            torch.testing.assert_close(run(x, y), model(x, y))
        with pytest.raises(DataError, match=says):
            run(torch.randn(2, 9), torch.randn(3, 6))


class Caught(nn.Module):
    def forward(self, x):
        try:
            return x.view(-1, 8)
        except RuntimeError:
            return x * 2


def test_a_call_whose_error_the_model_caught_is_left_out(tmp_path):
    program = torch.export.export(Caught().eval(), (torch.randn(3, 5),), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(3, 5)
    assert torch.equal(rarefy.load(tmp_path / "model.pt2")(x), x * 2)


def test_a_size_whose_text_the_model_asks_for_is_fixed_in_files_that_export_writes(tmp_path):
    class Text(nn.Module):
        def forward(self, x):
            return x * len(f"{x.shape[1]}")

    export(Text().eval(), tmp_path / "model.pt2", to="pt2", example=torch.randn(3, 5))
    model, x = rarefy.load(tmp_path / "model.pt2"), torch.randn(4, 5)
    assert torch.equal(model(x), x) and torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), x)
    with pytest.raises(DataError, match="were fixed when the model was exported"):
        model(torch.randn(4, 12))


def test_a_condition_that_cannot_be_checked_is_refused(tmp_path):
    auto = [torch.export.Dim.AUTO] * 2
    program = torch.export.export(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.randn(2, 8),), dynamic_shapes=(auto,))
    for code, error in (
        (["L['y'].size()[0] == 3"], ModelError),
        (["L['x'].device == 3"], ModelError),
        ("1", ContainerError),
    ):
        torch.export.save(program, tmp_path / "g.pt2")
        with zipfile.ZipFile(tmp_path / "g.pt2") as archive:
            records = {n: archive.read(n) for n in archive.namelist()}
        (name,) = (n for n in records if n.endswith("models/model.json"))
        records[name] = json.dumps({**json.loads(records[name]), "guards_code": code}).encode()
        with zipfile.ZipFile(tmp_path / "g.pt2", "w") as archive:
            for record, data in records.items():
                archive.writestr(record, data)
        with pytest.raises(error, match="condition"):
            rarefy.load(tmp_path / "g.pt2")


# ---- files that are refused -----------------------------------------------------------------------------------------


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def changed(source, target, change=None, records=None, **options):
    """Copy an archive with its graph changed by a function, and with records replaced or added."""
    records = dict(records or {})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            data = records.pop(name, None) or old.read(entry)
            if change is not None and name == pt2_archive.MODEL:
                program = json.loads(data)
                change(program)
                data = json.dumps(program).encode()
            new.writestr(entry.filename, data, compress_type=options.get("compression"))
        for name, data in records.items():
            new.writestr(f"more/{name}", data)
    return target


def of_call(program, target):
    return next(n for n in program["graph_module"]["graph"]["nodes"] if n["target"] == target)


def set_target(target):
    return lambda program: of_call(program, "torch.ops.aten.linear.default").update(target=target)


def rename(old, new):
    def change(program):
        text = json.dumps(program["graph_module"]).replace(json.dumps(old), json.dumps(new))
        program["graph_module"] = json.loads(text)

    return change


def test_nothing_in_a_file_is_executed(files, tmp_path):
    place, trace = files[0], tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"

    def change(program):
        graph = program["graph_module"]["graph"]
        program["guards_code"] = [code]
        program["range_constraints"][code] = {"min_val": 2, "max_val": None}
        for meta in graph["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code
        for node in graph["nodes"]:
            node["metadata"] = {"stack_trace": code, "nn_module_stack": code, "custom": code, "source_fn_stack": code}

    evil = pickle.dumps(Evil(str(trace)))
    file = changed(place / "net.pt2", tmp_path / "evil.pt2", change, {"data/sample_inputs/model.pt": evil})
    model = rarefy.load(file)
    assert model(torch.randn(2, 8, 12, 12)).shape == (2, 5)
    rarefy.compile(model, torch.randn(2, 8, 12, 12), tune=False)
    assert not trace.exists()
    pickle.loads(evil).close()
    assert trace.exists()  # it would have worked


def config(file, name="data/weights/model_weights_config.json", **values):
    """Return the table of weights with some values of its first entry replaced."""
    with zipfile.ZipFile(file) as archive:
        table = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith(name))))
    entry = next(iter(table["config"].values()))
    entry["tensor_meta"].update({k: v for k, v in values.items() if k in entry["tensor_meta"]})
    entry.update({k: v for k, v in values.items() if k in entry})
    return {name: json.dumps(table).encode()}


HUGE = {"sizes": [{"as_int": 1 << 40}], "strides": [{"as_int": 0}]}


@pytest.mark.parametrize(
    "change, records, message",
    [
        (None, lambda f: config(f, use_pickle=True), "stored as a pickle, which is never opened"),
        (None, lambda f: config(f, path_name="../../secret"), "the record '../../secret' is missing"),
        (None, lambda f: config(f, dtype=99), "type or layout that is not supported"),
        (None, lambda f: config(f, dtype=4), "the graph expects float32, the file stores int32"),
        (None, lambda f: config(f, **HUGE), "entries, and its record"),
        (None, lambda f: config(f, sizes=[{"as_int": -1}], strides=[{"as_int": 1}]), "whole number of at least 0"),
        (None, lambda f: {"data/weights/weight_0": b"1234567"}, "bytes do not fit"),
        (None, lambda f: {"archive_format": b"xyz"}, "archive_format is not pt2"),
        (None, lambda f: {"data/aotinductor/model/x.so": b"ELF"}, "compiled library, which is never loaded"),
        (None, lambda f: {"data/weights/model.pt": b"pickle"}, "old version of torch, which pickled the weights"),
        (None, lambda f: {pt2_archive.MODEL: b"[1]"}, "expected a JSON object"),
        (None, lambda f: {pt2_archive.MODEL: b"\xff"}, "not JSON"),
        (set_target("torch.ops.aten.from_file.default"), None, "from_file.default is not supported"),
        (set_target("torch.load"), None, "torch.load is not supported"),
        (set_target("_operator.attrgetter"), None, "attrgetter is not supported"),
        (set_target("torch.ops.aten.linear.default.__class__"), None, "is not supported"),
        (set_target("torch.ops.rarefy.load.default"), None, "is not supported"),
        (set_target("torch.ops.aten.relu.default"), None, "has no argument 'input' here"),
        (rename("x", "x): print(1"), None, "is no name"),
        (rename("x", "import"), None, "is no name"),
        (rename("a.weight", "a.weight;print(1)"), None, "missing"),
        (lambda p: p["graph_module"]["graph"]["nodes"].pop(0), None, "is damaged"),
        (lambda p: p["graph_module"].pop("signature"), None, "is damaged"),
        (lambda p: p.pop("graph_module"), None, "is damaged"),
        (lambda p: p["graph_module"]["module_call_graph"].clear(), None, "is damaged"),
        (
            lambda p: p["graph_module"]["signature"]["output_specs"].append({"buffer_mutation": {}}),
            None,
            "buffer mutation",
        ),
    ],
)
def test_files_that_are_refused(files, tmp_path, change, records, message):
    source = files[0] / "net.pt2"
    more = {} if records is None else records(source)
    with pytest.raises((ContainerError, ModelError), match=message) as error:
        rarefy.load(changed(source, tmp_path / "bad.pt2", change, more))
    assert "bad.pt2" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_archive_is_refused(files, tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"PK nothing")
    torch.save({"a": 1}, tmp_path / "b.pt2")
    changed(files[0] / "net.pt2", tmp_path / "c.pt2", compression=zipfile.ZIP_DEFLATED)
    for name, message in (("a", "no .pt2 file"), ("b", "no models/model.json"), ("c", "records are compressed")):
        with pytest.raises(ContainerError, match=message):
            rarefy.load(tmp_path / f"{name}.pt2")


def test_a_model_in_training_mode_and_nested_inputs_are_refused(tmp_path):
    x = torch.randn(2, 4)
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), (x,))
    torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(ModelError, match="evaluation mode, after model.eval"):
        rarefy.load(tmp_path / "a.pt2")

    class Sums(nn.Module):
        def forward(self, tensors):
            return sum(tensors)

    saved(Sums(), ([x, x],), place=tmp_path / "b.pt2")
    with pytest.raises(ModelError, match="takes nested inputs"):
        rarefy.load(tmp_path / "b.pt2")


def set_argument(target, name, value):
    """Return a change of a program: an argument of the first call of an operator."""

    def change(program):
        inputs = of_call(program, f"torch.ops.aten.{target}.default")["inputs"]
        inputs[:] = [*(i for i in inputs if i["name"] != name), {"name": name, "arg": value, "kind": 1}]

    return change


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("texts", set_argument("embedding", "padding_idx", {"as_int": 99}), "is damaged: Padding_idx"),
        ("texts", set_argument("layer_norm", "eps", {"as_float": 10**400}), "is damaged: .*too large"),
        ("net", rename("x", "__debug__"), "is damaged|is no name"),
    ],
)
def test_arguments_that_layers_and_python_refuse(files, tmp_path, name, change, message):
    with pytest.raises(ContainerError, match=message):
        rarefy.load(changed(files[0] / f"{name}.pt2", tmp_path / "bad.pt2", change))


def test_names_of_records_that_are_no_text(files, tmp_path):
    data = (files[0] / "net.pt2").read_bytes()
    (tmp_path / "bad.pt2").write_bytes(data.replace(b"archive_format", b"archive_f\xffrmat"))
    with pytest.raises(ContainerError, match=r"bad.pt2 is no .pt2 file of torch.export.save: .*decode byte 0xff"):
        rarefy.load(tmp_path / "bad.pt2")


def test_records_are_copied_a_few_times_at_most(tmp_path):
    source = saved(nn.Linear(256, 256, bias=False), (torch.ones(1, 256),), place=tmp_path / "a.pt2")

    def with_copies(count):
        (name, text), *_ = config(source).items()
        table = json.loads(text)
        for i in range(1, count + 1):
            entry = json.loads(json.dumps(table["config"]["weight"]))
            for key in ("sizes", "strides"):
                entry["tensor_meta"][key] = [{"as_int": 1}] * i + entry["tensor_meta"][key]
            table["config"][f"copy{i}"] = entry
        return changed(source, tmp_path / f"{count}.pt2", records={name: json.dumps(table).encode()})

    tensors = pt2_archive.read(with_copies(2)).tensors
    assert torch.equal(tensors["copy2"][0, 0], tensors["weight"])
    assert len({t.data_ptr() for t in tensors.values()}) == 3
    with pytest.raises(ContainerError, match="more than 8 times the bytes of the file"):
        rarefy.load(with_copies(11))
