"""The scan backend for CPUs: kernels in vector registers (cpu_kernels), compiled when first used (simd).

The four functions and the tensor `saved` are those of torch_backend; notation as in reference.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .cpu_kernels import CHANNELS, write_conv_backward, write_conv_forward, write_scan_backward, write_scan_forward
from .reference import SAVE_EVERY, ScanInputs, as_given
from .simd import LANES, build, run


def scan_forward(inputs: ScanInputs, delta_softplus: bool, reverse: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out (B, L, D) in u's dtype, the last state (B, D, N), and saved states (empty unless `save`)."""
    u, z = inputs.u, inputs.z
    (batch, length, channels), state = u.shape, inputs.A.shape[1]
    arguments, io = _scan_arguments(inputs)
    width = arguments["u"].shape[2]
    out = u.new_empty(batch, length, width, dtype=io)
    last = u.new_empty(batch, width, state, dtype=torch.float32)
    saved = last.new_empty((batch, -(-length // SAVE_EVERY) if save else 0, state, width))
    run(
        build(write_scan_forward, state, io == torch.bfloat16, z is not None, delta_softplus),
        _count(batch, width), reverse, **arguments, initial_state=_states(inputs.initial_state, last), out=out,
        last=last, saved=saved, save=int(save), length=length, vectors=width // LANES,
    )  # fmt: skip
    saved = _trim(saved, channels) if save else saved.new_empty(0)
    return _trim(out, channels).to(u.dtype), last if width == channels else last[:, :channels].contiguous(), saved


def scan_backward(
    dout: Tensor, dlast: Tensor | None, inputs: ScanInputs, saved: Tensor, delta_softplus: bool, reverse: bool
) -> ScanInputs:
    """Gradients of the inputs, each in its dtype; None where there is no input."""
    u, (batch, length, channels), state, blocks = inputs.u, inputs.u.shape, inputs.A.shape[1], saved.shape[1]
    arguments, io = _scan_arguments(inputs)
    width = arguments["u"].shape[2]
    units = _count(batch, width)
    du, ddelta = (u.new_empty(batch, length, width, dtype=dtype) for dtype in (io, torch.float32))
    dz = du if inputs.z is None else torch.empty_like(du)
    dinitial = saved.new_empty(batch, width, state)
    dA, dD, dbias = (saved.new_empty(batch, *shape) for shape in ((width, state), (width,), (width,)))
    dB, dC = (saved.new_empty(units, blocks, state, SAVE_EVERY) for _ in range(2))
    run(
        build(write_scan_backward, state, io == torch.bfloat16, inputs.z is not None, delta_softplus),
        units, reverse, **arguments, dout=_rows(dout, io), saved=_rows(saved, torch.float32),
        dlast=_states(dlast, dinitial), du=du, ddelta=ddelta, dz=dz, dinitial=dinitial,
        dA=dA, dD=dD, dbias=dbias, dB=dB, dC=dC, length=length, vectors=width // LANES,
    )  # fmt: skip

    def per_token(x: Tensor) -> Tensor:  # (units, blocks, N, SAVE_EVERY) → (B, L, N)
        x = x.view(batch, _count(1, width), blocks, state, SAVE_EVERY).sum(1).transpose(2, 3).flatten(1, 2)[:, :length]
        return x.flip(1) if reverse else x

    dA, dD, dbias = (x.sum(0)[:channels] for x in (dA, dD, dbias))
    du, ddelta, dz = (x[..., :channels] for x in (du, ddelta, dz))
    grads = du, ddelta, dA, per_token(dB), per_token(dC), dD, dz, dbias, dinitial[:, :channels]
    return ScanInputs(*as_given(grads, inputs))


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool, reverse: bool
) -> Tensor:
    """Depthwise causal convolution of x (B, L, D), in x's dtype."""
    inputs, io = _conv_inputs(x, weight, bias, initial_state)
    out = x.new_empty(inputs["x"].shape, dtype=io)
    width = out.shape[2]
    run(
        build(write_conv_forward, weight.shape[1], io == torch.bfloat16, activation),
        _count(len(x), width), reverse, **inputs, out=out, length=x.shape[1], vectors=width // LANES,
    )  # fmt: skip
    return _trim(out, x.shape[2]).to(x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state)."""
    inputs, io = _conv_inputs(x, weight, bias, initial_state)
    channels, kernel, width = *weight.shape, inputs["x"].shape[2]
    dx, dinitial = (x.new_empty(inputs[name].shape, dtype=io) for name in ("x", "initial_state"))
    dweight, dbias = (dx.new_empty(len(x), *shape, dtype=torch.float32) for shape in ((kernel, width), (width,)))
    run(
        build(write_conv_backward, kernel, io == torch.bfloat16, activation),
        _count(len(x), width), reverse, **inputs, dout=_rows(dout, io), dx=dx, dinitial=dinitial,
        dweight=dweight, dbias=dbias, length=x.shape[1], vectors=width // LANES,
    )  # fmt: skip
    grads = dx[..., :channels], dweight.sum(0).t()[:channels], dbias.sum(0)[:channels], dinitial[..., :channels]
    return tuple(as_given(grads, (x, weight, bias, initial_state)))


def self_check() -> None:
    """Raise if llvmlite is missing, the CPU unknown to it, or a kernel of an SSAM encoder wrong: compiled in 0.2 s."""
    g = torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float32, device="cpu")
    u, delta, z = (draw(1, 19, LANES) for _ in range(3))
    A, B, C = -9 * draw(LANES, 24).abs(), draw(1, 19, 24), draw(1, 19, 24)
    weight, D = draw(LANES, 4), draw(LANES)
    for reverse in (False, True):
        scan = ScanInputs(u, delta, A, B, C, D, z, D, None), True, reverse
        conv = (u, weight, D, None, True, reverse)
        got = [*scan_forward(*scan, False)[:2], conv_forward(*conv)]
        want = [*reference.selective_scan(*scan), reference.causal_conv1d(*conv)]
        for name, x, y in zip(("scan", "scan", "convolution"), got, want, strict=True):
            if not torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max())):
                raise RuntimeError(f"the compiled {name} differs from the reference by {(x - y).abs().max():.2g}")


def _scan_arguments(inputs: ScanInputs) -> tuple[dict[str, Tensor], torch.dtype]:
    """The kernels' common arguments as they want them, and the dtype of u, z, out and their gradients."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    io = torch.bfloat16 if u.dtype == torch.bfloat16 and (z is None or z.dtype == u.dtype) else torch.float32
    arguments = {"u": _rows(u, io), "delta": _rows(delta), "B": _unit_stride(B.float()), "C": _unit_stride(C.float())}
    if z is not None:
        arguments["z"] = _rows(z, io)
    A = _states(A, A.new_empty(arguments["u"].shape[2], A.shape[1]))
    return arguments | {"A": A, "D": _rows(D), "delta_bias": _rows(delta_bias)}, io


def _conv_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[dict[str, Tensor], torch.dtype]:
    io = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    rows, batch, (channels, kernel) = _rows(x, io), len(x), weight.shape
    weight = _states(weight, weight.new_empty(rows.shape[2], kernel))
    bias = _rows(x.new_zeros(channels) if bias is None else bias)
    before = _rows(x.new_zeros(batch, kernel - 1, channels) if initial_state is None else initial_state, io)
    return {"x": rows, "weight": weight, "bias": bias, "initial_state": before}, io


def _rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x with a last dimension of unit stride and whole vectors; almost always x itself."""
    missing = -x.shape[-1] % LANES
    return _unit_stride(F.pad(x.to(dtype), (0, missing)) if missing else x.to(dtype))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _states(x: Tensor | None, like: Tensor) -> Tensor:
    """(..., channels, N), float32 and contiguous, with as many channels as `like`; zeros for None."""
    if x is None:
        return torch.zeros_like(like, dtype=torch.float32)
    missing = like.shape[-2] - x.shape[-2]
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).float().contiguous()


def _trim(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[-1] == channels else x[..., :channels].contiguous()


def _count(batch: int, width: int) -> int:
    return batch * -(-width // CHANNELS)  # work units
