"""Time, memory and operations of the four systems by length: where which attention is worse than a recurrence.

    python -m benchmarks scaling                  # what the CSV lacks, then figure and page
    python -m benchmarks scaling --sizes tiny --batches 8 --lengths 250 1000       # further cells
    python -m benchmarks scaling --device cuda --dtypes bf16 --batches 1 64
    python -m benchmarks scaling --sizes tiny --passes inference --dtypes fp32 --lengths 22000 --seconds 900 \
        --gigabytes 16      # what ended at a limit, with a higher one

A cell is the blocks of one encoder, with random weights, on random tokens: no front end, no table of positions to run
out of. Training is forward, backward and AdamW. One torch thread. The clock is the CPU time of the process, which other
programs disturb little; on a GPU it is the wall clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .cells import Cell, Row, canvas, machines, medians, parser, piped, run, save, timed

KEYS = ("system", "form", "size", "pass", "dtype", "device", "batch", "tokens")
# Each system, and how its mixer is computed.
SYSTEMS = {
    "SSAM": ("ssam", "scan"),
    "SSAMBA": ("ssamba", "scan"),
    "AxLSTM, chunked": ("axlstm", "chunked"),
    "AxLSTM, parallel": ("axlstm", "parallel"),
    "SSAST, SDPA": ("ssast", "sdpa"),
    "SSAST, naive attention": ("ssast", "naive"),
}
DOUBLING = [250 * 2**i for i in range(10)]  # 250 ... 128,000
# What must have run: lengths of (size, pass, dtype); 22,000 is the length of the published claim.
MUST = {
    ("tiny", "inference", "fp32"): [*DOUBLING, 22_000],
    ("base", "inference", "fp32"): [250, 2_000, 22_000],
    ("tiny", "inference", "bf16"): [250, 4_000],
    ("tiny", "training", "fp32"): [250, 4_000],
    ("tiny", "training", "bf16"): [250, 4_000],
}


def main(arguments: list[str]) -> int:
    """`python -m benchmarks scaling`: scaling.csv, scaling.png and its section of README.md."""
    made = parser("scaling", __doc__ or "")
    made.add_argument("--sizes", nargs="+", default=["tiny", "base"], choices=["tiny", "small", "base"])
    made.add_argument("--passes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    made.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    made.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N")
    made.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help="default: those of the study")
    made.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    made.add_argument("--seconds", type=float, default=60.0, help="of CPU, that one call may take (default 60)")
    made.add_argument(
        "--gigabytes", type=float, default=10.0, help="of address space of a cell (default 10; GPU: none)"
    )
    args = made.parse_args(arguments)
    limits = {"limit_s": args.seconds, "limit_gb": args.gigabytes if args.device == "cpu" else 0.0}
    return run(__name__, cells(args), args, cost, **limits)


def cells(args: Any) -> list[Cell]:
    chosen = []
    for key in itertools.product(args.sizes, args.passes, args.dtypes):
        lengths = args.lengths or MUST.get(key, [])
        for (system, form), batch, tokens in itertools.product(SYSTEMS.values(), args.batches, lengths):
            values = (system, form, *key, args.device, batch, tokens)
            chosen.append(dict(zip(KEYS, values, strict=True)))
    return chosen


def cost(cell: Cell) -> tuple[bool, int]:
    """Cells run by it: first the curve of tiny, short lengths before long ones, then the others likewise."""
    further = (cell["size"], cell["pass"], cell["dtype"], cell["batch"]) != ("tiny", "inference", "fp32", 1)
    return further, cell["tokens"] * cell["batch"]


def measure(cell: Cell) -> Iterator[Cell]:
    import torch

    from hear_ssam.config import CONFIGS
    from hear_ssam.encoder import Encoder

    config = CONFIGS[f"{cell['system']}_{cell['size']}"]
    form, batch, tokens, train = cell["form"], cell["batch"], cell["tokens"], cell["pass"] == "training"
    count = batch * operations(config, form, tokens) * (3 if train else 1)  # backward multiplies twice as much
    seconds = batch * tokens / config.num_patches * config.window_frames / 100
    yield {"gflop": f"{count / 1e9:.4g}", "audio_s": f"{seconds:.4g}", "kernel": ""}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = Encoder(config).set_precision(cell["dtype"]).to(cell["device"]).train(train)
    for block in encoder.blocks:
        choose(block, form)
    optimizer = torch.optim.AdamW(encoder.blocks.parameters(), lr=1e-4)

    def act(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(train):
            y = encoder.run_blocks(x)
        if train:
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()

    def tokens_of(length: int) -> torch.Tensor:
        return torch.randn(batch, length, config.embed_dim, device=cell["device"])

    yield {
        "kernel": kernel(form, cell["device"], lambda: act(tokens_of(64)))
    }  # and what loads or compiles at first use has done so
    if cell["device"] == "cuda":
        yield {"GPU": torch.cuda.get_device_name()}
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    found = timed(act, lambda: tokens_of(tokens), cell["limit_s"])
    if cell["device"] == "cuda":
        found |= {"cpu_s": found["wall_s"], "peak_mb": (torch.cuda.max_memory_allocated() - held) / 1e6}
    row = medians(found)
    yield {**row, "audio_s_per_s": f"{1e3 * seconds / float(row['cpu_ms']):.4g}"}


def choose(block: Any, form: str) -> None:
    """Make a block compute its mixer in one of the forms."""
    from .cpu_process import naive_attention

    if form == "naive":
        block.attn = naive_attention(block.attn)
    elif form in ("parallel", "chunked"):
        block.layer.PARALLEL_UP_TO = math.inf if form == "parallel" else 0


def kernel(form: str, device: str, act: Callable[[], None]) -> str:
    """Run `act` and say what ran: torch's name of the attention kernel, or the backend of the scan."""
    import torch

    from hear_ssam.scan import available_backends

    if form != "sdpa":
        act()
        wanted = ("triton", "mamba_ssm", "torch") if device == "cuda" else ("cpu", "torch")
        return next(name for name in wanted if available_backends()[name] is None) if form == "scan" else ""
    with torch.profiler.profile() as profile:
        act()
    names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    return " ".join(sorted(name for name in names if name.startswith("_scaled_dot_product") and "backward" not in name))


