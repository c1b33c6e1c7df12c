"""Files that a command writes: checked before the work, whole or not at all after it."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import MedhaError, UsageError


def check_output(flag: str, path: Path) -> None:
    """Raises UsageError where the file cannot be written; call it before a long run."""
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path}: is a folder; name a file")
        if _written_through(path):
            return
        if not folder.is_dir():
            raise UsageError(f"{flag} {path}: the folder {folder} does not exist")
        probe = _sibling(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end, or nothing after an error.

    Its suffix is that of `path`, by which some writers choose their format. Devices, pipes and
    links are written through. Raises MedhaError where the disk refuses.
    """
    direct = _written_through(path)
    partial = path if direct else _sibling(path)
    try:
        yield partial
        if not direct:
            partial.replace(path)
    except OSError as error:
        raise MedhaError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if not direct:
            partial.unlink(missing_ok=True)


def _written_through(path: Path) -> bool:
    """Whether a new file in its place would take away what it stands for, such as /dev/stdout."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def _sibling(path: Path) -> Path:
    """A hidden name of its own beside `path`: two runs into one file do not meet."""
    return path.with_name(f".{secrets.token_hex(4)}.partial{path.suffix}")
