"""HEAR task folders: `task_metadata.json`, `labelvocabulary.csv` and one `<split>.json` per split.

heareval copies these files into its embedding folders, so `read_task` serves both stages of the evaluation.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HearSsamError, said, unknown_name
from ..paths import read_toml, shipped

METADATA = "task_metadata.json"
VOCABULARY = "labelvocabulary.csv"
DONE = ".done.embeddings"  # in a finished folder of embeddings
_CHOICES = {
    "embedding_type": ("scene", "event"),
    "prediction_type": ("multiclass", "multilabel"),
    "split_mode": ("trainvaltest", "new_split_kfold", "presplit_kfold"),
}
_NEEDED = (*_CHOICES, "splits", "evaluation")
POSTPROCESSING = {"median_filter_ms": (250,), "min_duration": (125, 250)}  # of events, where a task states none


def _number(value: object) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _names(value: object) -> bool:
    """Whether a JSON value lists plain names: no paths, not hidden."""
    names = value if isinstance(value, list) else [None]
    return all(isinstance(name, str) and name[:1] not in ("", ".") and name == Path(name).name for name in names)


def _lists(value: object, fits: Mapping[str, Callable[[Any], bool]]) -> bool:
    """Whether a JSON value maps some of these names to lists of one or more values that fit."""
    lists = value if isinstance(value, dict) else {"": None}
    return all(name in fits and isinstance(of, list) and of and all(map(fits[name], of)) for name, of in lists.items())


# What `task_specific_param_grid` may vary of a head (`probe.HeadConfig`), and whether a value will do.
_HEAD: dict[str, Callable[[Any], bool]] = {
    "initialization": lambda value: value in ("xavier_uniform", "xavier_normal"),
    "lr": lambda value: _number(value) and value > 0,
    "dropout": lambda value: _number(value) and 0 <= value < 1,
    "hidden_layers": lambda value: type(value) is int and value >= 0,
    "batch_size": lambda value: type(value) is int and value >= 2,  # batch normalisation needs two rows
    **dict.fromkeys(("hidden_dim", "max_epochs", "check_val_every_n_epoch", "patience"),
                    lambda value: type(value) is int and value >= 1),
}  # fmt: skip
_EVENTS = dict.fromkeys(POSTPROCESSING, lambda value: _number(value) and value >= 0)

# Keys of the metadata, or of the evaluation_params in it: what they must be and whether they are.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task_name": ("text", lambda value: isinstance(value, str)),
    "version": ("text or a number", lambda value: isinstance(value, str) or _number(value)),
    "splits": ("a list of names", _names),
    "evaluation": ("a list of scores", _names),
    "sample_duration": ("seconds above 0, or null", lambda value: value is None or (_number(value) and value > 0)),
    "use_scoring_for_early_stopping": ("true or false", lambda value: isinstance(value, bool)),
    "evaluation_params": ("an object", lambda value: isinstance(value, dict)),
    "task_specific_param_grid": (f"an object of lists of values for {', '.join(_HEAD)}",
                                 lambda value: _lists(value, _HEAD)),
    "event_postprocessing_grid": ("an object of two lists of ms, median_filter_ms and min_duration",
                                  lambda value: _lists(value, _EVENTS) and len(value) == len(_EVENTS)),
}  # fmt: skip


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
    audio: Path  # its audio lies below: `folder`, unless clips of another task were chosen
    metadata: dict[str, Any]
    labels: tuple[str, ...]  # the class with index i is labels[i]
    _read: dict[str, tuple[int, dict[str, list[Any]]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The folder's name, heareval's own identity of a task (name, version and mode)."""
        return self.folder.name

    @property
    def version(self) -> str:
        return str(self.metadata.get("version", ""))

    @property
    def event(self) -> bool:
        return bool(self.metadata["embedding_type"] == "event")

    @property
    def multilabel(self) -> bool:
        return bool(self.metadata["prediction_type"] == "multilabel")

    @property
    def splits(self) -> list[str]:
        return list(self.metadata["splits"])

    @property
    def scores(self) -> list[str]:
        """Names of the scores; the first selects heads and makes the headline."""
        return list(self.metadata["evaluation"])

    @cached_property
    def data_splits(self) -> list[DataSplit]:
        """Train/valid/test, or for k folds: test fold i, validate on fold i + 1, train on the rest."""
        if self.metadata["split_mode"] == "trainvaltest":
            return [DataSplit(("train",), "valid", "test")]
        folds = sorted(self.splits)
        turns = zip(folds, folds[1:] + folds[:1], strict=True)
        return [DataSplit(tuple(f for f in folds if f not in (test, valid)), valid, test) for test, valid in turns]

    def clips(self, split: str) -> dict[str, list[Any]]:
        """File name → labels (scene) or events `{"label", "start", "end"}` in ms, in the file's order.

        Read and checked once, and again where the file has changed; not to be altered. Raises HearSsamError for a
        missing file, labels of another form or outside the vocabulary, and times that are no numbers, end before they
        start, or are seconds.
        """
        path = self.folder / f"{split}.json"
        time = path.stat().st_mtime_ns if path.exists() else 0
        if split not in self._read or self._read[split][0] != time:
            self._read[split] = time, self._read_clips(path)
        return self._read[split][1]

    def _read_clips(self, path: Path) -> dict[str, list[Any]]:
        clips = _read_json(path)
        if not isinstance(clips, dict) or not clips:
            raise HearSsamError(f"{path}: must map at least one file name to its labels.")
        ends = {}  # of the last event of each clip, ms
        for name, labels in clips.items():
            where = f"{path}: {name!r}"
            if name != Path(name).name:
                raise HearSsamError(f"{where}: must be the name of a file in the folder {path.stem}, and no path.")
            if not isinstance(labels, list):
                raise HearSsamError(f"{where}: its labels must be a list, not {json.dumps(labels)[:80]}.")
            if self.event:
                for event in labels:
                    _check_event(event, where)
                ends[name] = max((event["end"] for event in labels), default=0)
            elif not self.multilabel and len(labels) != 1:
                raise HearSsamError(f"{where} has {len(labels)} labels; a multiclass task needs exactly one.")
            self.class_ids(self.classes(labels), where)
        # Modules' timestamps are tested alike. Where the length is not known, 60 ms are too short for a whole split.
        if self.event and 0 < (last := max(ends.values())) <= (self.metadata.get("sample_duration") or 60):
            name = max(ends, key=ends.__getitem__)
            raise HearSsamError(f"{path}: the last event of all is that of {name!r} at {last:g}: seconds? Give ms.")
        return clips

    def absent_classes(self) -> dict[str, list[str]]:
        """Splits in which classes do not occur, and those classes: what makes scores of small tasks undefined."""
        absent = {}
        for split in self.splits:
            present = {name for labels in self.clips(split).values() for name in self.classes(labels)}
            if missing := [label for label in self.labels if label not in present]:
                absent[split] = missing
        return absent

    def classes(self, labels: Iterable[Any]) -> list[str]:
        """The classes that the labels or events of a clip name; heareval compares them as strings."""
        return [str(label["label"] if self.event else label) for label in labels]

    @cached_property
    def class_index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def class_ids(self, labels: Iterable[object], where: str) -> list[int]:
        """Class indices of labels."""
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
    """Read and check a task folder (or an embedding folder); HearSsamError names the file that is missing or wrong.

    Labels are checked when `Task.clips` reads them.
    """
    path = folder / METADATA
    metadata = _read_json(path)
    if not isinstance(metadata, dict) or not set(_NEEDED) <= set(metadata):
        raise HearSsamError(f"{path}: must be a JSON object with {', '.join(_NEEDED)}.")
    _check_metadata(metadata, path)
    return Task(folder, folder, metadata, _read_vocabulary(folder / VOCABULARY))


