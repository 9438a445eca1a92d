"""`hear-ssam report`: tables of results on screen, as Markdown, CSV or LaTeX, and one self-contained HTML page.

The page (`report.html.j2`): the tables, how the probes agree, what the results come from and, of every task, its
standings with intervals and each model's drawings: a map of its embeddings and, of the first seed of each probe, the
confusion matrix, whose cells play their clips, and the validation curves of its heads.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import math
import mimetypes
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import HearSsamError
from ..paths import link, write_whole
from .jobs import noted
from .records import Record, embeddings_folder, predictions_file, read
from .tables import FORMATS, Cell, Table, agreement, caption, grid, tables
from .tasks import DONE, known_tasks, read_task

MOST_MB = 8  # of clips inside a page
ORIGIN = "model checkpoint_sha256 module module_version audio_hz dim dtype device hear_ssam commit torch python".split()
Figure = dict[str, Any]  # what the template draws
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
    formats = f"default: terminal; html is one page, with the clips that it plays inside, or links beyond {MOST_MB} MB"
    add("--format", choices=[*FORMATS, "html"], default="terminal", help=formats)
    add("-o", "--output", type=Path, metavar="FILE", help="write to a file instead of the screen")
    add("--protocol", help="only results of this protocol")
    add("--published", action="store_true", help="show published scores of HEAR's tasks beside these, marked †")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    records = [r for r in read(args.results) if args.protocol in (None, r["protocol"])]
    if not records:
        of_protocol = f" of protocol {args.protocol}" if args.protocol else ""
        raise HearSsamError(f"{args.results}: holds no results{of_protocol}; `hear-ssam evaluate` puts them there.")
    write = FORMATS.get(args.format)
    text = write(records, args.published) if write else page(records, args.results, args.output, args.published)
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_whole(args.output, text)
    return 0


class Predictions(NamedTuple):
    """What a job stored of one seed; the arrays are float32 (clips, classes), without clips for event tasks."""

    labels: list[str]
    histories: list[list[dict[str, float]]]  # the validations of every training
    folds: list[str]  # the test splits whose clips are joined
    target: np.ndarray
    prediction: np.ndarray


def read_predictions(path: Path) -> Predictions:
    """A file of `predictions_file`, the clips of all test folds joined."""
    with open(path, "rb") as file, np.load(file) as stored:
        labels = stored["labels"].tolist()
        folds = [name.removesuffix("/target") for name in stored.files if name.endswith("/target")]
        arrays = (
            np.concatenate([np.zeros((0, len(labels)), np.float32), *(stored[f"{fold}/{kind}"] for fold in folds)])
            for kind in ("target", "prediction")
        )
        return Predictions(labels, json.loads(str(stored["histories"])), folds, *arrays)


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Number of clips (true class, predicted class) of a multiclass task."""
    counts = np.zeros((len(predictions.labels),) * 2, int)
    np.add.at(counts, (predictions.target.argmax(1), predictions.prediction.argmax(1)), 1)
    return counts


