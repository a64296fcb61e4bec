"""The smallest input of each defect that `make fuzz` has found."""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from fuzz import samples
from rarefy.calibration import resume
from rarefy.common.errors import ContainerError, ModelError
from rarefy.common.json_text import parse_json
from rarefy.evaluation.receipt import receipt_from_dict
from rarefy.evaluation.receipt_page import receipt_page
from rarefy.search.journal import Journal

DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize("line", [DEEP, '{"key": 3, "value": 1, "seconds": 2}', '{"key": "a", "value": 1, "seconds": 1%s}' % ("0" * 400)])  # fmt: skip
def test_results_of_a_search(line, tmp_path):
    """Nested too deeply; a key that is no text, on which the search fails later; seconds beyond any float."""
    (tmp_path / "search.jsonl").write_text(json.dumps({"settings": {}}) + f"\n{line}\n")
    with pytest.raises(ContainerError, match="was not written by rarefy.optimize .*: remove it"):
        Journal(tmp_path, {})


@pytest.mark.parametrize("name", ["key.json", "each.json", "stop-000000.safetensors"])
def test_state_of_a_run_that_is_nested_too_deeply(name, tmp_path):
    def run():
        state = resume.open_state(tmp_path, {"epochs": 1})
        try:
            state.compute_once("each", lambda: [1])
            state.read(0)
        finally:
            state.close()

    state = resume.open_state(tmp_path, {"epochs": 1})
    state.compute_once("each", lambda: [1])
    state.write(0, resume.StepState({"w": torch.ones(2)}, {}, [{"a": 1}]))
    if name.endswith(".json"):
        (tmp_path / name).write_text(DEEP)
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / name)
        save_file(tensors, tmp_path / name, {"key": state.key, "digest": resume.digest(tensors), "rows": DEEP})
    state.close()
    with pytest.raises(ContainerError, match="is damaged|is not readable"):
        run()


def test_json_that_is_nested_too_deeply():
    """Python reads it, and whoever walks through it fails."""
    with pytest.raises(ContainerError, match="nested deeper than 100 levels"):
        parse_json("[" * 400 + "]" * 400)


@pytest.mark.parametrize("change", [{"asked": "x"}, {"asked": {}}, {"asked": None}])
def test_pages_of_receipts(change):
    """A field that the printed receipt does not read."""
    receipt = json.loads((samples.OLD / "receipt-llama" / "receipt.json").read_text())
    rows = receipt["sparsity"]["layers"]
    rows.append({**rows[0], **change})
    with pytest.raises(ContainerError, match="receipt: not written by Rarefy"):
        receipt_page(receipt_from_dict(receipt))


def onnx_file(path, change):
    from onnx import helper, load

    rows = [helper.make_tensor_value_info(n, 1, (2, 4)) for n in "xy"]
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", 1, [1], [2.0]))
    graph = helper.make_graph([constant, helper.make_node("Mul", ["x", "c"], ["y"])], "g", rows[:1], rows[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(change(model.SerializeToString()))
    load(path)
    return path


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        (b"\x12\x01g", b"\x12\x01\xff", "a name in it is not text in UTF-8"),  # protobuf returns it as bytes
    ],
)
def test_fields_of_onnx_files(before, after, error, tmp_path):
    import rarefy

    pytest.importorskip("onnxruntime")
    path = onnx_file(tmp_path / "net.onnx", lambda data: data.replace(before, after, 1))
    with pytest.raises(ContainerError, match=f"net.onnx: not a sound ONNX file: {error}"):
        rarefy.from_onnx(path)


@pytest.mark.parametrize("kind", ["vocabulary", "length"])
def test_tokenizers(kind, tmp_path):
    """A token so large that a table of all tokens fills the memory; a length that is no number."""
    pytest.importorskip("transformers")
    from rarefy.model import hf

    samples.hf_tokenizer(tmp_path)
    file = tmp_path / ("tokenizer.json" if kind == "vocabulary" else "tokenizer_config.json")
    values = json.loads(file.read_text())
    if kind == "vocabulary":
        values["model"]["vocab"][next(iter(values["model"]["vocab"]))] = 1 << 31
    else:
        values["model_max_length"] = "x"
    file.write_text(json.dumps(values))
    with pytest.raises(
        ModelError, match="the tokenizer does not load: .*(expected tokens below|not supported between)"
    ):
        hf.load_tokenizer(tmp_path)


