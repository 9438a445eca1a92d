"""The driver: embeddings of a HEAR module once, then the probe for every task and seed, then a table.

Stage one and stage two meet in folders of heareval's layout, so either can be heareval's own. Every finished job is a
record on disk, and a rerun does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..errors import HearSsamError, unknown_name
from ..machine import usable_cpus
from ..options import add_model_options, parse_options
from .jobs import Job, git_commit, noted, run_jobs
from .records import STORE, Record, embeddings_folder, key_of, read
from .tables import Options, terminal
from .tasks import Task, find_archives, find_tasks, known_tasks, read_task, unpack

if TYPE_CHECKING:
    from .module import JudgedModule

Probe = Literal["exact", "bf16"]
PROBES: tuple[Probe, ...] = get_args(Probe)
Existing = Literal["only-missing", "always", "never"]
EXISTING: tuple[Existing, ...] = get_args(Existing)
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
    origin: dict[str, Any]  # what its results must come from to be used again
    make: Callable[[], object]  # makes the folder, or raises where it is not finished

    @property
    def label(self) -> str:
        return f"{self.model}, {self.task.name}"

    def identity(self, protocol: str, probe: str) -> dict[str, Any]:
        """The fields of a record's key that all seeds share."""
        model = {"model": self.model, "checkpoint_sha256": self.checkpoint_sha256}
        return {**model, "task": self.task.name, "version": self.task.version, "protocol": protocol, "probe": probe}

    def key(self, protocol: str, probe: str, seed: int) -> tuple[Any, ...]:
        """Key of the record that says that a job is done."""
        return key_of({**self.identity(protocol, probe), "seed": seed, "fold": None, "metric": self.task.scores[0]})

    def made(self, record: Record | None) -> bool:
        """Whether a record comes from these very embeddings."""
        noted = record.get("embeddings", {}) if record else {}
        return all(name in noted and noted[name] == value for name, value in self.origin.items())


@dataclass(frozen=True)
class Evaluation:
    """What a run leaves: all records of its models, tasks and protocol, and what failed (name → reason)."""

    records: list[Record]
    failures: dict[str, str]


def run_evaluation(
    modules: Sequence[str] = (),
    model: str = "",
    model_options: Mapping[str, Any] | None = None,
    *,
    results_dir: Path,
    tasks_dir: Path | None = None,
    embeddings_dir: Path | None = None,
    tasks: Sequence[str] = (),
    protocol: str = "heareval",
    probe: Probe = "exact",
    seeds: int | None = None,
    existing: Existing = "only-missing",
    workers: int | None = None,
    resample: bool = False,
    device: str = "auto",
) -> Evaluation:
    """Judge HEAR modules (default: hear_ssam) on the tasks in `tasks_dir`, or finished embeddings in `embeddings_dir`.

    `model` and `model_options` are arguments of every module's `load_model`; a module may carry options of its own,
    as in 'hear_ssam:{"model": "logmel"}'. All are loaded before the work begins, so that a wrong name costs no hours.
    They run on `device` (auto, cpu, cuda, mps).
    `probe` is exact (heareval's numbers) or bf16 (statistically the same, with products in bfloat16). `seeds` counts
    probe seeds (default: the protocol's own). `existing` says what happens to results that are already in
    `results_dir`: only-missing runs the rest, always runs everything again, never treats them as an error.
    A task or module that fails is named in `failures` and does not stop the others. Jobs run in spawned processes: a
    script that calls this needs the usual `if __name__ == "__main__"`.
    """
    from .probe import named_protocol

    for kind, name, known in (("policy for existing results", existing, EXISTING), ("probe", probe, PROBES)):
        if name not in known:
            raise unknown_name(kind, name, known)
    if (tasks_dir is None) == (embeddings_dir is None):
        raise HearSsamError("say either where the tasks are (--tasks-dir) or the embeddings (--embeddings-dir).")
    asked = {"MODULE": modules, "--model": model, "--model-options": model_options, "--resample": resample}
    if embeddings_dir and any(asked.values()):
        idle = ", ".join(name for name, value in asked.items() if value)
        raise HearSsamError(f"{idle}: of no use with --embeddings-dir, which loads no model; leave one of them out.")
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
            models = _load(modules or ("hear_ssam",), model, model_options, device, failures)
            sources = _module_sources(models, folders, results_dir, resample, existing == "always", failures)
        stored = {key_of(record): record for record in read(store)} if store.exists() and existing != "always" else {}
        work = []  # sources and the seeds that they lack
        for source in sources:
            keys = {seed: source.key(protocol, probe, seed) for seed in seed_range}
            work.append((source, [seed for seed in seed_range if not source.made(stored.get(keys[seed]))]))
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
        wanted = {source.key(protocol, probe, seed)[:-2] for source in sources for seed in seed_range}
        records = [r for r in read(store) if key_of(r)[:-2] in wanted] if store.exists() else []  # folds and metrics
    return Evaluation(records, failures)


