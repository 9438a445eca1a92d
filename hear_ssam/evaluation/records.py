"""Results on disk: one JSON line per model, checkpoint, task, protocol, probe, seed, fold and metric.

A job's lines are appended in one write, so a killed run loses no finished job; a line that a crash tore is skipped,
and of two lines with the same key the later one counts. Every table is a view of such a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from filelock import FileLock

from ..errors import HearSsamError, said
from ..paths import writing

if TYPE_CHECKING:
    import numpy as np

    from .tasks import Task

STORE = "records.jsonl"
KEY = ("model", "checkpoint_sha256", "task", "version", "protocol", "probe", "seed", "fold", "metric")


class Record(TypedDict, total=False):
    """One line: the fields of KEY, the score, and where it comes from. Stores of other versions may lack the rest."""

    model: str
    checkpoint_sha256: str
    task: str
    version: str
    protocol: str
    probe: str
    seed: int
    fold: str | None  # None: the score of the task, over folds their mean
    metric: str
    score: float | None  # None where it is not finite
    primary: bool  # whether it leads
    maximize: bool
    epoch: int  # of the chosen head; these three of a single fold alone
    validation_score: float | None
    loss: float | None
    grid_point: dict[str, Any]
    clips: int
    limit: int  # clips of each split, where there are more
    embeddings: dict[str, Any]  # of `embeddings.json`, and their folder
    device: str
    dtype: str
    threads: int
    seconds: float
    time: str
    versions: dict[str, str]
    commit: str | None
    label: str  # of the model in a table, never stored


@dataclass(frozen=True)
class FoldResult:
    """What a probe reaches on one test split."""

    fold: str
    scores: dict[str, float]
    details: dict[str, Any]  # what a record says of a single fold: the leading score in validation, what was chosen
    prediction: np.ndarray  # float32 (rows, classes), rows as in the embedding folder
    target: np.ndarray  # float32 (rows, classes)


def key_of(record: Mapping[str, object]) -> tuple[Any, ...]:
    """What identifies a record."""
    return tuple(record[name] for name in KEY)


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: such scores are stored as null."""
    return value if math.isfinite(value) else None


def _model_folder(model: str, checkpoint_sha256: str) -> str:
    """A folder name that differs for different models and checkpoints: letters to read, a hash to tell apart."""
    slug = "".join(letter if (letter.isascii() and letter.isalnum()) or letter in "._=-" else "-" for letter in model)
    return f"{slug[:100]}-{hashlib.sha256(json.dumps([model, checkpoint_sha256]).encode()).hexdigest()[:8]}"


def embeddings_folder(results_dir: Path, model: str, checkpoint_sha256: str, task: str) -> Path:
    """Where a results folder keeps the embeddings of a task by a model."""
    return results_dir / "embeddings" / _model_folder(model, checkpoint_sha256) / task


def predictions_file(results_dir: Path, record: Mapping[str, Any]) -> Path:
    """Where a results folder keeps what a record's job predicted.

    An .npz with `labels`, `histories` (JSON: the validations of every training) and, for scene tasks,
    `<fold>/prediction` and `<fold>/target`, both float32 (clips, classes).
    """
    folder = results_dir / "predictions" / _model_folder(record["model"], record["checkpoint_sha256"])
    return folder / str(record["task"]) / f"{record['protocol']}-{record['probe']}-seed{record['seed']}.npz"


def make_records(
    identity: Mapping[str, Any], task: Task, folds: Sequence[FoldResult], common: Mapping[str, Any]
) -> list[Record]:
    """The records of one job: every score of each fold, and their mean over folds.

    `identity` holds the fields of KEY that all share. What says that the job is done, the leading score, comes last.
    """
    from .scores import SCORES, aggregate_folds

    several = len(folds) > 1
    rows = [(fold.fold if several else None, fold.scores, fold.details) for fold in folds]
    rows += [(None, aggregate_folds([fold.scores for fold in folds]), {})] if several else []
    records = [
        {
            **identity, "fold": fold, "metric": metric, "score": finite(score), "primary": metric == task.scores[0],
            "maximize": next(SCORES[name].maximize for name in task.scores if metric.startswith(name)),
            **details, **common,
        }
        for fold, scores, details in rows for metric, score in scores.items()
    ]  # fmt: skip
    return cast(list[Record], sorted(records, key=lambda r: r["fold"] is None and r["primary"]))


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records, all or none, and force them to disk. Raises HearSsamError that names an unwritable file."""
    data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # jobs of an array share the store; a write that is not buffered says how much of it there was room for
        with FileLock(path.with_name(f".{path.name}.lock")), open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                data = b"\n" + data  # close the line that a crash tore
            try:
                if file.write(data) != len(data):
                    raise OSError(None, "the disk is full")
                os.fsync(file.fileno())
            except OSError:  # a part of the records would pass for all of them
                file.truncate(size)
                raise


def read(path: Path) -> list[Record]:
    """All whole records of a store (a file, or the results folder that holds it), the last of each key, in order.

    Raises HearSsamError where there is no store or a line is valid JSON but no record.
    """
    path = path / STORE if path.is_dir() else path
    found: dict[tuple[Any, ...], Record] = {}
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError as error:
        reason = f"cannot be read: {said(error)}"
        raise HearSsamError(f"{path}: {reason}; `hear-ssam evaluate` puts results there.") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a crash; its job was not finished and runs again
        try:
            found[key_of(record)] = record
        except (KeyError, TypeError) as error:
            reason = f"line {number} is not a result record (lacks {error})"
            raise HearSsamError(f"{path}: {reason}; delete it.") from error
    return list(found.values())
