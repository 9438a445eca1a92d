"""Where the shipped data lies, and files that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .errors import HearSsamError, said

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def shipped(folder: str) -> Path:
    """The folder `checkpoints` or `eval_tasks`, in a wheel, an editable install or a checkout alike."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):  # a wheel carries them inside, a checkout beside
        if (parent / folder).is_dir():
            return parent / folder
    raise HearSsamError(f"{package}: the folder {folder!r} is missing there and beside it; install hear_ssam again.")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a TOML file. Raises HearSsamError that names a file that cannot be read or is no TOML."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # tomllib's and Unicode's errors are ValueErrors
        raise HearSsamError(f"{path}: cannot be read as TOML: {error}; mend the file.") from error


def followed(path: str | os.PathLike[str]) -> Path:
    """What a link points to; any other path as it stands."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


@contextlib.contextmanager
def writing(place: object, reported: type[Exception] = OSError) -> Iterator[None]:
    """Inside, errors of the disk, OSError and what a writer may have `reported` instead, name `place`."""
    try:
        yield
    except (OSError, reported) as error:
        raise HearSsamError(f"{place}: cannot be written: {said(error)}; make room or use another place.") from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], reported: type[Exception] = OSError) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block succeeds, remove it if not.

    A link stays one: what it points to is written.
    Raises HearSsamError that names `path` where it cannot be written (no folder, no permission, full disk), which a
    writer may have `reported` as something else than OSError.
    """
    target = followed(path)
    if os.path.exists(target) and not os.path.isfile(target):  # a rename would replace even a device
        raise HearSsamError(f"{target}: cannot be written: it is a folder or a device; name a file.")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with writing(target, reported):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        try:
            rights = temporary.stat().st_mode
            yield temporary
            temporary.chmod(rights)  # of any new file: safetensors makes private ones, and results are for sharing
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path, what: str, name: str = ".lock", place: Path | None = None) -> Iterator[None]:
    """Make a folder and hold the lock `name` in it, which goes however the process ends, an empty folder too.

    Raises HearSsamError where another `what` holds it or nothing can be written; it names `place`, or else the folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / name, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise HearSsamError(f"{place or folder}: another {what} writes to it; wait or use another place.") from None
    except OSError as error:
        raise HearSsamError(f"{place or folder}: cannot be written: {said(error)}; use another place.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes nothing that is open
            os.unlink(lock.lock_file)
        lock.release()
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def refuse_others(folder: Path, what: str, name: str, parts: int) -> None:
    """Raise HearSsamError where another `what` holds a lock in a folder, unless both are shards of the same whole."""
    from filelock import FileLock, Timeout

    for other in folder.glob(".lock*"):
        if other.name != name and not (parts > 1 and other.name.endswith(f"-of-{parts}")):
            try:
                with FileLock(other, timeout=1):  # left by one that was killed
                    pass
            except Timeout:
                reason = f"another {what} ({other.name}) writes to it; wait or use another place"
                raise HearSsamError(f"{folder}: {reason}.") from None


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """A file with this content by `atomic_write`; text in UTF-8, where what it does not hold is escaped."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def link(path: str | os.PathLike[str], folder: Path) -> str:
    """The address of a file as seen from a page in `folder`, empty where it is not there (members of tars)."""
    if not os.path.isfile(path):
        return ""
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:  # another drive
        return Path(path).as_uri()


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
