"""Where embeddings lie: one Parquet file or a folder of them, with what made them in their metadata; resumed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import HearSsamError
from ..paths import atomic_write, followed, only_writer, writing
from .inputs import Recording

KEY = b"hear_ssam"  # of the metadata: JSON with version, model, checkpoint_sha256 and every option
FOLDER = b"folder"  # of the metadata: where relative paths began
WORDS = ["path", "model", "checkpoint_sha256"]  # columns of few distinct values


def parquet_files(place: str | os.PathLike[str]) -> list[Path]:
    """The Parquet files of an output of `embed`, a file or a folder; names with `_` or `.` in front are not data."""
    place = Path(place)
    if place.is_dir():
        return sorted(file for file in place.glob("*.parquet") if file.name[0] not in "._")
    return [place] if place.is_file() else []


def provenance(file: Path) -> dict[str, Any] | None:
    """What stands in the metadata of one of our files; None for other Parquet files, and for what is none."""
    try:
        return dict(json.loads((pq.read_schema(file).metadata or {})[KEY]))
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def same_provenance(place: Path, files: Iterable[Path], wanted: dict[str, Any], mend: str) -> None:
    """Raise HearSsamError for a file that other weights or options made; the version may differ, and how the weights
    were called."""
    for file in files:
        found = provenance(file)
        if found is None:
            raise HearSsamError(f"{file}: is not a file of embeddings, or damaged; move it away.")
        same = {"version"} | ({"model"} if wanted["checkpoint_sha256"] else set())
        if different := [k for k in {**found, **wanted} if k not in same and found.get(k) != wanted.get(k)]:
            text = ", ".join(f"{key}={found.get(key)!r}, not {wanted.get(key)!r}" for key in different)
            raise HearSsamError(f"{place}: holds embeddings with {text}; {mend}.")


def row_groups(file: Path) -> Iterator[pa.Table]:
    """The rows of a Parquet file in the pieces that it was written in; `iter_batches` would keep them all in memory."""
    with pq.ParquetFile(file) as rows:
        yield from map(rows.read_row_group, range(rows.num_row_groups))


def _paths(file: Path) -> dict[str, tuple[float, str]]:
    """The recordings whose rows a file holds: when it was written, and the folder where relative paths began."""
    paths = pq.read_table(file, columns=["path"])
    begun = os.fsdecode((paths.schema.metadata or {}).get(FOLDER, b""))
    return dict.fromkeys(paths[0].unique().to_pylist(), (file.stat().st_mtime, begun))


class Output:
    """Shards that are written one after the other; each is whole or absent.

    A folder gets shards `PREFIX-00000.parquet`. A file `NAME.parquet` gets them in a hidden folder beside it, and is
    made of them at the end. `done` holds the paths whose rows are there already, as `_paths` gives them.
    """

    def __init__(self, output: str | os.PathLike[str], schema: pa.Schema, prefix: str, row_group: int) -> None:
        self.output = followed(output)
        self.schema, self.prefix, self.row_group = schema, prefix, row_group
        self.single = Path(output).suffix == ".parquet"
        self.folder = self.output.with_name(f".{self.output.name}.parts") if self.single else self.output
        if os.path.lexists(self.output) and not (self.output.is_file() if self.single else self.output.is_dir()):
            kind, mend = ("folder", "file") if self.single else ("file", "folder, or NAME.parquet")
            raise HearSsamError(f"{output}: cannot be written: it is a {kind} or a device; name a {mend}.")
        self.pending: list[pa.Table] = []
        self.writer: pq.ParquetWriter | None = None
        self.since = 0.0  # when the open shard began
        self.writing = False  # in the middle of a recording or of closing: whole or, when interrupted, not at all

    @contextlib.contextmanager
    def opened(self) -> Iterator[Output]:
        """Closes the open shard at the end, when interrupted too; errors of the disk name the output."""
        with only_writer(self.folder, "run", f".{self.prefix}.lock", self.output), writing(self.output):
            try:
                self._drop()
                self._resume()
                yield self
                self.close()
            except KeyboardInterrupt:
                if not self.writing:
                    self.close()
                raise
            finally:
                self._drop()

    def _resume(self) -> None:
        if other := next((file for file in self.folder.glob("[!._]*") if file.suffix != ".parquet"), None):
            raise HearSsamError(f"{self.output}: holds other things than embeddings ({other.name}); name a new folder.")
        parts = parquet_files(self.folder)
        self.kept = older = [self.output] if self.single and self.output.exists() else []
        made, mend = json.loads(self.schema.metadata[KEY]), "name another output, or delete this one"
        same_provenance(self.output, older + parts, made, mend)
        self.done = {path: known for file in older for path, known in _paths(file).items()}
        for file in parts:
            if self.done.keys() & (found := _paths(file)).keys() and older:
                file.unlink()  # the run before ended between making the one file and removing its parts
            else:
                self.done |= found
        numbers = [file.stem.removeprefix(f"{self.prefix}-") for file in parts]
        self.number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def newer(self, recording: Recording) -> bool:
        """Whether a file has changed since it was embedded. Raises HearSsamError for another one of the same name."""
        written, begun = self.done[recording.label]
        other, here = Path(begun, recording.name), Path(recording.name)
        if other.exists() and here.exists() and not other.samefile(here):
            text = f"holds embeddings of {other}, which from there has the name of {here.absolute()}"
            raise HearSsamError(f"{self.output}: {text}; name another output, or whole paths.")
        return here.exists() and here.stat().st_mtime > written

    def close_if(self, seconds: float) -> None:
        """Close a shard that has been open that long."""
        if self.writer and time.monotonic() - self.since > seconds:
            self.close()

    def write(self, tables: Iterable[pa.Table]) -> None:
        """Add the rows of one recording to the open shard."""
        self.writing = True
        if self.writer is None:
            self.since = time.monotonic()
            self.writer = pq.ParquetWriter(self._temporary, self.schema, use_dictionary=WORDS)
        for table in tables:
            self.pending.append(table)
            if sum(table.num_rows for table in self.pending) >= self.row_group:
                self._flush()
        self.writing = False

    def _flush(self) -> None:
        if self.writer is not None:
            self.writer.write_table(pa.concat_tables(self.pending), self.row_group)
            self.pending.clear()

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.prefix}-{self.number:05}.tmp"

    def close(self) -> None:
        """Finish the open shard; the next rows begin another one."""
        if self.writer is not None:
            self.writing = True
            if self.pending:
                self._flush()
            self.writer.close()
            self.writer = None
            os.replace(self._temporary, self.folder / f"{self.prefix}-{self.number:05}.parquet")
            self.number += 1
            self.writing = False

    def _drop(self) -> None:
        """Leave nothing of a shard that could not be finished, by this run or one before."""
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
        for leftover in self.folder.glob(f".{self.prefix}-?????.tmp"):
            leftover.unlink()

    def finish(self) -> None:
        """Make the one file of its shards."""
        self.close()
        parts = parquet_files(self.folder)
        if not self.single or not parts:
            return
        with (
            atomic_write(self.output) as temporary,
            pq.ParquetWriter(temporary, self.schema, use_dictionary=WORDS) as writer,
        ):
            for file in self.kept + parts:
                for table in row_groups(file):
                    writer.write_table(table.cast(self.schema))
        for file in parts:
            file.unlink()
