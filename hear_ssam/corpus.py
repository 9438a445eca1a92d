"""Pre-training audio → a store of log-mel clips on disk.

A store is a folder of three files:

    frames.f16  (frames, 80) float16, raw: log-mel as `frontend.LogMel` gives it, not standardised, clip after clip
    clips.npz   offsets (clips + 1,) int64 into the frames; source (clips,) int32 into the table of sources
    store.json  the table of sources (clips, hours, licence, attribution), what was skipped; written last

Audio comes from files, folders and tars; `checkpoints/corpus.py` decodes what the shipped encoders were trained on.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .audio import SUFFIXES, decode_audio, find_audio, read_audio
from .errors import HearSsamError
from .machine import usable_cpus
from .paths import atomic_write, read_toml, shipped

RATE = 16_000  # Hz
BANDS = 80
FRAMES_PER_HOUR = 3600 * 100
SHORTEST = 320  # samples, 20 ms; the front end needs 201


class Clip(NamedTuple):
    """One piece of audio that has not been decoded yet; decode() gives float32 (samples,) at 16 kHz."""

    source: str
    name: str
    decode: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Store:
    """An open store; `store[i]` is clip i as float16 (frames, 80), a view of the mapped file."""

    frames: np.ndarray
    offsets: np.ndarray
    source: np.ndarray
    info: dict[str, Any]
    folder: Path = Path("store")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.frames[self.offsets[index] : self.offsets[index + 1]]


def open_store(folder: str | os.PathLike[str]) -> Store:
    """Map a store for reading. Raises HearSsamError where it is missing, unfinished or of another size than it says."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "store.json").read_text())
        with np.load(folder / "clips.npz") as clips:
            offsets, source = clips["offsets"], clips["source"]
        frames = np.memmap(folder / "frames.f16", np.float16, "c").reshape(-1, BANDS)
    except (OSError, ValueError, KeyError) as error:
        raise HearSsamError(f"{folder}: no finished store here ({error}); make one with `hear-ssam corpus`.") from error
    if len(frames) != offsets[-1] or len(source) != len(offsets) - 1:
        raise HearSsamError(f"{folder}: frames.f16 and clips.npz do not belong together; build the store again.")
    return Store(frames, offsets, source, info, folder)


def build_store(folder: str | os.PathLike[str], clips: Iterable[Clip], workers: int = 2) -> dict[str, Any]:
    """Decode clips in `workers` threads and write their log-mel frames, in order, as a store.

    A clip that cannot be decoded is skipped and named; one under 20 ms, or with the same frames as an earlier one, is
    counted and dropped. Returns what store.json holds: frames, clips, sources, skipped (list of str), short, repeated.
    Raises HearSsamError where the folder already holds a store, cannot be written, or no clip was left.
    """
    folder = Path(folder)
    if (folder / "store.json").exists():
        raise HearSsamError(f"{folder}: holds a store already; name another folder or delete this one.")
    log_mel = _log_mel()
    offsets, source, skipped = [0], [], []
    sources: dict[str, int] = {}
    seen: set[bytes] = set()
    short = repeated = 0
    with atomic_write(folder / "frames.f16") as path, open(path, "wb") as file:
        for clip, result in _ahead(lambda clip: log_mel(clip.decode()), clips, workers):
            try:
                frames = result.result()
            except HearSsamError as error:
                skipped.append(str(error))
                continue
            if frames is None:
                short += 1
                continue
            data = frames.tobytes()
            digest = hashlib.sha1(data, usedforsecurity=False).digest()
            if digest in seen:
                repeated += 1
                continue
            seen.add(digest)
            file.write(data)
            offsets.append(offsets[-1] + len(frames))
            source.append(sources.setdefault(clip.source, len(sources)))
        if not source:
            raise HearSsamError(f"no usable audio for {folder}: {skipped[0] if skipped else 'no clips were given'}")
    with atomic_write(folder / "clips.npz") as path, open(path, "wb") as file:
        np.savez(file, offsets=np.array(offsets, np.int64), source=np.array(source, np.int32))
    frames_of = np.bincount(source, weights=np.diff(offsets))
    table = [
        {"name": name, "clips": source.count(i), "hours": round(frames_of[i] / FRAMES_PER_HOUR, 3), **_terms(name)}
        for name, i in sources.items()
    ]
    info = {"frames": offsets[-1], "clips": len(source), "sources": table}
    info |= {"skipped": skipped, "short": short, "repeated": repeated}
    with atomic_write(folder / "store.json") as path:
        path.write_text(json.dumps(info, indent=1, ensure_ascii=False))
    return info


