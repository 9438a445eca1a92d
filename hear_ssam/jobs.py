"""Trainings of the probe, each a job in a process of its own; the records that they leave.

Every finished job is appended to the store at once, so that an interruption loses only what is running.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from collections.abc import Iterator, Mapping, MutableSequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from . import __version__
from .errors import HearSsamError
from .paths import atomic_write
from .records import Record, append, finite, predictions_file
from .tasks import Task, read_task

if TYPE_CHECKING:
    from .probe import ProbeResult


@dataclass(frozen=True)
class Job:
    """One task and model, and the seeds to train together: everything that a worker process needs."""

    source_folder: Path
    identity: dict[str, Any]  # the fields of a record's key that all seeds share
    seeds: tuple[int, ...]
    device: str
    results_dir: Path
    commit: str | None
    heads: int = 1  # that it trains, for the progress bar

    @property
    def label(self) -> str:
        seeds = f"seeds {self.seeds[0]}-{self.seeds[-1]}" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return f"{self.identity['model']}, {self.identity['task']}, {seeds}"

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
    with tqdm(total=sum(job.heads for job in jobs), desc="probe", unit="head", disable=None) as bar:
        while waiting:
            for job in _run_pool(waiting, store, workers, failures, bar):
                if _run_pool(deque([job]), store, 1, failures, bar):
                    failures[job.label] = "the process was killed (out of memory?)"
                    bar.update(job.heads)


def _run_pool(
    waiting: deque[Job], store: Path, workers: int, failures: dict[str, str], bar: tqdm[NoReturn]
) -> list[Job]:
    """Run jobs from `waiting` until it is empty or a worker is killed; returns the jobs that died with it."""
    spawn = multiprocessing.get_context("spawn")
    processes, cores = min(workers, len(waiting)), spawn.Semaphore(workers)
    trained = spawn.RawArray("i", len(waiting))  # heads of each job
    shared = (cores, trained)
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker, initargs=shared)
    running: dict[Future[list[Record]], tuple[Job, int]] = {}  # and its place in `trained`
    died: list[Job] = []
    started, ended, broken = 0, bar.n, False
    try:
        while running or (waiting and not broken):
            while waiting and len(running) < processes and not broken:
                try:
                    future = pool.submit(_work, waiting[0], workers, started)
                except BrokenProcessPool:
                    broken = True
                else:
                    running[future] = waiting.popleft(), started
                    started += 1
            for future in wait(running, None if bar.disable else 1, FIRST_COMPLETED).done:
                job, _ = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                    died.append(job)
                    continue
                with noted(job.label, failures):
                    records = future.result()
                    append(store, records)
                    bar.write(f"{job.label}: {_headline(records)}", file=sys.stderr)
                ended += job.heads
            parts = [f"{job.identity['task']} {trained[place]}/{job.heads}" for job, place in running.values()]
            bar.set_postfix_str(", ".join(parts[:4]) + ", ..." * (len(parts) > 4), refresh=False)
            bar.update(ended + sum(trained[place] for _, place in running.values()) - bar.n)
    except BaseException:  # Ctrl-C: what is finished is stored, the rest is dropped at once
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return died


def _headline(records: list[Record]) -> str:
    of_seeds = [r for r in records if r["fold"] is None and r["primary"]]
    scores = ", ".join(str(r["score"]) for r in of_seeds)
    return f"{of_seeds[0]['metric']} {scores} in {sum(r['seconds'] for r in of_seeds):.0f} s"


# of a worker process, shared with the others and with the parent
_cores: contextlib.AbstractContextManager[Any] | None = None
_trained: MutableSequence[int] = []


def _start_worker(cores: contextlib.AbstractContextManager[Any], trained: MutableSequence[int]) -> None:
    """One thread per operation; Ctrl-C is the parent's affair; a worker whose parent was killed ends too."""
    import torch

    global _cores, _trained
    _cores, _trained = cores, trained
    torch.set_num_threads(1)
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep_memory() -> None:
    """Let this process keep what it frees, in one heap: a step of the probe frees and takes megabytes dozens of times.

    glibc would return them to the system, and fetching pages again took a fifth of the time; and it would keep a heap
    for every thread. A no-op elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 1 << 30), (-3, 1 << 30), (-8, 1)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
            set_option(option, value)


def _work(job: Job, workers: int, place: int) -> list[Record]:
    """Train the probes of one job; store their predictions; return their records.

    The fast probe trains heads in threads and every head waits for a core, so the last jobs get the cores of others.
    """
    import torch

    from .embeddings import provenance

    def progress(heads: int) -> None:
        _trained[place] += heads

    started = time.time()
    dtype = torch.float32
    protocol = job.identity["protocol"]
    if job.identity["probe"] == "exact":
        from .probe import run_probe

        results = [run_probe(job.source_folder, protocol, seed, progress) for seed in job.seeds]
    else:
        from .fast_probe import product_dtype, run_fast_probe

        dtype = product_dtype(torch.device(job.device))
        results = run_fast_probe(job.source_folder, protocol, job.seeds, job.device, workers, _cores, progress)
    task, made_by = read_task(job.source_folder), provenance(job.source_folder)
    how = {
        "clips": sum(len(names) for _, names in task.shuffled_clips()),
        "embeddings": {
            **{name: made_by.get(name) for name in ("module", "dim", "device", "dtype", "backend", "seconds")},
            "folder": str(job.source_folder.resolve()),
        },
        "device": job.device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": 1,
        "seconds": round((time.time() - started) / len(results), 3),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"hear_ssam": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "commit": job.commit,
    }
    return [
        record
        for seed, result in zip(job.seeds, results, strict=True)
        for record in _of_seed(task, job.results_dir, {**job.identity, "seed": seed}, result, how)
    ]


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
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
