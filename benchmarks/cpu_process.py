"""One process of the CPU benchmark: builds one implementation of the encoder, then measures whenever it is asked.

A peer is another package's Mamba mixer, with our weights, in place of ours; everything else of the encoder stays.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from hear_ssam.errors import HearSsamError

PEERS = ("transformers", "mambapy", "selective_scan_ref")
TURN = 0.2  # seconds that a fast row repeats in one turn
LONG, CHUNK = 22_001, 1_000  # tokens
# What --modes parts tells apart, in the order in which a block does it; and what is outside, and all of it.
PARTS = ("norm", "input projection", "convolution", "projection to step, B and C", "step size and scan",
         "output projection")  # fmt: skip
SCAN, REST, WHOLE = PARTS[4], "patches, residuals, the rest", "the encoder"


@dataclass(frozen=True)
class Measurement:
    """What one process measures."""

    mode: str
    system: str  # ssam or ssast
    size: str
    implementation: str
    dtype: str  # fp32, bf16, or float64 for the reference itself
    threads: int


class Worker:
    """A process that measures one task on request."""

    def __init__(self, task: Measurement) -> None:
        self.task, self.results = task, list[dict[str, Any]]()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()
        self.failed = ""

    def wait(self) -> str:
        """Until the process is prepared; "" or why it cannot be."""
        self.failed = self._receive()
        return self.failed

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise HearSsamError(f"the benchmark process of {self.task} ended unexpectedly (out of memory?).") from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the process reads the end of its work
        self._process.join()


def _serve(pipe: Connection, task: Measurement) -> None:
    """The body of a process: prepare, say "" or why not, then answer "turn" and "output"."""
    begin = time.perf_counter()
    try:
        answers = prepare(task, begin)
    except (ImportError, HearSsamError) as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    pipe.send("")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answers[pipe.recv()]())


def prepare(task: Measurement, begin: float) -> dict[str, Callable[[], Any]]:
    import torch

    torch.set_num_threads(task.threads)
    clock = time.process_time if task.threads == 1 else time.perf_counter
    if task.mode == "machine":
        return {"turn": functools.partial(_machine_rates, task.size, clock)}
    from hear_ssam.config import CONFIGS
    from hear_ssam.encoder import Encoder
    from hear_ssam.scan import use_backend

    imported = time.perf_counter() - begin
    torch.manual_seed(0)
    config = CONFIGS[f"{task.system}_{task.size}"]
    encoder = Encoder(config).eval()
    spec = torch.randn(1, config.window_frames, config.n_mels)
    mask = torch.rand(1, config.num_patches) < 0.5
    name = task.implementation.split()[0]
    in_chunks = task.implementation.endswith("in chunks")
    backend = name if task.system == "ssam" and name not in PEERS else "auto"
    if task.dtype == "float64":  # the reference; for gradients the torch backend, equal to it to 1e-10
        encoder, spec, backend = encoder.double(), spec.double(), "reference" if task.mode == "inference" else "torch"
    elif task.dtype == "bf16":
        encoder.set_precision("bf16")
    for block in encoder.blocks:
        if name in PEERS:
            block.mixer = build_peer(name, block.mixer)
        elif name == "naive":
            block.attn = naive_attention(block.attn)
        elif in_chunks:
            block.mixer = carried(block.mixer)

    if task.mode == "training":
        from hear_ssam.pretraining.learner import Learner
        from hear_ssam.pretraining.recipe import Recipe
        from hear_ssam.pretraining.windows import Batch

        learner, drawn = Learner(encoder, Recipe()), Batch(spec, [mask], torch.arange(1))

    def act() -> Any:
        with use_backend(backend):
            if task.mode == "training":
                encoder.zero_grad()
                learner.total(learner(drawn)).mean().backward()
                named = ((_our_name(key), weight.grad) for key, weight in encoder.named_parameters())
                return {key: gradient.flatten() for key, gradient in named if gradient is not None}
            with torch.no_grad():
                return {"tokens": encoder.tokens(spec)}

    def read_long() -> None:
        with use_backend(backend), torch.no_grad():
            for chunk in torch.randn(1, LONG, config.embed_dim).split(CHUNK if in_chunks else LONG, dim=1):
                encoder.run_blocks(chunk)

    def start() -> dict[str, Any]:
        first, second = (_repeat(act, 0)[0] for _ in range(2))
        note = f"import {imported:.2f} s, first embedding {1e3 * first:.0f} ms, second {1e3 * second:.0f} ms"
        return {"seconds": [imported + first], "note": note}

    def turn() -> dict[str, Any]:
        if task.mode == "parts":
            return parts(encoder, act, clock)
        if task.mode == "start":
            return start()
        if task.mode == "long":
            from .cells import timed

            found = timed(lambda _: read_long(), runs=1)
            return {"seconds": found["cpu_s" if task.threads == 1 else "wall_s"], "peak_mb": found["peak_mb"]}
        return {"seconds": _repeat(act, TURN, clock)}

    if task.mode != "start" and task.dtype != "float64":
        act()  # what loads or compiles at first use
    return {"turn": turn, "output": lambda: {key: x.detach().double().numpy() for key, x in act().items()}}


def _repeat(action: Callable[[], Any], at_least: float, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of the runs that together take `at_least` seconds; one run at the least."""
    seconds: list[float] = []
    while not seconds or sum(seconds) < at_least:
        begin = clock()
        action()
        seconds.append(clock() - begin)
    return seconds