# ---- compiled graphs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """The graph of a compiled convolution with a pool, as JSON."""
    from torch import nn

    import rarefy
    from rarefy.checkpoint import compiled_model

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1, count_include_pad=False)
    ).eval()
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        to_json = compiled_model.to_json
        patch.setattr(compiled_model, "to_json", lambda *a: saved.append(to_json(*a)) or saved[-1])
        rarefy.save(rarefy.compile(model, torch.randn(1, 3, 12, 12)), tmp_path_factory.mktemp("convolution") / "m")
    return saved[0]


@pytest.mark.parametrize(
    ("operator", "argument", "expected"),
    [
        ("rarefy.conv2d", 5, "from 1 to 2"),  # strides
        ("rarefy.conv2d", 7, "from 1 to 2"),  # dilation
        ("rarefy.max_pool2d", 1, "from 1 to 2"),  # windows
        ("rarefy.max_pool2d", 2, "from 1 to 2"),
        ("rarefy.max_pool2d", 4, "from 1 to 2"),
        ("rarefy.avg_pool2d", 1, "from 1 to 2"),
        ("rarefy.avg_pool2d", 2, "from 1 to 2"),
        ("rarefy.conv2d", 6, "from 0 to 2"),  # padding
        ("rarefy.max_pool2d", 3, "from 0 to 2"),
    ],
)
@pytest.mark.parametrize("number", [0, -1, 1 << 40])
def test_windows_of_compiled_graphs(operator, argument, expected, number, convolution):
    """A step of 0, by which a shape is divided; numbers whose product exceeds 64 bits."""
    from rarefy.compiler.graph_json import from_json

    graph = copy.deepcopy(convolution)
    node = next(n for n in graph["nodes"] if n[2] == operator)
    node[3][argument] = {"tuple": [number, 1]}
    if number == 0 and expected.startswith("from 0"):
        from_json(graph, "graph")
        return
    with pytest.raises(ContainerError, match=rf"argument {argument + 1}: expected a pair of whole numbers {expected}"):
        from_json(graph, "graph")


HUGE = (1 << 31, 1 << 62, -(1 << 62))


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("aten.adaptive_avg_pool3d.default", lambda n: ([n, 3, 0],)),
        ("aten.adaptive_max_pool2d.default", lambda n: ([n, 0],)),
        ("aten.max_pool1d.default", lambda n: ([n],)),
        ("aten.max_pool1d.default", lambda n: (n,)),
        ("aten.replication_pad2d.default", lambda n: ([n, n, -1, 1],)),
        ("aten.conv2d.default", lambda n: (torch.fx.Graph().placeholder("w"), None, [n, 1])),
    ],
)
@pytest.mark.parametrize("number", HUGE)
def test_sizes_of_operators_of_torch(target, arguments, number):
    """torch loops over an output of 2^31 empty planes, and writes elsewhere for paddings beyond 32 bits."""
    from rarefy.compiler import op_registry

    x = torch.fx.Graph().placeholder("x")
    args = (x, *arguments(number))
    kinds = dict.fromkeys([a for a in args if isinstance(a, torch.fx.Node)], op_registry.TENSOR)
    with pytest.raises(ValueError, match="expected sizes of at most 1,048,576"):
        op_registry.check_call(op_registry.find(target), args, {}, kinds, {})


@pytest.mark.parametrize("value", [[], (), [None]])
def test_lists_without_tensors(value):
    """torch.cat of none raises a ValueError of torch's when it runs, index an IndexError, others other errors."""
    from rarefy.compiler import op_registry

    operators = {name: op_registry.find(f"aten.{name}") for name in sorted(op_registry.ATEN)}
    lists = {
        (name, argument.name): operator
        for name, operator in operators.items()
        for argument in ([] if operator is None else operator._schema.arguments)
        if "Tensor" in str(argument.real_type) and "List" in str(argument.real_type)
    }
    assert {"cat.default", "stack.default", "meshgrid.indexing", "index.Tensor"} <= {name for name, _ in lists}
    x = torch.fx.Graph().placeholder("x")
    for (_, argument), operator in lists.items():
        others = {"self": x, "indexing": "ij", "equation": "a->a"}
        given = {a.name: others[a.name] for a in operator._schema.arguments if a.name in others}
        with pytest.raises(ValueError, match=f"argument {argument}: expected (at least one tensor|List.Tensor.), got"):
            op_registry.check_call(operator, (), {**given, argument: value}, {x: op_registry.TENSOR}, {})


