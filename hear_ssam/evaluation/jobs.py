"""Trainings of the probe, each a job in a process of its own; the records that they leave.

Every finished job is appended to the store at once, so that an interruption loses only what is running.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .. import __version__
from ..errors import HearSsamError
from ..machine import Cluster, keep_freed_memory
from ..paths import atomic_write
from .records import Record, append, make_records, predictions_file

if TYPE_CHECKING:
    from .rows import Rows
    from .tasks import Task

HEADS = ("exact", "bf16")  # the probes that train heareval's heads; all others are quick


@dataclass(frozen=True)
class Job:
    """One task, model and seed: everything that a worker process needs."""

    source_folder: Path
    identity: dict[str, Any]  # the fields of a record's key that all records of the job share
    results_dir: Path

    @property
    def label(self) -> str:
        model, task, probe, seed = (self.identity[name] for name in ("model", "task", "probe", "seed"))
        return f"{model}, {task}, seed {seed}{'' if probe == 'exact' else f', {probe}'}"

    @property
    def size(self) -> float:
        """Grows with the time that the job takes: bytes to train on, about twice for the folds of a k-fold task.

        Quick probes come first: their results are there while the others run.
        """
        if self.identity["probe"] not in HEADS:
            return math.inf
        paths = self.source_folder.glob("*.embeddings.npy")
        sizes = {path.name.partition(".")[0]: path.stat().st_size for path in paths}
        return sizes.get("train", 2 * sum(sizes.values()))


@contextlib.contextmanager
def noted(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note an error under `name` and go on; whatever a foreign module raises must not stop the other tasks."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, HearSsamError) else f"{type(error).__name__}: {error}"
        failures[name] = text.removeprefix(f"{name}: ")
        print(f"{name}: {failures[name]}", file=sys.stderr)


def run_jobs(
    jobs: Sequence[Job], store: Path, workers: int, failures: dict[str, str], cluster: Cluster | None = None
) -> None:
    """Run all jobs, each in a process, here or on a cluster, and append the records of each as soon as it is finished.

    Raises HearSsamError where no worker lives long enough to take a job.
    """
    longest_first = sorted(jobs, key=lambda job: -job.size)  # so that no core waits for one at the end
    outcomes = cluster.work(_far_worker, longest_first, "cpu") if cluster else _work_here(longest_first, workers)
    with contextlib.closing(outcomes), tqdm(total=len(jobs), desc="probe", unit="job", disable=None) as bar:
        for job, outcome in outcomes:
            with noted(job.label, failures):
                records = outcome.result()
                append(store, records)
                last = records[-1]  # the score that leads
                bar.write(f"{job.label}: {last['metric']} {last['score']} in {last['seconds']:.0f} s", file=sys.stderr)
            bar.update(1)


def _work_here(
    jobs: Sequence[Job], workers: int, again: bool = False
) -> Generator[tuple[Job, Future[list[Record]]], None, None]:
    """Each job with its finished future, from a process. One whose process dies runs once more, alone, at the end:
    not where another process may have died of the same."""
    spawn = multiprocessing.get_context("spawn")
    watched, leash = spawn.Pipe(duplex=False)  # processes end when this end of it closes, however that happens
    start = functools.partial(ProcessPoolExecutor, 1, spawn, _start_worker, (watched,))
    free = [start() for _ in range(min(workers, len(jobs)))]
    waiting, lost = deque(jobs), []
    running: dict[Future[list[Record]], tuple[ProcessPoolExecutor, Job]] = {}
    with leash, watched:
        try:
            while waiting or running:
                while waiting and free:
                    pool, job = free.pop(), waiting.popleft()
                    running[pool.submit(_work, job)] = pool, job
                for future in wait(running, None, FIRST_COMPLETED).done:
                    pool, job = running.pop(future)
                    if not isinstance(future.exception(), BrokenProcessPool):
                        free.append(pool)
                        yield job, future
                        continue
                    pool.shutdown()
                    free.append(start())
                    lost.append(job)
                    if again and free[-1].submit(os.getpid).exception():
                        needs = "a script needs its calls of run_evaluation below `if __name__ == '__main__':`"
                        raise HearSsamError(f"workers of the probe do not start: {needs}, and memory for torch.")
        except BaseException:  # Ctrl-C: what is finished is stored, the rest is dropped at once
            leash.close()
            raise
        finally:
            for pool in [*free, *(pool for pool, _ in running.values())]:
                pool.shutdown(cancel_futures=True)
    for job in lost:
        if not again:
            yield from _work_here([job], 1, again=True)
            continue
        future = Future()
        reason = "its process was killed or crashed (out of memory?); run again what is missing"
        future.set_exception(HearSsamError(reason))
        yield job, future


def _far_worker(_: str) -> Callable[[Job], list[Record]]:
    return _work


def _start_worker(leash: Connection) -> None:
    """Ctrl-C is the parent's affair; a worker whose parent is gone or lets go ends too."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            leash.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(1)  # seeds of one task follow each other
def _opened(folder: Path) -> tuple[Task, dict[str, Rows]]:
    from .rows import open_embeddings

    return open_embeddings(folder)


def _work(job: Job) -> list[Record]:
    """Train the probes of one job; store their predictions; return their records."""
    import numpy as np
    import torch

    from .embeddings import given_origin, provenance

    began, probe = time.time(), job.identity["probe"]
    task, splits = _opened(job.source_folder)
    histories: list[list[dict[str, float]]] = []  # of the heads
    config: dict[str, Any] = {}
    if probe in HEADS:
        from .probe import probe_task

        result = probe_task(task, splits, job.identity["protocol"], job.identity["seed"], bf16=probe == "bf16")
        folds, histories, config = result.folds, result.histories, {"grid_point": asdict(result.config)}
    else:
        from .quick import quick_probe

        folds = quick_probe(task, splits, probe, job.identity["seed"])
    arrays = {"labels": np.array(task.labels), "histories": np.array(json.dumps(histories))}
    if not task.event:  # frames of long recordings would fill the disk
        arrays |= {f"{f.fold}/{kind}": getattr(f, kind) for f in folds for kind in ("prediction", "target")}
    with atomic_write(predictions_file(job.results_dir, job.identity)) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    made_by = provenance(job.source_folder)
    embeddings = {name: made_by.get(name) for name in ("dim", "device", "dtype", "backend", "seconds")}
    common = {
        **config,
        **{name: task.metadata[name] for name in ("limit",) if name in task.metadata},
        "clips": sum(len(names) for _, names in task.shuffled_clips()),
        "embeddings": {**given_origin(task), **embeddings, "folder": str(job.source_folder.resolve())},
        "device": "cpu", "dtype": "bfloat16" if probe == "bf16" else "float32", "threads": 1,
        "seconds": round(time.time() - began, 3),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"hear_ssam": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "commit": git_commit(),
    }  # fmt: skip
    return make_records(job.identity, task, folds, common)


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, None for an installed one."""
    root = Path(__file__).resolve().parent.parent.parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
