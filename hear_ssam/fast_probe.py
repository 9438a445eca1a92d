"""The probe of `probe`, for speed: the same heads, data order, stopping and selection with other random numbers.

Heads of one shape (grid points, seeds) train side by side on the same batches, each with its own initial weights,
dropout, normalisation statistics, stopping and best snapshot. Products are taken in bfloat16 where the processor or
GPU multiplies it faster, everything else in float32. On a CPU heads go one by one, which keeps them in its cache; on
a GPU all together. Scores are those of another seed of the exact probe, not the same numbers.

Embeddings are centred before they are rounded, or a large common offset would swallow their differences. Batch
normalisation takes any offset away, so the heads learn the same; what the offset would have added is put back in
float32, because the running statistics of the first epochs depend on it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def run_fast_probe(folder: Path, protocol: str, seeds: Sequence[int], device: str = "cpu") -> list[ProbeResult]:
    """As `probe.run_probe`, for several seeds at once; one result per seed, in order.

    The grid points of all seeds train together on the first data split, then for each other split the winners of all
    seeds. The state of torch's random generators is restored afterwards.
    """
    task, splits = open_embeddings(folder)
    place = torch.device(device)
    first, *others = task.data_splits
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seeds[0])
        points = [grid_points(named_protocol(protocol), task.metadata, seed) for seed in seeds]
        trained = iter(_train_all(task, splits, first, list(itertools.chain(*points)), place))
        rivals = [list(itertools.islice(trained, len(configs))) for configs in points]  # one list per seed
        winners = [max(heads, key=lambda head: head.key) for heads in rivals]  # ties: the first
        rest = [_train_all(task, splits, split, [winner.config for winner in winners], place) for split in others]
    results = []
    for number, winner in enumerate(winners):
        heads = [winner, *(fold[number] for fold in rest)]
        histories = [head.history for head in (*rivals[number], *heads[1:])]
        results.append(score_heads(task, splits, heads, histories))
    return results


def _train_all(
    task: Task, splits: dict[str, Rows], split: DataSplit, configs: Sequence[HeadConfig], device: torch.device
) -> list[TrainedHead]:
    """Train one head per config: on a GPU those together that differ in initialisation and dropout alone."""
    if device.type == "cpu":
        return [_train(task, splits, split, [config], device)[0] for config in configs]
    trained: dict[int, TrainedHead] = {}

    def shape(number: int) -> HeadConfig:
        return dataclasses.replace(configs[number], initialization="", dropout=0.0)

    order = sorted(range(len(configs)), key=lambda number: repr(shape(number)))
    for _, group in itertools.groupby(order, key=shape):
        numbers = list(group)
        heads = _train(task, splits, split, [configs[number] for number in numbers], device)
        trained |= zip(numbers, heads, strict=True)
    return [trained[number] for number in range(len(configs))]


def _train(
    task: Task, splits: dict[str, Rows], split: DataSplit, configs: Sequence[HeadConfig], device: torch.device
) -> list[TrainedHead]:
    """Train heads of one shape together; finished ones go along until the last has stopped."""
    common = configs[0]
    dtype = product_dtype(device)
    product = _Bf16Product.apply if dtype == torch.bfloat16 else _float_product
    parts = [splits[name] for name in split.train]
    xs = batches([part.x for part in parts], common.batch_size, merge_single=True)
    targets = batches([part.target for part in parts], common.batch_size, merge_single=True)
    offset = sum((part.x.sum(0, dtype=torch.float64) for part in parts), torch.zeros(())) / sum(map(len, parts))
    offset = offset.float() if common.hidden_layers else torch.zeros(xs[0].shape[1])
    train = [((x - offset).to(device, dtype), target.to(device)) for x, target in zip(xs, targets, strict=True)]
    valid = splits[split.valid]
    valid_x, valid_target = (valid.x - offset).to(device, dtype), valid.target.to(device)
    judge = make_judge(task, split.valid, valid)
    perfect = _perfect(task)

    singles = [build_head(valid.x.shape[1], len(task.labels), config) for config in configs]
    heads = _Heads(singles, [config.dropout for config in configs], product, offset).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=common.lr, fused=True)
    stopping = [EarlyStopping(selection_sign(task), config.patience) for config in configs]
    best: list[tuple[Any, dict[str, float] | None]] = [(None, None) for _ in configs]
    histories: list[list[dict[str, float]]] = [[] for _ in configs]
    for epoch in range(common.max_epochs):
        heads.train()
        for x, target in train:
            optimizer.zero_grad()
            # heads do not share parameters, so the sum of their losses trains each by its own
            torch.stack([head_loss(logits, target, task.multilabel) for logits in heads(x)]).sum().backward()
            optimizer.step()
        if (epoch + 1) % common.check_val_every_n_epoch:
            continue
        heads.eval()
        with torch.no_grad():
            outputs = heads(valid_x)  # (heads, rows, classes)
            probabilities = (outputs.sigmoid() if task.multilabel else outputs.softmax(2)).cpu().numpy()
            losses = [float(head_loss(logits, valid_target, task.multilabel)) for logits in outputs]
        for number, stop in enumerate(stopping):
            if stop.stop:
                continue
            checked, postprocessing = validation(task, judge, epoch, losses[number], probabilities[number])
            histories[number].append(checked)
            value = checked.get("val_score", losses[number])
            if stop.improved(epoch, value):
                best[number] = heads.snapshot(number), postprocessing
            stop.stop |= value == perfect  # nothing later can be better than that
        if all(stop.stop for stop in stopping):
            break
    trained = []
    for number, (stop, config, single) in enumerate(zip(stopping, configs, singles, strict=True)):
        if stop.epoch is None:
            raise HearSsamError(f"{task.name}: max_epochs={config.max_epochs} ends before the first validation.")
        state, postprocessing = best[number]
        single.load_state_dict(state)
        trained.append(TrainedHead(config, stop.epoch, stop.value, stop.key, single, postprocessing, histories[number]))
    return trained


def _perfect(task: Task) -> float | None:
    """The best value that validation can take, where there is one."""
    if not selects_by_score(task) or task.scores[0] == "d_prime":
        return None
    return 1.0 if selection_sign(task) > 0 else 0.0


class _Heads(nn.Module):
    """Heads of one shape, their parameters stacked along a first dimension."""

    threshold: Tensor  # (heads,) a 16-bit random number below it drops its unit
    scale: Tensor  # (heads,) of units that are kept
    offset: Tensor  # (dim,) what was taken off the rows

    def __init__(
        self, singles: Sequence[nn.Sequential], dropout: Sequence[float], product: Any, offset: Tensor
    ) -> None:
        super().__init__()
        self.product = product
        stacked: dict[str, Tensor] = {}
        for name in singles[0].state_dict():
            stacked[name] = torch.stack([single.state_dict()[name] for single in singles])
        self.names = list(stacked)
        trainable = {name for name, _ in singles[0].named_parameters()}
        for name, tensor in stacked.items():
            key = name.replace(".", "_")
            if name in trainable:
                self.register_parameter(key, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(key, tensor.clone())
        self.layers = [number for number, layer in enumerate(singles[0]) if isinstance(layer, nn.Linear)]
        threshold = torch.tensor([round(p * 65536) - 32768 for p in dropout], dtype=torch.int32)
        self.register_buffer("threshold", threshold)
        self.register_buffer("scale", torch.tensor([1 / (1 - p) for p in dropout]))
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, dim) → logits (heads, rows, classes)."""
        count = len(self.threshold)
        for number in self.layers:
            weight, bias = (getattr(self, f"{number}_{name}") for name in ("weight", "bias"))  # (H, out, in), (H, out)
            if number == 0:  # all heads read the same rows: one product
                shift = bias + weight.detach() @ self.offset  # the normalisation that follows lets no gradient pass
                y = self.product(x, weight.flatten(0, 1)).add_(shift.flatten())  # (n, H out)
            else:
                y = self.product(x, weight).add_(bias[:, None]).transpose(0, 1).flatten(1)
            if number == self.layers[-1]:
                return y.view(len(y), count, -1).transpose(0, 1)
            names = ("running_mean", "running_var", "weight", "bias")
            mean, variance, scale, shift = (getattr(self, f"{number + 1}_{name}").view(-1) for name in names)
            y = F.batch_norm(y, mean, variance, scale, shift, self.training).view(len(y), count, -1)  # (n, H, hidden)
            if self.training:
                y.mul_(self._dropout(y.shape))
            x = y.relu_().transpose(0, 1)  # (H, n, hidden)
        raise AssertionError("a head without layers")

    def _dropout(self, shape: torch.Size) -> Tensor:
        """Scale of kept and zero of dropped units; four units share a 64-bit random number."""
        bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=self.scale.device)
        bits.random_(-(2**63), None)
        kept = bits.view(torch.int16)[: shape.numel()].view(shape) >= self.threshold[:, None]
        return kept * self.scale[:, None]

    def snapshot(self, number: int) -> dict[str, Tensor]:
        """A copy of one head's state, as its own nn.Sequential names it."""
        state = {name: getattr(self, name.replace(".", "_"))[number] for name in self.names}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


class _Bf16Product(torch.autograd.Function):
    """x wᵀ with operands rounded to bfloat16 and sums in float32, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        return (x @ w.mT).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        gradient = gradient.bfloat16()
        to_x = (gradient @ w).float() if ctx.needs_input_grad[0] else None
        return to_x, (gradient.mT @ x).float()


def _float_product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.mT


def product_dtype(device: torch.device) -> torch.dtype:
    """Of the products' operands: bfloat16 on GPUs and on CPUs with instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu()[1] & {"avx512_bf16", "amx_bf16"} else torch.float32
