"""What the fast probe does beside matrix products, as CPU kernels that pass over memory as seldom as possible.

`Hidden` is batch normalisation, dropout and ReLU; as separate operations they take a third of a training step, almost
all of it to move activations between memory and registers. A work unit is COLUMNS hidden units with all their rows,
which stay in the L2 cache between the two passes over them. The law is `torch.nn.functional.batch_norm` and what
follows it in fast_probe; dropout masks come from another generator, one 32-bit xorshift (Marsaglia 2003) per hidden
unit, seeded anew for every call. `RoundedWeight` is `torch.optim.Adam` for a matrix of which products read a bfloat16
copy.
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


def write_adam(k: Kernel) -> None:
    """One step of Adam for whole rows of a matrix, its bfloat16 copy, and partial sums of its product with `offset`."""
    weight, mean, square, partial = (k.tensor(name, 2) for name in ("weight", "mean", "square", "partial"))
    gradient, rounded = k.tensor("gradient", 2, bf16=True), k.tensor("rounded", 2, bf16=True)
    offset, options, vectors = k.tensor("offset", 1), k.tensor("options", 1), k.integer("vectors")
    rate, correction, new_mean, new_square, epsilon = (k.fill(options.load_number(i)) for i in range(5))
    with k.loop(k.begin, k.end) as row:
        total = k.variable(k.constant(0.0))
        with k.loop(0, vectors) as v:
            c = v * LANES
            g, m, s = gradient.load(row, c), mean.load(row, c), square.load(row, c)
            m = (g - m) * new_mean + m
            s = g * g * new_square + (s - s * new_square)
            w = weight.load(row, c) - rate * m / (k.sqrt(s) * correction + epsilon)
            mean.store(m, row, c)
            square.store(s, row, c)
            weight.store(w, row, c)
            rounded.store(w, row, c)
            total.value = w * offset.load(c) + total.value
        partial.store(total.value, row, 0)


class RoundedWeight:
    """A float32 matrix (out, in) under Adam, changed in place, and what the products need of it.

    rounded        its bfloat16 copy, whose `grad` `step` takes
    times_offset   its product (out,) with `offset` (in,), kept up to date because a step passes over it anyway
    """

    def __init__(self, weight: Tensor, offset: Tensor, lr: float) -> None:
        self.weight, self.offset, self.lr, self.steps = weight, offset, lr, 0
        self.mean, self.square = torch.zeros_like(weight), torch.zeros_like(weight)
        self.rounded = weight.bfloat16().requires_grad_()
        self.times_offset = weight @ offset

    def step(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        gradient, self.rounded.grad = self.rounded.grad, None
        assert gradient is not None
        self.steps += 1
        rate, correction = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps) ** -0.5
        options = torch.tensor([rate, correction, 1 - beta1, 1 - beta2, epsilon])
        partial = torch.empty(len(self.weight), LANES)
        run(
            build(write_adam), len(partial), weight=self.weight, mean=self.mean, square=self.square, partial=partial,
            gradient=gradient.contiguous(), rounded=self.rounded.detach(), offset=self.offset, options=options,
            vectors=self.weight.shape[1] // LANES,
        )  # fmt: skip
        self.times_offset = partial.sum(1)


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
