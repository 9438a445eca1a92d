"""Which recording is of which class: a folder with a subfolder per class, or a CSV file."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ..audio import SUFFIXES, UNREAD, find_audio
from ..embedding.inputs import identity, in_utf8, read_manifest
from ..errors import HearSsamError, unknown_name

SPLITS = ("train", "valid", "test")


class Labelled(NamedTuple):
    """A recording and its class. Recordings of one group are never on both sides of a split."""

    path: str
    label: str
    split: str = ""  # one of SPLITS, or empty where nobody has split
    group: str = ""  # of its own where empty


def read_labels(place: str | os.PathLike[str], known: Collection[str] | None = None) -> list[Labelled]:
    """The recordings of a folder with a subfolder per class, or of a CSV: `path`, `label`, optional `split`, `group`.

    `known`: the paths of embeddings that a CSV tells the labels of, as for `read_manifest`.
    Raises HearSsamError for a folder or CSV without classes, labels that are empty or differ only by case or spaces, a
    recording with two, a class with a single recording or group, and splits that are not all given or of no use.
    """
    place = Path(place)
    if place.is_dir():
        entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
        classes = sorted(filter(Path.is_dir, entries))
        if not classes:
            raise HearSsamError(f"{place}: has no subfolders; put the recordings of each class in one of its name.")
        if loose := sum(entry.is_file() and entry.suffix.lower() in SUFFIXES | UNREAD for entry in entries):
            text = f"{place}: left out {loose} recordings beside the subfolders; move each to that of its class."
            warnings.warn(text, stacklevel=2)
        found = [Labelled(str(file), in_utf8(folder.name)) for folder in classes for file in find_audio([folder])]
    else:
        rows = read_manifest(place, "label", known=known)
        found = [Labelled(r["path"], r["label"], r.get("split", ""), r.get("group", "")) for r in rows]
    return _checked(place, found)


def _checked(place: Path, found: list[Labelled]) -> list[Labelled]:
    """The recordings once each, however often and by what paths they are named."""
    alike: dict[str, str] = {}
    by_path: dict[str, Labelled] = {}
    for row in found:
        if (first := by_path.setdefault(identity(row.path), row))[1:] != row[1:]:
            both = " and ".join(" ".join(filter(None, each[1:])) for each in (first, row))
            raise HearSsamError(f"{place}: {row.path} stands in it twice, as {both}; keep one.")
        if not row.label:
            raise HearSsamError(f"{place}: {row.path} has no label; give it one, or leave it out.")
        plain = " ".join(unicodedata.normalize("NFKC", row.label).casefold().split())
        if (other := alike.setdefault(plain, row.label)) != row.label:
            same = "are the same but for case or Unicode form"
            raise HearSsamError(f"{place}: the labels {other!r} and {row.label!r} {same}; mend one.")
        if row.split not in ("", *SPLITS):
            raise unknown_name(f"split in {place}:", row.split, SPLITS)
    if len(alike) < 2:
        raise HearSsamError(f"{place}: has one class, {found[0].label!r}; a classifier needs two.")
    split = {row.split for row in found} - {""}
    if split and (len({row.split for row in found}) > len(split) or not {"train", "test"} <= split):
        raise HearSsamError(f"{place}: give every row a split, train or test (or valid), or none.")
    groups = {(row.label, row.group or row.path) for row in by_path.values() if row.split in ("", "train")}
    counts = Counter(label for label, _ in groups)
    for label in sorted(alike.values()):
        if counts[label] < 2:
            kind = "groups" if any(row.group for row in found) else "recordings"
            raise HearSsamError(f"{place}: class {label!r} has {counts[label]} {kind} to train on; it needs two.")
    by_group: dict[str, str] = {}
    for row in found:
        if row.group and (its := by_group.setdefault(row.group, row.split)) != row.split:
            raise HearSsamError(f"{place}: group {row.group!r} is in {its} and {row.split}; keep it in one.")
    return [*by_path.values()]
