"""An embedding folder in heareval's layout, read and checked: rows, targets, and what scores predictions of them."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HearSsamError, said
from .scores import EventJudge, SceneJudge, to_events
from .tasks import POSTPROCESSING, Task, read_task


def open_embeddings(folder: Path) -> tuple[Task, dict[str, Rows]]:
    """The task and the rows of every split of an embedding folder; raises HearSsamError where they do not fit."""
    task = read_task(folder)
    splits = {name: read_rows(task, name) for name in task.splits}
    dims = {rows.x.shape[1] for rows in splits.values()}
    if len(dims) > 1:
        raise HearSsamError(f"{folder}: the splits have embeddings of different sizes {sorted(dims)}; make them again.")
    for split in task.data_splits:
        if sum(len(splits[name]) for name in split.train) < 2:
            names = " + ".join(split.train)
            raise HearSsamError(f"{folder}: {names} has a single row to train on; batch normalisation needs two.")
    return task, splits


@contextlib.contextmanager
def _made_again(path: Path, problem: str) -> Iterator[None]:
    """What keeps the files of a split from being read, as a HearSsamError that names `path` and its problem."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be read: {said(error)}"
        raise HearSsamError(f"{error.filename or path}: {reason}; make the embeddings again.") from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise HearSsamError(f"{path}: {problem} ({error}); make the embeddings again.") from error


class _LabelReader(pickle.Unpickler):
    """Reads lists of strings and numbers; anything that would import or call code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only lists of plain labels are read")


def read_labels(path: Path) -> list[list[Any]]:
    """Read `<split>.target-labels.pkl` without executing anything that is in it."""
    with _made_again(path, "is not a readable pickle"), open(path, "rb") as file:
        labels = _LabelReader(file).load()
    if not isinstance(labels, list) or not all(isinstance(row, list) for row in labels):
        raise HearSsamError(f"{path}: must hold a list with one list of labels per row; make the embeddings again.")
    return labels


@dataclass(frozen=True)
class Rows:
    """The embedding rows of one split: x float32 (rows, dim) mapped from disk, target float32 (rows, classes)."""

    x: Tensor
    target: Tensor
    task: Task
    split: str

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def judge(self) -> SceneJudge | EventJudge:
        """What scores predictions of the split: its targets, or its events and the file and time of every frame."""
        task, split = self.task, self.split
        if not task.event:
            return SceneJudge(task.scores, self.target.numpy())
        path = task.folder / f"{split}.filename-timestamps.json"
        with _made_again(path, "must list [file, ms] of every row"):
            stamped = json.loads(path.read_text())
            files, times = [Path(file).name for file, _ in stamped], np.array([ms for _, ms in stamped], np.float64)
        reference = {file: to_events(events, task.class_index) for file, events in task.clips(split).items()}
        if len(files) != len(self) or not set(files) <= set(reference):
            raise HearSsamError(f"{path}: does not fit the embeddings and {split}.json beside it; make them again.")
        grid = task.metadata.get("evaluation_params", {}).get("event_postprocessing_grid", POSTPROCESSING)
        return EventJudge(task.scores, len(task.labels), files, times, reference, grid)


def read_rows(task: Task, split: str) -> Rows:
    """Map one split of an embedding folder; raises HearSsamError where files disagree or a value is not finite."""
    path = task.folder / f"{split}.embeddings.npy"  # raw float32, no .npy header
    dimensions = task.folder / f"{split}.embedding-dimensions.json"
    with _made_again(path, f"does not have the size that {dimensions.name} states"):
        rows, dim = json.loads(dimensions.read_text())
        if (size := path.stat().st_size) != 4 * rows * dim:  # as where numpy.save put its header before the rows
            raise ValueError(f"{size:,} bytes, not {4 * rows * dim:,}")
        mapped = np.memmap(path, np.float32, mode="c", shape=(rows, dim))  # private pages: torch wants them writable
    labels_path = task.folder / f"{split}.target-labels.pkl"
    labels = read_labels(labels_path)
    if len(labels) != rows:
        raise HearSsamError(f"{labels_path}: has {len(labels)} rows, {path.name} has {rows}; make them again.")
    for start in range(0, rows, 4096):
        finite = np.isfinite(mapped[start : start + 4096]).all(1)
        if not finite.all():
            row, names = start + int(finite.argmin()), [] if task.event else dict(task.shuffled_clips())[split]
            clip = f" ({names[row]})" if row < len(names) else ""
            raise HearSsamError(f"{path}: row {row}{clip} is not finite; make the embeddings again.")
    target = torch.from_numpy(task.targets(labels, where=str(labels_path)))
    return Rows(torch.from_numpy(mapped), target, task, split)
