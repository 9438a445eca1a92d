"""The probe of `probe`, for speed: the same heads, data order, stopping and selection with other random numbers.

Heads of one shape (grid points, seeds) train side by side on the same batches, each with its own initial weights,
dropout, normalisation statistics, stopping and best snapshot. Products are taken in bfloat16 where the processor or
GPU multiplies it faster, everything else in float32. On a GPU such heads go together; on a CPU one by one, which keeps
them in its cache, or a few in parallel. Scores are those of another seed of the exact probe, not the same numbers.

Embeddings are centred before they are rounded, or a large common offset would swallow their differences. Batch
normalisation takes any offset away, so the heads learn the same; what the offset would have added is put back in
float32, because the running statistics of the first epochs depend on it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import HearSsamError
from .machine import cpu
from .probe import (
    EarlyStopping,
    HeadConfig,
    ProbeResult,
    Rows,
    TrainedHead,
    batches,
    build_head,
    grid_points,
    head_loss,
    make_judge,
    named_protocol,
    open_embeddings,
    score_heads,
    selection_sign,
    selects_by_score,
    validation,
)
from .tasks import DataSplit, Task

if TYPE_CHECKING:
    from .probe_cpu import RoundedWeight

MOMENTUM, EPSILON = 0.1, 1e-5  # of normalisation; the defaults of nn.BatchNorm1d
BLOCK = 4096  # rows of embeddings that are in memory in float32 at a time


def run_fast_probe(
    folder: Path,
    protocol: str,
    seeds: Sequence[int],
    device: str = "cpu",
    threads: int = 1,
    core: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], object] = lambda heads: None,
) -> list[ProbeResult]:
    """As `probe.run_probe`, for several seeds at once; one result per seed, in order.

    The grid points of all seeds train together on the first data split, then the winners of all seeds on the others.
    On a CPU up to `threads` heads train at a time, each while it holds `core`, a semaphore that other processes may
    share; the result of a seed depends on that seed alone. `progress` is told how many heads have been trained.
    """
    task, splits = open_embeddings(folder)
    place = torch.device(device)
    data = _Data(task, splits, row_space([rows.x for rows in splits.values()], place), place)
    first, *others = task.data_splits
    points = [grid_points(named_protocol(protocol), task.metadata, seed) for seed in seeds]
    rivals = [
        _Training(first, config, _stream(seed, 0, number))
        for seed, configs in zip(seeds, points, strict=True)
        for number, config in enumerate(configs)
    ]
    trained = iter(_train_all(data, rivals, threads, core, progress))
    grids = [list(itertools.islice(trained, len(configs))) for configs in points]  # one list per seed
    winners = [max(heads, key=lambda head: head.key) for heads in grids]  # ties: the first
    rest = [
        _Training(split, winner.config, _stream(seed, number, 0))
        for seed, winner in zip(seeds, winners, strict=True)
        for number, split in enumerate(others, 1)
    ]
    trained = iter(_train_all(data, rest, threads, core, progress))
    results = []
    for heads, winner in zip(grids, winners, strict=True):
        folds = [winner, *itertools.islice(trained, len(others))]
        histories = [head.history for head in (*heads, *folds[1:])]
        results.append(score_heads(task, splits, folds, histories))
    return results


def _stream(*numbers: int) -> int:
    """The seed of a head's own random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class _Data:
    """What all heads of a task train on."""

    task: Task
    splits: Mapping[str, Rows]
    basis: Tensor | None  # of `row_space`
    device: torch.device


class _CentredRows:
    """One data split, made ready for heads of one shape: centred, in few coordinates, rounded for the products."""

    def __init__(self, data: _Data, split: DataSplit) -> None:
        train, valid = [data.splits[name] for name in split.train], data.splits[split.valid]
        self.data, self.dtype = data, product_dtype(data.device)
        self.offset = _mean([rows.x for rows in train])
        self.x = torch.cat([self._ready(rows.x) for rows in train])
        self.target = torch.cat([rows.target for rows in train]).to(data.device)
        self.valid_x, self.valid_target = self._ready(valid.x), valid.target.to(data.device)
        self.judge = make_judge(data.task, split.valid, valid)

    def _ready(self, rows: Tensor) -> Tensor:
        basis, device = self.data.basis, self.data.device
        dim = rows.shape[1] if basis is None else 2 * len(basis)
        ready = torch.empty(len(rows), dim, dtype=self.dtype, device=device)
        for source, target in zip(rows.split(BLOCK), ready.split(BLOCK), strict=True):
            x = source.to(device) - self.offset.to(device)
            target.copy_(x if basis is None else coordinates(x, basis, self.dtype))
        return ready


