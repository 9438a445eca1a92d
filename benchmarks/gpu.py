"""The GPU numbers in one call: correctness of every gradient, the device's ceilings, kernels, encoder, training step.

    python -m benchmarks gpu -o OUT       # some minutes on one GPU; writes OUT/gpu.md and OUT/gpu.csv

Needs torch with CUDA, triton (comes with it) and this package; mamba-ssm's CUDA kernel is compared where it imports.
A floor is the time below which no version can run: bytes that must move ÷ copy bandwidth of this run, and
exponentials ÷ exponential rate of this run. Times are medians of CUDA events over rotating inputs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from hear_ssam.config import CONFIGS
from hear_ssam.encoder import Encoder
from hear_ssam.errors import HearSsamError
from hear_ssam.pretraining.learner import Learner
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.windows import Batch, random_mask
from hear_ssam.scan import available_backends, causal_conv1d, selective_scan, use_backend

from . import plain_parser

LENGTH = 251  # tokens of a 2-second clip
STATE = 24
WIDTHS = {"tiny": 576, "base": 2304}  # channels inside a mixer
ROTATE_OVER = 200e6  # bytes of inputs to rotate over: several times the L2 cache

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """`python -m benchmarks gpu`: exit code 1 where a check or a table failed, 2 without a GPU."""
    parser = plain_parser("gpu", __doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for gpu.md and gpu.csv")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="clips per kernel call")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls per number")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="which tables to make")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise HearSsamError("PyTorch sees no CUDA device; run this on a machine with a GPU and a torch built for it.")
    torch.manual_seed(0)
    tables: dict[str, list[Row]] = {"facts": facts()}
    ceilings = measure_ceilings(args)
    tables["ceilings"] = [{"what": name, "per second": f"{rate:.4g}"} for name, rate in ceilings.items()]
    for name in args.only:
        print(f"... {name}", flush=True)
        try:
            tables[name] = PARTS[name](args, ceilings)
        except Exception as error:  # the next table is worth having all the same
            traceback.print_exc()
            tables[name] = [{"failed": f"{type(error).__name__}: {error}".splitlines()[0]}]
        write(tables, args.output)
    wrong = [row for rows in tables.values() for row in rows if "failed" in row or not row.get("right", True)]
    print((args.output / "gpu.md").read_text())
    if wrong:
        print(f"benchmarks gpu: {len(wrong)} checks or tables failed", file=sys.stderr)
    return 1 if wrong else 0


def facts() -> list[Row]:
    device = torch.cuda.get_device_properties(0)
    memory = f"{device.total_memory / 2**30:.0f} GiB"
    found = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "device": f"{device.name}, {device.multi_processor_count} multiprocessors, {memory}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"triton {triton.__version__}",
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }
    for name in ("triton", "mamba_ssm"):
        found[f"backend {name}"] = available_backends()[name] or "runs"
    return [{"what": k, "value": v} for k, v in found.items()]


def write(tables: dict[str, list[Row]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# GPU benchmark", ""]
    for name, rows in tables.items():
        if not rows:
            continue
        columns = list(rows[0])
        lines += [f"## {name}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(show(row[c]) for c in columns) + " |" for row in rows] + [""]
    (out / "gpu.md").write_text("\n".join(lines))
    with open(out / "gpu.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "column", "value"])
        for name, rows in tables.items():
            writer.writerows([name, i, c, row[c]] for i, row in enumerate(rows) for c in row)


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- timing ---------------------------------------------------------------------------------------------------------


def milliseconds(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Median device time of one call; consecutive calls take the next inputs."""
    for call in calls[:3] * 2:  # compile and warm up
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # lets the host run ahead, so that no launch gap is timed
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for i, (start, stop) in enumerate(marks):
        start.record()
        calls[i % len(calls)]()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks)


def copies(size: float) -> int:
    """How many sets of inputs of `size` bytes rotate."""
    return max(1, min(8, round(ROTATE_OVER / size)))


