"""Clips of any length → embeddings: `hear_ssam.embed`, and what `hear-ssam embed` is made of.

Every clip gets what it gets alone. `embed_clips` cuts the spectrogram of each into windows and encodes windows of equal
length together, whichever clip they are of: nothing is padded. `embed_long` reads a clip twice, block by block: the
first pass gathers its statistics, the second encodes; its memory does not grow with the length.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..audio import audio_blocks, read_audio, resample
from ..errors import HearSsamError, about, unknown_name
from ..frontend import HOP, WINDOW, normalize
from ..hear import HearModel, load_model

Item = TypeVar("Item")
Pooling = Literal["mean", "mean_std"]
Blocks = Callable[[], Iterable[np.ndarray]]  # a clip that can be read again and again: float32 (samples,) in pieces
LONG = 60  # seconds; what is longer is read twice, in pieces of that length
SCALES = {"int16": 2**15, "int32": 2**31, "uint8": 2**7}


def embed(
    x: Any,
    model: HearModel | str | os.PathLike[str] | None = None,
    *,
    rate: int = 16_000,
    lengths: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    layers: Sequence[int] | None = None,
) -> np.ndarray:
    """Scene embeddings, one row per clip: float32 (clips, E).

    x        the path of an audio file, or a list of them: any rate and length, channels are averaged; an array or
             tensor (samples,) or (clips, samples); or a list of one-dimensional ones, whose lengths may differ.
             Floats have full scale ±1, integers that of their type.
    model    what `load_model` gives or takes; None: the shipped one
    rate     of arrays, in Hz; files know theirs
    lengths  (clips,) how many samples of each row of a padded two-dimensional array count
    pooling  over time: "mean", or "mean_std", mean and standard deviation side by side; None: what the model says
    layers   blocks, counted from 1, whose embeddings stand side by side; None: the one the weights name, or the last

    A clip gets the same row in any company, up to rounding. Raises HearSsamError that names the file or the clip.
    """
    if not isinstance(model, HearModel):
        if not isinstance(model, (str, os.PathLike, type(None))):
            raise HearSsamError(f"model: is a {type(model).__name__}; give what load_model gives or takes.")
        path = Path(name := os.fspath(model or ""))
        files = [path, *path.glob("*.safetensors"), *path.glob("checkpoints/*.pth")] if name else []
        stats = [file.stat() for file in files if os.path.exists(file)]
        model = _loaded(name, tuple((file.st_dev, file.st_ino, file.st_mtime_ns) for file in stats))
    if pooling not in (None, "mean", "mean_std"):
        raise unknown_name("pooling", pooling, ("mean", "mean_std"))
    if layers is not None and model.config is None:
        raise HearSsamError(f"layers={layers!r}: {model.name} has no blocks; leave it away.")
    if layers is not None and np.ndim(layers) != 1:
        raise HearSsamError(f"layers={layers!r}: is not a list of blocks; give [6, 12], say.")
    if not isinstance(rate, Real) or not 1_000 <= rate <= 1_000_000:
        raise HearSsamError(f"rate={rate!r}: no sample rate; give that of the arrays in Hz.")
    model.check_weights()
    most, rows = LONG * model.sample_rate, dict[int, np.ndarray]()

    def short() -> Iterator[tuple[int, Tensor]]:
        """The clips that are embedded together; long ones are embedded on the way."""
        for index, item in enumerate(_items(x, lengths)):
            path = item if isinstance(item, (str, os.PathLike)) else None
            try:
                if path is not None:
                    clip = read_audio(path, model.sample_rate, most)
                else:
                    clip = resample(_as_float(item), rate, model.sample_rate)
                checked = model.check_samples(torch.from_numpy(clip))[0]
            except HearSsamError as error:
                raise about(f"clip {index}" if path is None else path, error) from error
            if len(clip) <= most:
                yield index, checked
                continue
            blocks: Blocks = functools.partial(iter, [clip])
            blocks = functools.partial(audio_blocks, path, model.sample_rate) if path else blocks
            rows[index] = embed_long(model, blocks, layers=layers, pooling=pooling)[0].cpu().numpy()

    for batch in grouped(short(), lambda pair: len(pair[1]), most * (1 if model.device.type == "cpu" else 32)):
        found = embed_clips(model, [clip for _, clip in batch], layers, pooling)
        rows |= {index: scene.cpu().numpy() for (index, _), (scene, _) in zip(batch, found, strict=True)}
    if not rows:  # as wide as those of any clip
        return embed(np.zeros(model.sample_rate), model, pooling=pooling, layers=layers)[:0]
    return np.stack([rows[i] for i in sorted(rows)])


@functools.lru_cache(1)
def _loaded(name: str, file: object) -> HearModel:
    """Once for the same file; one that was written anew is another."""
    return load_model(name)


def _items(x: Any, lengths: Sequence[int] | None) -> list[Any]:
    """The clips of what `embed` was given: paths and arrays."""
    if isinstance(x, (str, os.PathLike)):
        x = [x]
    if isinstance(x, Tensor):
        x = _array(x)
    if isinstance(x, np.ndarray) and x.ndim == 1 and x.dtype.kind in "fiu":
        x = x[None]
    if isinstance(x, np.ndarray) and x.ndim == 2 and x.shape[1] < 32 < len(x):
        raise HearSsamError(f"x: has the shape {x.shape}, meant as (clips, samples); of channels take x.mean(1).")
    if lengths is None:
        try:
            return list(x)
        except TypeError as error:
            raise HearSsamError(f"x: {error}; give paths or arrays of audio.") from error
    counts = _array(lengths) if isinstance(lengths, Tensor) else np.asarray(lengths)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or counts.shape != x.shape[:1] or counts.dtype.kind not in "iu":
        raise HearSsamError("lengths: has one number per row of a two-dimensional x, an integer; leave it away.")
    for index, length in enumerate(counts):
        if not 0 < length <= x.shape[1]:
            raise HearSsamError(
                f"lengths: {length} of clip {index} is not between 1 and the {x.shape[1]} samples of x."
            )
    return [row[:length] for row, length in zip(x, counts, strict=True)]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)  # which NumPy lacks


def _as_float(item: Any) -> np.ndarray:
    clip = _array(item) if isinstance(item, Tensor) else np.asarray(item)
    if clip.ndim != 1 or clip.dtype.kind not in "fiu":
        raise HearSsamError(f"is {clip.dtype} of shape {clip.shape}; a clip is mono, (samples,): average its channels.")
    if clip.dtype.kind == "f":
        return np.array(clip, np.float32, order="C")  # of its own: torch warns of arrays that are read-only
    if clip.dtype.name not in SCALES:
        raise HearSsamError(f"is {clip.dtype}; give floats in [-1, 1], or one of {', '.join(SCALES)}.")
    return (clip / SCALES[clip.dtype.name] - (clip.dtype.kind == "u")).astype(np.float32)


def grouped(
    items: Iterable[Item], size: Callable[[Item], int], most: int, count: int | None = None
) -> Iterator[list[Item]]:
    """Items in groups of up to `count`, each of which ends with the item that makes it larger than `most`."""
    group: list[Item] = []
    filled = 0
    for item in items:
        group.append(item)
        filled += size(item)
        if filled > most or len(group) == count:
            yield group
            group, filled = [], 0
    if group:
        yield group


@torch.no_grad()
def embed_clips(
    model: HearModel, clips: Sequence[Tensor], layers: Sequence[int] | None = None, pooling: str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Scene (E',) and timestamp embeddings (T, E) of each clip (samples,), float32, as of the clip alone.

    The clips are on the CPU, and such as `model.check_samples` lets pass; they go to the model's device together."""
    results, sizes = [], [len(clip) for clip in clips]
    there = torch.cat(list(clips)).to(model.device).split(sizes)
    every = model.rows_of_each([model.spectrogram(clip[None])[0] for clip in there], layers)
    for clip, computed in zip(clips, every, strict=True):
        kept = computed[None, : len(model.timestamps(len(clip)))]
        results.append((model.scene(kept, computed[None], pooling, layers)[0], kept[0]))
    return results


