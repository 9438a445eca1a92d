"""HEAR's scores of one test split, as heareval 2021.1.3 (and sed_eval 0.2.1 below it) defines them.

Scene scores take probabilities and one-hot or multi-hot targets, both (clips, classes). Event scores take estimated
and reference events per file. A score that is undefined is NaN: d_prime or aucroc of a class without positives or
without negatives, the F-measure of no estimated events.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.special import ndtri


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
    from sklearn.metrics import roc_auc_score  # takes a second, which not every process needs

    return np.asarray(roc_auc_score(target, prediction, average=None))


def area_under_roc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Unweighted mean over classes of the area under the ROC curve."""
    return float(np.mean(_class_aucs(prediction, target)))


def d_prime(prediction: np.ndarray, target: np.ndarray) -> float:
    """Mean over classes of √2 Φ⁻¹(AUC); infinite where a class is separated perfectly."""
    with np.errstate(invalid="ignore"):  # one class at infinity and another at minus infinity: NaN
        return float(np.mean(ndtri(_class_aucs(prediction, target)) * math.sqrt(2)))


# ---- events --------------------------------------------------------------------------------------------------------


class Events(NamedTuple):
    """Events of one file: class indices, onsets and offsets in ms, each (events,)."""

    label: np.ndarray
    start: np.ndarray
    end: np.ndarray


def to_events(events: Sequence[Mapping[str, Any]], class_index: Mapping[str, int]) -> Events:
    """Events as HEAR's JSON lists them: {"label", "start", "end"}."""
    labels = np.array([class_index[str(event["label"])] for event in events], np.int64)
    return Events(labels, *(np.array([event[key] for event in events], np.float64) for key in ("start", "end")))


