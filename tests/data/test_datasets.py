"""Rows of Hugging Face datasets as data of Rarefy."""

import pytest
import torch

import rarefy
from conftest import tiny_bert, tiny_llama
from rarefy.common.errors import DataError
from rarefy.data.datasets import batches

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


def tokenizer_of():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 64)}}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = [" ".join(f"w{(3 * i + j) % 60 + 2}" for j in range(3 + i % 4)) for i in range(10)]
ROWS = datasets.Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(10)]})


def test_text_columns():
    tokenizer = tokenizer_of()
    made = batches(ROWS, tokenizer, labels="label", batch=4, samples=9, tokens=5)
    for _ in range(2):  # every pass is the same
        parts = list(made)
        assert [len(b["input_ids"]) for b in parts] == [4, 4, 1]
        assert torch.cat([b["labels"] for b in parts]).tolist() == [i % 2 for i in range(9)]
    want = tokenizer(TEXTS[:4], padding=True, truncation=True, max_length=5, return_tensors="pt")
    assert all(torch.equal(parts[0][n], want[n]) for n in ("input_ids", "attention_mask"))
    assert "labels" not in next(iter(batches(ROWS, tokenizer)))


@pytest.mark.parametrize("torch_format", [False, True])
def test_tokenized_and_streaming(torch_format):
    tokenizer = tokenizer_of()
    tokenized = ROWS.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    stream = tokenized.to_iterable_dataset()
    if torch_format:
        tokenized, stream = tokenized.with_format("torch"), stream.with_format("torch")
    a, b = (list(batches(rows, tokenizer, labels="label", batch=4)) for rows in (tokenized, stream))
    want = list(batches(ROWS, tokenizer, labels="label", batch=4))
    for x, y, z in zip(a, b, want, strict=True):
        assert all(
            torch.equal(x[n], y[n]) and torch.equal(x[n], z[n]) for n in ("input_ids", "attention_mask", "labels")
        )
    with pytest.raises(DataError, match="rows have 3 to 6 tokens: pass tokenizer="):
        list(batches(tokenized, batch=4))
    assert len(list(batches(tokenized, batch=1))) == 10


def test_images():
    from PIL import Image

    images = [Image.new("L" if i else "RGB", (20, 10), i) for i in range(3)]
    rows = datasets.Dataset.from_dict({"picture": images, "label": [0, 1, 2]})
    reader = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    (made,) = batches(rows, image_processor=reader, labels="label")
    assert made["pixel_values"].shape == (3, 3, 8, 8) and made["labels"].tolist() == [0, 1, 2]
    pixels = datasets.Dataset.from_dict({"pixel_values": made["pixel_values"].tolist()})
    assert torch.equal(next(iter(batches(pixels)))["pixel_values"], made["pixel_values"])
    with pytest.raises(DataError, match="'picture' has images: pass image_processor="):
        batches(rows)


def test_verbs_take_them():
    tokenizer, model = tokenizer_of(), tiny_bert()
    data = batches(ROWS.to_iterable_dataset(), tokenizer, batch=4)
    rarefy.prune_(model, score="wanda", sparsity=0.5, layers="encoder.*", data=data)
    rarefy.quantize_(model, "int8", solver="obs", layers="encoder.*", data=data)
    writer = tiny_llama()
    receipt = rarefy.compress_(writer, {"stages": [{"prune": {"score": "wanda", "sparsity": 0.5}}]}, data)
    assert receipt is not None and float((writer.model.layers[0].mlp.up_proj.weight == 0).float().mean()) > 0.4
    config = transformers.BertConfig(
        **{n: getattr(model.config, n) for n in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    head = transformers.BertForSequenceClassification(config)
    before = head.classifier.weight.clone()
    rarefy.fit_(head, batches(ROWS, tokenizer, labels="label", batch=5), epochs=1)
    assert not torch.equal(head.classifier.weight, before)
    for rows in (ROWS, ROWS.to_iterable_dataset()):
        with pytest.raises(
            DataError, match=r"got the rows of a (Iterable)?Dataset: rarefy.data.datasets.batches\(dataset, tokenizer\)"
        ):
            rarefy.prune_(tiny_bert(), score="wanda", sparsity=0.5, data=rows)


def test_calibrates_compile():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    rows = datasets.Dataset.from_dict({"pixel_values": torch.rand(4, 3, 32, 32).tolist()})
    data = batches(rows, batch=2)
    fast = rarefy.compile(model, next(iter(data)), precision="int8", calibrate=data)
    assert fast(**next(iter(data))).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (datasets.DatasetDict({"train": ROWS}), {}, "got a dict of splits: pass one of them, train"),
        (3, {}, "expected a dataset of rows, such as a datasets.Dataset, got int"),
        ([], {}, "the dataset has no rows"),
        ([torch.ones(2)], {}, "expected rows as dicts by column, got Tensor"),
        (ROWS, {}, "the column 'text' is text and needs the model's tokenizer"),
        (ROWS, {"column": "title"}, "no column 'title': its columns are text, label"),
        (ROWS, {"labels": "topic"}, "no column 'topic' for labels: its columns are text, label"),
        (ROWS.remove_columns("text"), {}, "expected texts or images: name the column"),
        (ROWS, {"column": "label"}, "expected texts or images in 'label'"),
        (ROWS, {"batch": 0}, "batch: expected"),
        ([{"a": "x", "b": "y"}], {}, "name the column, column=..., or tokenize first; columns are a, b"),
    ],
)
def test_what_is_no_dataset(rows, options, message):
    with pytest.raises(DataError, match=message):
        batches(rows, **options)
