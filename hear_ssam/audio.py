"""Audio files as float32 mono at a wanted sample rate: soundfile decodes (PyAV what it cannot), soxr resamples.

The HEAR functions never resample; the commands call this module before them.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import lzma
import os
import re
import stat
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
import soundfile
import soxr

from .container import Stream, streams
from .errors import HearSsamError, said

# What soundfile decodes without further parameters, as found in folders (its own list also holds .mat and .raw).
SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .sph".split())
UNREAD = frozenset(  # what it does not, and FFmpeg does
    ".m4a .mp4 .m4b .aac .wma .webm .mka .amr .ac3 .ape .wv .mp2 .3gp .dsf .mkv .mov .avi".split()
)
GUESSED = ("aac", "ac3", "amr", "mp3")  # bare streams, whose length FFmpeg guesses from their first bits per second
CLIP_RATE = 16_000  # Hz: what encoders read, and stores of audio hold
BLOCK = 1 << 18  # samples decoded at once: an hour of 96 kHz surround needs no more memory than its mono result
INSTALL_AV = "pip install 'hear-ssam[av]'"
MEND = "fetch it again, or save what is there (ffmpeg -i OLD NEW.wav)"


def find_audio(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, folders replaced by the audio files below them, sorted by path.

    A file that is named outright is kept whatever its suffix (reading it may fail); hidden files of folders are not.
    Raises HearSsamError for a folder that cannot be listed or holds no audio.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found += _audio_below(path) if os.path.isdir(path) else [path]
    return found


def _audio_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise HearSsamError(f"{error.filename}: cannot be listed: {error.strerror}; mend its permissions.") from error

    readable, files = _readable(), list[Path]()
    left_out: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=refuse):  # unlike Path.rglob it reports unreadable folders
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["linked folders"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() not in readable:
                left_out[path.suffix.lower() or "without a suffix"] += 1
            elif path.exists() and not path.is_file():
                left_out["pipes and devices"] += 1
            else:
                files.append(path)
    if not files:
        there = _counts(left_out) or "nothing else"
        mend = " ".join(sorted(readable)) + (f", or {INSTALL_AV}" if UNREAD & left_out.keys() else "")
        raise HearSsamError(f"{folder}: no audio files below it, {there}; convert audio to one of {mend}.")
    tell_left_out(folder, left_out)
    return sorted(files)


def _readable() -> frozenset[str]:
    """Which suffixes are those of audio that can be read here."""
    return SUFFIXES | UNREAD if importlib.util.find_spec("av") else SUFFIXES


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if count)


def tell_left_out(place: str | os.PathLike[str], kinds: Counter[str]) -> None:
    """Warn of what of a folder or archive is not read, counted by kind; without any, do nothing."""
    if counts := _counts(kinds):
        more = f", or {INSTALL_AV}" if UNREAD & kinds.keys() else ""
        text = f"{place}: left out {counts}; convert what is audio{more}, name linked folders."
        warnings.warn(text, stacklevel=4)


def read_audio(path: str | os.PathLike[str], sample_rate: int, most: int | None = None) -> np.ndarray:
    """Decode a file of any rate and channel count: the mean of its channels at `sample_rate` Hz.

    Returns float32 (samples,), full scale ±1; several streams in one file follow one another. With `most`, decoding
    ends once there are more samples than that. Warns where the header counts less audio than is there and was read.
    Raises HearSsamError that names the file where it is missing, not a regular file, not audio, cut off or damaged,
    empty, or holds NaN or infinite samples.
    """
    pieces, size = [], 0
    for block in audio_blocks(path, sample_rate):
        pieces.append(block)
        size += len(block)
        if most is not None and size > most:
            break
    return np.concatenate(pieces)


def audio_blocks(path: str | os.PathLike[str], sample_rate: int) -> Iterator[np.ndarray]:
    """As `read_audio`, block by block: a file of any length in bounded memory."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
            raise HearSsamError(f"{path}: is a folder, a pipe or a device; name an audio file.")
        with open(path, "rb") as handle:
            yield from _blocks(handle, path, sample_rate)
    except OSError as error:
        raise HearSsamError(f"{path}: cannot be read: {said(error)}; name an audio file.") from error


