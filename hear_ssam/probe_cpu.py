"""The hidden block of the fast probe on a CPU: batch normalisation, dropout and ReLU as one kernel each way.

As separate operations they take a third of a training step, almost all of it to move activations between memory and
registers. A work unit is COLUMNS hidden units with all their rows, which stay in the L2 cache between the two passes
over them. The law is `torch.nn.functional.batch_norm` and what follows it in fast_probe; dropout masks come from
another generator, one 32-bit xorshift (Marsaglia 2003) per hidden unit, seeded anew for every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .simd import LANES, Kernel, build, run

COLUMNS = 256  # at least 512 bytes of every row: of less the CPU's prefetcher makes nothing
VECTORS = COLUMNS // LANES


def write_forward(k: Kernel, bf16: bool) -> None:
    """x = relu(dropout(scale (y - mean) / deviation + shift)); also the mean and 1 / deviation of every column."""
    y, x = k.tensor("y", 2, bf16), k.tensor("x", 2, bf16)
    scale, shift, mean, inverse, seed = (k.tensor(name, 1) for name in ("scale", "shift", "mean", "inverse", "seed"))
    options, rows = k.tensor("options", 1), k.integer("rows")
    per_row, epsilon, dropped, kept = (k.fill(options.load_number(i)) for i in range(4))
    origin, sums, squares, factor, offset, state = k.arrays(6, VECTORS)
    with k.loop(k.begin, k.end) as unit:
        first = unit * COLUMNS
        with k.loop(0, VECTORS) as v:
            origin[v], sums[v], squares[v] = y.load(0, first + v * LANES), k.constant(0.0), k.constant(0.0)
        # sums of differences from the first row: a large mean costs no digits of the variance
        with k.loop(0, rows) as row, k.loop(0, VECTORS) as v:
            difference = y.load(row, first + v * LANES) - origin[v]
            sums[v], squares[v] = sums[v] + difference, difference * difference + squares[v]
        with k.loop(0, VECTORS) as v:
            c, average = first + v * LANES, sums[v] * per_row
            variance = k.maximum(squares[v] * per_row - average * average, 0.0)
            average, deviation = average + origin[v], 1.0 / k.sqrt(variance + epsilon)
            mean.store(average, c)
            inverse.store(deviation, c)
            factor[v], state[v] = scale.load(c) * deviation, seed.load(c)
            offset[v] = shift.load(c) - average * factor[v]
        with k.loop(0, rows) as row, k.loop(0, VECTORS) as v:
            c, state[v] = first + v * LANES, k.xorshift(state[v])
            gain = k.select(k.uniform(state[v]), "<", dropped, k.constant(0.0), kept)
            x.store(k.maximum(y.load(row, c) * factor[v] + offset[v], 0.0) * gain, row, c)


def write_backward(k: Kernel, bf16: bool) -> None:
    """Gradients of y, scale and shift, given that of x."""
    y, x, dx, dy = (k.tensor(name, 2, bf16) for name in ("y", "x", "dx", "dy"))
    names = ("scale", "mean", "inverse", "dscale", "dshift")
    scale, mean, inverse, dscale, dshift = (k.tensor(name, 1) for name in names)
    options, rows = k.tensor("options", 1), k.integer("rows")
    per_row, kept = k.fill(options.load_number(0)), k.fill(options.load_number(3))
    average, sums, products, factor, slope, offset = k.arrays(6, VECTORS)
    with k.loop(k.begin, k.end) as unit:
        first = unit * COLUMNS
        with k.loop(0, VECTORS) as v:
            average[v], sums[v], products[v] = mean.load(first + v * LANES), k.constant(0.0), k.constant(0.0)
        with k.loop(0, rows) as row, k.loop(0, VECTORS) as v:
            c = first + v * LANES
            dz = k.select(x.load(row, c), ">", 0.0, dx.load(row, c), 0.0)  # 0: dropped or cut off
            sums[v], products[v] = sums[v] + dz, dz * (y.load(row, c) - average[v]) + products[v]
        with k.loop(0, VECTORS) as v:
            c = first + v * LANES
            deviation, total = inverse.load(c), sums[v] * kept
            product = products[v] * kept * deviation
            dshift.store(total, c)
            dscale.store(product, c)
            gain = scale.load(c) * deviation
            factor[v], slope[v], offset[v] = gain * kept, product * per_row * deviation * gain, total * per_row * gain
        with k.loop(0, rows) as row, k.loop(0, VECTORS) as v:
            c = first + v * LANES
            dz = k.select(x.load(row, c), ">", 0.0, dx.load(row, c) * factor[v], 0.0)
            dy.store(dz - offset[v] - (y.load(row, c) - average[v]) * slope[v], row, c)


class Hidden(torch.autograd.Function):
    """(rows, hidden) y, float32 or bfloat16 → x of the same kind, and mean and variance (hidden,) of the rows of y."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, dropout: float, epsilon: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, hidden = y.shape
        x, mean, inverse = torch.empty_like(y), torch.empty(hidden), torch.empty(hidden)
        seed = torch.empty(hidden, dtype=torch.int32).random_(1, None, generator=generator)  # 0 would stay 0
        options = torch.tensor([1 / rows, epsilon, dropout, 1 / (1 - dropout)])
        run(
            build(write_forward, y.dtype == torch.bfloat16), hidden // COLUMNS, y=y, x=x, scale=scale, shift=shift,
            mean=mean, inverse=inverse, seed=seed, options=options, rows=rows,
        )  # fmt: skip
        ctx.save_for_backward(y, x, scale, mean, inverse, options)
        variance = inverse.pow(-2).sub_(epsilon)
        ctx.mark_non_differentiable(mean, variance)
        return x, mean, variance

    @staticmethod
    def backward(ctx: Any, dx: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, scale, mean, inverse, options = ctx.saved_tensors
        rows, hidden = y.shape
        dy, dscale, dshift = torch.empty_like(y), torch.empty(hidden), torch.empty(hidden)
        run(
            build(write_backward, y.dtype == torch.bfloat16), hidden // COLUMNS, y=y, x=x, dx=dx.contiguous(), dy=dy,
            scale=scale, mean=mean, inverse=inverse, dscale=dscale, dshift=dshift, options=options, rows=rows,
        )  # fmt: skip
        return dy, dscale, dshift, None, None, None
