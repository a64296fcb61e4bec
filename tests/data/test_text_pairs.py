"""Pairs of texts: real ones from files, or halves of texts; what is wrong is said with its text and line."""

import json

import pytest

from conftest import sample
from rarefy.common.errors import DataError
from rarefy.data import builtin
from rarefy.data.sources import Take
from rarefy.data.text_pairs import pair_batches, text_pairs, token_batches
from rarefy.model import hf


class Words:
    """A tokenizer of one token a word: its length, padded with zeros on the right."""

    pad_token = "<pad>"

    def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
        import torch

        assert padding and truncation and return_tensors == "pt"
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": (ids > 0).long()}


def lengths(side) -> list[list[int]]:
    """Return the tokens of a batch without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(side["input_ids"], side["attention_mask"])]


def test_texts_are_cut_in_halves_at_a_word():
    [(queries, texts)] = text_pairs(["a bb ccc dddd", "aaaaa bbbb c"], Words())
    assert lengths(queries) == [[1, 2], [5]] and lengths(texts) == [[3, 4], [4, 1]]
    assert list(queries) == ["input_ids", "attention_mask"]


def test_halves_of_long_texts_stay_neighbours():
    long = " ".join("x" * i for i in range(1, 30))
    [(queries, texts)] = text_pairs([long, long], Words(), tokens=4)
    assert lengths(queries)[0] == [1, 2, 3, 4] and lengths(texts)[0] == [5, 6, 7, 8]


def test_pairs_are_kept_and_cut_into_batches():
    found = text_pairs([("a b", "ccc"), ("dd", "e ff"), ("g", "hhhh")], Words(), batch=2)
    assert [(lengths(q), lengths(t)) for q, t in found] == [
        ([[1, 1], [2]], [[3], [1, 2]]),
        ([[1]], [[4]]),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least 2 pairs of texts, better 1,000; there are no texts"),
        (["one two"], "at least 2 pairs.*1 text makes 1 pair"),
        (["one two", "alone"], "text 2 is one word, 'alone': expected at least two words"),
        (["one two", "  "], "text 2 is empty"),
        ([("a", "b"), ("a", " ")], "text 2: the query or the text of a pair is empty"),
        ([("a", "b"), ("a", "b", "c")], r"text 2: expected a text or a pair \(query, text\), got tuple"),
        ([("a", "b"), 3], "text 2: expected a text or a pair .*, got int"),
        ("one two", "expected a list of texts or of pairs .*, got one text"),
    ],
)
def test_texts_that_make_no_pairs(texts, message):
    with pytest.raises(DataError, match=message):
        text_pairs(texts, Words())


def test_tokenizers_that_do_not_fit():
    with pytest.raises(DataError, match=r"needs the model's tokenizer"):
        text_pairs(["a b", "c d"], None)
    tokenizer = Words()
    tokenizer.pad_token = None  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"no padding token: set tokenizer.pad_token = tokenizer.eos_token"):
        token_batches(["a"], tokenizer)


# files


def write(folder, name, rows):
    text = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def read(folder, name, **settings):
    return pair_batches(name, Take(**settings), tokenizer=Words(), base=folder)


def rows_of(batches) -> list[tuple[list[int], list[int]]]:
    return sorted(pair for q, t in batches for pair in zip(lengths(q), lengths(t)))


@pytest.mark.parametrize("keys", [("query", "text"), ("question", "answer"), ("anchor", "positive")])
def test_lines_of_pairs(tmp_path, keys):
    rows = [{keys[0]: "x" * i, keys[1]: "y" * 2 * i, "id": i} for i in range(1, 6)]
    found = read(tmp_path, write(tmp_path, "pairs.jsonl", rows), batch=2)
    assert [len(q["input_ids"]) for q, _ in found] == [2, 2, 1]
    assert rows_of(found) == [([i], [2 * i]) for i in range(1, 6)]


def test_as_many_pairs_as_asked_in_seeded_order(tmp_path):
    name = write(tmp_path, "pairs.jsonl", [{"query": "x" * i, "text": "y" * i} for i in range(1, 9)])
    first, same, other = (rows_of(read(tmp_path, name, samples=4, seed=s)) for s in (0, 0, 1))
    assert len(first) == 4 and first == same != other
    with pytest.raises(DataError, match=r"pairs.jsonl is too short: 8 pairs, 9 are needed"):
        read(tmp_path, name, samples=9)


def test_lines_of_texts_and_paragraphs(tmp_path):
    eight = "a bb ccc dddd a bb ccc dddd"
    half = [1, 2, 3, 4]
    assert rows_of(read(tmp_path, write(tmp_path, "t.jsonl", [{"text": eight}] * 2))) == [(half, half)] * 2
    lines = f"Title\n{eight}\n{eight}\n{eight}\n"
    assert rows_of(read(tmp_path, write(tmp_path, "lines.txt", lines))) == [(half, half)] * 3
    wrapped = f"Title\n\n{eight[:12]}\n{eight[13:]}\n \n{eight}\n\n\n"
    assert len(rows_of(read(tmp_path, write(tmp_path, "paragraphs.txt", wrapped)))) == 2


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("p.jsonl", [{"query": "a", "body": "b"}], r'p.jsonl, line 1: expected {"query": .*got the keys query, body'),
        ("p.jsonl", [{"query": "a", "text": "b"}, {}], "p.jsonl, line 2: expected .*got the keys none"),
        ("p.jsonl", [{"query": "a", "text": "b"}, {"text": "c d"}], "expected pairs in all lines or in none"),
        ("p.jsonl", [{"text": "a b"}, {"text": "c"}], "data p.jsonl: text . is one word"),
        ("p.jsonl", '{"text": "a b"}\n[1]', r"p.jsonl, line 2: expected an object, {...}, got '\[1\]'"),
        ("p.jsonl", '{"text": "a b"}\n{', "p.jsonl, line 2: not JSON"),
        ("p.txt", "short\nlines\n", "data p.txt: retrieval needs at least 2 pairs"),
        ("p.npz", "", "retrieval needs texts, .txt or .jsonl, got .*p.npz"),
        ("fashion-mnist", None, "fashion-mnist is no text"),
        ("q.txt", None, "no file .*q.txt"),
    ],
)
def test_files_that_make_no_pairs(tmp_path, name, rows, message):
    if name == "fashion-mnist":
        sample(name)
    if rows is not None:
        write(tmp_path, name, rows)
    with pytest.raises(DataError, match=message):
        read(tmp_path, name)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match=r"data: .*p.txt is not readable as .txt"):
        read(tmp_path, "p.txt")


@pytest.mark.real
def test_articles_with_a_real_tokenizer():
    sample("wiki")
    sample("minilm")
    tokenizer = hf.load_tokenizer(builtin.model_folder("minilm"))
    found = pair_batches("wiki-test", Take(samples=20, tokens=32, batch=8), tokenizer=tokenizer)
    assert [len(q["input_ids"]) for q, _ in found] == [8, 8, 4]
    for sides in found:
        for side in sides:
            assert side["input_ids"].shape == side["attention_mask"].shape and side["input_ids"].shape[1] <= 32
