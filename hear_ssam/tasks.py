"""HEAR task folders: `task_metadata.json`, `labelvocabulary.csv` and one `<split>.json` per split.

heareval copies these files into its embedding folders, so `read_task` serves both stages of the evaluation.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import HearSsamError, unknown_name
from .paths import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA = "task_metadata.json"
VOCABULARY = "labelvocabulary.csv"
DONE = ".done.embeddings"  # in a finished folder of embeddings
_CHOICES = {
    "embedding_type": ("scene", "event"),
    "prediction_type": ("multiclass", "multilabel"),
    "split_mode": ("trainvaltest", "new_split_kfold", "presplit_kfold"),
}


@dataclass(frozen=True)
class DataSplit:
    """Which splits one head is trained, validated and tested on."""

    train: tuple[str, ...]
    valid: str
    test: str


@dataclass(frozen=True)
class Task:
    """One task as heareval sees it. `folder` is a task folder or an embedding folder made from one."""

    folder: Path
    metadata: dict[str, Any]
    labels: tuple[str, ...]  # the class with index i is labels[i]

    @property
    def name(self) -> str:
        """The folder's name, heareval's own identity of a task (name, version and mode)."""
        return self.folder.name

    @property
    def version(self) -> str:
        return str(self.metadata.get("version", ""))

    @property
    def event(self) -> bool:
        return self.metadata["embedding_type"] == "event"

    @property
    def multilabel(self) -> bool:
        return self.metadata["prediction_type"] == "multilabel"

    @property
    def splits(self) -> list[str]:
        return self.metadata["splits"]

    @property
    def scores(self) -> list[str]:
        """Names of the scores; the first selects heads and makes the headline."""
        return self.metadata["evaluation"]

    @cached_property
    def data_splits(self) -> list[DataSplit]:
        """Train/valid/test, or for k folds: test fold i, validate on fold i + 1, train on the rest."""
        if self.metadata["split_mode"] == "trainvaltest":
            return [DataSplit(("train",), "valid", "test")]
        folds = sorted(self.splits)
        turns = [(fold, folds[(i + 1) % len(folds)]) for i, fold in enumerate(folds)]
        return [
            DataSplit(tuple(fold for fold in folds if fold not in (test, valid)), valid, test) for test, valid in turns
        ]

    def clips(self, split: str) -> dict[str, list[Any]]:
        """File name → labels (scene) or events `{"label", "start", "end"}` in ms, in the file's order.

        Raises HearSsamError for a missing file and for a label that is not in the vocabulary.
        """
        path = self.folder / f"{split}.json"
        clips = _read_json(path)
        if not isinstance(clips, dict) or not clips:
            raise HearSsamError(f"{path} must map at least one file name to its labels.")
        for name, labels in clips.items():
            if not isinstance(labels, list):
                raise HearSsamError(f"{path}: the labels of {name!r} must be a list.")
            if not (self.event or self.multilabel or len(labels) == 1):
                raise HearSsamError(f"{path}: {name!r} has {len(labels)} labels; a multiclass task needs exactly one.")
            self.class_ids([label["label"] if self.event else label for label in labels], where=f"{path}: {name!r}")
        return clips

    def absent_classes(self) -> dict[str, list[str]]:
        """Splits in which classes do not occur, and those classes: what makes scores of small tasks undefined."""
        absent = {}
        for split in self.splits:
            labels = itertools.chain.from_iterable(self.clips(split).values())
            present = {str(label["label"] if self.event else label) for label in labels}
            if missing := [label for label in self.labels if label not in present]:
                absent[split] = missing
        return absent

    @cached_property
    def class_index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def class_ids(self, labels: Iterable[object], where: str) -> list[int]:
        """Class indices of labels, which heareval compares as strings."""
        try:
            return [self.class_index[str(label)] for label in labels]
        except KeyError as error:
            raise HearSsamError(f"{where} has the label {error.args[0]!r} that {VOCABULARY} does not list.") from None

    def targets(self, rows: Sequence[Sequence[object]], where: str) -> np.ndarray:
        """Labels of each row → one-hot or multi-hot float32 (rows, classes)."""
        target = np.zeros((len(rows), len(self.labels)), np.float32)
        for row, labels in zip(target, rows, strict=True):
            row[self.class_ids(labels, where)] = 1
        if not self.multilabel and not (target.sum(1) == 1).all():
            raise HearSsamError(f"{where}: every row of a multiclass task needs exactly one label.")
        return target

    def shuffled_clips(self) -> Iterator[tuple[str, list[str]]]:
        """Each split with its file names in the order of embedding rows.

        The only shuffle in the whole protocol: one `Random(0)` per task, continued from split to split.
        """
        generator = random.Random(0)
        for split in self.splits:
            names = list(self.clips(split))
            generator.shuffle(names)
            yield split, names


def read_task(folder: Path) -> Task:
    """Read and check a task folder (or an embedding folder); HearSsamError names the file that is missing or wrong."""
    path = folder / METADATA
    metadata = _read_json(path)
    for key in (*_CHOICES, "splits", "evaluation"):
        if key not in metadata:
            raise HearSsamError(f"{path} lacks {key!r}.")
    for key, choices in _CHOICES.items():
        if metadata[key] not in choices:
            raise unknown_name(f"{key} in {path}", metadata[key], choices)
    splits, needed = metadata["splits"], {"train", "valid", "test"}
    if metadata["split_mode"] == "trainvaltest":
        if set(splits) != needed:
            raise HearSsamError(f"{path}: trainvaltest needs the splits train, valid and test, not {splits}.")
    elif len(set(splits)) != len(splits) or len(splits) < 3:
        raise HearSsamError(f"{path}: k folds need at least three different splits, not {splits}.")
    if not metadata["evaluation"]:
        raise HearSsamError(f"{path}: 'evaluation' must name at least one score.")
    return Task(folder, metadata, _read_vocabulary(folder / VOCABULARY))


def find_tasks(tasks_dir: Path, names: Sequence[str] = (), unpacked: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """Task folders by name, sorted, in `tasks_dir` or in `tasks_dir/…/tasks`, as HEAR's archives unpack.

    `unpacked` are further places to look at. A task that is in several of them has several folders, perhaps with other
    sample rates. `names` selects folders by name; a missing one raises HearSsamError that says where to get it or
    which name is near.
    """
    if not tasks_dir.is_dir():
        raise HearSsamError(f"no folder {tasks_dir}; --tasks-dir must hold one folder per HEAR task.")
    folders: dict[str, list[Path]] = {}
    for root in (tasks_dir, *unpacked):
        for pattern in ("*", "tasks/*", "*/tasks/*"):
            for path in sorted(root.glob(f"{pattern}/{METADATA}")):
                folders.setdefault(path.parent.name, []).append(path.parent)
    if not folders:
        raise HearSsamError(f"{tasks_dir} holds no HEAR task (no folder in it has a {METADATA}).")
    for name in names:
        if name in known_tasks() and name not in folders:
            raise HearSsamError(f"{tasks_dir} lacks {name}; {known_tasks()[name].source}.")
        if name not in folders:
            raise unknown_name(f"task in {tasks_dir}", name, folders)
    return {name: folders[name] for name in sorted(names or folders)}


def find_archives(tasks_dir: Path, names: Sequence[str] = ()) -> list[Path]:
    """Archives in `tasks_dir` (.tar, .tar.gz, .tgz), all or those with one of `names` in their name."""
    archives = [path for path in sorted(tasks_dir.glob("*")) if path.name.endswith((".tar", ".tar.gz", ".tgz"))]
    return [path for path in archives if not names or any(name in path.name for name in names)]


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a folder of its own in `folder`, whole or not at all; a newer archive replaces it."""
    target = folder / archive.name.partition(".tar")[0].removesuffix(".tgz")
    if target.is_dir() and target.stat().st_mtime >= archive.stat().st_mtime:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".unpacking-"))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")  # refuses members that would leave the folder
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        target.touch()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        system = getattr(error, "errno", None) is not None  # a full disk, say, and no fault of the archive
        raise HearSsamError(f"cannot unpack {archive}: {error}{'' if system else '; get it again'}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


# ---- what is known about HEAR's own tasks --------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskCard:
    """One of HEAR's 19 tasks (20 folders) as `eval_tasks/<folder>.toml` describes it. Scores are fractions."""

    title: str
    folder: str
    version: str
    embedding_type: str
    prediction_type: str
    split_mode: str  # trainvaltest or kfold
    splits: int
    classes: int
    clips: int
    scores: dict[str, str]  # HEAR's name → max or min; the first leads
    archive: str  # RATE stands for the sample rate
    licence: str
    citation: str
    sample_duration: float | None = None
    published: tuple[dict[str, Any], ...] = ()  # model, score (of the leading metric), source

    @property
    def source(self) -> str:
        """Where the task can be had."""
        return (
            f"get {self.archive} (48000 Hz: https://zenodo.org/records/5885750; 16000, 22050, 32000 and 44100 Hz: "
            "gs://hear2021-archive/tasks/, requester pays)"
        )

    def differences(self, task: Task) -> list[str]:
        """How a folder on disk differs from HEAR's release; such scores are not HEAR scores."""
        found = {
            "version": task.version,
            "embedding_type": task.metadata["embedding_type"],
            "prediction_type": task.metadata["prediction_type"],
            "split_mode": "trainvaltest" if task.metadata["split_mode"] == "trainvaltest" else "kfold",
            "splits": len(task.splits),
            "classes": len(task.labels),
            "clips": sum(len(task.clips(split)) for split in task.splits),
            "scores": task.scores,
            "sample_duration": task.metadata.get("sample_duration"),
        }
        expected = {**{name: getattr(self, name) for name in found}, "scores": list(self.scores)}
        return [f"{name} is {found[name]}, HEAR's {expected[name]}" for name in found if found[name] != expected[name]]


@cache
def known_tasks() -> dict[str, TaskCard]:
    """HEAR's own tasks by folder name."""
    cards = (TaskCard(**tomllib.loads(path.read_text("utf-8"))) for path in shipped("eval_tasks").glob("*.toml"))
    return {card.folder: card for card in sorted(cards, key=lambda card: card.folder)}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HearSsamError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise HearSsamError(f"{path} is not valid JSON: {error}.") from error


def _read_vocabulary(path: Path) -> tuple[str, ...]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            labels = {int(row["idx"]): row["label"] for row in csv.DictReader(file)}
    except OSError as error:
        raise HearSsamError(f"cannot read {path}: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise HearSsamError(f"{path} needs the columns idx (0, 1, …) and label.") from error
    if sorted(labels) != list(range(len(labels))) or not labels:
        raise HearSsamError(f"{path}: idx must count 0, 1, … without gaps.")
    return tuple(labels[index] for index in range(len(labels)))