# --- ceilings -------------------------------------------------------------------------------------------------------


@triton.jit
def _exponentials(x, rounds, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at)
    for _ in range(rounds):
        value = tl.exp2(-value)
    tl.store(x + at, value)


def measure_ceilings(args: argparse.Namespace) -> dict[str, float]:
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / milliseconds([lambda: b.copy_(a)], args.repeats) * 1e3
    m = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    gemm = 2 * 8192**3 / milliseconds([lambda: m[0] @ m[1]], args.repeats) * 1e3
    programs, rounds, size = 132 * 64, 2000, 1024
    exponentials = milliseconds([lambda: _exponentials[(programs,)](a, rounds, size, num_warps=4)], args.repeats)
    return {
        "bytes copied (read + written)": copy,
        "FLOP, bf16 matrix product": gemm,
        "exponentials (ex2.approx)": programs * rounds * size / exponentials * 1e3,
    }


def floors(nbytes: float, exponentials: float, ceilings: dict[str, float]) -> dict[str, float]:
    copy, _, exp = ceilings.values()
    return {"bytes floor ms": nbytes / copy * 1e3, "exp floor ms": exponentials / exp * 1e3}


# --- correctness ----------------------------------------------------------------------------------------------------


def scan_inputs(batch: int, length: int, channels: int, state: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As in an encoder: u and z are halves of one tensor, B and C slices of another; step sizes stay float32."""
    xz = torch.randn(batch, length, 2 * channels, device="cuda").to(dtype)
    bc = torch.randn(batch, length, 2 * state, device="cuda").to(dtype)
    return {
        "u": xz[..., :channels],
        "delta": 0.5 * torch.randn(batch, length, channels, device="cuda"),
        "A": -torch.exp(0.5 * torch.randn(channels, state, device="cuda"))
        * (1 + torch.arange(state, device="cuda"))
        / 4,
        "B": bc[..., :state],
        "C": bc[..., state:],
        "D": torch.randn(channels, device="cuda"),
        "z": xz[..., channels:],
        "delta_bias": 0.3 * torch.randn(channels, device="cuda") - 2,
    }


def check_correctness(args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    """Forward ≤ 1e-5 of the largest value; gradients as mamba's own tests: rtol 6e-4, atol 2e-3; bf16 3e-2, 5e-2."""
    rows = []
    shapes = [
        (2, 251, 576, 24), (1, 1, 64, 24), (2, 3, 33, 24), (3, 16, 7, 5), (2, 17, 100, 16), (1, 1001, 64, 24),
        (64, 251, 96, 24), (2, 64, 40, 1), (2, 40, 48, 32),
    ]  # fmt: skip
    for dtype, tolerance in ((torch.float32, (6e-4, 2e-3)), (torch.bfloat16, (3e-2, 5e-2))):
        for shape in shapes if dtype == torch.float32 else shapes[:3]:
            for reverse in (False, True):
                rows += [
                    {"kernel": kernel, "shape": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "reverse": reverse}
                    | verdict(kernel, shape, dtype, reverse, tolerance)
                    for kernel in ("scan", "conv")
                ]
    return rows


def verdict(kernel: str, shape: tuple, dtype: torch.dtype, reverse: bool, tolerance: tuple[float, float]) -> Row:
    inputs = scan_inputs(*shape, dtype)
    batch, _, channels, state = shape
    if kernel == "scan":
        inputs["initial_state"] = torch.randn(batch, channels, state, device="cuda")
    else:
        weight, before = torch.randn(channels, 4, device="cuda"), torch.randn(batch, 3, channels, device="cuda")
        inputs = {"x": inputs["u"], "weight": weight, "bias": inputs["D"], "initial_state": before.to(dtype)}
    function = selective_scan if kernel == "scan" else causal_conv1d
    options = {"delta_softplus": True} if kernel == "scan" else {}
    results = []
    for backend in ("triton", "reference"):
        leaves = {k: v.detach().to(v.dtype if backend == "triton" else torch.float64) for k, v in inputs.items()}
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        outputs = function(**leaves, **options, reverse=reverse, return_last_state=True, backend=backend)
        g = torch.Generator("cuda").manual_seed(1)
        weights = [torch.randn(x.shape, generator=g, device="cuda") for x in outputs]
        sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)).backward()
        results.append(([x.detach().double() for x in outputs], {k: v.grad.double() for k, v in leaves.items()}))
    (got, grads), (want, exact) = results
    forward = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    # how far a gradient leaves its tolerance at worst: below 1 is right; bf16 relative to the largest value
    worst = {}
    for name, b in exact.items():
        scale = b.abs().max().clamp_min(1) if dtype == torch.bfloat16 else 1
        excess = ((grads[name] - b) / scale).abs() / (tolerance[1] + tolerance[0] * (b / scale).abs())
        worst[name] = excess.max().item()
    name = max(worst, key=lambda k: worst[k] if worst[k] == worst[k] else float("inf"))
    right = forward <= (1e-5 if dtype == torch.float32 else 3e-2) and all(w <= 1 for w in worst.values())
    return {"forward error": forward, "worst gradient": name, "error / tolerance": worst[name], "right": right}


