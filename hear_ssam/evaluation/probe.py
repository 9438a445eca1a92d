"""Stage two: shallow heads trained on a folder of embeddings, as heareval 2021.1.3 trains them.

`run_probe` is a plain PyTorch loop that consumes randomness in heareval's order, and so repeats heareval bit for bit
on the same machine, torch and thread count: initial weights, dropout masks, every validation loss and score. Two
habits of heareval are kept because they are part of its numbers: training rows are never shuffled, and the hidden
block is Linear → BatchNorm → Dropout → ReLU. One is repaired: a last batch of a single row, on which heareval
crashes, joins the batch before it.

With `bf16` the same trainer takes its products in bfloat16: other rounding, so another head of the same kind, sooner
where the CPU has instructions for them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam

from ..errors import HearSsamError, unknown_name
from ..machine import BF16, cpu
from .records import FoldResult, finite
from .rows import Rows, open_embeddings
from .scores import SCORES
from .tasks import DataSplit, Task


@dataclass(frozen=True)
class HeadConfig:
    """One grid point. Epochs are counted from 0; validation runs after every `check_val_every_n_epoch` epochs."""

    hidden_layers: int = 1
    hidden_dim: int = 1024
    initialization: str = "xavier_uniform"
    dropout: float = 0.1
    lr: float = 1e-3
    batch_size: int = 1024
    max_epochs: int = 500
    check_val_every_n_epoch: int = 3
    patience: int = 20  # validations without improvement


@dataclass(frozen=True)
class Protocol:
    """A named way to choose and repeat heads: grid values, how many shuffled grid points are tried, usual seeds."""

    grid: Mapping[str, Sequence[Any]]
    first_seed: int
    seeds: int
    grid_points: int = 8


_HEAREVAL_GRID = {
    "hidden_layers": (1, 2), "initialization": ("xavier_uniform", "xavier_normal"), "lr": (3.2e-3, 1e-3, 3.2e-4, 1e-4)
}  # fmt: skip
_SSAM_GRID = {"hidden_layers": (1,), "initialization": ("xavier_normal",), "lr": (1e-4,), "dropout": (0.1, 0.25)}
PROTOCOLS = {
    "heareval": Protocol(_HEAREVAL_GRID, first_seed=42, seeds=1),  # heareval 2021.1.3 as released: 8 of 16 points
    "ssam": Protocol(_SSAM_GRID, first_seed=0, seeds=10),  # the SSAM authors' kit: two points, seeds 0–9
}
# heareval's own exception for the task whose event scores were slow
_TASK_GRID = {"dcase2016_task2": {"check_val_every_n_epoch": (10,)}}


def named_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def grid_points(protocol: Protocol, metadata: Mapping[str, Any], seed: int) -> list[HeadConfig]:
    """The grid points to try, in heareval's order: names sorted, last one fastest, then shuffled by `seed`."""
    grid = {**protocol.grid, **_TASK_GRID.get(metadata.get("task_name", ""), {})}
    grid.update(metadata.get("evaluation_params", {}).get("task_specific_param_grid", {}))
    names = sorted(grid)
    combinations = itertools.product(*(grid[name] for name in names))
    points = [HeadConfig(**dict(zip(names, values, strict=True))) for values in combinations]
    random.Random(seed).shuffle(points)
    return points[: protocol.grid_points]


def batches(parts: Sequence[Tensor], size: int, *, merge_single: bool = False) -> list[Tensor]:
    """Cut the rows of all parts, one after the other, into batches of `size`; only a batch across parts is copied.

    `merge_single`: a last batch of one row joins the batch before it (batch normalisation needs two rows).
    """
    offsets = [0, *itertools.accumulate(len(part) for part in parts)]
    bounds = [*range(0, offsets[-1], size), offsets[-1]]
    if merge_single and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    cut = []
    for start, stop in itertools.pairwise(bounds):
        pieces = [part[max(0, start - at) : max(0, stop - at)] for part, at in zip(parts, offsets[:-1], strict=True)]
        pieces = [piece for piece in pieces if len(piece)]
        cut.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return cut


# ---- one head ------------------------------------------------------------------------------------------------------


