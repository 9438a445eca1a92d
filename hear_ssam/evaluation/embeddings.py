"""Stage one: a HEAR module's embeddings of a task, in heareval's own folder layout.

A finished folder holds

    task_metadata.json, labelvocabulary.csv, <split>.json   copied from the task
    <split>.embeddings.npy                 raw float32, row after row, without an .npy header
    <split>.embedding-dimensions.json      [rows, dim]
    <split>.target-labels.pkl              list with a list of labels per row
    <split>.filename-timestamps.json       [file, ms] per row (event tasks)
    profile.embeddings.json, .done.embeddings
    embeddings.json                        our addition, written first: what they come from; last, how they were made
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from ..audio import read_audio
from ..errors import HearSsamError, said
from ..machine import work_ahead
from ..paths import atomic_write, sha256, write_whole
from .folders import audio_folder, audio_rates, require_audio
from .module import JudgedModule
from .tasks import DONE, METADATA, VOCABULARY, Task, read_task

PROVENANCE = "embeddings.json"


def embed_task(
    hear: JudgedModule, task: Task | Path, out_dir: Path, *, resample: bool = False, again: bool = False
) -> Path:
    """Embed every clip of a task (or of the task in a folder) into `out_dir` and return it.

    A finished folder of the same origin (model, module, task, rate of the audio) is kept as it is, unless `again` is
    set; another one is made again. Audio must have the model's rate unless `resample` is set.
    Raises HearSsamError that names the file or clip: missing or damaged audio, wrong rate, an embedding that is not
    finite or not of the promised shape; and for an `out_dir` that holds something else, which stays as it is.
    """
    task = task if isinstance(task, Task) else read_task(task)
    made_by = origin(hear, task, out_dir, resample)
    if not again and (out_dir / DONE).exists() and made_by.items() <= provenance(out_dir).items():
        return out_dir
    audio = {split: audio_folder(task, split, hear.sample_rate, resample) for split in task.splits}
    for split, folder in audio.items():
        require_audio(folder, task.clips(split))
    held = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if held and not held & {PROVENANCE, DONE}:
        raise HearSsamError(f"{out_dir}: holds something else than embeddings; choose another folder or empty it.")
    for stale in (out_dir / DONE, *out_dir.glob(".*.embeddings.npy.*")):  # the latter: of a process that was killed
        stale.unlink(missing_ok=True)
    started = time.time()
    write_whole(out_dir / PROVENANCE, json.dumps(made_by, indent=1))
    for name in _described_by(task):
        with atomic_write(out_dir / name) as temporary:
            shutil.copyfile(task.folder / name, temporary)
    count, dim = 0, 0
    for split, order in task.shuffled_clips():
        dim = _embed_split(hear, task, split, order, audio[split], out_dir, resample)
        count += len(order)
    seconds, device = time.time() - started, hear.device.type
    dtype = str(next((p.dtype for p in hear.model.parameters()), torch.float32)).removeprefix("torch.")
    backend = getattr(hear.model, "backend", None)  # of ours a name; others may call a part of theirs so
    made_by |= {"clips": count, "dim": dim, "device": device, "backend": backend if isinstance(backend, str) else None}
    made_by |= {"dtype": dtype, "seconds": round(seconds, 3)}
    made_by["audio"] = {split: str(folder.resolve()) for split, folder in audio.items()}  # for those who want to listen
    write_whole(out_dir / PROVENANCE, json.dumps(made_by, indent=1))
    profile = {"time_elapsed": seconds, "gpu_max_mem": None, "gpu_device_name": device}
    write_whole(out_dir / "profile.embeddings.json", json.dumps(profile))
    write_whole(out_dir / DONE, "")
    return out_dir


def _described_by(task: Task) -> list[str]:
    """The files of a task that say what it is."""
    return [METADATA, VOCABULARY, *(f"{split}.json" for split in task.splits)]


def task_digest(task: Task) -> str:
    """SHA-256 over those of the files that describe a task."""
    return hashlib.sha256("".join(sha256(task.folder / name) for name in _described_by(task)).encode()).hexdigest()


def origin(hear: JudgedModule, task: Task, out_dir: Path, resample: bool) -> dict[str, Any]:
    """What the embeddings of a task by a model come from. Results are used again only where all of it is the same.

    Raises HearSsamError where the task lacks audio that the model takes; without any audio, embeddings that `out_dir`
    holds already serve, so the rate is theirs.
    """
    if audio_rates(task.audio):
        folders = [audio_folder(task, split, hear.sample_rate, resample) for split in task.splits]
        rates = sorted({int(folder.parent.name) for folder in folders})
    else:
        rates = provenance(out_dir).get("audio_hz", [])
    model = {"model": hear.name, "checkpoint_sha256": hear.checkpoint_sha256, **hear.source}
    return {**model, "task_sha256": task_digest(task), "audio_hz": rates}


def given_origin(task: Task) -> dict[str, Any]:
    """`origin` of a folder of embeddings; where heareval noted nothing, its place and time."""
    noted, digest = provenance(task.folder), {"task_sha256": task_digest(task)}
    if not noted:
        written = max((path.stat().st_mtime_ns for path in task.folder.glob("*.embeddings.npy")), default=0)
        return {"folder": str(task.folder.resolve()), "written_ns": written, **digest}
    names = ["model", "checkpoint_sha256", "module", "module_version", "module_sha256", "audio_hz"]
    names += ["weights_sha256"] * ("weights_sha256" in noted)  # where nothing else tells weights apart
    return {name: noted.get(name) for name in names} | digest


def require_done(folder: Path) -> None:
    """Raise HearSsamError for an embedding folder that was not finished."""
    if not (folder / DONE).exists():
        raise HearSsamError(f"{folder} is not a finished embedding folder ({DONE} is missing); make it again.")


def provenance(folder: Path) -> dict[str, Any]:
    """What `embed_task` noted about an embedding folder; empty for one that heareval made."""
    path = folder / PROVENANCE
    try:
        noted = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise HearSsamError(f"{path}: cannot be read ({said(error)}); make the embeddings again.") from error
    return noted if isinstance(noted, dict) else {}


def _embed_split(
    hear: JudgedModule, task: Task, split: str, order: Sequence[str], folder: Path, out_dir: Path, resample: bool
) -> int:
    """Embed one split, write its files, return the embedding size. Batches follow the JSON, rows the shuffled order."""
    clips = task.clips(split)
    spans: dict[str, tuple[int, int]] = {}  # clip → its rows in the unshuffled file
    labels: dict[str, list[list[Any]]] = {}
    timestamps: dict[str, list[float]] = {}
    rows, dim, duration = 0, 0, task.metadata.get("sample_duration")
    # heareval's batch size: 84 s of 16 kHz audio, one clip where the task does not state a common duration
    size = max(1, int(0.7 * (120 / duration) * (16000 / hear.sample_rate))) if duration else 1
    with (
        atomic_write(out_dir / f"{split}.embeddings.npy") as shuffled,
        tempfile.TemporaryFile(dir=out_dir) as unshuffled,
        tqdm(total=len(clips), desc=f"{task.name} {split}", unit="clip", disable=None, leave=False) as bar,
    ):
        for names, audio in _read_batches(list(clips), folder, hear.sample_rate, size, resample):
            embedded, times = _embed_batch(hear, task, names, audio)  # (clips, rows, dim), (clips, rows) ms
            dim = embedded.shape[2]
            for name, block, ms in zip(names, embedded, times, strict=True):
                unshuffled.write(block.tobytes())
                spans[name] = rows, rows + len(block)
                rows += len(block)
                labels[name] = frame_labels(clips[name], ms) if task.event else [clips[name]]
                timestamps[name] = ms.tolist()
            bar.update(len(names))
        unshuffled.flush()
        mapped = np.memmap(unshuffled, np.float32, "r", shape=(rows, dim))
        with open(shuffled, "wb") as file:
            for name in order:
                file.write(mapped[slice(*spans[name])].tobytes())
    write_whole(out_dir / f"{split}.embedding-dimensions.json", json.dumps([rows, dim]))
    write_whole(out_dir / f"{split}.target-labels.pkl", pickle.dumps([row for name in order for row in labels[name]]))
    if task.event:
        stamped = [[f"{out_dir / split / name}", ms] for name in order for ms in timestamps[name]]
        write_whole(out_dir / f"{split}.filename-timestamps.json", json.dumps(stamped))
    return dim


def _read_batches(
    names: Sequence[str], folder: Path, sample_rate: int, size: int, resample: bool
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and audio (clips, samples) in order; a batch ends early where the length changes."""

    def read(name: str) -> np.ndarray:
        path = folder / name
        if not resample:
            with contextlib.suppress(soundfile.LibsndfileError):  # read_audio says what is wrong with the file
                rate = soundfile.info(path).samplerate
                if rate != sample_rate:
                    raise HearSsamError(f"{path} has {rate} Hz, the model needs {sample_rate} Hz (see --resample).")
        return read_audio(path, sample_rate)

    clips = ((name, reading.result()) for name, reading in work_ahead(read, names, workers=1, depth=2 * size))
    for _, group in itertools.groupby(clips, key=lambda clip: len(clip[1])):
        while batch := list(itertools.islice(group, size)):
            yield [name for name, _ in batch], np.stack([audio for _, audio in batch])


