"""Decoders that are written while they are packed: killed and resumed, refused where something else would result."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rarefy
from conftest import tree
from helpers.language_models import small
from helpers.marks import slow_except
from rarefy.checkpoint import packed_store
from rarefy.common.errors import ContainerError, ModelError
from rarefy.formats import aligned_file, container

IDS = torch.tensor([[3, 17, 5, 80]])


@pytest.fixture
def model(tmp_path):
    """A folder with a model."""
    small(hidden_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model's folder, its decoder that was written without interruption, and the same decoder in memory, saved."""
    folder = tmp_path_factory.mktemp("whole")
    small(hidden_size=128, num_hidden_layers=1).save_pretrained(folder / "model")
    step = rarefy.decoder_from_files(folder / "model", precision="int4", out=folder / "out")
    rarefy.save(rarefy.decoder_from_files(folder / "model", precision="int4"), folder / "saved")
    return folder, step


def interrupt(monkeypatch, writes):
    """Stop a run after so many weights are on disk."""
    real, count = packed_store.PackedStore._write, [0]

    def write(self, file, name, form):
        if count[0] == writes:
            raise KeyboardInterrupt
        count[0] += 1
        real(self, file, name, form)

    monkeypatch.setattr(packed_store.PackedStore, "_write", write)


def started(model, monkeypatch, writes=3, out="out"):
    """Return the state of a run that was interrupted."""
    with monkeypatch.context() as patched:
        interrupt(patched, writes)
        with pytest.raises(KeyboardInterrupt):
            rarefy.decoder_from_files(model, precision="int4", out=model.parent / out)
    return model.parent / f".{out}.packing"


def test_the_same_weights_as_saved_from_memory(whole):
    folder, step = whole
    assert not (folder / ".out.packing").exists()
    assert (folder / "out" / "graph.json").read_bytes() == (folder / "saved" / "graph.json").read_bytes()
    out, saved = container.read(folder / "out"), container.read(folder / "saved")
    assert out.names == saved.names
    assert all(torch.equal(out.tensor(n), saved.tensor(n)) for n in out.names)
    back = rarefy.load(folder / "out")
    assert torch.equal(back(IDS), step(IDS)) and torch.equal(back(IDS), rarefy.load(folder / "saved")(IDS))


KILL = """
import os, signal, sys
import rarefy
from rarefy.checkpoint import packed_store
real, count = packed_store.write_aligned, [0]
def write(tensors, file, metadata):
    count[0] += 1
    if count[0] == 6:  # in the middle of a file
        file.write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, file, metadata)
packed_store.write_aligned = write
rarefy.decoder_from_files(sys.argv[1], precision="int4", out=sys.argv[2])
"""


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bytes(whole, model, monkeypatch):
    for file in model.iterdir():  # the same files as those of the whole run
        assert file.read_bytes() == (whole[0] / "model" / file.name).read_bytes()
    out = model.parent / "out"
    ran = subprocess.run([sys.executable, "-c", KILL, str(model), str(out)], capture_output=True)
    assert ran.returncode == -signal.SIGKILL and not out.exists()
    work = model.parent / ".out.packing"
    names = [f"packed-{i:05d}.safetensors" for i in range(5)]
    assert sorted(f.name for f in work.iterdir()) == ["key.json", *names, "packed-00005.safetensors.partial"]
    before = {n: (work / n).stat().st_mtime_ns for n in names}
    (work / "packed-00005.safetensors.partial").unlink()
    interrupt(monkeypatch, 1)  # killed twice
    with pytest.raises(KeyboardInterrupt):
        rarefy.decoder_from_files(model, precision="int4", out=out)
    assert before.items() <= {f.name: f.stat().st_mtime_ns for f in work.iterdir()}.items()
    monkeypatch.undo()
    rarefy.decoder_from_files(model, precision="int4", out=out)
    assert tree(out) == tree(whole[0] / "out") and not work.exists()


def test_changed_source_or_options(model, monkeypatch):
    work = started(model, monkeypatch)
    with pytest.raises(ContainerError, match=r"has the state of a run with another precision: .*fresh"):
        rarefy.decoder_from_files(model, precision="int8", out=model.parent / "out")
    tensors = load_file(model / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ContainerError, match=r"of another source: model.safetensors has changed since: remove .*fresh"):
        rarefy.decoder_from_files(model, precision="int4", out=model.parent / "out")
    assert len(list(work.iterdir())) == 4
    step = rarefy.decoder_from_files(model, precision="int4", out=model.parent / "out", fresh=True)
    assert torch.equal(step(IDS), rarefy.decoder_from_files(model, precision="int4")(IDS))


def test_source_that_changes_while_it_is_read(model, monkeypatch):
    real = packed_store.PackedStore._write

    def write(self, file, name, form):
        os.utime(model / "model.safetensors")
        real(self, file, name, form)

    monkeypatch.setattr(packed_store.PackedStore, "_write", write)
    with pytest.raises(ContainerError, match="has changed while it was read"):
        rarefy.decoder_from_files(model, precision="int4", out=model.parent / "out")
    assert not (model.parent / "out").exists()