def build_head(dim: int, classes: int, config: HeadConfig) -> nn.Sequential:
    """The untrained head: embeddings (rows, dim) → logits (rows, classes)."""
    initialize = {"xavier_uniform": nn.init.xavier_uniform_, "xavier_normal": nn.init.xavier_normal_}
    layers: list[nn.Module] = []
    for layer in range(config.hidden_layers + 1):
        last = layer == config.hidden_layers
        linear = nn.Linear(dim, classes if last else config.hidden_dim)
        initialize[config.initialization](linear.weight, gain=nn.init.calculate_gain("relu" if layer else "linear"))
        layers.append(linear)
        if not last:
            layers += [nn.BatchNorm1d(config.hidden_dim), nn.Dropout(config.dropout), nn.ReLU()]
            dim = config.hidden_dim
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class TrainedHead:
    """A head at its best validated epoch."""

    config: HeadConfig
    epoch: int
    validation_score: float  # of the first score, or the loss where the task selects by loss
    key: float  # larger is better
    head: nn.Sequential
    postprocessing: dict[str, float] | None  # of events, the best at that epoch
    history: list[dict[str, float]]  # epoch, val_loss, val_score of every validation


def head_loss(logits: Tensor, target: Tensor, multilabel: bool) -> Tensor:
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits, target.argmax(1))


def _draw_loader_seed() -> None:
    """heareval's data loaders draw one number whenever an epoch or a validation starts."""
    torch.empty((), dtype=torch.int64).random_()


@torch.no_grad()
def predict(head: nn.Sequential, x: Tensor, batch_size: int, multilabel: bool) -> tuple[Tensor, Tensor]:
    """Logits and probabilities (rows, classes) of a head in evaluation mode."""
    head.eval()
    logits = torch.cat([head(batch) for batch in batches([x], batch_size)])
    return logits, logits.sigmoid() if multilabel else logits.softmax(1)


def adam_step(parameters: list[Any], state: Any, lr: float, fused: bool) -> None:
    """A step of torch.optim.Adam, whose class would import torch's compiler: a second or two of every process."""
    with torch.no_grad():
        means, squares, none, steps = state  # `none`: of amsgrad
        adam(parameters, [x.grad for x in parameters], means, squares, none, steps, foreach=False, fused=fused, lr=lr,
             amsgrad=False, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, maximize=False)  # fmt: skip
    for x in parameters:
        x.grad = None


class _Bf16Product(torch.autograd.Function):
    """x Wᵀ + b of bfloat16. oneDNN multiplies a gradient that lies transposed in memory up to four times sooner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        down = gradient @ weight if ctx.needs_input_grad[0] else None
        return down, gradient.t().contiguous() @ x, gradient.sum(0)


def bf16_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in bfloat16, as autocast takes it: x (rows, in) → (rows, out), weights and gradients rounded.

    torch multiplies bfloat16 some five times slower than float32 on a CPU without instructions for it. There, float32
    products of the rounded values, rounded again, are the same numbers.
    """
    x, weight, bias = x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()
    if cpu()[1].isdisjoint(BF16):
        return F.linear(x.float(), weight.float(), bias.float()).bfloat16()
    return cast(Tensor, _Bf16Product.apply(x, weight, bias))  # type: ignore[no-untyped-call]


