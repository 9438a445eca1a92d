"""Trainings of the probe, each a job in a process of its own; the records that they leave.

Every finished job is appended to the store at once, so that an interruption loses only what is running.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from .. import __version__
from ..errors import HearSsamError
from ..machine import keep_freed_memory
from ..paths import atomic_write
from .records import Record, append, finite, predictions_file
from .tasks import Task, read_task

if TYPE_CHECKING:
    from .probe import ProbeResult


@dataclass(frozen=True)
class Job:
    """One task, model and seed: everything that a worker process needs."""

    source_folder: Path
    identity: dict[str, Any]  # the fields of a record's key that all records of the job share
    results_dir: Path
    commit: str | None

    @property
    def label(self) -> str:
        return f"{self.identity['model']}, {self.identity['task']}, seed {self.identity['seed']}"

    @property
    def size(self) -> int:
        """Grows with the time that the job takes: bytes to train on, about twice for the folds of a k-fold task."""
        paths = self.source_folder.glob("*.embeddings.npy")
        sizes = {path.name.partition(".")[0]: path.stat().st_size for path in paths}
        return sizes.get("train", 2 * sum(sizes.values()))


@contextlib.contextmanager
def noted(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note an error under `name` and go on; whatever a foreign module raises must not stop the other tasks."""
    try:
        yield
    except Exception as error:
        failures[name] = str(error) if isinstance(error, HearSsamError) else f"{type(error).__name__}: {error}"
        print(f"{name}: {failures[name]}", file=sys.stderr)


def run_jobs(jobs: list[Job], store: Path, workers: int, failures: dict[str, str]) -> None:
    """Run all jobs, each in a process, and append the records of each as soon as it is finished.

    If the system kills a worker, the jobs that were running go down with it and run once more, each alone; then the
    others go on.
    """
    waiting = deque(sorted(jobs, key=lambda job: -job.size))  # longest first, so that no core waits for one at the end
    with tqdm(total=len(jobs), desc="probe", unit="job", disable=None) as bar:
        while waiting:
            for job in _run_pool(waiting, store, workers, failures, bar):
                if _run_pool(deque([job]), store, 1, failures, bar):
                    failures[job.label] = "the process was killed (out of memory?)"
                    bar.update(1)


def _run_pool(
    waiting: deque[Job], store: Path, workers: int, failures: dict[str, str], bar: tqdm[NoReturn]
) -> list[Job]:
    """Run jobs from `waiting` until it is empty or a worker is killed; returns the jobs that died with it."""
    spawn = multiprocessing.get_context("spawn")
    processes = min(workers, len(waiting))
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker)
    running: dict[Future[list[Record]], Job] = {}
    died: list[Job] = []
    broken = False
    try:
        while running or (waiting and not broken):
            while waiting and len(running) < processes and not broken:
                try:
                    future = pool.submit(_work, waiting[0])
                except BrokenProcessPool:
                    broken = True
                else:
                    running[future] = waiting.popleft()
            for future in wait(running, None, FIRST_COMPLETED).done:
                job = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                    died.append(job)
                    continue
                with noted(job.label, failures):
                    records = future.result()
                    append(store, records)
                    bar.write(f"{job.label}: {_headline(records)}", file=sys.stderr)
                bar.update(1)
    except BaseException:  # Ctrl-C: what is finished is stored, the rest is dropped at once
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return died


def _headline(records: list[Record]) -> str:
    """The score that leads, and what it took."""
    last = records[-1]
    return f"{last['metric']} {last['score']} in {last['seconds']:.0f} s"


def _start_worker() -> None:
    """One thread per operation; Ctrl-C is the parent's affair; a worker whose parent was killed ends too."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> list[Record]:
    """Train the probes of one job; store their predictions; return their records."""
    import torch

    from .embeddings import provenance
    from .probe import run_probe

    started, bf16 = time.time(), job.identity["probe"] == "bf16"
    result = run_probe(job.source_folder, job.identity["protocol"], job.identity["seed"], bf16=bf16)
    task, made_by = read_task(job.source_folder), provenance(job.source_folder)
    how = {
        "clips": sum(len(names) for _, names in task.shuffled_clips()),
        "embeddings": {
            **{name: made_by.get(name) for name in ("module", "dim", "device", "dtype", "backend", "seconds")},
            "folder": str(job.source_folder.resolve()),
        },
        "device": "cpu",
        "dtype": "bfloat16" if bf16 else "float32",
        "threads": 1,
        "seconds": round(time.time() - started, 3),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"hear_ssam": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "commit": job.commit,
    }
    return _of_seed(task, job.results_dir, job.identity, result, how)


def _of_seed(
    task: Task, results_dir: Path, identity: dict[str, Any], result: ProbeResult, how: Mapping[str, Any]
) -> list[Record]:
    """Store what one seed predicted; its records: every score per fold and their mean."""
    import numpy as np

    from .scores import aggregate_folds

    arrays = {"labels": np.array(task.labels), "histories": np.array(json.dumps(result.histories))}
    if not task.event:  # frames of long recordings would fill the disk
        arrays |= {f"{f.fold}/{kind}": getattr(f, kind) for f in result.folds for kind in ("prediction", "target")}
    with atomic_write(predictions_file(results_dir, identity)) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    common = {"grid_point": asdict(result.config), **how}
    records = []
    for fold in result.folds:
        detail = {"epoch": fold.epoch, "validation_score": finite(fold.validation_score), "loss": finite(fold.loss)}
        name = fold.fold if len(result.folds) > 1 else None
        records += _records(identity, task, name, fold.scores, {**detail, **common})
    if len(result.folds) > 1:
        records += _records(identity, task, None, aggregate_folds([fold.scores for fold in result.folds]), common)
    return sorted(records, key=lambda r: r["fold"] is None and r["primary"])  # what says "done" comes last


def _records(
    identity: Mapping[str, Any], task: Task, fold: str | None, scores: Mapping[str, float], details: Mapping[str, Any]
) -> list[Record]:
    from .scores import named_score

    return [
        {
            **identity,
            "fold": fold,
            "metric": metric,
            "score": finite(score),
            "primary": metric == task.scores[0],
            "maximize": next(named_score(name).maximize for name in task.scores if metric.startswith(name)),
            **details,
        }
        for metric, score in scores.items()
    ]


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, None for an installed one."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