def _embed_batch(hear: JudgedModule, task: Task, names: list[str], audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the HEAR functions return, checked: float32 (clips, rows, dim) and timestamps in ms."""
    kind = "timestamp" if task.event else "scene"
    function = f"{hear.module.__name__}.get_{kind}_embeddings"
    others = f" and {len(names) - 1} others" if names[1:] else ""
    embedded, times = hear.embed(kind, audio, f"the clip {names[0]}{others} of the task {task.name}")
    if task.event:
        _check_timestamps(times, audio.shape[1] / hear.sample_rate, function)
    finite = np.isfinite(embedded).reshape(len(names), -1).all(1)
    if not finite.all():
        bad = names[int(finite.argmin())]
        raise HearSsamError(f"{function} returned NaN or infinite values for the clip {bad} of the task {task.name}.")
    return embedded.reshape(len(names), -1, embedded.shape[-1]), times


def _check_timestamps(times: np.ndarray, seconds: float, function: str) -> None:
    """Timestamps must grow and lie within the audio; a whole clip below its length in seconds means a wrong unit."""
    if not (np.diff(times, axis=1) > 0).all():
        raise HearSsamError(f"{function} returned timestamps that do not increase.")
    span = f"{function} returned timestamps from {times.min():g} to {times.max():g} for {seconds:g} s of audio"
    if times.shape[1] > 2 and times.max() <= seconds:
        raise HearSsamError(f"{span}; they must be milliseconds.")
    if not (times.min() >= 0 and times.max() <= seconds * 1000 + 1):  # nor NaN
        raise HearSsamError(f"{span}; they must lie within the audio.")


def frame_labels(events: Sequence[Mapping[str, Any]], timestamps: np.ndarray) -> list[list[Any]]:
    """Labels active at each timestamp t (ms): those of events with start ≤ t < end + 0.0001."""
    timestamps = np.asarray(timestamps, np.float64)
    frames: list[dict[Any, None]] = [{} for _ in timestamps]  # each label once, in the order of the events
    for event in events:
        for frame in np.flatnonzero((event["start"] <= timestamps) & (timestamps < event["end"] + 0.0001)):
            frames[frame][event["label"]] = None
    return [list(frame) for frame in frames]
