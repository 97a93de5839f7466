"""A model directory, local or from the Hub, read as inert data: nothing named in a file is imported, or followed out.

Errors name the file and what it should have held.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jaxtune.errors import (
    CannotCreateError,
    MissingInputError,
    NetworkError,
    StorageError,
    UserError,
    did_you_mean,
)

JSON_LIMIT = 64 * 2**20  # bytes; the largest honest index of a sharded checkpoint is a few MB
NEEDED = ["*.json", "*.safetensors", "tokenizer.model", "spiece.model", "*.jinja"]


def model_directory(model_id: str, revision: str | None = None, wanted: Sequence[str] = NEEDED) -> Path:
    """The directory of a model: itself where it is one, else a snapshot from the Hub.

    Args:
      wanted: the files that are asked of the Hub.

    Raises:
      MissingInputError: no such directory or model, or a gated one.  NetworkError: the Hub cannot be reached.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise MissingInputError(
            f"`model.id` is {model_id!r}, a file. It takes a directory with config.json, or a Hub id."
        )
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        parent = path.parent
        there = sorted(p.name for p in parent.iterdir() if p.is_dir())[:20] if parent.is_dir() else []
        raise MissingInputError(
            f"`model.id` is {model_id!r}, and there is no such directory.{did_you_mean(path.name, there)} {parent} "
            + (f"holds: {', '.join(there) or 'no directories'}." if parent.is_dir() else "does not exist either.")
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model_id, revision=revision, allow_patterns=list(wanted)))
    except errors.GatedRepoError:
        raise MissingInputError(
            f"The model {model_id!r} is gated. Accept its licence at https://huggingface.co/{model_id} and log in with "
            "`hf auth login` (or set HF_TOKEN)."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise MissingInputError(
            f"No model {model_id!r}{f' at revision {revision!r}' if revision else ''} on the Hub, and no such "
            f"directory here. ({str(error).splitlines()[0]})"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise NetworkError(
            f"{model_id!r} is no directory here, and the Hub cannot be reached ({type(error).__name__}). "
            "Give a local directory, or try again: a download goes on where it stopped."
        ) from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object.

    Raises:
      MissingInputError: no such file.  UserError: too large, or no JSON object.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir())[:20] if path.parent.is_dir() else []
        raise MissingInputError(f"{path} does not exist. {path.parent} holds: {', '.join(there) or 'nothing'}.")
    if path.stat().st_size > limit:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; the limit for such a file is {limit:,}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object is needed.")
    return value


def open_safetensors(path: Path) -> Any:
    """A lazily read file; tensors are read slice by slice.

    Raises:
      UserError: the file is something else (a pickle, a Git-LFS pointer, an error page) or is damaged.
    """
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            head = file.read(64)
        hint = " It is a Git-LFS pointer: run `git lfs pull`." if head.startswith(b"version https://git-lfs") else ""
        hint = hint or (" It looks like a pickle or zip." if head[:2] in (b"PK", b"\x80\x02") else "")
        raise UserError(f"{path} is not a safetensors file, or is damaged ({error}).{hint}") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or model.safetensors.

    Raises:
      MissingInputError: there is none, or one that the index names is missing.
      UserError: a name that leaves the directory.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no `weight_map`.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}; only .safetensors files beside it are read.")
            if not (directory / name).is_file():
                raise MissingInputError(
                    f"{index.name} names {name}, which is not in {directory}. Is a download unfinished?"
                )
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    raise MissingInputError(
        f"{directory} has no model.safetensors and no model.safetensors.index.json."
        + (f" It has {', '.join(pickles)}: pickles run code when read, so jaxtune never reads them." if pickles else "")
    )


def fingerprint(directory: Path) -> str:
    """SHA-256 over config.json and the weights: what a run's checkpoints remember their base by.

    Files from the Hub's cache are blobs named by their SHA-256, which is taken as it stands; others are read.
    """

    def digest(path: Path) -> str:
        blob = path.resolve().name
        if path.is_symlink() and len(blob) == 64 and all(c in "0123456789abcdef" for c in blob):
            return blob
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = [directory / "config.json", *weight_files(directory)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, paths))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# What an export leaves: a directory that has one of these, and no folders in it, may be replaced by the next.
EXPORTS = {"adapter_config.json", "config.json", "model.safetensors", "model.safetensors.index.json"}


def check_replaceable(directory: Path, *kept: Path) -> None:
    """Refuses to put an export where something else would be lost.

    Args:
      kept: directories that are being read.

    Raises:
      CannotCreateError: a file, a directory of something else, or one that is read or has what is read in it.
    """
    place = directory.expanduser().resolve()
    for other in kept:
        if other.resolve().is_relative_to(place):
            raise CannotCreateError(f"{directory} is, or holds, what is exported ({other}). Give another directory.")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    if not EXPORTS & set(names) or any(path.is_dir() for path in place.iterdir()):
        holds = f"a directory of something else: it holds {', '.join(names[:5])}" if names else "a file"
        raise CannotCreateError(
            f"{directory} is {holds}. An export replaces a directory as a whole: give a new one, or one of an earlier "
            "export."
        )


@contextlib.contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes `directory`'s place at the end: an interrupted save leaves no half.

    Raises:
      CannotCreateError: as `check_replaceable`.  StorageError: the disk is full, or cannot be written.
    """
    check_replaceable(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise StorageError(
                f"{directory} cannot be written: {error}. What was there before is as it was."
            ) from error
        raise
