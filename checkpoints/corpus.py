"""Decodes the audio that the shipped encoders were trained on: packages and repositories, as corpus.toml (beside) says.

    hear-ssam corpus STORE --missing FOLDER         # prints the commands that get what FOLDER lacks
    python checkpoints/corpus.py FOLDER AUDIO       # writes AUDIO/SOURCE/00000-HASH.wav ..., 16 kHz float32
    hear-ssam corpus STORE --audio AUDIO

Needs hear_ssam, and ffmpeg for G.722.
"""

from __future__ import annotations

import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from hear_ssam.audio import SUFFIXES, Clip, decode_audio, read_audio, resample
from hear_ssam.errors import HearSsamError, unknown_name
from hear_ssam.paths import atomic_write, shipped
from hear_ssam.pretraining.corpus import missing, recipe
from hear_ssam.pretraining.store import RATE


def main(folder: str, output: str) -> int:
    """Decode the whole recipe; exit code 1 if a clip was skipped."""
    table = recipe()
    skipped = write_audio(recipe_clips(folder, [*table["package"], *table["source"]]), Path(output))
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    return 1 if skipped else 0


def write_audio(clips: Iterable[Clip], output: Path) -> list[str]:
    """Write each clip as OUTPUT/SOURCE/NUMBER-HASH.wav, float32 at 16 kHz; returns why some could not be decoded.

    What is there already, of an earlier run, is not decoded again. Raises HearSsamError in the end where there are
    other files, of another version of the recipe: this one may leave them out.
    """
    skipped: list[str] = []
    others = set(output.rglob("*.wav"))
    for number, clip in enumerate(clips):
        name = clip.name.rpartition(clip.source)[2].encode("utf-8", "surrogateescape")
        file = output / clip.source / f"{number:05}-{zlib.crc32(name):08x}.wav"
        others.discard(file)
        if not file.exists():
            try:
                audio = clip.decode()
            except HearSsamError as error:
                skipped.append(str(error))
                continue
            with atomic_write(file) as path:
                soundfile.write(path, audio, RATE, format="WAV", subtype="FLOAT")
    if others:
        raise HearSsamError(f"{min(others)}: not of this recipe, as {len(others)} files in {output}; delete them.")
    return skipped


def recipe_clips(folder: str | Path, entries: list[dict[str, Any]]) -> Iterator[Clip]:
    """Clips of packages and repositories, each in FOLDER/NAME, as the tables of the recipe say.

    Raises HearSsamError with the commands that get what is missing, and where an entry holds no file that is wanted.
    """
    if lines := missing(folder, entries):
        raise HearSsamError(f"{folder}: lacks a part of the corpus; get it:\n" + "\n".join(lines))
    with open(shipped("checkpoints") / "left-out.tsv", encoding="utf-8") as table:
        left_out = {line.split("\t")[0] for line in table}
    for entry in entries:
        root, decoder = Path(folder, entry["name"]), entry.get("decoder", "audio")
        if decoder not in DECODERS:
            raise unknown_name(f"decoder of {entry['name']}", decoder, DECODERS)
        exclude = re.compile(entry.get("exclude", "(?!)"))  # (?!) matches nothing
        files = sorted({file for pattern in entry["files"] for file in root.glob(pattern)})
        files = [f for f in files if f.is_file() and not f.is_symlink()]
        files = [f for f in files if not exclude.search("/" + f.relative_to(root).as_posix())]
        files = [f for f in files if f.relative_to(folder).as_posix() not in left_out]
        if not files:
            stated = entry.get("version") or entry.get("commit")
            raise HearSsamError(f"{root}: holds none of {entry['files']}; the recipe is for {stated}.")
        for name, decode in DECODERS[decoder](files):
            if not exclude.search(name[len(str(root)) :]):  # with the name that a member has in its archive
                yield Clip(entry["name"], name, decode)


Decoded = Iterator[tuple[str, Callable[[], np.ndarray]]]  # (name, how to decode it)


def _each(clips: Callable[[Path], Decoded]) -> Callable[[list[Path]], Decoded]:
    """The clips of one file after another."""

    def of_files(files: list[Path]) -> Decoded:
        for file in files:
            try:
                yield from clips(file)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise HearSsamError(f"{file}: damaged; extract the package again ({error}).") from error

    return of_files


def _audio_file(path: Path) -> Decoded:
    yield str(path), functools.partial(read_audio, path, RATE)


def _g722_files(files: list[Path]) -> Decoded:
    """Headerless ITU-T G.722 at 16 kHz, which libsndfile does not read."""

    def decode(group: tuple[Path, ...], i: int) -> np.ndarray:
        try:
            return _ffmpeg(group)[i]
        except HearSsamError:
            return _ffmpeg(group[i : i + 1])[0]  # one damaged file spoils no other

    for start in range(0, len(files), GROUP):
        group = tuple(files[start : start + GROUP])
        for i, path in enumerate(group):
            yield str(path), functools.partial(decode, group, i)


GROUP = 100  # files for one process


@functools.lru_cache(maxsize=1)
def _ffmpeg(files: tuple[Path, ...]) -> list[np.ndarray]:
    """Float32 at 16 kHz of several files by one process."""
    if not shutil.which("ffmpeg"):
        raise HearSsamError(f"{files[0]}: needs the program ffmpeg to decode G.722; install it.")
    command = ["ffmpeg", "-v", "error", "-nostdin"]
    for path in files:
        command += ["-f", "g722", "-i", str(path)]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(files)):
            command += ["-map", str(i), "-ac", "1", "-ar", str(RATE), "-f", "f32le", f"{folder}/{i}"]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            raise HearSsamError(f"{files[0]}: ffmpeg cannot decode it: {done.stderr.decode(errors='replace').strip()}")
        return [np.fromfile(f"{folder}/{i}", "<f4") for i in range(len(files))]


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


def _in_memory(data: bytes, name: str) -> Callable[[], np.ndarray]:
    return functools.partial(decode_audio, io.BytesIO(data), name, RATE)


def _wavs_in_a_row(path: Path) -> Decoded:
    """OpenTTD sound set: whole WAV files one after another, each with its length in its RIFF header."""
    data = path.read_bytes()
    start = data.find(b"RIFF")
    while start >= 0:
        end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
        if end - start > 44:  # more than the header of a WAV
            yield f"{path}:{start}", _in_memory(data[start:end], f"{path}:{start}")
        start = data.find(b"RIFF", end)


def _zip_members(path: Path) -> Decoded:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if Path(name).suffix.lower() in SUFFIXES:
                yield f"{path}:{name}", _in_memory(archive.read(name), f"{path}:{name}")


DECODERS: dict[str, Callable[[list[Path]], Decoded]] = {
    "audio": _each(_audio_file),
    "g722": _g722_files,
    "sf2": _each(_soundfont),
    "cat": _each(_wavs_in_a_row),
    "zip": _each(_zip_members),
}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except HearSsamError as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        sys.exit(2)
