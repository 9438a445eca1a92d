"""A look at an encoder while it trains: logistic regression on frozen embeddings of HEAR tasks; nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import HearSsamError
from .embeddings import embed_task
from .folders import find_tasks
from .module import load_hear_model
from .quick import quick_probe
from .rows import open_embeddings
from .scores import aggregate_folds
from .tasks import METADATA, Task, read_task


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
    """The leading score of each task by name, mean over its folds, for one of our checkpoints."""
    hear, scores = load_hear_model("hear_ssam", str(checkpoint), device=device), {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            embedded, rows = open_embeddings(embed_task(hear, task, Path(folder, task.name)))
            folds = quick_probe(embedded, rows, "logreg", seed=0)
        scores[task.name] = aggregate_folds([fold.scores for fold in folds])[task.scores[0]]
    return scores
