"""Masked-spectrogram pre-training: a store of audio → an encoder's checkpoint and its model card.

One step: draw clips, hide half of their patches, predict the pixels of all patches, AdamW. The published recipe of
SSAM (Yadav & Tan 2024) is 100 epochs of AudioSet at batch 1024; `Recipe` holds what can differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from .config import CONFIGS, check_fields
from .errors import HearSsamError, unknown_name
from .paths import atomic_write, read_toml

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import EncoderConfig
    from .encoder import Encoder
    from .pretraining.store import Store

SILENCE = math.log(2.0**-23)  # log-mel of digital silence
HELD_OUT = 64  # every 64th clip measures the loss and is never trained on


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its store. Field names are the keys of a recipe file and the command's options.

    A value of another type, out of its range, or that contradicts another one raises HearSsamError with its field.
    """

    model: str = "ssam_tiny"
    steps: int = 20_000
    batch_size: int = 256
    learning_rate: float = 6e-4  # peak: linear warm-up, then half a cosine to 0
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.05  # on tensors of two and more dimensions
    clip_norm: float = 1.0  # of the gradient; 0 switches it off
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; the scan's step, transition, state stay float32
    min_frames: int = 200  # a step draws clips of one length between these, standardises each as a whole ...
    max_frames: int = 600  # ... and trains on one window of it, as at inference
    mix: float = 0.5  # share of clips to which another one is added, at -10 to 10 dB
    pad: float = 0.5  # share of short clips padded with silence; the others are repeated
    seed: int = 0
    init: str = ""  # a checkpoint file whose weights the run starts from; empty: random ones

    def __post_init__(self) -> None:
        check_fields(self, "recipe field", LIMITS)
        if self.model not in CONFIGS:
            raise unknown_name("recipe field model:", self.model, CONFIGS)
        window = CONFIGS[self.model].window_frames
        if self.min_frames < window:
            raise HearSsamError(
                f"recipe field min_frames={self.min_frames} is below the window of {self.model}; set at least {window}."
            )
        if self.max_frames < self.min_frames:
            raise HearSsamError(
                f"recipe field max_frames={self.max_frames} is below min_frames={self.min_frames}; raise it."
            )


# Lowest and highest value of the recipe's numbers.
LIMITS = {
    "steps": (1, math.inf), "batch_size": (1, math.inf), "learning_rate": (0, 1), "warmup": (0, 1),
    "weight_decay": (0, 1), "clip_norm": (0, 1e9), "min_frames": (1, math.inf), "max_frames": (1, math.inf),
    "mix": (0, 1), "pad": (0, 1), "seed": (0, 2**63 - 1),
}  # fmt: skip


