"""`hear-ssam report`: tables of results on screen, as Markdown, CSV or LaTeX, and one self-contained HTML page.

The page shows, besides the tables, for every task: the scores with their intervals, and for every model the confusion
matrix of one seed, the first two principal components of the embeddings, and the validation curves of its heads. The
drawings are SVG; the page loads nothing.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import BASELINE
from ..errors import HearSsamError
from ..paths import atomic_write
from .records import Record, embeddings_folder, predictions_file, read
from .tables import FORMATS, Options, Table, agreement, as_text, caption, grid, tables
from .tasks import DONE, read_task

EXAMPLES = """examples:
  hear-ssam report results
  hear-ssam report results --format csv -o scores.csv
  hear-ssam report results --protocol ssam --format markdown --published
  hear-ssam report results --format html -o results.html
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="tables of evaluation results",
        description="Show the results that `hear-ssam evaluate` stored: tasks × models, primary metric of each task.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="results folder, or its records.jsonl")
    add("--format", choices=[*FORMATS, "html"], default="terminal", help="default: terminal")
    add("-o", "--output", type=Path, metavar="FILE", help="write to a file instead of the screen")
    add("--protocol", help="only results of this protocol")
    add("--baseline", metavar="MODEL", help=f"model that counts as zero in s(m) (default: {BASELINE}, if it was run)")
    add("--published", action="store_true", help="show published scores of HEAR's tasks beside these, marked †")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    records = [r for r in read(args.results) if args.protocol in (None, r["protocol"])]
    if not records:
        of_protocol = f" of protocol {args.protocol}" if args.protocol else ""
        raise HearSsamError(f"{args.results}: holds no results{of_protocol}; `hear-ssam evaluate` puts them there.")
    options = Options(args.baseline, args.published)
    if args.format == "html":
        text = page(records, options, args.results if args.results.is_dir() else args.results.parent)
    else:
        text = FORMATS[args.format](records, options)
    if args.output is None:
        sys.stdout.write(text)
    else:
        with atomic_write(args.output) as path:
            path.write_text(text, encoding="utf-8")
    return 0


# ---- what pictures show ---------------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What a job stored of one seed; the arrays are float32 (clips, classes), without clips for event tasks."""

    labels: list[str]
    histories: list[list[dict[str, float]]]  # the validations of every training
    target: np.ndarray
    prediction: np.ndarray


def read_predictions(path: Path) -> Predictions:
    """A file of `predictions_file`, the clips of all test folds joined."""
    with np.load(path) as stored:
        labels = stored["labels"].tolist()
        folds = [name.removesuffix("/target") for name in stored.files if name.endswith("/target")]
        none = [np.zeros((0, len(labels)), np.float32)]
        target, prediction = (
            np.concatenate([stored[f"{fold}/{kind}"] for fold in folds] or none) for kind in ("target", "prediction")
        )
        return Predictions(labels, json.loads(str(stored["histories"])), target, prediction)


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Number of clips (true class, predicted class) of a multiclass task."""
    counts = np.zeros((len(predictions.labels),) * 2, int)
    np.add.at(counts, (predictions.target.argmax(1), predictions.prediction.argmax(1)), 1)
    return counts


def principal_components(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first components of embedding rows (N, D): projections (N, count) and shares of the variance (count,).

    The sign of a component is free; the one that makes its largest projection positive is taken. Components that the
    rows do not have are zero.
    """
    left, singular, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    missing = max(0, count - len(singular))
    projected = np.pad(left * singular, ((0, 0), (0, missing)))[:, :count]
    projected *= np.where(projected.max(0) < -projected.min(0), -1, 1)
    shares = singular**2 / max(float((singular**2).sum()), 1e-30)
    return projected, np.pad(shares, (0, missing))[:count]


# ---- the page ------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5d8dc, #3c4148); --soft: light-dark(#6b7178, #9aa1a9);
  --mark: light-dark(#1f6feb, #6aa5ff); --bg: light-dark(#fff, #15181c); --fg: light-dark(#1c2024, #e6e8ea); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
  background: var(--bg); color: var(--fg); }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem } h3 { font-size: .95rem; margin: .2rem 0 }
p, figcaption { color: var(--soft); max-width: 75ch } figcaption { font-size: .8rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid var(--mark) }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 0 2rem; align-items: start }
h3 { grid-column: 1 / -1 } .key { display: inline-block; margin-right: .8em } .wide { max-width: 720px }
figure { margin: .5rem 0 } svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft);
  font: 11px system-ui, sans-serif } .frame { fill: none; stroke: var(--line) }
