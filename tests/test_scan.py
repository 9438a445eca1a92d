"""Every backend equals the reference loop: forward, last state, all gradients, chunks, reverse."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

from hear_ssam import scan
from hear_ssam.errors import HearSsamError
from hear_ssam.scan import available_backends, causal_conv1d, selective_scan, use_backend

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
GRAD = {"rtol": 6e-4, "atol": 2e-3}  # as mamba's own tests


def backends() -> list:
    reasons = available_backends()
    usable = []
    for name in ("torch", "cpu", "triton"):
        reason = reasons[name]
        if name == "triton" and reason is None and os.environ.get("TRITON_INTERPRET") != "1":
            reason = "CUDA only; tests/test_scan_triton.py interprets it"
        usable.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")))
    return usable


def make(batch=2, length=37, channels=48, state=24, seed=0, step=0.0, dtype=torch.float32, lead=False):
    """Random inputs; `step` shifts delta (large or tiny steps)."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values = {
        "u": rand(batch, length, channels),
        "delta": rand(batch, length, channels) * 0.5 + step,
        "A": -torch.exp(rand(channels, state) * 0.5) * torch.arange(1, state + 1) / 4,
        "B": rand(batch, length, state),
        "C": rand(batch, length, state),
        "D": rand(channels),
        "z": rand(batch, length, channels),
        "delta_bias": rand(channels) * 0.3 - 2,
        "initial_state": rand(batch, channels, state) if lead else None,
    }
    return {k: None if v is None else v.to(dtype) for k, v in values.items()}


def run(values, backend, grad=False, **options):
    values = {k: None if v is None else v.clone().requires_grad_(grad) for k, v in values.items()}
    out, last = selective_scan(**values, delta_softplus=True, return_last_state=True, backend=backend, **options)
    grads = {}
    if grad:
        g = torch.Generator().manual_seed(7)
        weight_out = torch.randn(out.shape, generator=g, dtype=torch.float64)
        weight_last = torch.randn(last.shape, generator=g, dtype=torch.float64)
        ((out * weight_out.to(out.dtype)).sum() + (last * weight_last.to(last.dtype)).sum()).backward()
        grads = {k: v.grad for k, v in values.items() if v is not None}
    return out, last, grads


def doubled(values):
    return {k: None if v is None else v.double() for k, v in values.items()}


def relative(a, b):
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1}, {"length": 3}, {"length": 16}, {"length": 251, "channels": 64}, {"batch": 1, "channels": 33},
        {"channels": 7, "state": 5}, {"lead": True}, {"step": 6.0}, {"step": -12.0},
    ],
)  # fmt: skip
def test_equal_to_the_reference(backend, reverse, shape):
    values = make(**shape)
    out, last, grads = run(values, backend, grad=True, reverse=reverse)
    want, want_last, want_grads = run(doubled(values), "reference", grad=True, reverse=reverse)
    assert relative(out, want) <= 1e-5
    assert relative(last, want_last) <= 1e-5
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name].double(), grad, **GRAD, msg=lambda m, name=name: f"d{name}: {m}")
    # the kernel that saves nothing gives the same numbers
    with torch.no_grad():
        again, last_again, _ = run(values, backend, reverse=reverse)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last_again, last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
def test_long_sequence(backend):
    values = make(batch=1, length=1001, channels=32)
    out, last, grads = run(values, backend, grad=True)
    want, want_last, want_grads = run(doubled(values), "reference", grad=True)
    assert relative(out, want) <= 1e-5 and relative(last, want_last) <= 1e-5
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=6e-4, atol=2e-3)


def test_torch_in_float64_is_the_reference():
    values = doubled(make(lead=True))
    out, _, grads = run(values, "torch", grad=True)
    want, _, want_grads = run(values, "reference", grad=True)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", backends())
def test_optional_inputs_may_be_absent(backend):
    values = make()
    for name in ("D", "z", "delta_bias"):
        values[name] = None
    values["delta"] = values["delta"].abs() * 0.1
    for grad in (False, True):
        leaves = {k: None if v is None else v.clone().requires_grad_(grad) for k, v in values.items()}
        out = selective_scan(**leaves, backend=backend)
        assert relative(out, selective_scan(**doubled(values), backend="reference")) <= 1e-5
        if grad:
            out.square().sum().backward()
            exact = {k: None if v is None else v.double().requires_grad_() for k, v in values.items()}
            selective_scan(**exact, backend="reference").square().sum().backward()
            for name in ("u", "delta", "A", "B", "C"):
                torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, **GRAD)


@pytest.mark.parametrize("backend", backends())
def test_chunks_with_carried_state_equal_the_whole(backend):
    values = make(length=50)
    whole, last, _ = run(values, backend)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 18), (18, 50)):
        part = {k: v[:, start:stop] if k in ("u", "delta", "B", "C", "z") else v for k, v in values.items()}
        part["initial_state"] = state
        piece, state, _ = run(part, backend)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", backends())
