"""Pre-training audio on disk, and spectrogram frames of it for any front end.

A store is a folder of three files:

    audio.s16   (samples,) int16 little endian, raw: 16 kHz mono, full scale 32768, clip after clip
    clips.npz   offsets (clips + 1,) int64 into the samples; source (clips,) int32 into the table of sources;
                names (clips,) str
    store.json  sha256 of audio.s16; the table of sources (clips, hours, sha256, licence, attribution); what was
                skipped; written last

Stores of earlier versions hold log-mel frames instead, frames.f16 (frames, 80) float16, and open as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..audio import CLIP_RATE, Clip
from ..config import EncoderConfig
from ..errors import HearSsamError, about, said
from ..frontend import BLOCK, HOP, WINDOW, build_frontend, join
from ..machine import work_ahead
from ..paths import atomic_write, sha256, write_whole

RATE = CLIP_RATE  # Hz
BANDS = 80  # of the log-mel frames in earlier stores
SHORTEST = 400  # samples, 25 ms: one window of the front ends
HELD_OUT = 64  # every 64th clip measures the loss and is never trained on


@dataclass(frozen=True)
class Store:
    """An open store; `store[i]` is clip i, a view of the mapped file."""

    data: np.ndarray  # (samples,) int16; (frames, 80) float16 in a store of log-mel frames
    offsets: np.ndarray  # (clips + 1,) int64 into the data
    source: np.ndarray  # (clips,) into info["sources"]
    info: dict[str, Any]  # what store.json holds
    folder: Path = Path("store")
    names: np.ndarray | None = None  # (clips,) str: where each clip came from

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data[self.offsets[index] : self.offsets[index + 1]]

    @property
    def holds_audio(self) -> bool:
        return self.data.ndim == 1

    @property
    def hours(self) -> float:
        return len(self.data) / (3600 * (RATE if self.holds_audio else 100))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the data: tells whether something computed from a store belongs to this one."""
        return str(self.info.get("sha256") or sha256(self.folder / "frames.f16"))

    @property
    def left_out(self) -> dict[int, str]:
        """Clips that are never trained on, as `hear-ssam corpus --check-against` heard an evaluation in them, with the
        lines of left-out.tsv: clip, its name, the evaluation's, votes. Raises HearSsamError for other lines."""
        file = self.folder / "left-out.tsv"
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        found = {int(number): line for line in lines if (number := line.split("\t")[0]).isdecimal()}
        if len(found) < len(lines) or max(found, default=0) >= len(self):
            raise HearSsamError(f"{file}: not the clips of this store; delete it and use --check-against again.")
        return found

    def weights(self, lengths: np.ndarray, shortest: int, held_out: bool = False) -> np.ndarray:
        """How often each clip is to be drawn, given all lengths (clips,): a source ∝ √(its length), a clip of it ∝ its
        length, one below `shortest` or left out never; of the others the held-out ones or those to train on."""
        usable = ((np.arange(len(self)) % HELD_OUT == 0) == held_out) & (lengths >= shortest)
        usable[list(self.left_out)] = False
        weights = lengths * usable / np.sqrt(np.maximum(np.bincount(self.source, weights=lengths), 1))[self.source]
        if not weights.any():
            raise HearSsamError(
                f"{self.folder}: {len(self)} clips are too few, as every {HELD_OUT}th is held out, and what is short "
                "or left out does not count; add audio."
            )
        return np.asarray(weights)

    def leave_out(self, rows: Iterable[tuple[int, str, int]]) -> None:
        """Add clips to those left out: number, what was heard in it, votes."""
        found = self.left_out
        for clip, heard, votes in rows:
            found[clip] = " ".join(f"{clip}\t{self.name(clip)}\t{heard}\t{votes}".splitlines())
        write_whole(self.folder / "left-out.tsv", "".join(f"{found[clip]}\n" for clip in sorted(found)))

    def name(self, index: int) -> str:
        return f"clip {index}" if self.names is None else str(self.names[index])


def open_store(folder: str | os.PathLike[str]) -> Store:
    """Map a store for reading. Raises HearSsamError where it is missing, unfinished or of another size than it says."""
    folder = Path(folder)
    audio = (folder / "audio.s16").exists()
    file = folder / ("audio.s16" if audio else "frames.f16")
    try:
        info = json.loads((folder / "store.json").read_text("utf-8"))
        with np.load(folder / "clips.npz") as clips:
            offsets, source, names = clips["offsets"], clips["source"], clips.get("names")
        data = np.memmap(file, "<i2" if audio else np.float16, "c").reshape(-1 if audio else (-1, BANDS))
        info["sources"]
    except (OSError, ValueError, EOFError, LookupError, TypeError, zipfile.BadZipFile) as error:
        found = f"no finished store here ({said(error)})"
        raise HearSsamError(f"{folder}: {found}; make one with `hear-ssam corpus`.") from error
    if len(data) != offsets[-1] or len(source) != len(offsets) - 1:
        raise HearSsamError(f"{folder}: {file.name} and clips.npz do not belong together; build the store again.")
    return Store(data, offsets, source, info, folder, names)


