"""The driver: embeddings of a HEAR module once, then the probe for every task and seed, then a table.

Stage one and stage two meet in folders of heareval's layout, so either can be heareval's own. Every finished job is a
record on disk, and a rerun does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import HearSsamError, unknown_name
from ..machine import usable_cpus
from .jobs import Job, git_commit, noted, run_jobs
from .records import STORE, Record, embeddings_folder, key_of, read
from .tables import Options, terminal
from .tasks import Task, find_archives, find_tasks, known_tasks, read_task, unpack

if TYPE_CHECKING:
    from .embeddings import HearModel

PROBES = ("exact", "bf16")
EXISTING = ("only-missing", "always", "never")
EXAMPLES = """examples:
  hear-ssam evaluate --tasks-dir tasks --results-dir results
  hear-ssam evaluate --tasks-dir tasks --results-dir results --tasks esc50-v2.0.0-full --protocol ssam
  hear-ssam evaluate --tasks-dir tasks --results-dir results --protocol ssam --probe bf16
  hear-ssam evaluate --model-options '{"model": "logmel"}' --tasks-dir tasks --results-dir results
  hear-ssam evaluate hearbaseline.naive --tasks-dir tasks --results-dir results --resample
  hear-ssam evaluate hear_ssam 'hear_ssam:{"model": "logmel"}' some.module --tasks-dir tasks --results-dir results
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

    @property
    def label(self) -> str:
        return f"{self.model}, {self.task.name}"

    def identity(self, protocol: str, probe: str) -> dict[str, Any]:
        """The fields of a record's key that all seeds share."""
        return {
            "model": self.model,
            "checkpoint_sha256": self.checkpoint_sha256,
            "task": self.task.name,
            "version": self.task.version,
            "protocol": protocol,
            "probe": probe,
        }

    def key(self, protocol: str, probe: str, seed: int) -> tuple[Any, ...]:
        """Key of the record that says that a job is done."""
        return key_of({**self.identity(protocol, probe), "seed": seed, "fold": None, "metric": self.task.scores[0]})


@dataclass(frozen=True)
class Evaluation:
    """What a run leaves: all records of its models, tasks and protocol, and what failed (name → reason)."""

    records: list[Record]
    failures: dict[str, str]


def run_evaluation(
    modules: Sequence[str] = ("hear_ssam",),
    model: str = "",
    model_options: Mapping[str, Any] | None = None,
    *,
    results_dir: Path,
    tasks_dir: Path | None = None,
    embeddings_dir: Path | None = None,
    tasks: Sequence[str] = (),
    protocol: str = "heareval",
    probe: str = "exact",
    seeds: int | None = None,
    existing: str = "only-missing",
    workers: int | None = None,
    resample: bool = False,
) -> Evaluation:
    """Judge HEAR modules on the tasks in `tasks_dir`, or finished embeddings in `embeddings_dir`.

    `model` and `model_options` are arguments of every module's `load_model`; a module may carry options of its own,
    as in 'hear_ssam:{"model": "logmel"}'. All are loaded before the work begins, so that a wrong name costs no hours.
    `probe` is exact (heareval's numbers) or bf16 (statistically the same, with products in bfloat16). `seeds` counts
    probe seeds (default: the protocol's own). `existing` says what happens to results that are already in
    `results_dir`: only-missing runs the rest, always runs everything again, never treats them as an error.
    A task that fails is named in `failures` and does not stop the others. Jobs run in spawned processes: a script that
    calls this needs the usual `if __name__ == "__main__"`.
    """
    from .embeddings import load_hear_model
    from .probe import named_protocol

    if existing not in EXISTING:
        raise unknown_name("policy for existing results", existing, EXISTING)
    if probe not in PROBES:
        raise unknown_name("probe", probe, PROBES)
    if (tasks_dir is None) == (embeddings_dir is None):
        raise HearSsamError("say either where the tasks are (--tasks-dir) or the embeddings (--embeddings-dir).")
    plan = named_protocol(protocol)
    count = plan.seeds if seeds is None else seeds
    workers = usable_cpus() if workers is None else workers
    for option, value in (("--seeds", count), ("--workers", workers)):
        if value < 1:
            raise HearSsamError(f"{option} must be at least 1, not {value}.")
    seed_range = range(plan.first_seed, plan.first_seed + count)
    failures: dict[str, str] = {}
    store = results_dir / STORE
    with _only_driver(results_dir):
        if embeddings_dir:
            sources = _given_sources(embeddings_dir, tasks, failures)
        else:
            assert tasks_dir is not None
            unpacked = []
            for archive in find_archives(tasks_dir, tasks):
                with noted(archive.name, failures):
                    unpacked.append(unpack(archive, results_dir / "tasks"))
            folders = find_tasks(tasks_dir, tasks, unpacked)
            models = [load_hear_model(module, model, model_options) for module in dict.fromkeys(modules)]
            options = {"resample": resample, "again": existing == "always"}
            sources = _module_sources(models, folders, results_dir, options, failures)
        done = {key_of(record) for record in read(store)} if store.exists() and existing != "always" else set()
        work = [(s, [seed for seed in seed_range if s.key(protocol, probe, seed) not in done]) for s in sources]
        kept = [source.label for source, todo in work if len(todo) < count]
        if existing == "never" and kept:
            raise HearSsamError(f"{store} has results of {', '.join(kept)} already (--existing never).")
        jobs, commit = [], git_commit()
        for source, todo in tqdm(work, desc="tasks", unit="task", disable=None, leave=False):
            if todo:
                with noted(source.label, failures):
                    source.make()
                    identity = source.identity(protocol, probe)
                    jobs += [Job(source.folder, {**identity, "seed": seed}, results_dir, commit) for seed in todo]
        run_jobs(jobs, store, workers, failures)
        wanted = {source.key(protocol, probe, seed)[:7] for source in sources for seed in seed_range}
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


