"""The training loop: steps over a store, in one process or several, that can stop anywhere and go on exactly there."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from .. import __version__
from ..checkpoint import find_weights, halved, load_checkpoint, save_checkpoint
from ..config import CONFIGS
from ..encoder import Encoder
from ..errors import HearSsamError, said
from ..machine import noted_signals
from ..options import pick_device
from ..paths import atomic_write, only_writer, write_whole
from .card import model_card
from .codes import open_codes
from .learner import Learner
from .recipe import Codes, Recipe
from .store import Store, open_store
from .watch import draw
from .windows import WindowSampler

_Unread = tuple[Tensor, Tensor, int]  # losses (B,) of clips (B,), at a step
PARTS = ("data", "wait", "teacher", "forward", "backward", "optimiser")  # of the time that a step takes


def pretrain(
    store_path: str | Path, out: str | Path, recipe: Recipe, device: str = "auto", save_minutes: float = 2.0,
    keep: int = 1, probe: Callable[[Path], dict[str, float]] | None = None, probe_minutes: float = 30.0,
) -> Path:  # fmt: skip
    """Train `recipe.model` on a store, in the folder `out`; returns the path of the checkpoint.

    The state is saved every `save_minutes` and when a signal (Ctrl-C, SIGTERM) stops the run, both between two steps;
    the same call resumes it exactly, under `torchrun` with any number of processes. The `keep` latest states stay.
    Written with every state: MODEL.safetensors, its card MODEL.md, log.jsonl, and picture.png of the same held-out
    windows each time. Every `probe_minutes`, and at the end, `probe` judges the checkpoint of then; its scores go into
    the log. A loss that is not finite raises HearSsamError and keeps the state saved last.
    """
    for name, value, least in ("save_minutes", save_minutes, 0), ("probe_minutes", probe_minutes, 0), ("keep", keep, 1):
        if not value >= least:  # not a number, either
            raise HearSsamError(f"{name}={value}: must be at least {least}.")
    folder, config = Path(out), CONFIGS[recipe.model]
    with _ranks(device) as ranks, only_writer(folder, "run") if ranks.rank == 0 else contextlib.nullcontext():
        store = open_store(store_path)
        asked = recipe.objectives(config).get("codes")
        codes = open_codes(store, asked.file, config) if isinstance(asked, Codes) else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            encoder = Encoder(config)
            earlier = _start_from(recipe, encoder) if recipe.init else {}
            learner = Learner(encoder, recipe, codes.info["clusters"] if codes else 0).to(ranks.device)
        run = _Run(folder, recipe, store, learner, keep, codes.info if codes else {}, earlier, probe, probe_minutes)
        sampler = WindowSampler(store, recipe, config, ranks.device, codes=codes)
        held_out = WindowSampler(store, recipe, config, ranks.device, True, codes, sampler.frames)
        _loop(run, ranks, sampler, held_out, save_minutes)
        if ranks.rank == 0:
            _publish(run)
        return folder / f"{recipe.model}.safetensors"


def _loop(run: _Run, ranks: _Ranks, sampler: WindowSampler, held_out: WindowSampler, save_minutes: float) -> None:
    recipe, learner, optimizer = run.recipe, run.learner, run.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    parts = ranks.parts(recipe.batch_size, recipe.accumulate)  # what fits into memory at once
    mine = parts[ranks.rank * recipe.accumulate :][: recipe.accumulate]
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    clock, sums = _Clock(), torch.zeros(1 + len(learner.objectives), device=ranks.device)
    unread: list[_Unread] = []  # what the device may still be working on
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", desc=recipe.model, disable=ranks.rank > 0)
    began, since, stop = time.monotonic(), run.step, False
    shown: dict[str, float | str] = {}
    with bar, noted_signals() as noted:
        while run.step < recipe.steps and not stop:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(run.step / recipe.steps, recipe.warmup)
            optimizer.zero_grad(set_to_none=True)
            told, before = torch.zeros_like(sums), run.generator.get_state()
            for rows in mine:
                run.generator.set_state(before)  # every part draws the same batch and takes its own rows
                batch = sampler.draw(recipe.batch_size, run.generator, rows)
                clock("data")
                run.require_finite(unread)
                clock("wait")
                with autocast:
                    batch = learner.teach(batch)
                    clock("teacher")
                    losses = learner(batch)
                    total = learner.total(losses)
                clock("forward")
                (total.sum() / recipe.batch_size).backward()
                unread.append((total.detach(), batch.clip, run.step))
                told += torch.stack([total.detach(), *losses.values()]).detach().sum(1) / recipe.batch_size
                clock("backward")
            due = ranks.rank == 0 and time.monotonic() - began > 60 * save_minutes
            gradients = [p.grad for p in trained if p.grad is not None]
            stop, due = ranks.add([*gradients, told], bool(noted), due)
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            learner.after_step()
            run.step += 1
            clock("optimiser")
            sums += told
            bar.update()
            stop = stop or (ranks.world == 1 and bool(noted))  # looked at here, where nothing is half done
            if run.step == recipe.steps or stop or due:
                now = time.monotonic()
                run.require_finite(unread)
                run.seconds += now - began
                mean = (sums / (run.step - since)).tolist()
                if not all(map(math.isfinite, mean)):
                    raise HearSsamError(f"{run.folder}: the loss of another process is not finite; see what it says.")
                windows = (run.step - since) * recipe.batch_size
                row = dict(zip(("loss", *learner.objectives), mean, strict=True))
                row |= {"windows_per_second": round(windows / (now - began), 1), **clock.shares(windows)}
                since, sums = run.step, torch.zeros_like(sums)
                if ranks.rank == 0:
                    held: list[_Unread] = []
                    for rows in reversed(parts):  # of the same batch at every call; its first windows are drawn
                        batch = held_out.draw(recipe.batch_size, torch.Generator().manual_seed(1), rows)
                        with torch.no_grad(), autocast:
                            held.append((learner.total(learner(batch)), batch.clip, run.step))
                    loss = float(torch.cat([part[0] for part in held]).mean())
                    run.require_finite(held)
                    run.save({**row, "held_out_loss": loss})
                    path = _publish(run)
                    draw(run.folder / "picture.png", learner, batch)
                    shown |= {} if stop else run.judge(path)
                    waiting = row["ms_data"] / sum(value for name, value in row.items() if name.startswith("ms_"))
                    shown |= {"loss": row["loss"], "held_out": loss, "data": f"{waiting:.0%}"}
                    bar.set_postfix(shown | {"windows": f"{row['windows_per_second']:.0f}/s"})
                began = time.monotonic()
                clock("save")


class _Clock:
    """Time of this process by part: `clock(part)` ends a part. A GPU works on while its process goes ahead: there the
    time of a part is what the process needs to ask for it, and waiting for the GPU counts as `wait`."""

    def __init__(self) -> None:
        self.spent = defaultdict[str, float](float)
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[part] += now - self.last
        self.last = now

    def shares(self, windows: int) -> dict[str, float]:
        """Milliseconds a window of each part since the last call."""
        spent, self.spent = self.spent, defaultdict(float)
        return {f"ms_{part}": round(1000 * spent[part] / windows, 2) for part in PARTS}


@dataclasses.dataclass(frozen=True)
class _Ranks:
    """This process among those that `torchrun` started; alone without it."""

    rank: int
    world: int
    device: torch.device

    def parts(self, batch: int, parts: int) -> list[slice]:
        """The rows of a batch, `parts` parts for each process."""
        if batch < self.world * parts:
            raise HearSsamError(f"batch_size={batch} is below {self.world} processes x {parts} parts; raise it.")
        edges = [batch * i // (self.world * parts) for i in range(self.world * parts + 1)]
        return [slice(*edge) for edge in itertools.pairwise(edges)]

    def add(self, tensors: list[Tensor], *flags: bool) -> tuple[bool, ...]:
        """Sum tensors over the processes, in place; returns which flags any process has raised."""
        if self.world == 1:
            return flags
        tensors = [*tensors, torch.tensor(flags, dtype=torch.float32, device=self.device)]
        together = parameters_to_vector(tensors)
        try:
            dist.all_reduce(together)
        except RuntimeError as error:
            raise HearSsamError(
                f"another process of this run has ended ({str(error).splitlines()[0]}); the same command resumes it."
            ) from error
        vector_to_parameters(together, tensors)
        return tuple(tensors[-1].bool().tolist())


@contextlib.contextmanager
def _ranks(device: str) -> Iterator[_Ranks]:
    world, place = int(os.environ.get("WORLD_SIZE", "1")), pick_device(device)
    if world == 1:
        yield _Ranks(0, 1, place)
        return
    if place == torch.device("cuda"):
        place = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    patience = datetime.timedelta(hours=6)  # the first process probes while the others wait
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=patience)
    try:
        yield _Ranks(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()


@dataclasses.dataclass
class _Run:
    """What a run must remember to go on: written to OUT/state.pt, read back without executing anything."""

    folder: Path
    recipe: Recipe
    store: Store
    learner: Learner
    keep: int
    codes: dict[str, Any]
    earlier: dict[str, Any]  # the training of the weights that it started from
    probe: Callable[[Path], dict[str, float]] | None
    probe_minutes: float

    def __post_init__(self) -> None:
        self.optimizer = _optimizer(self.learner, self.recipe)
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        self.probed = time.monotonic()
        data = {"sha256": self.store.digest, "clips_left_out": len(self.store.left_out)}
        self.told = self.recipe.to_dict() | {"codes": self.codes, "store": data}  # what a resumed run must repeat
        for torn in self.folder.glob(".*.????????"):  # what a run that was killed was writing
            torn.unlink(missing_ok=True)
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            here, now = _leaves(state["recipe"]), _leaves({name: self.told.get(name) for name in state["recipe"]})
            differing = [name for name in {**here, **now} if here.get(name) != now.get(name)]
            if not differing:
                self.learner.load_state_dict(state["learner"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.generator.set_state(state["generator"])
                self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        except Exception as error:  # torch raises many kinds for a damaged file
            raise HearSsamError(f"{path}: cannot be resumed ({said(error)}); delete it to start anew.") from error
        if differing:
            told = ", ".join(f"{name}={here.get(name)!r}, not {now.get(name)!r}" for name in differing)
            raise HearSsamError(
                f"{path}: holds a run with {told}; repeat these to resume it, or choose another folder."
            )

    def require_finite(self, unread: list[_Unread]) -> None:
        """Look at losses and empty the list."""
        for loss, clip, step in unread:
            if broken := (~loss.isfinite()).nonzero()[:, 0].tolist():
                names = ", ".join(self.store.name(int(clip[i])) for i in broken[:3]) + ", ..." * (len(broken) > 3)
                kept = f"the state of step {self.log[-1]['step']} is kept" if self.log else "no state was saved yet"
                raise HearSsamError(
                    f"{self.folder}: the loss became {float(loss[broken[0]])} at step {step} on {names}; {kept}. "
                    "Start again in another folder with a lower learning_rate or fp32."
                )
        unread.clear()

    def save(self, row: dict[str, float]) -> None:
        path = self.folder / "state.pt"
        self.log.append({"step": self.step, **row, "seconds": round(self.seconds, 1)})
        state = {
            "recipe": self.told, "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "step": self.step, "seconds": self.seconds, "log": self.log,
        }  # fmt: skip
        with atomic_write(path, RuntimeError) as temporary:
            torch.save(state, temporary)
        if self.keep > 1:
            with atomic_write(self.folder / f"state-{self.step:09}.pt") as temporary:
                shutil.copyfile(path, temporary)  # not every file system has links
            for old in sorted(self.folder.glob("state-*.pt"))[: -self.keep]:
                old.unlink()
        self.write_log()

    def judge(self, path: Path) -> dict[str, float]:
        """What the probe says about the checkpoint `path`, where it is time to ask; it goes into the log too."""
        early = self.step < self.recipe.steps and time.monotonic() < self.probed + 60 * self.probe_minutes
        if self.probe is None or early:
            return {}
        scores = self.probe(path)
        self.log[-1] |= scores
        self.write_log()
        self.probed = time.monotonic()
        return scores

    def write_log(self) -> None:
        write_whole(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.log))


def _leaves(values: dict[str, Any], of: str = "") -> dict[str, Any]:
    """Values in tables of tables by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{of}{name}.") if isinstance(value, dict) else {of + name: value}
    return leaves


