"""An export to the Hugging Face Hub, in one commit: it has all of it or, whatever goes wrong, none.

The token is huggingface_hub's own business (HF_TOKEN, or `hf auth login`): it is in no argument, file or message here.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxtune.errors import MissingInputError, NetworkError, UserError
from jaxtune.hf.card import is_hub_id
from jaxtune.hf.files import open_safetensors, read_json

# What can lie beside an export and is none of it; pickles run code when read.
LEFT_OUT = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".tmp")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def check(repo_id: str, base: str | None = None) -> None:
    """Refuses, without the network, what could not be pushed.

    Args:
      base: what an adapter names as its base; None for a whole model.

    Raises:
      UserError: no name of a repository, no token, huggingface_hub is set to stay offline, or a base that others
        cannot find.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    try:
        utils.validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a repository, e.g. 'me/my-adapter': {error}") from None
    if base is not None and not is_hub_id(base):
        raise UserError(
            f"An adapter on the Hub names its base by a Hub id, and this one names {base!r}. Say which that is with "
            "--config.export.base_model_name_or_path=ID, or --base_model_name_or_path of jaxtune.export."
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id} is to be pushed to, and HF_HUB_OFFLINE is set. Unset it, or do not push.")
    if not huggingface_hub.get_token():
        raise UserError(f"{repo_id} is to be pushed to, and there is no token. Set HF_TOKEN, or run `hf auth login`.")


def push(directory: Path, repo_id: str, *, private: bool = False, message: str = "Export of jaxtune") -> str:
    """Sends an export; returns the commit's address.  Shards that an earlier export left there go with the same commit.

    Raises:
      MissingInputError: nothing to send.  UserError: as `check`, damaged weights; or the Hub refuses the card.
      NetworkError: the Hub refuses, or does not answer.
    """
    import huggingface_hub as hub

    adapter = directory / "adapter_config.json"
    check(repo_id, str(read_json(adapter).get("base_model_name_or_path")) if adapter.is_file() else None)
    files = sorted(
        path for path in directory.iterdir() if path.is_file() and path.name[0] != "." and path.suffix not in LEFT_OUT
    )
    names = {path.name for path in files}
    check_weights([path for path in files if path.suffix == ".safetensors"])
    if not any(path.suffix == ".safetensors" for path in files):
        raise MissingInputError(f"{directory} holds no export. It holds: {', '.join(sorted(names)[:10]) or 'nothing'}.")
    try:
        if "README.md" in names:
            hub.ModelCard((directory / "README.md").read_text(encoding="utf-8")).validate()
        api = hub.HfApi()
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        old = set(api.list_repo_files(repo_id)) - names if any(map(WEIGHTS.fullmatch, names)) else set()
        operations = [
            *(hub.CommitOperationDelete(name) for name in sorted(old) if WEIGHTS.fullmatch(name)),
            *(hub.CommitOperationAdd(path.name, path) for path in files),
        ]
        # `upload_folder` may split what it sends into several commits.
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
    except Exception as error:
        # Of whichever kind: it comes from the network, through a library whose errors have several families.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise UserError(f"The Hub refuses what is in {directory}: {_said(error)}") from None
        if not (isinstance(error, (OSError, RuntimeError, ValueError)) or "http" in type(error).__module__):
            raise
        why = {401: "the token is not valid (401)", 403: "the token may not write there (403)"}
        raise NetworkError(
            f"{repo_id} was not pushed to: {why.get(status or 0) or _said(error)}. What is in {directory} is whole."
        ) from None


def check_weights(files: Sequence[Path]) -> None:
    """Refuses to send what is damaged.

    Raises:
      UserError: a file that is none of safetensors, or values that are not finite.
    """
    for path in files:
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118
            if not np.isfinite(file.get_tensor(name)).all():
                raise UserError(f"{path}: {name!r} holds values that are not finite. It is not pushed.")


def _said(error: Exception) -> str:
    """An error's first lines, without the token should it ever be among them."""
    import huggingface_hub

    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    text = " ".join(f"{type(e).__name__}: {e}" for e in (error, cause) if e)
    text = re.sub(r"For more information check: \S+", "", text)
    text = " ".join(text.split())[:400].rstrip(".")
    token = huggingface_hub.get_token()
    return text.replace(token, "…") if token else text


def again(directory: Path, repo_id: str, private: bool) -> str:
    """What to type to push an export once more."""
    words = ["python", "-m", "jaxtune.export", str(directory), "--push_to_hub", repo_id] + ["--private"] * private
    return shlex.join(words)


def publish(directory: Path, repo_id: str, *, private: bool, say: Callable[[str], None]) -> bool:
    """Pushes at the end of a run, which is complete without: says what came of it, and returns whether it is there."""
    try:
        say(f"pushed: {push(directory, repo_id, private=private)}")
    except UserError as error:
        say(f"WARNING: {error}\nTo push it:\n  {again(directory, repo_id, private)}")
        return False
    return True
