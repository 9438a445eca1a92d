"""Does a store hold recordings of an evaluation? Acoustic fingerprints as in music recognition (Wang, ISMIR 2003).

Local maxima of a spectrogram survive coding, cuts, gain and other sounds on top. Two of them, with their frequencies
and the time between, are a landmark; two clips share a recording where many landmarks agree on one shift in time. Pitch
and speed must be unchanged. Recall and false alarms: `python -m benchmarks leaks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..audio import Clip
from ..errors import HearSsamError
from ..machine import work_ahead
from .store import Store

SIZE, HOP = 1024, 256  # samples of a frame and between frames: 64 and 16 ms
PIECE = 3750 * HOP  # samples of a long clip that are compared at once: a minute
NEAR = 9, 13  # frames and bins in which a peak is the largest: some 80 peaks a second
FLOOR = 1e-3  # of a piece's highest peak, -60 dB: what lies below is no peak
FAN, AHEAD, BINS = 6, 63, 127  # partners of a peak: so many, at most so many frames later and so many bins away
VOTES = 8  # peaks that must agree on one shift; short clips that share nothing reach 7
SHARE, PLENTY = 0.05, 30  # and of the shorter piece's peaks this share, at most so many: long tones agree by chance
COMMON = 1000  # a landmark that is found more often tells nothing (hum, tones of a synthesiser)
BLOCK = 16_000_000  # landmarks of the evaluation in memory at once, some 400 MB; every block reads the store once more


class Leak(NamedTuple):
    """Clip `clip` of a store and the evaluation clip `known` share a recording; `votes` peaks say so."""

    clip: int
    known: str
    votes: int


def find_leaks(store: Store, known: Iterable[Clip], votes: int = VOTES, workers: int = 1) -> list[Leak]:
    """Clips of a store that share a recording with a clip of `known`, the best match of each.

    Memory is bounded whatever the two sizes. Raises HearSsamError for a store of log-mel frames, a known clip that
    cannot be decoded, or none at all.
    """
    if not store.holds_audio:
        raise HearSsamError(f"{store.folder}: holds log-mel frames, no audio to be recognised; build the store again.")
    best: dict[int, Leak] = {}
    index = None
    for index in _indices(known, workers):

        def look_up(piece: tuple[int, np.ndarray], index: _Index = index) -> list[tuple[str, int]]:
            return index.matches(piece[1].astype(np.float32) / 32768, votes)

        pieces = ((i, piece) for i in range(len(store)) for piece in _pieces(store[i]))
        for (i, _), found in work_ahead(look_up, pieces, workers, 2 * workers):
            for name, count in found.result():
                if i not in best or best[i].votes < count:
                    best[i] = Leak(i, name, count)
    if index is None:
        raise HearSsamError("--check-against: holds no audio; name folders or tars of audio.")
    return sorted(best.values())


def _pieces(audio: np.ndarray) -> Iterator[np.ndarray]:
    """Every minute, frames that reach over its end included."""
    for start in range(0, max(1, len(audio) - SIZE + HOP), PIECE):
        yield audio[start : start + PIECE + SIZE - HOP]


def landmarks(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of float32 samples at 16 kHz: what each landmark is, uint32, and the peak where it begins, 512 x frame + bin."""
    from scipy.ndimage import maximum_filter

    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, (0, max(0, SIZE - len(audio)))), SIZE)[::HOP]
    size = np.abs(np.fft.rfft(frames * np.hanning(SIZE).astype(np.float32))[:, :512]).astype(np.float32)
    largest = maximum_filter(size, NEAR, mode="constant") == size
    frame, bin_ = np.nonzero(largest & (size > max(FLOOR * size.max(), 1e-4)))  # in order of time
    partners = np.zeros(len(frame), np.int64)
    what, peak = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for step in range(1, min(len(frame), 80)):
        later, higher = frame[step:] - frame[:-step], bin_[step:] - bin_[:-step]
        close = (later > 0) & (later <= AHEAD) & (np.abs(higher) <= BINS) & (partners[:-step] < FAN)
        partners[:-step] += close
        i = np.nonzero(close)[0]
        what.append((bin_[i] << 14 | (higher[i] + BINS) << 6 | later[i]).astype(np.uint32))
        peak.append(frame[i] << 9 | bin_[i])
    return np.concatenate(what), np.concatenate(peak)


class _Index:
    """The landmarks of some pieces of known clips, sorted, each with its piece and its frame."""

    def __init__(self, names: list[str], found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.names = names
        self.peaks = np.array([len(part[0]) for part in found]) // (2 * FAN)  # about, as each is here twice
        what = np.concatenate([part[0] for part in found])
        order = np.argsort(what, kind="stable")
        self.what = what[order]
        places = [(number << 12) + (part[1] >> 9) for number, part in enumerate(found)]  # a minute: below 4096 frames
        self.places = np.concatenate(places)[order]

    def matches(self, audio: np.ndarray, votes: int) -> list[tuple[str, int]]:
        """(name, votes) of the pieces that share a recording with audio."""
        what, peak = landmarks(audio)
        low = np.searchsorted(self.what, what)
        count = np.searchsorted(self.what, what, "right") - low
        count[count > COMMON] = 0
        mine = np.repeat(np.arange(len(what)), count)
        place = self.places[np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count) + low[mine]]
        # A piece and a shift are one number; each peak votes once for it.
        alike = ((place >> 12) << 13) + (place & 4095) - (peak[mine] >> 9) + 4096
        alike, ballots = np.unique(np.unique(alike << 21 | peak[mine]) >> 21, return_counts=True)
        some = ballots >= votes  # of very many, few
        alike, ballots = alike[some], ballots[some]
        fewer = np.minimum(self.peaks[alike >> 13], len(what) // FAN)
        enough = ballots >= np.minimum(SHARE * fewer, PLENTY)
        return [(self.names[a >> 13], int(n)) for a, n in zip(alike[enough].tolist(), ballots[enough], strict=True)]


def _indices(known: Iterable[Clip], workers: int) -> Iterator[_Index]:
    def marks(piece: tuple[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        # Wherever a copy was cut, its frames lie near those of one of the two.
        what, peak = zip(*(landmarks(piece[1][late:]) for late in (0, HOP // 2)), strict=True)
        return np.concatenate(what), np.concatenate(peak)

    names, found, size = list[str](), list[tuple[np.ndarray, np.ndarray]](), 0
    pieces = ((clip.name, piece) for clip in known for piece in _pieces(clip.decode()))
    for (name, _), result in work_ahead(marks, pieces, workers, 2 * workers):
        names.append(name)
        found.append(result.result())
        size += len(found[-1][0])
        if size >= BLOCK:
            yield _Index(names, found)
            names, found, size = [], [], 0
    if names:
        yield _Index(names, found)