def _start_from(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    """Put the weights of `recipe.init` into the encoder; returns what that file tells about its own training."""
    config, state, info = load_checkpoint(find_weights(recipe.init)[0])
    try:  # less the whitening of embeddings, which are to be others
        encoder.load_state_dict({name: x for name, x in state.items() if not name.startswith("whitening.")})
    except RuntimeError as error:
        raise HearSsamError(
            f"{recipe.init}: holds a {config.system} of width {config.embed_dim} and depth {config.depth}, "
            f"whose weights do not fit {recipe.model}; choose the model that it was trained as."
        ) from error
    return {"sha256": info["sha256"], "training": info.get("training", {})}


def _optimizer(learner: Learner, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in learner.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.dim() >= 2) == decayed], "weight_decay": recipe.weight_decay * decayed}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def _schedule(done: float, warmup: float) -> float:
    """Learning rate over its peak when the share `done` of the steps lies behind."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _publish(run: _Run) -> Path:
    """Write the encoder of now, without what only pre-training needs, and its card; returns its path."""
    recipe, store, encoder = run.recipe, run.store, run.learner.encoder
    config, device = encoder.config, next(encoder.parameters()).device
    seen = run.step * recipe.batch_size
    training = {
        "clips_seen": seen, "epochs": round(seen * config.window_frames / 360_000 / store.hours, 1),
        "hours_of_audio": round(store.hours, 2), "loss": round(run.log[-1]["loss"], 4),
        "held_out_loss": round(run.log[-1]["held_out_loss"], 4), "wall_minutes": round(run.seconds / 60, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"hear_ssam": __version__, "torch": torch.__version__},
        "recipe": recipe.to_dict() | {"init": Path(recipe.init).name}, "init": run.earlier,
        "teacher": run.codes.get("teacher", {}),
    }  # fmt: skip
    data = [{k: row.get(k, "") for k in ("name", "hours", "clips", "licence")} for row in store.info["sources"]]
    facts: dict[str, Any] = {"name": recipe.model, "source": "pre-trained by hear_ssam", "licence": "Apache-2.0"}
    facts |= {"training": training, "data": data}
    path = run.folder / f"{recipe.model}.safetensors"
    save_checkpoint(path, config, halved(encoder.state_dict()), facts)
    write_whole(run.folder / f"{recipe.model}.md", model_card(facts, store.info["sources"]))
    return path
