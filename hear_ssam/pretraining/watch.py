"""What a training looks like while it runs: a picture of windows, of what is hidden, of what is predicted there."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoder import Encoder
from ..paths import atomic_write
from .learner import Learner
from .windows import Batch

SHOWN = 4  # windows of a batch
GAP = 4  # pixels between two


@torch.no_grad()
def draw(path: Path, learner: Learner, batch: Batch) -> None:
    """Write a PNG: the first windows of a batch, without their hidden patches, and with these as they are predicted.

    The last column is missing where no objective asks for pixels.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    batch = batch._replace(spec=batch.spec[:SHOWN], masks=[mask[:SHOWN] for mask in batch.masks])
    hidden, predicted = learner.reconstruct(batch)
    patches = learner.encoder.patchify(batch.spec)
    columns = {"input": patches, "what the encoder reads": patches.masked_fill(hidden, torch.nan)}
    if predicted is not None:
        columns["predicted where hidden"] = torch.where(hidden, predicted, patches)
    pictures = [as_pictures(learner.encoder, column, batch.spec).cpu() for column in columns.values()]
    tiles = F.pad(torch.stack(pictures, 1), (0, GAP, 0, GAP), value=torch.nan)  # (B, columns, mels, F)
    low, high = batch.spec.quantile(torch.tensor([0.01, 0.995], device=batch.spec.device)).tolist()
    picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1).repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
    figure = Figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100 + 0.3), dpi=100)
    for i, name in enumerate(columns):
        figure.text(i / len(columns), 1, name, va="top")
    figure.figimage(picture, cmap="magma", vmin=low, vmax=high, origin="upper")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def as_pictures(encoder: Encoder, patches: Tensor, spec: Tensor) -> Tensor:
    """Patches (B, n, P) back in their places, as pictures (B, n_mels, F) with the high bands above."""
    place = encoder.patchify(torch.arange(spec[0].numel(), device=spec.device).view(1, *spec.shape[1:]))
    flat = torch.empty_like(spec).flatten(1).scatter(1, place.flatten(1).expand(len(spec), -1), patches.flatten(1))
    return flat.view_as(spec).mT.flip(1)