def test_reverse_is_flip_scan_flip(backend):
    values = make()
    flipped = {k: v.flip(1) if k in ("u", "delta", "B", "C", "z") else v for k, v in values.items()}
    back, last, _ = run(values, backend, reverse=True)
    there, want_last, _ = run(flipped, backend)
    torch.testing.assert_close(back, there.flip(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, want_last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", backends())
def test_views_and_batch_zero(backend):
    values = make(batch=3)
    whole, _, _ = run(values, backend)
    wide = torch.cat([values["u"], values["z"]], -1)  # u and z are halves of one projection, as in the block
    bc = torch.cat([values["B"], values["C"]], -1)
    views = {**values, "u": wide[..., :48], "z": wide[..., 48:], "B": bc[..., :24], "C": bc[..., 24:]}
    out = selective_scan(**views, delta_softplus=True, backend=backend)
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)
    strided = {**values, "u": values["u"].transpose(1, 2).contiguous().transpose(1, 2)}
    torch.testing.assert_close(
        selective_scan(**strided, delta_softplus=True, backend=backend), whole, rtol=1e-6, atol=1e-6
    )
    for i in range(3):  # a batch equals its singles
        single = {k: v[i : i + 1] if k in ("u", "delta", "B", "C", "z") else v for k, v in values.items()}
        torch.testing.assert_close(run(single, backend)[0], whole[i : i + 1], rtol=1e-6, atol=1e-6)
    empty = {k: v[:0] if k in ("u", "delta", "B", "C", "z") else v for k, v in values.items()}
    out, last, grads = run(empty, backend, grad=True)
    assert out.shape == (0, 37, 48) and last.shape == (0, 48, 24)
    assert grads["A"].abs().max() == 0
    if backend != "triton":
        empty = [(0, 8, 2), (4, 0, 2), (4, 8, 0)]  # no steps, channels or states
        for length, channels, state in empty:
            rows, states = torch.ones(2, length, channels), torch.ones(2, length, state)
            tensors = rows, rows, -torch.ones(channels, state), states, states
            out, last = selective_scan(*tensors, return_last_state=True, backend=backend)
            assert out.shape == (2, length, channels) and last.shape == (2, channels, state) and not last.any()


@pytest.mark.parametrize("backend", backends())
def test_bf16_inputs(backend):
    values = make(length=64)
    low = {k: v.bfloat16() if k in ("u", "B", "C", "z") else v for k, v in values.items() if v is not None}
    out, _, grads = run(low, backend, grad=True)
    exact = {k: v.double() for k, v in low.items()}
    want, _, want_grads = run(exact, "reference", grad=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=3e-2, atol=5e-2)
    for name, grad in want_grads.items():
        assert grads[name].dtype == low[name].dtype
        scale = grad.abs().max().clamp_min(1)
        torch.testing.assert_close(grads[name].double() / scale, grad / scale, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 48), (1, 1, 5), (2, 2, 33), (2, 251, 64), (0, 9, 8)])
def test_convolution_equals_the_reference(backend, reverse, activation, shape):
    g = torch.Generator().manual_seed(3)
    wide = torch.randn(*shape[:2], 2 * shape[2], generator=g)
    leaves = [
        wide[..., shape[2] :].detach(),  # a strided half, as in the block
        torch.randn(shape[2], 4, generator=g),
        torch.randn(shape[2], generator=g),
        torch.randn(shape[0], 3, shape[2], generator=g),
    ]
    results = []
    for name, cast in ((backend, torch.Tensor.float), ("reference", torch.Tensor.double)):
        x, w, b, s = (cast(leaf.detach()).requires_grad_() for leaf in leaves)
        out, state = causal_conv1d(
            x, w, b, activation=activation, reverse=reverse, initial_state=s, return_last_state=True, backend=name
        )
        (out.sin().sum() + state.square().sum()).backward()
        with torch.no_grad():
            plain = causal_conv1d(x, w, None, activation=activation, reverse=reverse, backend=name)
        results.append([out, state, plain, x.grad, w.grad, b.grad, s.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *backends()])
def test_the_convolution_is_torchs(backend):
    x, weight, bias = torch.randn(2, 20, 16), torch.randn(16, 4), torch.randn(16)
    for reverse, edges, taps in ((False, (3, 0), weight), (True, (0, 3), weight.flip(1))):
        want = F.silu(F.conv1d(F.pad(x.mT, edges), taps[:, None], bias, groups=16)).mT
        torch.testing.assert_close(causal_conv1d(x, weight, bias, reverse=reverse, backend=backend), want)


