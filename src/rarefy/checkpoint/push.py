"""`push`: publish a saved folder on the hub with a model card."""

from __future__ import annotations

from pathlib import Path

from rarefy.checkpoint.model_card import model_card
from rarefy.checkpoint.origin import CARD
from rarefy.common.atomic_io import PICKLE_SUFFIXES, container_errors, write_text_atomic
from rarefy.common.errors import ContainerError, ModelError, first_line
from rarefy.common.plain_file import plain_file
from rarefy.model import hub


def write_card(folder: str | Path, name: str, licence: str | None = None, overwrite: bool = False) -> Path:
    """Write the model card of a saved folder into it as README.md, and return the file.

    A card that exists stays as it is, so that you may edit it, unless `overwrite` is set. The card of an earlier call
    with the same arguments is no error: a push that failed or was killed can be repeated.

    Args:
        folder: a folder that Rarefy saved.
        name: ORG/NAME under which it is published.
        licence: the licence; by default that of the model which was compressed.
        overwrite: replace a card that exists.

    Raises:
        RarefyError: the folder is damaged, the name is none, or the licence is not known.
    """
    _check_name(name)
    file = Path(folder) / CARD
    if overwrite or not file.is_file():
        text = model_card(folder, name, licence)
        with container_errors(file):
            write_text_atomic(file, text)
    elif licence is not None and file.read_bytes() != model_card(folder, name, licence).encode():
        raise ContainerError(
            f"{file} exists, so that the licence has no effect: pass overwrite=True (shell: pass --force), or edit it"
        )
    return file


def push(
    folder: str | Path,
    name: str,
    *,
    licence: str | None = None,
    overwrite: bool = False,
    private: bool = False,
    progress: bool = True,
) -> str:
    """Publish a saved folder on the hub: its files and a model card, in one commit.

    Args:
        folder: a folder that Rarefy saved.
        name: ORG/NAME; the repository is created where there is none.
        licence: the licence; by default that of the model which was compressed.
        overwrite: replace a README.md that is in the folder.
        private: create a private repository.
        progress: show a progress bar.

    Returns:
        The address of the commit.

    Raises:
        RarefyError: the folder is damaged or holds a pickle or a link, the licence is not known, no network, or no
            right to write.
    """
    library = hub.library(f"{name}: pushing to the hub needs huggingface_hub")
    _check_name(name)
    if hub.is_offline():
        raise ModelError(f"{name}: HF_HUB_OFFLINE forbids the network: unset it, or pass --dry-run to write the card")
    names = _files(Path(folder))  # refused before the card is written
    card = write_card(folder, name, licence, overwrite)
    operations = [library.CommitOperationAdd(n, str(Path(folder) / n)) for n in sorted({*names, card.name})]
    with _write_errors(name), hub.bars(progress):
        api = library.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message="Add a model compressed by Rarefy")
    return commit.commit_url


def _check_name(name: str) -> None:
    named = hub.parse_hub_name(name)
    if named is None or named.revision is not None:
        raise ModelError(f"{name!r}: expected the name of a repository, ORG/NAME")


def _files(folder: Path) -> list[str]:
    """Return the files to publish, relative to the folder: no hidden ones; ContainerError for links and pickles."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or path.suffix in PICKLE_SUFFIXES:
            what = "a link" if path.is_symlink() else "a pickle"
            raise ContainerError(f"{path} is {what}, which is not published: remove it")
        plain_file(path)
        names.append(name)
    return names


def _write_errors(name: str):
    from contextlib import contextmanager

    @contextmanager
    def errors():
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "")
            hint = "run hf auth login, or set HF_TOKEN" if status in (401, 403, 404) else first_line(error, 120)
            raise ModelError(f"{name}: the hub refused to write it ({status}): {hint}") from None
        except Exception as error:  # of the library that carries HTTP, which differs between versions
            raise ModelError(
                f"{name}: {hub.address()} cannot be reached ({first_line(error, 120)}): try again later"
            ) from None

    return errors()
