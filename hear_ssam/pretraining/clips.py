"""Audio files, folders and tars (shards in WebDataset layout too) as clips; the corpus of the shipped encoders."""

from __future__ import annotations

import functools
import io
import lzma
import os
import re
import shlex
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from ..audio import SUFFIXES, UNREAD, decode_audio, find_audio, read_audio, tell_left_out
from ..errors import HearSsamError
from ..paths import read_toml, shipped
from .store import RATE, Clip


def audio_clips(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Clip]:
    """Clips of audio files, of folders (searched through) and of tars, compressed or not.

    The source of a clip is the first folder below what was named, else the name of what was named without suffix and
    shard number (speech-000017.tar: speech). A damaged tar gives the clips before the damage, then one that cannot be
    decoded, so that whoever reads them can go on and name it; so does a tar without audio.
    """
    for path in map(Path, paths):
        if path.is_file() and is_tar(path):
            yield from _tar_clips(path)
            continue
        for file in find_audio([path]):
            yield Clip(_source(path, file.relative_to(path)), str(file), functools.partial(read_audio, file, RATE))


TAR = re.compile(r"([-_.]?\d{3,})?\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)  # with the number of a shard


def is_tar(path: Path) -> bool:
    """Whether a file is a tar by its name or its content."""
    try:
        return bool(TAR.search(path.name)) or tarfile.is_tarfile(path)
    except Exception:  # a damaged archive raises what its codec does; reading it as audio names it
        return False


def _tar_clips(path: Path) -> Iterator[Clip]:
    problem, left_out = "holds no audio", Counter[str]()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                inside = Path(*(part for part in Path(member.name).parts if part not in ("/", "..")))
                suffix = inside.suffix.lower()
                if not member.isfile() or any(part.startswith(".") for part in inside.parts):
                    continue
                if suffix in SUFFIXES:
                    name, data = f"{path}:{member.name}", io.BytesIO(cast(IO[bytes], tar.extractfile(member)).read())
                    yield Clip(_source(path, inside), name, functools.partial(decode_audio, data, name, RATE))
                    problem = ""
                left_out[suffix] += suffix in UNREAD  # beside audio, a shard is full of other files
            problem = problem or _problem_at_end(tar)
        tell_left_out(path, left_out)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem = f"cannot be read to its end as a tar ({error})"
    if problem:
        refusal = f"{path}: {problem}; get it again or leave it out."
        yield Clip(path.stem, str(path), functools.partial(_refuse, refusal))


def _problem_at_end(tar: tarfile.TarFile) -> str:
    """tarfile takes whatever is no header for the end of an archive; zeros until the end of the file are one."""
    file = cast(IO[bytes], tar.fileobj)
    file.seek(tar.offset)
    block = file.read(512)
    while block and not block.strip(b"\0"):
        if not (block := file.read(1 << 20)):
            return ""
    return f"is cut off, damaged or joined to another tar at byte {tar.offset:,}"


def _refuse(message: str) -> NoReturn:
    raise HearSsamError(message)


def _source(named: Path, below: Path) -> str:
    if len(below.parts) > 1:
        return below.parts[0]
    if named.is_dir():
        return named.name
    return (TAR.sub("", named.name) if TAR.search(named.name) else "") or named.stem


def recipe() -> dict[str, Any]:
    """The corpus of the shipped encoders (`checkpoints/corpus.toml`): `package`, `source` and `left_out` tables."""
    return read_toml(shipped("checkpoints") / "corpus.toml")


def terms(name: str) -> dict[str, str]:
    """Licence and attribution of a source that the recipe lists."""
    for entry in recipe()["package"] + recipe()["source"]:
        if entry["name"] == name:
            return {"licence": entry["licence"], "attribution": entry["attribution"]}
    return {}


def missing(folder: str | os.PathLike[str], entries: Iterable[dict[str, Any]]) -> list[str]:
    """Shell commands that get what FOLDER/NAME lacks of `package` and `source` tables of the recipe."""
    packages, lines = [], []
    for entry in entries:
        place = Path(folder, entry["name"])
        if "repository" not in entry:
            packages += [entry["name"]] if not place.is_dir() else []
            continue
        head = place / ".git" / "HEAD"  # of a checkout; an unpacked archive has none
        if not place.is_dir() or (head.exists() and head.read_text().strip() != entry["commit"]):
            git, fetched = f"git -C {shlex.quote(str(place))}", f"{entry['repository']} {entry['commit']}"
            lines.append(f"git init -q {shlex.quote(str(place))} && {git} fetch -q --depth 1 {fetched}")
            lines.append(f"{git} checkout -q FETCH_HEAD")
    if packages:
        unpack = f'dpkg -x "$deb" {shlex.quote(str(folder))}/"${{deb%%_*}}"'
        lines = [f"apt-get download {' '.join(packages)}", f"for deb in *.deb; do {unpack}; done", *lines]
    return lines
