"""What a training looks like while it runs: a picture of windows, of what is hidden, of what is predicted there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..encoder import Encoder
from ..paths import atomic_write
from .learner import Learner
from .windows import Batch

SHOWN = 4  # windows of a batch


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
    low, high = batch.spec.quantile(torch.tensor([0.01, 0.995], device=batch.spec.device)).tolist()
    figure = Figure(figsize=(4 * len(columns), 2 * len(hidden)), layout="constrained")
    axes = figure.subplots(len(hidden), len(columns), squeeze=False)
    for (name, column), plots in zip(columns.items(), axes.T, strict=True):
        plots[0].set_title(name)
        for picture, plot in zip(as_pictures(learner.encoder, column, batch.spec).cpu().numpy(), plots, strict=True):
            plot.imshow(picture, cmap="magma", vmin=low, vmax=high, aspect="auto")
    for plot in axes.flat:
        plot.axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def as_pictures(encoder: Encoder, patches: Tensor, spec: Tensor) -> Tensor:
    """Patches (B, n, P) back in their places, as pictures (B, n_mels, F) with the high bands above."""
    place = encoder.patchify(torch.arange(spec[0].numel(), device=spec.device).view(1, *spec.shape[1:]))
    flat = torch.empty_like(spec).flatten(1).scatter(1, place.flatten(1).expand(len(spec), -1), patches.flatten(1))
    return flat.view_as(spec).mT.flip(1)
