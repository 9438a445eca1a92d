"""What `hear-ssam embed` can be given: files, folders, globs, CSV manifests, tars, a list on stdin → recordings."""

from __future__ import annotations

import csv
import glob
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..audio import audio_blocks, audio_clips, find_audio, is_tar, read_audio
from ..errors import HearSsamError


class Recording(NamedTuple):
    """An audio file, or a member of a tar, that has not been decoded yet."""

    name: str  # its path; of a member TAR:MEMBER
    bytes: int = 0
    decode: Callable[[], np.ndarray] | None = None  # of a member: float32 (samples,) at 16 kHz

    @property
    def label(self) -> str:
        """What the column `path` calls it."""
        return in_utf8(self.name)

    def read(self, rate: int, most: int | None = None) -> np.ndarray:
        """Float32 (samples,) at `rate`; more than `most` samples only where they are there anyway."""
        return self.decode() if self.decode else read_audio(self.name, rate, most)

    def blocks(self, rate: int) -> Iterable[np.ndarray]:
        """The same piece by piece."""
        return [self.decode()] if self.decode else audio_blocks(self.name, rate)


def of_file(path: str | os.PathLike[str]) -> Recording:
    """The recording that is a whole file; one that is not there fails when it is read."""
    return Recording(os.fspath(path), os.path.getsize(path) if os.path.isfile(path) else 0)


def find_recordings(inputs: Iterable[str | os.PathLike[str]]) -> Iterable[Recording]:
    """The recordings of all inputs in their order, each once; a list, but for tars, which are read on the way.

    A folder is searched; a pattern (`**` crosses folders) is one that no file is called; a `.csv` names files in its
    column `path`; `-` reads one path a line from stdin. Raises HearSsamError where an input holds nothing.
    """
    recordings, listed = _once(_all(inputs)), list[Recording]()
    for recording in recordings:
        listed.append(recording)
        if recording.decode:
            return itertools.chain(listed, recordings)
    return listed


def _once(recordings: Iterable[Recording]) -> Iterator[Recording]:
    seen: set[str] = set()
    for recording in recordings:
        if recording.name not in seen:
            seen.add(recording.name)
            yield recording


def _all(inputs: Iterable[str | os.PathLike[str]]) -> Iterator[Recording]:
    for given in [os.fspath(path) for path in inputs]:
        if given == "-":
            if not (named := list(filter(None, (line.rstrip("\r\n") for line in sys.stdin)))):
                raise HearSsamError("-: no path came on stdin; write one a line.")
            yield from map(of_file, named)
        elif given.lower().endswith(".csv"):
            yield from (of_file(row["path"]) for row in read_manifest(given))
        elif os.path.isfile(given) and is_tar(Path(given)):
            yield from (Recording(clip.name, clip.bytes, clip.decode) for clip in audio_clips([given]))
        elif not os.path.lexists(given) and glob.has_magic(given):
            found = sorted(glob.glob(given, recursive=True))
            if "**" in given:  # which finds what is in folders itself, empty ones and lists among it
                found = [path for path in found if not (os.path.isdir(path) or path.lower().endswith(".csv"))]
            if not found:
                raise HearSsamError(f"{given}: no file is called like that; correct the pattern.")
            yield from _all(found)
        else:
            yield from map(of_file, find_audio([given]))


def in_utf8(name: str) -> str:
    """The name of a file as Parquet, JSON and CSV can hold it."""
    return os.fsencode(name).decode(errors="replace")


def identity(path: str) -> str:
    """What tells files apart by name: their folder, however it is reached; a linked file is itself."""
    folder, name = os.path.split(os.path.abspath(path))
    return in_utf8(os.path.join(os.path.realpath(folder), name))


def read_manifest(
    file: str | os.PathLike[str], *needed: str, known: Collection[str] | None = None
) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, a column `path` and those `needed`; relative paths start at its folder.

    With `known`, the paths of embeddings, no file need be there, and a path that is among them is taken as it stands.
    Raises HearSsamError where it cannot be read, lacks a column or has no row, or names files that are not there.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = [{key.strip(): (row[key] or "").strip() for key in reader.fieldnames or ()} for row in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        found = f"{error.strerror}; name one that is there" if isinstance(error, OSError) else f"{error}; write UTF-8"
        raise HearSsamError(f"{file}: cannot be read as a CSV file: {found}.") from error
    for column in ("path", *needed):
        if not rows or column not in rows[0]:
            columns = ", ".join(rows[0]) if rows else "no rows"
            raise HearSsamError(f"{file}: has no column {column} ({columns}); name it in the first line.")
    folder = os.path.dirname(os.fspath(file))
    for row in rows:
        row["path"] = row["path"] if row["path"] in (known or ()) else os.path.join(folder, row["path"])
    if missing := [row["path"] for row in rows if known is None and not os.path.isfile(row["path"])]:
        count = f"{len(missing)} of {len(rows)}"
        raise HearSsamError(f"{file}: {count} files are not there, {missing[0]} first; correct them.")
    return rows
