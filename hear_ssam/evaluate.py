"""The driver: embeddings of a HEAR module once, then the probe for every task and seed, then a table.

Stage one and stage two meet in folders of heareval's layout, so either can be heareval's own. Jobs (task, seed) run
in parallel processes with one thread each; every finished job is a record on disk, and a rerun does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import __version__
from .errors import HearSsamError, unknown_name
from .paths import atomic_write
from .records import STORE, Record, append, embeddings_folder, finite, key_of, predictions_file, read
from .tables import Options, terminal
from .tasks import Task, find_tasks, known_tasks, read_task

if TYPE_CHECKING:
    from .embeddings import HearModel

PROBE = "exact"
EXISTING = ("only-missing", "always", "never")
EXAMPLES = """examples:
  hear-ssam evaluate --tasks-dir tasks --results-dir results
  hear-ssam evaluate --tasks-dir tasks --results-dir results --tasks esc50-v2.0.0-full --protocol ssam
  hear-ssam evaluate --model-options '{"model": "logmel"}' --tasks-dir tasks --results-dir results
  hear-ssam evaluate hearbaseline.naive --tasks-dir tasks --results-dir results --resample
  hear-ssam evaluate --embeddings-dir embeddings/hearbaseline --results-dir results     embeddings made by heareval
"""


@dataclass(frozen=True)
class Source:
    """The embeddings of one task by one model."""

    task: Task
    model: str
    checkpoint_sha256: str
    folder: Path  # in heareval's layout
    make: Callable[[], object]  # makes the folder, or raises where it is not finished

    def key(self, protocol: str, seed: int) -> tuple[Any, ...]:
        """Key of the record that says that a job is done."""
        task = (self.task.name, self.task.version)
        return (self.model, self.checkpoint_sha256, *task, protocol, PROBE, seed, None, self.task.scores[0])


@dataclass(frozen=True)
class Job:
    """One task and seed for one model: everything that a worker process needs."""

    source_folder: Path
    identity: dict[str, Any]  # the fields of a record's key that are common to the job
    predictions: Path  # where per-clip predictions go
    commit: str | None

    @property
    def label(self) -> str:
        return f"{self.identity['task']}, seed {self.identity['seed']}"


@dataclass(frozen=True)
class Evaluation:
    """What a run leaves: all records of its models, tasks and protocol, and what failed (name → reason)."""

    records: list[Record]
    failures: dict[str, str]


def run_evaluation(
    module: str = "hear_ssam",
    model: str = "",
    model_options: Mapping[str, Any] | None = None,
    *,
    results_dir: Path,
    tasks_dir: Path | None = None,
    embeddings_dir: Path | None = None,
    tasks: Sequence[str] = (),
    protocol: str = "heareval",
    seeds: int | None = None,
    existing: str = "only-missing",
    workers: int | None = None,
    resample: bool = False,
) -> Evaluation:
    """Judge a HEAR module on the tasks in `tasks_dir`, or finished embeddings in `embeddings_dir`.

    `seeds` counts probe seeds (default: the protocol's own). `existing` says what happens to results that are already
    in `results_dir`: only-missing runs the rest, always runs everything again, never treats them as an error.
    A task that fails is named in `failures` and does not stop the others. Jobs run in spawned processes: a script that
    calls this needs the usual `if __name__ == "__main__"`.
    """
    from .embeddings import load_hear_model
    from .probe import named_protocol

    if existing not in EXISTING:
        raise unknown_name("policy for existing results", existing, EXISTING)
    if (tasks_dir is None) == (embeddings_dir is None):
        raise HearSsamError("say either where the tasks are (--tasks-dir) or the embeddings (--embeddings-dir).")
    plan = named_protocol(protocol)
    count = plan.seeds if seeds is None else seeds
    if count < 1:
        raise HearSsamError(f"--seeds must be at least 1, not {count}.")
    seed_range = range(plan.first_seed, plan.first_seed + count)
    failures: dict[str, str] = {}
    store = results_dir / STORE
    with _only_driver(results_dir):
        if embeddings_dir:
            sources = _given_sources(embeddings_dir, tasks, failures)
        else:
            assert tasks_dir is not None
            folders = find_tasks(tasks_dir, tasks, unpack_to=results_dir / "tasks")
            hear = load_hear_model(module, model, model_options)
            sources = _module_sources(hear, folders, results_dir, resample, failures)
        done = {key_of(record) for record in read(store)} if store.exists() else set()
        missing = {
            source.task.name: [seed for seed in seed_range if source.key(protocol, seed) not in done]
            for source in sources
        }
        if existing == "never" and (kept := [name for name, todo in missing.items() if len(todo) < count]):
            raise HearSsamError(f"{store} has results of {', '.join(kept)} already (--existing never).")
        jobs, commit = [], _git_commit()
        for source in tqdm(sources, desc="tasks", unit="task", disable=None, leave=False):
            if existing == "always":
                missing[source.task.name] = list(seed_range)
            if missing[source.task.name]:
                with _named(source.task.name, failures):
                    source.make()
                    jobs += [_job(source, protocol, seed, results_dir, commit) for seed in missing[source.task.name]]
        _run_jobs(jobs, store, workers or os.cpu_count() or 1, failures)
        wanted = {source.key(protocol, seed)[:7] for source in sources for seed in seed_range}
        records = [r for r in read(store) if key_of(r)[:7] in wanted] if store.exists() else []
    return Evaluation(records, failures)


@contextlib.contextmanager
def _only_driver(results_dir: Path) -> Iterator[None]:
    """Hold a lock on a results folder; the system lets go of it however the process ends."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        file = open(results_dir / ".lock", "w")
    except OSError as error:
        raise HearSsamError(f"cannot write to {results_dir}: {error.strerror}.") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows, where users must take care themselves
            pass
        except BlockingIOError:
            raise HearSsamError(f"another evaluation writes to {results_dir}; wait or choose another folder.") from None
        yield


@contextlib.contextmanager
def _named(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Note an error under `name` and go on; whatever a foreign module raises must not stop the other tasks."""
    try:
        yield
    except Exception as error:
        failures[name] = str(error) if isinstance(error, HearSsamError) else f"{type(error).__name__}: {error}"
        print(f"{name}: {failures[name]}", file=sys.stderr)


def _module_sources(
    hear: HearModel, folders: Sequence[Path], results_dir: Path, resample: bool, failures: dict[str, str]
) -> list[Source]:
    from .embeddings import embed_task

    sources = []
    for folder in folders:
        with _named(folder.name, failures):
            task = read_task(folder)
            _warn(task)
            target = embeddings_folder(results_dir, hear.name, hear.checkpoint_sha256, folder.name)
            make = functools.partial(embed_task, hear, folder, target, resample=resample)
            sources.append(Source(task, hear.name, hear.checkpoint_sha256, target, make))
    return sources


def _warn(task: Task) -> None:
    """Say on stderr what makes the scores of a task something else than HEAR scores."""
    if card := known_tasks().get(task.name):
        for difference in card.differences(task):
            print(f"{task.name} is not as HEAR released it: {difference}.", file=sys.stderr)
    for split, labels in task.absent_classes().items():
        print(
            f"{task.name}: {split} has no clip of {', '.join(labels)}; "
            "mAP counts that as 0, d_prime and aucroc are undefined there.",
            file=sys.stderr,
        )


def _given_sources(embeddings_dir: Path, names: Sequence[str], failures: dict[str, str]) -> list[Source]:
    from .embeddings import provenance, require_done

    sources = []
    for folder in find_tasks(embeddings_dir, names):
        with _named(folder.name, failures):
            made_by = provenance(folder)
            model, digest = made_by.get("model", embeddings_dir.resolve().name), made_by.get("checkpoint_sha256", "")
            sources.append(Source(read_task(folder), model, digest, folder, functools.partial(require_done, folder)))
    return sources


# ---- jobs ----------------------------------------------------------------------------------------------------------


def _job(source: Source, protocol: str, seed: int, results_dir: Path, commit: str | None) -> Job:
    identity = {
        "model": source.model,
        "checkpoint_sha256": source.checkpoint_sha256,
        "task": source.task.name,
        "version": source.task.version,
        "protocol": protocol,
        "probe": PROBE,
        "seed": seed,
    }
    return Job(source.folder, identity, predictions_file(results_dir, identity), commit)


def _run_jobs(jobs: list[Job], store: Path, workers: int, failures: dict[str, str]) -> None:
    """Run all jobs, each in a process with one thread, and append the records of each as soon as it is finished.

    If the system kills a worker, the jobs that went down with it run once more, one process for each.
    """
    died = _run_pool(jobs, store, workers, failures) if jobs else []
    for job in died:
        if _run_pool([job], store, 1, failures):
            failures[job.label] = "the process was killed (out of memory?)"


def _run_pool(jobs: list[Job], store: Path, workers: int, failures: dict[str, str]) -> list[Job]:
    """Returns the jobs that died with a killed worker."""
    died = []
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        futures = {pool.submit(_work, job): job for job in jobs}
        with tqdm(total=len(jobs), desc="probe", unit="job", disable=None) as bar:
            for future in as_completed(futures):
                job = futures[future]
                if isinstance(future.exception(), BrokenProcessPool):
                    died.append(job)
                    continue
                with _named(job.label, failures):
                    records = future.result()
                    append(store, records)
                    bar.write(f"{job.label}: {_headline(records)}", file=sys.stderr)
                bar.update()
    except BaseException:  # Ctrl-C: what is finished is stored, the rest is dropped at once
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return died


def _headline(records: list[Record]) -> str:
    record = next(r for r in records if r["fold"] is None and r["primary"])
    return f"{record['metric']} {record['score']} in {record['seconds']:.0f} s"


def _start_worker() -> None:
    """One thread per process; Ctrl-C is the parent's affair; a worker whose parent was killed ends too."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> list[Record]:
    """Run one probe; store its predictions; return its records: every score per fold and their mean."""
    import numpy as np
    import torch

    from .embeddings import provenance
    from .probe import run_probe
    from .scores import aggregate_folds

    started = time.time()
    task = read_task(job.source_folder)
    result = run_probe(job.source_folder, job.identity["protocol"], job.identity["seed"])
    arrays = {"labels": np.array(task.labels), "histories": np.array(json.dumps(result.histories))}
    if not task.event:  # frames of long recordings would fill the disk
        arrays |= {f"{f.fold}/{kind}": getattr(f, kind) for f in result.folds for kind in ("prediction", "target")}
    with atomic_write(job.predictions) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    made_by = provenance(job.source_folder)
    common = {
        "clips": sum(len(names) for _, names in task.shuffled_clips()),
        "grid_point": asdict(result.config),
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "embeddings": {name: made_by.get(name) for name in ("module", "dim", "device", "dtype", "backend", "seconds")},
        "seconds": round(time.time() - started, 3),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"hear_ssam": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "commit": job.commit,
    }
    records = []
    for fold in result.folds:
        detail = {"epoch": fold.epoch, "validation_score": finite(fold.validation_score), "loss": finite(fold.loss)}
        name = fold.fold if len(result.folds) > 1 else None
        records += _records(job, task, name, fold.scores, {**detail, **common})
    if len(result.folds) > 1:
        records += _records(job, task, None, aggregate_folds([fold.scores for fold in result.folds]), common)
    return records


def _records(
    job: Job, task: Task, fold: str | None, scores: Mapping[str, float], details: Mapping[str, Any]
) -> list[Record]:
    from .scores import named_score

    return [
        {
            **job.identity,
            "fold": fold,
            "metric": metric,
            "score": finite(score),
            "primary": metric == task.scores[0],
            "maximize": next(named_score(name).maximize for name in task.scores if metric.startswith(name)),
            **details,
        }
        for metric, score in scores.items()
    ]


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, None for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


# ---- the command ---------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="judge a HEAR module on HEAR tasks with the linear-probe protocol",
        description="Embed HEAR tasks with any module that has the HEAR API, train heareval's shallow probe on the "
        "embeddings, store one record per result and print a table. Repeat the command to go on after an interruption.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("module", nargs="?", default="hear_ssam", metavar="MODULE", help="importable HEAR module (default: hear_ssam)")
    add("--tasks-dir", type=Path, metavar="DIR", help="folder with one folder per HEAR task")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these task folders")
    add("--model", default="", metavar="FILE", help="weights, the first argument of the module's load_model")
    add("--model-options", default="{}", metavar="JSON", help="further arguments of load_model, as a JSON object")
    add("--protocol", default="heareval", help="heareval (8 of 16 grid points, seed 42; default) or ssam (seeds 0-9)")
    add("--seeds", type=int, metavar="N", help="number of probe seeds (default: the protocol's own)")
    add("--results-dir", type=Path, required=True, metavar="DIR", help="records, embeddings and predictions go here")
    add("--embeddings-dir", type=Path, metavar="DIR", help="probe finished embedding folders; no model is loaded")
    add("--existing", choices=EXISTING, default="only-missing", help="what to do about results that are there already")
    add("--workers", type=int, metavar="N", help="parallel probe processes (default: one per core)")
    add("--resample", action="store_true", help="allow audio of another sample rate than the model's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .embeddings import parse_options

    sys.path.append(os.getcwd())  # a module in the current folder can be judged too
    evaluation = run_evaluation(
        args.module,
        args.model,
        parse_options(args.model_options),
        results_dir=args.results_dir,
        tasks_dir=args.tasks_dir,
        embeddings_dir=args.embeddings_dir,
        tasks=args.tasks,
        protocol=args.protocol,
        seeds=args.seeds,
        existing=args.existing,
        workers=args.workers,
        resample=args.resample,
    )
    if evaluation.records:  # beside what other models have reached on the same tasks
        tasks = {record["task"] for record in evaluation.records}
        rows = [r for r in read(args.results_dir) if r["task"] in tasks and r["protocol"] == args.protocol]
        print(terminal(rows, Options()), end="")
    if not evaluation.failures:
        return 0
    print(f"\n{len(evaluation.failures)} failed:", file=sys.stderr)
    for name, reason in evaluation.failures.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    return 1
