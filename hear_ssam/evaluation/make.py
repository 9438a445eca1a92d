"""A HEAR task of labelled recordings: a folder with a subfolder per class, or a CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
from tqdm import tqdm

from ..audio import read_audio
from ..downstream.labels import read_labels
from ..errors import HearSsamError
from ..machine import usable_cpus
from .tasks import METADATA, VOCABULARY, read_task


def make_task(
    labels: Path, out: Path, name: str | None = None, folds: int = 5, seed: int = 0, rate: int = 16000,
    seconds: float | None = None,
) -> Path:  # fmt: skip
    """Write the task of `labels`, a folder with a subfolder per class or a CSV, as a folder in `out` and return it.

    Folds hold about the same share of every class, and no group is in two of them; `seed` draws them. Rows that say
    their split make a task of train, valid and test instead; without valid, a fold of train is taken for it.
    Audio becomes mono WAV at `rate` Hz; `seconds` cuts or pads all clips to one length, which embeds faster.
    Raises HearSsamError for labels that make no task, a folder that is there already, a recording that cannot be read.
    """
    if seconds is not None and seconds <= 0:
        raise HearSsamError(f"--seconds must be above 0, not {seconds}.")
    rows = read_labels(labels)
    name = name or labels.resolve().name.removesuffix(labels.suffix)
    target = out / f"{name}-v1-full"
    if name != Path(name).name or name.startswith("."):
        raise HearSsamError(f"--name {name}: names a folder; use letters, digits, _ and -.")
    if target.exists():
        raise HearSsamError(f"{target}: is there already; delete it or give another --name.")
    classes, groups = [row.label for row in rows], [row.group or row.path for row in rows]
    splits = [row.split for row in rows]
    if any(splits):
        if "valid" not in splits:
            train = [index for index, split in enumerate(splits) if split == "train"]
            drawn = _folds([classes[i] for i in train], [groups[i] for i in train], folds, seed)
            for index, fold in zip(train, drawn, strict=True):
                splits[index] = "valid" if fold == 0 else "train"
        mode: dict[str, object] = {"split_mode": "trainvaltest", "splits": ["train", "valid", "test"]}
    else:
        splits = [f"fold{fold:02d}" for fold in _folds(classes, groups, folds, seed)]
        mode = {"split_mode": "new_split_kfold", "splits": sorted(set(splits)), "nfolds": folds}
    names = _names([row.path for row in rows])
    metadata = {
        "task_name": name, "version": "v1", "mode": "full", "embedding_type": "scene", **mode,
        "prediction_type": "multiclass", "sample_duration": seconds,
        "evaluation": ["top1_acc", "mAP", "d_prime", "aucroc"],  # as HEAR's multiclass tasks
    }  # fmt: skip
    vocabulary = io.StringIO()
    csv.writer(vocabulary, lineterminator="\n").writerows([("idx", "label"), *enumerate(sorted(set(classes)))])
    files = {METADATA: json.dumps(metadata, indent=1), VOCABULARY: vocabulary.getvalue()}
    for split in sorted(set(splits)):
        clips = {clip: [label] for clip, label, own in zip(names, classes, splits, strict=True) if own == split}
        files[f"{split}.json"] = json.dumps(dict(sorted(clips.items())), indent=1)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        places = [folder / str(rate) / split / clip for split, clip in zip(splits, names, strict=True)]
        convert_all(zip((Path(row.path) for row in rows), places, strict=True), rate, len(rows), seconds)
        read_task(folder)
        folder.rename(target)
    return target


def _folds(classes: list[str], groups: list[str], folds: int, seed: int) -> list[int]:
    """The fold of each recording: groups stay whole, classes are spread. Says which classes some folds will lack."""
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 3:
        raise HearSsamError(f"--folds must be at least 3 (train, valid, test), not {folds}.")
    if len(set(groups)) < folds:
        raise HearSsamError(f"--folds {folds}: there are {len(set(groups))} groups of recordings; ask for fewer folds.")
    few = Counter(label for label, _ in set(zip(classes, groups, strict=True)))
    label, count = min(few.items(), key=lambda item: item[1])
    if count < folds:
        print(f"{label}: {count} groups of recordings for {folds} folds; some will lack it.", file=sys.stderr)
    fold = np.zeros(len(classes), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that, in other words
        divided = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(classes, classes, groups)
        for number, (_, test) in enumerate(divided):
            fold[test] = number
    return fold.tolist()  # type: ignore[no-any-return]


def _names(paths: list[str]) -> list[str]:
    """File names of clips, told apart where recordings in different folders have the same."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for path in paths:
        stem = Path(path).stem.lstrip(".") or "clip"
        seen[stem.casefold()] += 1
        names.append(f"{stem}~{seen[stem.casefold()]}.wav" if seen[stem.casefold()] > 1 else f"{stem}.wav")
    return names


def convert_all(pairs: Iterable[tuple[Path, Path]], rate: int, total: int, seconds: float | None = None) -> None:
    """Each recording as 16-bit mono WAV at `rate` Hz, cut or padded with silence to `seconds`, on all CPUs at once."""

    def convert(pair: tuple[Path, Path]) -> None:
        audio = read_audio(pair[0], rate)
        if seconds:
            length = round(seconds * rate)
            audio = np.pad(audio[:length], (0, max(0, length - len(audio))))
        pair[1].parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(pair[1], audio.clip(-1, 1), rate, subtype="PCM_16", format="WAV")

    # Left when no thread writes any more: a folder that is removed then does not come back.
    with ThreadPoolExecutor(usable_cpus()) as pool, contextlib.closing(cast(Any, pool.map(convert, pairs))) as done:
        try:
            for _ in tqdm(done, total=total, desc=f"{rate} Hz", unit="clip", disable=None, leave=False):
                pass
        except OSError as error:
            file, reason = error.filename or "audio", error.strerror or error
            raise HearSsamError(f"{file}: cannot be written: {reason}; make room or use another place.") from error
