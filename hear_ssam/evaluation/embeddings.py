"""Stage one: a HEAR module's embeddings of a task, in heareval's own folder layout.

An encoder is seen through the HEAR API alone: `load_model`, `get_scene_embeddings`, `get_timestamp_embeddings` and
the attributes `sample_rate`, `scene_embedding_size`, `timestamp_embedding_size`. A finished folder holds

    task_metadata.json, labelvocabulary.csv, <split>.json   copied from the task
    <split>.embeddings.npy                 raw float32, row after row, without an .npy header
    <split>.embedding-dimensions.json      [rows, dim]
    <split>.target-labels.pkl              list with a list of labels per row
    <split>.filename-timestamps.json       [file, ms] per row (event tasks)
    profile.embeddings.json, .done.embeddings
    embeddings.json                        our addition: model, checkpoint, device, number of clips
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from ..audio import read_audio
from ..errors import HearSsamError
from ..machine import work_ahead
from ..paths import atomic_write, sha256
from .tasks import DONE, METADATA, VOCABULARY, Task, known_tasks, read_task, require_audio

PROVENANCE = "embeddings.json"
_FUNCTIONS = ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")
_ATTRIBUTES = ("sample_rate", "scene_embedding_size", "timestamp_embedding_size")


@dataclass(frozen=True)
class HearModel:
    """A loaded model of any module with the HEAR API."""

    module: ModuleType
    model: torch.nn.Module
    name: str  # names a model in records: the module (or the model's own name) and its options
    checkpoint_sha256: str
    device: torch.device

    @property
    def sample_rate(self) -> int:
        return self.model.sample_rate  # type: ignore[return-value]


def parse_options(text: str) -> dict[str, Any]:
    """Options of `load_model` from a JSON object."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise HearSsamError(f"model options must be a JSON object, not {text!r}: {error}.") from error
    if not isinstance(options, dict):
        raise HearSsamError(f"model options must be a JSON object, not {text!r}.")
    return options


