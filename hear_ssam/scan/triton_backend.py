"""The scan backend for GPUs, written in Triton: no nvcc, no prebuilt extension.

One program, a single warp, owns one batch row and 64 channels (32 backward) and walks over time. The state is a tile
[state, channels]; forward, a lane holds channels with all their states, so the sum over states crosses no lanes.
Tiles are powers of two; a state size such as 24 is held as two tiles, 16 + 8 (the names ending in 1 and 2), because
exponentials are what this scan costs and padding to 32 would add a third of them.

Triton derives which lane holds what from the alignment it can prove: `channels` is not specialised and A and the
states come in as (state, channels), so that forward each lane loads single floats of its own channel. Speed depends
on that, results never do.
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

from ..errors import HearSsamError
from . import reference
from .reference import SAVE_EVERY, ScanInputs, as_given

CHANNELS = 32  # channels of one program; on an H100, 64 make the scan's forward pass 1.3 to 1.5 times as fast ...
FORWARD = 64  # ... and its backward pass, which holds more of each channel, 1.2 to 1.3 times as slow
PIECE = 8  # steps whose states the backward pass recomputes and holds at a time; divides SAVE_EVERY
LOG2E = tl.constexpr(1.4426950408889634)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """log(1 + exp(delta + bias)) and its derivative, or the sum alone without SOFTPLUS.

    log1p(e) = 2 atanh(e / (2 + e)) is exact to float32 also for tiny e.
    """
    x = delta + bias
    if not SOFTPLUS:
        return x, 1.0
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s  # at most 1/9; the polynomial is atanh(s) / s to 8e-9
    series = 1 + q * (0.33333158 + q * (0.20012427 + q * (0.13980709 + q * 0.14087329)))
    return tl.maximum(x, 0) + 2 * s * series, tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _first(pointer, row, row_stride, stride, length, REVERSE: tl.constexpr):
    """Pointer to a row's first token in scan order, and the signed way to the next token."""
    pointer += row * row_stride
    if REVERSE:
        pointer += tl.cast(length - 1, tl.int64) * stride
        stride = -stride
    return pointer, stride


@triton.jit
def _tile(A, states, row, first, size: tl.constexpr, N: tl.constexpr, d, channels):
    """Of states n = first ...: n, mask and place in (N, channels), A log2(e), and `states` of the row (None: zeros)."""
    n = first + tl.arange(0, size)
    mask = (n < N)[:, None] & (d < channels)[None, :]
    at = n[:, None] * channels + d[None, :]
    A_tile = _load(A + at, mask) * LOG2E
    h = tl.zeros((size, d.shape[0]), tl.float32)
    if states is not None:
        h = _load(states + row * N * channels + at, mask)
    return n, mask, at, A_tile, h


@triton.jit
def _advance(h, A, dt, dtu, B):
    decay = tl.exp2(dt[None, :] * A)
    return tl.fma(decay, h, dtu[None, :] * B[:, None])


@triton.jit(do_not_specialize=["length", "channels"])
def _scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial, out, last, saved,
    length, channels, blocks,
    u_b, u_l, delta_b, delta_l, z_b, z_l,
    N: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < channels
    n1, mask1, at1, A1, h1 = _tile(A, initial, row, 0, N1, N, d, channels)
    if N2:
        n2, mask2, at2, A2, h2 = _tile(A, initial, row, N1, N2, N, d, channels)
    skip, bias = _load(D + d, inside), _load(delta_bias + d, inside)
    u, u_l = _first(u, row, u_b, u_l, length, REVERSE)
    delta, delta_l = _first(delta, row, delta_b, delta_l, length, REVERSE)
    B, B_l = _first(B, row, length * N, N, length, REVERSE)
    C, C_l = _first(C, row, length * N, N, length, REVERSE)
    out, out_l = _first(out, row, length * channels, channels, length, REVERSE)
    u_next = _load(u + d, inside)
    dt_next = _load(delta + d, inside)
    if z is not None:
        z, z_l = _first(z, row, z_b, z_l, length, REVERSE)
        z_next = _load(z + d, inside)
    if SAVE:
        saved += row * tl.cdiv(length, EVERY) * N * channels
    for step in range(length):
        u_t, dt = u_next, dt_next
        more = d < tl.where(step + 1 < length, channels, 0)
        u += u_l
        delta += delta_l
        u_next = _load(u + d, more)
        dt_next = _load(delta + d, more)
        if z is not None:
            z_t = z_next
            z += z_l
            z_next = _load(z + d, more)
        if SAVE:
            if step % EVERY == 0:
                tl.store(saved + at1, h1, mask=mask1)
                if N2:
                    tl.store(saved + at2, h2, mask=mask2)
                saved += N * channels
        dt, _ = _step_size(dt, bias, SOFTPLUS)
        dtu = dt * u_t
        h1 = _advance(h1, A1, dt, dtu, _load(B + n1, n1 < N))
        y = tl.sum(h1 * _load(C + n1, n1 < N)[:, None], 0)
        if N2:
            h2 = _advance(h2, A2, dt, dtu, _load(B + n2, n2 < N))
            y += tl.sum(h2 * _load(C + n2, n2 < N)[:, None], 0)
        y += skip * u_t
        if z is not None:
            y *= z_t * _sigmoid(z_t)
        tl.store(out + d, y, mask=inside)
        B += B_l
        C += C_l
        out += out_l
    last += row * channels * N + d[None, :] * N
    tl.store(last + n1[:, None], h1, mask=mask1)
    if N2:
        tl.store(last + n2[:, None], h2, mask=mask2)


