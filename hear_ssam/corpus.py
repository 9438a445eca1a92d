"""Pre-training audio → a store of log-mel clips on disk.

A store is a folder of three files:

    frames.f16  (frames, 80) float16, raw: log-mel as `frontend.LogMel` gives it, not standardised, clip after clip
    clips.npz   offsets (clips + 1,) int64 into the frames; source (clips,) int32 into the table of sources
    store.json  the table of sources (clips, hours, licence, attribution), what was skipped; written last

Audio comes from files, folders and tars, and from Debian packages by the recipe in `checkpoints/corpus.toml`.
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
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .audio import SUFFIXES, decode_audio, find_audio, read_audio, resample
from .errors import HearSsamError, unknown_name
from .machine import usable_cpus
from .paths import atomic_write, shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    return Store(frames, offsets, source, info)


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
                    decode = _decoder(stream.read(), f"{path}:{member.name}")
                    yield Clip(_source(path, Path(member.name)), f"{path}:{member.name}", decode)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise HearSsamError(f"{path}: cannot be read as a tar: {error}.") from error


def _source(named: Path, below: Path) -> str:
    return below.parts[0] if len(below.parts) > 1 else named.name if named.is_dir() else named.stem


def _decoder(data: bytes, name: str) -> Callable[[], np.ndarray]:
    return lambda: decode_audio(io.BytesIO(data), name, RATE)


def recipe() -> dict[str, Any]:
    """The corpus of the shipped encoders (`checkpoints/corpus.toml`): `package`, `source` and `left_out` tables."""
    with open(shipped("checkpoints") / "corpus.toml", "rb") as file:
        return tomllib.load(file)


def _terms(name: str) -> dict[str, str]:
    for entry in itertools.chain(recipe()["package"], recipe()["source"]):
        if entry["name"] == name:
            return {"licence": entry["licence"], "attribution": entry["attribution"]}
    return {}


def debian_clips(folder: str | os.PathLike[str], packages: list[dict[str, Any]]) -> Iterator[Clip]:
    """Clips of Debian packages, each extracted to FOLDER/NAME, as the `package` table of the recipe says.

    Raises HearSsamError that lists the packages that are missing, and where a package holds no file that is wanted.
    """
    missing = [package["name"] for package in packages if not Path(folder, package["name"]).is_dir()]
    if missing:
        raise HearSsamError(
            f"{folder}: missing packages; run `apt-get download {' '.join(missing)}`, then "
            f"`for deb in *.deb; do dpkg -x $deb {folder}/${{deb%%_*}}; done`."
        )
    for package in packages:
        root = Path(folder, package["name"])
        if package["decoder"] not in DECODERS:
            raise unknown_name(f"decoder of {package['name']}", package["decoder"], DECODERS)
        exclude = re.compile(package.get("exclude", "(?!)"))  # (?!) matches nothing
        files = sorted({file for pattern in package["files"] for file in root.glob(pattern)})
        files = [f for f in files if f.is_file() and not f.is_symlink()]
        files = [f for f in files if not exclude.search("/" + f.relative_to(root).as_posix())]
        if not files:
            raise HearSsamError(f"{root}: holds none of {package['files']}; the recipe is for {package['version']}.")
        for file in files:
            try:
                for name, decode in DECODERS[package["decoder"]](file):
                    yield Clip(package["name"], name, decode)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise HearSsamError(f"{file}: damaged; extract the package again ({error}).") from error


Decoded = Iterator[tuple[str, Callable[[], np.ndarray]]]  # (name, how to decode it)


def _audio_file(path: Path) -> Decoded:
    yield str(path), functools.partial(read_audio, path, RATE)


def _g722_file(path: Path) -> Decoded:
    """Headerless ITU-T G.722 at 16 kHz, which libsndfile does not read."""

    def decode() -> np.ndarray:
        if not shutil.which("ffmpeg"):
            raise HearSsamError(f"{path}: needs the program ffmpeg to decode G.722; install it.")
        command = ["ffmpeg", "-v", "error", "-nostdin", "-f", "g722", "-i", str(path), "-ac", "1", "-ar", str(RATE)]
        done = subprocess.run([*command, "-f", "f32le", "-"], capture_output=True)
        if done.returncode:
            raise HearSsamError(f"{path}: ffmpeg cannot decode it: {done.stderr.decode(errors='replace').strip()}")
        return np.frombuffer(bytearray(done.stdout), "<f4")  # a bytearray: torch wants writable memory

    yield str(path), decode


SAMPLE_HEADER = np.dtype(  # SoundFont 2.04, section 7.10
    {
        "names": ["name", "start", "end", "rate", "type"],
        "formats": ["S20", "<u4", "<u4", "<u4", "<u2"],
        "offsets": [0, 20, 24, 36, 44],
        "itemsize": 46,
    }
)
ROM = 0x8000  # sample type: the samples are in a synthesiser's memory, not in the file


def _soundfont(path: Path) -> Decoded:
    """The recordings in a SoundFont 2 at their own pitch, without loops and envelopes, those of 50 ms and more."""
    chunks = dict(_riff(np.memmap(path, np.uint8, "r")))
    if not {b"smpl", b"shdr"} <= chunks.keys():
        raise ValueError("no SoundFont 2 sample chunks")
    pcm = chunks[b"smpl"].view("<i2")
    for i, head in enumerate(chunks[b"shdr"].view(SAMPLE_HEADER)[:-1]):  # the last one only marks the end
        samples = pcm[head["start"] : head["end"]]
        rate = int(head["rate"])
        if head["type"] & ROM or len(samples) < 0.05 * rate or np.abs(samples.astype(np.int32)).max() < 50:
            continue
        decode = functools.partial(_pcm, samples, rate)
        yield f"{path}:{i} {head['name'].decode('latin-1')}", decode


def _pcm(samples: np.ndarray, rate: int) -> np.ndarray:
    return resample(samples.astype(np.float32) / 32768, rate, RATE)


def _riff(data: np.ndarray, position: int = 12) -> Iterator[tuple[bytes, np.ndarray]]:
    """(name, content) of the chunks of a RIFF file, those inside LIST chunks too."""
    while position + 8 <= len(data):
        name, size = data[position : position + 4].tobytes(), int(data[position + 4 : position + 8].view("<u4")[0])
        end = position + 8 + size
        if name == b"LIST":
            yield from _riff(data[:end], position + 12)
        else:
            yield name, data[position + 8 : end]
        position = end + size % 2


def _wavs_in_a_row(path: Path) -> Decoded:
    """OpenTTD sound set: whole WAV files one after another, each with its length in its RIFF header."""
    data = path.read_bytes()
    start = data.find(b"RIFF")
    while start >= 0:
        end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
        if end - start > 44:  # more than the header of a WAV
            yield f"{path}:{start}", _decoder(data[start:end], f"{path}:{start}")
        start = data.find(b"RIFF", end)


def _zip_members(path: Path) -> Decoded:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if Path(name).suffix.lower() in SUFFIXES:
                yield f"{path}:{name}", _decoder(archive.read(name), f"{path}:{name}")


DECODERS: dict[str, Callable[[Path], Decoded]] = {
    "audio": _audio_file,
    "g722": _g722_file,
    "sf2": _soundfont,
    "cat": _wavs_in_a_row,
    "zip": _zip_members,
}


# --- the command -----------------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "corpus",
        help="audio for pre-training -> a store of log-mel clips",
        description="Turn audio into a store of log-mel clips (float16, 80 bands, one frame every 10 ms) that "
        "`hear-ssam pretrain` reads: about 58 MB an hour.",
        epilog="""examples:
  hear-ssam corpus store --audio recordings/ more.tar
  hear-ssam corpus store --debian packages/      says which packages are missing and how to get them