@pytest.mark.parametrize("backend", backends())
def test_convolution_chunks_equal_the_whole(backend):
    x, weight, bias = torch.randn(2, 20, 16), torch.randn(16, 4), torch.randn(16)
    whole = causal_conv1d(x, weight, bias, backend=backend)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 3), (3, 20)):
        piece, state = causal_conv1d(
            x[:, start:stop], weight, bias, initial_state=state, return_last_state=True, backend=backend
        )
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
def test_opaque_op(backend):
    """torch.library's own checks: schema, fake tensors, autograd registration."""
    values = tuple(make(length=5, channels=8, state=4).values())
    leaves = tuple(None if v is None else v.requires_grad_() for v in values)
    torch.library.opcheck(
        scan._scan_op, (*leaves, True, False, True, backend),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    torch.library.opcheck(scan._conv_op, (x, w, None, None, True, False, backend))
    out, last, saved = scan._scan_op(*leaves, True, False, True, backend)
    for op, arguments in (  # where a gradient is not laid out as declared, compiled steps fail
        (scan._scan_backward_op, (out, last, *leaves, saved, True)),
        (scan._conv_backward_op, (x, x, w, w[:, 0], None, True)),
        (scan._conv_backward_op, (x, x, w, w[:, 0], torch.randn(2, 3, 8), True)),
    ):
        torch.library.opcheck(op, (*arguments, False, backend), test_utils=("test_faketensor",))


@pytest.mark.parametrize("backend", backends())
def test_export_sees_one_op(backend):
    class Layer(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)

    values = make(length=9, channels=8, state=4)
    args = tuple(values[k] for k in ("u", "delta", "A", "B", "C"))
    with torch.no_grad():
        program = torch.export.export(Layer(), args)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert any("hear_ssam.selective_scan" in name for name in names)
        torch.testing.assert_close(program.module()(*args), Layer()(*args))


@pytest.mark.parametrize("backend", ["auto", *backends()])
def test_compiled_in_one_graph_with_gradients(backend):
    def layer(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)

    values = make(length=9, channels=8, state=4)
    grads = []
    for function in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer):
        leaves = [values[k].clone().requires_grad_() for k in ("u", "delta", "A", "B", "C")]
        function(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", *backends()])
def test_one_graph_serves_all_sizes(backend):
    def layer(u, delta, A, B, C, weight):
        return causal_conv1d(selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend), weight)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length, state in ((9, 4), (12, 5), (13, 6)):
        values = make(length=length, channels=8, state=state)
        leaves = [values[k] for k in ("u", "delta", "A", "B", "C")]
        torch.testing.assert_close(compiled(*leaves, values["B"][0, :8]), layer(*leaves, values["B"][0, :8]))


def test_explicit_choice_runs_or_raises(monkeypatch):
    values = make(length=3)
    with pytest.raises(HearSsamError, match="Did you mean 'triton'"):
        selective_scan(**values, backend="tritn")
    with pytest.raises(HearSsamError, match=r"mamba_ssm.*does not run here|computes CUDA"):
        selective_scan(**values, backend="mamba_ssm")
    with use_backend("mamba_ssm"), pytest.raises(HearSsamError):
        selective_scan(**values)
    monkeypatch.setenv("HEAR_SSAM_BACKEND", "nonsense")
    with pytest.raises(HearSsamError, match="nonsense"):
        selective_scan(**values)
    with use_backend("reference"):  # the context wins over the environment
        selective_scan(**values)


def test_mamba_ssm_gives_no_gradient_of_the_last_state(monkeypatch):
    """Its own documentation says so: who asks for it is told instead of training on nothing."""
    monkeypatch.setattr(scan, "_choose", lambda *_: "mamba_ssm")
    monkeypatch.setattr(scan, "_mamba_ssm_scan", lambda inputs, *_: (inputs.u, inputs.u[:, 0, :, None]))
    values = make(length=3)
    selective_scan(**values, return_last_state=True)
    values["u"].requires_grad_()
    selective_scan(**values)
    with pytest.raises(HearSsamError, match="'mamba_ssm' gives no gradient of the last state; use backend='triton'"):
        selective_scan(**values, return_last_state=True)


def test_auto_warns_once_when_it_falls_back(monkeypatch):
    values = make(length=3)
    monkeypatch.delenv("HEAR_SSAM_BACKEND", raising=False)
    monkeypatch.setattr(scan, "_probe", lambda name: ImportError("no llvmlite for you") if name == "cpu" else None)
    scan._auto.cache_clear()
    with pytest.warns(RuntimeWarning, match="ImportError: no llvmlite for you"):
        selective_scan(**values)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(**values)
    scan._auto.cache_clear()


def test_shapes_are_checked_by_name():
    values = make()
    with pytest.raises(HearSsamError, match="B must have shape"):
        selective_scan(**{**values, "B": values["B"][:, :-1]})
    with pytest.raises(HearSsamError, match="initial_state must have shape"):
        causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(3, 4), initial_state=torch.zeros(1, 2, 3))
    for bias in (torch.zeros(1), torch.zeros(8), torch.zeros(3, 1)):  # a kernel would read what lies behind it
        with pytest.raises(HearSsamError, match="bias must have shape"):
            causal_conv1d(torch.zeros(1, 4, 3), torch.zeros(3, 4), bias)