def _check_metadata(metadata: dict[str, Any], path: Path) -> None:
    from .scores import SCORES  # imports SciPy

    for key, choices in _CHOICES.items():
        if metadata[key] not in choices:
            raise HearSsamError(f"{path}: {unknown_name(key, metadata[key], choices)}")
    for values in (metadata, metadata.get("evaluation_params", {})):
        for key, (form, fits) in _TYPES.items():
            if key in values and not fits(values[key]):
                raise HearSsamError(f"{path}: {key!r} must be {form}, not {json.dumps(values[key])[:80]}.")
    splits = metadata["splits"]
    if metadata["split_mode"] == "trainvaltest":
        if sorted(splits) != ["test", "train", "valid"]:
            raise HearSsamError(f"{path}: trainvaltest needs the splits train, valid and test, not {splits}.")
    elif len(set(splits)) != len(splits) or len(splits) < 3:
        raise HearSsamError(f"{path}: k folds need at least three different splits, not {splits}.")
    if not metadata["evaluation"]:
        raise HearSsamError(f"{path}: 'evaluation' must name at least one score.")
    kind = metadata["embedding_type"]
    for name in metadata["evaluation"]:
        if name not in SCORES:
            raise HearSsamError(f"{path}: {unknown_name('score', name, SCORES)}")
        if SCORES[name].event != (kind == "event"):
            raise HearSsamError(f"{path}: the score {name} does not fit the embedding_type {kind!r}; choose another.")
    grid = metadata.get("evaluation_params", {}).get("event_postprocessing_grid", POSTPROCESSING)
    by_score = metadata.get("use_scoring_for_early_stopping", True)
    if kind == "event" and not by_score and any(len(values) > 1 for values in grid.values()):
        mend = "without scores nothing chooses one; give event_postprocessing_grid a single value of each"
        raise HearSsamError(f"{path}: 'use_scoring_for_early_stopping' is false, with several postprocessings: {mend}.")