def load_hear_model(module: str, model: str = "", options: Mapping[str, Any] | None = None) -> HearModel:
    """Import `module`, call its `load_model([model], **options)`, move the model to the GPU if there is one.

    `module` may carry options of its own: 'hear_ssam:{"model": "logmel"}'.
    Raises HearSsamError for a module that cannot be imported or lacks a part of the HEAR API.
    """
    module, _, own_options = module.partition(":")
    options = {**(options or {}), **parse_options(own_options or "{}")}
    with _blamed(f"cannot import the HEAR module {module!r}"):
        imported = importlib.import_module(module)
    for name in _FUNCTIONS:
        if not callable(getattr(imported, name, None)):
            raise HearSsamError(f"the module {module} has no function {name}; the HEAR API needs it.")
    with _blamed(f"{module}.load_model failed"):
        loaded = imported.load_model(*([model] if model else []), **options)
    if not isinstance(loaded, torch.nn.Module):
        raise HearSsamError(f"{module}.load_model returned a {type(loaded).__name__}, not a torch.nn.Module.")
    for name in _ATTRIBUTES:
        if not isinstance(getattr(loaded, name, None), int):
            raise HearSsamError(f"the model of {module} needs the attribute {name} (an int); the HEAR API asks for it.")
    own_name = getattr(loaded, "name", None)
    if isinstance(own_name, str):
        options.pop("model", None)  # said by the name already
    else:
        own_name = imported.__name__
    digest = getattr(loaded, "checkpoint_sha256", None)
    if digest is None:
        digest = sha256(model) if model and Path(model).is_file() else ""
        if model and not digest:  # a folder, or a name that the module knows
            options["weights"] = model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "-".join([own_name, *(f"{key}={value}" for key, value in sorted(options.items()))])
    return HearModel(imported, loaded.to(device), name, digest, device)


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever a foreign module raises becomes a HearSsamError that says where it was raised."""
    try:
        yield
    except HearSsamError:
        raise
    except Exception as error:
        ours = (__file__, importlib.__file__)
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename[0] != "<" and f.filename not in ours
        ]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise HearSsamError(f"{what}: {type(error).__name__}: {error}{where}.") from error


def embed_task(
    hear: HearModel, task: Task | Path, out_dir: Path, *, resample: bool = False, again: bool = False
) -> Path:
    """Embed every clip of a task (or of the task in a folder) into `out_dir` and return it.

    A finished folder of the same task is kept as it is, unless `again` is set; a half-done one is deleted and made
    again. Audio must have the model's rate unless `resample` is set.
    Raises HearSsamError that names the file or clip: missing or damaged audio, wrong rate, an embedding that is not
    finite or not of the promised shape.
    """
    task = task if isinstance(task, Task) else read_task(task)
    if not again and is_current(task, out_dir):
        return out_dir
    for split in task.splits:
        require_audio(audio_folder(task, split, hear.sample_rate, resample), task.clips(split))
    if out_dir.exists():
        shutil.rmtree(out_dir)
    started = time.time()
    for name in (METADATA, VOCABULARY, *(f"{split}.json" for split in task.splits)):
        with atomic_write(out_dir / name) as path:
            shutil.copyfile(task.folder / name, path)
    count, dim = 0, 0
    for split, order in task.shuffled_clips():
        dim = _embed_split(hear, task, split, order, out_dir, resample)
        count += len(order)
    made_by = {
        "model": hear.name,
        "module": hear.module.__name__,
        "checkpoint_sha256": hear.checkpoint_sha256,
        "clips": count,
        "dim": dim,
        "device": hear.device.type,
        "backend": getattr(hear.model, "backend", None),
        "dtype": str(next((p.dtype for p in hear.model.parameters()), torch.float32)).removeprefix("torch."),
        "seconds": round(time.time() - started, 3),
    }
    profile = {"time_elapsed": time.time() - started, "gpu_max_mem": None, "gpu_device_name": hear.device.type}
    for name, text in (
        (PROVENANCE, json.dumps(made_by, indent=1)),
        ("profile.embeddings.json", json.dumps(profile, indent=4)),
        (DONE, ""),
    ):
        with atomic_write(out_dir / name) as path:
            path.write_text(text)
    return out_dir


def is_current(task: Task, out_dir: Path) -> bool:
    """Whether `out_dir` is finished and was made from this very task (metadata, vocabulary and labels are equal)."""
    if not (out_dir / DONE).exists():
        return False
    names = (METADATA, VOCABULARY, *(f"{split}.json" for split in task.splits))
    return all((out_dir / n).is_file() and (out_dir / n).read_bytes() == (task.folder / n).read_bytes() for n in names)


def require_done(folder: Path) -> None:
    """Raise HearSsamError for an embedding folder that was not finished."""
    if not (folder / DONE).exists():
        raise HearSsamError(f"{folder} is not a finished embedding folder ({DONE} is missing); make it again.")


def provenance(folder: Path) -> dict[str, Any]:
    """What `embed_task` noted about an embedding folder; empty for one that heareval made."""
    path = folder / PROVENANCE
    return json.loads(path.read_text()) if path.exists() else {}


def audio_folder(task: Task, split: str, sample_rate: int, resample: bool) -> Path:
    """`<task>/<rate>/<split>` at the model's rate, or with `resample` at the best other rate on disk."""
    rates = [rate for rate in _rates(task.folder) if (task.folder / str(rate) / split).is_dir()]
    if not rates:
        where = _where_to_get(task)
        raise HearSsamError(f"{task.folder} has no audio: the folder {sample_rate}/{split} is missing{where}.")
    if sample_rate not in rates and not resample:
        raise HearSsamError(
            f"{task.folder} has no {sample_rate} Hz audio for {split}, only {', '.join(map(str, rates))} Hz; "
            f"allow resampling (--resample) or get it at the model's rate{_where_to_get(task)}."
        )
    return task.folder / str(min(rates, key=lambda rate: _worse(rate, sample_rate))) / split


def best_folder(folders: Sequence[Path], sample_rate: int) -> Path:
    """Of several folders of one task, the one with the model's rate, else with the best to resample from."""
    return min(folders, key=lambda f: min((_worse(rate, sample_rate) for rate in _rates(f)), default=(True, math.inf)))