def bf16_dropout(layer: nn.Dropout, x: Tensor) -> Tensor:
    """Dropout by 16 random bits a number where torch draws 64; compared and scaled in place, six times sooner."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    scale = int(torch.tensor(1 / (1 - layer.p), dtype=torch.bfloat16).view(torch.int16))
    factor = bits[: x.numel()].ge_(round(layer.p * 2**16) - 2**15).mul_(scale).view(torch.bfloat16)  # 0 or 1 / (1 - p)
    return x * factor.view_as(x)


_BF16: dict[type, Callable[[Any, Tensor], Tensor]] = {nn.Linear: bf16_linear, nn.Dropout: bf16_dropout}


def train_head(
    task: Task, splits: Mapping[str, Rows], split: DataSplit, config: HeadConfig, *, bf16: bool = False
) -> TrainedHead:
    """Train one head. Uses torch's global generator, in heareval's order.

    heareval's rule to stop: keep the first best validation, end after `patience` without a better one or at NaN.
    `bf16` rounds the rows to train on, so their mean is taken off before: a large common offset would swallow what
    tells rows apart. Batch normalisation removes any offset; only its running mean must be told, and then the head
    takes rows as they are. A head without a hidden layer has no normalisation and is trained exactly.
    """
    bf16 = bf16 and config.hidden_layers > 0
    parts = [splits[name] for name in split.train]
    train_x = batches([part.x for part in parts], config.batch_size, merge_single=True)
    train_target = batches([part.target for part in parts], config.batch_size, merge_single=True)
    valid = splits[split.valid]
    dim = valid.x.shape[1]
    head: Any = build_head(dim, len(task.labels), config)
    torch.rand(64, dim)  # the dummy input with which heareval prints a summary of the head
    if bf16:
        offset = (torch.stack([x.sum(0, dtype=torch.float64) for x in train_x]).sum(0) / sum(map(len, train_x))).float()
        train_x = [(x - offset).bfloat16() for x in train_x]
    parameters = [*head.parameters()]
    state = *([torch.zeros_like(x) for x in parameters] for _ in range(2)), [], [torch.zeros(()) for _ in parameters]
    by_score = bool(task.metadata.get("use_scoring_for_early_stopping", True))  # usual; else heads compete by loss
    sign = 1 if by_score and SCORES[task.scores[0]].maximize else -1
    best: TrainedHead | None = None
    waited, history = 0, []
    for epoch in range(config.max_epochs):
        _draw_loader_seed()
        head.train()
        for x, target in zip(train_x, train_target, strict=True):
            for layer in head[:-1]:
                rounded = _BF16.get(type(layer)) if bf16 else None
                x = rounded(layer, x) if rounded else layer(x)
            # the last layer is small, and some CPUs add up its few columns in bfloat16
            torch.autograd.backward(head_loss(head[-1](x.float()), target, task.multilabel))
            if bf16:  # what centring took off the first layer's output
                head[1].running_mean.add_(head[0].weight.detach() @ offset, alpha=head[1].momentum)
            adam_step(parameters, state, config.lr, fused=bf16)
        if (epoch + 1) % config.check_val_every_n_epoch:
            continue
        _draw_loader_seed()
        logits, probability = predict(head, valid.x, config.batch_size, task.multilabel)
        loss = float(head_loss(logits, valid.target, task.multilabel))
        checked: dict[str, float] = {"epoch": epoch, "val_loss": loss}
        postprocessing = None
        if by_score:
            score, postprocessing = valid.judge.validate(probability.numpy())
            checked["val_score"] = float(np.float32(score))  # as heareval compares them
        history.append(checked)
        value = checked.get("val_score", loss)
        key = -math.inf if math.isnan(value) else sign * value
        waited += 1
        if best is None or key > best.key:
            best, waited = TrainedHead(config, epoch, value, key, copy.deepcopy(head), postprocessing, history), 0
        if waited >= config.patience or not math.isfinite(value):
            break
    if best is None:
        raise HearSsamError(f"{task.name}: max_epochs={config.max_epochs} ends before the first validation.")
    return best


# ---- one task ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """One task, one seed: the winning grid point, a result per test split, and the log of every training."""

    config: HeadConfig
    folds: list[FoldResult]
    histories: list[list[dict[str, float]]]  # grid points first, then the remaining folds


def run_probe(folder: Path, protocol: str, seed: int, *, bf16: bool = False) -> ProbeResult:
    """Judge the embeddings in `folder` (heareval's layout) by `protocol`, with `seed` for grid order and heads.

    Grid points compete on the first data split; the winner (ties: the earlier) is trained again on the others.
    Runs in one thread and in float32, whatever torch is set to; that and the state of its random generator are restored
    afterwards. `bf16` trains with products in bfloat16.
    """
    with torch.inference_mode(False):
        return probe_task(*open_embeddings(folder), protocol, seed, bf16=bf16)


def probe_task(task: Task, splits: Mapping[str, Rows], protocol: str, seed: int, *, bf16: bool = False) -> ProbeResult:
    """`run_probe` of a task that `open_embeddings` has read, for one of several seeds."""
    first, *others = task.data_splits
    histories: list[list[dict[str, float]]] = []

    def train(split: DataSplit, config: HeadConfig) -> TrainedHead:
        trained = train_head(task, splits, split, config, bf16=bf16)
        histories.append(trained.history)
        return trained

    with _as_new(seed):
        points = grid_points(named_protocol(protocol), task.metadata, seed)
        winner = max((train(first, config) for config in points), key=lambda trained: trained.key)  # ties: the earlier
        heads = [winner, *(train(split, winner.config) for split in others)]
        folds = [score_head(splits[split.test], head) for split, head in zip(task.data_splits, heads, strict=True)]
    return ProbeResult(winner.config, folds, histories)


@contextlib.contextmanager
def _as_new(seed: int) -> Iterator[None]:
    """torch as a new process with one thread has it, seeded; restored afterwards."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            torch.set_num_threads(1)
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def score_head(rows: Rows, trained: TrainedHead) -> FoldResult:
    """The result of a trained head on a test split."""
    logits, probability = predict(trained.head, rows.x, trained.config.batch_size, rows.task.multilabel)
    loss = finite(float(head_loss(logits, rows.target, rows.task.multilabel)))
    details = {"epoch": trained.epoch, "validation_score": finite(trained.validation_score), "loss": loss}
    scores = rows.judge.test(probability.numpy(), trained.postprocessing)
    return FoldResult(rows.split, scores, details, probability.numpy(), rows.target.numpy())
