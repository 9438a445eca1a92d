"""The reference: selective scan and causal depthwise convolution as plain loops, in any float dtype.

Every backend is tested against these two functions in float64, gradients included.

Glossary (Gu & Dao 2023, "Mamba", section 3 and algorithm 2)
    B, L, D, N   batch, length, channels, state size
    u            input of the state space model            (B, L, D)
    delta        step size; softplus(delta + delta_bias)   (B, L, D)
    A            transition, negative                      (D, N)
    B, C         input and output matrices, per token      (B, L, N)
    D            skip connection                           (D,)
    z            gate                                      (B, L, D)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SAVE_EVERY = 16  # steps between the states that the backends keep for their backward pass


class ScanInputs(NamedTuple):
    """The tensors of a scan, B, L, D, N as above; also their gradients, which have the same shapes."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor  # (D,)
    initial_state: Tensor | None  # (B, D, N); None: zeros


def as_given(grads: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> list[Any]:
    """Gradients in the dtypes of their inputs and dense, as the ops declare them; None where there is no input."""
    pairs = zip(grads, inputs, strict=True)
    return [None if x is None or g is None else g.to(x.dtype).contiguous() for g, x in pairs]


def selective_scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = <h_t, C_t> + D u_t;  out_t = y_t SiLU(z_t).

    B enters as delta * B, not as the exact zero-order hold, as in the released Mamba code.
    With `reverse` time runs from the last token to the first. Half-precision inputs are computed in float32.
    Returns out (B, L, D) in u's dtype and the last state (B, D, N).
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = step_size(delta, delta_bias, delta_softplus, dtype)
    u_, A, B, C = (x.to(dtype) for x in (u, A, B, C))
    h = u_.new_zeros(len(u), u.shape[2], A.shape[1]) if initial_state is None else initial_state.to(dtype)  # (B, D, N)
    length = u.shape[1]
    outputs = [u_.new_empty(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, D, N)
        h = decay * h + (delta[:, t] * u_[:, t])[..., None] * B[:, t, None, :]
        outputs[t] = (h * C[:, t, None, :]).sum(-1)  # (B, D)
    y = torch.stack(outputs, 1) if length else torch.zeros_like(u_)
    y = y + D.to(dtype) * u_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def step_size(delta: Tensor, bias: Tensor, softplus: bool, dtype: torch.dtype) -> Tensor:
    """softplus(delta + bias), or without the softplus."""
    delta = delta.to(dtype) + bias.to(dtype)
    return F.softplus(delta) if softplus else delta


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool, reverse: bool
) -> Tensor:
    """y_t = sum_k weight[:, k] x_{t-K+1+k} (+ bias), zeros (or `initial_state`) before the first token; then SiLU.

    x (B, L, D), weight (D, K), initial_state (B, K-1, D). With `reverse` a token sees later tokens instead.
    Half-precision inputs are computed in float32; the result has x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel = weight.shape[1]
    taps = weight.to(dtype).unbind(1)  # K x (D,)
    before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([x, before.flip(1)] if reverse else [before, x], 1).to(dtype)  # (B, L+K-1, D)
    y = torch.zeros_like(x, dtype=dtype)
    for k in range(kernel):
        start = kernel - 1 - k if reverse else k
        y = torch.addcmul(y, padded[:, start : start + x.shape[1]], taps[k])
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation else y).to(x.dtype)