def test_operators_of_torch_that_check_nothing():
    """Vectors that are shorter than the channels: torch reads what lies behind them, or dies."""
    from rarefy.compiler import op_registry
    from rarefy.compiler.checked_ops import CHECKED

    x, short, right = torch.randn(2, 4, 3, 3), torch.ones(3), torch.ones(4)
    evaluated = CHECKED[op_registry.find("aten._native_batch_norm_legit_no_training.default")]
    by_input = CHECKED[op_registry.find("aten._native_batch_norm_legit.no_stats")]
    for vectors in ((short, None, right, right), (None, short, right, right), (None, None, short, right), (None, None, right, short)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"expected \[batch, channels, ..\] and vectors \[channels\]"):
            evaluated(x, *vectors, 0.1, 1e-5)
    assert torch.allclose(evaluated(x, right, None, right, right, 0.1, 0.0)[0], x - 1)
    with pytest.raises(RuntimeError, match="got .* with a vector .3."):
        by_input(x, short, None, True, 0.1, 1e-5)
    node = torch.fx.Graph().placeholder("x")
    with pytest.raises(ValueError, match="argument training: expected True, got False"):
        op_registry.check_call(
            op_registry.find("aten._native_batch_norm_legit.no_stats"), (node, None, None, False, 0.1, 0.0), {},
            {node: op_registry.TENSOR}, {},
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="padding: expected at most 1,048,576 pixels"):
        CHECKED[op_registry.find("aten.replication_pad2d.default")](x, [1 << 62, 1 << 62, -1, 1])
    assert all(op_registry.find(op_registry.name_of(f)) is op for op, f in CHECKED.items())


def test_graphs_of_files_call_what_checks(convolution):
    from rarefy.compiler.checked_ops import batch_norm
    from rarefy.compiler.graph_json import from_json

    graph = copy.deepcopy(convolution)
    at, x = next((i, {"node": n[0]}) for i, n in enumerate(graph["nodes"]) if n[0] == graph["inputs"][0][0])
    target = "aten._native_batch_norm_legit_no_training.default"
    graph["nodes"].insert(at + 1, ["norm", "call_function", target, [x, None, None, x, x, 0.1, 1e-5], {}])
    assert batch_norm in [n.target for n in from_json(graph, "graph").graph.nodes]


# ---- models of transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_hidden_layers": 1000}, "describes a model of far more tensors than its files explain, which hold 12"),
        ({"hidden_size": 1 << 20}, "describes a model of far more elements than its files explain"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers: expected at most 131,072, got 1,099,511,627,776"),
        ({"num_labels": 1 << 31}, "num_labels: expected at most 131,072"),
    ],
)
@pytest.mark.parametrize("reader", ["weights", "model"])
def test_sizes_of_models(change, error, reader, tmp_path):
    """A config that asks for more than the files hold: it took minutes, or terabytes, before the weights were missed."""
    pytest.importorskip("transformers")
    from rarefy.checkpoint.weight_files import open_weights
    from rarefy.model import hf

    samples.hf_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=error):
        open_weights(tmp_path) if reader == "weights" else hf.load_folder(tmp_path)


def test_names_of_tied_tensors_are_looked_up_once(tmp_path, monkeypatch):
    """They were for each tensor: time in the square of their number."""
    pytest.importorskip("transformers")
    from rarefy.checkpoint import weight_files

    samples.hf_folder(tmp_path)
    calls, aliases = [], weight_files.aliases
    monkeypatch.setattr(weight_files, "aliases", lambda model: calls.append(1) or aliases(model))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="has no tensor 'model.layers.1"):
        weight_files.open_weights(tmp_path)
    assert len(calls) == 1