def _blocks(parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all parts, at most BLOCK at a time."""
    return [block for part in parts for block in part.split(BLOCK)]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean row, float32 (dim,)."""
    blocks = _blocks(parts)
    total = sum((block.sum(0, dtype=torch.float64) for block in blocks), torch.zeros(()))
    return (total / sum(map(len, blocks))).float()


def row_space(parts: Sequence[Tensor], device: torch.device | None = None, batch_size: int = 1024) -> Tensor | None:
    """An orthonormal basis (rank, dim) of what the rows of all parts have beside their mean.

    None if the rank is so high that the basis would not make products cheaper. Averages of log-mel frames under a
    random projection to 4096 dimensions, say, span no more dimensions than there are mel bands, and a product x wᵀ is
    then (x basisᵀ) (w basisᵀ)ᵀ, two thin products. Found from random combinations of the rows (Halko, Martinsson and
    Tropp 2011, algorithm 4.1). No row loses more than 1e-3 of its norm, which is what rounding to bfloat16 costs it.
    """
    blocks, mean = _blocks(parts), _mean(parts).to(device)
    size, dim = min(sum(map(len, blocks)), batch_size), len(mean)
    limit = size * dim * 3 // (4 * (size + dim))  # a rank that saves a quarter of the multiplications
    generator = torch.Generator().manual_seed(0)
    sketch = torch.zeros(limit, dim, dtype=torch.float64, device=device)
    for block in blocks:
        sketch += torch.randn(limit, len(block), generator=generator).to(device) @ (block.to(device) - mean)
    sketch /= sketch.abs().max().clamp(min=1e-30) if limit else 1
    sizes, directions = torch.linalg.eigh(sketch @ sketch.mT)
    large = sizes > 1e-12 * sizes[-1:]  # squares: singular values down to 1e-6 of the largest
    if large.all():
        return None
    basis = ((directions[:, large] / sizes[large].sqrt()).mT @ sketch).float()
    for block in blocks:
        x = block.to(device) - mean
        if not (torch.linalg.norm(x - x @ basis.mT @ basis, dim=1) <= 1e-3 * torch.linalg.norm(x, dim=1)).all():
            return None
    return basis


def coordinates(x: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Centred rows (rows, dim) → (rows, 2 rank): coordinates rounded to `dtype`, then what rounding took off them.

    A few directions (loudness) can hold nearly all of the rows: what rounding does there is more than others hold.
    """
    x = x @ basis.mT
    return torch.cat([x.to(dtype), (x - x.to(dtype)).to(dtype)], 1)


@dataclass(frozen=True)
class _Training:
    """One head to train."""

    split: DataSplit
    config: HeadConfig
    stream: int  # seed of its random numbers


def _side_by_side(device: torch.device) -> bool:
    """Whether heads that differ in initialisation, dropout and stream alone train together, or one by one."""
    return device.type == "cuda"


def _train_all(
    data: _Data,
    trainings: Sequence[_Training],
    threads: int,
    core: AbstractContextManager[Any] | None,
    progress: Callable[[int], object],
) -> list[TrainedHead]:
    """Train one head each; the state of torch's random generators is restored."""
    side_by_side = _side_by_side(data.device)
    groups: dict[object, list[int]] = {}
    for number, training in enumerate(trainings):
        shape = dataclasses.replace(training.config, initialization="", dropout=0.0)
        groups.setdefault((training.split.test, shape) if side_by_side else number, []).append(number)
    singles = []
    with torch.random.fork_rng(devices=[]):
        for training in trainings:
            torch.default_generator.manual_seed(training.stream)
            dim = data.splits[training.split.valid].x.shape[1]
            singles.append(build_head(dim, len(data.task.labels), training.config))

    def train(numbers: list[int]) -> list[TrainedHead]:
        with core or nullcontext():
            return _train(data, [trainings[number] for number in numbers], [singles[number] for number in numbers])

    trained: dict[int, TrainedHead] = {}
    with ThreadPoolExecutor(1 if side_by_side else threads) as pool:
        for numbers, heads in zip(groups.values(), pool.map(train, groups.values()), strict=True):
            trained |= zip(numbers, heads, strict=True)
            progress(len(numbers))
    return [trained[number] for number in range(len(trainings))]


def _train(data: _Data, trainings: Sequence[_Training], singles: Sequence[nn.Sequential]) -> list[TrainedHead]:
    """Train heads of one shape together; finished ones go along until the last has stopped."""
    task, device, common = data.task, data.device, trainings[0].config
    rows = _CentredRows(data, trainings[0].split)
    xs, targets = (batches([part], common.batch_size, merge_single=True) for part in (rows.x, rows.target))
    generator = torch.Generator(device).manual_seed(trainings[0].stream)
    heads = _Heads(singles, [t.config.dropout for t in trainings], rows.dtype, rows.offset, data.basis, generator)
    heads.to(device)
    heads.round_weights(common.lr)
    optimizer = torch.optim.Adam(heads.parameters(), lr=common.lr, fused=True)
    stopping = [EarlyStopping(selection_sign(task), common.patience) for _ in trainings]
    best: list[tuple[Any, dict[str, float] | None]] = [(None, None) for _ in trainings]
    histories: list[list[dict[str, float]]] = [[] for _ in trainings]
    for epoch in range(common.max_epochs):
        heads.train()
        for x, target in zip(xs, targets, strict=True):
            heads.zero_grad()
            # heads do not share parameters, so the sum of their losses trains each by its own
            torch.stack([head_loss(logits, target, task.multilabel) for logits in heads(x)]).sum().backward()
            optimizer.step()
            for weight in heads.rounded.values():
                weight.step()
        if (epoch + 1) % common.check_val_every_n_epoch:
            continue
        heads.eval()
        with torch.no_grad():
            # (heads, rows, classes)
            outputs = torch.cat([heads(x) for x in batches([rows.valid_x], common.batch_size)], 1)
            probabilities = (outputs.sigmoid() if task.multilabel else outputs.softmax(2)).cpu().numpy()
            losses = [float(head_loss(logits, rows.valid_target, task.multilabel)) for logits in outputs]
        for number, stop in enumerate(stopping):
            if stop.stop:
                continue
            checked, postprocessing = validation(task, rows.judge, epoch, losses[number], probabilities[number])
            histories[number].append(checked)
            value = checked.get("val_score", losses[number])
            if stop.improved(epoch, value):
                best[number] = heads.snapshot(number), postprocessing
            stop.stop |= value == _perfect(task)  # nothing later can be better than that
        if all(stop.stop for stop in stopping):
            break
    trained = []
    for training, stop, single, history, (state, postprocessing) in zip(
        trainings, stopping, singles, histories, best, strict=True
    ):
        if stop.epoch is None:
            raise HearSsamError(f"{task.name}: max_epochs={common.max_epochs} ends before the first validation.")
        single.load_state_dict(state)
        trained.append(TrainedHead(training.config, stop.epoch, stop.value, stop.key, single, postprocessing, history))
    return trained


def _perfect(task: Task) -> float | None:
    """The best value that validation can take, where there is one."""
    if not selects_by_score(task) or task.scores[0] == "d_prime":
        return None
    return 1.0 if selection_sign(task) > 0 else 0.0


class _Heads(nn.Module):
    """Heads of one shape, their parameters stacked along a first dimension."""

    threshold: Tensor  # (heads,) a 16-bit random number up to it drops its unit
    scale: Tensor  # (heads,) of units that are kept
    offset: Tensor  # (dim,) what was taken off the rows
    basis: Tensor | None  # (rank, dim) of the rows' `coordinates`

    def __init__(
        self,
        singles: Sequence[nn.Sequential],
        dropout: Sequence[float],
        dtype: torch.dtype,
        offset: Tensor,
        basis: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.dropout, self.generator = dtype, dropout, generator
        self.layers = [number for number, layer in enumerate(singles[0]) if isinstance(layer, nn.Linear)]
        states = [single.state_dict() for single in singles]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self.fused = _fused_block(len(singles), len(stacked["0.bias"][0]))
        # batch normalisation removes a bias before it: those stay as they were drawn
        self.fixed = {f"{number}.bias" for number in self.layers[:-1]}
        trainable = {name for name, _ in singles[0].named_parameters()} - self.fixed
        self.names = list(stacked)
        for name, tensor in stacked.items():
            key = name.replace(".", "_")
            if name in trainable:
                self.register_parameter(key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor)
        self.rounded: dict[int, RoundedWeight] = {}  # of layers
        self.register_buffer("threshold", torch.tensor([round(p * 65536) - 32769.0 for p in dropout]))
        self.register_buffer("scale", torch.tensor([1 / (1 - p) for p in dropout]))
        self.register_buffer("offset", offset)
        self.register_buffer("basis", None if basis is None else basis.to(dtype))

    def round_weights(self, lr: float) -> None:
        """Where it applies, take the weights of the hidden layers from autograd and torch's Adam to probe_cpu's."""
        if self.fused is None or self.dtype != torch.bfloat16 or self.offset.device.type != "cpu":
            return
        from .probe_cpu import LANES, RoundedWeight

        for number in self.layers[:-1]:
            (weight,) = getattr(self, f"{number}_weight").requires_grad_(False)
            if weight.shape[1] % LANES == 0:
                offset = torch.zeros(weight.shape[1]) if number else self.offset
                self.rounded[number] = RoundedWeight(weight, offset, lr)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, dim), or (rows, 2 rank) of `coordinates` → logits (heads, rows, classes)."""
        count = len(self.threshold)
        for number in self.layers:
            last = number == self.layers[-1]
            weight, shift = (getattr(self, f"{number}_{name}") for name in ("weight", "bias"))  # (H, out, in), (H, out)
            rounded = self.rounded.get(number)
            if rounded:
                weight = rounded.rounded[None]
            if number == 0:  # all heads read the same rows: one product
                w = weight.flatten(0, 1)
                if self.basis is not None:
                    w = self._product(w, self.basis).repeat(1, 2)
                y = self._product(x, w).view(len(x), count, -1)
                # normalisation lets no gradient pass to what all rows share
                seen = rounded.times_offset if rounded else (weight if last else weight.detach()) @ self.offset
                shift = shift + seen
            else:
                y = self._product(x, weight).transpose(0, 1)
            if last:
                return (y.to(shift.dtype) + shift).transpose(0, 1)
            x = self._hidden(y, shift.detach().flatten(), number + 1).transpose(0, 1)
        raise AssertionError("a head without layers")

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        """x wᵀ, operands and result rounded to `dtype`; its gradients are such products too."""
        return x.to(self.dtype) @ w.to(self.dtype).mT

    def _hidden(self, y: Tensor, shift: Tensor, number: int) -> Tensor:
        """Normalisation of y + shift (rows, H, hidden), dropout, ReLU."""
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, bias = (getattr(self, f"{number}_{name}").view(-1) for name in names)
        if not self.training:
            return F.batch_norm(y.flatten(1).to(mean.dtype), mean - shift, variance, scale, bias).relu_().view(y.shape)
        if self.fused and y.device.type == "cpu" and len(y) > 1:
            x, now, spread = self.fused(y.flatten(1), scale, bias, self.dropout[0], EPSILON, self.generator)
            mean.lerp_(now + shift, MOMENTUM)
            variance.lerp_(spread * (len(y) / (len(y) - 1)), MOMENTUM)
            return x.view(y.shape)
        mean.add_(shift, alpha=MOMENTUM / (1 - MOMENTUM))  # of which 1 - MOMENTUM is kept
        z = F.batch_norm(y.flatten(1).to(mean.dtype), mean, variance, scale, bias, True, MOMENTUM, EPSILON)
        z = z.view(y.shape)
        return z.mul_(self._dropout(z.shape)).relu_()

    def _dropout(self, shape: torch.Size) -> Tensor:
        """Scale of kept and zero of dropped units; four units share a 64-bit random number."""
        bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=self.scale.device)
        bits.random_(-(2**63), None, generator=self.generator)
        # arithmetic on whole numbers in float32: several times as fast as comparing them
        kept = bits.view(torch.int16)[: shape.numel()].view(shape).float().sub_(self.threshold[:, None]).clamp_(0, 1)
        return kept.mul_(self.scale[:, None])

    def snapshot(self, number: int) -> dict[str, Tensor]:
        """A copy of one head's state, as its own nn.Sequential names it."""
        state = {name: getattr(self, name.replace(".", "_"))[number] for name in self.names}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def _fused_block(heads: int, hidden_dim: int) -> Any:
    """probe_cpu's twin of `_Heads._hidden` in training, None where it does not apply."""
    if heads > 1 or importlib.util.find_spec("llvmlite") is None:
        return None
    from .probe_cpu import COLUMNS, Hidden

    return Hidden.apply if hidden_dim % COLUMNS == 0 else None


def product_dtype(device: torch.device) -> torch.dtype:
    """Of the products' operands: bfloat16 on GPUs and on CPUs with instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu()[1] & {"avx512_bf16", "amx_bf16"} else torch.float32
