"""Files that a command writes: checked before the work, whole or not at all after it."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from plans.errors import MedhaError, UsageError

BUNDLE_NAMES = ("plan.yaml", "alternatives.csv", "report.html", "README.md")
BUNDLE_FOLDERS = ("program", "graphs", "launch")
"""What medha-plan writes into a bundle; other files there are the user's."""


def check_outputs(
    written: Mapping[str, Path | None],
    read: Mapping[str, Iterable[str | Path]],
    *,
    prints: bool = False,
) -> None:
    """Raises UsageError where a file would take the place of an input or of another output.

    Call it before anything runs. Links and spellings do not matter, and devices and pipes may be
    named as often as one likes.

    written  by flag; None where it is not given
    read     by what names them on the command line; of a folder, everything in it counts
    prints   whether the command writes to stdout besides
    """
    named = [(flag, path) for flag, path in written.items() if path is not None]
    for flag, path in named:
        check_output(flag, path)
        for what, inputs in read.items():
            if any(_meets(path, Path(each)) for each in inputs):
                raise UsageError(
                    f"{flag} {path}: would replace an input ({what}); name another file"
                )
    if prints:
        named.append(("stdout", Path("/dev/stdout")))
    for (flag, path), (other, second) in combinations(named, 2):
        if _same(path, second):
            raise UsageError(f"{flag} {path}: is the file of {other} too; name two files")


def bundle_inputs(path: Path) -> list[Path]:
    """What may not be replaced of a bundle, or of the bundle around a plan file."""
    folder, plan = (path, []) if path.is_dir() else (path.parent, [path])
    return plan + [folder / name for name in BUNDLE_NAMES + BUNDLE_FOLDERS]


def check_output(flag: str, path: Path) -> None:
    """Raises UsageError where the file cannot be written; call it before a long run."""
    if str(path) == "-":
        raise UsageError(f"{flag} -: stdout is not for this one; name a file")
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path}: is a folder; name a file")
        if not _written_through(path):
            _try_folder(flag, path, path)
        elif not path.exists():  # a link to a file that is still to come
            target = Path(os.path.realpath(path))
            if target.is_symlink():
                raise UsageError(f"{flag} {path}: is a link that leads back to itself")
            _try_folder(flag, path, target)
        elif not os.access(path, os.W_OK):
            raise UsageError(f"{flag} {path}: cannot be written: Permission denied")
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror}") from None


def _try_folder(flag: str, path: Path, target: Path) -> None:
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: the folder {folder} does not exist")
    probe = _sibling(target)
    probe.touch(exist_ok=False)
    probe.unlink()


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


def _meets(path: Path, read: Path) -> bool:
    if read.is_dir():
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(read))
    return _same(path, read)


def _same(path: Path, other: Path) -> bool:
    """Whether both are one file, there or still to come; devices and pipes hold nothing."""
    if path.exists() and not path.is_file():
        return False
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    return path.exists() and other.exists() and path.samefile(other)


def _written_through(path: Path) -> bool:
    """Whether a new file in its place would take away what it stands for, such as /dev/stdout."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def _sibling(path: Path) -> Path:
    """A hidden name of its own beside `path`: two runs into one file do not meet."""
    return path.with_name(f".{secrets.token_hex(4)}.partial{path.suffix}")
