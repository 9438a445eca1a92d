"""HEAR's scores of one test split, as heareval 2021.1.3 defines them.

Scene scores take probabilities and one-hot or multi-hot targets, both (clips, classes); a score that is undefined
(d_prime or aucroc of a class without positives or without negatives) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

from .errors import unknown_name


def top1_accuracy(prediction: np.ndarray, target: np.ndarray) -> float:
    """Share of clips whose likeliest class is right; of several right classes the first one counts."""
    return float(np.mean(prediction.argmax(1) == target.argmax(1)))


def chroma_accuracy(prediction: np.ndarray, target: np.ndarray) -> float:
    """Top-1 accuracy that forgives octaves: class indices modulo 12."""
    return float(np.mean(prediction.argmax(1) % 12 == target.argmax(1) % 12))


def mean_average_precision(prediction: np.ndarray, target: np.ndarray) -> float:
    """Unweighted mean over classes of the non-interpolated average precision; no positives counts as 0."""
    return float(np.mean([_average_precision(p, t) for p, t in zip(prediction.T, target.T, strict=True)]))


def _average_precision(prediction: np.ndarray, target: np.ndarray) -> float:
    """Σ over thresholds of precision times gain in recall, for one class.

    Equal to scikit-learn's to the last bit (hence the order of the sum), without its checks of the input: validation
    scores fifty classes after every third epoch.
    """
    order = np.argsort(prediction)[::-1]
    ranked = prediction[order]
    threshold = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))  # last place of each distinct value
    hits = np.cumsum(target[order], dtype=np.float64)[threshold]
    if hits[-1] == 0:
        return 0.0
    precision, recall = hits / (threshold + 1), hits / hits[-1]
    return float(-np.sum(np.diff(recall[::-1], append=0) * precision[::-1]))


def _class_aucs(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    if not (target.any(0) & ~target.all(0)).all():
        return np.full(target.shape[1], math.nan)
    return np.asarray(roc_auc_score(target, prediction, average=None))


def area_under_roc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Unweighted mean over classes of the area under the ROC curve."""
    return float(np.mean(_class_aucs(prediction, target)))


def d_prime(prediction: np.ndarray, target: np.ndarray) -> float:
    """Mean over classes of √2 Φ⁻¹(AUC); infinite where a class is separated perfectly."""
    return float(np.mean(ndtri(_class_aucs(prediction, target)) * math.sqrt(2)))


@dataclass(frozen=True)
class Score:
    """One of HEAR's scores: its function, the direction, and whether it judges events or clips."""

    compute: Callable[..., Any]
    maximize: bool = True
    event: bool = False


SCORES: dict[str, Score] = {
    "top1_acc": Score(top1_accuracy),
    "pitch_acc": Score(top1_accuracy),
    "chroma_acc": Score(chroma_accuracy),
    "mAP": Score(mean_average_precision),
    "d_prime": Score(d_prime),
    "aucroc": Score(area_under_roc),
}


def named_score(name: str) -> Score:
    """The score with HEAR's name for it."""
    if name not in SCORES:
        raise unknown_name("score", name, SCORES)
    return SCORES[name]


def aggregate_folds(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every score over the folds."""
    return {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]}
