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
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from filelock import FileLock
from tqdm import tqdm

from ..errors import HearSsamError, unknown_name
from ..machine import Cluster, engine_named, usable_cpus
from ..options import add_model_options, add_scale, parse_options, parse_shard
from ..paths import only_writer, refuse_others
from .folders import best_folder, find_archives, find_tasks, unpack
from .jobs import HEADS, Job, noted, run_jobs
from .records import KEY, STORE, Record, embeddings_folder, key_of, read
from .tables import terminal
from .tasks import DONE, Task, differences, read_task

if TYPE_CHECKING:
    from .module import JudgedModule
    from .probe import Protocol

Probe = Literal["exact", "bf16", "knn", "logreg", "fewshot"]
PROBES: tuple[Probe, ...] = get_args(Probe)
TASKS = ".tasks"  # of archives and limits in a results folder: hidden, as tasks of one's own may lie beside it
Loader = Callable[[str], "JudgedModule"]  # puts a model on a device
Models = dict[tuple[str, str], tuple["JudgedModule", Loader]]  # by name and hash: the loaded one, what loads another
Run = tuple[str, str, int]  # protocol, probe, seed
Work = tuple["Source", Sequence[Run]]  # and what it lacks
Existing = Literal["only-missing", "always", "never"]
EXISTING: tuple[Existing, ...] = get_args(Existing)
EXAMPLES = """examples:
  hear-ssam evaluate --tasks-dir tasks --results-dir results
  hear-ssam evaluate --tasks-dir tasks --results-dir results --tasks esc50 --protocol ssam --probe bf16
  hear-ssam evaluate --tasks-dir tasks --results-dir results --probe knn logreg fewshot             seconds per task
  hear-ssam evaluate --tasks-dir tasks --results-dir results --probe logreg --limit 200             a quick look
  hear-ssam evaluate --model-options '{"model": "logmel"}' --tasks-dir tasks --results-dir results
  hear-ssam evaluate hearbaseline.naive --tasks-dir tasks --results-dir results --resample
  hear-ssam evaluate hear_ssam 'hear_ssam:{"model": "logmel"}' some.module --tasks-dir tasks --results-dir results
  hear-ssam evaluate 'hf:facebook/hubert-base-ls960:{"layer": 6}' xares:mine.py --tasks-dir tasks --results-dir out
  hear-ssam evaluate --tasks-dir tasks --results-dir results --shard 3/8            third of eight jobs, same folder
  hear-ssam evaluate --tasks-dir /shared/tasks --results-dir /shared/out --engine ray    on all nodes of a Ray cluster
  hear-ssam evaluate --embeddings-dir embeddings/hearbaseline --results-dir results     embeddings made by heareval
"""


@dataclass(frozen=True)
class Source:
    """The embeddings of one task by one model."""

    task: Task
    weights: tuple[str, str]  # the model's name, and the hash of its checkpoint
    folder: Path  # in heareval's layout
    origin: dict[str, Any]  # what its results must come from to be used again
    make: Callable[..., object]  # of the model, if it has one here; raises where the folder is not finished

    @property
    def label(self) -> str:
        return f"{self.weights[0]}, {self.task.name}"

    def identity(self, run: Run) -> dict[str, Any]:
        """The fields of a record's key that all records of a job share."""
        values = (*self.weights, self.task.name, self.task.version, *run)
        return dict(zip(KEY, values, strict=False))

    def key(self, run: Run) -> tuple[Any, ...]:
        """Key of the record that says that a job is done."""
        return key_of({**self.identity(run), "fold": None, "metric": self.task.scores[0]})

    def made(self, record: Record | None) -> bool:
        """Whether a record comes from these very embeddings."""
        noted = record.get("embeddings", {}) if record else {}
        return all(name in noted and noted[name] == value for name, value in self.origin.items())


@dataclass(frozen=True)
class Evaluation:
    """What a run leaves: all records of its models, tasks and protocol, those of earlier runs too where they are of the
    same embeddings, and what failed (name → reason)."""

    records: list[Record]
    failures: dict[str, str]


