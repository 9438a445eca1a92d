"""The scan backend that always works: torch operations on blocks of time steps, with a hand-written backward.

Only one block of states, (batch, BLOCK, N, D), exists at a time, so the buffers stay in the CPU's cache and nothing
of size length x channels x state is ever stored. Autograd through a loop would add a full-size zero tensor per step.

The convolution is the reference's; only its backward pass is written out.

Every kernel backend (this, cpu_backend, triton_backend) offers the same four functions and the same `saved` tensor:
the state before every SAVE_EVERY-th step in scan order, float32 (float64 here for float64 input),
(batch, ceil(length / SAVE_EVERY), state, channels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import SAVE_EVERY, ScanInputs, as_given, step_size
from .reference import causal_conv1d as conv_forward

CACHE_BYTES = 1 << 20  # wanted size of one block buffer on a CPU


def scan_forward(inputs: ScanInputs, delta_softplus: bool, reverse: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D) in u's dtype, the last state (B, D, N), and saved states (empty unless `save`)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    dtype = torch.promote_types(u.dtype, torch.float32)
    (batch, length, channels), state = u.shape, A.shape[1]
    uf, dt = u.to(dtype), step_size(delta, delta_bias, delta_softplus, dtype)
    At = A.to(dtype).t().contiguous()  # (N, D)
    y = torch.empty(batch, length, channels, dtype=dtype, device=u.device)
    last = torch.zeros(batch, state, channels, dtype=dtype, device=u.device)
    if initial_state is not None:
        last.copy_(initial_state.transpose(1, 2))
    blocks = -(-length // SAVE_EVERY)
    saved = torch.empty((batch, blocks, state, channels) if save else (0,), dtype=dtype, device=u.device)
    scan_order = [_flip(x.to(dtype), reverse) for x in (uf, dt, B, C)]
    for rows in _groups(u, state):
        u_, dt_, B_, C_ = (x[rows] for x in scan_order)
        h = last[rows]
        for i in range(blocks):
            now = slice(i * SAVE_EVERY, (i + 1) * SAVE_EVERY)
            if save:
                saved[rows, i] = h
            _, states = _run_block(u_[:, now], dt_[:, now], B_[:, now], At, h)
            y[rows, now] = (C_[:, now].unsqueeze(2) @ states).squeeze(2)
            h = states[:, -1]
        last[rows] = h
    y = _flip(y, reverse)
    y.addcmul_(D.to(dtype), uf)
    if z is not None:
        y.mul_(F.silu(z.to(dtype)))
    return y.to(u.dtype), last.transpose(1, 2).contiguous(), saved


def scan_backward(
    dout: Tensor, dlast: Tensor | None, inputs: ScanInputs, saved: Tensor, delta_softplus: bool, reverse: bool
) -> ScanInputs:
    """Gradients of the inputs, each in its dtype; None where there is no input."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    (batch, length, channels), state, dtype = u.shape, A.shape[1], saved.dtype
    uf, dt = u.to(dtype), step_size(delta, delta_bias, delta_softplus, dtype)
    At = A.to(dtype).t().contiguous()
    dy = dout.to(dtype)
    if z is not None:
        zf = z.to(dtype)
        gate = torch.sigmoid(zf)
        dgated, dy = dy, dy * (zf * gate)
    scan_order = [_flip(x.to(dtype), reverse) for x in (uf, dt, B, C, dy)]
    y, du, ddt = (torch.empty_like(uf) for _ in range(3))
    dB = torch.empty(batch, length, state, dtype=dtype, device=u.device)
    dC = torch.empty_like(dB)
    dAt = torch.zeros_like(At)
    dh = torch.zeros(batch, state, channels, dtype=dtype, device=u.device)  # gradient of the state after the block
    if dlast is not None:
        dh.copy_(dlast.transpose(1, 2))
    for rows in _groups(u, state):
        carry = dh[rows]
        for i in reversed(range(saved.shape[1])):
            now = slice(i * SAVE_EVERY, (i + 1) * SAVE_EVERY)
            u_, dt_, B_, C_, dy_ = (x[rows, now] for x in scan_order)
            h0 = saved[rows, i]
            decay, states = _run_block(u_, dt_, B_, At, h0)
            y[rows, now] = (C_.unsqueeze(2) @ states).squeeze(2)
            dC[rows, now] = (states @ dy_.unsqueeze(-1)).squeeze(-1)
            grad = C_.unsqueeze(-1) * dy_.unsqueeze(2)  # (b, T, N, D), becomes dL/dh_t
            grad[:, -1] += carry
            for t in range(grad.shape[1] - 2, -1, -1):
                grad[:, t].addcmul_(decay[:, t + 1], grad[:, t + 1])
            carry = decay[:, 0] * grad[:, 0]
            dB[rows, now] = (grad @ (dt_ * u_).unsqueeze(-1)).squeeze(-1)
            dinput = (B_.unsqueeze(2) @ grad).squeeze(2)  # dL/d(delta u)
            du[rows, now] = dinput * dt_
            previous = torch.cat([h0.unsqueeze(1), states[:, :-1]], 1)
            grad.mul_(previous).mul_(decay)  # dL/d(delta A)
            ddt[rows, now] = (grad * At).sum(2).addcmul_(dinput, u_)
            dAt += (grad * dt_.unsqueeze(2)).sum((0, 1))
        dh[rows] = carry
    y, du, ddt, dB, dC = (_flip(x, reverse) for x in (y, du, ddt, dB, dC))
    y.addcmul_(D.to(dtype), uf)
    du.addcmul_(D.to(dtype), dy)
    dz = None
    if z is not None:
        dz = dgated * y * gate * (1 + zf * (1 - gate))
    if delta_softplus:  # softplus'(x) = sigmoid(x) = 1 - exp(-softplus(x))
        ddt.mul_(-torch.expm1(-dt))
    grads = du, ddt, dAt.t(), dB, dC, (dy * uf).sum((0, 1)), dz, ddt.sum((0, 1)), dh.transpose(1, 2)
    return ScanInputs(*as_given(grads, inputs))


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernel, length = weight.shape[1], x.shape[1]
    w = weight.to(dtype)
    edge = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([x, edge.flip(1)] if reverse else [edge, x], 1).to(dtype)  # (B, L+K-1, D)
    dy = dout.to(dtype)
    if activation:
        y = conv_forward(x.to(dtype), weight, bias, initial_state, False, reverse)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dpadded = torch.zeros_like(padded)
    dw = torch.empty_like(w)
    for k in range(kernel):
        start = kernel - 1 - k if reverse else k
        dpadded[:, start : start + length].addcmul_(dy, w[:, k])
        dw[:, k] = (dy * padded[:, start : start + length]).sum((0, 1))
    dx = dpadded[:, :length] if reverse else dpadded[:, kernel - 1 :]
    dinitial = dpadded[:, length:].flip(1) if reverse else dpadded[:, : kernel - 1]
    return tuple(as_given((dx.clone(), dw, dy.sum((0, 1)), dinitial), (x, weight, bias, initial_state)))


def _run_block(u: Tensor, dt: Tensor, B: Tensor, At: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """decay and states, both (b, T, N, D), of T steps that start from state h (b, N, D)."""
    decay = (dt.unsqueeze(2) * At).exp_()
    states = B.unsqueeze(-1) * (dt * u).unsqueeze(2)
    for t in range(u.shape[1]):
        states[:, t].addcmul_(decay[:, t], h if t == 0 else states[:, t - 1])
    return decay, states


def _groups(u: Tensor, state: int) -> list[slice]:
    """Batch rows whose block buffers fit the cache together; a GPU takes all rows at once."""
    batch = u.shape[0]
    rows = max(1, batch if u.device.type != "cpu" else CACHE_BYTES // max(1, SAVE_EVERY * state * u.shape[2] * 4))
    return [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]


def _flip(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x
