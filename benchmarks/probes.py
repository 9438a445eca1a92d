"""Whether the fast probe's scores are statistically those of the exact one: both, with many seeds, task by task.

    python -m benchmarks probes                                          # the demo task, the default model
    python -m benchmarks probes --tasks-dir TASKS --tasks esc50-v2.0.0-full fsd50k-v1.0-full
    python -m benchmarks probes --embeddings-dir EMBEDDINGS              # finished embeddings of any model

What is in the results folder already is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from scipy.stats import ttest_ind

from hear_ssam.evaluate import run_evaluation
from hear_ssam.paths import shipped


def scores(args: argparse.Namespace, probe: str) -> dict[str, list[float]]:
    """Task → scores in % of all seeds."""
    source = {"embeddings_dir": args.embeddings_dir} if args.embeddings_dir else {"tasks_dir": args.tasks_dir}
    options = {"tasks": args.tasks, "protocol": args.protocol, "seeds": args.seeds, "workers": args.workers}
    evaluation = run_evaluation(results_dir=args.results_dir, probe=probe, **source, **options)
    if evaluation.failures:
        raise SystemExit("\n".join(f"{name}: {reason}" for name, reason in evaluation.failures.items()))
    found: dict[str, list[float]] = {}
    for record in evaluation.records:
        if record["fold"] is None and record["primary"] and record["score"] is not None:
            found.setdefault(record["task"], []).append(100 * record["score"])
    return found


def main(arguments: list[str]) -> int:
    """`python -m benchmarks probes`: print one row per task."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks-dir", type=Path, default=shipped("eval_tasks") / "demo" / "tasks")
    parser.add_argument("--embeddings-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--protocol", default="ssam")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--results-dir", type=Path, default=Path("runs/probes"))
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error("a deviation needs at least two seeds")
    exact, fast = (scores(args, probe) for probe in ("exact", "fast"))
    print(f"Protocol {args.protocol}, {args.seeds} seeds, scores in %: mean and standard deviation; Welch's test.\n")
    print("| task | exact | fast | fast - exact | standard error | p |\n|---|---|---|---|---|---|")
    for task, values in exact.items():
        both = (values, fast[task])  # without seeds whose score is not finite
        means = [f"{statistics.mean(v):.2f}, {statistics.stdev(v):.2f}" for v in both]
        difference = statistics.mean(fast[task]) - statistics.mean(values)
        error = sum(statistics.variance(v) / len(v) for v in both) ** 0.5
        p = ttest_ind(*both, equal_var=False).pvalue
        print(f"| {task} | {means[0]} | {means[1]} | {difference:+.2f} | {error:.2f} | {p:.2f} |")
    return 0
