"""What newcomers do wrong, and what they are told: one line that teaches, nothing lost."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import rarefy
from conftest import Net, image_batches, tiny_llama
from rarefy.common.atomic_io import check_output_folder
from rarefy.common.errors import ContainerError, DataError, ModelError, PatternError, RecipeError
from rarefy.evaluation.metrics import perplexity
from rarefy.recipe import parser as recipes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [(torch.randn(2, 5, 9, 9), torch.ones(2))],
            r"a batch of float32 2x5x9x9 and float32 2, of which the first is the input \(give several inputs as a dict\)",
        ),
        ([torch.randn(2, 5, 9, 9)], r"Net cannot be called with a batch of float32 2x5x9x9: .* \(it takes x\)"),
        ([{"input": torch.randn(2, 3, 9, 9)}], r"a batch of input: float32 2x3x9x9: .*unexpected keyword"),
        ([torch.ones(2, 3, 9, 9).long()], "a batch of int64 2x3x9x9"),
        ([None], "batch 0 of the data is None"),
        ("my.txt", "data: expected an iterable of batches, got the text 'my.txt': name files"),
        (torch.randn(2, 3, 9, 9), r"got one tensor \(float32 2x3x9x9\): give a list"),
        (TensorDataset(torch.zeros(2)), "got a TensorDataset: wrap it in a DataLoader"),
        (3, "data: expected an iterable of batches, got int"),
    ],
)
def test_data_that_does_not_fit(data, message):
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(DataError, match=message):
        rarefy.prune_(net, "unstructured", "wanda", 0.5, data=data)
    with pytest.raises(DataError, match=message):
        rarefy.compress_(net, {"stages": [{"prune": {"score": "wanda", "sparsity": 0.5}}]}, data)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_token_ids_outside_the_vocabulary():
    with pytest.raises(DataError, match="LlamaForCausalLM cannot be called with a batch of input_ids: int64 1x4"):
        perplexity(tiny_llama(), [{"input_ids": torch.full((1, 4), 64)}])


def test_perplexity_of_a_model_without_logits():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(DataError, match=r"needs a language model with logits \[batch, tokens, vocabulary\]; BertModel"):
        perplexity(BertModel(config), [{"input_ids": torch.zeros(1, 4).long()}])


def test_an_optimizer_of_another_model():
    a, b = Net(), Net()
    with pytest.raises(ModelError, match="the optimizer holds none of the model's parameters"):
        rarefy.fit_(b, image_batches(), optimizer=torch.optim.SGD(a.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: expected a torch optimizer or a function that creates one, .*got 'adam'"),
        ({"loss": "cross_entropy"}, "loss: expected a callable.* got 'cross_entropy'"),
        ({"epochs": 1.5}, "epochs: expected a whole number of at least 1, got 1.5"),
        ({"prune": {"sparsity": 0.9}}, r"prune: expected a configuration such as rarefy.Gradual\(sparsity=0.9\)"),
    ],
)
def test_arguments_of_another_kind(settings, message):
    with pytest.raises(rarefy.RarefyError, match=message):
        rarefy.fit_(Net(), image_batches(), **settings)


def test_a_criterion_is_a_loss():
    mine, own = Net(), Net()
    own.load_state_dict(mine.state_dict())
    kwargs = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    rarefy.fit_(mine, image_batches(), loss=nn.CrossEntropyLoss(), **kwargs)
    rarefy.fit_(own, image_batches(), **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), own.parameters()))
    with pytest.raises(DataError, match=r"a criterion needs \(inputs, target\) batches"):
        rarefy.fit_(mine, [torch.zeros(1, 3, 9, 9)], loss=nn.CrossEntropyLoss())


def test_a_class_that_is_no_output():
    with pytest.raises(DataError, match="expected classes from 0 to 4, as the model has outputs, .* got 11"):
        rarefy.fit_(Net(), [(torch.zeros(1, 3, 9, 9), torch.tensor([11]))])


def test_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module as model, got str"):
        rarefy.prune_("model", sparsity=0.5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module as model, got int"):
        rarefy.save(3, tmp_path / "z")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is on the meta device: it has no values yet"):
        rarefy.prune_(nn.Linear(2, 2, device="meta"), sparsity=0.5)
    rarefy.save(Net(), tmp_path / "n")
    with pytest.raises(
        ModelError, match=r"model: expected a torch.nn.Module to load into, such as MyModule\(\), got <class"
    ):
        rarefy.load(tmp_path / "n", model=Net)  # type: ignore[arg-type]


def test_a_later_stage_is_checked_before_the_first_runs():
    net = Net()
    stages = [{"prune": {"sparsity": 0.5}}, {"prune": {"sparsity": 0.5, "layers": "zzz"}}]
    with pytest.raises(rarefy.RarefyError, match=r"'zzz' matches no layer.* \[recipe two, stage 2\]"):
        rarefy.compress_(net, {"name": "two", "stages": stages})
    assert not rarefy.masks(net)
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"fc: NaN or inf in its weights \[recipe two, stage 1\]"):
        rarefy.compress_(net, {"name": "two", "stages": [{"prune": {"sparsity": 0.5, "layers": "fc"}}]})


def test_hints():
    with pytest.raises(PatternError, match=r"got 50; did you mean 0.5\?"):
        rarefy.prune_(Net(), sparsity=50)
    with pytest.raises(PatternError, match=r"cannot prune deep \(1 inputs a group\): pass ignore=\['deep'\]"):
        rarefy.prune_(Net(), "2:4", layers="deep")
    with pytest.raises(RecipeError, match="line 2: not YAML.*indent with spaces, not tabs"):
        recipes.from_yaml("stages:\n\t- prune: {sparsity: 0.5}\n")
    with pytest.raises(
        RecipeError,
        match=r"r line 3: evaluate.max_degradation: expected a number above -1 and at most 1, got 15; did you mean 0.15\?",
    ):
        recipes.from_yaml(
            "stages: [{prune: {sparsity: 0.5}}]\nevaluate:\n  {metric: accuracy, max_degradation: 15}\n", "r"
        )
    with pytest.raises(RecipeError, match=r"r line 2: unknown field 'stage'"):
        recipes.from_yaml("name: a\nstage:\n  - prune: {sparsity: 0.3}\n", "r")


def test_a_place_that_cannot_be_written_is_known_at_once():
    with pytest.raises(ContainerError, match=r"cannot write /proc/x/y: .*; give another name"):
        check_output_folder("/proc/x/y")


def shell(*words):
    return subprocess.run(
        [sys.executable, "-m", "rarefy.cli.main", *map(str, words)], capture_output=True, text=True, timeout=120
    )


def test_the_command_line_has_one_line_for_each(run, tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    for name in ("m.pt", "m.onnx"):
        (tmp_path / name).write_bytes(b"x")
    torch.manual_seed(0)
    for words, message in [
        (("compress", folder, "-r", "fashion-oneshot-50", "-o", tmp_path / "o"), "'stem*' matches no layer"),
        (("compress", tmp_path / "m.pt", "-r", "smollm2-demo", "-o", tmp_path / "o"), "a pickle is never opened"),
        (("compress", tmp_path / "m.onnx", "-r", "smollm2-demo", "-o", tmp_path / "o"), "not an ONNX file"),
        (("compress", tmp_path / "n.onnx", "-r", "smollm2-demo", "-o", tmp_path / "o"), "no file '"),
        (("generate", tmp_path / "none.gguf", "--prompt", "a"), "no file '"),
        (("compress", tmp_path / "tinny", "-r", "smollm2-demo", "-o", tmp_path / "o"), "did you mean"),
        (("compress", folder, "-r", "smollm2-demo", "--dry-run", "--data", "nope.txt"), "no file 'nope.txt'"),
        (("compress", folder, "-r", "smollm2-demo", "--dry-run", "--out", tmp_path), "is not only Rarefy's"),
        (("bench", folder, "--threads", "100000"), "the number of cores"),
    ]:
        ran = run(*words)
        assert ran.code == 2 and "Traceback" not in ran.err, ran.err
        assert message in ran.err
    assert shell("--version").stdout.strip() == rarefy.__version__


def test_sigterm_leaves_nothing_behind(tmp_path):
    code = (
        "import time, sys; from rarefy.cli import main as cli; from rarefy.common.atomic_io import atomic_folder\n"
        "def slow(*a, **k):\n"
        "    with atomic_folder(sys.argv[1]) as p:\n"
        "        (p / 'x').write_text('x'); print('in', flush=True); time.sleep(60)\n"
        "cli.app = slow; cli.main()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"in\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    child.stdout.close()
    assert not list(tmp_path.iterdir())


def test_what_was_left_alone_is_said():
    assert rarefy.prune_(tiny_llama(), "2:4").notes == ("not pruned unless named in layers: model.embed_tokens",)
    assert rarefy.prune_(tiny_llama(), "2:4", layers="model.layers.*").notes == ()