.bar { stroke: var(--mark); stroke-width: 2 } .dot { fill: var(--mark) } .curve { fill: none; stroke: var(--mark);
  opacity: .45 } .cell { fill: var(--mark) }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const header = button.parentElement, body = header.closest("table").tBodies[0];
  const up = header.getAttribute("aria-sort") === "descending";
  for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[header.cellIndex].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)) * (up ? 1 : -1));
  body.append(...rows);
});
"""


def page(records: list[Record], options: Options, results_dir: Path) -> str:
    """The HTML page of all tables; pictures are drawn where predictions and embeddings lie in `results_dir`."""
    parts = []
    for table in tables(records):
        parts += [f"<h2>{_text(table.protocol)} protocol, probe {_text(table.probe)}</h2>", _sortable(table, options)]
        parts += [f"<p>{_text(caption(table, options))}</p>"]
        for task in table.tasks:
            parts += [f"<h2>{_text(task)}</h2>", _intervals(table, task), *_models(table, task, results_dir)]
    if rows := agreement(records):
        lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
        parts += ["<h2>How the probes agree</h2><p>Rank correlation (Spearman) of the scores that two probes give.</p>"]
        parts += ['<div class="scroll"><table>', *(f"<tr>{line}</tr>" for line in lines), "</table></div>"]
    head = '<meta charset="utf-8"><title>HEAR scores</title><meta name="viewport" content="width=device-width">'
    body = f"<style>{_STYLE}</style><h1>HEAR scores</h1>{''.join(parts)}<script>{_SCRIPT}</script>"
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(drawing: str, words: str, key: str = "") -> str:
    return f"<figure>{drawing}<figcaption>{_text(words)} {key}</figcaption></figure>"


def _svg(width: int, height: int, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'


def _sortable(table: Table, options: Options) -> str:
    """The table with headers that sort its tasks; aggregates stay below."""
    header, *rows = grid(table, options, "\x02{}".format)
    head = "".join(f"<th><button>{_text(cell)}</button></th>" for cell in header)
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            text = cell.removeprefix("\x02")
            number = text.removeprefix("≈ ").split(" ")[0]
            value = text if column < 2 else "-1" if number == "–" else number
            bold = f"<b>{_text(text)}</b>" if text != cell else _text(text)
            cells.append(f'<td data-value="{_text(value)}">{bold}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body, foot = "".join(lines[: len(table.tasks)]), "".join(lines[len(table.tasks) :])
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
    return f'<div class="scroll">{content}</div>'


def _intervals(table: Table, task: str) -> str:
    """One row per model that has a score: a dot at the mean, a line for the interval, a tick for every seed."""
    cells = [(model, table.cells[task, model]) for model in table.models if (task, model) in table.cells]
    if not cells:
        return ""
    ends = [cell.mean + sign * (cell.half_width or 0) for _, cell in cells for sign in (-1, 1)]
    ends += [score for _, cell in cells for score in cell.scores]
    low, high = min(ends), max(ends)
    span = high - low or 1
    left, width, shapes = 220, 700, []

    def x(value: float) -> float:
        return round(left + 20 + (width - left - 60) * (value - low) / span, 1)

    for number, (model, cell) in enumerate(cells):
        y, half = 14 + 24 * number, cell.half_width or 0
        shapes += [
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{_text(model)}</text>',
            f'<line class="bar" x1="{x(cell.mean - half)}" x2="{x(cell.mean + half)}" y1="{y}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(cell.mean)}" cy="{y}" r="4"/>',
            *(f'<circle class="dot" opacity=".35" cx="{x(s)}" cy="{y + 7}" r="1.5"/>' for s in cell.scores),
        ]
    bottom = 24 * len(cells) + 18
    for value in dict.fromkeys((low, high)):
        text = as_text(value, table.tasks[task])
        shapes.append(f'<text x="{x(value)}" y="{bottom}" text-anchor="middle">{text}</text>')
    words = f"{table.tasks[task]}: mean, 95 % interval and single seeds"
    return f'<div class="wide">{_figure(_svg(width, bottom + 6, shapes), words)}</div>'


def _models(table: Table, task: str, results_dir: Path) -> Iterable[str]:
    """The drawings of each model's first seed on one task."""
    for model in table.models:
        records = [r for r in table.records if (r["task"], r["label"]) == (task, model)]
        if not records:
            continue
        record = min(records, key=lambda r: r["seed"])
        stored = predictions_file(results_dir, record)
        figures = _prediction_figures(stored) if stored.exists() else []
        own = embeddings_folder(results_dir, record["model"], record["checkpoint_sha256"], task)
        given = record.get("embeddings", {}).get("folder")  # where an evaluation of finished embeddings found them
        places = [place for place in (own, Path(given or own)) if (place / DONE).exists()]
        if places:
            figures.append(_figure(*_embedding_map(places[0])))
        if figures:
            yield f"<section><h3>{_text(model)}</h3>{''.join(figures)}</section>"


