"""Tables of results: tasks × models, mean over seeds with a 95 % t-interval. Every table is a view of the records."""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import HearSsamError
from .records import Record, read

EXAMPLES = """examples:
  hear-ssam report results
  hear-ssam report results --format csv > scores.csv
  hear-ssam report results --protocol ssam --format markdown
"""


@dataclass(frozen=True)
class Cell:
    """One model on one task: mean over seeds of the primary metric and the half-width of its 95 % interval."""

    mean: float
    half_width: float | None  # None for a single seed
    seeds: int


@dataclass(frozen=True)
class Table:
    """Primary scores of one protocol and probe."""

    protocol: str
    probe: str
    tasks: dict[str, str]  # task → primary metric
    models: list[str]
    cells: dict[tuple[str, str], Cell]  # (task, model); missing where there is no result
    maximize: dict[str, bool]  # task → direction

    def best(self, task: str) -> float | None:
        """The best mean on a task among models, None where fewer than two have one."""
        means = [self.cells[task, model].mean for model in self.models if (task, model) in self.cells]
        return (max if self.maximize[task] else min)(means) if len(means) > 1 else None


def interval(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % t-interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def tables(records: Iterable[Record]) -> list[Table]:
    """One table per protocol and probe; models with the same name and different checkpoints are told apart."""
    chosen = [r for r in records if r["fold"] is None and r["primary"] and r["score"] is not None]
    digests: dict[str, set[str]] = {}
    for record in chosen:
        digests.setdefault(record["model"], set()).add(record["checkpoint_sha256"])

    def label(record: Record) -> str:
        ambiguous = len(digests[record["model"]]) > 1
        return f"{record['model']}@{record['checkpoint_sha256'][:8]}" if ambiguous else record["model"]

    made = []
    for protocol, probe in dict.fromkeys((r["protocol"], r["probe"]) for r in chosen):
        rows = [r for r in chosen if (r["protocol"], r["probe"]) == (protocol, probe)]
        scores: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            scores.setdefault((row["task"], label(row)), []).append(row["score"])
        made.append(
            Table(
                protocol,
                probe,
                {row["task"]: row["metric"] for row in sorted(rows, key=lambda row: row["task"])},
                list(dict.fromkeys(map(label, rows))),
                {at: Cell(statistics.mean(v), interval(v), len(v)) for at, v in scores.items()},
                {row["task"]: row["maximize"] for row in rows},
            )
        )
    return made


def _grid(table: Table, emphasis: str) -> list[list[str]]:
    """Cells as text, in percent where the metric is a share; the best of a row between marks of `emphasis`."""
    rows = [["task", "metric", *table.models]]
    for task, metric in table.tasks.items():
        best, row = table.best(task), [task, metric]
        scale = 100 if metric not in ("d_prime", "segment_1s_er") else 1
        for model in table.models:
            cell = table.cells.get((task, model))
            text = "–" if cell is None else f"{cell.mean * scale:.1f}"
            if cell and cell.half_width is not None:
                text += f" ± {cell.half_width * scale:.1f}"
            row.append(f"{emphasis}{text}{emphasis}" if cell and cell.mean == best else text)
        rows.append(row)
    return rows


def _caption(table: Table) -> str:
    seeds = sorted({cell.seeds for cell in table.cells.values()})
    count = "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    spread = "; mean ± 95 % t-interval over seeds" if seeds[-1] > 1 else ""
    return f"protocol {table.protocol}, probe {table.probe}, {count} seed{'s' * (count != '1')}{spread}; scores in %"


def terminal(records: list[Record]) -> str:
    """Aligned columns; * marks the best of a row."""
    texts = []
    for table in tables(records):
        rows = _grid(table, "*")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("─" * width for width in widths))
        texts.append("\n".join([_caption(table), *lines]) + "\n")
    return "\n".join(texts)


def markdown(records: list[Record]) -> str:
    """Pipe tables; the best of a row in bold."""
    texts = []
    for table in tables(records):
        header, *rows = (f"| {' | '.join(row)} |" for row in _grid(table, "**"))
        rule = "|" + "---|" * (len(table.models) + 2)
        texts.append("\n".join([_caption(table), "", header, rule, *rows]) + "\n")
    return "\n".join(texts)


CSV_COLUMNS = ("model", "task", "protocol", "seed", "metric", "score", "fold", "probe", "checkpoint_sha256", "version")


def comma_separated(records: list[Record]) -> str:
    """Every record: scores as fractions, HEAR's metric names; `fold` is empty for the mean over folds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


FORMATS: dict[str, Callable[[list[Record]], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="tables of evaluation results",
        description="Show the results that `hear-ssam evaluate` stored: tasks × models, primary metric of each task.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results folder, or its records.jsonl")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="default: terminal")
    parser.add_argument("--protocol", help="only results of this protocol")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    records = [r for r in read(args.results) if args.protocol in (None, r["protocol"])]
    if not records:
        of_protocol = f" of protocol {args.protocol}" if args.protocol else ""
        raise HearSsamError(f"{args.results} holds no results{of_protocol}.")
    print(FORMATS[args.format](records), end="")
    return 0