def _module_sources(
    models: Sequence[HearModel],
    tasks: Mapping[str, Sequence[Path]],
    results_dir: Path,
    options: Mapping[str, bool],
    failures: dict[str, str],
) -> list[Source]:
    from .embeddings import best_folder, embed_task

    sources = []
    for name, folders in tasks.items():
        with noted(name, failures):
            chosen = [best_folder(folders, hear.sample_rate) for hear in models]
            read_tasks = {folder: read_task(folder) for folder in chosen}
            for task in read_tasks.values():
                _warn(task)
            for hear, folder in zip(models, chosen, strict=True):
                target = embeddings_folder(results_dir, hear.name, hear.checkpoint_sha256, name)
                task = read_tasks[folder]
                make = functools.partial(embed_task, hear, task, target, **options)
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
    for folder, *_ in find_tasks(embeddings_dir, names).values():
        with noted(folder.name, failures):
            made_by = provenance(folder)
            model, digest = made_by.get("model", embeddings_dir.resolve().name), made_by.get("checkpoint_sha256", "")
            task = read_task(folder)
            _warn(task)
            sources.append(Source(task, model, digest, folder, functools.partial(require_done, folder)))
    return sources


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
    add(
        "modules",
        nargs="*",
        default=["hear_ssam"],
        metavar="MODULE",
        help="importable HEAR modules, each with options of its own if need be (default: hear_ssam)",
    )
    add("--tasks-dir", type=Path, metavar="DIR", help="folder with one folder per HEAR task")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these task folders")
    add("--model", default="", metavar="FILE", help="weights, the first argument of the module's load_model")
    add("--model-options", default="{}", metavar="JSON", help="further arguments of every load_model, a JSON object")
    add("--protocol", default="heareval", help="heareval (8 of 16 grid points, seed 42; default) or ssam (seeds 0-9)")
    add("--probe", choices=PROBES, default="exact", help="exact: heareval's numbers (default); bf16: others like them")
    add("--seeds", type=int, metavar="N", help="number of probe seeds (default: the protocol's own)")
    add("--results-dir", type=Path, required=True, metavar="DIR", help="records, embeddings and predictions go here")
    add("--embeddings-dir", type=Path, metavar="DIR", help="probe finished embedding folders; no model is loaded")
    existing = "with results there: run the rest (default), run all again, embeddings too, or refuse"
    add("--existing", choices=EXISTING, default="only-missing", help=existing)
    add("--workers", type=int, metavar="N", help="parallel probe processes (default: one per core)")
    add("--resample", action="store_true", help="allow audio of another sample rate than the model's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .embeddings import parse_options

    sys.path.append(os.getcwd())  # a module in the current folder can be judged too
    evaluation = run_evaluation(
        args.modules,
        args.model,
        parse_options(args.model_options),
        results_dir=args.results_dir,
        tasks_dir=args.tasks_dir,
        embeddings_dir=args.embeddings_dir,
        tasks=args.tasks,
        protocol=args.protocol,
        probe=args.probe,
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