class _Moments:
    """Sums over rows (n, E), in double precision."""

    count: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.cpu().double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)

    def mean(self) -> Tensor:
        return cast(Tensor, self.total / self.count)

    def deviation(self, unbiased: bool = False) -> Tensor:
        squares = (self.squares - self.total * self.mean()).clamp(min=0)
        return cast(Tensor, (squares / (self.count - unbiased)).sqrt())


@torch.no_grad()
def embed_long(
    model: HearModel,
    blocks: Blocks,
    emit: Callable[[Tensor], object] = lambda rows: None,
    layers: Sequence[int] | None = None,
    pooling: str | None = None,
) -> tuple[Tensor, int]:
    """The scene embedding (E',) of a long clip and its samples; `emit` gets its timestamp embeddings (n, E) in turn."""
    kaldi = model.config if model.config and model.config.frontend == "kaldi" else None
    audio, levels, shift = _Moments(), _Moments(), 0.0
    for piece in _spectra(model, blocks(), 0.0, audio):
        shift = shift if levels.count else float(piece[0, 0])  # as in `standardize`
        levels.add((piece - shift).reshape(-1, 1))
    samples, offset = audio.count, float(audio.mean())
    mean, deviation = float(levels.mean()), float(levels.deviation(unbiased=True)) + 1e-8
    if model.config is None:  # the baseline normalises nothing
        shift, mean, deviation = 0.0, 0.0, 1.0

    def normalized() -> Iterator[Tensor]:
        """What is encoded of the spectrogram: (n, mels) in turn."""
        left = model.frames(samples)
        for piece in _spectra(model, blocks(), offset if kaldi else 0.0):
            yield (normalize(piece, kaldi) if kaldi else (piece - shift - mean) / deviation)[:left]
            left = max(0, left - len(piece))
        padding = torch.zeros(left, model.frontend.filters.shape[1], dtype=torch.float32, device=model.device)
        yield normalize(padding, kaldi) if kaldi else padding

    kept, pooled = len(model.timestamps(samples)), _Moments()
    for part in _windows(normalized(), model.window_frames):
        rows = model.encode(part, layers).flatten(0, 1)
        inside = rows[:kept]
        kept -= len(inside)
        pooled.add(rows if model.scene_of_all else inside)
        emit(inside)
    scene = pooled.mean()
    if (pooling or model.pooling) == "mean_std":
        scene = torch.cat([scene, pooled.deviation()])
    return model.scene_of_pooled(scene.float()[None], layers)[0], samples


