"""`hear-ssam tasks`: HEAR's own tasks fetched by name, what is here of them, tasks made of labelled recordings."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from ..errors import HearSsamError, unknown_name
from .jobs import noted
from .make import convert_all, make_task
from .tasks import METADATA, find_tasks, folder_named, known_tasks, read_task, require_audio, unpack

ARCHIVES = ".archives"  # of downloads, in the folder of the tasks; empty when they are unpacked
EXAMPLES = """examples:
  hear-ssam tasks list --dir tasks
  hear-ssam tasks fetch esc50 speech_commands-5h --to tasks --rate 16000
  hear-ssam tasks make recordings/ -o tasks                 a subfolder per class: stratified folds
  hear-ssam tasks make labels.csv -o tasks --seconds 2      columns path, label, and perhaps group and split
"""


def fetch_task(name: str, to: Path, rate: int | None = None) -> Path:
    """Download one of HEAR's tasks by folder or short name into `to`, its audio at `rate` Hz (default: as published).

    What is there already is kept. The archive is checked, unpacked without links and within the size that the task can
    have, its audio resampled, all compared with what the task says of itself; only then the folder appears.
    Raises HearSsamError for what the network, the disk or the archive keeps from it.
    """
    from ..download import fetch

    card = known_tasks().get(folder_named(name))
    if card is None:
        raise unknown_name("task", name, [*known_tasks(), *(one.short for one in known_tasks().values())])
    target, source = to / card.folder, card.download
    rate = rate or source.rate
    if (target / str(rate)).is_dir():
        return _verified(target, rate)
    archive = to / ARCHIVES / source.url.rpartition("/")[2]
    fetch(source.url, archive, source.sha256 or None)
    with tempfile.TemporaryDirectory(dir=to, prefix=".unpacking-") as scratch:
        unpacked = unpack(archive, Path(scratch), card.most_bytes(source.rate))
        folders = find_tasks(unpacked).get(card.folder)
        if not folders:
            raise HearSsamError(f"{archive}: holds {', '.join(find_tasks(unpacked))}, not {card.folder}; get it again.")
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
    if card := known_tasks().get(task.name):
        for difference in card.differences(task):
            print(f"{task.name} is not as HEAR released it: {difference}.", file=sys.stderr)
    return folder


def task_table(folder: Path | None) -> list[list[str]]:
    """HEAR's tasks and those in `folder`, as text, header first: names, size, licence, what is here."""
    here = find_tasks(folder) if folder and folder.is_dir() and any(folder.glob(f"*/{METADATA}")) else {}
    rows = [["task", "folder", "clips", "hours", "classes", "licence", "here"]]
    for name in dict.fromkeys([*known_tasks(), *here]):
        places = here.get(name, [])
        rates = sorted(int(path.name) for place in places for path in place.iterdir() if path.name.isdigit())
        used = sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
        what = f"{', '.join(map(str, rates)) or 'no'} Hz, {used / 1e6:,.0f} MB" if places else "–"
        if card := known_tasks().get(name):
            hours = f"{card.clips * card.sample_duration / 3600:.1f}" if card.sample_duration else "–"
            facts = [card.short, name, str(card.clips), hours, str(card.classes), card.licence or "not stated"]
        else:
            task = read_task(places[0])
            clips = sum(len(task.clips(split)) for split in task.splits)
            facts = [name, name, str(clips), "–", str(len(task.labels)), "yours"]
        rows.append([*facts, what])
    return rows


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
    one.add_argument("--folds", type=int, default=5, help="of the task, where the CSV has no splits (default: 5)")
    one.add_argument("--seed", type=int, default=0, help="of the draw of folds (default: 0)")
    one.add_argument("--rate", type=int, default=16000, metavar="HZ", help="of its audio (default: 16000)")
    one.add_argument("--seconds", type=float, metavar="S", help="cut or pad every clip to this (default: as they are)")
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
    print(make_task(args.labels, args.output, args.name, args.folds, args.seed, args.rate, args.seconds))
    return 0


def _check_rate(rate: int | None) -> None:
    if rate is not None and rate < 1000:
        raise HearSsamError(f"--rate must be at least 1000 Hz, not {rate}.")
