"""Does a store hold recordings of an evaluation? Acoustic fingerprints as in music recognition (Wang, ISMIR 2003).

Peaks of a spectrogram are paired; a pair (two frequencies, the time between) is a landmark that survives other codecs,
levels, cuts and some noise. Two clips share a recording where many landmarks agree on one shift in time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import HearSsamError
from .store import Clip, Store

SIZE, HOP = 1024, 256  # samples of a frame and between frames: 64 and 16 ms
NEAR = (31, 15)  # bins and frames in which a peak is the largest
FLOOR = 12.0  # nepers of power below the clip's loudest peak that still count, 52 dB
FAN, AHEAD = 6, 63  # partners of a peak: so many, at most so many frames later
VOTES = 8  # moments that must agree on one shift
COMMON = 300  # a landmark that is found more often tells nothing (hum, tones of a synthesiser)
PIECE = 1 << 20  # samples of a long clip that are looked at at once


class Leak(NamedTuple):
    """Clip `clip` of a store and the evaluation clip `known` share a recording; `votes` moments say so."""

    clip: int
    known: str
    votes: int


def landmarks(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of float32 samples at 16 kHz: what each landmark is (int64) and the frame where it begins (int64)."""
    parts = [_landmarks(audio[i : i + PIECE], i // HOP) for i in range(0, max(1, len(audio)), PIECE)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _landmarks(audio: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    x = F.pad(torch.from_numpy(np.asarray(audio, np.float32)), (0, max(0, 2 * SIZE - len(audio))))
    spectrum = torch.stft(x, SIZE, HOP, window=torch.hann_window(SIZE), center=False, return_complex=True)
    power = torch.log(torch.view_as_real(spectrum).square().sum(-1) + 1e-10)  # (bins, frames)
    largest = F.max_pool2d(power[None], NEAR, stride=1, padding=(NEAR[0] // 2, NEAR[1] // 2))[0]
    peaks = (power == largest) & (power > max(float(power.max()) - FLOOR, -20.0))
    frame, band = (side.numpy() for side in peaks.T.nonzero(as_tuple=True))  # in order of time
    what, when = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for step in range(1, FAN + 1):
        ahead = frame[step:] - frame[:-step] if len(frame) > step else frame[:0]
        close = (ahead > 0) & (ahead <= AHEAD)
        f1, f2 = band[: len(ahead)][close], band[step : step + len(ahead)][close]
        what.append((f1 * 1024 + f2) * 64 + ahead[close])
        when.append(frame[: len(ahead)][close] + first)
    return np.concatenate(what), np.concatenate(when)


def find_leaks(store: Store, known: Iterable[Clip], votes: int = VOTES) -> Iterator[Leak]:
    """Clips of a store that share a recording with a clip of `known`, the best match of each.

    Raises HearSsamError for a store of log-mel frames, a known clip that cannot be decoded, or none at all.
    """
    if not store.holds_audio:
        raise HearSsamError(f"{store.folder}: holds log-mel frames, no audio to be recognised; build the store again.")
    names: list[str] = []
    whats, whens, owners = [], [], []
    for clip in known:
        audio = clip.decode()
        for late in (0, HOP // 2):  # wherever a copy was cut, its frames lie near those of one of the two
            what, when = landmarks(audio[late:])
            whats.append(what)
            whens.append(when)
            owners.append(np.full(len(what), len(names)))
        names.append(clip.name)
    if not names:
        raise HearSsamError("--check-against: holds no audio; name folders or tars of audio.")
    what, when, owner = np.concatenate(whats), np.concatenate(whens), np.concatenate(owners)
    order = np.argsort(what, kind="stable")
    what, when, owner = what[order], when[order], owner[order]
    for i in range(len(store)):
        mine, at = landmarks(store[i].astype(np.float32) / 32768)
        low, high = np.searchsorted(what, mine, "left"), np.searchsorted(what, mine, "right")
        count = np.where(high - low <= COMMON, high - low, 0)
        if not count.any():
            continue
        row = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())  # low, low + 1, ..., high - 1
        moment = np.repeat(at, count)
        shift = (when[row] - moment + (1 << 30)) // 2  # a shift is known to two frames
        voice = np.unique(np.stack([owner[row], shift, moment]), axis=1)  # a moment votes once for a clip and shift
        pairs, ballots = np.unique(voice[:2], axis=1, return_counts=True)
        best = int(ballots.argmax())
        if ballots[best] >= votes:
            yield Leak(i, names[int(pairs[0, best])], int(ballots[best]))
