"""Probes of seconds, beside heareval's of minutes and hours: nearest neighbours, logistic regression, few clips.

They take the rows and splits of heareval's heads: train on its training rows, choose by the leading score on its
validation split, score the test split. Scene tasks only, multiclass and multilabel. scikit-learn does the work.

knn        cosine neighbours of standardised rows, votes weighted by similarity; how many is chosen
logreg     logistic regression on standardised rows; its C, the inverse strength of the L2 penalty, is chosen
fewshotN   logistic regression on N clips of every class, drawn anew by every seed, rows as they are and C = 1: the
           protocol of MAEB (classification in mteb: 8 clips, ten draws, 100 iterations); nothing is chosen
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

from ..errors import HearSsamError
from ..options import STRENGTHS
from .records import FoldResult, finite
from .rows import Rows
from .tasks import Task

NEIGHBOURS = (1, 3, 5, 10, 20, 50)
MOST_TO_CHOOSE = 5000  # training rows that a strength is chosen with; the fit that is tested takes all

Classify = Callable[[np.ndarray], np.ndarray]  # rows (n, dim) → probabilities float32 (n, classes)


def quick_probe(task: Task, splits: Mapping[str, Rows], probe: str, seed: int) -> list[FoldResult]:
    """A result per test split by knn, logreg or fewshotN, computed in one thread. `seed` draws the few clips.

    Raises HearSsamError where the rows to train on are of a single class.
    """
    folds = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # not converged; a class that all rows have, or none
        for split in task.data_splits:
            x = np.concatenate([splits[name].x.numpy() for name in split.train])
            target = np.concatenate([splits[name].target.numpy() for name in split.train])
            if target.any(0).sum() < (1 if task.multilabel else 2):
                alone = "no labels" if task.multilabel else "clips of one class alone"
                reason = f"{' + '.join(split.train)} has {alone}; a probe needs something to tell apart"
                raise HearSsamError(f"{task.name}: {reason}.")
            valid, test = splits[split.valid], splits[split.test]
            if probe.startswith("fewshot"):
                few = draw(target, int(probe.removeprefix("fewshot")), seed)
                classify, chosen = _regression(x[few], target[few], task.multilabel, 1.0), {"clips": float(len(few))}
            else:
                classify, chosen = (_knn if probe == "knn" else _logreg)(x, target, valid)
            score, prediction = valid.judge.validate(classify(valid.x.numpy()))[0], classify(test.x.numpy())
            details = {"validation_score": finite(score), "grid_point": chosen}
            scores = test.judge.test(prediction, None)
            folds.append(FoldResult(test.split, scores, details, prediction, test.target.numpy()))
    return folds


def draw(target: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows in random order, each taken if one of its classes has fewer than `shots` so far. target (rows, classes)."""
    taken, counts = [], np.zeros(target.shape[1], int)
    for row in np.random.default_rng(seed).permutation(len(target)):
        classes = target[row] > 0
        if (counts[classes] < shots).any():
            taken.append(row)
            counts += classes
    return np.array(taken)


def shortage(task: Task, shots: int) -> str | None:
    """Says which class has fewer than `shots` training clips, where one has: few-shot then takes what there is."""
    for split in task.data_splits:
        counts = Counter(str(label) for name in split.train for labels in task.clips(name).values() for label in labels)
        if few := [label for label in task.labels if counts[label] < shots]:
            least = min(few, key=counts.__getitem__)
            clips = f"fewer than {shots} clips to train on ({least!r}: {counts[least]})"
            return f"{len(few)} of {len(task.labels)} classes have {clips}; few-shot takes what there is"
    return None


def _best(valid: Rows, probabilities: Mapping[float, np.ndarray]) -> float:
    """Of several settings the one whose predictions of the validation split lead; ties: the first."""
    scores = {setting: valid.judge.validate(found)[0] for setting, found in probabilities.items()}
    return max(scores, key=lambda setting: -math.inf if math.isnan(scores[setting]) else scores[setting])


def _knn(x: np.ndarray, target: np.ndarray, valid: Rows) -> tuple[Classify, dict[str, float]]:
    scaler = StandardScaler().fit(x)
    index = NearestNeighbors(n_neighbors=min(max(NEIGHBOURS), len(x))).fit(normalize(scaler.transform(x)))

    def classify(rows: np.ndarray, counts: tuple[int, ...]) -> dict[float, np.ndarray]:
        distance, near = index.kneighbors(normalize(scaler.transform(rows)))
        votes = np.maximum(1 - distance**2 / 2, 1e-6)  # of unit vectors: the cosine
        found: dict[float, np.ndarray] = {}
        for count in counts:
            vote, place = votes[:, :count], near[:, :count]
            starts = np.arange(0, vote.size + 1, vote.shape[1])
            share = csr_matrix((vote.ravel(), place.ravel(), starts), (len(rows), len(target))) @ target
            found[count] = (share / vote.sum(1, keepdims=True)).astype(np.float32)
        return found

    count = int(_best(valid, classify(valid.x.numpy(), NEIGHBOURS)))
    return lambda rows: classify(rows, (count,))[count], {"neighbours": count}


def _logreg(x: np.ndarray, target: np.ndarray, valid: Rows) -> tuple[Classify, dict[str, float]]:
    scaler = StandardScaler().fit(x)
    x, multilabel = scaler.transform(x), valid.task.multilabel
    some = np.sort(np.random.default_rng(0).permutation(len(x))[:MOST_TO_CHOOSE])
    tried = {strength: _regression(x[some], target[some], multilabel, strength) for strength in STRENGTHS}
    rows = scaler.transform(valid.x.numpy())
    strength = _best(valid, {strength: classify(rows) for strength, classify in tried.items()})
    classify = tried[strength] if len(some) == len(x) else _regression(x, target, multilabel, strength)
    return lambda rows: classify(scaler.transform(rows)), {"C": strength}


def _regression(x: np.ndarray, target: np.ndarray, multilabel: bool, strength: float) -> Classify:
    """Logistic regression: softmax over the classes that occur, or one per class."""
    model = LogisticRegression(C=strength, max_iter=100)
    if multilabel:
        several, classes = OneVsRestClassifier(model).fit(x, target.astype(int)), target.shape[1]
        return lambda rows: several.predict_proba(rows)[:, -classes:].astype(np.float32)  # of one class: no, yes
    model.fit(x, target.argmax(1))

    def classify(rows: np.ndarray) -> np.ndarray:
        probability = np.zeros((len(rows), target.shape[1]), np.float32)
        probability[:, model.classes_] = model.predict_proba(rows)
        return probability

    return classify
