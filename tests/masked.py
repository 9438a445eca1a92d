"""A masked pass of an encoder, as it is trained without a table of objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from hear_ssam.encoder import Encoder
from hear_ssam.pretraining.learner import Learner
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.windows import Batch


def predictions(encoder: Encoder, spec: Tensor, mask: Tensor) -> Tensor:
    """Pixels of all patches (B, n, P)."""
    head = encoder.head if encoder.config.objective == "reconstruction" else encoder.generate
    pixels: Tensor = head(encoder.tokens(spec, mask)[:, 1:])
    return pixels


def losses(encoder: Encoder, spec: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Means over the clips, by objective, and their weighted `total`."""
    learner = Learner(encoder, Recipe())
    found = learner(Batch(spec, [mask], torch.arange(len(spec))))
    return {name: loss.mean() for name, loss in {**found, "total": learner.total(found)}.items()}
