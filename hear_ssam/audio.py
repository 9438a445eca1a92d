"""Audio files as float32 mono at a wanted sample rate: soundfile decodes, soxr resamples.

The HEAR functions never resample; the commands call this module before them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from .errors import HearSsamError

# What soundfile decodes without further parameters, as found in folders (its own list also holds .mat and .raw).
SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .sph".split())
BLOCK = 1 << 18  # frames decoded at once: an hour of 96 kHz surround needs no more memory than its mono result


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
        raise HearSsamError(f"cannot list the folder {error.filename}: {error.strerror}.") from error

    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse)  # unlike Path.rglob it reports unreadable folders
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
    if not files:
        raise HearSsamError(f"no audio files below {folder} (looked for {' '.join(sorted(SUFFIXES))}).")
    return sorted(files)


def read_audio(path: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """Decode a file of any rate and channel count: the mean of its channels at `sample_rate` Hz.

    Returns float32 (samples,), full scale ±1. Raises HearSsamError that names the file where it is missing, not audio,
    damaged, empty, or holds NaN or infinite samples.
    """
    try:
        with open(path, "rb") as handle:
            return decode_audio(handle, path, sample_rate)
    except OSError as error:
        raise HearSsamError(f"{path}: cannot be read as audio: {error.strerror or error}.") from error


def decode_audio(handle: BinaryIO, name: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """As `read_audio`, from an open file or a member of an archive that errors shall call `name`."""
    try:
        with soundfile.SoundFile(handle) as file:
            audio = _decode(file, sample_rate)
    except soundfile.LibsndfileError as error:
        raise HearSsamError(f"{name}: cannot be read as audio: {str(error.error_string).rstrip('.')}.") from error
    if not len(audio):
        raise HearSsamError(f"{name}: holds no samples.")
    if not np.isfinite(audio).all():
        raise HearSsamError(f"{name}: holds NaN or infinite samples.")
    return audio


def _decode(file: soundfile.SoundFile, sample_rate: int) -> np.ndarray:
    resampler = soxr.ResampleStream(file.samplerate, sample_rate, num_channels=1, dtype="float32", quality="HQ")
    same_rate = file.samplerate == sample_rate
    pieces = []
    while True:
        block = file.read(BLOCK, dtype="float32", always_2d=True).mean(axis=1)  # (frames, channels) -> (frames,)
        last = len(block) < BLOCK
        pieces.append(block if same_rate else resampler.resample_chunk(block, last=last))
        if last:
            return np.concatenate(pieces)


def resample(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample float32 (samples,) from one rate in Hz to another (soxr, high quality)."""
    return audio if from_rate == to_rate else soxr.resample(audio, from_rate, to_rate, quality="HQ")