def operations(config: Any, form: str, tokens: int) -> float:
    """Floating-point operations of all blocks on a sequence, by formula.

    Products and attention count 2 for a multiply-add, as torch's FLOP counter does; to these come 7 for every element
    of the scan's state and token (decay, exponential, input, two for the recurrence, two for the output) and 2 for
    every tap of a convolution. Norms and activations, also of attention weights, are left out.
    """
    dim, inner, state, rank = config.embed_dim, config.inner_dim, config.state_dim, config.dt_rank
    taps = 2 * config.conv_kernel * inner
    if config.block == "transformer":
        per_token = 2 * (4 * dim * dim + 2 * dim * dim * config.expand) + 4 * tokens * dim
    elif config.block == "mlstm":
        width = inner // config.num_heads
        cell = 4 * tokens * inner  # scores, and their product with the values, of all pairs of tokens
        if form == "chunked":  # the same inside a chunk of 64; the memory and its normaliser, read and written
            cell = 4 * min(64, tokens) * inner + 4 * width * inner + 2 * inner
        per_token = 2 * (3 * dim * inner + 12 * inner + 6 * inner * config.num_heads) + cell + taps
    else:
        scan = 2 * inner * (2 * rank + 2 * state) + 7 * inner * state + taps
        per_token = 2 * 3 * dim * inner + scan * (2 if config.block == "bimamba" else 1)
    return float(config.depth * tokens * per_token)


# --- the page -------------------------------------------------------------------------------------------------------


NAMES = {form: name for name, form in SYSTEMS.items()}
STYLES = dict(zip(SYSTEMS, ("#1f6f8b", "#6a51a3", "#2e8b57", "#99d1a9", "#c44e52", "#e8a29b"), strict=True))
FIT_FROM = 2_000  # tokens: below, what does not depend on length has its share
Curve = dict[int, float]  # tokens → a column


def curve(rows: Sequence[Row], name: str, column: str) -> Curve:
    """One system, tiny, inference, fp32, batch 1 on the CPU: the column at every length that was reached."""
    wanted = (*SYSTEMS[name], "tiny", "inference", "fp32", "cpu", "1")
    found = {int(row["tokens"]): row for row in rows if tuple(row[key] for key in KEYS[:-1]) == wanted}
    return {tokens: max(1.0, float(row[column])) for tokens, row in sorted(found.items()) if not row["ended"]}


def exponent(values: Curve) -> float:
    """p of the power law c L^p that fits best, from FIT_FROM tokens on; NaN for fewer than two lengths."""
    import numpy as np

    points = [(math.log(tokens), math.log(value)) for tokens, value in values.items() if tokens >= FIT_FROM]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else math.nan


