"""What is trained: the encoder, and around it what only pre-training needs (decoder, heads, moving-average teacher)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import BLOCKS, build_norm
from ..config import EncoderConfig
from ..encoder import Encoder, pick
from .codes import NONE
from .recipe import Codes, Contrast, Latents, Objective, Pixels, Recipe
from .windows import Batch


class Decoder(nn.Module):
    """Tokens of the visible patches (B, 1 + V, D) → tokens of all patches (B, n, D): light blocks of its kind.

    Hidden places hold a learned token; positions are those of the encoder, which come in with every call.
    """

    def __init__(self, config: EncoderConfig, recipe: Recipe) -> None:
        super().__init__()
        depth = recipe.decoder_depth
        self.config = light = dataclasses.replace(
            config, depth=depth, expand=recipe.decoder_expand, state_dim=min(16, config.state_dim), paired=False
        )
        self.enter = nn.Linear(config.embed_dim, config.embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, config.embed_dim) * 0.02)
        self.blocks = nn.ModuleList(BLOCKS[config.block](light) for _ in range(depth))
        self.norm = build_norm(light)

    def forward(self, tokens: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        x = self.enter(tokens)
        places = positions.expand(len(x), -1, -1)
        grid = (self.mask_token + places).to(x.dtype)
        seen = x[:, 1:] + pick(places, visible).to(x.dtype)
        grid = grid.scatter(1, visible[..., None].expand(-1, -1, x.shape[2]), seen)
        x = torch.cat([x[:, :1], grid], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, reverse=self.config.flip_odd and i % 2 == 1)
        predicted: Tensor = self.norm(x)
        return predicted[:, 1:]


class Pass(NamedTuple):
    """What one pass gives an objective; M patches are hidden in every clip."""

    tokens: Tensor  # (B, n, D) from which patches are predicted
    patches: Tensor  # (B, n, P) what was there
    mask: Tensor  # (B, n) bool: what is hidden
    hidden: Tensor  # (B, M) int64 index of the hidden patches, in order
    batch: Batch


class Learner(nn.Module):
    """An encoder with its objectives. `forward` gives the loss of every clip by every objective."""

    def __init__(self, encoder: Encoder, recipe: Recipe, clusters: int = 0) -> None:
        super().__init__()
        config = encoder.config
        self.encoder, self.recipe, self.objectives = encoder, recipe, recipe.objectives(config)
        self.decoder = Decoder(config, recipe) if recipe.visible_only else None
        self.heads = nn.ModuleDict()
        for name, objective in self.objectives.items():
            if self._published_head(objective) is None:
                sizes = {Codes: clusters, Latents: config.embed_dim}
                self.heads[name] = nn.Linear(config.embed_dim, sizes.get(type(objective), config.patch_dim))
        self.latents = next((o for o in self.objectives.values() if isinstance(o, Latents)), None)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False) if self.latents else None

    def _published_head(self, objective: Objective) -> nn.Module | None:
        """The head that the system was published with, where it serves this objective in a pass over all tokens."""
        if self.recipe.visible_only or isinstance(objective, (Codes, Latents)):
            return None
        if isinstance(objective, Contrast):
            return self.encoder.contrast
        return self.encoder.head if self.encoder.config.objective == "reconstruction" else self.encoder.generate

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses (B,) by objective, not yet weighted."""
        passes = zip(self.objectives.items(), self._passes(batch), strict=True)
        return {name: _loss(objective, *found) for (name, objective), found in passes}

    def _passes(self, batch: Batch) -> Iterator[tuple[nn.Module, Pass]]:
        """For each objective its head, and a pass of its own or that of the first."""
        patches = self.encoder.patchify(batch.spec)
        batch = self.teach(batch)
        for i, (name, objective) in enumerate(self.objectives.items()):
            if i < len(batch.masks):
                tokens, hidden = self._tokens(batch.spec, batch.masks[i])
                seen = Pass(tokens, patches, batch.masks[i], hidden, batch)
            yield self._published_head(objective) or self.heads[name], seen

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum over the objectives: (B,)."""
        return torch.stack([self.objectives[name].weight * loss for name, loss in losses.items()]).sum(0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the moving-average teacher follow the encoder."""
        if self.teacher is not None and self.latents is not None:
            for average, now in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                average.lerp_(now, 1 - self.latents.momentum)

    def reconstruct(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Which patches are hidden, bool (B, n, 1), and all of them as predicted (B, n, P), where pixels are asked."""
        for objective, (head, seen) in zip(self.objectives.values(), self._passes(batch), strict=True):
            if isinstance(objective, Pixels):
                predicted, patches = head(seen.tokens).float(), seen.patches
                if objective.normalised:
                    predicted = predicted * (patches.var(2, keepdim=True) + 1e-6).sqrt() + patches.mean(2, keepdim=True)
                return seen.mask[..., None], predicted
        return batch.masks[0][..., None], None

    def _tokens(self, spec: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens from which patches are predicted, and the index of those hidden."""
        count = int(mask[0].sum())
        order = mask.to(torch.int8).argsort(dim=1, stable=True)  # visible patches first, both in order
        visible, hidden = order[:, : mask.shape[1] - count], order[:, mask.shape[1] - count :]
        if self.decoder is None:
            return self.encoder.tokens(spec, mask)[:, 1:], hidden
        positions = self.encoder.positions(spec.shape[1] // self.encoder.config.patch_frames)
        return self.decoder(self.encoder.tokens(spec, visible=visible), visible, positions), hidden

    @torch.no_grad()
    def teach(self, batch: Batch) -> Batch:
        """The batch with what the moving-average teacher makes of it, where there is one and it is not there yet."""
        if self.teacher is None or self.latents is None or batch.latents is not None:
            return batch
        (tokens,) = self.teacher.hidden(batch.spec, [self.latents.block])
        return batch._replace(latents=F.layer_norm(tokens[:, 1:], tokens.shape[-1:]))


def _loss(objective: Objective, head: nn.Module, seen: Pass) -> Tensor:
    """The loss of each clip (B,): a mean over its patches, so that it does not depend on the rest of the batch."""
    hidden = seen.hidden
    if isinstance(objective, Pixels):
        every = objective.patches == "all"
        target = seen.patches if every else pick(seen.patches, hidden)
        if objective.normalised:
            target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        error: Tensor = head(seen.tokens if every else pick(seen.tokens, hidden)).float() - target
        return error.square().mean((1, 2))
    predicted: Tensor = head(pick(seen.tokens, hidden)).float()  # (B, M, ...)
    if isinstance(objective, Contrast):
        with torch.autocast(predicted.device.type, enabled=False):
            logits = pick(seen.patches, hidden) @ predicted.transpose(1, 2)  # patch x prediction
        return -logits.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean(1)
    assert seen.batch.asked is not None
    asked = seen.batch.asked.gather(1, hidden)
    if isinstance(objective, Codes):
        assert seen.batch.codes is not None
        want = seen.batch.codes.gather(1, hidden)
        asked = asked & (want != NONE)
        loss = F.cross_entropy(predicted.transpose(1, 2), want.where(asked, 0), reduction="none")
    else:
        assert seen.batch.latents is not None
        loss = F.smooth_l1_loss(predicted, pick(seen.batch.latents, hidden).float(), reduction="none").mean(2)
    return (loss * asked).sum(1) / asked.sum(1).clamp(min=1)
