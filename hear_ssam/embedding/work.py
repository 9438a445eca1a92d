"""Recordings → Parquet rows: what one worker of `hear-ssam embed` does with a batch of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import HearSsamError, about
from ..hear import HearModel
from ..machine import Cluster, usable_cpus, work_ahead
from ..options import pick_device
from . import clips
from .inputs import Recording

KINDS = {"both": ("scene", "timestamps"), "scene": ("scene",), "timestamps": ("timestamps",)}
ELSEWHERE = ("model", "device", "cache")  # options of `load_model` that change no row, or say what `made` says
BATCH = {"cpu": (16, 4 << 20)}  # recordings, and bytes of them, that a worker takes at once
GPU_BATCH = (1024, 64 << 20)  # so that windows of one length are many; a call costs what hundreds of windows do
CHUNK = 512  # rows of a long recording that are made into a table at once


@dataclass(frozen=True)
class Options:
    """What decides the rows, beside the weights."""

    kind: str = "both"  # a key of KINDS
    window: float = 0.0  # seconds; 0: whole recordings
    hop: float = 0.0  # seconds
    dtype: str = "float32"  # or float16
    model_options: dict[str, Any] = field(default_factory=dict)  # what `load_model` was given

    def __post_init__(self) -> None:
        window, hop = self.window, self.hop
        if hop and not window:
            raise HearSsamError(f"--hop {hop:g}: of no use without --window; add it.")
        if (window or hop) and not (0.02 <= window <= 600 and 0.001 <= hop <= 600):
            given = f"--window {window:g} --hop {hop:g}"
            raise HearSsamError(f"{given}: take seconds, windows from 0.02 to 600, hops from 0.001 to 600.")

    def schema(self, model: HearModel) -> pa.Schema:
        """The columns of the rows, and in the metadata all that made them."""
        widths = {"scene": model.scene_embedding_size, "timestamps": model.timestamp_embedding_size}
        first, *others = {widths[part] for part in (("scene",) if self.window else KINDS[self.kind])}
        columns = {"path": pa.string(), "start_ms": pa.float64()}
        if self.window:
            columns["end_ms"] = pa.float64()
        columns |= {"model": pa.string(), "checkpoint_sha256": pa.string()}
        columns["embedding"] = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), -1 if others else first)
        return pa.schema(columns, {"hear_ssam": json.dumps(self.made(model)), "folder": os.fsencode(os.getcwd())})

    def made(self, model: HearModel) -> dict[str, Any]:
        """Everything that decides the rows, and the version of this package."""
        found = {"version": __version__, "model": model.name, "checkpoint_sha256": model.checkpoint_sha256}
        if model.config:
            found |= {"token_order": model.config.token_order, "pooling": model.config.pooling}
        options = {name: value for name, value in self.model_options.items() if name not in ELSEWHERE}
        return found | asdict(self) | {"model_options": options}


class Result(NamedTuple):
    """One recording: its rows, to be read once, or why there are none."""

    recording: Recording
    tables: Iterable[pa.Table] = ()
    error: Exception | None = None


class Worker:
    """Called with a batch of recordings it gives a `Result` for each; may be called from several threads.

    `scratch` is a folder for the rows of long recordings, which are given when all are known; None: that of the system.
    """

    def __init__(self, model: HearModel, options: Options, scratch: str | os.PathLike[str] | None = None) -> None:
        model.check_weights()
        self.model, self.options = model, options
        # Rows (n, E) that wait in a file without a name, and in memory while it is small.
        place = scratch and os.fspath(scratch)
        self.file = functools.partial(tempfile.SpooledTemporaryFile, 1 << 20, prefix=".", dir=place)
        self.schema = options.schema(model)
        self.parts = ("scene",) if options.window else KINDS[options.kind]
        self.most = clips.LONG * model.sample_rate
        # On a GPU one batch at a time: it fills the device, while the other threads decode the next ones.
        self.turn: Any = contextlib.nullcontext() if model.device.type == "cpu" else threading.Lock()

    def __call__(self, batch: Sequence[Recording]) -> list[Result]:
        """A recording that trips over a defect spoils no other."""
        results: dict[str, Result] = {}
        windows: dict[str, list[tuple[float, float]]] = defaultdict(list)  # from and to, in milliseconds
        files: dict[str, IO[bytes]] = defaultdict(self.file)  # of the scenes of windows

        def pieces() -> Iterator[tuple[Recording, float, Tensor]]:
            """What is embedded together: from so many ms, (samples,); long recordings are embedded on the way."""
            for recording in batch:
                try:
                    for start, audio in self._cut(recording):
                        if not self.options.window and len(audio) > self.most:
                            results[recording.name] = Result(recording, self._long(recording))
                            break
                        yield recording, start, self.model.check_samples(torch.from_numpy(audio))[0]
                except Exception as error:
                    results[recording.name] = Result(recording, error=error)

        limit = self.most * (1 if self.model.device.type == "cpu" else 32)
        for group in clips.grouped(pieces(), lambda piece: len(piece[-1]), limit):
            for (recording, start, clip), found in zip(group, self._embed([clip for *_, clip in group]), strict=True):
                if isinstance(found, Exception):
                    results[recording.name] = Result(recording, error=found)
                elif self.options.window:
                    windows[recording.name].append((start, start + 1000 * len(clip) / self.model.sample_rate))
                    files[recording.name].write(found[0].tobytes())
                else:
                    results[recording.name] = Result(recording, [self._whole(recording, len(clip), *found)])
        for recording in batch:
            if recording.name not in results:
                starts, ends = map(list, zip(*windows[recording.name], strict=True))
                results[recording.name] = Result(recording, self._kept(recording, files[recording.name], starts, ends))
        return [results[recording.name] for recording in batch]

    def _cut(self, recording: Recording) -> Iterator[tuple[float, np.ndarray]]:
        """The clips that rows are made of: the recording, or windows of it, and where they start in milliseconds."""
        rate = self.model.sample_rate
        if not self.options.window:
            yield 0.0, recording.read(rate, self.most)
            return
        window, hop = (max(1, round(seconds * rate)) for seconds in (self.options.window, self.options.hop))
        for start, audio in cut_windows(recording.blocks(rate), window, hop, self.model.min_samples):
            yield 1000 * start / rate, audio

    def _embed(self, audio: Sequence[Tensor]) -> Sequence[tuple[np.ndarray, np.ndarray] | Exception]:
        """Scene (E',) and timestamp embeddings (T, E) of clips; one by one where together they fail."""
        try:
            with self.turn:
                scenes, rows = zip(*clips.embed_clips(self.model, audio), strict=True)
                sizes = [len(own) * ("timestamps" in self.parts) for own in rows]  # what nobody wants stays there
                back = torch.cat([own[:size] for own, size in zip(rows, sizes, strict=True)]).cpu().split(sizes)
                return [*zip(torch.stack(scenes).cpu().numpy(), (own.numpy() for own in back), strict=True)]
        except Exception as error:
            return [error] if len(audio) == 1 else [found for clip in audio for found in self._embed([clip])]

    def _whole(self, recording: Recording, size: int, scene: np.ndarray, rows: np.ndarray) -> pa.Table:
        """The rows of a recording of `size` samples."""
        scenes, times = scene[None][: "scene" in self.parts], self.model.timestamps(size).tolist()[: len(rows)]
        return self._columns(recording, [None] * len(scenes) + times, [scenes, rows])

    def _kept(
        self, recording: Recording, file: IO[bytes], starts: list[float], ends: list[float] | None = None
    ) -> Iterator[pa.Table]:
        """Tables of the rows in such a file, a few rows at a time."""
        with file:
            size = file.tell() // max(1, len(starts))  # bytes of a row
            file.seek(0)
            for first in range(0, len(starts), CHUNK):
                part = slice(first, first + CHUNK)
                values = np.frombuffer(file.read(size * CHUNK), np.float32).reshape(len(starts[part]), -1)
                yield self._columns(recording, starts[part], [values], ends and ends[part])

    def _long(self, recording: Recording) -> Iterable[pa.Table]:
        """The rows of a long recording, computed now."""
        file, rate = self.file(), self.model.sample_rate
        keep = file.write if "timestamps" in self.parts else len
        scene, size = clips.embed_long(
            self.model, lambda: recording.blocks(rate), lambda rows: keep(rows.cpu().numpy().tobytes())
        )
        times = self.model.timestamps(size).tolist() if "timestamps" in self.parts else []
        first = [self._columns(recording, [None], [scene.cpu().numpy()[None]])] if "scene" in self.parts else []
        return itertools.chain(first, self._kept(recording, file, times))

    def _columns(
        self, recording: Recording, starts: list[Any], rows: Sequence[np.ndarray], ends: list[float] | None = None
    ) -> pa.Table:
        """A table of rows (n, E), which may differ in width from array to array; the schema makes equal ones fixed."""
        values = np.concatenate([part.ravel() for part in rows]).astype(self.options.dtype, copy=False)
        sizes = np.concatenate([np.full(len(part), part.shape[1]) for part in rows])
        embeddings = pa.ListArray.from_arrays(np.concatenate([[0], sizes.cumsum()]).astype(np.int32), values)
        every = {"path": recording.label, "model": self.model.name, "checkpoint_sha256": self.model.checkpoint_sha256}
        columns: dict[str, Any] = {name: [value] * len(starts) for name, value in every.items()}
        columns |= {"start_ms": starts, "end_ms": ends, "embedding": embeddings}
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def cut_windows(blocks: Iterable[np.ndarray], window: int, hop: int, least: int) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of audio that comes in blocks, all in samples: where each starts, and its samples.

    One begins every `hop` until one reaches the end; that one ends with the audio, and is left out below `least`
    samples where it is not the only one.
    """
    held, base, at, reached = np.zeros(0, np.float32), 0, 0, 0
    for block in blocks:
        held = np.concatenate([held, block])
        while base + len(held) >= at + window:
            yield at, held[at - base : at - base + window]
            at, reached = at + hop, at + window
        gone = min(len(held), at - base)
        held, base = held[gone:], base + gone
    if not reached or (base + len(held) > reached and base + len(held) - at >= least):
        yield at, held[at - base :]


def share_cpus(recordings: Iterable[Recording], wanted: int | None = None) -> int:
    """How many threads should embed them, `wanted` at most; torch is told what share of the CPUs each of them has."""
    workers = wanted or usable_cpus()
    workers = max(1, min(workers, len(recordings) if isinstance(recordings, list) else workers))
    torch.set_num_threads(max(1, usable_cpus() // workers))
    return workers


def embed_all(
    recordings: Iterable[Recording], worker: Worker, workers: int, skipped: list[str],
    tick: Callable[[], object] = lambda: None, cluster: Cluster | None = None,
) -> Generator[Iterable[pa.Table], None, None]:  # fmt: skip
    """The rows of each recording, by `workers` threads in their order, or by a cluster as they are finished.

    What cannot be embedded is named on stderr and added to `skipped`. `tick` is called with each, and every second.
    """
    total = len(recordings) if isinstance(recordings, list) else None
    device = cluster.device if cluster else worker.model.device.type
    workers = len(cluster.places(device)) if cluster else workers
    most, size = BATCH.get(device, GPU_BATCH)
    most = min(most, -(-total // workers)) if total else most
    batches = clips.grouped(recordings, lambda recording: recording.bytes, size, most)
    if cluster:
        build = functools.partial(_far_worker, worker.model, worker.options)
        outcomes = cluster.work(build, batches, device, 1 if device == "cpu" else 4, tick)
    else:
        outcomes = work_ahead(worker, batches, workers, workers + 1)
    with contextlib.closing(outcomes), tqdm(total=total, unit="file", disable=None) as bar:
        for batch, outcome in outcomes:
            while wait([outcome], 1.0).not_done:
                tick()
            try:
                results = outcome.result()
            except HearSsamError as error:  # of a cluster: nothing is known but that the batch is lost
                results = [Result(recording, error=error) for recording in batch]
            for recording, tables, problem in results:
                bar.update()
                if problem:
                    bar.write(f"skipped {about(recording.name, problem)}", file=sys.stderr)
                    skipped.append(recording.name)
                else:
                    yield tables
                tick()


def _far_worker(model: HearModel, options: Options, device: str) -> Callable[[Sequence[Recording]], list[Result]]:
    """A `Worker` in a process of a cluster, whose results travel."""
    worker = Worker(model.to(pick_device(device)), options)

    def work(batch: Sequence[Recording]) -> list[Result]:
        return [
            Result(recording._replace(decode=None), list(tables), error and about(recording.name, error))
            for recording, tables, error in worker(batch)
        ]

    return work
