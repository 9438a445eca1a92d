"""Fits the whitening of a checkpoint's scene embeddings (`encoder.Whitening`) to recordings that it was trained on.

    python checkpoints/whitening.py STORE run/ssam_tiny.safetensors --block 11 -o ssam_tiny.safetensors

Clips of STORE are drawn as training draws them, but for their length, and embedded. The maps are C^(-power), C the
covariance of a band's means (of its deviations) over clips, averaged over bands, in units of its mean eigenvalue.
Power 1/2 would be ZCA whitening (Bell & Sejnowski 1997; Kessy et al. 2018): directions of little variance become as
loud as the others. Half of that, 1/4, is the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from hear_ssam.checkpoint import find_weights, halved, load_checkpoint, save_checkpoint
from hear_ssam.embedding.clips import embed
from hear_ssam.errors import HearSsamError
from hear_ssam.hear import load_model
from hear_ssam.pretraining.store import RATE, Store, open_store


def main(arguments: Sequence[str]) -> int:
    """Write the checkpoint with its whitening; exit code 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", metavar="STORE", help="folder that `hear-ssam corpus` wrote")
    parser.add_argument("checkpoint", metavar="NAME|FILE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="safetensors to write")
    parser.add_argument("--block", type=int, metavar="N", help="whose tokens are the embeddings (default: as in FILE)")
    parser.add_argument("--power", type=float, default=0.25, help="default 0.25")
    parser.add_argument("--clips", type=int, default=6400, metavar="N", help="default 6400")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="at most, of a clip (default 8)")
    args = parser.parse_args(arguments)
    try:
        clips = draw(open_store(args.store), args.clips, args.seconds)
        fit(args.checkpoint, clips, args.output, args.block, args.power)
    except HearSsamError as error:
        print(f"whitening.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(store: Store, count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """`count` pieces of clips of a store, (samples,) float32, each up to `seconds` long from a random start."""
    generator = np.random.default_rng(seed)
    lengths = np.diff(store.offsets)
    weights = store.weights(np.minimum(lengths, seconds * RATE), RATE // 40)
    most, clips = int(seconds * RATE), []
    for index in generator.choice(len(store), count, p=weights / weights.sum()):
        start = generator.integers(0, max(0, lengths[index] - most) + 1)
        clips.append(store[index][start : start + most].astype(np.float32) / 32768)
    return clips


def fit(
    checkpoint: str, clips: Sequence[np.ndarray], output: str, block: int | None = None, power: float = 0.25
) -> None:
    """Write `checkpoint` with a whitening of what it makes of `clips`, in place of one that it may have."""
    file = find_weights(checkpoint)[0]
    config, state, info = load_checkpoint(file)
    config = dataclasses.replace(
        config, whitening=True, pooling="mean_std", readout_block=block or config.readout_block
    )
    model, layers = load_model(file), [config.readout_block or config.depth]
    batches = tqdm([clips[i : i + 64] for i in range(0, len(clips), 64)], desc="embed", unit="batch")
    pooled = torch.from_numpy(np.concatenate([embed(b, model, pooling="mean_std", layers=layers) for b in batches]))
    x = pooled.double().view(len(clips), 2, -1, config.embed_dim)
    center = x.mean(0)
    state["whitening.center"] = center.float()
    state["whitening.maps"] = torch.stack([whitening(part.flatten(0, 1), power) for part in (x - center).unbind(1)])
    save_checkpoint(output, config, halved(state), info)


def whitening(x: torch.Tensor, power: float) -> torch.Tensor:
    """Symmetric map (D, D) float32 of centred rows (N, D) double: C^(-power), scaled to a mean variance of 1."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    gains = (values / values.mean()).clamp(min=1e-6) ** -power
    scaled: torch.Tensor = vectors * (gains / (values * gains.square()).mean().sqrt()) @ vectors.T
    return scaled.float()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
