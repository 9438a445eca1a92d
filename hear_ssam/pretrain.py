"""Masked-spectrogram pre-training: a store of log-mel clips → an encoder's checkpoint and its model card.

One step: draw clips, hide half of their patches, predict the pixels of all patches, AdamW. The published recipe of
SSAM (Yadav & Tan 2024) is 100 epochs of AudioSet at batch 1024; `Recipe` holds what can differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import HearSsamError, unknown_name
from .paths import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .corpus import Store
    from .encoder import Encoder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SILENCE = math.log(2.0**-23)  # log-mel of digital silence
HELD_OUT = 64  # every 64th clip measures the loss and is never trained on


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its store. Field names are the keys of a recipe file and the command's options."""

    model: str = "ssam_tiny"
    steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 6e-4  # peak: linear warm-up, then half a cosine to 0
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.05  # on tensors of two and more dimensions
    clip_norm: float = 1.0  # of the gradient; 0 switches it off
    precision: str = "fp32"  # bf16: autocast; the scan's step, transition and state stay float32
    min_frames: int = 200  # a step draws clips of one length between these, standardises each as a whole ...
    max_frames: int = 600  # ... and trains on one window of it, as at inference
    mix: float = 0.5  # share of clips to which another one is added, at -10 to 10 dB
    pad: float = 0.5  # share of short clips padded with silence; the others are repeated
    seed: int = 0
    init: str = ""  # a checkpoint file whose weights the run starts from; empty: random ones

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "min_frames"):
            if getattr(self, name) < 1:
                raise HearSsamError(f"recipe: {name} must be at least 1, not {getattr(self, name)}.")
        if self.precision not in ("fp32", "bf16"):
            raise unknown_name("precision", self.precision, ("fp32", "bf16"))
        if self.max_frames < self.min_frames:
            raise HearSsamError(f"recipe: max_frames={self.max_frames} is below min_frames={self.min_frames}.")


