"""Tables of results: tasks × models, mean over seeds with a 95 % t-interval. Every table is a view of the records.

Two aggregates stand below the tasks, over the tasks on which every model of the table has a score:

s(m)   100 × mean over tasks of max(0, (score − baseline) / (best − baseline)), the aggregate of Yuksel et al. (GRAM)
       after SUPERB; `best` is the best model of the same table, so s(m) depends on who is compared.
rank   mean over tasks of the rank among the models of the table, 1 for the best, ties share their mean rank.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..options import BASELINE
from .records import Record
from .tasks import known_tasks


class Cell(NamedTuple):
    """One model on one task: the primary metric of every seed, their mean and the `interval` around it."""

    scores: tuple[float, ...]
    mean: float
    half_width: float | None

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - (self.half_width or 0), self.mean + (self.half_width or 0)

    def text(self, metric: str) -> str:
        width = "" if self.half_width is None else f" ± {as_text(self.half_width, metric)}"
        return as_text(self.mean, metric) + width


@dataclass(frozen=True)
class Table:
    """Primary scores of one protocol and probe. `records` has one per task, model and seed, undefined scores too."""

    protocol: str
    probe: str
    tasks: dict[str, str]  # task → primary metric
    models: list[str]
    cells: dict[tuple[str, str], Cell]  # (task, model); missing where there is no result, or none that is defined
    sign: dict[str, int]  # task → 1 where larger scores are better, else -1
    records: list[Record]
    changed: list[str]  # tasks and models with results from before they were changed, which are left out

    def best(self, task: str) -> str | None:
        """The model with the best mean on a task, None where fewer than two have one."""
        means = {m: self.sign[task] * self.cells[task, m].mean for m in self.models if (task, m) in self.cells}
        return max(means, key=means.__getitem__) if len(means) > 1 else None

    def close_to_best(self, task: str, model: str) -> bool:
        """Whether a model is not significantly worse than the best (Welch's t-test over seeds, two-sided, 5 %)."""
        best = self.best(task)
        if best is None or best == model or (task, model) not in self.cells:
            return False
        a, b = self.cells[task, best].scores, self.cells[task, model].scores
        if min(len(a), len(b)) < 2 or (len(set(a)) == len(set(b)) == 1):
            return False
        from scipy.stats import ttest_ind

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the scores of one hardly differ
            return bool(ttest_ind(a, b, equal_var=False).pvalue >= 0.05)

    @property
    def common_tasks(self) -> list[str]:
        """Tasks on which every model has a score."""
        return [task for task in self.tasks if all((task, model) in self.cells for model in self.models)]


def interval(values: Sequence[float]) -> float | None:
    """Half-width of the 95 % t-interval of the mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def tables(records: Iterable[Record]) -> list[Table]:
    """One table per protocol and probe; models with the same name and different checkpoints are told apart.

    A score that is undefined counts in no mean, but its task and model are in the table. Of a task that was changed,
    only results since then count: earlier ones are no further seeds of it, and no rivals. Seeds of a model have the
    origin of its last one.
    """
    chosen = [r for r in records if r["fold"] is None and r["primary"]]
    checkpoints = Counter(model for model, _ in {(r["model"], r["checkpoint_sha256"]) for r in chosen})
    digests = [f"@{r['checkpoint_sha256'][:8]}" if checkpoints[r["model"]] > 1 else "" for r in chosen]
    labelled: list[Record] = [{**r, "label": r["model"] + own} for r, own in zip(chosen, digests, strict=True)]
    made = []
    for protocol, probe in dict.fromkeys((r["protocol"], r["probe"]) for r in chosen):
        every = [row for row in labelled if (row["protocol"], row["probe"]) == (protocol, probe)]
        in_time = sorted(every, key=lambda row: row.get("time", ""))
        last = {row["task"]: (row["version"], row["metric"]) for row in in_time}
        latest = {(row["task"], row["label"]): _made_of(row) for row in in_time}
        since = [row for row in every if (row["version"], row["metric"]) == last[row["task"]]]
        rows = [row for row in since if _made_of(row) == latest[row["task"], row["label"]]]
        scores: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row["score"] is not None:
                scores.setdefault((row["task"], row["label"]), []).append(row["score"])
        tasks = {task: metric for task, (_, metric) in sorted(last.items())}
        here = {row["label"] for row in rows}
        models = [label for label in dict.fromkeys(row["label"] for row in labelled) if label in here]  # one order
        cells = {at: Cell(tuple(found), statistics.mean(found), interval(found)) for at, found in scores.items()}
        sign = {row["task"]: 1 if row["maximize"] else -1 for row in rows}
        changed = sorted({row["task"] for row in every if (row["version"], row["metric"]) != last[row["task"]]})
        changed += sorted({row["label"] for row in since if _made_of(row) != latest[row["task"], row["label"]]})
        made.append(Table(protocol, probe, tasks, models, cells, sign, rows, changed))
    return made


def _made_of(record: Record) -> list[Any]:
    """What tells embeddings of one name apart."""
    names = "module module_version module_sha256 weights_sha256 audio_hz task_sha256 written_ns".split()
    return [record.get("embeddings", {}).get(name) for name in names]


def as_text(value: float, metric: str) -> str:
    """A score in percent; d' and error rates, which are no shares, as they are."""
    return f"{value:.2f}" if metric.startswith(("d_prime", "segment")) else f"{100 * value:.1f}"


def grid(table: Table, published: bool, bold: Callable[[str], str]) -> list[list[str]]:
    """The table as text, header first: the best of a row in bold, ≈ before one that is not significantly worse."""
    outside = _published(table) if published else {}
    rows = [["task", "metric", *table.models, *(f"{model} †" for model in outside)]]
    for task, metric in table.tasks.items():
        row = [task, metric]
        best = table.cells.get((task, table.best(task) or ""))
        for model in table.models:
            cell = table.cells.get((task, model))
            text = "≈ " * table.close_to_best(task, model) + (cell.text(metric) if cell else "–")
            row.append(bold(text) if cell and best and cell.mean == best.mean else text)
        row += [as_text(found[task]["score"], metric) if task in found else "–" for found in outside.values()]
        rows.append(row)
    count = len(table.common_tasks)
    for name, values in aggregates(table).items():
        rows.append([name, f"{count} task{'s' * (count != 1)}", *(f"{v:.1f}" for v in values), *("–" for _ in outside)])
    return rows


def aggregates(table: Table) -> dict[str, list[float]]:
    """The rows below the tasks, where there are rivals: s(m) if the baseline logmel is one of them, and mean rank.

    A task on which nobody beats the baseline counts 0 in s(m).
    """
    shares, ranks = [], []
    if len(table.models) < 2 or not table.common_tasks:
        return {}
    from scipy.stats import rankdata

    for task in table.common_tasks:
        means = {model: table.sign[task] * table.cells[task, model].mean for model in table.models}
        best, base = max(means.values()), means.get(BASELINE, 0.0)
        shares.append([0.0 if best == base else max(0.0, (own - base) / (best - base)) for own in means.values()])
        ranks.append(rankdata([-own for own in means.values()]).tolist())
    below = {"s(m)": [100 * statistics.mean(one) for one in zip(*shares, strict=True)]}
    below["rank"] = [statistics.mean(one) for one in zip(*ranks, strict=True)]
    return below if BASELINE in table.models else {"rank": below["rank"]}


def _published(table: Table) -> dict[str, dict[str, dict[str, Any]]]:
    """Model → task → published score and its source, for the tasks of the table that are HEAR's own."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, card in known_tasks().items():
        for row in card.published if task in table.tasks else ():
            found.setdefault(row["model"], {})[task] = row
    return found


def caption(table: Table, published: bool = False) -> str:
    """Protocol, seeds, and what the marks and aggregates mean."""
    seeds = sorted(set(Counter((record["task"], record["label"]) for record in table.records).values()))
    count = "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    text = f"Protocol {table.protocol}, probe {table.probe}, {count} seed{'s' * (count != '1')}; scores in %"
    if seeds[-1] > 1:
        text += ", mean ± 95 % t-interval over seeds; ≈ not significantly worse than the best (Welch, 5 %)"
    if any(record["score"] is None for record in table.records):
        text += "; scores that are not finite are left out"
    if table.changed:
        text += f"; results from before {', '.join(table.changed)} was changed are left out"
    for limit in sorted({record["limit"] for record in table.records if "limit" in record}):
        text += f"; -limit{limit}: only {limit} clips of each split, no HEAR scores"
    below = aggregates(table)
    if "s(m)" in below:
        text += "; s(m) = 100 × mean over tasks of max(0, (score − baseline) / (best − baseline)), "
        text += f"baseline {BASELINE}, best of {', '.join(table.models)}"
    if below:
        text += "; rank: mean over tasks, 1 is best"
    if published and (outside := _published(table)):
        sources = {row["source"] for found in outside.values() for row in found.values()}
        text += f"; † published, not measured here ({len(outside)} models; {'; '.join(sorted(sources))})"
    return text + "."


def agreement(records: Iterable[Record]) -> list[list[str]]:
    """How alike two probes rank, as text, header first: Spearman's correlation over what both have judged.

    Over models, the mean of the tasks with at least three; over tasks, the mean of the models with at least three.
    Empty where no two probes can be compared.
    """
    from scipy.stats import spearmanr

    rows = []
    for one, other in itertools.combinations(tables(records), 2):
        both = [at for at in one.cells if at in other.cells]
        found = []
        for fixed, what in ((0, "task"), (1, "model")):
            groups = [[at for at in both if at[fixed] == name] for name in dict.fromkeys(at[fixed] for at in both)]
            means = [[[table.cells[at].mean for at in group] for table in (one, other)] for group in groups]
            values = [spearmanr(*pair).statistic for pair in means if min(len(set(scores)) for scores in pair) >= 3]
            count = f"{len(values)} {what}{'s' * (len(values) != 1)}"
            found.append(f"{statistics.mean(values):.2f} ({count})" if values else "–")
        if any(text != "–" for text in found):
            rows.append([*(f"{table.probe} ({table.protocol})" for table in (one, other)), *found])
    return [["probe", "and probe", "agree over models (ρ)", "over tasks (ρ)"], *rows] if rows else []


def terminal(records: list[Record], published: bool = False) -> str:
    """Aligned columns; * marks the best of a row."""
    texts = [f"{caption(t, published)}\n{aligned(grid(t, published, '*{}*'.format))}" for t in tables(records)]
    return "\n".join([*texts, *map(aligned, filter(None, [agreement(records)]))])


def aligned(rows: list[list[str]]) -> str:
    """Rows of text, header first, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines) + "\n"