def test_full_disk_and_folders_that_cannot_be_written(model, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(packed_store, "write_aligned", full)
        with pytest.raises(ContainerError, match=r"no space for .*needed [0-9,]+ bytes, free"):
            rarefy.decoder_from_files(model, precision="int4", out=tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()  # nothing was packed, so nothing stays
    (tmp_path / "file").write_text("")
    with pytest.raises(ContainerError, match="cannot write .*Not a directory"):
        rarefy.decoder_from_files(model, out=tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ContainerError, match="exists and is not only Rarefy's"):
        rarefy.decoder_from_files(model, out=tmp_path / "out", overwrite=True)
    (tmp_path / ".b.packing").symlink_to(tmp_path / "out")
    with pytest.raises(ContainerError, match="is a link or no folder"):
        rarefy.decoder_from_files(model, out=tmp_path / "b", fresh=True)
    assert (tmp_path / "out" / "mine").exists()
    with pytest.raises(ModelError, match="fresh= has no effect without out="):
        rarefy.decoder_from_files(model, fresh=True)


def rewritten(file, change=lambda t: t, **metadata):
    """Write another file in place of one; that one is mapped by nobody."""
    with safe_open(file, "pt") as opened:
        texts = {**opened.metadata(), **metadata}
        tensors = {n: change(opened.get_tensor(n)).clone() for n in opened.keys()}  # noqa: SIM118 (not a dict)
    file.unlink()
    aligned_file.write_aligned(tensors, file, texts)


DAMAGE = {
    "another weight": lambda file: rewritten(file, name="x"),
    "other fields": lambda file: rewritten(file, packed='{"format": ["panels"]}'),
    "no JSON": lambda file: rewritten(file, packed="{"),
    "fewer values": lambda file: rewritten(file, lambda t: t[:-1]),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "no safetensors": lambda file: file.write_text("x"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model's folder, and the state of a run with one weight."""
    folder = tmp_path_factory.mktemp("begun")
    small(hidden_size=128, num_hidden_layers=1).save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patched:
        started(folder / "model", patched, writes=1)
    return folder


@pytest.mark.parametrize("damage", slow_except(DAMAGE, "no JSON", "truncated"))
def test_damaged_state_is_refused(begun, damage):
    file = begun / ".out.packing" / "packed-00000.safetensors"
    content = file.read_bytes()
    DAMAGE[damage](file)
    try:
        with pytest.raises(ContainerError, match="packed-00000.safetensors is damaged: .*: remove .*fresh"):
            rarefy.decoder_from_files(begun / "model", precision="int4", out=begun / "out")
    finally:
        file.unlink()
        file.write_bytes(content)


def test_damaged_key(begun):
    for text, message in (("[1]", "state of a run with another"), ("{", "not JSON"), ('{"source": 1}', "another")):
        (begun / ".out.packing" / "key.json").write_text(text)
        with pytest.raises(ContainerError, match=message):
            rarefy.decoder_from_files(begun / "model", precision="int4", out=begun / "out")


def test_another_run_writes_the_same_folder(model):
    work = model.parent / ".out.packing"
    work.mkdir()
    lock = packed_store.lock_file(work / "key.json")
    with pytest.raises(ContainerError, match="is in use by another run"):
        rarefy.decoder_from_files(model, out=model.parent / "out")
    lock.close()


def test_no_hard_links(whole, model, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    rarefy.decoder_from_files(model, precision="int4", out=model.parent / "out")
    assert tree(model.parent / "out") == tree(whole[0] / "out")


def test_files_of_the_tokenizer(model, tmp_path):
    (model / "tokenizer.json").write_text("{}")
    rarefy.decoder_from_files(model, out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "rarefy"
    }


def test_numbers_stay_in_mapped_files_and_indices_are_copied():
    from rarefy.runtime.huge_pages import MIN_MAPPED, HugePageBuffer
    from rarefy.runtime.packing import pack_bitmask

    form = pack_bitmask(torch.randn(512, 512), "fp32")
    assert form.values.nbytes > MIN_MAPPED and form.values.data_ptr() % 64 == 0
    held = HugePageBuffer().hold(form, mapped=True)
    assert held.values.data_ptr() == form.values.data_ptr()
    assert held.masks.data_ptr() != form.masks.data_ptr() and torch.equal(held.masks, form.masks)


def test_replaced_folder_does_not_change_a_loaded_decoder(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    for seed in (0, 1):
        small(seed=seed, **sizes).save_pretrained(tmp_path / f"model{seed}")
    out = tmp_path / "out"
    rarefy.decoder_from_files(tmp_path / "model0", precision="int8", out=out)
    step = rarefy.load(out)
    want = step(IDS)
    other = rarefy.decoder_from_files(tmp_path / "model1", precision="int8", out=out, overwrite=True)
    assert torch.equal(step(IDS), want) and not torch.equal(other(IDS), want)
    assert torch.equal(rarefy.load(out)(IDS), other(IDS))