def _log_mel() -> Callable[[np.ndarray], np.ndarray | None]:
    import torch

    from .frontend import LogMel

    front_end = LogMel(BANDS)

    def frames(audio: np.ndarray) -> np.ndarray | None:
        if len(audio) < SHORTEST:
            return None
        with torch.inference_mode():
            return front_end(torch.from_numpy(audio)[None])[0].numpy().astype(np.float16)  # (frames, 80)

    return frames


def _ahead(work: Callable, items: Iterable, workers: int) -> Iterator[tuple[Any, Future]]:
    """(item, future of work(item)) in order, with a few items under way: memory stays bounded, unlike executor.map."""
    queue: collections.deque[tuple[Any, Future]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            queue.append((item, pool.submit(work, item)))
            if len(queue) > 4 * workers:
                yield queue.popleft()
        yield from queue


# --- where clips come from -------------------------------------------------------------------------------------------


def audio_clips(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Clip]:
    """Clips of audio files, of folders (searched through) and of tars.

    The source of a clip is the first folder below what was named, else the name of what was named (no suffix).
    """
    for path in map(Path, paths):
        if path.is_file() and tarfile.is_tarfile(path):
            yield from _tar_clips(path)
            continue
        for file in find_audio([path]):
            yield Clip(_source(path, file.relative_to(path)), str(file), functools.partial(read_audio, file, RATE))


def _tar_clips(path: Path) -> Iterator[Clip]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                if stream is not None:
                    name, data = f"{path}:{member.name}", io.BytesIO(stream.read())
                    decode = functools.partial(decode_audio, data, name, RATE)
                    yield Clip(_source(path, Path(member.name)), name, decode)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise HearSsamError(f"{path}: cannot be read as a tar: {error}.") from error


def _source(named: Path, below: Path) -> str:
    return below.parts[0] if len(below.parts) > 1 else named.name if named.is_dir() else named.stem


def recipe() -> dict[str, Any]:
    """The corpus of the shipped encoders (`checkpoints/corpus.toml`): `package`, `source` and `left_out` tables."""
    return read_toml(shipped("checkpoints") / "corpus.toml")


def _terms(name: str) -> dict[str, str]:
    for entry in itertools.chain(recipe()["package"], recipe()["source"]):
        if entry["name"] == name:
            return {"licence": entry["licence"], "attribution": entry["attribution"]}
    return {}


# --- the command -----------------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "corpus",
        help="audio for pre-training -> a store of log-mel clips",
        description="Turn audio into a store of log-mel clips (float16, 80 bands, one frame every 10 ms) that "
        "`hear-ssam pretrain` reads: about 58 MB an hour.",
        epilog="""examples:
  hear-ssam corpus store --audio recordings/ more.tar
  hear-ssam corpus store --audio decoded/       what `python checkpoints/corpus.py packages decoded` wrote

What the shipped encoders were trained on, with its licences: checkpoints/corpus.toml.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument("--audio", nargs="+", required=True, metavar="PATH", help="audio files, folders, tars of them")
    parser.add_argument("--workers", type=int, default=usable_cpus(), metavar="N", help="decoding threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`hear-ssam corpus`: build a store, print its sources; exit code 1 if a file was skipped."""
    from tqdm import tqdm

    if args.workers < 1:
        raise HearSsamError(f"--workers {args.workers}: needs at least one.")
    info = build_store(args.store, tqdm(audio_clips(args.audio), unit=" clips"), args.workers)
    for row in info["sources"]:
        print(f"{row['clips']:8,} clips {row['hours']:8.2f} h  {row['name']}  {row.get('licence', '')}")
    hours = info["frames"] / FRAMES_PER_HOUR
    print(f"{info['clips']:8,} clips {hours:8.2f} h  in {args.store}")
    print(f"dropped: {info['short']} under 20 ms, {info['repeated']} that repeat another")
    for reason in info["skipped"]:
        print(f"skipped {reason}", file=sys.stderr)
    return 1 if info["skipped"] else 0
