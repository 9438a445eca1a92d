"""Training windows drawn from a store: the same ones for any number of processes and parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EncoderConfig
from ..frontend import EPSILON, normalize
from .codes import NONE, CodeTable
from .recipe import Recipe
from .store import Frames, Store

DECIBEL = math.log(10) / 10  # in nepers of power


class Batch(NamedTuple):
    """One batch, or the rows of it that a process asked for."""

    spec: Tensor  # (B, window, n_mels) normalised
    masks: list[Tensor]  # (B, n) bool, True: hidden; one, or one per objective
    clip: Tensor  # (B,) which clips of the store
    asked: Tensor | None = None  # (B, n) bool: patches of the clip itself, not of what was repeated or padded
    codes: Tensor | None = None  # (B, n) int64, NONE where there is none
    latents: Tensor | None = None  # (B, n, D) of the moving-average teacher


class WindowSampler:
    """Draws training windows from a store; spectrograms are computed on `device`.

    A source is drawn with probability ∝ √hours (small, diverse ones count for more than their size), a clip of it
    ∝ its length. `held_out` draws from the clips that training never sees. Random numbers come from a generator on the
    CPU, and all of a batch are drawn whatever rows are asked for: every process sees the same batches.
    """

    def __init__(
        self, store: Store, recipe: Recipe, config: EncoderConfig, device: torch.device, held_out: bool = False,
        codes: CodeTable | None = None, frames: Frames | None = None,
    ) -> None:  # fmt: skip
        self.frames = frames or Frames(store, config, device)
        lengths = self.frames.lengths.cpu().numpy()
        self.recipe, self.config, self.device, self.codes = recipe, config, device, codes
        self.weights = torch.from_numpy(store.weights(lengths, config.patch_frames, held_out))
        self.slots = torch.from_numpy(lengths // config.patch_frames)
        self.passes = len(recipe.objectives(config)) if recipe.separate_masks else 1

    def draw(self, batch: int, generator: torch.Generator, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the next batch."""
        recipe, config = self.recipe, self.config
        patch, window = config.patch_frames, config.grid[0]

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float32)

        low, high = -(-recipe.min_frames // patch), recipe.max_frames // patch + 1
        count = int(torch.randint(low, max(high, low + 1), (), generator=generator))  # time slots of the crop
        clip = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        slots = self.slots[clip][:, None]  # (B, 1)
        start = (uniform(batch, 1) * (slots - count + 1).clamp(min=1)).long()  # crops start at borders of patches
        pad, mixed = uniform(batch, 1) < recipe.pad, uniform(batch) < recipe.mix
        over = recipe.mix_low + uniform(batch) * (recipe.mix_high - recipe.mix_low)
        gain = (2 * uniform(batch) - 1) * recipe.gain
        first = int(uniform(1) * (count - window + 1))
        masks = [
            random_mask(batch, config, generator, recipe.mask, recipe.mask_ratio or None, self.device)
            for _ in range(self.passes)
        ]
        mine = torch.arange(batch)[rows]
        partner = (mine - 1) % batch  # the clip drawn just before is the one that is added
        need = torch.unique(torch.cat([mine, partner[mixed[mine]]]))
        position = start[need] + torch.arange(count)  # (N, slots), beyond the end in short clips
        spec = self._spectrogram(clip[need], position, slots[need], pad[need])
        own_row, other_row = torch.searchsorted(need, torch.stack([mine, partner])).to(self.device)
        own = spec[own_row]
        level = spec.flatten(1).logsumexp(dim=1)  # of the whole crop
        with_other = mixed[mine].nonzero()[:, 0].to(self.device)
        a, b = own_row[with_other], other_row[with_other]
        shift = level[a] - level[b] + over[mine].to(self.device)[with_other] * DECIBEL
        own[with_other] = torch.logaddexp(spec[a], spec[b] + shift[:, None, None])
        own = own + (gain[mine] * DECIBEL).to(self.device)[:, None, None]
        own = normalize(own, config)[:, first * patch : (first + window) * patch]
        slot = start[mine] + first + torch.arange(window)  # (B, window)
        inside = slot < slots[mine]
        codes = None
        if self.codes is not None:
            codes = self.codes.of(clip[mine], slot % slots[mine]).masked_fill(~inside[..., None], NONE)
            codes = as_tokens(codes, config).to(self.device)
        asked = as_tokens(inside[..., None].expand(-1, -1, config.grid[1]), config).to(self.device)
        return Batch(own, [m[rows] for m in masks], clip[mine], asked, codes)

    def _spectrogram(self, clip: Tensor, position: Tensor, slots: Tensor, pad: Tensor) -> Tensor:
        """Log energies (N, F, mels) of slots `position` (N, S); beyond a clip's end it is repeated or silent."""
        patch = self.config.patch_frames
        frame = ((position % slots)[..., None] * patch + torch.arange(patch)).flatten(1)
        spec = self.frames(clip, frame)
        silent = ((position >= slots) & pad).repeat_interleave(patch, dim=1)
        return spec.masked_fill(silent.to(spec.device)[..., None], math.log(EPSILON))


def as_tokens(grid: Tensor, config: EncoderConfig) -> Tensor:
    """(B, slots, bands) → (B, n) in the order of the tokens."""
    return (grid if config.patch_order == "time" else grid.transpose(1, 2)).flatten(1)


def random_mask(
    batch: int, config: EncoderConfig, generator: torch.Generator, kind: str = "published",
    ratio: float | None = None, device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Which patches to hide: bool (batch, n), exactly round(n * ratio) True per clip, on `device`.

    Random numbers are drawn on the CPU, where the generator lives; the rest is done on `device`.

    random   patches drawn uniformly
    time     whole time slots, all bands of each: round(slots * ratio) of them
    cluster  SSAMBA's: squares of side 3, 4 or 5 (one side per call) at uniformly drawn corners, until enough patches
             are covered; never patch 0. A square at the window's edge runs on in the next band (or time slot, where
             tokens are in the order of time), as released.

    `published` is cluster for the joint objective, else random; the default ratio is the config's `mask_ratio`.
    """
    n, ratio = config.num_patches, config.mask_ratio if ratio is None else ratio
    if kind == "time":
        slots, bands = config.grid
        slot = torch.rand(batch, slots, generator=generator, device="cpu", dtype=torch.float32).to(device)
        rank = slot.argsort(dim=1, stable=True).argsort(dim=1)
        return as_tokens((rank < round(slots * ratio))[..., None].expand(-1, -1, bands), config)
    order = torch.rand(batch, n, generator=generator, device="cpu", dtype=torch.float32).to(device)  # when drawn
    if kind == "cluster" or (kind == "published" and config.objective == "joint"):
        # A patch is hidden when the first cluster that covers it is drawn.
        side = int(torch.randint(3, 6, (), generator=generator, device="cpu"))
        line = config.grid[0 if config.patch_order == "frequency" else 1]
        offsets = [line * i + j for i in range(side) for j in range(side)]
        order = torch.stack([F.pad(order, (o, 0), value=math.inf)[:, :n] for o in offsets]).amin(0)
        order[:, 0] = math.inf
    hidden = order.argsort(dim=1, stable=True)[:, : round(n * ratio)]
    return torch.zeros(batch, n, dtype=torch.bool, device=device).scatter_(1, hidden, True)
