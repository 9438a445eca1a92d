"""`hear-ssam tasks`: HEAR's own tasks fetched by name, what is here of them, tasks made of labelled recordings."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
from tqdm import tqdm

from ..audio import read_audio
from ..downstream.labels import read_labels
from ..embedding.inputs import in_utf8
from ..errors import HearSsamError, unknown_name
from ..machine import usable_cpus
from ..paths import sha256, writing
from .folders import audio_rates, find_tasks, require_audio, unpack
from .jobs import noted
from .tasks import METADATA, VOCABULARY, differences, folder_named, known_tasks, read_task

ARCHIVES = ".archives"  # of downloads, in the folder of the tasks; empty when they are unpacked
EXAMPLES = """examples:
  hear-ssam tasks list --dir tasks
  hear-ssam tasks fetch esc50 speech_commands-5h --to tasks --rate 16000
  hear-ssam tasks make recordings/ -o tasks                 a subfolder per class: stratified folds
  hear-ssam tasks make labels.csv -o tasks                  columns path, label, and perhaps group and split
"""


def fetch_task(name: str, to: Path, rate: int | None = None) -> Path:
    """Download one of HEAR's tasks by folder or short name into `to`, its audio at `rate` Hz (default: as published).

    What is there already is kept. The archive is checked, unpacked without links and within the size that the task can
    have, its audio resampled, all compared with what the task says of itself; only then the folder appears.
    Raises HearSsamError for what the network, the disk or the archive keeps from it.
    """
    from ..download import fetch, locked

    card = known_tasks().get(folder_named(name))
    if card is None:
        raise unknown_name("task", name, [*known_tasks(), *(one.short for one in known_tasks().values())])
    target, source = to / card.folder, card.download
    rate = rate or source.rate
    archive = to / ARCHIVES / source.url.rpartition("/")[2]
    with locked(to / ARCHIVES / card.folder):
        if (target / str(rate)).is_dir():
            return _verified(target, rate)
        fetch(source.url, archive, source.sha256 or None)
        prefix = f".unpacking-{card.folder}-"
        for stale in to.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=to, prefix=prefix) as scratch:
            try:
                unpacked = unpack(archive, Path(scratch), card.most_bytes(source.rate))
            except HearSsamError as error:
                if getattr(error.__cause__, "errno", None) is None:  # it is no archive: get another one next time
                    for useless in archive.parent.glob(f"{archive.name}*"):
                        useless.unlink()
                raise
            folders = find_tasks(unpacked).get(card.folder)
            if not folders:
                holds = ", ".join(find_tasks(unpacked))
                raise HearSsamError(f"{archive}: holds {holds}, not {card.folder}; get it again.")
            folder = folders[0]
            if rate != source.rate:
                had, made = folder / str(source.rate), folder / str(rate)
                files = sorted(path for path in had.rglob("*") if path.is_file())
                convert_all(((path, made / path.relative_to(had)) for path in files), rate, len(files))
                shutil.rmtree(had)
            _verified(folder, rate)
            if target.is_dir():  # at another rate
                (folder / str(rate)).rename(target / str(rate))
            else:
                folder.rename(target)
        archive.unlink()
    return target


def _verified(folder: Path, rate: int) -> Path:
    """A task whose description holds and whose audio is all there; differences from HEAR's release are said."""
    task = read_task(folder)
    for split in task.splits:
        require_audio(folder / str(rate) / split, task.clips(split))
    for difference in differences(task):
        print(f"{task.name}: {difference}.", file=sys.stderr)
    return folder


def task_table(folder: Path | None) -> list[list[str]]:
    """HEAR's tasks and those in `folder`, as text, header first: names, size, licence, what is here."""
    here: dict[str, list[Path]] = {}
    with contextlib.suppress(HearSsamError):  # there are none
        here = find_tasks(folder) if folder else {}
    rows = [["task", "folder", "clips", "hours", "classes", "licence", "here"]]
    for name in dict.fromkeys([*known_tasks(), *here]):
        places = here.get(name, [])
        rates = sorted(rate for place in places for rate in audio_rates(place))
        used = sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
        what = f"{', '.join(map(str, rates)) or 'no'} Hz, {used / 1e6:,.0f} MB" if places else "–"
        if card := known_tasks().get(name):
            hours = f"{card.clips * card.sample_duration / 3600:.1f}" if card.sample_duration else "–"
            facts = [card.short, name, str(card.clips), hours, str(card.classes), card.licence or "not stated"]
        else:
            facts = [name, name, "–", "–", "–", "yours"]
            with noted(name, {}):
                task = read_task(places[0])
                facts[2:5] = str(sum(len(task.clips(split)) for split in task.splits)), "–", str(len(task.labels))
        rows.append([*facts, what])
    return rows


def make_task(
    labels: Path, out: Path, name: str | None = None, folds: int = 5, seed: int = 0, rate: int = 16000
) -> Path:
    """Write the task of `labels`, a folder with a subfolder per class or a CSV, as a folder in `out` and return it.

    Folds hold about the same share of every class, and no group is in two of them; `seed` draws them. Rows that say
    their split make a task of train, valid and test instead; without valid, a fold of train is taken for it.
    Audio becomes mono WAV at `rate` Hz. Raises HearSsamError for labels that make no task, a folder that is there
    already, a recording that cannot be read.
    """
    rows = read_labels(labels)
    name = name or (labels.resolve().name if labels.is_dir() else labels.stem)
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
        "prediction_type": "multiclass",
        "evaluation": ["top1_acc", "mAP", "d_prime", "aucroc"],  # as HEAR's multiclass tasks
    }  # fmt: skip
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        making = tempfile.TemporaryDirectory(dir=out, prefix=".making-")
    with making as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        places = [folder / str(rate) / split / clip for split, clip in zip(splits, names, strict=True)]
        lengths = convert_all(zip((Path(row.path) for row in rows), places, strict=True), rate, len(rows))
        metadata["sample_duration"] = lengths.pop() / rate if len(lengths) == 1 else None  # s; equal ones share batches
        digests = "".join(map(sha256, places))  # other recordings of the same names are another task to `evaluate`
        metadata["audio_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        (folder / METADATA).write_text(json.dumps(metadata, indent=1), "utf-8")
        with open(folder / VOCABULARY, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("idx", "label"), *enumerate(sorted(set(classes)))])
        for split in set(splits):
            clips = {clip: [label] for clip, label, own in zip(names, classes, splits, strict=True) if own == split}
            (folder / f"{split}.json").write_text(json.dumps(clips, indent=1, sort_keys=True), "utf-8")
        read_task(folder)
        folder.rename(target)
    return target