class Windows:
    """Draws training windows from a store, on any device; the frames lie on that device.

    A source is drawn with probability ∝ √hours (small, diverse ones count for more than their size), a clip of it
    ∝ its length. `held_out` draws from the clips that training never sees.
    """

    def __init__(self, store: Store, recipe: Recipe, window: int, device: torch.device, held_out: bool = False) -> None:
        import numpy as np
        import torch

        if recipe.min_frames < window:
            raise HearSsamError(f"recipe: min_frames={recipe.min_frames} is below the encoder's window of {window}.")
        lengths = np.diff(store.offsets)
        mine = (np.arange(len(store)) % HELD_OUT == 0) == held_out
        hours = np.bincount(store.source, weights=lengths)
        weights = lengths * mine / np.sqrt(hours)[store.source]
        if not weights.any():
            raise HearSsamError(f"the store's {len(store)} clips are too few: every {HELD_OUT}th is held out.")
        self.recipe, self.window, self.device = recipe, window, device
        self.frames = torch.from_numpy(store.frames).to(device)  # (all frames, 80) float16; mapped, on a CPU
        self.offsets = torch.from_numpy(store.offsets[:-1]).to(device)
        self.lengths = torch.from_numpy(lengths).to(device)
        self.weights = torch.from_numpy(weights).to(device)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Standardised windows (batch, window, 80) float32."""
        import torch

        from .frontend import standardize

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=self.device)

        recipe = self.recipe
        bounds = recipe.min_frames, recipe.max_frames + 1
        frames = int(torch.randint(*bounds, (), generator=generator, device=self.device))
        clip = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        length = self.lengths[clip][:, None]  # (B, 1)
        start = (uniform(batch, 1) * (length - frames + 1).clamp(min=1)).long()
        position = start + torch.arange(frames, device=self.device)  # (B, F)
        spec = self.frames[self.offsets[clip][:, None] + position % length].float()  # (B, F, 80)
        silent = (position >= length) & (uniform(batch, 1) < recipe.pad)
        spec = spec.masked_fill(silent[..., None], SILENCE)
        gain = (uniform(batch, 1, 1) - 0.5) * (20 / 10 * math.log(10))  # ±10 dB of power, in nepers
        mixed = torch.logaddexp(spec, spec.roll(1, 0) + gain)
        spec = torch.where(uniform(batch, 1, 1) < recipe.mix, mixed, spec)
        first = int(uniform(1) * (frames - self.window + 1))
        return standardize(spec)[:, first : first + self.window]


def pretrain(
    store_path: str | Path, out: str | Path, recipe: Recipe, device: str = "cpu", save_minutes: float = 2.0
) -> Path:
    """Train `recipe.model` on a store, in the folder `out`; returns the path of the checkpoint.

    The state is saved every `save_minutes` and on Ctrl-C; the same call resumes it. Written when the last step is
    done: MODEL.safetensors, its card MODEL.md, and log.csv (loss by step).
    """
    import torch
    from tqdm import tqdm

    from .config import CONFIGS
    from .corpus import open_store
    from .encoder import Encoder, random_mask

    if recipe.model not in CONFIGS:
        raise unknown_name("model", recipe.model, CONFIGS)
    config = CONFIGS[recipe.model]
    if config.frontend != "logmel":
        raise HearSsamError(f"{recipe.model} reads Kaldi filterbanks; a store holds log-mel clips for other systems.")
    store, folder, place = open_store(store_path), Path(out), torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = Encoder(config)
    earlier = _start_from(recipe, encoder) if recipe.init else {}
    encoder.to(place)
    optimizer = _optimizer(encoder, recipe)
    generator = torch.Generator(place).manual_seed(recipe.seed)
    windows = Windows(store, recipe, config.window_frames, place)
    held_out = Windows(store, recipe, config.window_frames, place, held_out=True)
    run = _Run(folder, recipe, encoder, optimizer, generator)
    autocast = torch.autocast(place.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", desc=recipe.model)
    losses: list[Tensor] = []
    began = saved = time.monotonic()
    try:
        while run.step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(run.step / recipe.steps, recipe.warmup)
            spec = windows.draw(recipe.batch_size, generator)
            mask = random_mask(recipe.batch_size, config, generator)
            with autocast:
                loss = encoder(spec, mask).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(encoder.parameters(), recipe.clip_norm)
            optimizer.step()
            run.step += 1
            losses.append(loss.detach())
            bar.update()
            now = time.monotonic()
            if run.step == recipe.steps or now - saved > 60 * save_minutes:
                run.seconds += now - began
                began = saved = now
                with autocast:
                    check = _held_out_loss(encoder, held_out)
                run.save(torch.stack(losses).mean().item(), check)
                bar.set_postfix(loss=f"{run.log[-1]['loss']:.4f}", held_out=f"{check:.4f}")
                losses.clear()
    except KeyboardInterrupt:
        run.seconds += time.monotonic() - began
        run.save(torch.stack(losses).mean().item() if losses else math.nan, math.nan)
        raise
    finally:
        bar.close()
    return _finish(run, store, earlier)


class _Run:
    """What a run must remember to go on: written to OUT/state.pt, read back without executing anything."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> None:
        import torch

        self.folder, self.recipe, self.encoder = folder, recipe, encoder
        self.optimizer, self.generator = optimizer, generator
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        if not (folder / "state.pt").exists():
            return
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise HearSsamError(f"{folder / 'state.pt'}: cannot be resumed ({error}); delete it.") from error
        for name, value in state["recipe"].items():
            if value != getattr(recipe, name):
                raise HearSsamError(
                    f"{folder} holds a run with {name}={value!r}, not {getattr(recipe, name)!r}; "
                    "repeat its recipe to resume it, or choose another folder."
                )
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self, loss: float, held_out: float) -> None:
        import torch

        self.log.append({"step": self.step, "loss": loss, "held_out_loss": held_out, "seconds": round(self.seconds, 1)})
        state = {
            "recipe": dataclasses.asdict(self.recipe), "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "step": self.step, "seconds": self.seconds, "log": self.log,
        }  # fmt: skip
        with atomic_write(self.folder / "state.pt") as path:
            torch.save(state, path)
        with atomic_write(self.folder / "log.csv") as path:
            rows = [",".join(self.log[0]), *(",".join(map(str, row.values())) for row in self.log)]
            path.write_text("\n".join(rows) + "\n")


def _start_from(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    """Put the weights of `recipe.init` into the encoder; returns what that file tells about its own training."""
    from .checkpoint import load_checkpoint

    config, state, info = load_checkpoint(recipe.init)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}:
        raise HearSsamError(
            f"{recipe.init}: holds a {config.system} of width {config.embed_dim} and depth {config.depth}, "
            f"whose weights do not fit {recipe.model}; choose the model that it was trained as."
        )
    encoder.load_state_dict(state)
    return {"sha256": info["sha256"], "training": info.get("training", {})}