class WindowSampler:
    """Draws training windows from a store, on any device; the frames lie on that device.

    A source is drawn with probability ∝ √hours (small, diverse ones count for more than their size), a clip of it
    ∝ its length. `held_out` draws from the clips that training never sees.
    """

    def __init__(
        self, store: Store, recipe: Recipe, config: EncoderConfig, device: torch.device, held_out: bool = False
    ) -> None:
        import numpy as np
        import torch

        from .pretraining.store import Frames

        self.recipe, self.config, self.device = recipe, config, device
        self.frames = Frames(store, config, device)
        lengths = self.frames.lengths.cpu().numpy()
        mine = (np.arange(len(store)) % HELD_OUT == 0) == held_out
        hours = np.bincount(store.source, weights=lengths)
        weights = lengths * mine / np.sqrt(hours)[store.source]
        if not weights.any():
            raise HearSsamError(
                f"{store.folder}: {len(store)} clips are too few, as every {HELD_OUT}th is held out; add audio."
            )
        self.weights = torch.from_numpy(weights).to(device)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Normalised windows (batch, window_frames, n_mels) float32."""
        import torch

        from .frontend import normalize

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=self.device)

        recipe = self.recipe
        bounds = recipe.min_frames, recipe.max_frames + 1
        frames = int(torch.randint(*bounds, (), generator=generator, device=self.device))
        clip = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        length = self.frames.lengths[clip][:, None]  # (B, 1)
        start = (uniform(batch, 1) * (length - frames + 1).clamp(min=1)).long()
        position = start + torch.arange(frames, device=self.device)  # (B, F)
        spec = self.frames(clip, position % length)  # (B, F, mels)
        silent = (position >= length) & (uniform(batch, 1) < recipe.pad)
        spec = spec.masked_fill(silent[..., None], SILENCE)
        gain = (uniform(batch, 1, 1) - 0.5) * (20 / 10 * math.log(10))  # ±10 dB of power, in nepers
        mixed = torch.logaddexp(spec, spec.roll(1, 0) + gain)
        spec = torch.where(uniform(batch, 1, 1) < recipe.mix, mixed, spec)
        window = self.config.window_frames
        first = int(uniform(1) * (frames - window + 1))
        return normalize(spec, self.config)[:, first : first + window]


def pretrain(
    store_path: str | Path, out: str | Path, recipe: Recipe, device: str = "cpu", save_minutes: float = 2.0
) -> Path:
    """Train `recipe.model` on a store, in the folder `out`; returns the path of the checkpoint.

    The state is saved every `save_minutes` and when a signal (Ctrl-C, SIGTERM) stops the run, both between two steps;
    the same call resumes it exactly. Written when the last step is done: MODEL.safetensors, its card MODEL.md, and
    log.csv (loss by step). A loss that is not finite raises HearSsamError and keeps the state saved last.
    """
    import torch
    from tqdm import tqdm

    from .encoder import Encoder, random_mask
    from .pretraining.store import open_store

    config = CONFIGS[recipe.model]
    store, folder, place = open_store(store_path), Path(out), torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = Encoder(config)
    earlier = _start_from(recipe, encoder) if recipe.init else {}
    encoder.to(place)
    optimizer = _optimizer(encoder, recipe)
    generator = torch.Generator(place).manual_seed(recipe.seed)
    windows = WindowSampler(store, recipe, config, place)
    held_out = WindowSampler(store, recipe, config, place, held_out=True)
    run = _Run(folder, recipe, encoder, optimizer, generator)
    autocast = torch.autocast(place.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", desc=recipe.model)
    losses: list[Tensor] = []
    began = saved = time.monotonic()
    with contextlib.closing(bar), _noted_signals() as noted:
        stop = False
        while run.step < recipe.steps and not stop:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(run.step / recipe.steps, recipe.warmup)
            spec = windows.draw(recipe.batch_size, generator)
            mask = random_mask(recipe.batch_size, config, generator)
            with autocast:
                loss = encoder(spec, mask).loss
            run.require_finite(loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(encoder.parameters(), recipe.clip_norm)
            optimizer.step()
            run.step += 1
            losses.append(loss.detach())
            bar.update()
            stop, now = bool(noted), time.monotonic()  # looked at once a step: here nothing is half done
            if run.step == recipe.steps or stop or now - saved > 60 * save_minutes:
                run.seconds += now - began
                began = saved = now
                with autocast:
                    check = _held_out_loss(encoder, held_out)
                run.require_finite(check)
                run.save(torch.stack(losses).mean().item(), check)
                bar.set_postfix(loss=f"{run.log[-1]['loss']:.4f}", held_out=f"{check:.4f}")
                losses.clear()
    return _finish(run, store, earlier)


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are put into the list instead of striking wherever the program is; at the end of the block
    the first of them takes its usual course. A second one does so at once."""
    noted: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        handlers = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}  # None: not set by Python
        for number in handlers:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
    if noted:
        signal.raise_signal(noted[0])
        raise KeyboardInterrupt  # where a handler of the caller's returns


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
        self.saved = 0  # the step of the state on disk
        path = folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differing = {k: v for k, v in state["recipe"].items() if v != getattr(recipe, k)}
            if not differing:
                encoder.load_state_dict(state["encoder"])
                optimizer.load_state_dict(state["optimizer"])
                generator.set_state(state["generator"])
                self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
                self.saved = self.step
        except Exception as error:  # torch raises many kinds for a damaged file
            raise HearSsamError(f"{path}: cannot be resumed ({error}); delete it to start anew.") from error
        for name, value in differing.items():
            raise HearSsamError(
                f"{path}: holds a run with {name}={value!r}, not {getattr(recipe, name)!r}; "
                "repeat its recipe to resume it, or choose another folder."
            )

    def require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise HearSsamError(
                f"{self.folder}: the loss became {loss} at step {self.step}; the state of step {self.saved} is kept. "
                "Start again in another folder with a lower learning_rate, or with precision fp32."
            )

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
        self.saved = self.step


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


def _held_out_loss(encoder: Encoder, windows: WindowSampler) -> float:
    """Loss on held-out windows: the same windows and masks at every call."""
    import torch

    from .encoder import random_mask

    generator = torch.Generator(windows.device).manual_seed(1)
    batch = windows.recipe.batch_size
    with torch.no_grad():
        spec = windows.draw(batch, generator)
        return float(encoder(spec, random_mask(batch, encoder.config, generator)).loss)


def _finish(run: _Run, store: Store, earlier: dict[str, Any]) -> Path:
    import torch

    from . import __version__
    from .checkpoint import save_checkpoint

    recipe, config = run.recipe, run.encoder.config
    seen = recipe.steps * recipe.batch_size
    device = next(run.encoder.parameters()).device
    facts = {
        "name": recipe.model,
        "source": "pre-trained by hear_ssam",
        "licence": "Apache-2.0",
        "training": {
            "clips_seen": seen,
            "epochs": round(seen * config.window_frames / 360_000 / store.hours, 1),
            "hours_of_audio": round(store.hours, 2),
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


def read_recipe(path: str | Path, **options: Any) -> Recipe:
    """The recipe of a TOML file, in which `options` win; HearSsamError names the file and the field."""
    values = read_toml(path)
    names = [field.name for field in dataclasses.fields(Recipe)]
    where = " ".join([str(path), *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())])
    try:
        for name in values:
            if name not in names:
                raise unknown_name("recipe field", name, names)
        return Recipe(**values | options)
    except HearSsamError as error:
        raise HearSsamError(f"{where}: {error}") from error


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="a store of audio -> an encoder",
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
        option, default = f"--{name.replace('_', '-')}", f"default {getattr(Recipe, name)}"
        if choices := get_args(kind):
            parser.add_argument(option, choices=choices, help=default)
        else:
            parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=default)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`hear-ssam pretrain`."""
    options = {name: getattr(args, name) for name in get_type_hints(Recipe)}
    options = {name: value for name, value in options.items() if value is not None}
    recipe = read_recipe(args.recipe, **options) if args.recipe else Recipe(**options)
    path = pretrain(args.store, args.out, recipe, args.device)
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0