def evaluate(
    models: object, tasks_dir: str | os.PathLike[str], probe: Probe | Sequence[Probe] = "exact", *,
    results_dir: str | os.PathLike[str] | None = None, **options: Any,
) -> list[Record]:  # fmt: skip
    """Judge one model, or a list of them, on the HEAR tasks in `tasks_dir`: the records of `hear-ssam evaluate`.

    A model is the name of a HEAR module, `hf:NAME`, `xares:FILE.py`, or an object: a HEAR module or what its load_model
    returned, an encoder of X-ARES, a pair (model of transformers, its feature extractor); an object is judged as it is
    now, in eval mode. `options` are those of `run_evaluation`. Without `results_dir` nothing but the records is kept.
    What fails is said on stderr; raises HearSsamError where nothing else is left. Records call an object by its
    attribute `name`, or by its class. Scripts need `if __name__ == "__main__"`: probes run in spawned processes.
    """
    listed = list(models) if isinstance(models, list) else [models]
    if not listed:
        raise HearSsamError("models: an empty list; name one at least.")
    from .module import modes_kept

    with modes_kept(listed), contextlib.ExitStack() as stack:
        results = Path(results_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        evaluation = run_evaluation(listed, results_dir=results, tasks_dir=Path(tasks_dir), probe=probe, **options)
    if not evaluation.records and evaluation.failures:
        raise HearSsamError("; ".join(f"{name}: {reason}" for name, reason in evaluation.failures.items()))
    return evaluation.records


def run_evaluation(
    modules: Sequence[object] = (), model: str = "", model_options: Mapping[str, Any] | None = None, *,
    results_dir: Path, tasks_dir: Path | None = None, embeddings_dir: Path | None = None, tasks: Sequence[str] = (),
    protocol: str = "heareval", probe: Probe | Sequence[Probe] = "exact", shots: int | None = None,
    seeds: int | None = None, limit: int | None = None, existing: Existing = "only-missing",
    workers: int | None = None, resample: bool = False, device: str = "auto", shard: tuple[int, int] = (1, 1),
    engine: Literal["local", "ray"] = "local",
) -> Evaluation:  # fmt: skip
    """Judge HEAR modules (default: hear_ssam) on the tasks in `tasks_dir`, or finished embeddings in `embeddings_dir`.

    `model` and `model_options` are arguments of every module's `load_model`; a module may carry options of its own,
    as in 'hear_ssam:{"model": "logmel"}'. All are loaded before the work begins, so that a wrong name costs no hours.
    They run on `device` (auto, cpu, cuda, mps).
    `probe` names one or several: exact (heareval's numbers), bf16 (statistically the same, with products in bfloat16),
    and the probes of seconds in `quick`, which skip event tasks: knn, logreg, fewshot with `shots` clips per class (8).
    `seeds` counts probe seeds (default: the protocol's own; ten draws of fewshot; knn and logreg have one).
    `limit` takes so many clips of every split, as a task of another name that says so.
    `existing` says what happens to results that are already in `results_dir`: only-missing runs the rest, always runs
    everything again, never treats them as an error.
    `shard` (i, n) takes every n-th pair of task and model from the i-th (from 1); n processes share `results_dir`.
    `engine` ray embeds and probes on the actors of a Ray cluster, whose nodes all see the folders (`machine.Cluster`).
    A task or module that fails is named in `failures` and does not stop the others. Jobs run in spawned processes: a
    script that calls this needs the usual `if __name__ == "__main__"`.
    """
    from .probe import named_protocol

    probes: list[str] = [probe] if isinstance(probe, str) else list(probe)
    tasks = [tasks] if isinstance(tasks, str) else tasks
    names = [("policy for existing results", existing, EXISTING), ("engine", engine, ("local", "ray"))]
    for kind, name, known in names + [("probe", name, PROBES) for name in probes]:
        if name not in known:
            raise unknown_name(kind, name, known)
    if (tasks_dir is None) == (embeddings_dir is None):
        raise HearSsamError("say either where the tasks are (--tasks-dir) or the embeddings (--embeddings-dir).")
    plan = named_protocol(protocol)
    cores = usable_cpus() if workers is None else workers
    for option, value in {"--seeds": seeds, "--workers": workers, "--shots": shots, "--limit": limit}.items():
        if value is not None and value < 1:
            raise HearSsamError(f"{option} must be at least 1, not {value}.")
    heads, few = any(name in HEADS for name in probes), "fewshot" in probes
    asked: dict[str, object] = {"MODULE": modules, "--model": model, "--model-options": model_options}
    asked = {**asked, "--resample": resample, "--limit": limit} if embeddings_dir else {}
    idle: dict[str, object] = {"--shots": shots and not few, "--seeds": seeds and not (heads or few)}
    idle["--protocol"] = not heads and protocol != "heareval"
    for what, given in {"--embeddings-dir, which loads no model": asked, f"--probe {' '.join(probes)}": idle}.items():
        if needless := ", ".join(name for name, value in given.items() if value):
            raise HearSsamError(f"{needless}: of no use with {what}; leave one of them out.")
    runs: list[Run] = []
    for name in dict.fromkeys(probes):
        if name in HEADS:
            runs += [(protocol, name, plan.first_seed + number) for number in range(seeds or plan.seeds)]
        else:  # all quick probes take heareval's splits
            name, draws = (f"fewshot{shots or 8}", seeds or 10) if name == "fewshot" else (name, 1)
            runs += [("heareval", name, seed) for seed in range(draws)]
    quick = list(dict.fromkeys(probe for _, probe, _ in runs if probe not in HEADS))
    failures: dict[str, str] = {}
    store = results_dir / STORE
    models: Models = {}
    folders = [place for place in (results_dir, tasks_dir, embeddings_dir) if place]
    lock = ".lock" if shard == (1, 1) else ".lock-{}-of-{}".format(*shard)
    with engine_named(engine, device, workers, *folders) as cluster, only_writer(results_dir, "evaluation", lock):
        refuse_others(results_dir, "evaluation", lock, shard[1])
        if embeddings_dir:
            sources = _given_sources(embeddings_dir, tasks, quick, failures)
        else:
            assert tasks_dir is not None
            unpacked = []
            for archive in find_archives(tasks_dir, tasks):
                with noted(archive.name, failures), FileLock(results_dir / ".tasks.lock"):
                    unpacked.append(unpack(archive, results_dir / TASKS))
            found = find_tasks(tasks_dir, tasks, unpacked)
            place = "cpu" if cluster else device
            models = _load(modules or ("hear_ssam",), model, model_options, place, failures)
            again = existing == "always"
            sources = _module_sources(models, found, results_dir, resample, limit, again, quick, failures)
        sources = sources[shard[0] - 1 :: shard[1]]
        before = {key_of(record): record for record in read(store)} if store.exists() else {}
        stored = before if existing != "always" else {}
        work = []
        for source in sources:
            fits = [run for run in runs if run[1] in HEADS or not source.task.event]
            todo = [run for run in fits if not source.made(stored.get(source.key(run)))]
            work.append((source, todo))
            if existing == "never" and any(source.key(run) in stored for run in fits):
                raise HearSsamError(f"{store}: has results of {source.label} already (--existing never).")
        jobs, lacking = [], [one for one in work if one[1]]
        first = sum(source.task.name == lacking[0][0].task.name for source, _ in lacking)  # by all models
        made = _made(lacking, cluster, models)
        bar = tqdm(made, total=len(lacking), desc="tasks", unit="task", disable=None, leave=False)
        for number, ((source, todo), make) in enumerate(bar, 1):
            with noted(source.label, failures):
                make()
                jobs += [Job(source.folder, source.identity(run), results_dir) for run in todo]
            if number == first and not cluster and (outlook := _outlook(work, plan, cores)):
                tqdm.write(outlook, file=sys.stderr)
        run_jobs(jobs, store, cores, failures, cluster)
        judged = {source.key(run)[:-2]: source for source in sources for run in runs}
        every = [(judged.get(key_of(r)[:-2]), r) for r in read(store)] if store.exists() else []  # folds and metrics
        # of before only what was made of these very embeddings: what failed now has no results
        records = [r for source, r in every if source and (source.made(r) or before.get(key_of(r)) != r)]
    return Evaluation(records, failures)


def _made(work: Sequence[Work], cluster: Cluster | None, models: Models) -> Iterator[tuple[Work, Callable[[], object]]]:
    """Each source with what makes its embeddings, or raises why a cluster could not."""
    if cluster and models:
        build = functools.partial(_far_maker, {weights: load for weights, (_, load) in models.items()})
        with contextlib.closing(cluster.work(build, work, cluster.device)) as outcomes:
            yield from ((one, outcome.result) for one, outcome in outcomes)
    else:
        yield from ((one, functools.partial(one[0].make, *models.get(one[0].weights, ())[:1])) for one in work)


def _far_maker(loaders: Mapping[tuple[str, str], Loader], device: str) -> Callable[[Work], None]:
    """What makes embeddings in a process of a cluster."""
    load = functools.lru_cache(1)(lambda weights: loaders[weights](device))  # tasks of a model follow each other

    def work(one: Work) -> None:
        source, hear = one[0], load(one[0].weights)
        if (hear.name, hear.checkpoint_sha256) != source.weights:
            raise HearSsamError(f"{hear.name}: has other weights on the node {platform.node()}; make them the same.")
        source.make(hear)

    return work


def _outlook(work: Sequence[Work], plan: Protocol, workers: int) -> str:
    """How long the rest takes, by the embeddings of the first task; empty where nothing of it takes long."""
    from .embeddings import provenance
    from .preview import audio_seconds, duration, probe_seconds

    seen: dict[tuple[str, str], tuple[float, int]] = {}  # of each model: seconds per second of audio, width
    audio = embeddings = probes = 0.0
    for source, todo in work:
        if (source.folder / DONE).exists():
            noted = provenance(source.folder)
            pace = noted.get("seconds", 0.0) / audio_seconds(source.task)
            seen.setdefault(source.weights, (pace, noted.get("dim", 0)))
        elif todo and source.weights in seen:
            audio += audio_seconds(source.task)
            embeddings += seen[source.weights][0] * audio_seconds(source.task)
        heads = sum(probe in HEADS for _, probe, _ in todo)
        probes += heads * probe_seconds(source.task, seen.get(source.weights, (0.0, 0))[1], plan.grid_points)
    parts = [f"{duration(embeddings)} more for the embeddings of {duration(audio)} of audio"] if audio else []
    parts += [f"{duration(probes / workers)} for heareval's heads on scene tasks"] if probes else []
    return f"estimate: {', then '.join(parts)}" if parts else ""


def _load(
    modules: Sequence[object], model: str, options: Mapping[str, Any] | None, device: str, failures: dict[str, str]
) -> Models:
    """All models that are given or can be loaded, each once; raises HearSsamError where there are none."""
    from .module import judged, load_hear_model

    models: Models = {}
    for module in modules:
        name = module if isinstance(module, str) else getattr(module, "__name__", repr(type(module)))
        load = functools.partial(load_hear_model, module, model, options)
        with noted(name, failures):
            hear = load(device)
            if not isinstance(module, str | ModuleType):  # elsewhere nobody knows the source of its class
                load = functools.partial(judged, module, digest=hear.checkpoint_sha256)
            first, _ = models.setdefault((hear.name, hear.checkpoint_sha256), (hear, load))
            if first.module is not hear.module:
                raise HearSsamError(f"{hear.name}: a model of {first.module.__name__} has this name; rename one.")
    if not models:
        raise HearSsamError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    return models


def _module_sources(
    models: Models, tasks: Mapping[str, Sequence[Path]], results_dir: Path, resample: bool,
    limit: int | None, again: bool, quick: Sequence[str], failures: dict[str, str],
) -> list[Source]:  # fmt: skip
    from .embeddings import embed_task, origin
    from .preview import limited

    sources, warned = [], set()
    for name, folders in tasks.items():
        for weights, (hear, _) in models.items():
            with noted(f"{hear.name}, {name}", failures):
                task = read_task(best_folder(folders, hear.sample_rate))
                task = limited(task, limit, results_dir / TASKS) if limit else task
                if task.folder not in warned:
                    _warn(task, quick)
                warned.add(task.folder)
                target = embeddings_folder(results_dir, *weights, task.name)
                make = functools.partial(embed_task, task=task, out_dir=target, resample=resample, again=again)
                sources.append(Source(task, weights, target, origin(hear, task, target, resample), make))
    return sources


def _given_sources(
    embeddings_dir: Path, names: Sequence[str], quick: Sequence[str], failures: dict[str, str]
) -> list[Source]:
    from .embeddings import given_origin, provenance, require_done

    sources = []
    for folder, *_ in find_tasks(embeddings_dir, names).values():
        with noted(folder.name, failures):
            made_by = provenance(folder)
            weights = made_by.get("model", embeddings_dir.resolve().name), made_by.get("checkpoint_sha256", "")
            _warn(task := read_task(folder), quick)
            sources.append(Source(task, weights, folder, given_origin(task), functools.partial(require_done, folder)))
    return sources


def _warn(task: Task, quick: Sequence[str]) -> None:
    """Say on stderr what makes scores of a task no HEAR scores (it reads all labels), and what quick probes lack."""
    said = []
    if "limit" not in task.metadata:
        said += differences(task)
        for split, labels in task.absent_classes().items():
            effect = "mAP counts that as 0, d_prime and aucroc are undefined there"
            said.append(f"{split} has no clip of {', '.join(labels)}; {effect}")
    if task.event and quick:
        said.append(f"skipped by {', '.join(quick)}: an event task, they judge clips")
    if shots := [int(probe.removeprefix("fewshot")) for probe in quick if probe[:7] == "fewshot" and not task.event]:
        from .quick import shortage

        said += filter(None, (shortage(task, count) for count in shots))
    for text in said:
        print(f"{task.name}: {text}.", file=sys.stderr)


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
    modules = "HEAR modules, hf:NAME|FOLDER, xares:FILE.py[:CLASS], each perhaps with :{JSON} (default: hear_ssam)"
    add("modules", nargs="*", metavar="MODULE", help=modules)
    add("--tasks-dir", type=Path, metavar="DIR", help="folder with one folder per HEAR task")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="only these task folders")
    add("--model", default="", metavar="NAME|FILE", help="the first argument of the module's load_model")
    add_model_options(parser)
    add("--protocol", default="heareval", help="heareval (8 of 16 grid points, seed 42; default) or ssam (seeds 0-9)")
    probes = "exact: heareval's numbers (default); bf16: others like them; knn, logreg, fewshot: scenes in seconds"
    add("--probe", choices=PROBES, nargs="+", default=["exact"], help=probes)
    add("--shots", type=int, metavar="N", help="clips per class of fewshot (default: 8)")
    add("--limit", type=int, metavar="N", help="only so many clips of each split, for a quick look: no HEAR scores")
    add("--seeds", type=int, metavar="N", help="number of probe seeds (default: the protocol's own; 10 of fewshot)")
    add("--results-dir", type=Path, required=True, metavar="DIR", help="records, embeddings and predictions go here")
    add("--embeddings-dir", type=Path, metavar="DIR", help="probe finished embedding folders; no model is loaded")
    existing = "with results there: run the rest (default), run all again, embeddings too, or refuse"
    add("--existing", choices=EXISTING, default="only-missing", help=existing)
    add("--workers", type=int, metavar="N", help="parallel probe processes (default: one per core)")
    add_scale(parser, "pair of task and model")
    add("--resample", action="store_true", help="allow audio of another sample rate than the model's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    shard, options = parse_shard(args.shard), parse_options(args.model_options)
    given = {**vars(args), "model_options": options, "shard": shard}
    evaluation = run_evaluation(**{name: given[name] for name in inspect.signature(run_evaluation).parameters})
    if evaluation.records:  # beside what other models have reached on the same tasks
        tasks = {r["task"] for r in evaluation.records}
        runs = {(r["protocol"], r["probe"]) for r in evaluation.records}
        rows = [r for r in read(args.results_dir) if r["task"] in tasks and (r["protocol"], r["probe"]) in runs]
        print(terminal(rows), end="")
    if not evaluation.failures:
        return 0
    print(f"\n{len(evaluation.failures)} failed:", file=sys.stderr)
    for name, reason in evaluation.failures.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    return 1
