"""The corpus of the shipped encoders, as `checkpoints/corpus.toml` tells it, and what of it is missing somewhere."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..paths import read_toml, shipped


def recipe() -> dict[str, Any]:
    """The corpus of the shipped encoders (`checkpoints/corpus.toml`): `package`, `source` and `left_out` tables."""
    return read_toml(shipped("checkpoints") / "corpus.toml")


def terms() -> dict[str, dict[str, str]]:
    """Licence and attribution of the sources that the recipe lists, by name."""
    table = recipe()
    return {e["name"]: {k: e[k] for k in ("licence", "attribution")} for e in table["package"] + table["source"]}


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
        target = shlex.quote(str(folder))
        unpack = f'dpkg -x "$deb" {target}/"${{deb%%_*}}"'
        get = f"mkdir -p {target} && apt-get download {' '.join(packages)}"
        lines = [get, f"for deb in *.deb; do {unpack}; done", *lines]
    return lines