def _check_event(event: object, where: str) -> None:
    if not isinstance(event, dict) or not {"label", "start", "end"} <= set(event):
        raise HearSsamError(f"{where}: an event needs label, start and end, not {json.dumps(event)[:80]}.")
    start, end = event["start"], event["end"]
    if not (_number(start) and _number(end) and 0 <= start <= end):
        raise HearSsamError(f"{where}: an event from {start!r} to {end!r}; give ms from 0, the later one last.")


# ---- what is known about HEAR's own tasks --------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    """An archive that is published, with its audio at `rate` Hz."""

    url: str
    rate: int
    sha256: str  # empty where no checksum was found that could be cited


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
    download: Download
    sample_duration: float | None = None
    published: tuple[dict[str, Any], ...] = ()  # model, score (of the leading metric), source

    @property
    def short(self) -> str:
        """A name that is easier to type: without version, and mode where it is `full`."""
        name, mode = self.folder.partition("-")[0].removeprefix("tfds_"), self.folder.rpartition("-")[2]
        return name if mode == "full" else f"{name}-{mode}"

    def most_bytes(self, rate: int) -> int:
        """More than an unpacked archive can hold: twice its 16-bit audio (30 s where clips differ) and its texts."""
        return round(4 * rate * self.clips * (self.sample_duration or 30)) + 10_000 * self.clips + 10**8

    @property
    def source(self) -> str:
        """Where the task can be had."""
        return f"get it with `hear-ssam tasks fetch {self.short}`, or {self.archive} from {self.download.url}"


@cache
def known_tasks() -> dict[str, TaskCard]:
    """HEAR's own tasks by folder name."""
    read = (read_toml(path) for path in shipped("eval_tasks").glob("*.toml"))
    cards = (TaskCard(**{**values, "download": Download(**values["download"])}) for values in read)
    return {card.folder: card for card in sorted(cards, key=lambda card: card.folder)}


def folder_named(name: str) -> str:
    """The folder of one of HEAR's tasks by its short name; any other name as it is."""
    return next((card.folder for card in known_tasks().values() if card.short == name), name)


def differences(task: Task) -> list[str]:
    """How one of HEAR's tasks on disk differs from HEAR's release; such scores are not HEAR scores."""
    card, metadata = known_tasks().get(task.name), task.metadata
    found = {
        "version": task.version, "classes": len(task.labels), "splits": len(task.splits),
        "embedding_type": metadata["embedding_type"], "prediction_type": metadata["prediction_type"],
        "split_mode": "trainvaltest" if metadata["split_mode"] == "trainvaltest" else "kfold",
        "clips": sum(len(task.clips(split)) for split in task.splits), "scores": task.scores,
        "sample_duration": metadata.get("sample_duration"),
    }  # fmt: skip
    wanted = {name: getattr(card, name) for name in found} | {"scores": list(card.scores)} if card else found
    odd = [f"{name} is {found[name]}, HEAR's {wanted[name]}" for name in found if found[name] != wanted[name]]
    return [f"is not as HEAR released it: {difference}" for difference in odd]


def _read_text(path: Path) -> str:
    """A file of a task as text: UTF-8, with a byte order mark or without."""
    try:
        if path.exists() and not path.is_file():
            raise HearSsamError(f"{path}: is no regular file; put a file in its place.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise HearSsamError(f"{path}: cannot be read: {said(error)}; get the task again.") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise HearSsamError(f"{path}: has another encoding than UTF-8; save it as UTF-8.")
    return text


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise HearSsamError(f"{path}: is not valid JSON: {error}; mend it or get the task again.") from error


def _read_vocabulary(path: Path) -> tuple[str, ...]:
    text = io.StringIO(_read_text(path), newline="")
    try:
        rows = [(int(row["idx"]), row["label"]) for row in csv.DictReader(text)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise HearSsamError(f"{path}: needs the columns idx (0, 1, …) and label, separated by commas.") from error
    labels = tuple(label for _, label in sorted(rows, key=lambda row: row[0]))
    if sorted(index for index, _ in rows) != list(range(len(rows))) or not rows:
        raise HearSsamError(f"{path}: idx must count 0, 1, … without gaps.")
    if None in labels or len(set(labels)) != len(labels):
        raise HearSsamError(f"{path}: every row needs a label of its own.")
    return labels