def _optimizer(encoder: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    import torch

    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def _schedule(done: float, warmup: float) -> float:
    """Learning rate over its peak when the share `done` of the steps lies behind."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _held_out_loss(encoder: Encoder, windows: Windows) -> float:
    """Loss on held-out windows: the same windows and masks at every call."""
    import torch

    from .encoder import random_mask

    generator = torch.Generator(windows.device).manual_seed(1)
    batch = windows.recipe.batch_size
    with torch.no_grad():
        spec = windows.draw(batch, generator)
        return encoder(spec, random_mask(batch, encoder.config, generator)).loss.item()


def _finish(run: _Run, store: Store, earlier: dict[str, Any]) -> Path:
    import torch

    from . import __version__
    from .checkpoint import save_checkpoint
    from .corpus import FRAMES_PER_HOUR

    recipe, config = run.recipe, run.encoder.config
    seen = recipe.steps * recipe.batch_size
    hours = store.info["frames"] / FRAMES_PER_HOUR
    device = next(run.encoder.parameters()).device
    facts = {
        "name": recipe.model,
        "source": "pre-trained by hear_ssam",
        "licence": "Apache-2.0",
        "training": {
            "clips_seen": seen,
            "epochs": round(seen * config.window_frames / store.info["frames"], 1),
            "hours_of_audio": round(hours, 2),
            "loss": round(run.log[-1]["loss"], 4),
            "held_out_loss": round(run.log[-1]["held_out_loss"], 4),
            "wall_minutes": round(run.seconds / 60, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "versions": {"hear_ssam": __version__, "torch": torch.__version__},
            "recipe": dataclasses.asdict(recipe) | {"init": Path(recipe.init).name},
            "init": earlier,
        },
        "data": [{k: row.get(k, "") for k in ("name", "hours", "clips", "licence")} for row in store.info["sources"]],
    }
    # Matrices in half precision: an embedding moves by less than 1e-3 of its size, the file is half as large.
    state = {
        name: tensor.half() if tensor.dim() == 2 and name.endswith("weight") else tensor
        for name, tensor in run.encoder.state_dict().items()
    }
    path = run.folder / f"{recipe.model}.safetensors"
    save_checkpoint(path, config, state, facts)
    with atomic_write(run.folder / f"{recipe.model}.md") as card:
        card.write_text(model_card(facts, store.info["sources"]))
    return path


def model_card(facts: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """The Markdown card of a checkpoint: what it is, what it was trained on and under which licences, and how."""
    training = facts["training"]
    lines = [
        f"# {facts['name']}",
        "",
        f"An encoder of hear_ssam, pre-trained by masked-spectrogram reconstruction. Weights: {facts['licence']}.",
        "",
        "## Training",
        "",
        *_course(training),
        "",
        "## Data",
        "",
        "No audio is distributed here. Sources, with their licences and the attribution that they ask for:",
        "",
        "| source | clips | hours | licence | attribution |",
        "|---|---|---|---|---|",
    ]
    for row in sources:
        terms = f"{row.get('licence', 'not stated')} | {row.get('attribution', '')}"
        lines.append(f"| {row['name']} | {row['clips']:,} | {row['hours']:.2f} | {terms} |")
    return "\n".join(lines) + "\n"


def _course(training: dict[str, Any]) -> list[str]:
    """How a run went and its commands, after those of the run that it started from."""
    lines, before = [], training.get("init") or {}
    if before:
        lines = [*_course(before["training"]), ""] if before.get("training") else []
        lines += [f"Then, from those weights (sha256 `{before['sha256']}`):", ""]
    return [
        *lines,
        f"- {training['clips_seen']:,} windows of 2 s, {training['epochs']} epochs of {training['hours_of_audio']} h",
        f"- loss {training['loss']} (on held-out clips {training['held_out_loss']})",
        f"- {training['wall_minutes']} minutes on {training['device']}, torch {training['versions']['torch']}",
        f"- recipe: `{json.dumps(training['recipe'])}`",
        "",
        *([] if before else ["    hear-ssam corpus STORE --audio FOLDERS"]),
        f"    hear-ssam pretrain STORE OUT {_as_options(training['recipe'])}",
    ]


def _as_options(recipe: dict[str, Any]) -> str:
    default = dataclasses.asdict(Recipe())
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in recipe.items() if v != default[k])


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The values of a TOML recipe file; unknown names raise HearSsamError."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise HearSsamError(f"{path}: cannot be read as a recipe: {error}.") from error
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in names:
            raise unknown_name(f"key in {path}", name, names)
    return values


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="a store of log-mel clips -> an encoder",
        description="Masked-spectrogram pre-training. Saves its state as it goes; the same command resumes it.",
        epilog="""examples:
  hear-ssam corpus store --audio recordings/        make the store first
  hear-ssam pretrain store run
  hear-ssam pretrain store run --device cuda --precision bf16 --batch-size 1024
  hear-ssam pretrain store more --init run/ssam_tiny.safetensors --seed 1    go on from weights
  hear-ssam pretrain store run --recipe my.toml --steps 1000    options win over the file
  hear-ssam embed sounds/ -o out.parquet --model run/ssam_tiny.safetensors""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="STORE", help="folder that `hear-ssam corpus` wrote")
    parser.add_argument("out", metavar="OUT", help="folder of the run: its state, log, checkpoint and card")
    parser.add_argument("--recipe", metavar="FILE", help="TOML file with values for the options below")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    for name, kind in get_type_hints(Recipe).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=f"default {getattr(Recipe, name)}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`hear-ssam pretrain`."""
    values = read_recipe(args.recipe) if args.recipe else {}
    given = {name: getattr(args, name) for name in get_type_hints(Recipe)}
    values |= {name: value for name, value in given.items() if value is not None}
    path = pretrain(args.store, args.out, Recipe(**values), args.device)
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0
