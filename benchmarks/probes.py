"""The exact probe and its bfloat16 variant side by side: scores and time over several seeds, task by task.

    python -m benchmarks probes                                          # the demo task, the default model
    python -m benchmarks probes --tasks-dir TASKS --tasks esc50-v2.0.0-full fsd50k-v1.0-full
    python -m benchmarks probes --embeddings-dir EMBEDDINGS              # finished embeddings of any model

What is in the results folder already is not run again. bfloat16 is faster only on a CPU that has instructions for it
(`hear-ssam doctor` names them); elsewhere the same rounded products are taken in float32.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from hear_ssam.evaluation.evaluate import run_evaluation
from hear_ssam.evaluation.jobs import HEADS
from hear_ssam.paths import shipped

from . import plain_parser


def measured(args: argparse.Namespace, probe: str) -> dict[str, list[tuple[float, float]]]:
    """Task → score in % and seconds of every seed whose score is finite."""
    source = {"embeddings_dir": args.embeddings_dir} if args.embeddings_dir else {"tasks_dir": args.tasks_dir}
    options = {"tasks": args.tasks, "protocol": args.protocol, "seeds": args.seeds, "workers": args.workers}
    evaluation = run_evaluation(results_dir=args.results_dir, probe=probe, **source, **options)
    if evaluation.failures:
        raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in evaluation.failures.items()))
    found: dict[str, list[tuple[float, float]]] = {}
    for record in evaluation.records:
        if record["fold"] is None and record["primary"] and record["score"] is not None:
            found.setdefault(record["task"], []).append((100 * record["score"], record["seconds"]))
    return found


def main(arguments: list[str]) -> int:
    """`python -m benchmarks probes`: print one row per task."""
    parser = plain_parser("probes", __doc__)
    parser.add_argument("--tasks-dir", type=Path, default=shipped("eval_tasks") / "demo" / "tasks")
    parser.add_argument("--embeddings-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--protocol", default="ssam")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--results-dir", type=Path, default=Path("runs/probes"))
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error("a deviation needs at least two seeds")
    probes = {probe: measured(args, probe) for probe in HEADS}
    print(f"Protocol {args.protocol}, {args.seeds} seeds: mean score in %, standard deviation, seconds per seed.\n")
    print(f"| task | {' | '.join(HEADS)} | difference of means | its standard error |\n|---|---|---|---|---|")
    for task in sorted(set.intersection(*(set(scores) for scores in probes.values()))):
        scores = [[score for score, _ in probes[probe][task]] for probe in HEADS]
        seconds = [statistics.mean(taken for _, taken in probes[probe][task]) for probe in HEADS]
        cells = [
            f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}, {s:.1f} s"
            for v, s in zip(scores, seconds, strict=True)
        ]
        difference = statistics.mean(scores[1]) - statistics.mean(scores[0])
        error = sum(statistics.variance(v) / len(v) for v in scores) ** 0.5
        print(f"| {task} | {' | '.join(cells)} | {difference:+.2f} | {error:.2f} |")
    return 0