The packages, their licences and what is left out of them: checkpoints/corpus.toml.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument("--audio", nargs="+", default=[], metavar="PATH", help="audio files, folders, tars of them")
    parser.add_argument("--debian", metavar="FOLDER", help="Debian packages of the recipe, each in FOLDER/NAME")
    parser.add_argument("--workers", type=int, default=usable_cpus(), metavar="N", help="decoding threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`hear-ssam corpus`: build a store, print its sources; exit code 1 if a file was skipped."""
    from tqdm import tqdm

    if not args.audio and not args.debian:
        raise HearSsamError("name some audio: --audio PATH... or --debian FOLDER.")
    if args.workers < 1:
        raise HearSsamError(f"--workers {args.workers}: needs at least one.")
    clips = audio_clips(args.audio)
    if args.debian:
        clips = itertools.chain(clips, debian_clips(args.debian, recipe()["package"]))
    info = build_store(args.store, tqdm(clips, unit=" clips"), args.workers)
    for row in info["sources"]:
        print(f"{row['clips']:8,} clips {row['hours']:8.2f} h  {row['name']}  {row.get('licence', '')}")
    hours = info["frames"] / FRAMES_PER_HOUR
    print(f"{info['clips']:8,} clips {hours:8.2f} h  in {args.store}")
    print(f"dropped: {info['short']} under 20 ms, {info['repeated']} that repeat another")
    for reason in info["skipped"]:
        print(f"skipped {reason}", file=sys.stderr)
    return 1 if info["skipped"] else 0
