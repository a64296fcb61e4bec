"""Models of the Hugging Face hub by name. huggingface_hub is imported only inside these functions.

Only weights in safetensors, JSON, files of tokenizers, the model card and licences are fetched: no pickle, no code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.common.atomic_io import INDEX, MODULES
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.common.extras import install
from rarefy.common.json_text import read_json_file

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?")
TEXTS = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "merges.txt", "vocab.txt", "README.md")
SUFFIXES = (".json", ".jinja")
SHARDS, MAX_INDEX_BYTES = "model.safetensors.index.json", 1 << 26  # the files of weights by tensor
MARKERS = (INDEX, f"rarefy/{INDEX}")  # of folders that Rarefy saved, the second with dense weights beside the engine
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)[\w.-]*", re.IGNORECASE)
FOREIGN = ("onnx/", "openvino/", "original/", "coreml/", ".")  # the same model for other programs, hidden files
COMMIT = re.compile("[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
OWN = re.compile(r"(?P<org>[^/]+?)--(?P<name>[^/]+)@(?P<revision>[^/]+)$")


@dataclass(frozen=True)
class HubName:
    """A model of the hub.

    Attributes:
        repo: ORG/NAME.
        revision: branch, tag or commit; None: main.

    Example:
        >>> print(HubName("org/model", "v1.0"))
        org/model@v1.0
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_name(text: str) -> HubName | None:
    """Return the model that ORG/NAME or ORG/NAME@REVISION stands for; None for a text of another form.

    Example:
        >>> parse_hub_name("org/model@main"), parse_hub_name("a/b/c"), parse_hub_name("./model")
        (HubName(repo='org/model', revision='main'), None, None)
    """
    match = NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None or ".." in text or "--" in match["repo"] or text.endswith((".git", ".ipynb")):
        return None
    return HubName(match["repo"], match["revision"])


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download(
    name: str | HubName,
    *,
    offline: bool = False,
    progress: bool = True,
    token: str | bool | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the folder of a model of the hub, downloaded where it is not in the cache.

    Args:
        name: ORG/NAME or ORG/NAME@REVISION.
        offline: use the cache only; the environment variable HF_HUB_OFFLINE=1 does the same.
        progress: show a progress bar.
        token: as huggingface_hub takes it; by default that of `hf auth login` or HF_TOKEN.
        cache_folder: the folder to download into in place of both caches.

    Returns:
        A folder in the cache of huggingface_hub; of a folder that Rarefy saved one in Rarefy's own cache.

    Raises:
        ModelError: no such model or revision, no weights in safetensors, no network, or huggingface_hub is missing.
    """
    named = parse_hub_name(str(name))
    if named is None:
        raise ModelError(f"{str(name)!r}: expected ORG/NAME or ORG/NAME@REVISION")
    hub = library(f"{named}: no such folder here, and models of the hub need huggingface_hub")
    if offline or is_offline():
        return _cached(named, cache_folder)
    with _errors(named), bars(progress):
        info = hub.HfApi(token=token).model_info(named.repo, revision=named.revision)
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise ModelError(f"{named}: {address()} names no commit for it: try again, or give a local folder")
        names = [f.rfilename for f in info.siblings or ()]
        chosen = choose_files(names, str(named))
        own = _own_folder(named, commit, cache_folder) if any(n in names for n in MARKERS) else None
        folder = Path(
            hub.snapshot_download(  # the commit whose files were listed: the revision may be another one by now
                named.repo,
                revision=commit,
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in chosen],
                token=token,
                **({"cache_dir": cache_folder} if own is None else {"local_dir": own}),
            )
        )
        if own is not None:
            _remove_others(own, chosen)
        _remember(named, commit, cache_folder)
    return folder


def choose_files(names: Sequence[str], what: str) -> list[str]:
    """Return the files of a repository that are fetched; ModelError where there are no weights in safetensors.

    Of the weights those of transformers, in one file or as its index names them, and those of further modules in
    folders, as sentence-transformers has them; there the transformer may be in a folder, too.

    Example:
        >>> choose_files(["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py"], "org/model")
        ['config.json', 'model.safetensors']
    """
    known = [n for n in names if not n.startswith(FOREIGN) and ".." not in n]
    plain = [n for n in known if _is_text(n)]
    weights = [n for n in known if n.endswith(".safetensors")]
    if INDEX not in names:
        shards = [n for n in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]
        whole = [n for n in weights if n == "model.safetensors"]
        nested = [n for n in weights if "/" in n]
        weights = [*(whole or shards), *nested]
        if not whole and not shards and not (nested and MODULES in names):
            pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            has = f"it has {pickles[0]}, a pickle, which is never opened" if pickles else "it holds no model"
            raise ModelError(f"{what} has no model.safetensors: {has}")
    compressed = [n for n in known if n.endswith(".safetensors.xz") or n.endswith(".json.xz")]
    return [*plain, *weights, *compressed]


def _is_text(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.endswith(SUFFIXES) or last in TEXTS or LICENCE.fullmatch(last) is not None


def origin_of(folder: Path) -> dict[str, str]:
    """Return the model and commit that a downloaded folder holds, by its place in a cache; {} for any other folder.

    Example:
        >>> origin_of(Path("/cache/models--org--model/snapshots/" + "0" * 40))["model"]
        'org/model'
    """
    text = folder.as_posix()
    if match := SNAPSHOT.search(text):
        return {"model": f"{match['org']}/{match['name']}", "revision": match["commit"]}
    if folder.parent == _own_cache() and (match := OWN.search(text)):
        return {"model": f"{match['org']}/{match['name']}", "revision": match["revision"].replace("--", "/")}
    return {}


def check_link(file: Path, folder: Path) -> Path:
    """Return a file of a model's folder that is copied elsewhere; ContainerError for a link out of the folder.

    Whoever publishes the copy would publish a file that was never a part of the model. Links into the cache of
    huggingface_hub are those of its downloads.
    """
    target, inside = file.resolve(), [folder.resolve()]
    if SNAPSHOT.search(inside[0].as_posix()):
        inside.append(inside[0].parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise ContainerError(f"{file} is a link out of the folder, to {target}: copy the file there, or remove it")
    return file


def _own_cache() -> Path:
    return Path(os.environ.get("RAREFY_CACHE") or Path.home() / ".cache" / "rarefy") / "hub"


def _own_folder(named: HubName, commit: str, cache_folder: Any = None) -> Path:
    """Return the folder of a model that Rarefy saved: in plain files, because it follows no links.

    Each commit has a folder of its own, so that files of two commits never meet in one.
    """
    cache = _own_cache() if cache_folder is None else Path(cache_folder)
    return cache / f"{named.repo}@{commit}".replace("/", "--")


def _remove_others(folder: Path, chosen: Sequence[str]) -> None:
    """Remove the files of a folder in Rarefy's own cache that are not those of its commit."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if name not in chosen and not name.startswith(".cache/") and (file.is_file() or file.is_symlink()):
            file.unlink()


def _cached(named: HubName, cache_folder: Any = None) -> Path:
    """Return the folder of a model in one of the caches; ModelError where it is not there as a whole."""
    repository, revision = _repository(named, cache_folder), named.revision or "main"
    ref = repository / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    if COMMIT.fullmatch(commit):
        own = _own_folder(named, commit, cache_folder)
        if any((own / n).is_file() for n in MARKERS):
            return own
        folder = repository / "snapshots" / commit
        if _is_whole(folder):
            return folder
    raise ModelError(
        f"{named} is not in the cache, and the run is offline: download it once with the network, or give a "
        "local folder"
    )


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has all of its weights."""
    index = folder / SHARDS
    if not index.is_file():
        nested = (folder / MODULES).is_file() and any(folder.glob("*/model.safetensors"))
        return (folder / "model.safetensors").is_file() or nested
    content = read_json_file(index, MAX_INDEX_BYTES)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise ContainerError(f"{index}: not an index of safetensors files: download the model again")
    return bool(shards) and all((folder / Path(str(shard)).name).is_file() for shard in shards.values())


def _repository(named: HubName, cache_folder: Any = None) -> Path:
    from huggingface_hub import constants

    return Path(cache_folder or constants.HF_HUB_CACHE) / f"models--{named.repo.replace('/', '--')}"


def _remember(named: HubName, commit: str, cache_folder: Any = None) -> None:
    """Note which commit a branch or tag stands for, as huggingface_hub does, so that it is found offline."""
    revision = named.revision or "main"
    if COMMIT.fullmatch(revision):
        return
    file = _repository(named, cache_folder) / "refs" / revision
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(commit)


def library(needs: str) -> Any:
    """Return huggingface_hub; ModelError with what needs it and how to install it."""
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(f"{needs}: {install('hub')}") from None
    return huggingface_hub


@contextmanager
def bars(progress: bool) -> Any:
    """Show the library's progress bars or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        yield
    finally:
        if not progress and not before:
            enable_progress_bars()


def address() -> str:
    """Return the hub's address, and where it was set."""
    from huggingface_hub import constants

    return constants.ENDPOINT + (" (HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else "")


@contextmanager
def _errors(named: HubName) -> Any:
    """Raise what the hub answers, and a network that is not there, as ModelError in one line."""
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{named} needs a licence to be accepted on {where}/{named.repo}: then run hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{named}: the model has no revision {named.revision!r} on {where}") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{named}: no such folder here, and no such model on {where}; a private one needs hf auth login"
        ) from None
    except Exception as error:  # of the library that carries HTTP, which differs between versions
        raise ModelError(
            f"{named}: {address()} cannot be reached ({first_line(error, 120)}): give a local folder, or set "
            "HF_HUB_OFFLINE=1 for a model in the cache"
        ) from None
