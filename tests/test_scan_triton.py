"""The Triton kernels without a GPU: interpreted on tiny shapes, and compiled ahead of time to see registers and spills.

`python -m tests.test_scan_triton` with TRITON_INTERPRET=1 runs the interpreted checks; Triton reads that variable
once, at import, so the test starts a process for them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import test_scan

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77  # exit code of the interpreted checks where the interpreter itself is broken

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_interpreted_kernels_equal_the_reference():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_scan_triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted_checks() -> int:
    reason = test_scan.available_backends()["triton"]
    if reason is not None and "only 0-dimensional arrays" in reason:
        print("this Triton's interpreter does not work with this NumPy: install numpy<2.4 or a newer triton")
        return SKIPPED
    assert reason is None, reason
    shapes = [
        {"length": 1, "channels": 4, "state": 3},
        {"length": 19, "channels": 33, "batch": 1, "lead": True},  # two blocks of channels, 24 = 16 + 8 states
        {"length": 9, "channels": 5, "state": 5, "step": 6.0},
        {"length": 17, "channels": 5, "state": 1, "step": -12.0},
    ]
    for shape in shapes:
        for reverse in (False, True):
            test_scan.test_equal_to_the_reference("triton", reverse, shape)
    for shape in ((2, 5, 9), (1, 1, 5), (1, 18, 33), (0, 9, 8)):
        for activation, reverse in ((True, False), (True, True), (False, True)):
            test_scan.test_convolution_equals_the_reference("triton", reverse, activation, shape)
    test_scan.test_opaque_op("triton")
    test_scan.test_export_sees_one_op("triton")
    test_scan.test_convolution_chunks_equal_the_whole("triton")
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_ahead_of_time(arch, tmp_path, monkeypatch):
    """N = 24, bf16 activations: the forward kernels keep their states in registers; the backward kernel compiles.

    Two registers may go to the stack: with 64 channels a program uses all 255, and is faster all the same (measured).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hear_ssam.scan import triton_backend

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip(f"this Triton has no {cuobjdump}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    low = {"u", "z", "out", "dout", "du", "dz"}
    fixed = {"EVERY": triton_backend.SAVE_EVERY, "SOFTPLUS": True, "REVERSE": False}
    forward, backward = (triton_backend._tiles(24, size) for size in (triton_backend.FORWARD, triton_backend.CHANNELS))
    for label, kernel, more in (
        ("forward", triton_backend._scan_forward, {**forward, "SAVE": False, "initial": None}),
        ("forward, saving", triton_backend._scan_forward, {**forward, "SAVE": True, "initial": None}),
        ("backward", triton_backend._scan_backward, {**backward, "T": triton_backend.PIECE, "dinitial": None}),
    ):
        constants = {**fixed, **more}
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            number = name in ("length", "channels", "blocks") or name.endswith(("_b", "_l"))
            kind = "i32" if number else "*bf16" if name in low else "*fp32"
            signature[name] = "constexpr" if name in constants else kind
            if name not in constants and name not in ("length", "channels", "blocks"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        print(f"sm_{arch} {label}: {registers} registers, {stack} bytes of stack")
        if label != "backward":
            assert stack <= 8, f"{label} spills {stack} bytes"


if __name__ == "__main__":
    sys.exit(interpreted_checks())
