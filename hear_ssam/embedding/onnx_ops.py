"""What ONNX lacks, in ONNX: the selective scan as a Scan over time, the causal convolution as a Conv, a Fourier sum.

Imported by `export` only: it needs onnxscript, which reads the source of what is decorated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op


@script(default_opset=op)
def recurrence(u: FLOAT, dt: FLOAT, a: FLOAT, b: FLOAT, c: FLOAT, h0: FLOAT) -> tuple[FLOAT, FLOAT]:
    """u, dt (B, L, D), a (N, D), b, c (B, L, N), h0 (B, N, D) → y (B, L, D), the last state."""

    @graph()
    def step(h, u_t, dt_t, b_t, c_t):  # type: ignore[no-untyped-def]
        now = op.Exp(op.Unsqueeze(dt_t, [1]) * a) * h + op.Unsqueeze(b_t, [2]) * op.Unsqueeze(dt_t * u_t, [1])
        y_t = op.Squeeze(op.MatMul(op.Unsqueeze(c_t, [1]), now), [1])
        return now, y_t

    last, y = op.Scan(h0, u, dt, b, c, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1])
    return y, last


def selective_scan(
    u: Any, delta: Any, a: Any, b: Any, c: Any, d: Any, z: Any, bias: Any, initial_state: Any, softplus: bool,
    reverse: bool, *_: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`hear_ssam::selective_scan` for the encoders, which begin without a state; training reads the third output."""
    dt = op.Add(delta, bias)
    dt = op.Softplus(dt) if softplus else dt
    (batch, _, channels), (_, state) = u.shape, a.shape
    h0 = op.Expand(op.Constant(value_float=0.0), op.Constant(value_ints=[batch, state, channels]))
    ordered = [_flip(x, 1) if reverse else x for x in (u, dt, b, c)]
    y, last = recurrence(*ordered[:2], op.Transpose(a, perm=[1, 0]), *ordered[2:], h0)
    y = op.Add(_flip(y, 1) if reverse else y, op.Mul(d, u))
    if z is not None:
        y = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return y, op.Transpose(last, perm=[0, 2, 1]), op.Identity(last)


def causal_conv1d(x: Any, weight: Any, bias: Any, initial_state: Any, activation: bool, reverse: bool, *_: Any) -> Any:
    """`hear_ssam::causal_conv1d` for the encoders, which begin without a state."""
    channels, kernel = weight.shape
    taps = op.Unsqueeze(_flip(weight, 1) if reverse else weight, op.Constant(value_ints=[1]))  # (D, 1, K)
    pads = [0, kernel - 1] if reverse else [kernel - 1, 0]
    y = op.Conv(op.Transpose(x, perm=[0, 2, 1]), taps, bias, group=channels, pads=pads)
    y = op.Transpose(y, perm=[0, 2, 1])
    return op.Mul(y, op.Sigmoid(y)) if activation else y


def fourier(x: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    """`aten::_fft_r2c` over the last axis, as real and imaginary parts (..., bins, 2), by a table of sines: the DFT of
    onnxruntime is less exact, by 3e-4 in an embedding."""
    length = x.shape[-1]
    turns = np.outer(np.arange(length), np.arange(length // 2 + 1)) % length * (2 * np.pi / length)
    table = np.stack([np.cos(turns), -np.sin(turns)], axis=2).astype(np.float32).reshape(length, -1)
    parts = op.MatMul(x, op.Constant(value=numpy_helper.from_array(table)))
    return op.Reshape(parts, op.Constant(value_ints=[*x.shape[:-1], length // 2 + 1, 2]))


def _flip(x: Any, axis: int) -> Any:
    first, past, axes, step = (op.Constant(value_ints=[number]) for number in (-1, -(1 << 31), axis, -1))
    return op.Slice(x, first, past, axes, step)