def test_tokenizer_that_makes_nothing_of_a_text(tmp_path):
    pytest.importorskip("transformers")
    from rarefy.checkpoint import gguf_tokenizer

    class Nothing:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, text):
            return {"input_ids": []}

    tokenizer = samples.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    keys = gguf_tokenizer.metadata(Nothing(tokenizer), 512)
    assert keys["ggml.add_bos_token"] is False and keys["ggml.add_eos_token"] is False


# ---- ONNX ---------------------------------------------------------------------------------------------------------

SIZED = """
import resource, sys
from onnx import helper, save
from rarefy.onnx.shape_inference import infer_kinds

resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
kind, number, opset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
node = helper.make_node
constant = lambda name, values: node("Constant", [], [name], value=helper.make_tensor(name, 7, [len(values)], values))
length = [constant("n", [number])] if kind != "product" else [constant("a", [number]), node("Mul", ["a", "a"], ["n"])]
reads = node("Concat", ["some", "v"], ["y"], axis=0) if kind != "expand" else node("Expand", ["x", "v"], ["y"])
nodes = [*length, constant("some", [0, 2]), node("ConstantOfShape", ["n"], ["v"]), reads]
nodes[-2].attribute.append(helper.make_attribute("value", helper.make_tensor("v", 7, [1], [1])))
x, y = helper.make_tensor_value_info("x", 1, [2, 3]), helper.make_empty_tensor_value_info("y")
model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", opset)])
try:
    print(infer_kinds(model).get("v"))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("kind", "number", "opset", "result"),
    [
        ("plain", 1 << 32, 18, "v has 4,294,967,296 elements; at most 134,217,728 are read"),
        ("product", 60_000, 18, "v has 3,600,000,000 elements; at most"),
        ("product", 8000, 18, "Kind(dtype=7, dims=(None,))"),  # long, and not followed element by element
        ("expand", 1 << 32, 11, "v has 4,294,967,296 elements; at most"),
        ("expand", 60_000_000, 11, "None"),
        ("plain", 3, 18, "Kind(dtype=7, dims=(3,))"),
    ],
)
def test_long_vectors_of_onnx_files(kind, number, opset, result):
    """ONNX's shape inference makes an object for each element of a vector that may be a shape."""
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-c", SIZED, kind, str(number), str(opset)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert result in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda conv: conv.attribute[0].ints.pop(), "conv: its attributes do not fit its inputs"),  # pads
        (lambda conv: conv.attribute[1].t.dims.append(3), "conv: extra is damaged"),
    ],
)
def test_attributes_of_onnx_operators(change, error):
    pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper

    from rarefy.onnx.convert import convert
    from rarefy.onnx.load import to_graph

    weight = numpy_helper.from_array(torch.zeros(2, 3, 3, 3).numpy(), "w")
    extra = helper.make_tensor("extra", 1, [1], [2.0])
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1], extra=extra)
    node.attribute.sort(key=lambda a: a.name != "pads")
    change(node)
    x, y = (helper.make_tensor_value_info(n, 1, ["n", c, 8, 8]) for n, c in (("x", 3), ("y", 2)))
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]), ir_version=8)
    with pytest.raises(ModelError, match=error):
        convert(to_graph(model))


def test_random_inputs_of_onnx_files_are_small(tmp_path):
    """A size in a file of 300 bytes that fills the memory; an example is compared nevertheless."""
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, save

    import rarefy

    constant = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 12, 1 << 14])
    nodes = [helper.make_node("Expand", ["x", "size"], ["wide"]), helper.make_node("ReduceMax", ["wide"], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 1]), ("y", [1, 1]))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [constant])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "net.onnx")
    with pytest.warns(UserWarning, match=r"not compared with ONNX Runtime.*its values would have 67,108,86. elements"):
        rarefy.from_onnx(tmp_path / "net.onnx")
    model = rarefy.from_onnx(tmp_path / "net.onnx", example=torch.full((1, 1), 3.0))
    assert model(torch.full((1, 1), 5.0)).item() == 5.0


