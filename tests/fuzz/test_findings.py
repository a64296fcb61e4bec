"""The smallest input of each defect that `make fuzz` has found."""

import json

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
