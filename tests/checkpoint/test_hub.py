"""The hub: names, downloads and pushes over real HTTP to a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

import rarefy
from conftest import text_model
from helpers.hub_server import serving
from rarefy.checkpoint.engine_files import engine_files
from rarefy.checkpoint.export import side_files
from rarefy.checkpoint.model_card import model_card
from rarefy.checkpoint.origin import card_fields, origin_files, read_origin
from rarefy.checkpoint.push import push, write_card
from rarefy.common.errors import ContainerError, ModelError
from rarefy.model.hub import HubName, choose_files, download, parse_hub_name

pytest.importorskip("huggingface_hub")
CARD = b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-generation\ntags: [x]\n---\n# A model\n"
RECIPE = "name: half\nstages: [{prune: {score: random, sparsity: 0.5}}]\n"
# runs commands one after the other in one process, because importing torch takes seconds
COMMANDS = """
import json, sys
from rarefy.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["rarefy", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    print("code", code, flush=True)
    print("code", code, file=sys.stderr, flush=True)
"""


def run(url, home, *commands, **environment):
    """Run commands against a hub; return (code, standard output, standard error) of each."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "RAREFY_CACHE": str(home / "rarefy")}
    env |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    words = json.dumps([list(map(str, c)) for c in commands])
    ran = subprocess.run([sys.executable, "-c", COMMANDS, words], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    texts = [t.split("code ")[0:] for t in (ran.stdout, ran.stderr)]
    outputs, errors = ([texts[k][0], *(t.split("\n", 1)[1] for t in texts[k][1:])] for k in (0, 1))
    codes = [int(t.split("\n")[0]) for t in texts[0][1:]]
    return list(zip(codes, outputs, errors))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of a tiny language model as a repository has them."""
    folder = tmp_path_factory.mktemp("source")
    text_model(folder)
    files = {p.name: p.read_bytes() for p in (folder / "model").iterdir()}
    return {
        **files,
        "README.md": CARD,
        "LICENSE": b"MIT",
        "pytorch_model.bin": b"pickle",
        "modeling_x.py": b"raise SystemExit",
    }


@pytest.mark.slow
def test_from_the_hub_and_back(source, tmp_path):
    (tmp_path / "half.yaml").write_text(RECIPE)
    out, recipe = tmp_path / "out", tmp_path / "half.yaml"
    with serving() as hub:
        commit = hub.add("org/tiny", source)
        hub.add("org/tiny", source, "v1")
        hub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b""})
        results = run(
            hub.url,
            tmp_path,
            ("compress", "org/tiny", "-r", recipe, "-o", out, "--quiet"),
            ("inspect", "org/tiny@v1", "--json"),
            ("inspect", "org/tiny", "--offline", "--json"),
            ("inspect", "org/tiny@v2"),
            ("inspect", "org/tinny"),
            ("inspect", "org/pickle"),
            ("push", out, "me/half", "--quiet"),  # nobody is logged in
        )
        codes = [code for code, _, _ in results]
        assert codes == [0, 0, 0, 2, 2, 2, 2], results
        assert results[1][1] == results[2][1] and json.loads(results[1][1])
        for result, said in (
            (results[3], f"rarefy: org/tiny@v2: the model has no revision 'v2' on {hub.url}\n"),
            (
                results[4],
                f"rarefy: org/tinny: no such folder here, and no such model on {hub.url}; a private one needs",
            ),
            (
                results[5],
                "rarefy: org/pickle has no model.safetensors: it has pytorch_model.bin, a pickle, which is never",
            ),
            (results[6], "rarefy: me/half: the hub refused to write it (401): run hf auth login, or set HF_TOKEN\n"),
        ):
            assert said in result[2] and "Traceback" not in result[2]
        asked = "\n".join(hub.requests)
        assert "pytorch_model.bin" not in asked and "modeling_x.py" not in asked and "/LICENSE" in asked
        assert read_origin(out) == {
            "model": "org/tiny",
            "revision": commit,
            "licence": "mit",
            "task": "text-generation",
            "language": "en",
        }
        assert (out / "LICENSE").read_bytes() == b"MIT"

        results = run(
            hub.url,
            tmp_path,
            ("push", out, "me/half", "--json"),
            ("inspect", "me/half", "--json"),
            ("inspect", "me/half", "--offline", "--json"),
            ("inspect", out, "--json"),
            ("compress", "me/half", "-r", recipe, "-o", tmp_path / "again", "--quiet"),
            HF_TOKEN="hf_x",
        )  # fmt: skip
        assert [code for code, _, _ in results] == [0] * 5, results
        assert json.loads(results[0][1])["summary"]["commit"].startswith(f"{hub.url}/me/half/commit/")
        rows = [json.loads(text)["rows"] for _, text, _ in results[1:4]]
        assert rows[0] == rows[1] == rows[2]
        files = hub.repositories["me/half"]["main"]
        assert {n: c for n, c in files.items()} == {p.name: p.read_bytes() for p in out.iterdir()}
        card = files["README.md"].decode()
        for part in (
            "license: mit",
            "base_model: org/tiny",
            "library_name: rarefy",
            commit,
            "score: random",
            'download("me/half")',
        ):
            assert part in card
        assert read_origin(tmp_path / "again") == read_origin(out)  # the first source


EMBEDDINGS = """
import sys
from rarefy.integrations.embedding_folder import resolve
for name, options in eval(sys.argv[1]):
    try:
        print(sorted(f.relative_to(folder).as_posix() for folder in [resolve(name, "org", **options)] for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_names_of_embedding_models(source, tmp_path):
    pytest.importorskip("sentence_transformers")
    texts = {"modules.json": b"[]", "config.json": b"{}", "README.md": CARD}
    weights = {"0_Transformer/model.safetensors": b"w", "0_Transformer/config.json": b"{}"}
    others = {"x.py": b"", "onnx/model.onnx": b"", "pytorch_model.bin": b"", "openvino/a.json": b"{}"}
    engine = {"rarefy/rarefy.json": b"{}", "rarefy/weights-00001.safetensors": b"w"}
    cache = str(tmp_path / "mine")
    calls = [
        ("org/nested", {}),
        ("nested", {"revision": "v1"}),
        ("org/nested@v1", {"offline": True}),
        ("org/pickle", {}),
        ("org/nested", {"revision": "v2"}),
        ("nested", {"cache_folder": cache}),
        ("nested", {"cache_folder": cache, "offline": True}),
        ("compiled", {"offline": True}),
        ("compiled", {}),
        ("compiled", {"offline": True}),
    ]  # fmt: skip
    with serving() as hub:
        hub.add("org/nested", {**texts, **weights, **others})
        hub.add("org/nested", {**texts, **weights}, "v1")
        hub.add("org/pickle", {**texts, "pytorch_model.bin": b""})
        hub.add("org/compiled", {**texts, "model.safetensors": b"w", **engine})
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        env |= {"RAREFY_CACHE": str(tmp_path / "rarefy"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        words = [sys.executable, "-c", EMBEDDINGS, repr(calls)]
        ran = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    nested = str(sorted({**texts, **weights}))
    assert [lines[k] for k in (0, 1, 2, 5, 6)] == [nested] * 5, lines
    assert "org/pickle has no model.safetensors: it has pytorch_model.bin, a pickle" in lines[3]
    assert "org/nested@v2: the model has no revision 'v2'" in lines[4]
    assert "org/compiled is not in the cache, and the run is offline" in lines[7]
    assert lines[8] == lines[9] == str(sorted({**texts, "model.safetensors": b"", **engine}))


def test_without_a_network(tmp_path):
    with serving() as hub:
        url = hub.url
    [(code, _, error)] = run(url, tmp_path, ("inspect", "org/tiny"))
    assert code == 2 and error.startswith(f"rarefy: org/tiny: {url} (HF_ENDPOINT) cannot be reached (")
    assert (
        error.split("code")[0].count("\n") == 1
        and "give a local folder, or set HF_HUB_OFFLINE=1 for a model in the cache" in error
    )


@pytest.mark.slow
def test_no_request_without_a_name_of_the_hub(tmp_path):
    (tmp_path / "here").mkdir()
    with serving() as hub:
        results = run(
            hub.url,
            tmp_path,
            ("inspect", "smolm2"),
            ("inspect", tmp_path / "here" / "none"),
            ("inspect", "./none/model"),
            ("inspect", "a/b/c"),
            ("inspect", "timm/resnet10t", "--random-weights", "--json"),
            ("inspect", "org/tiny", "--offline"),
            ("generate", "org/tiny", "--offline", "--prompt", "a"),
        )
        assert [code for code, _, _ in results] == [2, 2, 2, 2, 0, 2, 2]
        assert hub.requests == []
    for result in results[5:]:
        assert "rarefy: org/tiny is not in the cache, and the run is offline: download it once" in result[2]


# names and files


def test_revisions_do_not_leave_the_cache(tmp_path):
    for revision in ("../../x", str(tmp_path), "a b"):
        with pytest.raises(ModelError, match="expected ORG/NAME or ORG/NAME@REVISION"):
            download(HubName("org/name", revision), offline=True, cache_folder=tmp_path)


def test_names():
    assert str(parse_hub_name("org/name.v-2@refs/pr/1")) == "org/name.v-2@refs/pr/1"
    for text in (
        "name",
        "/org/name",
        "org/name/",
        "../name",
        "org/..",
        "org/a@",
        "org/a@../x",
        "~/x",
        "",
        "a b/c",
        "-a/b",
        "a--b/c",  # its folder in a cache would be that of a/b--c
    ):
        assert parse_hub_name(text) is None, text


def test_files_that_are_fetched():
    names = [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.model", "1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE.txt", "chat_template.jinja",
    ]  # fmt: skip
    others = [
        "original/consolidated.safetensors", "onnx/model.onnx", "model.fp16.safetensors", "pytorch_model.bin", "x.py",
        ".gitattributes", "../x.json", "openvino/config.json", "handler.py", "a/../../model.safetensors", "image.png",
    ]  # fmt: skip
    assert set(choose_files([*names, *others], "m")) == set(names)
    rarefy_folder = ["rarefy.json", "weights-00001.safetensors", "receipt.json", "graph.json"]
    assert set(choose_files([*rarefy_folder, "README.md", "x.bin"], "m")) == {*rarefy_folder, "README.md"}
    with pytest.raises(ModelError, match="m has no model.safetensors: it holds no model"):
        choose_files(["README.md"], "m")
    with pytest.raises(ModelError, match="'a': expected ORG/NAME or ORG/NAME@REVISION"):
        download("a")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModelError,
        match=r'org/x: no such folder here, and models of the hub need huggingface_hub: pip install "rarefy\[hub\]"',
    ):
        download("org/x")
    with pytest.raises(
        ModelError, match=r'org/x: pushing to the hub needs huggingface_hub: pip install "rarefy\[hub\]"'
    ):
        push(tempfile.mkdtemp(), "org/x")


# links


def test_files_outside_of_the_folder_are_never_copied_or_published(saved, monkeypatch):
    secret = saved.parent / "secret"
    secret.mkdir()
    (secret / "id").write_text("secret")
    model = saved.parent / "model"
    for name in ("LICENSE", "tokenizer.json"):
        (model / "blobs").mkdir(parents=True)
        (model / name).symlink_to(secret / "id")
        with pytest.raises(
            ContainerError, match=f"{name} is a link out of the folder, to .*secret/id: copy the file there"
        ):
            _ = {**origin_files(model), **side_files(model)}
        (model / name).unlink()
        (model / "blobs" / "1").write_text("mine")
        (model / name).symlink_to("blobs/1")
        assert {**origin_files(model), **side_files(model)} == {name: b"mine"}
        shutil.rmtree(model)
    model.mkdir()
    (model / "config.json").symlink_to(secret / "id")
    with pytest.raises(ContainerError, match="config.json is a link out of the folder"):
        engine_files(model)
    for text, message in (("[1]", "config.json: expected a JSON object, got a list"), ("{", "config.json: not JSON")):
        (model / "config.json").unlink()
        (model / "config.json").write_text(text)
        with pytest.raises(ContainerError, match=message):
            engine_files(model)
    cached = saved.parent / "models--org--tiny" / "snapshots" / ("0" * 40)  # as huggingface_hub keeps downloads
    (cached.parents[1] / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    (cached.parents[1] / "blobs" / "1").write_text("MIT")
    (cached / "LICENSE").symlink_to("../../blobs/1")
    assert origin_files(cached)["LICENSE"] == b"MIT"
    (cached / "LICENSE.txt").symlink_to(secret / "id")
    with pytest.raises(ContainerError, match="is a link out of the folder"):
        origin_files(cached)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name, target in (("NOTICE", secret / "id"), ("more", secret)):
        (saved / name).symlink_to(target)
        with pytest.raises(ContainerError, match=f"{name} is a link, which is not published: remove it"):
            push(saved, "me/x", licence="mit")
        (saved / name).unlink()
        assert not (saved / "README.md").exists()


# where a model came from


def test_cards_and_sources(tmp_path):
    file = tmp_path / "README.md"
    for text, fields in (
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: https://x.org/l\n---\n", {"licence": "other", "licence_name": "llama3", "licence_link": "https://x.org/l"}),
        ("---\r\nlicense: [mit, apache-2.0]\r\n---\r\n", {"licence": ["mit", "apache-2.0"]}),
        ("# no front matter", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: !!python/object:os.system {}\n---\n", {}),
        ("---\nlicense: |\n  a\n  b\n---\n", {}),
        ("---\nlicense: <script>\n---\n", {}),
    ):  # fmt: skip
        file.write_text(text, newline="")
        assert card_fields(tmp_path) == fields, text
    assert origin_files(tmp_path) == {}
    (tmp_path / "source.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ContainerError, match="source.json: not JSON"):
        read_origin(tmp_path)
    for text in ('{"model": "a\\nb"}', '{"other": "x"}', "[]"):
        (tmp_path / "source.json").write_text(text)
        with pytest.raises(ContainerError, match="source.json: expected the fields model, revision"):
            read_origin(tmp_path)


# cards


@pytest.fixture
def saved(tmp_path):
    rarefy.save(torch.nn.Linear(4, 4), tmp_path / "out", recipe={"stages": [{"prune": {"sparsity": 0.5}}]})
    return tmp_path / "out"


def test_what_is_wrong_with_a_push(saved, monkeypatch):
    with pytest.raises(ModelError, match="the licence of the model is not known: pass licence=NAME, such as 'mit'"):
        model_card(saved, "me/x")
    for name in ("x", "me/x@main", "a/b/c", None):
        with pytest.raises(ModelError, match="expected the name of a repository, ORG/NAME"):
            write_card(saved, name, "mit")
    with pytest.raises(ContainerError, match="is not a Rarefy folder"):
        write_card(saved.parent, "me/x", "mit")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids the network: unset it, or pass --dry-run"):
        push(saved, "me/x", licence="mit")
    for name, message in (("receipt.json", "receipt.json: not JSON"), ("recipe.yaml", "expected a text in UTF-8")):
        (saved / name).write_bytes(b"\xff\xfe")
        with pytest.raises(ContainerError, match=message):
            write_card(saved, "me/x", "mit")
        (saved / name).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (saved / "x.bin").write_bytes(b"")
    with pytest.raises(ContainerError, match="x.bin is a pickle, which is not published: remove it"):
        push(saved, "me/x", licence="mit")


def test_a_card_that_was_edited_stays(saved):
    file = write_card(saved, "me/x", "mit")
    text = file.read_text()
    assert "license: mit" in text and "no receipt: neither quality nor speed" in text and "model=Linear(...)" in text
    file.write_text("mine")
    assert write_card(saved, "me/x").read_text() == "mine"
    with pytest.raises(
        ContainerError, match="README.md exists, so that the licence has no effect: pass overwrite=True"
    ):
        write_card(saved, "me/x", "mit")
    assert write_card(saved, "me/x", "mit", overwrite=True).read_text() == text
    assert rarefy.load(saved, torch.nn.Linear(4, 4)).weight.shape == (4, 4)