def build_store(
    folder: str | os.PathLike[str], clips: Iterable[Clip], workers: int = 2,
    terms: Mapping[str, dict[str, str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Decode clips in `workers` threads and write them, in order, as a store; `terms` are the licences of sources.

    A clip that cannot be decoded is skipped and named; one under 25 ms, without any sound, or with the same samples as
    an earlier one, is counted and dropped. Returns what store.json holds: samples, clips, sha256, sources, skipped
    (list of str), short, silent, repeated. Raises HearSsamError where the folder already holds a store, cannot be
    written, or no clip was left.
    """
    folder = Path(folder)

    def pcm16(clip: Clip) -> Any:
        return np.clip(np.rint(clip.decode() * 32768), -32768, 32767).astype("<i2")

    if (folder / "store.json").exists():
        raise HearSsamError(f"{folder}: holds a store already; name another folder or delete this one.")
    offsets, source, names, skipped = [0], [], [], []
    hashes: dict[str, tuple[int, Any]] = {}  # number of each source, and of its audio
    whole, seen = hashlib.sha256(), set()
    dropped = {"short": 0, "silent": 0, "repeated": 0}
    with (
        atomic_write(folder / "audio.s16") as path,
        open(path, "wb") as file,
        contextlib.closing(work_ahead(pcm16, clips, workers, 4 * workers)) as ahead,
    ):
        for clip, result in ahead:
            try:
                samples = result.result()
            except Exception as error:  # one clip that trips over a defect spoils no other
                skipped.append(str(about(clip.name, error)))
                continue
            data = samples.tobytes()
            same = hashlib.sha1(data, usedforsecurity=False).digest()
            reason = "short" if len(samples) < SHORTEST else "repeated" if same in seen else ""
            if reason or np.ptp(samples) == 0:
                dropped[reason or "silent"] += 1
                continue
            seen.add(same)
            file.write(data)
            offsets.append(offsets[-1] + len(samples))
            number, digest = hashes.setdefault(clip.source, (len(hashes), hashlib.sha256()))
            digest.update(data)
            source.append(number)
            names.append(clip.name)
            whole.update(data)
        if not source:
            raise HearSsamError(f"{folder}: no usable audio: {skipped[0] if skipped else 'name longer clips.'}")
    with atomic_write(folder / "clips.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, offsets=np.array(offsets), source=np.array(source, np.int32), names=np.array(names))
    clips_of, samples_of = np.bincount(source), np.bincount(source, weights=np.diff(offsets))
    table = [
        {"name": name, "clips": int(clips_of[i]), "hours": round(samples_of[i] / RATE / 3600, 3),
         "sha256": digest.hexdigest(), **(terms or {}).get(name, {})}
        for name, (i, digest) in hashes.items()
    ]  # fmt: skip
    info = {"samples": offsets[-1], "clips": len(source), "sha256": whole.hexdigest(), "sources": table}
    info |= {"skipped": skipped, **dropped}
    (folder / "left-out.tsv").unlink(missing_ok=True)  # numbers of clips of an earlier store
    write_whole(folder / "store.json", json.dumps(info, indent=1, ensure_ascii=False))
    return info


class Frames:
    """Spectrogram frames of a store's clips by the front end of `config`.

    frames(clip, position): clip (B,) int64, position (B, F) int64 counted from each clip's first frame, in any order →
    (B, F, n_mels) float32 on `device`: rows of what the front end gives for the whole clip, not normalised. On the CPU
    they are computed when they are asked for; a GPU computes those of the whole store at once (115 MB an hour) where
    they take less than half of what is free. Raises HearSsamError where the store holds frames of another front end.
    """

    def __init__(self, store: Store, config: EncoderConfig, device: torch.device) -> None:
        if not store.holds_audio and (config.frontend, config.n_mels) != ("logmel", BANDS):
            raise HearSsamError(
                f"{store.folder}: holds log-mel frames, not what {config.system} reads ({config.frontend}, "
                f"{config.n_mels} bands); build the store again with this version, which keeps audio."
            )
        self.device, self.front_end = device, build_frontend(config).to(device)
        self.data, self.offsets = torch.from_numpy(store.data), torch.from_numpy(store.offsets)  # mapped
        self.lengths = self.offsets.diff()  # (clips,) int64: frames of each clip
        if store.holds_audio:
            self.lengths = 1 + (self.lengths + 2 * self.front_end.pad - WINDOW) // HOP
        needed = 4 * config.n_mels * int(self.lengths.sum())
        if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
            self.compute()

    def compute(self) -> None:
        """Put the frames of all clips on the device."""
        self.data, self.offsets = self.data.to(self.device), self.offsets.to(self.device)
        if self.data.dim() == 2:
            return
        first = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(self.device)
        frame = torch.arange(int(first[-1]), device=self.device)
        clip = torch.searchsorted(first, frame, right=True) - 1
        self.data, self.offsets = self(clip, (frame - first[clip])[:, None])[:, 0], first

    def __call__(self, clip: Tensor, position: Tensor) -> Tensor:
        clip, position = clip.to(self.data.device), position.to(self.data.device)
        if self.data.dim() == 2:
            return self.data[self.offsets[clip][:, None] + position].float().to(self.device)
        first = position * HOP - self.front_end.pad  # sample of the clip at which the frame's window starts
        rows = max(1, BLOCK // position.shape[1])
        with torch.no_grad():
            parts = [
                self.front_end.of_frames(self._windows(c, f).to(self.device).float() / 32768)
                for c, f in zip(torch.split(clip, rows), torch.split(first, rows), strict=True)
            ]
        return join(parts, dim=0)

    def _windows(self, clip: Tensor, first: Tensor) -> Tensor:
        """int16 (B, F, 400) from the samples `first` (B, F) of clips (B,), mirrored at a clip's ends."""
        every = self.data.unfold(0, WINDOW, 1)  # every window that there is, as a view
        start, last = self.offsets[clip][:, None], (self.offsets[clip + 1] - self.offsets[clip] - 1)[:, None]
        windows = every[(start + first).clamp(0, len(every) - 1)]
        clip, frame = ((first < 0) | (first + WINDOW - 1 > last)).nonzero(as_tuple=True)
        inside = (first[clip, frame][:, None] + torch.arange(WINDOW, device=first.device)).abs()
        inside = last[clip] - (last[clip] - inside).abs()
        windows[clip, frame] = self.data[start[clip] + inside]
        return windows