def principal_components(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first components of embedding rows (N, D): projections (N, count) and shares of the variance (count,).

    Signs are free: the largest projection of each is positive. Components that the rows do not have are zero.
    """
    left, singular, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    missing = max(0, count - len(singular))
    projected = np.pad(left * singular, ((0, 0), (0, missing)))[:, :count]
    projected *= np.where(projected.max(0) < -projected.min(0), -1, 1)
    shares = singular**2 / max(float((singular**2).sum()), 1e-30)
    return projected, np.pad(shares, (0, missing))[:count]


def page(records: list[Record], results: Path, output: Path | None = None, published: bool = False) -> str:
    """The HTML page `output` of all tables; drawings are of what lies with `results`, a folder or the store in it.

    The clips that it plays are in the page, or links where they take more than `MOST_MB`.
    """
    import jinja2
    from markupsafe import Markup

    found, clips, folder = tables(records), dict[Path, int](), results if results.is_dir() else results.parent
    names = sorted({name for table in found for name in table.tasks})
    tasks = [_task(name, [t for t in found if name in t.tasks], published, folder, clips) for name in names]
    beside = (output or Path("page")).resolve().parent
    sources = [link(path, beside) for path in clips]
    if inside := sum(path.stat().st_size for path in clips) <= 1e6 * MOST_MB:
        kinds = (mimetypes.guess_type(path)[0] or f"audio/{path.suffix[1:]}" for path in clips)  # not all systems know
        coded = (base64.b64encode(path.read_bytes()).decode() for path in clips)
        sources = [f"data:{kind};base64,{data}" for kind, data in zip(kinds, coded, strict=True)]
    merged = [{**r, **r.get("embeddings", {}), **r.get("versions", {})} for r in records]
    origins = sorted({tuple(str(one.get(name) or "–") for name in ORIGIN) for one in merged})
    text = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(
        tables=[(t, grid(t, False, Markup("<b>{}</b>").format), caption(t)) for t in found],
        tasks=tasks, agreement=agreement(records), origins=[ORIGIN, *origins], inside=inside, most=MOST_MB,
        clips=[(path.name, source) for path, source in zip(clips, sources, strict=True)],
    )  # fmt: skip


def _task(name: str, found: list[Table], published: bool, results: Path, clips: dict[Path, int]) -> Figure:
    """The standings of a task (header first, cells of each model and table) and their range; each model's figures."""
    card, models = known_tasks().get(name), dict.fromkeys(model for table in found for model in table.models)
    outside = card.published if card and published else ()
    head = ["model", *(f"{table.probe} ({table.protocol})" for table in found), *["published †"] * bool(outside)]
    rows = [[m, *(t.cells.get((name, m), "–") for t in found), *["–"] * bool(outside)] for m in models]
    rows += [[f"{row['model']} †", *["–"] * len(found), Cell((), row["score"], None)] for row in outside]
    ends = [end for row in rows for c in row if isinstance(c, Cell) for end in (*c.scores, *c.interval)] or [0.0]
    figures = {model: _figures(name, model, found, results, clips) for model in models}
    return {"name": name, "metric": found[0].tasks[name], "rows": [head, *rows], "figures": figures, "low": min(ends),
            "high": max(ends), "sources": sorted({row["source"] for row in outside})}  # fmt: skip


def _figures(task: str, model: str, found: list[Table], results: Path, clips: dict[Path, int]) -> list[Figure]:
    """The drawings of one model on one task: its embeddings, and what the first seed of each probe made of them."""
    seeds = [[r for r in table.records if (r["task"], r["label"]) == (task, model)] for table in found]
    records = [min(of_table, key=lambda r: r["seed"]) for of_table in seeds if of_table]
    own = [embeddings_folder(results, r["model"], r["checkpoint_sha256"], task) for r in records]
    given = [Path(r["embeddings"]["folder"]) for r in records if "folder" in r.get("embeddings", {})]  # elsewhere
    folder = next((place for place in (*own, *given) if (place / DONE).exists()), None)
    figures: list[Figure] = []
    with noted(f"map of {folder}", {}):  # what cannot be read is left out, and said
        figures += [_embedding_map(folder)] if folder else []
    for record in records:
        stored, words = predictions_file(results, record), {"probe": record["probe"], "seed": record["seed"]}
        with noted(str(stored), {}), contextlib.suppress(FileNotFoundError):
            predictions = read_predictions(stored)
            if len(predictions.target) and (predictions.target.sum(1) == 1).all():
                files = _audio(folder, predictions) if folder else []
                figures.append({**words, "kind": "confusion", **_confusion(predictions, files, clips)})
            if predictions.histories:
                key = "val_score" if "val_score" in predictions.histories[0][0] else "val_loss"
                heads = [[(c["epoch"], c[key]) for c in one if math.isfinite(c[key])] for one in predictions.histories]
                figures.append({**words, "kind": "curves", "score": key.removeprefix("val_"), "heads": heads})
    return figures


def _audio(folder: Path, predictions: Predictions) -> list[Path]:
    """The clip of every row of predictions of an embedding folder, empty where the audio is not at hand."""
    from .embeddings import provenance

    audio, order = provenance(folder).get("audio", {}), dict(read_task(folder).shuffled_clips())
    files = [Path(audio[fold], clip) for fold in predictions.folds if fold in audio for clip in order.get(fold, ())]
    return files if len(files) == len(predictions.target) and all(map(Path.is_file, files)) else []


def _confusion(predictions: Predictions, files: list[Path], clips: dict[Path, int]) -> Figure:
    """A cell per pair of classes that occurs: row, column, count, share of its row, and the three surest clips."""
    counts, true, said = confusion_matrix(predictions), predictions.target.argmax(1), predictions.prediction.argmax(1)
    cells = []
    for row, column in np.argwhere(counts).tolist():
        members = np.flatnonzero((true == row) & (said == column))
        surest = members[np.argsort(-predictions.prediction[members, column], kind="stable")][:3]
        played = [clips.setdefault(files[index], len(clips)) for index in surest if files]
        cells.append((row, column, counts[row, column], counts[row, column] / counts[row].sum(), played))
    return {"cells": cells, "labels": predictions.labels, "clips": len(true)}


def _embedding_map(folder: Path) -> Figure:
    """The first two principal components, each by its own range, of (at most 500) test rows, and their labels."""
    from .rows import read_rows

    task = read_task(folder)
    rows = read_rows(task, task.data_splits[0].test)
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:500])
    places, shares = principal_components(rows.x.numpy()[chosen], 2)  # (rows, 2)
    places = (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-30)
    labels = [np.flatnonzero(target).tolist() for target in rows.target.numpy()[chosen]]
    points = [(*place, found) for place, found in zip(places.tolist(), labels, strict=True)]
    return {"kind": "map", "points": points, "labels": task.labels, "shown": shares.sum()}