def markdown(records: list[Record], published: bool = False) -> str:
    """Pipe tables; the best of a row in bold."""

    def piped(rows: list[list[str]]) -> str:
        header, *lines = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
        return "\n".join([header, "|" + "---|" * len(rows[0]), *lines]) + "\n"

    texts = [f"{caption(t, published)}\n\n{piped(grid(t, published, '**{}**'.format))}" for t in tables(records)]
    return "\n".join([*texts, *map(piped, filter(None, [agreement(records)]))])


_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    | {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$", "≈": r"$\approx$", "†": r"$\dagger$"}
    | {"×": r"$\times$", "−": "--", "–": "--", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "≥": r"$\geq$"}
)


def latex(records: list[Record], published: bool = False) -> str:
    """One table environment (package booktabs) per protocol and probe."""
    texts = []
    for table in tables(records):
        rows = grid(table, published, "\x02{}\x03".format)  # marks of bold, until the rest is escaped
        lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows]
        lines = [line.replace("\x02", r"\textbf{").replace("\x03", "}") for line in lines]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        columns = "ll" + "r" * (len(rows[0]) - 2)
        head = f"\\begin{{table}}\n\\centering\n\\caption{{{caption(table, published).translate(_LATEX)}}}\n"
        texts.append(f"{head}\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}\n")
    return "\n".join(texts)


CSV_COLUMNS = ("model", "task", "protocol", "seed", "metric", "score", "fold", "probe", "checkpoint_sha256", "version")


def comma_separated(records: list[Record], published: bool = False) -> str:
    """Every record: scores as fractions, HEAR's metric names; `fold` is empty for the mean over folds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


FORMATS = {"terminal": terminal, "markdown": markdown, "csv": comma_separated, "latex": latex}