def _prediction_figures(path: Path) -> list[str]:
    predictions = read_predictions(path)
    labels, histories, target, _ = predictions
    figures = []
    if len(target) and (target.sum(1) == 1).all():
        words = f"confusion matrix, rows are true: {len(target)} clips, seed {path.stem.rpartition('seed')[2]}"
        figures.append(_figure(_confusion(confusion_matrix(predictions).tolist(), labels), words))
    if not histories:
        return figures
    key = "val_score" if "val_score" in histories[0][0] else "val_loss"
    words = f"{key.replace('val_', 'validation ')} over epochs of all {len(histories)} heads"
    return [*figures, _figure(_curves(histories, key), words)]


def _confusion(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """A square per pair of classes, the more opaque the larger its share of the true class; empty ones are left out."""
    left = 80 if len(labels) <= 16 else 5
    step = (300 - left) / len(labels)
    shapes = [f'<rect class="frame" x="{left}" y="5" width="{300 - left}" height="{300 - left}"/>']
    for row, line in enumerate(counts):
        if len(labels) <= 16:
            middle = 5 + (row + 0.5) * step + 4
            shapes.append(f'<text x="{left - 5}" y="{middle:.1f}" text-anchor="end">{_text(labels[row][:12])}</text>')
        for column, count in enumerate(line):
            if count:
                x, y, share = left + column * step, 5 + row * step, count / sum(line)
                tip = _text(f"{labels[row]} → {labels[column]}: {count}")
                square = f'x="{x:.1f}" y="{y:.1f}" width="{step:.1f}" height="{step:.1f}" opacity="{share:.2f}"'
                shapes.append(f'<rect class="cell" {square}><title>{tip}</title></rect>')
    return _svg(305, 310 - left, shapes)


def _curves(histories: Sequence[Sequence[dict[str, float]]], key: str) -> str:
    curves = [[(c["epoch"], c[key]) for c in history if math.isfinite(c[key])] for history in histories]
    points = [point for curve in curves for point in curve] or [(0, 0.0)]
    last, low, high = max(x for x, _ in points) or 1, min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1
    shapes = ['<rect class="frame" x="40" y="5" width="260" height="140"/>']
    for curve in curves:
        line = " ".join(f"{40 + 260 * x / last:.1f},{145 - 140 * (y - low) / span:.1f}" for x, y in curve)
        shapes.append(f'<polyline class="curve" points="{line}"/>')
    for y, value in ((12, high), (145, low)):
        shapes.append(f'<text x="36" y="{y}" text-anchor="end">{value:.2f}</text>')
    return _svg(305, 165, [*shapes, f'<text x="300" y="160" text-anchor="end">{last:.0f}</text>'])


def _embedding_map(folder: Path, most: int = 500) -> tuple[str, str, str]:
    """The first two principal components of (at most 500) test rows, coloured by class, with words and key."""
    from .rows import read_rows

    task = read_task(folder)
    rows = read_rows(task, task.data_splits[0].test)
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    x, target = rows.x.numpy()[chosen], rows.target.numpy()[chosen]
    places, shares = principal_components(x, 2)  # (rows, 2), drawn by the range of each
    places = 15 + 270 * (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-30)
    hues = [f"hsl({360 * index // len(task.labels)} 65% 55%)" for index in range(len(task.labels))]
    shapes = ['<rect class="frame" x="5" y="5" width="290" height="290"/>']
    for (across, up), row in zip(places, target, strict=True):
        hue = hues[row.argmax()] if row.any() else "var(--line)"
        label = ", ".join(task.labels[i] for i in np.flatnonzero(row))
        place = f'cx="{across:.1f}" cy="{300 - up:.1f}"'
        shapes.append(f'<circle {place} r="2.5" fill="{hue}"><title>{_text(label)}</title></circle>')
    named = zip(task.labels, hues, strict=True) if len(hues) <= 16 else ()
    key = "".join(f'<span class="key" style="color: {hue}">● {_text(label)}</span>' for label, hue in named)
    words = f"{len(chosen)} embeddings of the first test split: two principal components, "
    return _svg(300, 300, shapes), f"{words}{100 * shares.sum():.0f} % of the variance", key