def parts(encoder: Any, act: Callable[[], Any], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each of PARTS in the passes of one turn, of the rest, and of the whole."""
    spent, began, handles = dict.fromkeys([*PARTS, "mixer"], 0.0), list[float](), list[Any]()

    def watch(part: str, module: Any) -> None:
        def end(*_: Any) -> None:
            spent[part] += clock() - began.pop()

        handles.append(module.register_forward_pre_hook(lambda *_: began.append(clock())))
        handles.append(module.register_forward_hook(end))

    for block in encoder.blocks:
        mixer = block.mixer
        modules = (block.norm, mixer.in_proj, mixer.conv, mixer.x_proj, None, mixer.out_proj, mixer)
        for part, module in zip(spent, modules, strict=True):
            if module is not None:
                watch(part, module)
    found: dict[str, list[float]] = {part: [] for part in (*PARTS, REST, WHOLE)}
    while sum(found[WHOLE]) < TURN:
        spent.update(dict.fromkeys(spent, 0.0))
        (whole,) = _repeat(act, 0, clock)
        spent[SCAN] = spent["mixer"] - sum(spent[part] for part in (PARTS[1], PARTS[2], PARTS[3], PARTS[5]))
        for part in PARTS:
            found[part].append(spent[part])
        found[REST].append(whole - spent["norm"] - spent["mixer"])
        found[WHOLE].append(whole)
    for handle in handles:
        handle.remove()
    return found


def naive_attention(attention: Any) -> Any:
    """A module that computes what our `attention` computes, with all L x L weights in memory: what the literature
    compares against."""
    import torch

    class NaiveAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ours = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, L, D) -> (B, L, D)
            qkv = self.ours.qkv(x).unflatten(-1, (3, self.ours.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
            weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            return self.ours.proj((weights @ v).transpose(1, 2).flatten(2))

    return NaiveAttention()


def carried(mixer: Any) -> Any:
    """A module that computes what our Mamba `mixer` does; each call goes on where the one before it ended."""
    import torch
    import torch.nn.functional as F

    from hear_ssam.scan import causal_conv1d, selective_scan

    class Carried(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer
            self.before: torch.Tensor | None = None  # (B, K-1, I), inputs of the convolution
            self.state: torch.Tensor | None = None  # (B, I, N)

        def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
            x, z = mixer.in_proj(x).chunk(2, dim=-1)
            x, self.before = causal_conv1d(
                x, mixer.conv.weight, mixer.conv.bias, initial_state=self.before, return_last_state=True
            )
            low, b, c = mixer.x_proj(x).split(mixer.split, dim=-1)
            weight = mixer.dt_proj.weight
            y, self.state = selective_scan(
                x, F.linear(low.to(weight.dtype), weight), -torch.exp(mixer.A_log), b, c, mixer.D, z,
                delta_bias=mixer.dt_proj.bias, delta_softplus=True, initial_state=self.state, return_last_state=True,
            )  # fmt: skip
            return mixer.out_proj(y)

    return Carried()


def build_peer(name: str, mixer: Any) -> Any:
    """A module that computes what our Mamba `mixer` computes, with the same weights, as another package does it."""
    import torch

    (inner, state), kernel = mixer.A_log.shape, mixer.conv.weight.shape[1]
    dim, rank = mixer.out_proj.weight.shape[0], mixer.dt_proj.weight.shape[1]
    peer: torch.nn.Module
    if name == "transformers":
        transformers = importlib.import_module("transformers")
        config = transformers.MambaConfig(
            hidden_size=dim, intermediate_size=inner, expand=inner // dim, state_size=state, conv_kernel=kernel,
            time_step_rank=rank, num_hidden_layers=1,
        )  # fmt: skip
        peer = importlib.import_module("transformers.models.mamba.modeling_mamba").MambaMixer(config, 0)
    elif name == "mambapy":
        mambapy = importlib.import_module("mambapy.mamba")
        peer = mambapy.MambaBlock(
            mambapy.MambaConfig(
                d_model=dim, n_layers=1, dt_rank=rank, d_state=state, expand_factor=inner // dim, d_conv=kernel
            )
        )
    else:
        peer = _reference_mixer(dim, inner, rank, state, kernel)
    weights = {re.sub(r"^conv\.", "conv1d.", key): value for key, value in mixer.state_dict().items()}  # cf. _our_name
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    peer.load_state_dict(weights)

    class Mixer(torch.nn.Module):  # with our signature
        def __init__(self) -> None:
            super().__init__()
            self.peer = peer

        def forward(self, x: Any, *_: Any) -> Any:
            return self.peer(x)

    return Mixer()


def _our_name(parameter: str) -> str:
    """What our mixer calls a parameter of a peer."""
    return parameter.replace(".peer.conv1d.", ".conv.").replace(".peer.", ".")


def _reference_mixer(dim: int, inner: int, rank: int, state: int, kernel: int) -> Any:
    """The formula of mamba-ssm's `selective_scan_ref` and its slow path, as literally as torch says it: channel first,
    everything of size channels x length x state in memory, one step at a time."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class ReferenceMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
            self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
            self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
            self.dt_proj = nn.Linear(rank, inner)
            self.A_log = nn.Parameter(torch.zeros(inner, state))
            self.D = nn.Parameter(torch.ones(inner))
            self.out_proj = nn.Linear(inner, dim, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            length = tokens.shape[1]
            u, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (B, D, L)
            u = F.silu(self.conv1d(u)[..., :length])
            low, B, C = self.x_proj(u.transpose(1, 2)).split((rank, state, state), dim=-1)
            delta = F.softplus(self.dt_proj(low)).transpose(1, 2)
            A = -torch.exp(self.A_log)
            decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
            inputs = torch.einsum("bdl,bln,bdl->bdln", delta, B, u)
            h = u.new_zeros(len(u), inner, state)
            outputs = []
            for t in range(length):
                h = decay[:, :, t] * h + inputs[:, :, t]
                outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
            y = torch.stack(outputs, dim=2) + u * self.D[:, None]
            return self.out_proj((y * F.silu(z)).transpose(1, 2))

    return ReferenceMixer()


# --- the machine ----------------------------------------------------------------------------------------------------

# Instructions for the multiply units per register of states: step size x A, three for 2^r (with AVX-512; five for the
# polynomial and two for the exponent without), input x B, + decay x state, and y + state x C. Other units can run
# everything else beside them.
WITH_AVX512, WITHOUT = 7, 11
CHAINS = 12  # enough for two units of four cycles, and no more than there are registers


@functools.cache
def _multiply_kernels() -> Any:
    from hear_ssam.scan.simd import Kernel, build

    def write(k: Kernel, chains: int) -> None:
        steps, out = k.integer("steps"), k.tensor("out", 1)
        values = [k.variable(k.constant(1.0 + i)) for i in range(chains)]
        with k.loop(0, steps):
            for value in values * (CHAINS // chains):
                value[0] = value[0] * 0.75 + 1.0
        for i, value in enumerate(values):
            out.store(value[0], i * 16)

    return build(write, 1), build(write, CHAINS)


def _machine_rates(size: str, clock: Callable[[], float]) -> dict[str, float]:
    """FLOP/s of matrix products of this size's shapes (fp32, bf16), scan elements/s of the multiply units, clock."""
    import torch
    import torch.nn.functional as F

    from hear_ssam.config import CONFIGS

    c = CONFIGS[f"ssam_{size}"]
    rates: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for of, to in ((c.embed_dim, 2 * c.inner_dim), (c.inner_dim, c.embed_dim)):
            x, weight = torch.randn(1 + c.num_patches, of, dtype=dtype), torch.randn(to, of, dtype=dtype)
            fastest = min(_repeat(functools.partial(F.linear, x, weight), TURN / 4, clock))
            rates[name] = max(rates.get(name, 0.0), 2.0 * len(x) * of * to / fastest)
    with contextlib.suppress(ImportError):  # no llvmlite, no clock
        from hear_ssam.scan.simd import AVX512, LANES, run

        out, steps = torch.zeros(256), 50_000  # a chain of them takes a millisecond
        seconds = [
            min(_repeat(functools.partial(run, kernel, 1, steps=steps, out=out), TURN / 8, clock)) / (CHAINS * steps)
            for kernel in _multiply_kernels()
        ]
        rates["clock"] = 4 / seconds[0]  # a chain of fused multiply-adds advances every 4 cycles
        rates["multiplies"] = WITH_AVX512 if AVX512 else WITHOUT
        rates["elements"] = LANES / (rates["multiplies"] * seconds[1])
    return rates
