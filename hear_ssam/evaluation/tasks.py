"""HEAR task folders: `task_metadata.json`, `labelvocabulary.csv` and one `<split>.json` per split.

heareval copies these files into its embedding folders, so `read_task` serves both stages of the evaluation.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HearSsamError, unknown_name
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
    return isinstance(value, list) and all(
        isinstance(name, str) and name[:1] not in ("", ".") and name == Path(name).name for name in value
    )


def _grid(value: object, kind: Callable[[Any], bool], names: Iterable[str] = ()) -> bool:
    """Whether a JSON value maps names (exactly `names`, if there are any) to lists of one or more values of a kind."""
    lists = value.values() if isinstance(value, dict) and set(value) == set(names or value) else [None]
    return all(isinstance(values, list) and values and all(map(kind, values)) for values in lists)


# Keys of the metadata, or of the evaluation_params in it: what they must be and whether they are.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task_name": ("text", lambda value: isinstance(value, str)),
    "version": ("text or a number", lambda value: isinstance(value, str) or _number(value)),
    "splits": ("a list of names", _names),
    "evaluation": ("a list of scores", _names),
    "sample_duration": ("seconds above 0, or null", lambda value: value is None or (_number(value) and value > 0)),
    "use_scoring_for_early_stopping": ("true or false", lambda value: isinstance(value, bool)),
    "evaluation_params": ("an object", lambda value: isinstance(value, dict)),
    "task_specific_param_grid": ("an object of lists of numbers or names",
                                 lambda value: _grid(value, lambda one: isinstance(one, str) or _number(one))),
    "event_postprocessing_grid": ("an object of two lists of ms, median_filter_ms and min_duration",
                                  lambda value: _grid(value, lambda one: _number(one) and one >= 0, POSTPROCESSING)),
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
    _clips: dict[str, dict[str, list[Any]]] = field(default_factory=dict, repr=False, compare=False)  # what was read

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

        Read and checked once; not to be changed. Raises HearSsamError for a missing file, labels of another form or
        outside the vocabulary, and times that are no numbers, end before they start, or are seconds.
        """
        if split not in self._clips:
            self._clips[split] = self._read_clips(self.folder / f"{split}.json")
        return self._clips[split]

    def _read_clips(self, path: Path) -> dict[str, list[Any]]:
        clips = _read_json(path)
        if not isinstance(clips, dict) or not clips:
            raise HearSsamError(f"{path}: must map at least one file name to its labels.")
        ends = {}  # of the last event of each clip, ms
        for name, labels in clips.items():
            where = f"{path}: {name!r}"
            if not isinstance(labels, list):
                raise HearSsamError(f"{where}: its labels must be a list, not {json.dumps(labels)[:80]}.")
            if self.event:
                for event in labels:
                    _check_event(event, where)
                ends[name] = max((event["end"] for event in labels), default=0)
            elif not self.multilabel and len(labels) != 1:
                raise HearSsamError(f"{where} has {len(labels)} labels; a multiclass task needs exactly one.")
            self.class_ids([label["label"] if self.event else label for label in labels], where)
        # Modules' timestamps are tested alike. Where the length is not known, 60 ms are too short for a whole split.
        if self.event and 0 < (last := max(ends.values())) <= (self.metadata.get("sample_duration") or 60):
            name = max(ends, key=ends.__getitem__)
            raise HearSsamError(f"{path}: the last event of all is that of {name!r} at {last:g}: seconds? Give ms.")
        return clips

    def absent_classes(self) -> dict[str, list[str]]:
        """Splits in which classes do not occur, and those classes: what makes scores of small tasks undefined."""
        absent = {}
        for split in self.splits:
            labels = itertools.chain.from_iterable(self.clips(split).values())
            present = {str(label["label"] if self.event else label) for label in labels}
            absent[split] = [label for label in self.labels if label not in present]
        return {split: labels for split, labels in absent.items() if labels}

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
    """Read and check a task folder (or an embedding folder); HearSsamError names the file that is missing or wrong.

    Labels are checked when `Task.clips` reads them.
    """
    path = folder / METADATA
    metadata = _read_json(path)
    if not isinstance(metadata, dict):
        raise HearSsamError(f"{path}: must be a JSON object with {', '.join(_NEEDED)}.")
    _check_metadata(metadata, path)
    return Task(folder, folder, metadata, _read_vocabulary(folder / VOCABULARY))


def _check_metadata(metadata: dict[str, Any], path: Path) -> None:
    from .scores import SCORES  # imports scikit-learn

    for key in _NEEDED:
        if key not in metadata:
            raise HearSsamError(f"{path}: lacks the key {key!r}.")
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
    for name in metadata["evaluation"]:
        if name not in SCORES:
            raise HearSsamError(f"{path}: {unknown_name('score', name, SCORES)}")
        kind = metadata["embedding_type"]
        if SCORES[name].event != (kind == "event"):
            raise HearSsamError(f"{path}: the score {name} does not fit the embedding_type {kind!r}; choose another.")


def _check_event(event: object, where: str) -> None:
    if not isinstance(event, dict) or not {"label", "start", "end"} <= set(event):
        raise HearSsamError(f"{where}: an event needs label, start and end, not {json.dumps(event)[:80]}.")
    start, end = event["start"], event["end"]
    if not (_number(start) and _number(end) and 0 <= start <= end):
        raise HearSsamError(f"{where}: an event from {start!r} to {end!r}; give ms from 0, the later one last.")


def require_audio(folder: Path, names: Iterable[str]) -> None:
    """Raise HearSsamError for a clip that is missing or no regular file: opening a pipe or a device may never end."""
    for name in names:
        if not os.path.isfile(folder / name):
            what = "is no regular file" if os.path.lexists(folder / name) else "is missing"
            raise HearSsamError(f"{folder / name}: {what}; get the audio of the task again.")


