"""Quick looks: the few clips of `--limit`, how long all the rest will take, what a checkpoint in training is worth."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import HearSsamError
from ..paths import write_whole
from .embeddings import embed_task
from .folders import find_tasks
from .module import load_hear_model
from .rows import open_embeddings
from .scores import aggregate_folds
from .tasks import METADATA, VOCABULARY, Task, read_task

_PRODUCTS = 2e10  # multiplications and additions a second in one thread of a CPU of today, about
_CLIP = 5.0  # seconds, where clips of a task differ
_EPOCHS = 150  # of one of heareval's heads, usually: 60 to wait, and those to its best


def limited(task: Task, count: int, folder: Path) -> Task:
    """The task with at most `count` clips of each split, as one of another name that says so; described in `folder`.

    Clips are drawn with a fixed seed, one of every class before a second of any. A task without more clips stays whole.
    """
    if all(len(task.clips(split)) <= count for split in task.splits):
        return task
    target, generator = folder / f"{task.name}-limit{count}", random.Random(0)
    write_whole(target / METADATA, json.dumps({**task.metadata, "limit": count}))
    write_whole(target / VOCABULARY, (task.folder / VOCABULARY).read_bytes())
    for split in task.splits:
        clips, seen, turn = task.clips(split), Counter[str](), {}
        for name in generator.sample(sorted(clips), len(clips)):
            label = next(iter(task.classes(clips[name])), "")
            turn[name] = seen[label]
            seen[label] += 1
        chosen = set(sorted(turn, key=turn.__getitem__)[:count])
        write_whole(target / f"{split}.json", json.dumps({name: clips[name] for name in clips if name in chosen}))
    return replace(read_task(target), audio=task.audio)


def audio_seconds(task: Task) -> float:
    """About how much audio a task holds, by its metadata."""
    return sum(len(task.clips(split)) for split in task.splits) * (task.metadata.get("sample_duration") or _CLIP)


def probe_seconds(task: Task, dim: int, points: int) -> float:
    """About how long a seed of heareval's heads takes on a scene task where `points` compete, by its products."""
    rows = [sum(len(task.clips(name)) for name in split.train) for split in task.data_splits]
    trained = _EPOCHS * (points * rows[0] + sum(rows[1:]))
    products = trained * 3 * 1024 * (dim + len(task.labels))  # forward, and twice as much backward
    return 0.0 if task.event else products / _PRODUCTS


def duration(seconds: float) -> str:
    """A length of time, rounded to what an estimate is worth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def named_tasks(paths: Iterable[str | Path]) -> list[Task]:
    """Task folders, or folders of them, read and checked. Raises HearSsamError for a task of events."""
    tasks = []
    for path in map(Path, paths):
        folders = [path] if (path / METADATA).exists() else [found[0] for found in find_tasks(path).values()]
        tasks += [read_task(folder) for folder in folders]
    for task in tasks:
        if task.event:
            raise HearSsamError(f"{task.folder}: asks for events; name tasks of scene embeddings.")
        for split in task.splits:
            task.clips(split)
    return tasks


def logistic_scores(checkpoint: str | Path, tasks: Iterable[Task], device: str = "auto") -> dict[str, float]:
    """The leading score of each task, mean over its folds, by logistic regression on embeddings of a checkpoint."""
    from .quick import quick_probe

    hear, scores = load_hear_model("hear_ssam", str(checkpoint), device=device), {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            embedded, rows = open_embeddings(embed_task(hear, task, Path(folder, task.name)))
            folds = quick_probe(embedded, rows, "logreg", seed=0)
        scores[task.name] = aggregate_folds([fold.scores for fold in folds])[task.scores[0]]
    return scores
