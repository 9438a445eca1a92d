"""`hear-ssam classify`: a folder per class → logistic regression on frozen embeddings, in one JSON file → a CSV."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..errors import HearSsamError, said
from ..options import STRENGTHS, add_device, add_model, add_model_options, parse_options
from ..paths import atomic_write

if TYPE_CHECKING:
    from .labels import Labelled
    from .table import Embeddings

FORMAT = "hear_ssam classifier 1"
COLUMNS = ("path", "start_ms", "end_ms", "label")  # of the predictions, before one a class

EXAMPLES = """examples:
  hear-ssam classify train sounds/ -o sounds.json                  sounds/dog/*.wav, sounds/rain/*.flac, ...
  hear-ssam classify train list.csv -o birds.json --model ssam_base.safetensors
  hear-ssam classify train embeddings.parquet --labels list.csv -o birds.json
  hear-ssam classify predict birds.json recordings/ -o birds.csv
  hear-ssam classify predict birds.json night.flac -o night.csv --window 2 --hop 1

A CSV has the columns path and label; with split (train, valid, test) the test rows are scored, else all rows are, by
cross-validation; rows of one group (a recorder, a day, an animal) are never on both sides. Relative paths start at the
folder of the CSV; with --labels also those will do that the embeddings have, and no audio need be there.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    classify = subparsers.add_parser(
        "classify",
        help="a classifier from a folder per class, and what it says of recordings",
        description="Logistic regression on frozen embeddings.",
        epilog=EXAMPLES,
    )
    commands = classify.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="learn classes, show how well", epilog=EXAMPLES)
    train.add_argument("input", metavar="FOLDER|CSV|EMBEDDINGS", help="a subfolder per class, or path and label")
    train.add_argument("--labels", metavar="CSV", help="of EMBEDDINGS, by their column path")
    train.add_argument("-o", "--output", required=True, metavar="NAME.json", help="the classifier")
    predict = commands.add_parser("predict", help="the classes of recordings as a CSV file", epilog=EXAMPLES)
    predict.add_argument("classifier", metavar="NAME.json")
    predict.add_argument("inputs", nargs="+", metavar="INPUT", help="as of `hear-ssam embed`: files, folders, ...")
    predict.add_argument("-o", "--output", required=True, metavar="FILE.csv")
    predict.add_argument("--window", type=float, default=0.0, metavar="S", help="judge windows of so many seconds")
    predict.add_argument("--hop", type=float, metavar="S", help="seconds from window to window; default: one window")
    add_model(train, "default: the shipped ssam_tiny; of EMBEDDINGS: where theirs is")
    add_model_options(train)
    train.set_defaults(run=_train)
    add_model(predict, "where the classifier's model is, if not where it was in training")
    add_device(predict)
    predict.set_defaults(run=_predict)


def _train(args: argparse.Namespace) -> int:
    from ..embedding.inputs import identity, of_file
    from ..embedding.shards import parquet_files, provenance
    from ..embedding.work import Options
    from ..hear import load_model
    from .labels import read_labels
    from .table import compute, model_of, read_embeddings

    skipped: list[str] = []
    if args.labels:
        table = [read_embeddings(args.input)]
        if args.model_options != "{}":
            raise HearSsamError("--model-options: the embeddings say with which they were made; leave it out.")
        if args.model:  # where the classifier is to find it
            model_of(table[0].made, args.input, args.model, args.device)
        labels = read_labels(args.labels, set(table[0].paths))
        there = set(map(identity, set(table[0].paths)))
        if lacking := [row.path for row in labels if identity(row.path) not in there]:
            text = f"{len(lacking)} of {len(labels)} recordings have no embeddings and are left out"
            print(f"{args.labels}: {text}, {lacking[0]} first", file=sys.stderr)
    elif any(map(provenance, parquet_files(args.input))) and not any(map(Path.is_dir, Path(args.input).glob("[!.]*"))):
        raise HearSsamError(f"{args.input}: embeddings have no labels; give them with --labels CSV.")
    else:
        labels = read_labels(args.input)
        options = parse_options(args.model_options)
        model = load_model(args.model, **{"device": args.device, **options})
        recordings = [of_file(path) for path in dict.fromkeys(row.path for row in labels)]
    with atomic_write(args.output) as path:  # asked for before the work
        if not args.labels:
            table = list(compute(recordings, model, Options("scene", model_options=options), skipped))
        if not table:
            raise HearSsamError(f"{args.input}: none of {len(skipped)} recordings could be read.")
        classifier = train(table, labels, args.labels or args.input)
        classifier["model"] = args.model or classifier["made"]["model"]
        path.write_text(json.dumps(classifier) + "\n", "utf-8")
    print(describe(classifier))
    return 1 if skipped else 0


def train(tables: list[Embeddings], labels: list[Labelled], place: object) -> dict[str, Any]:
    """A classifier of the labelled rows, as the JSON file holds it, with its scores on rows it was not fitted to.

    The strength of the penalty has the least log loss on the valid rows or, without any, in cross-validation by groups.
    With a split the test rows are scored, else the rows of each fold by the fit to the others. The rows are matched by
    path. Raises HearSsamError where embeddings of labelled recordings are missing or a class is left with one group.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import confusion_matrix, log_loss
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from tqdm import tqdm

    from ..embedding.inputs import identity

    by_path = {identity(row.path): row for row in labels}
    found = {path: by_path.get(identity(path)) for table in tables for path in set(table.paths)}
    known = [found[path] for table in tables for path in table.paths]
    x = np.concatenate([table.x for table in tables])[[row is not None for row in known]]
    rows = [row for row in known if row is not None]
    classes = sorted({row.label for row in labels})
    y, split = np.array([classes.index(row.label) for row in rows], int), np.array([row.split for row in rows])
    group = np.unique([row.group or row.path for row in rows], return_inverse=True)[1] if rows else y
    test, valid = split == "test", split == "valid"
    counts = [len(set(group[~test & ~valid & (y == c)])) for c in range(len(classes))]
    if (least := min(counts)) < 2:
        few = f"class {classes[counts.index(least)]!r} has {least} recordings with embeddings to train on"
        raise HearSsamError(f"{place}: {few}; embed all it names.")
    if not test.any() and any(row.split for row in labels):
        raise HearSsamError(f"{place}: no recording of its split test has embeddings; embed all it names.")
    fitted = ~test
    chooses = valid if valid.any() else fitted  # the rows by which the strength is chosen
    scored = test if test.any() else fitted
    grouped = x[fitted], y[fitted], group[fitted]
    cv = list(StratifiedGroupKFold(min(5, least), shuffle=True, random_state=0).split(*grouped))
    if any(len(set(grouped[1][fit])) < len(classes) for fit, _ in cv):  # few groups, and several classes in some
        cv = list(LeaveOneGroupOut().split(*grouped))

    def pipeline(strength: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))

    def attempt(strength: float) -> Any:
        if valid.any():
            return pipeline(strength).fit(x[split == "train"], y[split == "train"]).predict_proba(x[valid])
        return cross_val_predict(pipeline(strength), x[fitted], y[fitted], cv=cv, method="predict_proba")

    tried = {strength: attempt(strength) for strength in tqdm(STRENGTHS, "strengths", leave=False, disable=None)}
    strength = min(STRENGTHS, key=lambda c: log_loss(y[chooses], tried[c], labels=range(len(classes))))
    final = pipeline(strength).fit(x[fitted], y[fitted])
    scaler, regression = final[0], final[1]
    coefficients, intercept = regression.coef_ / scaler.scale_, regression.intercept_
    intercept = intercept - coefficients @ scaler.mean_
    if len(classes) == 2:  # scikit-learn keeps the second class only
        coefficients, intercept = np.stack([0 * coefficients[0], coefficients[0]]), np.array([0.0, intercept[0]])
    truth, guess = y[scored], final.predict(x[test]) if test.any() else tried[strength].argmax(1)
    confusion = confusion_matrix(truth, guess, labels=range(len(classes)))
    shares = [rows for c in range(len(classes)) for rows in (truth == c, guess == c)]  # of recall, of precision
    return {
        "format": FORMAT, "version": __version__, "model": "", "made": tables[0].made, "classes": classes,
        "C": strength, "clips": int(fitted.sum()), "confusion": confusion.tolist(),
        "scored": "the test split" if test.any() else f"{len(cv)} folds, each by the fit to the others",
        "scores": [interval((truth == guess)[rows], group[scored][rows]) for rows in [*shares, truth >= 0]],
        "intercept": [float(f"{value:.7g}") for value in intercept],
        "coefficients": [[float(f"{value:.7g}") for value in line] for line in coefficients],
    }  # fmt: skip


def interval(hits: np.ndarray, group: np.ndarray) -> tuple[float | None, float, float]:
    """The share of hits (N,) and its 95 % interval (Wilson's score interval), where those of one group are alike.

    They tell as much as fewer independent ones, by how much the groups differ (Korn & Graubard 1998, Survey Methodology
    24:193): one a group at least.
    """
    from scipy.stats import norm, t

    if not (count := len(hits)):
        return None, 0.0, 1.0
    group = np.unique(group, return_inverse=True)[1]
    share, size, right = hits.mean(), np.bincount(group), np.bincount(group, hits)
    least, degrees = count**2 / (size**2).sum(), max(1, len(size) - 1)
    spread = ((right - share * size) ** 2).sum() * len(size) / degrees
    independent = share * (1 - share) * count**2 / spread if spread > 1e-9 else 0.0
    independent *= (t.ppf(0.975, max(1, count - 1)) / t.ppf(0.975, degrees)) ** 2
    weight = norm.ppf(0.975) ** 2 / np.clip(independent, least, count)
    centre, half = share + weight / 2, math.sqrt(weight * (share * (1 - share) + weight / 4))
    return float(share), float((centre - half) / (1 + weight)), float((centre + half) / (1 + weight))


def describe(classifier: dict[str, Any]) -> str:
    """Scores per class and the confusion matrix as text."""
    classes, confusion = classifier["classes"], np.array(classifier["confusion"])
    width, scores = max(map(len, [*classes, "accuracy"])) + 4, np.array(classifier["scores"], float)

    def line(name: str, clips: int, *scores: np.ndarray) -> str:
        return f"{name:<{width}}{clips:>6}{''.join('{:6.2f} [{:.2f}, {:.2f}]'.format(*score) for score in scores)}"

    lines = [f"{'class':<{width}}{'clips':>6}{'recall':>10}{'precision':>22}"]
    for index, name in enumerate(classes):
        lines.append(line(f"{index + 1:>2}  {name}", confusion[index].sum(), *scores[2 * index : 2 * index + 2]))
    lines += [line("accuracy", confusion.sum(), scores[-1]), ""]
    size = max(4, len(str(confusion.max())) + 1)
    lines.append(f"{'true, predicted as':<{width}}" + "".join(f"{i + 1:>{size}}" for i in range(len(classes))))
    for index, name in enumerate(classes):
        cells = "".join(f"{count or '.':>{size}}" for count in confusion[index])
        lines.append(f"{index + 1:>2}  {name:<{width - 4}}{cells}")
    made = f"{classifier['clips']} clips, C={classifier['C']:g}, scored on {classifier['scored']}"
    return "\n".join([f"{len(classes)} classes, {made}; 95 % intervals", "", *lines])


def read_classifier(file: str | os.PathLike[str]) -> dict[str, Any]:
    """A file of `classify train`. Raises HearSsamError for any other."""
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        sizes = {len(found["classes"]), *np.shape(found["coefficients"])[:1], *np.shape(found["intercept"])}
        if found["format"] != FORMAT or len(sizes) > 1 or not {"model", "model_options"} <= found["made"].keys():
            raise ValueError("another format")
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HearSsamError(f"{file}: is not a classifier ({said(error)}); name one of `classify train`.") from error


def probabilities(classifier: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Embeddings (N, E) → (N, classes), each row sums to 1."""
    from scipy.special import softmax

    return np.asarray(softmax(x @ np.array(classifier["coefficients"]).T + np.array(classifier["intercept"]), axis=1))


def _predict(args: argparse.Namespace) -> int:
    from ..embedding.inputs import find_recordings
    from ..embedding.work import Options
    from .table import compute, model_of

    classifier = read_classifier(args.classifier)
    model = model_of(classifier["made"], args.classifier, args.model or classifier["model"], args.device)
    how = Options("scene", args.window, args.window if args.hop is None else args.hop)
    recordings, count, skipped = find_recordings(args.inputs), 0, list[str]()
    columns = [*(COLUMNS if args.window else COLUMNS[::3])]
    columns += [name if name not in COLUMNS else f"{name} (class)" for name in classifier["classes"]]
    with atomic_write(args.output) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for table in compute(recordings, model, how, skipped):
            found = probabilities(classifier, table.x)
            for index, row in enumerate(found):
                times = [f"{ms[index]:.12g}" for ms in (table.starts, table.ends)] if args.window else []
                label = classifier["classes"][row.argmax()]
                writer.writerow([table.paths[index], *times, label, *(f"{value:.6f}" for value in row)])
            count += 1
        if not count:
            raise HearSsamError(f"{args.output}: not written: none of {len(skipped)} recordings could be read.")
    print(f"{args.output}: {count} of {count + len(skipped)} recordings")
    return 1 if skipped else 0