# ---- the fuzzer itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "slowness", "found"), [((5, 5, 5), 1.0, True), ((5, 1), 1.0, False), ((3,), 2.0, False)])  # fmt: skip
def test_only_what_is_always_slow_is_slow(seconds, slowness, found, tmp_path, monkeypatch):
    """Another program that takes the processor's time for a while, or a processor that is half as fast."""
    from fuzz import run

    times = [0.0]
    for s in seconds:
        times += [times[-1] + s] * 2  # after a reading, and before the next
    clock = iter(times[1:])
    monkeypatch.setattr(run.Usage, "now", staticmethod(lambda: run.Usage(next(clock), 0)))
    monkeypatch.setattr(run, "slowness", lambda: slowness)
    target = run.Target("t", lambda _: None, lambda files: list(files), lambda *_: run.Change({"a": b"y"}), lambda _: 1)
    (tmp_path / "a").write_bytes(b"x")
    outcome, _ = run.Sample(target, tmp_path).try_seed(0, run.Usage(0.0, 0))
    assert isinstance(outcome, run.Finding) == found


def test_a_slow_mutation_is_not_blamed_on_the_next(tmp_path, monkeypatch):
    """A worker that ends a mutation while its parent decides to stop it."""
    from fuzz import run

    monkeypatch.setattr(run, "HANG_WALL_SECONDS", 0.2)

    def read(path):
        time.sleep(0.35 if path.read_bytes() == b"0" else 0.001)

    def change(part, files, rng):
        return run.Change({part: b"0"} if next(seeds) == 0 else {part: b"1"})

    seeds = iter(range(1 << 30))
    target = run.Target("t", lambda folder: (folder / "a").write_bytes(b"x"), lambda files: list(files), change, read)
    runner = run.Runner([target], say=lambda _: None)
    try:
        runner.run(None, 50)
    finally:
        runner.close()
    assert not runner.findings


def test_many_constants_of_onnx_files(tmp_path, monkeypatch):
    """Each is below the limit of one value; together they fill the memory."""
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, save

    import rarefy
    from rarefy.onnx import graph as onnx_graph

    monkeypatch.setattr(onnx_graph, "MAX_FOLDED", 1 << 20)
    one = helper.make_tensor("v", 1, [1], [1.0])
    nodes = [helper.make_node("ConstantOfShape", ["size"], [f"c{i}"], value=one) for i in range(6)]
    nodes += [helper.make_node("Add", [f"s{i}" if i else "x", f"c{i}"], [f"s{i + 1}"]) for i in range(6)]
    nodes.append(helper.make_node("ReduceMax", ["s6"], ["y"], keepdims=0))
    ends = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 4]), ("y", []))]
    size = helper.make_tensor("size", TensorProto.INT64, [2], [1 << 14, 4])
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [size])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"the file's constants become more than 1,048,576 bytes, and more than 16"):
        rarefy.from_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("place", ["initializer", "attribute"])
@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"location": "../secret"}, "stored outside the file's folder"),
        ({"location": "/etc/hostname"}, "stored outside the file's folder"),
        ({"location": "link"}, "stored outside the file's folder"),
        ({"location": "pipe"}, "which is missing or no plain file"),
        ({"location": "data", "offset": "-4"}, "expected numbers"),
        ({"location": "data", "offset": "8", "length": "64"}, "ends at byte 72 of 'data', which has 64"),
        ({"location": "data", "offset": "80"}, "ends at byte 80 of 'data', which has 64"),
        ({"location": "data", "repeated": "9"}, "its tensors read 640 bytes of files of 64 bytes"),
    ],
)
def test_data_outside_of_onnx_files(entries, error, place, tmp_path):
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, save

    from rarefy.onnx.read import read

    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "data").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")

    def outside(name):
        tensor = TensorProto(name=name, data_type=1, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    names = [f"w{i}" for i in range(int(entries.get("repeated", 0)) + 1)]
    held = [outside(n) for n in names] if place == "initializer" else []
    nodes = [helper.make_node("Constant", [], [n], value=outside(n)) for n in names if not held]
    nodes.append(helper.make_node("Sum", ["x", *names], ["y"]))
    ends = [helper.make_tensor_value_info(n, 1, [4, 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    with pytest.raises(ContainerError, match=error):
        read(folder / "net.onnx")
