"""The two flaws of the published code, measured and drawn: benchmarks/choices.png.

    python -m benchmarks choices [-o OUT.png]     # a minute on one CPU core; needs nothing but this checkout

Left, token order: a noise burst of 40 ms is moved through a clip of 2 s; how much does each timestamp embedding of
ssam_tiny change? The clip has exactly 200 frames, so both orders arrange the very same tokens. Random weights: no
training can undo an arrangement.

Right, mask position: two small SSAST encoders, equal in everything but `mask_position`, are pre-trained on the
recordings of the demo task. A Transformer whose masked patches do not know their place predicts one and the same patch
for all of them; what such a prediction can reach at best is the variance of a clip's hidden patches.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

from hear_ssam import get_timestamp_embeddings, load_model
from hear_ssam.audio import find_audio, read_audio
from hear_ssam.config import build_config
from hear_ssam.encoder import Encoder
from hear_ssam.frontend import SAMPLE_RATE, LogMel, standardize
from hear_ssam.paths import shipped
from hear_ssam.pretraining.learner import Learner
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.windows import Batch, random_mask

from . import plain_parser

STEPS, BATCH, EVERY = 400, 16, 25
COLOURS = {"before": "#c44e52", "after": "#1f6f8b"}


def responses(order: str) -> torch.Tensor:
    """(50 rows, 50 burst positions): change of each row, as a share of the burst's whole effect."""
    samples = 199 * 160 + 80  # 200 frames
    generator = torch.Generator().manual_seed(0)
    quiet = 0.02 * torch.randn(samples, generator=generator)
    audio = quiet.repeat(51, 1)
    length = round(0.04 * SAMPLE_RATE)
    burst = 0.3 * torch.randn(length, generator=generator) * torch.hann_window(length)  # in all five bands
    for position in range(50):
        start = min(position * 640 - 80, samples - length)
        audio[position, max(0, start) : start + length] += burst[max(0, -start) :]
    model = load_model(model="ssam_tiny", pretrained=False, token_order=order)
    rows, _ = get_timestamp_embeddings(audio, model)
    change = (rows[:50] - rows[50:]).square().sum(2)  # (positions, rows)
    return (change / change.sum(1, keepdim=True)).T


def spectrograms() -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of 200 frames of the demo recordings, standardised: those to train on, and fold 4, held out."""
    windows: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for file in find_audio((shipped("eval_tasks") / "demo" / "tasks").glob("*/16000")):
        audio = torch.from_numpy(read_audio(file, SAMPLE_RATE))
        audio = audio.repeat(1 + 2 * SAMPLE_RATE // len(audio))[: 2 * SAMPLE_RATE]  # short ones repeat
        windows[file.parent.name != "fold04"].append(standardize(LogMel()(audio[None]))[0, :200])
    return torch.stack(windows[True]), torch.stack(windows[False])


def pretrain(mask_position: str, train: torch.Tensor, held_out: torch.Tensor) -> tuple[list[float], float, float]:
    """Held-out error over hidden patches every EVERY steps, its floor for a blind model, the predictions' spread."""
    config = build_config("ssast", 48, depth=2, num_heads=3, mask_position=mask_position)
    torch.manual_seed(0)
    encoder = Encoder(config)
    learner = Learner(encoder, Recipe())
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    held_out_mask = random_mask(len(held_out), config, torch.Generator().manual_seed(2))
    hidden = encoder.patchify(held_out)[held_out_mask].unflatten(0, (len(held_out), -1))  # (clips, 125, 64)
    errors: list[float] = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                tokens = encoder.tokens(held_out, held_out_mask)[:, 1:]
                predicted = encoder.head(tokens)[held_out_mask].view_as(hidden)
            errors.append((predicted - hidden).square().mean().item())
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        drawn = Batch(batch, [random_mask(BATCH, config, generator)], torch.arange(BATCH))
        loss = learner.total(learner(drawn)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step < STEPS:
            schedule.step()
    floor = hidden.var(dim=1, correction=0).mean().item()
    return errors, floor, (predicted.amax(1) - predicted.amin(1)).max().item()


def main(arguments: list[str]) -> int:
    """`python -m benchmarks choices`: draw the picture, print its numbers as JSON."""
    parser = plain_parser("choices", __doc__)
    default = Path(__file__).with_suffix(".png")
    parser.add_argument("-o", "--output", type=Path, default=default, help="the picture (default %(default)s)")
    out = parser.parse_args(arguments).output
    torch.set_num_threads(1)
    maps = {order: responses(order) for order in ("official", "time")}
    curves = {where: pretrain(where, *spectrograms()) for where in COLOURS}
    draw(out, maps, curves)

    facts = {f"own row's share of the change, {order}": share.diagonal().mean().item() for order, share in maps.items()}
    for where, (errors, floor, spread) in curves.items():
        facts[f"held-out error on hidden patches, positions {where} the mask"] = errors[-1]
        facts[f"spread of predictions over a clip's hidden patches, positions {where} the mask"] = spread
        facts["the same error of the best single prediction per clip"] = floor
    print(json.dumps(facts, indent=2))
    return 0


def draw(out: Path, maps: dict[str, torch.Tensor], curves: dict[str, tuple[list[float], float, float]]) -> None:
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (official, time, losses) = plt.subplots(
        1, 3, figsize=(11.5, 3.8), width_ratios=(1, 1, 1.2), layout="constrained"
    )
    ticks = (0, 0.4, 0.8, 1.2, 1.6, 2)
    for axes, order, title in (
        (official, "official", 'token_order="official"\na row mixes five moments, 0.4 s apart'),
        (time, "time", 'token_order="time" (default)\na row is one moment'),
    ):
        image = axes.imshow(
            100 * maps[order], origin="lower", extent=(0, 2, 0, 2), cmap="PuBu", norm=PowerNorm(0.5, 0, 100)
        )
        axes.set(title=title, xlabel="time of a noise burst (s)", xticks=ticks, yticks=ticks)
    official.set_ylabel("time stamp of the embedding row (s)")
    label = "share of the change (%)"
    figure.colorbar(image, ax=[official, time], label=label, ticks=(0, 5, 20, 50, 100), shrink=0.8, pad=0.02)

    floor = curves["before"][1]
    for where, (errors, _, spread) in curves.items():
        text = f'mask_position="{where}"' + (" (default)" if where == "after" else " (as released)")
        steps = [EVERY * i for i in range(len(errors))]
        losses.plot(steps, errors, color=COLOURS[where], linewidth=2, label=text, clip_on=False)
        note = f"{errors[-1]:.2f}; within a clip,\npredictions differ by {spread:.1f}"
        losses.annotate(
            note, (STEPS, errors[-1]), (0, 12), textcoords="offset points", ha="right", color=COLOURS[where]
        )
    losses.axhline(floor, color="0.4", linestyle=":", linewidth=1.2, label="best single prediction per clip")
    losses.set(title="SSAST pre-trained with positions\nbefore or after the mask", xlabel="step", xlim=(0, STEPS))
    losses.set(ylabel="held-out error on hidden patches\n(MSE, standardised log-mel)", ylim=(0, 1.3))
    losses.legend(frameon=False, loc="lower left")
    figure.savefig(out, dpi=120, metadata={"Software": None})
