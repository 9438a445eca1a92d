"""heareval's own probe and ours on the same embeddings, one after the other in one run: time, CPU time, memory, scores.

    python -m benchmarks heareval --python .venv-tools/bin/python EMBEDDINGS/MODEL/TASK ...
    python -m benchmarks heareval --python .venv-tools/bin/python --epochs 60 EMBEDDINGS/MODEL/TASK ...

--python is an interpreter with heareval and hear_ssam (`hear-ssam heareval --help` says how to install it). A folder is
one task's, as `hear-ssam evaluate` or heareval wrote it. Every probe searches heareval's eight grid points with seed 42
on its own copies, all tasks by one command. heareval takes them in turn, with all cores for its products; `hear-ssam
evaluate` has a process a core: give it as many tasks as there are cores, or more.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hear_ssam.evaluation import records
from hear_ssam.evaluation.jobs import HEADS
from hear_ssam.machine import usable_cpus

from . import plain_parser
from .collections import measure_command
from .cpu import facts, heading


def copied(sources: list[Path], folder: Path, epochs: int | None) -> list[Path]:
    """Copies of the embeddings of tasks without anyone's results, with at most `epochs` for a head."""
    copies = [folder / source.name for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*predict*", "*.pt", "logs"))
        if epochs:
            file = copy / "task_metadata.json"
            metadata = json.loads(file.read_text())
            grid = metadata.setdefault("evaluation_params", {}).setdefault("task_specific_param_grid", {})
            grid["max_epochs"] = [epochs]
            file.write_text(json.dumps(metadata))
    return copies


def heareval_score(folder: Path) -> float:
    """The first score as heareval wrote it: of the test split, or the mean over folds."""
    found: dict[str, Any] = json.loads((folder / "test.predicted-scores.json").read_text())
    folds = found.get("aggregated_scores")
    return float(folds["test_score_mean"] if folds else found["test"]["test_score"])


def our_scores(results: Path) -> list[float]:
    """The first score of each task as `hear-ssam evaluate` wrote it: of the test split, or the mean over folds."""
    kept = [
        record for record in records.read(results / "records.jsonl") if record["primary"] and record["fold"] is None
    ]
    return [float(record["score"]) for record in sorted(kept, key=lambda record: record["task"])]


def main(arguments: list[str]) -> int:
    parser = plain_parser("heareval", __doc__)
    parser.add_argument("tasks", nargs="+", type=Path, metavar="EMBEDDINGS", help="folder of one task's embeddings")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with heareval and hear_ssam")
    parser.add_argument("--probes", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--epochs", type=int, help="at most so many for a head, in all three (default: heareval's 500)")
    args = parser.parse_args(arguments)
    cores, tasks = usable_cpus(), sorted(args.tasks, key=lambda folder: folder.name)
    if len({folder.name for folder in tasks}) < len(tasks):
        parser.error("a task stands there twice: its copies would share a folder.")
    print(heading("heareval's probe and ours", facts(cores) | {"made with": json.dumps(vars(args), default=str)}))
    print(f"| probe | seconds | times | CPU seconds | times | peak MB | {' | '.join(f.name for f in tasks)} |")
    print("|---" * (6 + len(tasks)) + "|")
    first: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        for probe in ("heareval", *args.probes):
            folder, results = Path(temporary) / probe, Path(temporary) / f"{probe}-out"
            copies = copied(tasks, folder, args.epochs)
            ours = "evaluate", "--embeddings-dir", folder, "--results-dir", results, "--probe", probe
            command: tuple[Any, ...] = (sys.executable, "-m", "hear_ssam", *ours)
            if probe == "heareval":
                command = args.python.absolute(), "-m", "hear_ssam", "heareval", "predictions", *copies
            threads = {"OMP_NUM_THREADS": str(cores if probe == "heareval" else 1)}
            seconds, cpu, peak = measure_command(*command, environment=threads)
            first = first or [seconds, cpu]
            scores = map(heareval_score, copies) if probe == "heareval" else our_scores(results)
            columns = [f"{value:.1f} | {base / value:.2f}" for base, value in zip(first, (seconds, cpu), strict=True)]
            columns += [f"{peak:.0f}", *(f"{100 * score:.3f}" for score in scores)]
            print(f"| {probe} | {' | '.join(columns)} |", flush=True)
    return 0