def decode_audio(handle: BinaryIO, name: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """As `read_audio`, from an open file or a member of an archive that errors shall call `name`."""
    return np.concatenate([*_blocks(handle, name, sample_rate)])


def _blocks(handle: BinaryIO, name: str | os.PathLike[str], sample_rate: int) -> Iterator[np.ndarray]:
    size = 0
    for block in itertools.chain.from_iterable(_parts(handle, name, sample_rate)):
        if not np.isfinite(block).all():
            raise HearSsamError(f"{name}: holds NaN or infinite samples; mend them or leave it out.")
        size += len(block)
        yield block
    if not size:
        raise HearSsamError(f"{name}: holds no samples; leave it out.")


def _parts(handle: BinaryIO, name: str | os.PathLike[str], sample_rate: int) -> Iterator[Iterator[np.ndarray]]:
    """The blocks of each stream of a file."""
    if Path(name).suffix.lower() in UNREAD:
        yield _decode_av(handle, name, sample_rate)
        return
    for stream in streams(handle):
        if stream.fault:
            raise HearSsamError(f"{name}: {stream.fault}; {MEND}.")
        yield _decode(stream, name, sample_rate)
        if stream.remark:
            warnings.warn(f"{name}: {stream.remark}; write the file again to be rid of this.", stacklevel=5)


def _decode(stream: Stream, name: str | os.PathLike[str], sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks of one stream, mono at `sample_rate`."""
    try:
        file = soundfile.SoundFile(stream)
    except soundfile.LibsndfileError as error:
        raise HearSsamError(f"{name}: cannot be read as audio: {_reason(error)}; name an audio file.") from error
    with file:
        file.seekable = lambda: False  # or soundfile seeks after each block, and MP3 loses its bit reservoir
        rate = file.samplerate
        if not 1_000 <= rate <= 1_000_000:
            raise HearSsamError(f"{name}: its header gives an impossible sample rate of {rate:,} Hz; correct it.")
        resampler = soxr.ResampleStream(rate, sample_rate, num_channels=1, dtype="float32", quality="HQ")
        promised, slack = stream.frames, stream.slack
        if not promised and file.frames < 2**62:  # libsndfile's own count, which is not exact in every format
            promised, slack = file.frames, 4096
        frames, last = 0, False
        while not last:
            # not a sample more than promised at first: a decoder that looks ahead stumbles over a tag behind the audio
            wanted = max(1, BLOCK // file.channels)
            wanted = min(wanted, promised - frames) if frames < promised else wanted
            try:
                block = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)  # (n, channels) -> (n,)
            except soundfile.LibsndfileError as error:
                if not promised or frames < promised:
                    text = f"{name}: is damaged or cut off after {frames / rate:.2f} s: {_reason(error)}; {MEND}."
                    raise HearSsamError(text) from error
                block = np.zeros(0, np.float32)
            frames += len(block)
            last = len(block) < wanted
            yield block if rate == sample_rate else resampler.resample_chunk(block, last=last)
    if frames + slack < promised:
        text = f"{frames / rate:.2f} of {promised / rate:.2f} s are there"
        raise HearSsamError(f"{name}: is cut off or damaged: {text}; {MEND}.")
    if stream.frames and frames > promised + slack:
        stream.remark = f"its header counts {promised / rate:.2f} s, {frames / rate:.2f} s are there and were read"


def _decode_av(handle: BinaryIO, name: str | os.PathLike[str], sample_rate: int) -> Iterator[np.ndarray]:
    """Blocks of the first audio track of what FFmpeg reads and soundfile does not, mono at `sample_rate`."""
    try:
        import av
    except ImportError as error:
        raise HearSsamError(f"{name}: is read by PyAV only; {INSTALL_AV}, or convert it.") from error
    seconds, resampler = 0.0, None
    handle.seek(0)  # a member of a tar is decoded again and again
    try:
        with av.open(handle, "r") as container:
            if not container.streams.audio:
                raise HearSsamError(f"{name}: has no audio track; leave it out.")
            track = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")  # float32 (channels, samples), whatever the codec gives
            for frame in itertools.chain(container.decode(track), (None,)):
                for part in planar.resample(frame):
                    rate = part.sample_rate
                    resampler = resampler or soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="HQ")
                    seconds += part.samples / rate
                    yield resampler.resample_chunk(part.to_ndarray().mean(axis=0))
            promised = float(track.duration * track.time_base) if track.duration and track.time_base else 0.0
            if not promised and len(container.streams) == 1:  # Matroska tells only how long all tracks are together
                promised = (container.duration or 0) / 1e6
            promised *= container.format.name not in GUESSED
    except av.FFmpegError as error:
        text = f"{name}: is damaged or no audio, after {seconds:.2f} s: {error.strerror}; {MEND}."
        raise HearSsamError(text) from error
    if seconds < promised - 0.5:
        raise HearSsamError(f"{name}: is cut off: {seconds:.2f} of {promised:.2f} s are there; {MEND}.")
    if resampler:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _reason(error: soundfile.LibsndfileError) -> str:
    if error.code == 24:  # "SF_INFO struct incomplete"
        return "its header gives a sample rate of 0 Hz"
    return str(error.error_string).removeprefix("Error : ").rstrip(".") or f"libsndfile's error {error.code}"


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 (samples,) from one rate in Hz to another (soxr, high quality)."""
    return audio if from_rate == to_rate else soxr.resample(audio, from_rate, to_rate, quality="HQ")


class Clip(NamedTuple):
    """One piece of audio that has not been decoded yet; decode() gives float32 (samples,) at CLIP_RATE."""

    source: str
    name: str
    decode: Callable[[], np.ndarray]
    bytes: int = 0  # that it holds in memory


def audio_clips(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Clip]:
    """Clips of audio files, of folders (searched through) and of tars, compressed or not.

    The source of a clip is the first folder below what was named, else the name of what was named without suffix and
    shard number (speech-000017.tar: speech). A damaged tar gives the clips before the damage, then one that cannot be
    decoded, so that whoever reads them can go on and name it; so does a tar without audio.
    """
    for path in map(Path, paths):
        if path.is_file() and is_tar(path):
            yield from _tar_clips(path)
            continue
        for file in find_audio([path]):
            yield Clip(_source(path, file.relative_to(path)), str(file), functools.partial(read_audio, file, CLIP_RATE))


TAR = re.compile(r"([-_.]?\d{3,})?\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)  # with the number of a shard


def is_tar(path: Path) -> bool:
    """Whether a file is a tar by its name or, where that is not one of audio, its content (a millisecond a file)."""
    try:
        named = path.suffix.lower() in SUFFIXES | UNREAD
        return bool(TAR.search(path.name)) or (not named and tarfile.is_tarfile(path))
    except Exception:  # a damaged archive raises what its codec does; reading it as audio names it
        return False


def _tar_clips(path: Path) -> Iterator[Clip]:
    problem, left_out, readable = "holds no audio", Counter[str](), _readable()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                inside = Path(*(part for part in Path(member.name).parts if part not in ("/", "..")))
                suffix = inside.suffix.lower()
                if not member.isfile() or any(part.startswith(".") for part in inside.parts):
                    continue
                if suffix in readable:
                    name, data = f"{path}:{member.name}", io.BytesIO(cast(IO[bytes], tar.extractfile(member)).read())
                    decode = functools.partial(decode_audio, data, name, CLIP_RATE)
                    yield Clip(_source(path, inside), name, decode, member.size)
                    problem = ""
                left_out[suffix] += suffix in UNREAD - readable  # beside audio, a shard is full of other files
            problem = problem or _problem_at_end(tar)
        tell_left_out(path, left_out)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem = f"cannot be read to its end as a tar ({error})"
    if problem:
        refusal = f"{path}: {problem}; get it again or leave it out."
        yield Clip(path.stem, str(path), functools.partial(_refuse, refusal))


def _problem_at_end(tar: tarfile.TarFile) -> str:
    """tarfile takes whatever is no header for the end of an archive; zeros until the end of the file are one."""
    file = cast(IO[bytes], tar.fileobj)
    file.seek(tar.offset)
    block = file.read(512)
    while block and not block.strip(b"\0"):
        if not (block := file.read(1 << 20)):
            return ""
    return f"is cut off, damaged or joined to another tar at byte {tar.offset:,}"


def _refuse(message: str) -> NoReturn:
    raise HearSsamError(message)


def _source(named: Path, below: Path) -> str:
    if len(below.parts) > 1:
        return below.parts[0]
    if named.is_dir():
        return named.name
    return (TAR.sub("", named.name) if TAR.search(named.name) else "") or named.stem
