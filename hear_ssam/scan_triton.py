"""The scan backend for GPUs, written in Triton: no nvcc, no prebuilt extension.

One program owns one batch row and a block of channels. The state is a tile [state, channels]: a lane holds one channel
with all its states, so the sum over states crosses no lanes. Triton tiles are powers of two; a state size such as 24 is
held as two tiles, 16 + 8, because exponentials are what this scan costs and padding to 32 would add a third of them.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import scan_reference
from .errors import HearSsamError
from .scan_reference import SAVE_EVERY

CHANNELS = 32  # channels of one program: one per lane
LOG2E = tl.constexpr(1.4426950408889634)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) and its derivative; log1p(e) = 2 atanh(e / (2 + e)) is exact to float32 also for tiny e."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s  # at most 1/9
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0) + 2 * s * series, tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _row(pointer, offset, inside):
    """One token's values of this block of channels (or of the states), in float32; 0 outside."""
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _advance(h, A, dt, dtu, B):
    """One step of the recurrence on a tile (n, d); A carries log2(e). Returns the new state and the decay."""
    decay = tl.exp2(dt[None, :] * A)
    return tl.fma(decay, h, dtu[None, :] * B[:, None]), decay


@triton.jit
def _scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial, out, last, saved,
    length, channels, blocks,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    N: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < channels
    nA = tl.arange(0, NA)
    maskA = (nA[:, None] < N) & inside[None, :]
    atA = d[None, :] * N + nA[:, None]  # place in a (channels, state) matrix
    A_A = _row(A, atA, maskA) * LOG2E
    hA = tl.zeros((NA, BD), tl.float32)
    if initial is not None:
        hA = _row(initial + row * channels * N, atA, maskA)
    if NB:
        nB = NA + tl.arange(0, NB)
        maskB = (nB[:, None] < N) & inside[None, :]
        atB = d[None, :] * N + nB[:, None]
        A_B = _row(A, atB, maskB) * LOG2E
        hB = tl.zeros((NB, BD), tl.float32)
        if initial is not None:
            hB = _row(initial + row * channels * N, atB, maskB)
    if D is not None:
        skip = _row(D, d, inside)
    if delta_bias is not None:
        bias = _row(delta_bias, d, inside)
    u += row * u_b
    delta += row * delta_b
    B += row * B_b
    C += row * C_b
    out += row * length * channels
    if z is not None:
        z += row * z_b
    for step in range(length):
        t = tl.cast(step, tl.int64)
        if REVERSE:
            t = length - 1 - t
        u_t = _row(u, t * u_l + d, inside)
        dt = _row(delta, t * delta_l + d, inside)
        if delta_bias is not None:
            dt += bias
        if SOFTPLUS:
            dt, _ = _softplus(dt)
        if SAVE:
            if step % EVERY == 0:
                place = saved + (row * tl.cdiv(length, EVERY) + step // EVERY) * N * channels + d[None, :]
                tl.store(place + nA[:, None] * channels, hA, mask=maskA)
                if NB:
                    tl.store(place + nB[:, None] * channels, hB, mask=maskB)
        dtu = dt * u_t
        hA, _ = _advance(hA, A_A, dt, dtu, _row(B, t * B_l + nA, nA < N))
        y = tl.sum(hA * _row(C, t * C_l + nA, nA < N)[:, None], 0)
        if NB:
            hB, _ = _advance(hB, A_B, dt, dtu, _row(B, t * B_l + nB, nB < N))
            y += tl.sum(hB * _row(C, t * C_l + nB, nB < N)[:, None], 0)
        if D is not None:
            y += skip * u_t
        if z is not None:
            z_t = _row(z, t * z_l + d, inside)
            y *= z_t * _sigmoid(z_t)
        tl.store(out + t * channels + d, y, mask=inside)
    tl.store(last + row * channels * N + atA, hA, mask=maskA)
    if NB:
        tl.store(last + row * channels * N + atB, hB, mask=maskB)


@triton.jit
def _retreat(grad, h, before, A, dt, dtu, u_t, dy, B, C):
    """One step of the backward recurrence on a tile: `grad` is dL/dh of the step, without this output's share.

    Returns dL/dh of the step before, and the shares of dA (n, d), dB, dC (n,), d(dt), d(dt u) (d,).
    """
    grad = tl.fma(C[:, None], dy[None, :], grad)
    decay = tl.exp2(dt[None, :] * A)
    carry = decay * grad
    dexponent = carry * before  # dL/d(dt A)
    dB = tl.sum(grad * dtu[None, :], 1)
    dC = tl.sum(h * dy[None, :], 1)
    return carry, dexponent * dt[None, :], dB, dC, tl.sum(dexponent * A, 0), tl.sum(grad * B[:, None], 0)


@triton.jit
def _scan_backward(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, saved, scratch,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial,
    length, channels, blocks,
    dout_b, dout_l, u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    N: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < channels
    nA = tl.arange(0, NA)
    maskA = (nA[:, None] < N) & inside[None, :]
    atA = d[None, :] * N + nA[:, None]
    A_A = _row(A, atA, maskA) * LOG2E
    gA = tl.zeros((NA, BD), tl.float32)
    dA_A = tl.zeros((NA, BD), tl.float32)
    if dlast is not None:
        gA = _row(dlast + row * channels * N, atA, maskA)
    if NB:
        nB = NA + tl.arange(0, NB)
        maskB = (nB[:, None] < N) & inside[None, :]
        atB = d[None, :] * N + nB[:, None]
        A_B = _row(A, atB, maskB) * LOG2E
        gB = tl.zeros((NB, BD), tl.float32)
        dA_B = tl.zeros((NB, BD), tl.float32)
        if dlast is not None:
            gB = _row(dlast + row * channels * N, atB, maskB)
    if D is not None:
        skip = _row(D, d, inside)
    if delta_bias is not None:
        bias = _row(delta_bias, d, inside)
    dskip = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    u += row * u_b
    delta += row * delta_b
    B += row * B_b
    C += row * C_b
    dout += row * dout_b
    du += row * length * channels
    ddelta += row * length * channels
    dB += tl.program_id(0).to(tl.int64) * length * N
    dC += tl.program_id(0).to(tl.int64) * length * N
    scratch += tl.program_id(0).to(tl.int64) * (EVERY + 1) * N * BD
    local = tl.arange(0, BD)
    if z is not None:
        z += row * z_b
        dz += row * length * channels
    for back in range(tl.cdiv(length, EVERY)):
        block = tl.cdiv(length, EVERY) - 1 - back
        first = block * EVERY
        count = tl.minimum(EVERY, length - first)
        place = saved + (row * tl.cdiv(length, EVERY) + block) * N * channels + d[None, :]
        hA = _row(place, nA[:, None] * channels, maskA)
        tl.store(scratch + nA[:, None] * BD + local[None, :], hA, mask=maskA)
        if NB:
            hB = _row(place, nB[:, None] * channels, maskB)
            tl.store(scratch + nB[:, None] * BD + local[None, :], hB, mask=maskB)
        for i in range(count):  # the states of the block once more
            t = tl.cast(first + i, tl.int64)
            if REVERSE:
                t = length - 1 - t
            dt = _row(delta, t * delta_l + d, inside)
            if delta_bias is not None:
                dt += bias
            if SOFTPLUS:
                dt, _ = _softplus(dt)
            dtu = dt * _row(u, t * u_l + d, inside)
            slot = scratch + (i + 1) * N * BD + local[None, :]
            hA, _ = _advance(hA, A_A, dt, dtu, _row(B, t * B_l + nA, nA < N))
            tl.store(slot + nA[:, None] * BD, hA, mask=maskA)
            if NB:
                hB, _ = _advance(hB, A_B, dt, dtu, _row(B, t * B_l + nB, nB < N))
                tl.store(slot + nB[:, None] * BD, hB, mask=maskB)
        tl.debug_barrier()
        for j in range(count):
            i = count - 1 - j
            t = tl.cast(first + i, tl.int64)
            if REVERSE:
                t = length - 1 - t
            u_t = _row(u, t * u_l + d, inside)
            dt = _row(delta, t * delta_l + d, inside)
            if delta_bias is not None:
                dt += bias
            if SOFTPLUS:
                dt, slope = _softplus(dt)
            dtu = dt * u_t
            slot = scratch + i * N * BD + local[None, :]
            C_A = _row(C, t * C_l + nA, nA < N)
            hA = _row(slot, N * BD + nA[:, None] * BD, maskA)
            beforeA = _row(slot, nA[:, None] * BD, maskA)
            dy = _row(dout, t * dout_l + d, inside)
            if z is not None:
                y = tl.sum(hA * C_A[:, None], 0)
            if NB:
                C_B = _row(C, t * C_l + nB, nB < N)
                hB = _row(slot, N * BD + nB[:, None] * BD, maskB)
                beforeB = _row(slot, nB[:, None] * BD, maskB)
                if z is not None:
                    y += tl.sum(hB * C_B[:, None], 0)
            if z is not None:
                if D is not None:
                    y += skip * u_t
                z_t = _row(z, t * z_l + d, inside)
                gate = _sigmoid(z_t)
                tl.store(dz + t * channels + d, dy * y * gate * (1 + z_t * (1 - gate)), mask=inside)
                dy *= z_t * gate
            B_A = _row(B, t * B_l + nA, nA < N)
            gA, dA_t, dB_t, dC_t, ddt, ddtu = _retreat(gA, hA, beforeA, A_A, dt, dtu, u_t, dy, B_A, C_A)
            dA_A += dA_t
            tl.store(dB + t * N + nA, dB_t, mask=nA < N)
            tl.store(dC + t * N + nA, dC_t, mask=nA < N)
            if NB:
                B_B = _row(B, t * B_l + nB, nB < N)
                gB, dA_t, dB_t, dC_t, ddt_B, ddtu_B = _retreat(gB, hB, beforeB, A_B, dt, dtu, u_t, dy, B_B, C_B)
                dA_B += dA_t
                ddt += ddt_B
                ddtu += ddtu_B
                tl.store(dB + t * N + nB, dB_t, mask=nB < N)
                tl.store(dC + t * N + nB, dC_t, mask=nB < N)
            du_t = ddtu * dt
            ddt = tl.fma(ddtu, u_t, ddt / LOG2E)
            if SOFTPLUS:
                ddt *= slope
            if D is not None:
                du_t += skip * dy
                dskip += dy * u_t
            dbias += ddt
            tl.store(du + t * channels + d, du_t, mask=inside)
            tl.store(ddelta + t * channels + d, ddt, mask=inside)
        tl.debug_barrier()
    tl.store(dA + row * channels * N + atA, dA_A, mask=maskA)
    if NB:
        tl.store(dA + row * channels * N + atB, dA_B, mask=maskB)
    if dinitial is not None:
        tl.store(dinitial + row * channels * N + atA, gA, mask=maskA)
        if NB:
            tl.store(dinitial + row * channels * N + atB, gB, mask=maskB)
    if D is not None:
        tl.store(dD + row * channels + d, dskip, mask=inside)
    if delta_bias is not None:
        tl.store(ddelta_bias + row * channels + d, dbias, mask=inside)


@triton.jit
def _convolve(x, w, t, d, d_inside, length, x_l, K: tl.constexpr, REVERSE: tl.constexpr):
    """sum_k weight[:, k] x_{t-K+1+k} on a tile (t, d) in float32, zeros beyond the ends."""
    y = tl.zeros((t.shape[0], d.shape[0]), tl.float32)
    for k in tl.static_range(K):
        s = t + (K - 1 - k) if REVERSE else t - (K - 1 - k)
        inside = ((s >= 0) & (s < length))[:, None] & d_inside[None, :]
        tap = tl.load(w + d * K + k, mask=d_inside, other=0.0).to(tl.float32)
        y = tl.fma(_row(x, s[:, None] * x_l + d[None, :], inside), tap[None, :], y)
    return y


@triton.jit
def _conv_forward(
    x, weight, bias, out, length, channels, x_b, x_l,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACTIVATION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    pieces = tl.cdiv(length, BT)
    row = (tl.program_id(0) // (blocks * pieces)).to(tl.int64)
    t = (tl.program_id(0) // blocks % pieces * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    y = _convolve(x + row * x_b, weight, t, d, d < channels, length, x_l, K, REVERSE)
    if bias is not None:
        y += _row(bias, d, d < channels)[None, :]
    if ACTIVATION:
        y *= _sigmoid(y)
    inside = (t < length)[:, None] & (d < channels)[None, :]
    tl.store(out + row * length * channels + t[:, None] * channels + d[None, :], y, mask=inside)


@triton.jit
def _conv_backward(
    dout, x, weight, bias, dy, dweight, dbias, length, channels, dout_b, dout_l, x_b, x_l,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACTIVATION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation (dy, float32), and this batch row's shares of dweight and dbias."""
    blocks = tl.cdiv(channels, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    x += row * x_b
    dout += row * dout_b
    dbias_d = tl.zeros((BD,), tl.float32)
    taps = tl.arange(0, triton.next_power_of_2(K))
    dweight_d = tl.zeros((triton.next_power_of_2(K), BD), tl.float32)
    for start in range(0, length, BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t < length)[:, None] & (d < channels)[None, :]
        dy_t = _row(dout, t[:, None] * dout_l + d[None, :], inside)
        if ACTIVATION:
            y = _convolve(x, weight, t, d, d < channels, length, x_l, K, REVERSE)
            if bias is not None:
                y += _row(bias, d, d < channels)[None, :]
            gate = _sigmoid(y)
            dy_t *= gate * (1 + y * (1 - gate))
        tl.store(dy + row * length * channels + t[:, None] * channels + d[None, :], dy_t, mask=inside)
        dbias_d += tl.sum(dy_t, 0)
        for k in tl.static_range(K):
            s = t + (K - 1 - k) if REVERSE else t - (K - 1 - k)
            seen = _row(x, s[:, None] * x_l + d[None, :], inside & ((s >= 0) & (s < length))[:, None])
            dweight_d += tl.where(taps[:, None] == k, tl.sum(dy_t * seen, 0)[None, :], 0.0)
    tl.store(
        dweight + (row * channels + d[None, :]) * K + taps[:, None],
        dweight_d,
        mask=(taps[:, None] < K) & (d < channels)[None, :],
    )
    tl.store(dbias + row * channels + d, dbias_d, mask=d < channels)


# --- the four functions of a backend --------------------------------------------------------------------------------


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D) in u's dtype, the last state (B, D, N), and saved states (empty unless `save`)."""
    (batch, length, channels), state = u.shape, A.shape[1]
    u, delta, B, C, z = (_rows(x) for x in (u, delta, B, C, z))
    A, D, delta_bias, initial_state = (_dense(x) for x in (A, D, delta_bias, initial_state))
    out = u.new_empty(batch, length, channels)
    last = u.new_empty((batch, channels, state), dtype=torch.float32)
    saved = u.new_empty(
        (batch, triton.cdiv(length, SAVE_EVERY), state, channels) if save else (0,), dtype=torch.float32
    )
    blocks = triton.cdiv(channels, CHANNELS)
    if last.numel():
        with _on(u):
            _scan_forward[(batch * blocks,)](
                u, delta, A, B, C, D, z, delta_bias, initial_state, out, last, saved,
                length, channels, blocks, *_strides(u, delta, B, C, z), **_tiles(state),
                EVERY=SAVE_EVERY, SOFTPLUS=delta_softplus, REVERSE=reverse, SAVE=save, num_warps=1,
            )  # fmt: skip
    return out, last, saved


def scan_backward(
    dout: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state), each in its input's dtype."""
    (batch, length, channels), state = u.shape, A.shape[1]
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    dout, u, delta, B, C, z = (_rows(x) for x in (dout, u, delta, B, C, z))
    A, D, delta_bias, dlast = (_dense(x) for x in (A, D, delta_bias, dlast))
    blocks = triton.cdiv(channels, CHANNELS)

    def per_row(x: Tensor | None, *shape: int) -> Any:
        """Room for one float32 gradient per batch row, summed afterwards: no atomics, so the same bits every time."""
        return None if x is None else x.new_empty((batch, *shape), dtype=torch.float32)

    du, ddelta = u.new_empty(u.shape), delta.new_empty(u.shape)
    dz = None if z is None else z.new_empty(u.shape)
    dA, dD, dbias = per_row(A, channels, state), per_row(D, channels), per_row(delta_bias, channels)
    dB, dC = per_row(B, blocks, length, state), per_row(C, blocks, length, state)
    dinitial = per_row(initial_state, channels, state)
    if batch and channels and state:
        scratch = u.new_empty((batch * blocks, SAVE_EVERY + 1, state, CHANNELS), dtype=torch.float32)
        with _on(u):
            _scan_backward[(batch * blocks,)](
                dout, dlast, u, delta, A, B, C, D, z, delta_bias, saved, scratch,
                du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial,
                length, channels, blocks, *_strides(dout, u, delta, B, C, z), **_tiles(state),
                EVERY=SAVE_EVERY, SOFTPLUS=delta_softplus, REVERSE=reverse, num_warps=1,
            )  # fmt: skip
    sums = [None if x is None else x.sum(axis) for x, axis in ((dA, 0), (dB, 1), (dC, 1), (dD, 0), (dbias, 0))]
    dA, dB, dC, dD, dbias = sums
    grads = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    return tuple(None if x is None else grad.to(x.dtype) for x, grad in zip(inputs, grads, strict=True))


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool, reverse: bool
) -> Tensor:
    """Depthwise causal convolution of x (B, L, D), in x's dtype."""
    x, before = _lead_in(x, initial_state, reverse)
    batch, length, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel():
        weight, bias = _dense(weight), _dense(bias)
        grid = batch * triton.cdiv(length, 16) * triton.cdiv(channels, 64)
        with _on(x):
            _conv_forward[(grid,)](
                x, weight, bias, out, length, channels, *_strides(x),
                K=weight.shape[1], BT=16, BD=64, ACTIVATION=activation, REVERSE=reverse, num_warps=4,
            )  # fmt: skip
    return out[:, before:] if not reverse else out[:, : length - before]


def conv_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, initial_state)."""
    inputs = (x, weight, bias, initial_state)
    x, before = _lead_in(x, initial_state, reverse)
    if before:
        dout = F.pad(dout, (0, 0, 0, before) if reverse else (0, 0, before, 0))
    dout, weight, bias = _rows(dout), _dense(weight), _dense(bias)
    (batch, length, channels), kernel = x.shape, weight.shape[1]
    dy = x.new_empty(x.shape, dtype=torch.float32)
    dweight = x.new_empty((batch, channels, kernel), dtype=torch.float32)
    dbias = x.new_empty((batch, channels), dtype=torch.float32)
    if batch and channels:
        with _on(x):
            _conv_backward[(batch * triton.cdiv(channels, CHANNELS),)](
                dout, x, weight, bias, dy, dweight, dbias, length, channels, *_strides(dout, x),
                K=kernel, BT=16, BD=CHANNELS, ACTIVATION=activation, REVERSE=reverse, num_warps=1,
            )  # fmt: skip
    dx = conv_forward(dy, weight, None, None, False, not reverse)  # the transpose runs the other way
    dinitial: Any = None
    if before:
        dx, dinitial = (dx[:, :-before], dx[:, -before:].flip(1)) if reverse else (dx[:, before:], dx[:, :before])
        dx, dinitial = dx.clone(), dinitial.clone()  # an op's results must not share memory
    grads = (dx, dweight.sum(0), dbias.sum(0), dinitial)
    return tuple(None if like is None else grad.to(like.dtype) for like, grad in zip(inputs, grads, strict=True))


def self_check() -> None:
    """Raises, with the exact reason, where the kernels cannot run or do not give the reference's numbers."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise HearSsamError("PyTorch sees no CUDA device (TRITON_INTERPRET=1 interprets the kernels slowly on a CPU)")
    device = "cpu" if interpreted else "cuda"
    g = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(1, 3, 5, generator=g).to(device) for _ in range(3))
    B, C = (torch.randn(1, 3, 3, generator=g).to(device) for _ in range(2))
    A = -torch.rand(5, 3, generator=g).to(device)
    tensors = (u, delta, A, B, C, A[:, 0], z, None, None)
    out, last, _ = scan_forward(*tensors, True, False, False)
    want, want_last = scan_reference.selective_scan(*tensors, True, False)
    error = max((out - want).abs().max().item(), (last - want_last).abs().max().item())
    if not error < 1e-4:
        raise HearSsamError(f"the compiled kernel's self check is off by {error:.1e}")


def _rows(x: Tensor | None) -> Any:
    """Any batch and length strides are fine; the last dimension must be dense."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous()


def _lead_in(x: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, int]:
    """x behind its initial state, and how many tokens that adds."""
    if initial_state is None or not initial_state.shape[1]:
        return _rows(x), 0
    before = initial_state.to(x.dtype)
    return torch.cat([x, before.flip(1)] if reverse else [before, x], 1), before.shape[1]


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _tiles(state: int) -> dict[str, int]:
    """The state size as one power of two, or as two where that needs fewer exponentials."""
    whole = triton.next_power_of_2(state)
    half = whole // 2
    rest = triton.next_power_of_2(max(state - half, 1))
    first, second = (half, rest) if half and half + rest < whole else (whole, 0)
    return {"N": state, "NA": first, "NB": second, "BD": CHANNELS}


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