# --- kernels --------------------------------------------------------------------------------------------------------


def time_scan(args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    rows = []
    peer = available_backends()["mamba_ssm"] is None
    for size, channels in WIDTHS.items():
        for batch in args.batches:
            if batch * channels > 1024 * 576:
                continue
            for dtype in (torch.bfloat16, torch.float32):
                sets = [scan_inputs(batch, LENGTH, channels, STATE, dtype)]
                nbytes = sum(x.numel() * x.element_size() for x in sets[0].values()) + sets[0]["u"].nbytes
                sets += [scan_inputs(batch, LENGTH, channels, STATE, dtype) for _ in range(copies(nbytes) - 1)]
                element = batch * LENGTH * channels * STATE
                ours = forward_backward(sets, args.repeats, our_scan)
                theirs = forward_backward(sets, args.repeats, peer_scan) if peer else (float("nan"),) * 2
                # backward: reads the inputs and dout again, writes a gradient for each; two exponentials per element
                for i, name in enumerate(("forward", "backward")):
                    bound = floors(nbytes * (1 + i), element * (1 + i), ceilings)
                    rows.append(
                        {"pass": name, "size": size, "batch": batch, "dtype": str(dtype)[6:], "triton ms": ours[i]}
                        | bound
                        | {
                            "ms / floor": ours[i] / max(bound.values()),
                            "us per clip": ours[i] / batch * 1e3,
                            "mamba_ssm ms": theirs[i],
                            "mamba_ssm / triton": theirs[i] / ours[i],
                        }
                    )
    return rows


def forward_backward(sets: list[dict], repeats: int, scan: Callable) -> tuple[float, float]:
    with torch.no_grad():
        forward = milliseconds([lambda v=v: scan(v)() for v in sets], repeats)
    steps = []
    for values in sets[:2]:  # graphs keep memory
        leaves = {k: v.detach().requires_grad_() for k, v in values.items()}
        out, weight = scan(leaves)(), torch.randn_like(values["u"])
        inputs = list(leaves.values())
        steps.append(lambda o=out, i=inputs, w=weight: torch.autograd.grad(o, i, w, retain_graph=True))
    return forward, milliseconds(steps, repeats)


def our_scan(values: dict) -> Callable[[], torch.Tensor]:
    return lambda: selective_scan(**values, delta_softplus=True, backend="triton")


def peer_scan(values: dict) -> Callable[[], torch.Tensor]:
    """mamba-ssm's fused kernel in the layout it wants, (batch, channels, length); its transposes are not timed."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    wanted = values["u"].dtype
    moved = {}
    for k, v in values.items():
        moved[k] = v.to(wanted).transpose(1, 2).contiguous() if v.dim() == 3 else v
    return lambda: selective_scan_fn(**moved, delta_softplus=True)


def time_conv(args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    rows = []
    channels = WIDTHS["tiny"]
    for batch in args.batches:
        for dtype in (torch.bfloat16, torch.float32):
            weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
            wide = [torch.randn(batch, LENGTH, 2 * channels, device="cuda").to(dtype) for _ in range(3)]
            nbytes = wide[0].nbytes  # x read, y written
            halves = [x[..., :channels] for x in wide]

            def forward(x: torch.Tensor, weight=weight, bias=bias) -> torch.Tensor:
                return causal_conv1d(x, weight, bias, backend="triton")

            with torch.no_grad():
                times = [milliseconds([lambda x=x, f=forward: f(x) for x in halves], args.repeats)]
            steps = []
            for x in halves:
                leaves = [x.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
                y = causal_conv1d(*leaves, backend="triton")
                dy = torch.randn_like(y)
                steps.append(lambda y=y, i=leaves, dy=dy: torch.autograd.grad(y, i, dy, retain_graph=True))
            times.append(milliseconds(steps, args.repeats))
            for name, factor, ms in zip(("forward", "backward"), (1, 1.5), times, strict=True):
                floor = floors(nbytes * factor, 0, ceilings)["bytes floor ms"]
                rows.append({"pass": name, "size": "tiny", "batch": batch, "dtype": str(dtype)[6:], "triton ms": ms,
                             "bytes floor ms": floor, "ms / floor": ms / floor})  # fmt: skip
    return rows


# --- encoder --------------------------------------------------------------------------------------------------------


def time_encoder(args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    rows = []
    for name in ("ssam_tiny", "ssam_base"):
        config = CONFIGS[name]
        encoder = Encoder(config).cuda().eval()
        repeats = max(5, args.repeats // 3)
        for precision in ("bf16", "fp32"):
            encoder.set_precision(precision)
            for batch in (256, 1024) if name == "ssam_tiny" else (256,):
                specs = [torch.randn(batch, config.window_frames, config.n_mels, device="cuda") for _ in range(3)]
                for backend in ("triton", "torch") if batch == 256 else ("triton",):
                    with use_backend(backend), torch.inference_mode():
                        ms = milliseconds([lambda s=s, e=encoder: e.tokens(s) for s in specs], repeats)
                    rows.append({"encoder": name, "precision": precision, "batch": batch, "backend": backend,
                                 "ms": ms, "us per clip": ms / batch * 1e3, "clips/s": batch / ms * 1e3})  # fmt: skip
    return rows


def time_training(args: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    """One step of pre-training: masked forward under bf16 autocast or in float32, backward, AdamW."""
    rows = []
    config = CONFIGS["ssam_tiny"]
    for precision in ("bf16", "fp32"):
        for batch in (128, 512):
            encoder = Encoder(config).cuda()
            optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
            spec = torch.randn(batch, config.window_frames, config.n_mels, device="cuda")
            mask = random_mask(batch, config, torch.Generator()).cuda()
            learner = Learner(encoder, Recipe())

            def step(e=learner, o=optimizer, s=spec, m=mask, low=precision == "bf16") -> None:
                with torch.autocast("cuda", torch.bfloat16, enabled=low):
                    loss = e.total(e(Batch(s, [m], torch.arange(len(s))))).mean()
                loss.backward()
                o.step()
                o.zero_grad()

            with use_backend("triton"):
                torch.cuda.reset_peak_memory_stats()
                ms = milliseconds([step], max(5, args.repeats // 3))
                peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append({"encoder": "ssam_tiny", "precision": precision, "batch": batch, "ms": ms,
                         "clips/s": batch / ms * 1e3, "peak GiB": peak})  # fmt: skip
    return rows


PARTS: dict[str, Callable[[argparse.Namespace, dict[str, float]], list[Row]]] = {
    "correctness": check_correctness,
    "scan": time_scan,
    "convolution": time_conv,
    "encoder": time_encoder,
    "training": time_training,
}
