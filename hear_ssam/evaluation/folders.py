"""Where tasks and their audio lie: folders found by name, archives unpacked, the audio that suits a model."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import HearSsamError, unknown_name
from .tasks import METADATA, Task, folder_named, known_tasks


def find_tasks(tasks_dir: Path, names: Sequence[str] = (), unpacked: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """Task folders by name, sorted, in `tasks_dir`, `unpacked`, or a `…/tasks` in them, as HEAR's archives unpack.

    A task in several places has several folders, perhaps of other sample rates. Hidden folders are ignored. `names`
    selects folders; a missing one raises HearSsamError that says where to get it or which name is near.
    """
    if not tasks_dir.is_dir():
        raise HearSsamError(f"{tasks_dir}: no such folder; it must hold one folder per HEAR task.")
    folders: dict[str, list[Path]] = {}
    for root in (tasks_dir, *unpacked):
        for pattern in ("*", "tasks/*", "*/tasks/*"):
            for path in sorted(root.glob(f"{pattern}/{METADATA}")):
                if not any(part.startswith(".") for part in path.relative_to(root).parts):
                    folders.setdefault(path.parent.name, []).append(path.parent)
    if not folders:
        what = f"holds no HEAR task; put a folder with {METADATA} there"
        what = "is a task itself; name the folder that holds it" if (tasks_dir / METADATA).exists() else what
        raise HearSsamError(f"{tasks_dir}: {what}.")
    names = [name if name in folders else folder_named(name) for name in names]
    for name in (name for name in names if name not in folders):
        if card := known_tasks().get(name):
            raise HearSsamError(f"{tasks_dir}: lacks {name}; {card.source}.")
        raise HearSsamError(f"{tasks_dir}: {unknown_name('task', name, folders)}")
    return {name: folders[name] for name in sorted(names or folders)}


def find_archives(tasks_dir: Path, names: Sequence[str] = ()) -> list[Path]:
    """Archives in `tasks_dir` (.tar, .tar.gz, .tgz), all or those with one of `names` in their name."""
    names = [folder_named(name) for name in names]
    found = (path for path in sorted(tasks_dir.glob("[!.]*")) if not names or any(name in path.name for name in names))
    return [path for path in found if path.name.endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()]


def unpack(archive: Path, folder: Path, most: int | None = None) -> Path:
    """Unpack an archive into a folder of its own in `folder`, named after it, whole or not at all.

    Unpacked again where the archive's time is another than the folder's, which bears the time of its archive.
    Raises HearSsamError for members that are links or devices, would leave the folder, or are over `most` bytes in all.
    """
    target, time = folder / archive.name, archive.stat().st_mtime
    if target.is_dir() and int(target.stat().st_mtime) == int(time):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".unpacking-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    total = 0

    def plain(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        nonlocal total
        total += member.size
        if not (member.isfile() or member.isdir()):
            raise HearSsamError(f"{archive}: cannot be unpacked: {member.name} is a link or a device; do not trust it.")
        if most and total > most:
            much = f"it holds more than {most / 1e6:,.0f} MB, which the task cannot need"
            raise HearSsamError(f"{archive}: cannot be unpacked: {much}; do not trust it.")
        return tarfile.data_filter(member, path)  # refuses members that would leave the folder

    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter=plain)
            os.utime(scratch, (time, time))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(scratch, target)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        mend = "do not trust it" if isinstance(error, tarfile.FilterError) else "get it again"
        if getattr(error, "errno", None) is not None:  # a full disk, say, and no fault of the archive
            mend = "make room or use another place"
        reason = str(error).partition(":\n")[0]  # what each compression lacks is below
        raise HearSsamError(f"{archive}: cannot be unpacked: {reason}; {mend}.") from error
    return target


def audio_folder(task: Task, split: str, sample_rate: int, resample: bool) -> Path:
    """`<task>/<rate>/<split>` at the model's rate, or with `resample` at the best other rate on disk."""
    rates = [rate for rate in audio_rates(task.audio) if (task.audio / str(rate) / split).is_dir()]
    card = known_tasks().get(task.name)
    where = f"; {card.source}" if card else ""
    if not rates:
        raise HearSsamError(f"{task.audio} has no audio: the folder {sample_rate}/{split} is missing{where}.")
    if sample_rate not in rates and not resample:
        lack = f"has no {sample_rate} Hz audio for {split}, only {', '.join(map(str, rates))} Hz"
        mend = f"allow resampling (--resample) or get it at the model's rate{where}"
        raise HearSsamError(f"{task.audio} {lack}; {mend}.")
    return task.audio / str(min(rates, key=lambda rate: _worse(rate, sample_rate))) / split


def best_folder(folders: Sequence[Path], sample_rate: int) -> Path:
    """Of several folders of one task, the one with the model's rate, else with the best to resample from."""
    worst = True, math.inf
    return min(folders, key=lambda f: min((_worse(rate, sample_rate) for rate in audio_rates(f)), default=worst))


def audio_rates(folder: Path) -> list[int]:
    """Sample rates of the audio in a task folder."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _worse(rate: int, wanted: int) -> tuple[bool, float]:
    """Grows as a rate gets worse for a model: first those above its own, the next one first, then those below."""
    return rate < wanted, abs(rate - wanted)


def require_audio(folder: Path, names: Iterable[str]) -> None:
    """Raise HearSsamError for a clip that is missing or no regular file: opening a pipe or a device may never end."""
    for name in names:
        if not os.path.isfile(folder / name):
            what = "is no regular file" if os.path.lexists(folder / name) else "is missing"
            raise HearSsamError(f"{folder / name}: {what}; get the audio of the task again.")
