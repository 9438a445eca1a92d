"""The selective scan and the causal convolution, and the choice of the backend that computes them.

    from hear_ssam.scan import selective_scan, use_backend, available_backends

Backends: `reference` (the plain loop), `torch` (always there), `cpu` (jitted with llvmlite), `triton`
(GPU, no nvcc), `mamba_ssm` (the official CUDA kernel, where its extension imports). `auto` takes the first that
runs on the tensor's device; an explicit choice runs or raises. The choice comes, in this order, from the `backend`
argument, `use_backend`, the environment variable HEAR_SSAM_BACKEND.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, List, Protocol, cast  # noqa: UP035

import torch
from torch import Tensor

from ..errors import HearSsamError, unknown_name
from . import reference
from .reference import SAVE_EVERY, ScanInputs, as_given

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "cpu", "triton", "mamba_ssm")
MOST = 1024  # states of a channel, or taps of a convolution: CPU kernels keep them on the stack, some 1.2 kB for each
_PREFERRED = {"cpu": ("cpu", "torch"), "cuda": ("triton", "mamba_ssm", "torch")}
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("hear_ssam_backend", default=None)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, reverse: bool = False,
    return_last_state: bool = False, initial_state: Tensor | None = None, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's selective scan (Gu & Dao 2023, algorithm 2), channel-last and differentiable.

    u, delta, z: (batch, length, channels); A: (channels, state); B, C: (batch, length, state);
    D, delta_bias: (channels,). Any float dtype; A, the step size and the state are computed in float32 or better.
    `reverse` scans from the last token to the first without flipping anything. `initial_state` and the returned
    last state are (batch, channels, state) and chain chunks of one sequence.

    Returns out (batch, length, channels) in u's dtype, with `return_last_state` also the last state.
    Raises HearSsamError for shapes that do not fit and for an explicit backend that cannot run.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state)
    D, delta_bias = (u.new_zeros(u.shape[2]) if x is None else x for x in (D, delta_bias))  # so that backends have both
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    name = _choose(backend, u.device.type, u.dtype, _beyond(A.shape[1]))
    if name == "mamba_ssm" and return_last_state and _needs_grad(inputs):
        what = "selective_scan: scan backend 'mamba_ssm' gives no gradient of the last state"
        raise HearSsamError(f"{what}; use backend='triton' or 'torch', or torch.no_grad().")
    if name in ("reference", "mamba_ssm"):
        function = reference.selective_scan if name == "reference" else _mamba_ssm_scan
        out, last = function(inputs, delta_softplus, reverse)
    elif (save := _needs_grad(inputs)) or torch.compiler.is_compiling():
        out, last, _ = _scan_op(*inputs, delta_softplus, reverse, save, name)
    else:  # the kernel itself: a registered op would cost as much as a small layer's scan
        out, last, _ = _kernels(name).scan_forward(inputs, delta_softplus, reverse, False)
    return (out, last) if return_last_state else out


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: bool = True, reverse: bool = False,
    return_last_state: bool = False, initial_state: Tensor | None = None, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution, then SiLU if `activation`; differentiable.

    x: (batch, length, channels); weight: (channels, kernel); bias: (channels,). A state is the last kernel - 1
    inputs, (batch, kernel - 1, channels), in scan order. `reverse` lets a token see later tokens instead of earlier.

    Returns (batch, length, channels) in x's dtype, with `return_last_state` also the state after the last token.
    """
    if x.dim() != 3 or weight.dim() != 2:
        needed = "causal_conv1d needs x (batch, length, channels) and weight (channels, kernel)"
        raise HearSsamError(f"{needed}, not {tuple(x.shape)} and {tuple(weight.shape)}.")
    (batch, _, channels), kernel, tensors = x.shape, weight.shape[1], (x, weight, bias, initial_state)
    before = (batch, kernel - 1, channels)
    names = "x", "weight", "bias", "initial_state"
    _check("causal_conv1d", names, tensors, (tuple(x.shape), (channels, kernel), (channels,), before))
    name = _choose("torch" if backend == "mamba_ssm" else backend, x.device.type, x.dtype, _beyond(kernel))
    name = "torch" if name == "mamba_ssm" else name  # the adapter has no convolution
    if name == "reference":
        out = reference.causal_conv1d(*tensors, activation, reverse)
    elif _needs_grad(tensors) or torch.compiler.is_compiling():
        out = _conv_op(*tensors, activation, reverse, name)
    else:
        out = _kernels(name).conv_forward(*tensors, activation, reverse)
    if not return_last_state:
        return out
    recent = x[:, : before[1]].flip(1) if reverse else x[:, max(0, x.shape[1] - before[1]) :]
    if recent.shape[1] < before[1]:
        earlier = x.new_zeros(before) if initial_state is None else initial_state.to(x.dtype)
        recent = torch.cat([earlier, recent], 1)[:, -before[1] :]
    return out, recent.clone()  # a view would keep the whole sequence in memory


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend for the calls inside the block (of this thread)."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("scan backend", name, ("auto", *BACKENDS))
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def available_backends() -> dict[str, str | None]:
    """For each backend None if it runs here, else exactly why not."""
    return {name: why_not(name) for name in BACKENDS}