def _rates(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _worse(rate: int, wanted: int) -> tuple[bool, float]:
    """Grows as a rate gets worse for a model: first those above its own, the next one first, then those below."""
    return rate < wanted, abs(rate - wanted)


def _where_to_get(task: Task) -> str:
    card = known_tasks().get(task.name)
    return f"; {card.source}" if card else ""


def _embed_split(hear: HearModel, task: Task, split: str, order: Sequence[str], out_dir: Path, resample: bool) -> int:
    """Embed one split, write its files, return the embedding size. Batches follow the JSON, rows the shuffled order."""
    clips = task.clips(split)
    folder = audio_folder(task, split, hear.sample_rate, resample)
    spans: dict[str, tuple[int, int]] = {}  # clip → its rows in the unshuffled file
    labels: dict[str, list[list[Any]]] = {}
    timestamps: dict[str, list[float]] = {}
    rows, dim = 0, 0
    target = out_dir / f"{split}.embeddings.npy"
    with (
        atomic_write(target) as shuffled,
        tempfile.TemporaryFile(dir=out_dir) as unshuffled,
        tqdm(total=len(clips), desc=f"{task.name} {split}", unit="clip", disable=None, leave=False) as bar,
    ):
        for names, audio in _read_batches(list(clips), folder, hear.sample_rate, batch_size(task, hear), resample):
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
    contents: dict[str, bytes] = {
        "embedding-dimensions.json": json.dumps([rows, dim]).encode(),
        "target-labels.pkl": pickle.dumps([label for name in order for label in labels[name]]),
    }
    if task.event:
        stamped = [[f"{out_dir / split / name}", ms] for name in order for ms in timestamps[name]]
        contents["filename-timestamps.json"] = json.dumps(stamped).encode()
    for suffix, content in contents.items():
        with atomic_write(out_dir / f"{split}.{suffix}") as path:
            path.write_bytes(content)
    return dim


def batch_size(task: Task, hear: HearModel) -> int:
    """heareval's batch size: 84 s of 16 kHz audio, one clip where the task does not state a common duration."""
    duration = task.metadata.get("sample_duration")
    return max(1, int(0.7 * (120 / duration) * (16000 / hear.sample_rate))) if duration else 1


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

    batch: list[tuple[str, np.ndarray]] = []
    for name, reading in work_ahead(read, names, workers=1, depth=2 * size):
        audio = reading.result()
        if batch and (len(batch) == size or len(audio) != len(batch[0][1])):
            yield [n for n, _ in batch], np.stack([a for _, a in batch])
            batch = []
        batch.append((name, audio))
    yield [n for n, _ in batch], np.stack([a for _, a in batch])


def _embed_batch(hear: HearModel, task: Task, names: list[str], audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Call the HEAR functions and check what they return: float32 (clips, rows, dim) and timestamps in ms."""
    tensor = torch.from_numpy(audio).to(hear.device)
    kind = "timestamp" if task.event else "scene"
    function = f"{hear.module.__name__}.get_{kind}_embeddings"
    with torch.no_grad():
        returned = getattr(hear.module, f"get_{kind}_embeddings")(tensor, hear.model)
    times = np.zeros((len(names), 1), np.float32)
    if task.event:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise HearSsamError(f"{function} must return a pair, embeddings and timestamps.")
        returned, stamps = returned
        times = stamps.detach().cpu().numpy()
    embedded = returned.detach().cpu().numpy()
    size = getattr(hear.model, f"{kind}_embedding_size")
    expected = (len(names), times.shape[-1], size) if task.event else (len(names), size)
    if embedded.shape != expected or times.shape[0] != len(names):
        raise HearSsamError(
            f"{function} returned embeddings {embedded.shape}"
            + (f" and timestamps {times.shape}" if task.event else "")
            + f" for {len(names)} clips; expected {expected} with {kind}_embedding_size={size}."
        )
    if task.event:
        _check_timestamps(times, audio.shape[1] / hear.sample_rate, function)
    finite = np.isfinite(embedded).reshape(len(names), -1).all(1)
    if not finite.all():
        bad = names[int(finite.argmin())]
        raise HearSsamError(f"{function} returned NaN or infinite values for the clip {bad} of the task {task.name}.")
    return embedded.astype(np.float32, copy=False).reshape(len(names), -1, size), times


def _check_timestamps(times: np.ndarray, seconds: float, function: str) -> None:
    """Timestamps must grow and lie within the audio; a whole clip below its length in seconds means a wrong unit."""
    if not (np.diff(times, axis=1) > 0).all():
        raise HearSsamError(f"{function} returned timestamps that do not increase.")
    span = f"{function} returned timestamps from {times.min():g} to {times.max():g} for {seconds:g} s of audio"
    if times.shape[1] > 2 and times.max() <= seconds:
        raise HearSsamError(f"{span}; they must be milliseconds.")
    if times.min() < 0 or times.max() > seconds * 1000 + 1:
        raise HearSsamError(f"{span}; they must lie within the audio.")


def frame_labels(events: Sequence[Mapping[str, Any]], timestamps: np.ndarray) -> list[list[Any]]:
    """Labels active at each timestamp t (ms): those of events with start ≤ t < end + 0.0001."""
    timestamps = np.asarray(timestamps, np.float64)
    frames: list[list[Any]] = [[] for _ in timestamps]
    for event in events:
        active = (event["start"] <= timestamps) & (timestamps < event["end"] + 0.0001)
        for frame in np.flatnonzero(active):
            if event["label"] not in frames[frame]:
                frames[frame].append(event["label"])
    return frames