@triton.jit
def _retreat(carry, h, before, A, dt, dtu, dy, B, C):
    """One step back on a tile: `carry` is dL/dh_t as far as it comes from later steps.

    Returns the same for the step before, then dL/d(dt A) (x, n, y) and the shares of dB_t, dC_t (n,), d(dt u) (x, y).
    """
    grad = tl.fma(C[:, None], dy[None, :], carry)
    carry = tl.exp2(dt[None, :] * A) * grad
    dB = tl.sum(grad * dtu[None, :], 1)
    dC = tl.sum(h * dy[None, :], 1)
    return carry, carry * before, dB, dC, tl.sum(grad * B[:, None], 0)


@triton.jit(do_not_specialize=["length", "channels"])
def _scan_backward(
    dout, dlast, u, delta, A, B, C, D, z, delta_bias, saved, scratch,
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial,
    length, channels, blocks,
    dout_b, dout_l, u_b, u_l, delta_b, delta_l, z_b, z_l,
    N: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BD: tl.constexpr, EVERY: tl.constexpr,
    T: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < channels
    n1, mask1, at1, A1, g1 = _tile(A, dlast, row, 0, N1, N, d, channels)
    dA1 = tl.zeros((N1, BD), tl.float32)
    if N2:
        n2, mask2, at2, A2, g2 = _tile(A, dlast, row, N1, N2, N, d, channels)
        dA2 = tl.zeros((N2, BD), tl.float32)
    skip, bias = _load(D + d, inside), _load(delta_bias + d, inside)
    dskip = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    dout, dout_l = _first(dout, row, dout_b, dout_l, length, REVERSE)
    u, u_l = _first(u, row, u_b, u_l, length, REVERSE)
    delta, delta_l = _first(delta, row, delta_b, delta_l, length, REVERSE)
    full = tl.cast(length, tl.int64)
    B, B_l = _first(B, row, full * N, N, length, REVERSE)
    C, C_l = _first(C, row, full * N, N, length, REVERSE)
    dB, dB_l = _first(dB, tl.program_id(0), full * N, N, length, REVERSE)
    dC, dC_l = _first(dC, tl.program_id(0), full * N, N, length, REVERSE)
    du, du_l = _first(du, row, full * channels, channels, length, REVERSE)
    ddelta, ddelta_l = _first(ddelta, row, full * channels, channels, length, REVERSE)
    if z is not None:
        z, z_l = _first(z, row, z_b, z_l, length, REVERSE)
        dz, dz_l = _first(dz, row, full * channels, channels, length, REVERSE)
    saved += row * tl.cdiv(length, EVERY) * N * channels
    scratch += tl.program_id(0).to(tl.int64) * T * N * BD + tl.arange(0, BD)[None, :]
    for back in range(tl.cdiv(length, T)):
        first = (tl.cdiv(length, T) - 1 - back) * T
        end = tl.minimum(first + T, length)
        place = saved + first // EVERY * N * channels
        h1 = _load(place + at1, mask1)
        if N2:
            h2 = _load(place + at2, mask2)
        for i in range(first // EVERY * EVERY, end):  # the states before each of these steps once more
            t = tl.cast(i, tl.int64)
            slot = scratch + (i - first) * N * BD
            kept = tl.where(i >= first, N, 0)  # before this piece nothing is
            tl.store(slot + n1[:, None] * BD, h1, mask=mask1 & (n1[:, None] < kept))
            if N2:
                tl.store(slot + n2[:, None] * BD, h2, mask=mask2 & (n2[:, None] < kept))
            dt, _ = _step_size(_load(delta + t * delta_l + d, inside), bias, SOFTPLUS)
            dtu = dt * _load(u + t * u_l + d, inside)
            h1 = _advance(h1, A1, dt, dtu, _load(B + t * B_l + n1, n1 < N))
            if N2:
                h2 = _advance(h2, A2, dt, dtu, _load(B + t * B_l + n2, n2 < N))
        tl.debug_barrier()
        for j in range(end - first):
            i = end - 1 - j
            t = tl.cast(i, tl.int64)
            slot = scratch + (i - first) * N * BD
            u_t = _load(u + t * u_l + d, inside)
            dt, slope = _step_size(_load(delta + t * delta_l + d, inside), bias, SOFTPLUS)
            dtu = dt * u_t
            B1 = _load(B + t * B_l + n1, n1 < N)
            C1 = _load(C + t * C_l + n1, n1 < N)
            before1 = _load(slot + n1[:, None] * BD, mask1)
            if N2:
                B2 = _load(B + t * B_l + n2, n2 < N)
                C2 = _load(C + t * C_l + n2, n2 < N)
                before2 = _load(slot + n2[:, None] * BD, mask2)
            dy = _load(dout + t * dout_l + d, inside)
            if z is not None:
                y = tl.sum(h1 * C1[:, None], 0)
                if N2:
                    y += tl.sum(h2 * C2[:, None], 0)
                y += skip * u_t
                z_t = _load(z + t * z_l + d, inside)
                gate = _sigmoid(z_t)
                tl.store(dz + t * dz_l + d, dy * y * gate * (1 + z_t * (1 - gate)), mask=inside)
                dy *= z_t * gate
            g1, dexp, dB_t, dC_t, ddtu = _retreat(g1, h1, before1, A1, dt, dtu, dy, B1, C1)
            h1 = before1
            dA1 += dexp * dt[None, :]
            ddt = tl.sum(dexp * A1, 0)
            tl.store(dB + t * dB_l + n1, dB_t, mask=n1 < N)
            tl.store(dC + t * dC_l + n1, dC_t, mask=n1 < N)
            if N2:
                g2, dexp, dB_t, dC_t, ddtu2 = _retreat(g2, h2, before2, A2, dt, dtu, dy, B2, C2)
                h2 = before2
                dA2 += dexp * dt[None, :]
                ddt += tl.sum(dexp * A2, 0)
                ddtu += ddtu2
                tl.store(dB + t * dB_l + n2, dB_t, mask=n2 < N)
                tl.store(dC + t * dC_l + n2, dC_t, mask=n2 < N)
            du_t = ddtu * dt
            ddt = tl.fma(ddtu, u_t, ddt / LOG2E) * slope
            du_t += skip * dy
            dskip += dy * u_t
            dbias += ddt
            tl.store(du + t * du_l + d, du_t, mask=inside)
            tl.store(ddelta + t * ddelta_l + d, ddt, mask=inside)
        tl.debug_barrier()
    dA += row * N * channels
    tl.store(dA + at1, dA1, mask=mask1)
    if N2:
        tl.store(dA + at2, dA2, mask=mask2)
    if dinitial is not None:
        dinitial += row * N * channels
        tl.store(dinitial + at1, g1, mask=mask1)
        if N2:
            tl.store(dinitial + at2, g2, mask=mask2)
    tl.store(dD + row * channels + d, dskip, mask=inside)
    tl.store(ddelta_bias + row * channels + d, dbias, mask=inside)


@triton.jit
def _convolve(x, w, bias, t, d, d_inside, length, x_l, K: tl.constexpr, REVERSE: tl.constexpr):
    """sum_k weight[:, k] x_{t-K+1+k} (+ bias) on a tile (t, d) in float32, zeros beyond the ends."""
    y = tl.zeros((t.shape[0], d.shape[0]), tl.float32)
    for k in tl.static_range(K):
        s = t + (K - 1 - k) if REVERSE else t - (K - 1 - k)
        inside = ((s >= 0) & (s < length))[:, None] & d_inside[None, :]
        tap = _load(w + d * K + k, d_inside)
        y = tl.fma(_load(x + s[:, None] * x_l + d[None, :], inside), tap[None, :], y)
    if bias is not None:
        y += _load(bias + d, d_inside)[None, :]
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
    y = _convolve(x + row * x_b, weight, bias, t, d, d < channels, length, x_l, K, REVERSE)
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
        dy_t = _load(dout + t[:, None] * dout_l + d[None, :], inside)
        if ACTIVATION:
            y = _convolve(x, weight, bias, t, d, d < channels, length, x_l, K, REVERSE)
            gate = _sigmoid(y)
            dy_t *= gate * (1 + y * (1 - gate))
        tl.store(dy + row * length * channels + t[:, None] * channels + d[None, :], dy_t, mask=inside)
        dbias_d += tl.sum(dy_t, 0)
        for k in tl.static_range(K):
            s = t + (K - 1 - k) if REVERSE else t - (K - 1 - k)
            seen = _load(x + s[:, None] * x_l + d[None, :], inside & ((s >= 0) & (s < length))[:, None])
            dweight_d += tl.where(taps[:, None] == k, tl.sum(dy_t * seen, 0)[None, :], 0.0)
    at = (row * channels + d[None, :]) * K + taps[:, None]
    tl.store(dweight + at, dweight_d, mask=(taps[:, None] < K) & (d < channels)[None, :])
    tl.store(dbias + row * channels + d, dbias_d, mask=d < channels)


# --- the four functions of a backend --------------------------------------------------------------------------------


def scan_forward(inputs: ScanInputs, delta_softplus: bool, reverse: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D) in u's dtype, the last state (B, D, N), and saved states (empty unless `save`)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    (batch, length, channels), state = u.shape, A.shape[1]
    out = u.new_empty(u.shape)
    last = u.new_empty((batch, channels, state), dtype=torch.float32)
    steps, blocks = triton.cdiv(length, SAVE_EVERY), triton.cdiv(channels, FORWARD)
    saved = u.new_empty((batch, steps, state, channels) if save else (0,), dtype=torch.float32)
    u, delta, z = (_rows(x) for x in (u, delta, z))
    if last.numel():
        with _on(u):
            _scan_forward[(batch * blocks,)](
                u, delta, _transposed(A), _float(B), _float(C), _float(D), z, _float(delta_bias),
                _transposed(initial_state), out, last, saved, length, channels, blocks, *_strides(u, delta, z),
                **_tiles(state, FORWARD), EVERY=SAVE_EVERY, SOFTPLUS=delta_softplus, REVERSE=reverse, SAVE=save,
                num_warps=1,
            )  # fmt: skip
    return out, last, saved


def scan_backward(
    dout: Tensor, dlast: Tensor | None, inputs: ScanInputs, saved: Tensor, delta_softplus: bool, reverse: bool
) -> ScanInputs:
    """Gradients of the inputs, each in its dtype; None where there is no input."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    (batch, length, channels), state = u.shape, A.shape[1]
    dout, u, delta, z = (_rows(x) for x in (dout, u, delta, z))
    blocks = triton.cdiv(channels, CHANNELS)

    def shares(x: Tensor | None, *shape: int) -> Any:
        """Room for one float32 gradient per batch row, summed afterwards: no atomics, so the same bits every time."""
        return None if x is None else x.new_empty((batch, *shape), dtype=torch.float32)

    du, ddelta = u.new_empty(u.shape), delta.new_empty(u.shape)
    dz = None if z is None else z.new_empty(u.shape)
    dA, dD, dbias = shares(A, state, channels), shares(D, channels), shares(delta_bias, channels)
    dB, dC = shares(B, blocks, length, state), shares(C, blocks, length, state)
    dinitial = shares(initial_state, state, channels)
    if dA.numel():
        scratch = u.new_empty((batch * blocks, PIECE, state, CHANNELS), dtype=torch.float32)
        with _on(u):
            _scan_backward[(batch * blocks,)](
                dout, _transposed(dlast), u, delta, _transposed(A), _float(B), _float(C), _float(D), z,
                _float(delta_bias), saved, scratch, du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial,
                length, channels, blocks, *_strides(dout, u, delta, z),
                **_tiles(state, CHANNELS), EVERY=SAVE_EVERY, T=PIECE, SOFTPLUS=delta_softplus, REVERSE=reverse,
                num_warps=1,
            )  # fmt: skip
    dinitial = None if dinitial is None else dinitial.transpose(1, 2)
    grads = (du, ddelta, dA.sum(0).t(), dB.sum(1), dC.sum(1), dD.sum(0), dz, dbias.sum(0), dinitial)
    return ScanInputs(*as_given(grads, inputs))


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool, reverse: bool
) -> Tensor:
    """Depthwise causal convolution of x (B, L, D), in x's dtype."""
    x, before = _lead_in(x, initial_state, reverse)
    batch, length, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel():
        weight, bias = _float(weight), _float(bias)
        grid = batch * triton.cdiv(length, 16) * triton.cdiv(channels, 64)
        with _on(x):
            _conv_forward[(grid,)](
                x, weight, bias, out, length, channels, *_strides(x),
                K=weight.shape[1], BT=16, BD=64, ACTIVATION=activation, REVERSE=reverse, num_warps=4,
            )  # fmt: skip
    return (out[:, : length - before] if reverse else out[:, before:]).contiguous()


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state)."""
    inputs = (x, weight, bias, initial_state)
    x, before = _lead_in(x, initial_state, reverse)
    if before:
        dout = F.pad(dout, (0, 0, 0, before) if reverse else (0, 0, before, 0))
    dout, weight, bias = _rows(dout), _float(weight), _float(bias)
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
    return tuple(as_given((dx, dweight.sum(0), dbias.sum(0), dinitial), inputs))


def self_check() -> None:
    """Raises, with the exact reason, where the kernels cannot run or do not give the reference's numbers."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise HearSsamError("PyTorch sees no CUDA device (TRITON_INTERPRET=1 interprets the kernels slowly on a CPU)")
    device = "cpu" if interpreted else "cuda"
    g = torch.Generator("cpu").manual_seed(0)
    u, delta, z = (torch.randn(1, 3, 5, generator=g, dtype=torch.float32, device="cpu").to(device) for _ in range(3))
    B, C = (torch.randn(1, 3, 3, generator=g, dtype=torch.float32, device="cpu").to(device) for _ in range(2))
    A = -torch.rand(5, 3, generator=g, dtype=torch.float32, device="cpu").to(device)
    inputs = ScanInputs(u, delta, A, B, C, A[:, 0], z, A[:, 1], None)
    out, last, _ = scan_forward(inputs, True, False, False)
    want, want_last = reference.selective_scan(inputs, True, False)
    error = max((out - want).abs().max().item(), (last - want_last).abs().max().item())
    if not error < 1e-4:
        raise HearSsamError(f"the compiled kernel's self check is off by {error:.1e}")


def _rows(x: Tensor | None) -> Any:
    """Any batch and length strides are fine; the last dimension must be dense."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _float(x: Tensor | None) -> Any:
    """Small tensors are read as dense float32: B and C by every lane, so that rounding up once is cheaper."""
    return None if x is None else x.float().contiguous()


def _transposed(x: Tensor | None) -> Any:
    """(..., channels, state) → dense float32 (..., state, channels)."""
    return None if x is None else x.float().transpose(-1, -2).contiguous()


def _lead_in(x: Tensor, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, int]:
    """x behind its initial state, and how many tokens that adds."""
    if initial_state is None or not initial_state.shape[1]:
        return _rows(x), 0
    before = initial_state.to(x.dtype)
    return torch.cat([x, before.flip(1)] if reverse else [before, x], 1), before.shape[1]


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _tiles(state: int, channels: int) -> dict[str, int]:
    """A program's channels; the state size as one power of two, or as two where that needs fewer exponentials."""
    whole = triton.next_power_of_2(state)
    half = whole // 2
    rest = triton.next_power_of_2(max(state - half, 1))
    first, second = (half, rest) if half and half + rest < whole else (whole, 0)
    return {"N": state, "N1": first, "N2": second, "BD": channels}


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