def find_tasks(tasks_dir: Path, names: Sequence[str] = (), unpacked: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """Task folders by name, sorted, in `tasks_dir`, `unpacked`, or a `…/tasks` in them, as HEAR's archives unpack.

    A task in several places has several folders, perhaps of other sample rates. Hidden folders are ignored. `names`
    selects folders; a missing one raises HearSsamError that says where to get it or which name is near.
    """
    if not tasks_dir.is_dir():
        raise HearSsamError(f"{tasks_dir}: no such folder; it must hold one folder per HEAR task.")
    folders: dict[str, list[Path]] = {}
    for root in (tasks_dir, *unpacked):
        for pattern in ("*", "tasks/*", "*/tasks/*"):
            for path in sorted(root.glob(f"{pattern}/{METADATA}")):
                if not any(part.startswith(".") for part in path.relative_to(root).parts):
                    folders.setdefault(path.parent.name, []).append(path.parent)
    if not folders:
        raise HearSsamError(f"{tasks_dir}: holds no HEAR task; put a folder with {METADATA} there.")
    names = [name if name in folders else folder_named(name) for name in names]
    for name in names:
        if name in known_tasks() and name not in folders:
            raise HearSsamError(f"{tasks_dir}: lacks {name}; {known_tasks()[name].source}.")
        if name not in folders:
            raise HearSsamError(f"{tasks_dir}: {unknown_name('task', name, folders)}")
    return {name: folders[name] for name in sorted(names or folders)}


def find_archives(tasks_dir: Path, names: Sequence[str] = ()) -> list[Path]:
    """Archives in `tasks_dir` (.tar, .tar.gz, .tgz), all or those with one of `names` in their name."""
    names = [folder_named(name) for name in names]
    found = (path for path in sorted(tasks_dir.glob("[!.]*")) if not names or any(name in path.name for name in names))
    return [path for path in found if path.name.endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()]


def unpack(archive: Path, folder: Path, most: int | None = None) -> Path:
    """Unpack an archive into a folder of its own in `folder`, named after it, whole or not at all.

    Unpacked again where the archive's time is another than the folder's, which bears the time of its archive.
    Raises HearSsamError for members that are links or devices, would leave the folder, or are over `most` bytes in all.
    """
    target, time = folder / archive.name, archive.stat().st_mtime
    if target.is_dir() and int(target.stat().st_mtime) == int(time):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".unpacking-"))
    total = 0

    def plain(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        nonlocal total
        total += member.size
        if not (member.isfile() or member.isdir()):
            raise HearSsamError(f"{archive}: cannot be unpacked: {member.name} is a link or a device; do not trust it.")
        if most and total > most:
            much = f"holds more than {most / 1e6:,.0f} MB, which the task cannot need"
            raise HearSsamError(f"{archive}: cannot be unpacked: it {much}; do not trust it.")
        return tarfile.data_filter(member, path)  # refuses members that would leave the folder

    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter=plain)
        os.utime(scratch, (time, time))
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        mend = "do not trust it" if isinstance(error, tarfile.FilterError) else "get it again"
        if getattr(error, "errno", None) is not None:  # a full disk, say, and no fault of the archive
            mend = "make room or use another place"
        reason = str(error).partition(":\n")[0]  # what each compression lacks is below
        raise HearSsamError(f"{archive}: cannot be unpacked: {reason}; {mend}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


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
        bucket = "gs://hear2021-archive/tasks/, requester pays"
        zenodo = "https://zenodo.org/records/5885750"
        return f"get {self.archive} (48000 Hz: {zenodo}; 16000, 22050, 32000 and 44100 Hz: {bucket})"

    def differences(self, task: Task) -> list[str]:
        """How a folder on disk differs from HEAR's release; such scores are not HEAR scores."""
        found = {
            "version": task.version,
            "embedding_type": task.metadata["embedding_type"], "prediction_type": task.metadata["prediction_type"],
            "split_mode": "trainvaltest" if task.metadata["split_mode"] == "trainvaltest" else "kfold",
            "splits": len(task.splits), "classes": len(task.labels),
            "clips": sum(len(task.clips(split)) for split in task.splits),
            "scores": task.scores, "sample_duration": task.metadata.get("sample_duration"),
        }  # fmt: skip
        expected = {**{name: getattr(self, name) for name in found}, "scores": list(self.scores)}
        return [f"{name} is {found[name]}, HEAR's {expected[name]}" for name in found if found[name] != expected[name]]


@cache
def known_tasks() -> dict[str, TaskCard]:
    """HEAR's own tasks by folder name."""
    read = (read_toml(path) for path in shipped("eval_tasks").glob("*.toml"))
    cards = (TaskCard(**{**values, "download": Download(**values["download"])}) for values in read)
    return {card.folder: card for card in sorted(cards, key=lambda card: card.folder)}


def folder_named(name: str) -> str:
    """The folder of one of HEAR's tasks by its short name; any other name as it is."""
    return next((card.folder for card in known_tasks().values() if card.short == name), name)


def _read_text(path: Path) -> str:
    """A file of a task as text: UTF-8, with a byte order mark or without."""
    try:
        if path.exists() and not path.is_file():
            raise HearSsamError(f"{path}: is no regular file; put a file in its place.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise HearSsamError(f"{path}: cannot be read: {error.strerror}; get the task again.") from error
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
    labels = tuple(label for _, label in sorted(rows))
    if sorted(index for index, _ in rows) != list(range(len(rows))) or not rows:
        raise HearSsamError(f"{path}: idx must count 0, 1, … without gaps.")
    if None in labels or len(set(labels)) != len(labels):
        raise HearSsamError(f"{path}: every row needs a label of its own.")
    return labels
