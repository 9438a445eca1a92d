"""heareval's own probe and ours on the same embeddings, one after the other in one run: time, CPU time, memory, score.

    python -m benchmarks heareval --python .venv-tools/bin/python EMBEDDINGS/MODEL/TASK ...
    python -m benchmarks heareval --python .venv-tools/bin/python --epochs 60 EMBEDDINGS/MODEL/TASK

--python is an interpreter with heareval and hear_ssam (`hear-ssam heareval --help` says how to install it). A folder is
one task's, as `hear-ssam evaluate` or heareval wrote it. Every probe searches heareval's eight grid points with seed 42
on its own copy. heareval has one process and all cores for its products; `hear-ssam evaluate` has a process a core.
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
from .collections import Measured, measure_command
from .cpu import facts, heading


def copied(source: Path, folder: Path, epochs: int | None) -> Path:
    """A copy of the embeddings of a task without anyone's results, with at most `epochs` for a head."""
    copy: Path = folder / source.parent.name / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*predict*", "*.pt", "logs"))
    if epochs:
        file = copy / "task_metadata.json"
        metadata = json.loads(file.read_text())
        grid = metadata.setdefault("evaluation_params", {}).setdefault("task_specific_param_grid", {})
        grid["max_epochs"] = [epochs]
        file.write_text(json.dumps(metadata))
    return copy


def heareval_score(folder: Path) -> float:
    """The first score as heareval wrote it: of the test split, or the mean over folds."""
    found: dict[str, Any] = json.loads((folder / "test.predicted-scores.json").read_text())
    folds = found.get("aggregated_scores")
    return float(folds["test_score_mean"] if folds else found["test"]["test_score"])


def our_score(results: Path) -> float:
    """The first score as `hear-ssam evaluate` wrote it: of the test split, or the mean over folds."""
    kept = records.read(results / "records.jsonl")
    (score,) = (record["score"] for record in kept if record["primary"] and record["fold"] is None)
    return float(score)


def main(arguments: list[str]) -> int:
    parser = plain_parser("heareval", __doc__)
    parser.add_argument("tasks", nargs="+", type=Path, metavar="EMBEDDINGS", help="folder of one task's embeddings")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with heareval and hear_ssam")
    parser.add_argument("--probes", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--epochs", type=int, help="at most so many for a head, in all three (default: heareval's 500)")
    args = parser.parse_args(arguments)
    cores = usable_cpus()
    print(heading("heareval's probe and ours", facts(cores) | {"made with": json.dumps(vars(args), default=str)}))
    print("| task | probe | seconds | times heareval's | of the CPU | times heareval's | peak MB | score in % |")
    print("|---|---|---|---|---|---|---|---|")
    for source in args.tasks:
        with tempfile.TemporaryDirectory() as temporary:
            first: Measured | None = None
            for probe in ("heareval", *args.probes):
                folder, results = copied(source, Path(temporary) / probe, args.epochs), Path(temporary) / f"{probe}-out"
                ours = "--embeddings-dir", folder.parent, "--results-dir", results, "--probe", probe
                command = [sys.executable, "-m", "hear_ssam", "evaluate", *ours]
                if probe == "heareval":
                    command = [args.python.absolute(), "-m", "hear_ssam", "heareval", "predictions", folder]
                threads = cores if probe == "heareval" else 1
                found = measure_command(*command, environment={"OMP_NUM_THREADS": str(threads)})
                first = first or found
                score = heareval_score(folder) if probe == "heareval" else our_score(results)
                ratios = first.seconds / found.seconds, first.cpu / found.cpu
                times = f"{found.seconds:.1f} | {ratios[0]:.2f} | {found.cpu:.1f} | {ratios[1]:.2f} | {found.peak:.0f}"
                print(f"| {source.name} | {probe} | {times} | {100 * score:.3f} |", flush=True)
    return 0