def _folds(classes: list[str], groups: list[str], folds: int, seed: int) -> list[int]:
    """The fold of each recording: groups stay whole, classes are spread. Says which classes some folds will lack."""
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 3:
        raise HearSsamError(f"--folds must be at least 3 (train, valid, test), not {folds}.")
    most = max(Counter(classes).values())
    mend = "ask for fewer folds" if folds > 3 <= min(most, len(set(groups))) else "it needs more recordings"
    if len(set(groups)) < folds:
        raise HearSsamError(f"--folds {folds}: there are {len(set(groups))} groups of recordings; {mend}.")
    if most < folds:
        raise HearSsamError(f"--folds {folds}: no class has more than {most} recordings; {mend}.")
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
    numbers: list[int] = fold.tolist()
    if len(set(numbers)) < folds:
        raise HearSsamError(f"--folds {folds}: one would be empty, so large are the groups; {mend}.")
    return numbers


def _names(paths: list[str]) -> list[str]:
    """File names of clips, told apart where recordings in different folders have the same."""
    names: dict[str, str] = {}  # by what a file system may take for the same
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
    for path in paths:
        stem = in_utf8(Path(path).stem.lstrip(".")) or "clip"
        tried = (f"{stem}~{number}" if number > 1 else stem for number in numbers[stem.casefold()])
        name = next(name for name in tried if name.casefold() not in names)
        names[name.casefold()] = f"{name}.wav"
    return list(names.values())


def convert_all(pairs: Iterable[tuple[Path, Path]], rate: int, total: int) -> set[int]:
    """Each recording as 16-bit mono WAV at `rate` Hz, on all CPUs at once; the lengths that occur, in samples."""

    def convert(pair: tuple[Path, Path]) -> int:
        audio = read_audio(pair[0], rate)
        soundfile.write(wav := io.BytesIO(), audio.clip(-1, 1), rate, subtype="PCM_16", format="WAV")
        with writing(pair[1]):  # libsndfile would not say what hinders it
            pair[1].parent.mkdir(parents=True, exist_ok=True)
            pair[1].write_bytes(wav.getbuffer())
        return len(audio)

    # Left when no thread writes any more: a folder that is removed then does not come back.
    with ThreadPoolExecutor(usable_cpus()) as pool, contextlib.closing(cast(Any, pool.map(convert, pairs))) as done:
        return set(tqdm(done, total=total, desc=f"{rate} Hz", unit="clip", disable=None, leave=False))


# ---- the command ---------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "tasks",
        help="fetch HEAR's tasks, list them, make one of labelled recordings",
        description="Get HEAR's own tasks by name, see which are here, or turn recordings with labels into a task.",
        epilog=EXAMPLES,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    one = actions.add_parser("list", help="HEAR's tasks: size, licence, what is here", epilog=EXAMPLES)
    one.add_argument("--dir", type=Path, metavar="DIR", help="folder that may hold some")
    one.set_defaults(run=_list)
    one = actions.add_parser("fetch", help="download tasks, 48 kHz, and resample them", epilog=EXAMPLES)
    one.add_argument("names", nargs="+", metavar="NAME", help="short names or folders, see list")
    one.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the tasks")
    one.add_argument("--rate", type=int, metavar="HZ", help="resample to this rate, in place of 48000")
    one.set_defaults(run=_fetch)
    one = actions.add_parser("make", help="a task of a folder per class, or of a CSV", epilog=EXAMPLES)
    one.add_argument("labels", type=Path, metavar="FOLDER|CSV", help="a subfolder per class; or columns path, label, …")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the tasks")
    one.add_argument("--name", metavar="NAME", help="of the task (default: that of the folder or CSV)")
    one.add_argument("--folds", type=int, default=5, help="of the task, or of train to make a valid (default: 5)")
    one.add_argument("--seed", type=int, default=0, help="of the draw of folds (default: 0)")
    one.add_argument("--rate", type=int, default=16000, metavar="HZ", help="of its audio (default: 16000)")
    one.set_defaults(run=_make)


def _list(args: argparse.Namespace) -> int:
    from .tables import aligned

    print(aligned(task_table(args.dir)), end="")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    _check_rate(args.rate)
    failures: dict[str, str] = {}
    for name in dict.fromkeys(args.names):
        with noted(name, failures):
            print(fetch_task(name, args.to, args.rate))
    return 1 if failures else 0


def _make(args: argparse.Namespace) -> int:
    _check_rate(args.rate)
    if not 0 <= args.seed < 2**32:
        raise HearSsamError(f"--seed must be from 0 to {2**32 - 1}, not {args.seed}.")
    print(make_task(args.labels, args.output, args.name, args.folds, args.seed, args.rate))
    return 0


def _check_rate(rate: int | None) -> None:
    if rate is not None and rate < 1000:
        raise HearSsamError(f"--rate must be at least 1000 Hz, not {rate}.")
