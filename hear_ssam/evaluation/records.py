"""Results on disk: one JSON line per model, checkpoint, task, protocol, probe, seed, fold and metric.

A job's lines are appended in one write, so a killed run loses no finished job; a line that a crash tore is skipped,
and of two lines with the same key the later one counts. Every table is a view of such a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import HearSsamError

STORE = "records.jsonl"
KEY = ("model", "checkpoint_sha256", "task", "version", "protocol", "probe", "seed", "fold", "metric")

Record = dict[str, Any]  # the fields of KEY, `score` (None where it is not finite), and provenance


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a record. `fold` is None for the score of the task (the mean over folds)."""
    return tuple(record[name] for name in KEY)


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: such scores are stored as null."""
    return value if math.isfinite(value) else None


def _model_folder(model: str, checkpoint_sha256: str) -> str:
    """A folder name that differs for different models and checkpoints."""
    slug = "".join(letter if letter.isalnum() or letter in "._=-" else "-" for letter in model)
    return f"{slug}-{checkpoint_sha256[:8]}".rstrip("-")


def embeddings_folder(results_dir: Path, model: str, checkpoint_sha256: str, task: str) -> Path:
    """Where a results folder keeps the embeddings of a task by a model."""
    return results_dir / "embeddings" / _model_folder(model, checkpoint_sha256) / task


def predictions_file(results_dir: Path, record: Mapping[str, Any]) -> Path:
    """Where a results folder keeps what a record's job predicted.

    An .npz with `labels`, `histories` (JSON: the validations of every training) and, for scene tasks,
    `<fold>/prediction` and `<fold>/target`, both float32 (clips, classes).
    """
    folder = results_dir / "predictions" / _model_folder(record["model"], record["checkpoint_sha256"]) / record["task"]
    return folder / f"{record['protocol']}-{record['probe']}-seed{record['seed']}.npz"


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records, all or none, and force them to disk. Raises HearSsamError that names an unwritable file."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(descriptor).st_size
        try:
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                text = "\n" + text  # close the line that a crash tore
            data = text.encode()
            if os.write(descriptor, data) != len(data):
                raise OSError(None, "the disk is full")
            os.fsync(descriptor)
        except OSError:  # a part of the records would pass for all of them
            os.ftruncate(descriptor, size)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HearSsamError(f"cannot write {path}: {error.strerror or error}.") from error


def read(path: Path) -> list[Record]:
    """All whole records of a store (a file, or the results folder that holds it), the last of each key, in order.

    Raises HearSsamError where there is no store or a line is valid JSON but no record.
    """
    path = path / STORE if path.is_dir() else path
    found: dict[tuple[Any, ...], Record] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise HearSsamError(f"cannot read results from {path}: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a crash; its job was not finished and runs again
        try:
            found[key_of(record)] = record
        except (KeyError, TypeError) as error:
            raise HearSsamError(f"{path}, line {number} is not a result record (lacks {error}).") from error
    return list(found.values())