def why_not(name: str) -> str | None:
    """Why this backend does not run here; None if it does. No other one is looked at: that could wake a GPU."""
    if name not in BACKENDS:
        raise unknown_name("scan backend", name, ("auto", *BACKENDS))
    return None if (error := _probe(name)) is None else f"{type(error).__name__}: {error}"


# --- choice ---------------------------------------------------------------------------------------------------------


def _choose(backend: str, device: str, dtype: torch.dtype, size: int) -> str:
    if backend == "auto":
        backend = _chosen.get() or os.environ.get("HEAR_SSAM_BACKEND") or "auto"
    if backend == "auto":
        return _auto(device, dtype, size)
    if reason := why_not(backend):
        raise HearSsamError(f"scan backend {backend!r} does not run here: {reason}.") from _probe(backend)
    if why := _refuses(backend, device, dtype) or _overflows(backend, size):
        raise HearSsamError(f"scan backend {backend!r} {why}; use backend='torch' or 'auto'.")
    return backend


# The compiler asks once instead of tracing imports and self-checks: torch.compiler.assume_constant_result, which would
# import the whole compiler here, as long as importing torch takes.
_choose.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _auto(device: str, dtype: torch.dtype, size: int) -> str:
    """Decided, logged and, where it is a fallback, warned about once per device, dtype and size."""
    for name in _PREFERRED.get(device, ("torch",)):
        if _refuses(name, device, dtype) is not None:
            continue
        reason = why_not(name)
        why = f"does not run here ({reason})" if reason else _overflows(name, size)
        if why is None:
            logger.info("scan backend for %s on %s: %s", dtype, device, name)
            return name
        if name != "mamba_ssm":  # nobody misses an optional package behind our own kernel
            mend = "`hear-ssam doctor` tells more; an explicit backend or HEAR_SSAM_BACKEND=torch silences this."
            text = f"hear_ssam: scan backend {name!r} {why}; taking a slower one. {mend}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
    return "torch"


def _refuses(name: str, device: str, dtype: torch.dtype) -> str | None:
    wanted = {"cpu": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}
    if name not in wanted:
        return None
    if device == wanted[name] or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return "does not compute float64" if dtype == torch.float64 else None
    hint = " (TRITON_INTERPRET=1 interprets it slowly on a CPU)" if name == "triton" else ""
    return f"computes {wanted[name].upper()} tensors, not {device}{hint}"


def _beyond(size: int) -> int:
    """`size` where it overflows the CPU kernels' stack, else 0: so that no compiled graph depends on it."""
    return size if size > MOST else 0


def _overflows(name: str, size: int) -> str | None:
    if name != "cpu" or not size:
        return None
    return f"holds at most {MOST} states of a channel (or taps of a convolution), not {size}"


@functools.cache
def _probe(name: str) -> Exception | None:
    """Import the backend and let it check itself; the exception that says why it cannot run, or None."""
    try:
        if name == "mamba_ssm":
            importlib.import_module("selective_scan_cuda")
            importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        elif name not in ("reference", "torch"):
            _kernels(name).self_check()
    except Exception as error:  # whatever a foreign package raises at import is a reason, not a crash
        return error
    return None


class _Kernels(Protocol):
    """What the module of a backend offers; torch_backend tells more."""

    scan_forward: Callable[[ScanInputs, bool, bool, bool], tuple[Tensor, Tensor, Tensor]]
    scan_backward: Callable[[Tensor, Tensor | None, ScanInputs, Tensor, bool, bool], ScanInputs]
    conv_forward: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, bool, bool], Tensor]
    conv_backward: Callable[..., tuple[Tensor | None, ...]]  # (dout, the arguments of conv_forward)
    self_check: Callable[[], None]


def _kernels(name: str) -> _Kernels:
    """The module of a backend, imported when first used."""
    return cast(_Kernels, importlib.import_module(f".{name}_backend", __name__))


# --- one opaque, differentiable op for autograd, torch.compile and torch.export ---------------------------------------


