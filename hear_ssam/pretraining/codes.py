"""Cluster codes: for every patch of a store, the k-means cluster of what a teacher makes of it. `hear-ssam codes`.

Two files beside the store, NAME.npy (time slots of all clips, bands) uint16 and NAME.json: the teacher and its hash,
the store's digest, the size of the codebook. A teacher is one of our checkpoints (tokens after a block, a code per
patch) or any HEAR module (timestamp embeddings, a code per time slot).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..audio import resample
from ..config import EncoderConfig
from ..errors import HearSsamError, said
from ..frontend import HOP, SAMPLE_RATE, normalize
from ..hear import EncoderModel, load_model
from ..paths import atomic_write, write_whole
from .store import Frames, Store

NONE = 65535  # no code: beyond the last whole time slot that the teacher saw
SAMPLE = 50_000  # time slots, at least, that k-means sees
ROUNDS = 25  # of k-means
TOGETHER = 1 << 15  # time slots of the clips that are given to a teacher at once
# Clips of the store, each with one of its windows, None: all → (slots, bands or 1, D) float32 of each
Features = Callable[[Sequence[tuple[int, int | None]]], list[Tensor]]


@dataclass(frozen=True)
class CodeTable:
    """Codes of a store, read where they are asked for."""

    codes: np.ndarray  # (slots, bands or 1) uint16, mapped
    first: Tensor  # (clips,) int64: where a clip begins
    info: dict[str, Any]

    def of(self, clip: Tensor, slot: Tensor) -> Tensor:
        """Codes (B, S, bands) int64 of the time slots `slot` (B, S) of clips (B,)."""
        index = (self.first[clip][:, None] + slot).numpy()
        return torch.from_numpy(self.codes[index].astype(np.int64)).expand(-1, -1, self.info["bands"])


def open_codes(store: Store, name: str, config: EncoderConfig) -> CodeTable:
    """The codes NAME of a store. Raises HearSsamError where there are none, or those of another store or patch grid."""
    path = store.folder / f"{name}.json"
    try:
        info = json.loads(path.read_text("utf-8"))
        codes = np.load(path.with_suffix(".npy"), mmap_mode="r")
        of = {"store": info["store"], "grid": info["grid"], "length": len(codes)}
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        mend = f"make them with `hear-ssam codes {store.folder} --name {name}`"
        raise HearSsamError(f"{path}: no finished codes here ({said(error)}); {mend}.") from error
    slots = _slots(store, config)
    for what, want in {"store": store.digest, "grid": _grid(config), "length": slots.sum()}.items():
        if of[what] != want:
            raise HearSsamError(f"{path}: codes of another {what} ({of[what]}, not {want}); make them again.")
    return CodeTable(codes, torch.from_numpy(slots.cumsum() - slots), info)


def build_codes(
    store: Store, name: str, config: EncoderConfig, features: Features, teacher: dict[str, Any], clusters: int = 500,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Cluster a sample of `features` (drawn as training draws clips), then write the cluster of every patch.

    `config` gives the patch grid of the encoder that will be trained; `teacher` is kept in NAME.json. What a place in
    the window adds to features, whatever is heard, is taken off first. Returns what NAME.json holds.
    """
    if not 1 < clusters < NONE:
        raise HearSsamError(f"codes: {clusters} clusters cannot be; choose between 2 and {NONE - 1}.")
    if not 0 <= seed < 2**32:
        raise HearSsamError(f"codes: seed {seed} cannot be; choose between 0 and {2**32 - 1}.")
    if f"{name}.json" in ("store.json", ".json"):
        raise HearSsamError(f"{store.folder}: codes cannot be named {name!r}; choose another name.")
    slots = _slots(store, config)
    weights = store.weights(slots, 1)
    rng = np.random.default_rng(seed)
    window = config.grid[0]
    rows: list[Tensor] = []
    with tqdm(total=SAMPLE, unit=" slots", desc="sample") as bar:
        while sum(map(len, rows)) < SAMPLE and len(rows) < 8 * len(store):
            clips = rng.choice(len(store), 64, p=weights / weights.sum()).tolist()
            rows += features([(clip, int(rng.integers(0, max(1, slots[clip] // window)))) for clip in clips])
            bar.update(sum(map(len, rows[-64:])))
    place, every = torch.cat([torch.arange(len(x), device=x.device) for x in rows]), torch.cat(rows)
    shift = _place_in_window(every, place, window)
    centres = k_means((every - shift[place][:, None]).flatten(0, 1), clusters, seed)
    codes = np.full((int(slots.sum()), every.shape[1]), NONE, np.uint16)
    first = slots.cumsum() - slots
    clip = tqdm(np.flatnonzero(slots).tolist(), unit=" clips", desc="codes")
    for _, group in itertools.groupby(clip, lambda i: first[i] // TOGETHER):
        clips = list(group)
        rows = [x[: slots[i]] for i, x in zip(clips, features([(i, None) for i in clips]), strict=True)]
        place = torch.cat([torch.arange(len(x)) for x in rows])
        x = torch.cat(rows) - shift[place.to(shift.device) % window][:, None]
        at = np.repeat(first[clips], [len(x) for x in rows]) + place.numpy()
        codes[at] = nearest(x.flatten(0, 1), centres).view(x.shape[:2]).cpu().numpy()
    info = {
        "clusters": clusters, "bands": config.grid[1], "grid": _grid(config), "store": store.digest, "seed": seed,
        "teacher": teacher, "used": len(np.unique(codes[codes != NONE])),
    }  # fmt: skip
    with atomic_write(store.folder / f"{name}.npy") as path, open(path, "wb") as file:
        np.save(file, codes)
        (store.folder / f"{name}.json").unlink(missing_ok=True)  # that of other codes tells nothing about these
    write_whole(store.folder / f"{name}.json", json.dumps(info, indent=1))
    return info


def _place_in_window(x: Tensor, place: Tensor, window: int) -> Tensor:
    """(window, D): mean over clips and bands of the rows (N, bands, D) at each place, less the mean over places."""
    count = torch.bincount(place, minlength=window)[:, None]
    mean = x.new_zeros(window, x.shape[2]).index_add_(0, place, x.mean(1)) / count.clamp(min=1)
    return torch.where(count > 0, mean - mean[count[:, 0] > 0].mean(0), 0.0)


def _slots(store: Store, config: EncoderConfig) -> np.ndarray:
    return Frames(store, config, torch.device("cpu")).lengths.numpy() // config.patch_frames


def _grid(config: EncoderConfig) -> list[Any]:
    return [config.frontend, config.n_mels, config.patch_frames, config.patch_mels]


def encoder_features(
    store: Store, path: str | os.PathLike[str], block: int, device: str = "auto"
) -> tuple[EncoderConfig, Features, dict[str, Any]]:
    """The tokens of one of our checkpoints after `block` blocks; whole windows at the positions that inference uses."""
    model = cast(EncoderModel, load_model(path, token_order="time", device=device))
    config, frames = model.config, Frames(store, model.config, model.device)
    patch, size, bands = config.patch_frames, config.window_frames, config.grid[1]

    @torch.inference_mode()
    def features(asked: Sequence[tuple[int, int | None]]) -> list[Tensor]:
        specs = []
        for clip, window in asked:
            length = int(frames.lengths[clip])
            spec = normalize(frames(torch.tensor([clip]), torch.arange(length)[None]), config)[0]
            spec = spec[: length // patch * patch]
            specs.append(spec if window is None else spec[window * size : (window + 1) * size])
        return [rows.unflatten(1, (bands, -1)) for rows in model.rows_of_each(specs, [block])]

    return config, features, {"checkpoint": Path(path).name, "sha256": model.checkpoint_sha256, "block": block}


def module_features(
    store: Store, embed: Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]], rate: int, config: EncoderConfig
) -> Features:
    """The timestamp embedding nearest to the centre of each time slot of `config`. `embed` gives those of clips
    (1, samples) at `rate` Hz, (1, T, D) and ms (1, T), and is told what to call them in errors."""
    if not store.holds_audio:
        raise HearSsamError(f"{store.folder}: holds log-mel frames, and a module reads audio; build the store again.")
    hop, size = config.patch_frames * HOP, config.grid[0]  # samples of a time slot, slots of a window

    def near(clip: int, first: int, count: int) -> Tensor:
        start = max(0, first - size)  # all of a long recording is too much for somebody's model
        audio = np.array(store[clip][start * hop : (first + count + size) * hop], np.float32) / 32768
        rows, times = (x[0] for x in embed(resample(audio, SAMPLE_RATE, rate)[None], store.name(clip)))
        if not np.isfinite(rows).all():
            raise HearSsamError(f"{store.name(clip)}: has embeddings that are not finite; take another teacher.")
        centre = (np.arange(len(audio) // hop + 1) + 0.5) * hop * 1000 / SAMPLE_RATE
        at = np.abs(times.astype(np.float64) - centre[:, None]).argmin(1)
        return torch.from_numpy(rows[at[first - start :][:count]])[:, None]

    def features(asked: Sequence[tuple[int, int | None]]) -> list[Tensor]:
        found = []
        for clip, window in asked:
            count = 8 * size if window is None else size
            begins = range(0, len(store[clip]) // hop + 1, count) if window is None else [window * size]
            found.append(torch.cat([near(clip, first, count) for first in begins]))
        return found

    return features


def k_means(x: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Centres (clusters, D) of the rows x (N, D)."""
    from sklearn.cluster import KMeans

    if len(x) < clusters:
        raise HearSsamError(f"codes: {len(x)} patches cannot form {clusters} clusters; add audio or ask for fewer.")
    lloyd = KMeans(clusters, init="random", n_init=1, max_iter=ROUNDS, random_state=seed)
    return torch.from_numpy(lloyd.fit(x.cpu().numpy()).cluster_centers_).to(x)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each row (N, D): (N,) int64."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - part @ centres.T).argmin(1) for part in x.split(1 << 14)])
