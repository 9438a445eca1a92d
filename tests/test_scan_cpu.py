"""The jitted kernels beyond what every backend must do (test_scan): processes, threads, bits, numbers at the edge."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys

import pytest
import torch

from hear_ssam import HearSsamError, scan
from hear_ssam.scan import available_backends, causal_conv1d, cpu_backend, selective_scan

REASON = available_backends()["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cpu backend: {REASON}")


def inputs(batch=3, length=50, channels=96, state=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, delta, z = (torch.randn(batch, length, channels, generator=g) for _ in range(3))
    B, C = (torch.randn(batch, length, state, generator=g) for _ in range(2))
    A, D = -torch.rand(channels, state, generator=g) * 8, torch.randn(channels, generator=g)
    return [u, delta, A, B, C, D, z, D - 2]


def forward(tensors):
    return selective_scan(*tensors, delta_softplus=True, backend="cpu")


def step(tensors):
    """Output and all gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = forward(leaves)
    out.sin().sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return forward(inputs(batch=1, seed=index))[0]


def test_data_loader_workers_run_the_kernels():
    with torch.no_grad():
        want = torch.stack([Scans()[i] for i in range(4)])  # compiled in the parent, used by the forked children
        loader = torch.utils.data.DataLoader(
            Scans(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120
        )
        torch.testing.assert_close(torch.cat(list(loader)), want, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_compiles_and_runs():
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from hear_ssam.scan.cpu_backend import scan_forward\n"
        "from hear_ssam.scan.reference import ScanInputs\n"
        "def scan(state):\n"
        "    u, A, B = torch.ones(1, 40, 64), -torch.ones(64, state), torch.ones(1, 40, state)\n"
        "    return scan_forward(ScanInputs(u, u, A, B, B, A[:, 0], None, A[:, 0], None), True, False, False)[0]\n"
        "want = scan(4)\n"
        "child = os.fork()\n"
        "if child == 0:\n"  # state 7 is not compiled yet in the parent
        "    os._exit(0 if torch.equal(scan(4), want) and scan(7).isfinite().all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_at_once():
    """Eight threads that compile and run at the same time get what one gets."""
    cases = [inputs(batch=1, length=20, state=4 + i % 4, seed=i) for i in range(16)]  # four new kernels
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(step, cases))
    for case, got in zip(cases, together, strict=True):
        for x, y in zip(got, step(case), strict=True):
            assert torch.equal(x, y)


def test_same_bits_twice_and_for_any_number_of_threads():
    first = step(inputs())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for x, y in zip(first, step(inputs()), strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(threads)


def test_extreme_numbers():
    u, delta, A, B, C, D, z, bias = inputs(batch=1, length=8, channels=16)
    want = forward([u, delta, A, B, C, D, z, bias])
    huge = forward([u, delta.fill_(1e4), A, B, C, D, z, bias])  # exp(delta A) vanishes: no state survives a step
    exact = selective_scan(u, delta, A, B, C, D, z, bias, True, backend="reference")
    torch.testing.assert_close(huge, exact, rtol=1e-5, atol=1e-2)
    z[0, 3, 5], z[0, 4, 5] = 200.0, -200.0  # the gate saturates without overflow
    assert forward([u, delta, A, B, C, D, z, bias]).isfinite().all() and want.isfinite().all()
    u[0, 2, 1] = float("nan")  # not hidden, and kept to its channel
    bad = forward([u, delta, A, B, C, D, z, bias]).isnan()
    assert bad[0, 2:, 1].any() and not bad[..., 2:].any() and not bad[..., 0].any()


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_any_kernel_size(kernel):
    x, weight = torch.randn(2, 9, 40, requires_grad=True), torch.randn(40, kernel, requires_grad=True)
    state = torch.randn(2, kernel - 1, 40, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        out = causal_conv1d(x, weight, initial_state=state, backend=backend)
        results.append([out, *torch.autograd.grad(out.cos().sum(), (x, weight, state))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_to_nearest():
    """The kernel's own conversion equals torch's, ties and non-finite numbers included."""
    x = torch.randn(1, 64, 32).bfloat16()
    x[0, :4, 0] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0], dtype=torch.bfloat16)
    scale = torch.full((32, 1), 1.0 + 2**-8)  # products with exactly one bit too many: many ties
    got = causal_conv1d(x, scale, activation=False, backend="cpu")
    want = (x.float() * scale[:, 0]).bfloat16()
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())


def test_serial_without_torchs_pool(monkeypatch):
    from hear_ssam.scan import simd

    want = forward(inputs())
    monkeypatch.setattr(simd, "_parallel_for", None)  # as with torch before 2.10
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(forward(inputs()), want)  # without a word: nothing is lost
        torch.set_num_threads(2)
        simd._warn_of_one_thread.cache_clear()
        with pytest.warns(RuntimeWarning, match=r"torch .* so that CPU kernels run on one; HEAR_SSAM_BACKEND=torch"):
            assert torch.equal(forward(inputs()), want)
        assert torch.equal(forward(inputs()), want)  # once is enough
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["scan", "convolution"])
def test_more_than_the_stack_holds_is_refused(kind, monkeypatch):
    """In a process of its own such a scan ended with a segmentation fault."""

    def compute(backend):
        if kind == "scan":
            return selective_scan(*inputs(batch=1, length=2, channels=8, state=16_384), True, backend=backend)
        return causal_conv1d(torch.ones(1, 2, 8), torch.ones(8, 16_384), backend=backend)

    with pytest.raises(HearSsamError, match=r"'cpu' holds at most 1024 states .*, not 16384; use backend='torch'"):
        compute("cpu")
    monkeypatch.delenv("HEAR_SSAM_BACKEND", raising=False)
    scan._auto.cache_clear()  # which warns once per size
    with pytest.warns(RuntimeWarning, match="'cpu' holds at most 1024 states .* taking a slower one"):
        out = compute("auto")
    torch.testing.assert_close(out, compute("reference"), rtol=1e-4, atol=1e-3)


def test_the_largest_state_fits_on_the_stack():
    """Forwards and backwards, in a thread of Python's as well."""
    tensors = inputs(batch=1, length=3, channels=8, state=1024)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        got = pool.submit(step, tensors).result()
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = selective_scan(*leaves, delta_softplus=True, backend="torch")
    out.sin().sum().backward()
    for x, y in zip(got, [out.detach(), *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("function", ["scan_forward", "conv_forward"])
@pytest.mark.parametrize(("error", "refused"), [(3e-4, True), (1e-7, False)])
def test_wrong_kernels_are_refused(function, error, refused, monkeypatch):
    """A kernel that is off by 0.03 % is not taken: an explicit choice raises, auto falls back with a warning."""
    right = getattr(cpu_backend, function)

    def wrong(*arguments):
        results = right(*arguments)
        if isinstance(results, tuple):
            return results[0] * (1 + error), *results[1:]
        return results * (1 + error)

    monkeypatch.setattr(cpu_backend, function, wrong)
    monkeypatch.delenv("HEAR_SSAM_BACKEND", raising=False)
    scan._probe.cache_clear()
    scan._auto.cache_clear()
    try:
        reason = available_backends()["cpu"]
        assert (reason is not None) == refused
        if refused:
            kind = "scan" if function == "scan_forward" else "convolution"
            assert f"the compiled {kind} differs from the reference" in reason
            with pytest.raises(HearSsamError, match=f"the compiled {kind} differs"):
                forward(inputs())
            with pytest.warns(RuntimeWarning, match=f"the compiled {kind} differs .* taking a slower one"):
                selective_scan(*inputs(), delta_softplus=True)
    finally:
        scan._probe.cache_clear()
        scan._auto.cache_clear()


def test_carried_states_do_not_keep_the_sequence():
    """Memory stays constant over chunks only if no state is a view of a chunk's activations."""
    u, delta, A, B, C, D, z, bias = inputs()
    _, conv = causal_conv1d(u, torch.ones(96, 4), return_last_state=True, backend="cpu")
    _, scan = selective_scan(u, delta, A, B, C, D, z, bias, True, return_last_state=True, backend="cpu")
    for state in (conv, scan):
        assert state.untyped_storage().nbytes() == state.numel() * 4
