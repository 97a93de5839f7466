"""What a user can get wrong, and the exit code that says so.

Every message has three parts: what was asked, what exists, what to do.  `jaxtune.cli` prints it on one screen without a
traceback; anything that is not a `UserError` is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the command or the config (exit code 64)."""

    exit_code = 64


class DataError(UserError):
    """Rows that cannot be trained on (exit code 65)."""

    exit_code = 65


class MissingInputError(UserError):
    """A file, a model or a dataset that is not there (exit code 66)."""

    exit_code = 66


class NetworkError(UserError):
    """The Hub did not answer (exit code 69)."""

    exit_code = 69


class ExportError(UserError):
    """What was to be written does not compute what was trained (exit code 70)."""

    exit_code = 70


class CannotCreateError(UserError):
    """A directory cannot be used for what it is to hold (exit code 73)."""

    exit_code = 73


class StorageError(UserError):
    """The disk is full or refuses to be written (exit code 74)."""

    exit_code = 74


class DivergedError(UserError):
    """Loss or weights are no longer finite (exit code 80)."""

    exit_code = 80


class NoCheckpointError(UserError):
    """Checkpoints exist but none can be used (exit code 81)."""

    exit_code = 81


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean `x`?' for the nearest known word, or ''."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