def _spectra(
    model: Any, blocks: Iterable[np.ndarray], offset: float, audio: _Moments | None = None
) -> Iterator[Tensor]:
    """The spectrogram of a long clip, less `offset`, as the front end makes it of the whole: (n, mels) in turn."""
    pad, held, begun = model.frontend.pad, torch.zeros(0, dtype=torch.float32, device=model.device), False
    for block in blocks:
        for chunk in torch.from_numpy(block).to(model.device).split(LONG * model.sample_rate):
            if audio is not None:
                audio.add(chunk[:, None])
            held = torch.cat([held, chunk - offset])
            if len(held) < WINDOW:
                continue
            held, begun = held if begun else torch.cat([held[1 : pad + 1].flip(0), held]), True  # mirrored at both ends
            frames = held.unfold(0, WINDOW, HOP)  # (n, 400), a view
            yield model.frontend.of_frames(frames)
            held = held[len(frames) * HOP :]
    if pad:
        yield model.frontend.of_frames(torch.cat([held, held[-pad - 1 : -1].flip(0)]).unfold(0, WINDOW, HOP))


def _windows(pieces: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """Frames (n, mels) in turn → windows (N, frames, mels), and at the end one that may be shorter."""
    last: list[Tensor] = []
    for group in grouped(pieces, len, LONG * 100):
        *whole, rest = torch.cat(last + group).split(frames)
        if whole:
            yield torch.stack(whole)
        last = [rest]
    yield from (rest[None] for rest in last if len(rest))