def crossing(ours: Curve, theirs: Curve) -> str:
    """From which length on `ours` is below `theirs`, as far as both were measured."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return "not run"
    above = [tokens for tokens in both if ours[tokens] >= theirs[tokens]]
    if not above:
        return f"at every length to {both[-1]:,}"
    if above[-1] == both[-1]:
        return f"not up to {both[-1]:,}"
    low, high = above[-1], both[both.index(above[-1]) + 1]
    left, right = (math.log(ours[tokens] / theirs[tokens]) for tokens in (low, high))
    at = math.exp(math.log(low) + left / (left - right) * math.log(high / low))
    return f"from {float(f'{at:.2g}'):,.0f}"


def draw(rows: Sequence[Row], file: Path) -> None:
    figure, panels = canvas(2, 10, 4.2)
    for axes, column, label in zip(panels, ("cpu_ms", "peak_mb"), ("CPU time (ms)", "peak memory (MB)"), strict=True):
        for name, colour in STYLES.items():
            values = curve(rows, name, column)
            legend = f"{name}: $L^{{{exponent(values):.2f}}}$"
            axes.loglog(list(values), list(values.values()), "o-", color=colour, markersize=3, label=legend)
        axes.set(xlabel="tokens L", ylabel=label)
        axes.set_xticks(DOUBLING[::2], [f"{tokens:,}" for tokens in DOUBLING[::2]], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("tiny, inference, fp32, batch 1, one thread; exponents fitted from 2,000 tokens on", fontsize=9)
    save(figure, file)


def cell_text(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row["ended"]:
        return row["ended"] + (f" ({float(row['limit_gb']):g} GB)" if "memory" in row["ended"] else "")
    times = float(f"{float(row['audio_s_per_s']):.3g}")
    return f"{float(row['cpu_ms']):,.0f} ms, {float(row['peak_mb']):,.0f} MB, {times:,g}×"


def page(rows: Sequence[Row], folder: Path) -> str:
    if rows:
        draw(rows, folder / "scaling.png")
    by_key = {tuple(row[key] for key in KEYS): row for row in rows}
    must = {(*key, "cpu", "1", str(tokens)) for key, lengths in MUST.items() for tokens in lengths}
    rank = {key: place for place, key in enumerate(MUST)}
    table = []
    for key in sorted(must | {key[2:] for key in by_key}, key=lambda k: (k[3:5], rank.get(k[:3], 9), k[:3], int(k[5]))):
        what = ", ".join(key[:3] if key[3:5] == ("cpu", "1") else (*key[:4], f"batch {key[4]}"))
        found = [by_key.get((*form, *key)) for form in SYSTEMS.values()]
        table.append((what, f"{int(key[5]):,}", *map(cell_text, found)))
    time, memory, gflop = ({name: curve(rows, name, c) for name in SYSTEMS} for c in ("cpu_ms", "peak_mb", "gflop"))
    kernels: dict[str, set[str]] = {}
    for row in rows:
        kernels.setdefault(NAMES[row["system"], row["form"]], set()).add(f"`{row['kernel']}`" if row["kernel"] else "–")
    fits = [
        (name, *(f"{exponent(values[name]):.2f}".replace("nan", "–") for values in (time, memory, gflop)),
         f"{gflop[name].get(250, math.nan):.3g}".replace("nan", "–"), ", ".join(sorted(kernels.get(name, ()))))
        for name in SYSTEMS
    ]  # fmt: skip
    recurrent, attention = list(SYSTEMS)[:3], list(SYSTEMS)[4:]
    cpus = [row for row in rows if row["device"] == "cpu"]
    gpu = max((int(row["tokens"]) for row in rows if row["device"] == "cuda"), default=0)
    lacking = ["other batches (`--batches 8`)"] * all(row["batch"] == "1" for row in rows)
    lacking += ["`--sizes small`"] * all(row["size"] != "small" for row in rows) + ["`--device cuda`"] * (not gpu)
    crossings = [
        (ours, *(crossing(values[ours], values[theirs]) for theirs in attention for values in (time, memory)))
        for ours in recurrent
    ]
    return "\n".join([
        "## Scaling with length", "",
        f"`python -m benchmarks scaling` makes this section, `scaling.csv` and `scaling.png`. {machines(rows)}", "",
        HOW, "" if any("bf16" in row["features"] for row in cpus) else "This CPU has no instructions for bfloat16.", "",
        "![Time and memory against tokens, both logarithmic.](scaling.png)\n" if rows else "",
        piped(["size, pass, type", "tokens", *SYSTEMS], table),
        f"Not run: {', '.join(lacking)}.\n" if lacking else "",
        f"Exponents p of L^p (tiny, inference, fp32), fitted from {FIT_FROM:,} tokens on, and what ran:", "",
        piped(["", "time", "memory", "operations", "GFLOP at 250 tokens", "kernel"], fits),
        "Length in tokens from which a recurrence is below attention, as far as both were measured:", "",
        piped(["", *(f"{what} than {name}" for name in attention for what in ("faster", "less memory"))], crossings),
        "What was published, point by point:", "",
        piped(["claim", "published", "here, naive attention", "here, SDPA", "device"], claims(cpus, time, memory)),
        ON_GPU.format(gpu) if gpu else "", GPU,
    ])  # fmt: skip


HOW = """A cell is a process of its own: the blocks of an encoder on random tokens, median of up to five calls. Times
are CPU time of the one thread (other programs ran on the machine; wall times stand in the CSV); memory is what the
first call had resident above the process without input; × is seconds of audio per second; operations are by formula.
Cells of one length ran in random order; each had 60 s a call and 10 GB of address space unless its row says
otherwise. Training is forward, backward and AdamW. SSAM, SSAST and AxLSTM have 125 tokens a second of audio, SSAMBA
has 50. Of AxLSTM the package takes the parallel form up to 512 tokens, the chunked one beyond."""

ON_GPU = """On a GPU the rows `cuda` ran, up to {:,} tokens, one sequence at a time, where a scan, which takes one token
after the other, leaves most of the device idle: the Transformer is ahead.
"""

GPU = """Windows a second of a training step on an NVIDIA H100 (torch 2.11, Triton 3.6, bf16, batches of 512, SDPA), as
`hear-ssam pretrain` logged them (`gpu.md` times single kernels): SSAST 8,061, SSAM 2,724, AxLSTM 1,111 windows of 2 s;
SSAMBA, in batches of 256 and with two passes a step, 312 windows of 10.24 s. At 250 tokens the Transformer is the
fastest.
"""


def claims(rows: Sequence[Row], time: dict[str, Curve], memory: dict[str, Curve]) -> list[tuple[str, ...]]:
    """Every published claim with what the rows, of CPUs, say under either attention."""
    attention, at = ("SSAST, naive attention", "SSAST, SDPA"), 22_000
    ended = {
        NAMES[r["system"], r["form"]]: r for r in rows if r["ended"] and r["size"] == "tiny" and r["tokens"] == str(at)
    }

    def saving(values: dict[str, Curve], theirs: str, published: float) -> str:
        ours, base, bound = values["SSAMBA"].get(at), values[theirs].get(at), ""
        if not base and values is time and "over" in ended.get(theirs, {}).get("ended", ""):
            base, bound = 1e3 * float(ended[theirs]["limit_s"]), "at least "
        if not ours or not base:
            return f"SSAST ended: {cell_text(ended[theirs])}" if theirs in ended else "not run"
        less = 100 * (1 - ours / base)
        if bound and less < published:
            verdict = "its end was not waited for"
        else:
            verdict = "holds" if less > published - 2 else "less than published" if less > 0 else "does not hold"
        return f"{bound}{less:.1f} % less: {verdict}" if less > 0 else f"{-less:.0f} % more: {verdict}"

    def better(ours: str, theirs: str) -> str:
        both = sorted(time[ours].keys() & time[theirs].keys())
        if not both:
            return "not run"
        mine, base, small, large = (exponent(values[name]) for values in (time, memory) for name in (ours, theirs))
        said = "holds for time and memory" if small < large - 0.1 else "holds for time alone"
        last = both[-1]
        faster, less = time[theirs][last] / time[ours][last], memory[ours][last] / memory[theirs][last]
        return (
            f"{said if mine < base - 0.1 else 'does not hold'}: exponents of time {mine:.2f} and {base:.2f}, of memory "
            f"{small:.2f} and {large:.2f}; at {last:,} tokens {faster:.3g} times as fast with {less:.3g} of the memory"
        )

    where = f"{' and '.join(sorted({row['CPU'] for row in rows}))}, one thread"
    ssamba, overview = "% less (Shams et al. 2024, NVIDIA L40, naive attention, tiny)", "curves (Yadav et al., one GPU)"
    table = []
    for what, values, share in (("less time", time, 92.7), ("less memory", memory, 95.4)):
        found = [saving(values, theirs, share) for theirs in attention]
        table.append((f"SSAMBA needs {what} than SSAST at {at:,} tokens", f"{share} {ssamba}", *found, where))
    for ours in ("SSAM", "AxLSTM, chunked", "AxLSTM, parallel"):
        found = [better(ours, theirs) for theirs in attention]
        table.append((f"{ours} scales better with length than SSAST", overview, *found, where))
    return table
