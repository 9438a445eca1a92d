"""Files from the network: resumed, checked, whole or absent, each fetched by one process at a time."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

from .errors import HearSsamError
from .paths import sha256, write_whole, writing

BLOCK = 1 << 18  # bytes
ATTEMPTS = 3  # in a row that bring nothing new
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP errors that another attempt may not meet


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads are kept: `given`, else $HEAR_SSAM_CACHE, else hear_ssam in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := given or os.environ.get("HEAR_SSAM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hear_ssam"  # "~" without a home


def offline() -> bool:
    """Whether the user has switched the network off, with Hugging Face's variable."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def fetch(url: str, path: str | os.PathLike[str], pinned: str | None = None, *, timeout: float = 30.0) -> str:
    """Download `url` to `path` unless it is there; returns its SHA-256 (hex), which `check_hash` has compared.

    `path` appears whole or not at all. What an interrupted download brought stays beside it, hidden, and is gone on
    from where the server still has the same file. Of several processes one downloads, the others wait.
    `timeout`: seconds without a byte, after which the connection is tried again.

    Raises HearSsamError for what the server refuses, no network (or HF_HUB_OFFLINE), a wrong hash, a full disk and a
    folder that cannot be written.
    """
    target = Path(path)
    with contextlib.nullcontext() if target.is_file() else locked(target):  # what is there may lie on a read-only disk
        if target.is_file():
            return check_hash(target, target, pinned, target)
        if offline():
            raise HearSsamError(f"{url}: is not here ({target}), and HF_HUB_OFFLINE is set; unset it to download.")
        part = _beside(target, "part")
        _download(url, part, target.name, timeout)
        try:
            digest = check_hash(part, url, pinned, target)
        except HearSsamError:
            part.unlink()
            raise
        os.replace(part, target)
        return digest


def check_hash(file: Path, what: object, pinned: str | None, remembered_for: Path) -> str:
    """The SHA-256 of `file`, compared with the `pinned` one or else with the one seen first for that path.

    The first one seen is noted in `<path>.sha256`, with a warning. Raises HearSsamError that begins with `what`.
    """
    memory = remembered_for.with_name(f"{remembered_for.name}.sha256")
    digest = sha256(file)
    known = pinned or (memory.read_text("utf-8").split()[0] if memory.is_file() else "")
    if not known:
        write_whole(memory, f"{digest}  {remembered_for.name}\n")
        text = "no hash is published for it, so that whatever came was taken; a later change will be an error"
        warnings.warn(f"{what}: {text} (SHA-256 noted in {memory}).", stacklevel=3)
    elif digest != known:
        whose = "the published one" if pinned else f"that of the first download, noted in {memory}"
        mend = "delete it and fetch it again" if file == remembered_for else "fetch it again"  # what is there stays
        mend += "" if pinned else f", or delete {memory} if the change is meant"
        raise HearSsamError(f"{what}: its SHA-256 {digest} is not {whose}, {known}: changed or damaged; {mend}.")
    return digest


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time works on `target`, whose folder is made; errors of the disk name it."""
    from filelock import FileLock, Timeout

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_beside(target, "lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"{target}: another process is fetching it; waiting", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


class _Interrupted(Exception):
    """The connection failed, not the disk."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise _Interrupted(f"the connection failed ({reason})") from error


def _download(url: str, part: Path, name: str, timeout: float) -> None:
    """All of `url` into `part`, going on from what is there; raises HearSsamError where attempts bring nothing new."""
    if not url.startswith(("https://", "http://")):
        raise HearSsamError(f"{url}: not an address on the web; it begins with https://.")
    stamp, most, idle = part.with_name(f"{part.name}.etag"), -1, 0  # stamp: which version of the file `part` is from
    while True:
        have = part.stat().st_size if part.is_file() and stamp.is_file() else 0
        headers = {"User-Agent": "hear-ssam"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": stamp.read_text("utf-8")}
        try:
            with _network():
                reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
            with reply:
                _receive(reply, have, part, stamp, name)
            stamp.unlink(missing_ok=True)
            return
        except urllib.error.HTTPError as error:
            reason = f"the server says {error.code} {error.reason}"
            if error.code == 416:  # nothing is left of it, or it has become shorter
                stamp.unlink(missing_ok=True)
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    return
            elif error.code not in PASSING:
                raise HearSsamError(f"{url}: {reason}; check the address.") from error
        except _Interrupted as error:
            reason = str(error)
        have = part.stat().st_size if part.is_file() else 0
        most, idle = max(most, have), 0 if have > most else idle + 1
        if idle >= ATTEMPTS:
            raise HearSsamError(f"{url}: {reason}; try again later: it goes on where it stopped.")
        time.sleep(idle)


def _receive(reply: http.client.HTTPResponse, have: int, part: Path, stamp: Path, name: str) -> None:
    """Write what the server sends to `part`, behind the `have` bytes that are there if it goes on from them."""
    from tqdm import tqdm

    if reply.status != 206 or not (reply.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
        have = 0
        version = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        stamp.unlink(missing_ok=True)
        if version and not version.startswith("W/"):  # weak ones do not vouch for every byte
            stamp.write_text(version, "utf-8")
    length = reply.headers.get("Content-Length")
    total = have + int(length) if length else None
    free = shutil.disk_usage(part.parent).free
    if total and total - have > free:
        needed = f"needs {(total - have) / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        raise HearSsamError(f"{part.parent}: {name} {needed}; make room or use another folder.")
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None)
    with part.open("ab" if have else "wb") as file, bar:
        block = b"begin"
        while block:
            with _network():
                block = reply.read(BLOCK)
            file.write(block)
            bar.update(len(block))
        if total is not None and file.tell() != total:
            raise _Interrupted(f"the connection ended after {file.tell():,} of {total:,} bytes")