def active_frames(probability: np.ndarray, timestamps: np.ndarray, median_filter_ms: float) -> np.ndarray:
    """Frames whose median-filtered probability exceeds 0.5: (frames, classes) bool; frames in order of time.

    A median exceeds a threshold where the majority of its window does, so that counting replaces sorting. Windows and
    reflecting edges are those of scipy.ndimage.median_filter.
    """
    active = probability > 0.5
    hop = np.mean(np.diff(timestamps)) if len(timestamps) > 1 else math.inf
    width = round(median_filter_ms / hop)
    if not width:
        return active
    padded = np.pad(active, ((width // 2, width - 1 - width // 2), (0, 0)), "symmetric")
    sums = np.concatenate([np.zeros((1, active.shape[1]), np.int64), np.cumsum(padded, axis=0)])
    return np.asarray(sums[width:] - sums[:-width] >= width - width // 2)


def decode_events(active: np.ndarray, timestamps: np.ndarray, min_duration: float) -> Events:
    """Runs of active frames as events from the first to the last frame, if they last `min_duration` ms."""
    steps = np.diff(active.T.astype(np.int8), prepend=0, append=0)  # (classes, frames + 1)
    label, first = np.nonzero(steps == 1)
    start, end = timestamps[first], timestamps[np.nonzero(steps == -1)[1] - 1]
    long = end - start >= min_duration
    return Events(label[long], start[long], end[long])


EventsByFile = Mapping[str, Events]


def event_f_measure(
    estimated: EventsByFile, reference: EventsByFile, collar: float, length_share: float | None = None
) -> dict[str, float]:
    """F-measure, precision, recall over all files and classes of events matched one to one, as many as possible.

    Onsets may differ by `collar` seconds; with `length_share` also offsets, by the collar or that share of the
    reference's length, whichever is more. Only files with an estimate (perhaps an empty one) count.
    """
    matched = references = estimates = 0
    for file, found in estimated.items():
        truth = reference[file]
        on_t, off_t, on_f, off_f = (ms / 1000 for ms in (truth.start, truth.end, found.start, found.end))
        hits = (truth.label[:, None] == found.label) & (np.abs(on_t[:, None] - on_f) <= collar)
        if length_share is not None:
            slack = np.maximum(collar, length_share * (off_t - on_t))
            hits &= np.abs(off_t[:, None] - off_f) <= slack[:, None]
        matched += int((maximum_bipartite_matching(csr_matrix(hits), "column") >= 0).sum()) if hits.any() else 0
        references += len(truth.label)
        estimates += len(found.label)
    precision = matched / estimates if estimates else math.nan
    recall = matched / references if references else math.nan
    f_measure = 0.0 if precision == recall == 0 else 2 * precision * recall / (precision + recall)
    return {"f_measure": f_measure, "precision": precision, "recall": recall}


def segment_error_rate(estimated: EventsByFile, reference: EventsByFile, classes: int) -> dict[str, float]:
    """Substitutions, deletions and insertions per reference activity in segments of one second."""
    errors, references = np.zeros(3, np.int64), 0
    for file, found in estimated.items():
        truth = reference[file]
        last = max(np.concatenate([truth.end, found.end, [0]])) / 1000
        rolls = np.zeros((2, math.ceil(last), classes), bool)
        for roll, events in zip(rolls, (truth, found), strict=True):
            for label, start, end in zip(*events, strict=True):
                roll[math.floor(start / 1000) : math.ceil(end / 1000), label] = True
        n_truth, n_found = rolls.sum(2)
        substituted = np.minimum(n_truth, n_found) - rolls.all(0).sum(1)
        deleted, inserted = np.maximum(0, n_truth - n_found), np.maximum(0, n_found - n_truth)
        errors += [substituted.sum(), deleted.sum(), inserted.sum()]
        references += int(n_truth.sum())
    return {"error_rate": sum(count / references for count in errors.tolist()) if references else math.nan}


# ---- the table of scores -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One of HEAR's scores and its direction. An event score returns several values, the first of which leads."""

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
    "event_onset_200ms_fms": Score(lambda e, r, n: event_f_measure(e, r, 0.2), event=True),
    "event_onset_50ms_fms": Score(lambda e, r, n: event_f_measure(e, r, 0.05), event=True),
    "event_onset_offset_50ms_20perc_fms": Score(lambda e, r, n: event_f_measure(e, r, 0.05, 0.2), event=True),
    "segment_1s_er": Score(segment_error_rate, maximize=False, event=True),
}


class SceneJudge:
    """Scores predictions of the clips of one split; `names` are HEAR's, the first one leads."""

    def __init__(self, names: Sequence[str], target: np.ndarray) -> None:
        self.names, self.target = names, target

    def validate(self, probability: np.ndarray) -> tuple[float, None]:
        """The leading score (and no postprocessing)."""
        return SCORES[self.names[0]].compute(probability, self.target), None

    def test(self, probability: np.ndarray, postprocessing: Mapping[str, float] | None = None) -> dict[str, float]:
        """Every score by name."""
        return {name: SCORES[name].compute(probability, self.target) for name in self.names}


class EventJudge:
    """Scores predictions of the frames of one split, decoded to events by the best of a grid of postprocessings.

    files, timestamps   file name and ms of every frame
    reference           true events by file
    grid                values of median_filter_ms and min_duration
    """

    def __init__(
        self, names: Sequence[str], classes: int, files: Sequence[str], timestamps: np.ndarray,
        reference: EventsByFile, grid: Mapping[str, Sequence[float]],
    ) -> None:  # fmt: skip
        self.names, self.classes, self.reference, self.timestamps = names, classes, reference, timestamps
        by_file: dict[str, list[int]] = {}
        for row, file in enumerate(files):
            by_file.setdefault(file, []).append(row)
        self.rows = {file: np.array(rows)[np.argsort(timestamps[rows])] for file, rows in by_file.items()}
        self.grid = [dict(zip(sorted(grid), point, strict=True)) for point in product(*(grid[k] for k in sorted(grid)))]

    def _scores(
        self, names: Sequence[str], probability: np.ndarray, postprocessing: Mapping[str, float]
    ) -> dict[str, float]:
        events = {}
        for file, rows in self.rows.items():
            times = self.timestamps[rows]
            active = active_frames(probability[rows], times, postprocessing["median_filter_ms"])
            events[file] = decode_events(active, times, postprocessing["min_duration"])
        scores: dict[str, float] = {}
        for name in names:
            parts = SCORES[name].compute(events, self.reference, self.classes)
            scores |= {name: next(iter(parts.values()))} | {f"{name}_{part}": value for part, value in parts.items()}
        return scores

    def validate(self, probability: np.ndarray) -> tuple[float, dict[str, float]]:
        """The leading score with the postprocessing that makes it largest (ties: the larger values), and that one."""
        leading, scored = self.names[0], []
        for postprocessing in self.grid:
            score = self._scores([leading], probability, postprocessing)[leading]
            scored.append((0.0 if math.isnan(score) else score, tuple(postprocessing.items()), score))
        _, best, score = max(scored)
        return score, dict(best)

    def test(self, probability: np.ndarray, postprocessing: Mapping[str, float] | None) -> dict[str, float]:
        """Every score by name, and its parts by name and part."""
        if postprocessing is None:  # selected by loss, so there was no choice to make
            (postprocessing,) = self.grid
        return self._scores(self.names, probability, postprocessing)


def aggregate_folds(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every score over the folds where it is not NaN, as heareval takes it (by pandas)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN in all of them, or infinity and minus infinity: NaN
        return {name: float(np.nanmean([fold[name] for fold in folds])) for name in folds[0]}