@torch.library.custom_op("hear_ssam::selective_scan", mutates_args=())
def _scan_op(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor,
    initial_state: Tensor | None, delta_softplus: bool, reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    return _kernels(backend).scan_forward(inputs, delta_softplus, reverse, save)


@_scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), state, save = u.shape, A.shape[1], rest[-2]
    dtype = torch.promote_types(u.dtype, torch.float32)
    saved = (batch, (length + SAVE_EVERY - 1) // SAVE_EVERY, state, channels) if save else (0,)
    last = u.new_empty((batch, channels, state), dtype=dtype)
    return u.new_empty(u.shape), last, u.new_empty(saved, dtype=dtype)


@torch.library.custom_op("hear_ssam::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    z: Tensor | None, delta_bias: Tensor, initial_state: Tensor | None, saved: Tensor, delta_softplus: bool,
    reverse: bool, backend: str,
) -> List[Tensor]:  # fmt: skip # noqa: UP006 - torch 2.6 infers no schema from list[Tensor]
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = _kernels(backend).scan_backward(dout, dlast, inputs, saved, delta_softplus, reverse)
    return [u.new_empty(0) if grad is None else grad for grad in grads]


@_scan_backward_op.register_fake
def _(dout: Tensor, dlast: Tensor | None, *rest: Any) -> list[Tensor]:
    return [dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:9]]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # as zeros, those of `saved` would be as large as it is


def _scan_autograd(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    grads = _scan_backward_op(dout, dlast, *tensors, saved, ctx.delta_softplus, ctx.reverse, ctx.backend)
    return (*as_given(grads, tensors), None, None, None, None)


_scan_op.register_autograd(_scan_autograd, setup_context=_scan_setup)


@torch.library.custom_op("hear_ssam::causal_conv1d", mutates_args=())
def _conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool, reverse: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return _kernels(backend).conv_forward(x, weight, bias, initial_state, activation, reverse)


@_conv_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("hear_ssam::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: bool,
    reverse: bool, backend: str,
) -> List[Tensor]:  # fmt: skip # noqa: UP006
    grads = _kernels(backend).conv_backward(dout, x, weight, bias, initial_state, activation, reverse)
    return [x.new_empty(0) if grad is None else grad for grad in grads]


@_conv_backward_op.register_fake
def _(dout: Tensor, *rest: Any) -> list[Tensor]:
    return [dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:4]]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _conv_autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _conv_backward_op(dout, *tensors, ctx.activation, ctx.reverse, ctx.backend)
    return (*as_given(grads, tensors), None, None, None)


_conv_op.register_autograd(_conv_autograd, setup_context=_conv_setup)


def _needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# --- the official CUDA kernel ---------------------------------------------------------------------------------------


def _mamba_ssm_scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    if initial_state is not None:
        raise HearSsamError("scan backend 'mamba_ssm' takes no initial_state; use backend='triton' or 'torch'.")
    function = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def channel_first(x: Tensor | None) -> Tensor | None:
        return None if x is None else (x.flip(1) if reverse else x).to(u.dtype).transpose(1, 2).contiguous()

    A, D, bias = A.float(), D.float(), delta_bias.float()
    u_, delta_, B_, C_, z_ = (channel_first(x) for x in (u, delta, B, C, z))
    out, last = function(u_, delta_, A, B_, C_, D, z_, bias, delta_softplus, return_last_state=True)
    return (out.flip(2) if reverse else out).transpose(1, 2), last


def _check_scan(*inputs: Tensor | None) -> None:
    u, A = cast(Tensor, inputs[0]), cast(Tensor, inputs[2])
    if u.dim() != 3 or A.dim() != 2:
        needed = "selective_scan needs u (batch, length, channels) and A (channels, state)"
        raise HearSsamError(f"{needed}, not {tuple(u.shape)} and {tuple(A.shape)}.")
    (batch, length, channels), state = u.shape, A.shape[1]
    row, column = (batch, length, channels), (batch, length, state)
    shapes = (row, row, (channels, state), column, column, (channels,), row, (channels,), (batch, channels, state))
    _check("selective_scan", ScanInputs._fields, inputs, shapes)


def _check(function: str, names: Iterable[str], tensors: tuple[Tensor | None, ...], shapes: Iterable[Any]) -> None:
    """Kernels trust shapes; the first tensor tells the device."""
    device = cast(Tensor, tensors[0]).device
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise HearSsamError(f"{function}: {name} must have shape {shape}, not {tuple(tensor.shape)}.")
        if tensor is not None and tensor.device != device:
            raise HearSsamError(f"{function}: {name} is on {tensor.device}, not on {device}; move one of them.")