@contextlib.contextmanager
def _only_driver(results_dir: Path) -> Iterator[None]:
    """Hold a lock on a results folder; the system lets go of it however the process ends."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(results_dir / ".lock", timeout=0):
            yield
    except Timeout:
        raise HearSsamError(f"{results_dir}: another evaluation writes to it; wait or choose another folder.") from None
    except OSError as error:
        raise HearSsamError(f"{results_dir}: cannot be written: {error.strerror}; choose another folder.") from error


def _load(
    modules: Sequence[str], model: str, options: Mapping[str, Any] | None, device: str, failures: dict[str, str]
) -> list[JudgedModule]:
    """All modules that can be loaded, each once; raises HearSsamError where none can be."""
    from .module import load_hear_model

    models: dict[tuple[str, str], JudgedModule] = {}
    for module in dict.fromkeys(modules):
        with noted(module, failures):
            hear = load_hear_model(module, model, options, device)
            models.setdefault((hear.name, hear.checkpoint_sha256), hear)
    if not models:
        raise HearSsamError("; ".join(failures[module] for module in modules if module in failures))
    return list(models.values())


def _module_sources(
    models: Sequence[JudgedModule],
    tasks: Mapping[str, Sequence[Path]],
    results_dir: Path,
    resample: bool,
    again: bool,
    failures: dict[str, str],
) -> list[Source]:
    from .embeddings import best_folder, embed_task, origin

    sources, warned = [], set()
    for name, folders in tasks.items():
        for hear in models:
            with noted(f"{hear.name}, {name}", failures):
                task = read_task(best_folder(folders, hear.sample_rate))
                if task.folder not in warned:
                    _warn(task)
                warned.add(task.folder)
                target = embeddings_folder(results_dir, hear.name, hear.checkpoint_sha256, name)
                make = functools.partial(embed_task, hear, task, target, resample=resample, again=again)
                comes_from = origin(hear, task, target, resample)
                sources.append(Source(task, hear.name, hear.checkpoint_sha256, target, comes_from, make))
    return sources


def _warn(task: Task) -> None:
    """Say on stderr what makes the scores of a task something else than HEAR scores; this reads all its labels."""
    if card := known_tasks().get(task.name):
        for difference in card.differences(task):
            print(f"{task.name} is not as HEAR released it: {difference}.", file=sys.stderr)
    for split, labels in task.absent_classes().items():
        effect = "mAP counts that as 0, d_prime and aucroc are undefined there"
        print(f"{task.name}: {split} has no clip of {', '.join(labels)}; {effect}.", file=sys.stderr)


def _given_sources(embeddings_dir: Path, names: Sequence[str], failures: dict[str, str]) -> list[Source]:
    from .embeddings import given_origin, provenance, require_done

    sources = []
    for folder, *_ in find_tasks(embeddings_dir, names).values():
        with noted(folder.name, failures):
            made_by = provenance(folder)
            model, digest = made_by.get("model", embeddings_dir.resolve().name), made_by.get("checkpoint_sha256", "")
            task, make = read_task(folder), functools.partial(require_done, folder)
            _warn(task)
            sources.append(Source(task, model, digest, folder, given_origin(task), make))
    return sources


# ---- the command ---------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="judge a HEAR module on HEAR tasks with the linear-probe protocol",
        description="Embed HEAR tasks with any module that has the HEAR API, train heareval's shallow probe on the "
        "embeddings, store one record per result and print a table. Repeat the command to go on after an interruption.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    modules = "importable HEAR modules, each with options of its own if need be (default: hear_ssam)"
    add("modules", nargs="*", metavar="MODULE", help=modules)
    add("--tasks-dir", type=Path, metavar="DIR", help="folder with one folder per HEAR task")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these task folders")
    add("--model", default="", metavar="NAME|FILE", help="the first argument of the module's load_model")
    add_model_options(parser)
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
    sys.path.append(os.getcwd())  # a module in the current folder can be judged too
    given = {**vars(args), "model_options": parse_options(args.model_options)}
    evaluation = run_evaluation(**{name: given[name] for name in inspect.signature(run_evaluation).parameters})
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
