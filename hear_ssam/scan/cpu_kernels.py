"""What the CPU scan backend computes, as kernels of simd: the selective scan, the convolution, and their gradients.

A work unit is one batch row of one block of CHANNELS channels. It walks through time in blocks of SAVE_EVERY steps:
stage the block's step sizes and inputs in scratch memory (L1 cache), scan them, finish the outputs. While staging it
asks for the rows of the next block, which lie too far apart for the CPU to see a pattern. Steps beyond the end of the
sequence get the step size 0, which changes no state. Nothing of size length x channels x state exists.

Notation as in reference; N = `state`, the number of states of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .reference import SAVE_EVERY
from .simd import LANES, LOG2E, Argument, Array, Kernel, Operand, Value

CHANNELS = 32  # of a work unit: two cache lines of float32
VECTORS = CHANNELS // LANES
TILE = 4  # time steps whose step sizes, inputs and sums stay in registers together
TILES = SAVE_EVERY // TILE
STATES = 8  # backward: states whose decays and values of a whole block stay in the L1 cache together


@contextmanager
def _units(k: Kernel) -> Iterator[tuple[Value, Value, Value, Value]]:
    """Each unit's number, its batch row, the first of its vectors of channels, and how many they are."""
    vectors = k.integer("vectors")
    blocks = (vectors + (VECTORS - 1)) // VECTORS
    with k.loop(k.begin, k.end) as unit:
        row = unit // blocks
        first = (unit - row * blocks) * VECTORS
        yield unit, row, first, k.minimum(vectors - first, VECTORS)


def _load_states(k: Kernel, target: Array, v: Value, state: int, source: Argument, *index: Operand) -> None:
    """target[v N + n] = source[..., channel, n] for LANES channels from index[-1] on."""
    with k.loop(0, state) as n, k.loop(0, LANES) as lane:
        target.numbers[(v * state + n) * LANES + lane] = source.load_number(*index[:-1], index[-1] + lane, n)


def _store_states(k: Kernel, source: Array, v: Value, state: int, target: Argument, *index: Operand) -> None:
    with k.loop(0, state) as n, k.loop(0, LANES) as lane:
        target.store_number(source.numbers[(v * state + n) * LANES + lane], *index[:-1], index[-1] + lane, n)


class _Scratch:
    """What a unit keeps in the L1 cache: its states, and one block of time steps."""

    def __init__(self, k: Kernel, state: int) -> None:
        self.state = state
        self.A, self.h, self.carry, self.dA = k.arrays(4, VECTORS * state)  # [v N + n]; A times log2(e)
        self.B, self.C = (Array(k, SAVE_EVERY * state // LANES).numbers for _ in range(2))  # [t N + n]
        self.dt, self.dtu, self.y, self.dy, self.dx, self.ds, self.slope, self.dgate = k.arrays(8, SAVE_EVERY)  # [t]


def _scan_block(
    k: Kernel, s: _Scratch, steps: Operand, first: Value, stop: Value, trace: list[Array] | None = None
) -> None:
    """Let the states first ... stop - 1 of one vector of channels pass `steps` staged steps, and add to y.

    `trace` receives the decay of every step and the state before it, [(i - first) SAVE_EVERY + t].
    """
    tile = range(TILE)
    with k.loop(0, steps, TILE) as start:
        step_sizes, inputs = [s.dt[start + j] for j in tile], [s.dtu[start + j] for j in tile]
        sums = [k.variable(s.y[start + j]) for j in tile]
        with k.loop(first, stop) as i:
            a, h, n = s.A[i], s.h[i], i - first // s.state * s.state
            decays = k.exp2s([step_sizes[j] * a for j in tile])
            for j, decay in zip(tile, decays, strict=True):
                at = (start + j) * s.state + n
                if trace:
                    place = (i - first) * SAVE_EVERY + start + j
                    trace[0][place], trace[1][place] = decay, h
                h = k.fma(decay, h, inputs[j] * k.fill(s.B[at]))
                sums[j][0] = h * k.fill(s.C[at]) + sums[j][0]
            s.h[i] = h
        for j in tile:
            s.y[start + j] = sums[j][0]


def write_scan_forward(k: Kernel, state: int, bf16: bool, gate: bool, softplus: bool) -> None:
    """Per block of time steps: stage, scan, finish; with `save`, store the state before each block."""
    u, delta, out = k.rows("u", bf16), k.rows("delta"), k.rows("out", bf16)
    z = k.rows("z", bf16) if gate else None
    A, B, C = k.tensor("A", 2), k.rows("B"), k.rows("C")
    D, bias = k.tensor("D", 1), k.tensor("delta_bias", 1)
    initial, last, saved = k.tensor("initial_state", 3), k.tensor("last", 3), k.tensor("saved", 4)
    length, save = k.integer("length"), k.integer("save")
    s = _Scratch(k, state)
    with _units(k) as (_, row, first, count):
        with k.loop(0, count) as v:
            _load_states(k, s.A, v, state, A, (first + v) * LANES)
            _load_states(k, s.h, v, state, initial, row, (first + v) * LANES)
        with k.loop(0, count * state) as i:
            s.A[i] = s.A[i] * LOG2E
        with k.loop(0, length, SAVE_EVERY) as start:
            steps = k.minimum(length - start, SAVE_EVERY)
            padded = (steps + (TILE - 1)) // TILE * TILE
            with k.loop(0, padded) as t:
                now = k.minimum(start + t, length - 1)
                k.copy(s.B, t * state, B.address(row, now, 0), state)
                k.copy(s.C, t * state, C.address(row, now, 0), state)
            with k.loop(0, count) as v:
                c = (first + v) * LANES
                with k.loop(0, save * state) as n:
                    saved.stream(s.h[v * state + n], row, start // SAVE_EVERY, n, c)
                with k.loop(0, padded) as t:
                    now = k.minimum(start + t, length - 1)
                    for ahead in (u, delta) if z is None else (u, delta, z):
                        ahead.prefetch(row, now + SAVE_EVERY, c)
                    out.prefetch(row, now, c, write=True)
                    x, step = u.load(row, now, c), delta.load(row, now, c) + bias.load(c)
                    if softplus:
                        step, _ = k.softplus(step)
                    step = k.select(t, "<", steps, step, 0.0)
                    s.dt[t], s.dtu[t], s.y[t] = step, step * x, D.load(c) * x
                _scan_block(k, s, padded, v * state, v * state + state)
                with k.loop(0, steps) as t:
                    result = s.y[t]
                    if z is not None:
                        gates = z.load(row, start + t, c)
                        result = result * gates * k.sigmoid(gates)
                    out.store(result, row, start + t, c)
        with k.loop(0, count) as v:
            _store_states(k, s.h, v, state, last, row, (first + v) * LANES)


class _BackwardScratch(_Scratch):
    def __init__(self, k: Kernel, state: int) -> None:
        super().__init__(k, state)
        # Sums over LANES / TILE groups of lanes, finished once per block: [n TILES + t // TILE], lanes t % TILE.
        self.dB, self.dC = k.arrays(2, state * TILES)
        self.dD, self.dbias = Array(k, VECTORS), Array(k, VECTORS)
        self.trace = k.arrays(2, STATES * SAVE_EVERY)


def _walk_back(k: Kernel, s: _BackwardScratch, tile: Value, first: Value, stop: Value) -> None:
    """Let the gradients of the states first ... stop - 1 pass the time steps of a tile, last step first.

    With carry_t = decay_{t+1} dh_{t+1}:  dh_t = C_t dy_t + carry_t,  dC_t = <h_t, dy_t>,  dB_t = <dh_t, dt_t u_t>,
    d(dt_t u_t) = <dh_t, B_t>,  d(dt_t A) = dh_t decay_t h_{t-1}. s.h[i] holds h after the tile and moves before it.
    """
    start = tile * TILE
    dt, dtu, dy = ([x[start + j] for j in range(TILE)] for x in (s.dt, s.dtu, s.dy))
    dx, ds = ([k.variable(x[start + j]) for j in range(TILE)] for x in (s.dx, s.ds))
    with k.loop(first, stop) as i:
        a, h, carry, dA = s.A[i], s.h[i], s.carry[i], s.dA[i]
        n = i - first // s.state * s.state
        to_sum: tuple[list[Value], list[Value]] = ([], [])
        for j in reversed(range(TILE)):
            at, place = (start + j) * s.state + n, (i - first) * SAVE_EVERY + start + j
            dh = dy[j] * k.fill(s.C[at]) + carry
            to_sum[0].insert(0, dh * dtu[j])
            to_sum[1].insert(0, h * dy[j])
            dx[j][0] = dh * k.fill(s.B[at]) + dx[j][0]
            carry, h = dh * s.trace[0][place], s.trace[1][place]
            w = carry * h
            ds[j][0] = w * a + ds[j][0]
            dA = w * dt[j] + dA
        s.h[i], s.carry[i], s.dA[i] = h, carry, dA
        for total, vectors in zip((s.dB, s.dC), to_sum, strict=True):
            total[n * TILES + tile] = total[n * TILES + tile] + k.fold(vectors, 1)
    for j in range(TILE):
        s.dx[start + j], s.ds[start + j] = dx[j][0], ds[j][0]


def write_scan_backward(k: Kernel, state: int, bf16: bool, gate: bool, softplus: bool) -> None:
    """Per block of time steps, from the last to the first: stage, recompute forwards, walk back, finish."""
    u, delta, dout = k.rows("u", bf16), k.rows("delta"), k.rows("dout", bf16)
    du, ddelta = k.rows("du", bf16), k.rows("ddelta")
    z, dz = (k.rows("z", bf16), k.rows("dz", bf16)) if gate else (None, None)
    A, B, C = k.tensor("A", 2), k.rows("B"), k.rows("C")
    D, bias = k.tensor("D", 1), k.tensor("delta_bias", 1)
    saved, dlast, dinitial = k.tensor("saved", 4), k.tensor("dlast", 3), k.tensor("dinitial", 3)
    dA, dD, dbias = k.tensor("dA", 3), k.tensor("dD", 2), k.tensor("dbias", 2)  # one for each batch row
    dB, dC = k.tensor("dB", 4), k.tensor("dC", 4)  # (units, blocks, N, SAVE_EVERY)
    length = k.integer("length")
    s, zero = _BackwardScratch(k, state), k.constant(0.0)
    with _units(k) as (unit, row, first, count):
        with k.loop(0, count) as v:
            s.dD[v], s.dbias[v] = zero, zero
            _load_states(k, s.A, v, state, A, (first + v) * LANES)
            _load_states(k, s.carry, v, state, dlast, row, (first + v) * LANES)
        with k.loop(0, count * state) as i:
            s.A[i], s.dA[i] = s.A[i] * LOG2E, zero
        blocks = (length + (SAVE_EVERY - 1)) // SAVE_EVERY
        with k.loop(0, blocks) as done:
            block = blocks - 1 - done
            start = block * SAVE_EVERY
            steps = k.minimum(length - start, SAVE_EVERY)
            with k.loop(0, SAVE_EVERY) as t:
                now = k.minimum(start + t, length - 1)
                k.copy(s.B, t * state, B.address(row, now, 0), state)
                k.copy(s.C, t * state, C.address(row, now, 0), state)
            with k.loop(0, state * TILES) as i:
                s.dB[i], s.dC[i] = zero, zero
            with k.loop(0, count) as v:
                c = (first + v) * LANES
                with k.loop(0, state) as n:
                    s.h[v * state + n] = saved.load(row, block, n, c)
                    saved.prefetch(row, block - 1, n, c)
                with k.loop(0, SAVE_EVERY) as t:
                    now = k.minimum(start + t, length - 1)
                    for ahead in (u, delta, dout) if z is None else (u, delta, dout, z):
                        ahead.prefetch(row, now - SAVE_EVERY, c)
                    for result in (du, ddelta) if dz is None else (du, ddelta, dz):
                        result.prefetch(row, now, c, write=True)
                    x, dy = u.load(row, now, c), dout.load(row, now, c)
                    step = delta.load(row, now, c) + bias.load(c)
                    if softplus:
                        step, s.slope[t] = k.softplus(step)
                    if z is not None:  # the derivative of z sigmoid(z) is sigmoid(z) (1 + z (1 - sigmoid(z)))
                        gates = z.load(row, now, c)
                        share = k.sigmoid(gates)
                        s.dgate[t] = dy * share * (gates * (1.0 - share) + 1.0)
                        dy = dy * gates * share
                    step, dy = (k.select(t, "<", steps, value, 0.0) for value in (step, dy))
                    s.dt[t], s.dtu[t], s.dy[t], s.y[t] = step, step * x, dy, D.load(c) * x
                    s.dx[t], s.ds[t] = zero, zero
                end = v * state + state
                with k.loop(v * state, end, STATES) as i:
                    stop = k.minimum(i + STATES, end)
                    _scan_block(k, s, SAVE_EVERY, i, stop, s.trace)
                    with k.loop(0, TILES) as tile:
                        _walk_back(k, s, (TILES - 1) - tile, i, stop)
                with k.loop(0, steps) as t:
                    now = start + t
                    x = u.load(row, now, c)
                    dstep = s.ds[t] * (1 / LOG2E) + s.dx[t] * x
                    if softplus:
                        dstep = dstep * s.slope[t]
                    ddelta.store(dstep, row, now, c)
                    du.store(s.dx[t] * s.dt[t] + D.load(c) * s.dy[t], row, now, c)
                    if dz is not None:
                        dz.store(s.dgate[t] * s.y[t], row, now, c)
                    s.dD[v], s.dbias[v] = s.dD[v] + s.dy[t] * x, s.dbias[v] + dstep
            with k.loop(0, state) as n:
                for part in range(0, TILES, LANES // TILE):
                    tiles = range(part, part + LANES // TILE)
                    for total, target in ((s.dB, dB), (s.dC, dC)):
                        whole = k.fold([total[n * TILES + tile] for tile in tiles], TILE)
                        target.store(whole, unit, block, n, part * TILE)
        with k.loop(0, count) as v:
            c = (first + v) * LANES
            dD.store(s.dD[v], row, c)
            dbias.store(s.dbias[v], row, c)
            _store_states(k, s.carry, v, state, dinitial, row, c)
            _store_states(k, s.dA, v, state, dA, row, c)


def write_conv_forward(k: Kernel, kernel: int, bf16: bool, activation: bool) -> None:
    """Token by token: shift the window of the last inputs, weigh it, store."""
    x, out, initial = k.rows("x", bf16), k.rows("out", bf16), k.tensor("initial_state", 3, bf16)
    weight, bias, length = k.tensor("weight", 2), k.tensor("bias", 1), k.integer("length")
    w, window = Array(k, kernel), Array(k, kernel)  # [tap]; the last tap is the token itself
    with _units(k) as (_, row, first, count), k.loop(0, count) as v:
        c = (first + v) * LANES
        _load_states(k, w, k.as_index(0), kernel, weight, c)
        for j in range(kernel - 1):
            window[j + 1] = initial.load(row, j, c)
        with k.loop(0, length) as t:
            y = _convolve(k, window, x.load(row, t, c), w, bias.load(c))
            out.store(y * k.sigmoid(y) if activation else y, row, t, c)


def write_conv_backward(k: Kernel, kernel: int, bf16: bool, activation: bool) -> None:
    """Token by token: the output again, its gradient's shares of weight, bias and the last inputs."""
    x, dout, dx = k.rows("x", bf16), k.rows("dout", bf16), k.rows("dx", bf16)
    initial, dinitial = k.tensor("initial_state", 3, bf16), k.tensor("dinitial", 3, bf16)
    weight, bias, length = k.tensor("weight", 2), k.tensor("bias", 1), k.integer("length")
    dweight, dbias = k.tensor("dweight", 3), k.tensor("dbias", 2)  # per batch row: (B, K, D), (B, D)
    w, window, dw = (Array(k, kernel) for _ in range(3))  # [tap]
    pending = Array(k, kernel)  # gradients of the last inputs; later tokens still add to them
    db, zero = Array(k, 1), k.constant(0.0)
    with _units(k) as (_, row, first, count), k.loop(0, count) as v:
        c = (first + v) * LANES
        _load_states(k, w, k.as_index(0), kernel, weight, c)
        for j in range(kernel):
            dw[j], pending[j] = zero, zero
        db[0] = zero
        for j in range(kernel - 1):
            window[j + 1] = initial.load(row, j, c)

        def finish(t: Value) -> None:
            """Store the gradient of the input kernel - 1 tokens before t, which may lie before the sequence."""
            before, inside = dinitial.address(row, t, c), dx.address(row, t - (kernel - 1), c)
            k.store(pending[0], k.select(t, "<", kernel - 1, before, inside), bf16)
            for j in range(kernel - 1):
                pending[j] = pending[j + 1]
            pending[kernel - 1] = zero

        with k.loop(0, length) as t:
            y = _convolve(k, window, x.load(row, t, c), w, bias.load(c))
            dy = dout.load(row, t, c)
            if activation:
                open_ = k.sigmoid(y)
                dy = dy * open_ * (y * (1.0 - open_) + 1.0)
            for j in range(kernel):
                dw[j] = dy * window[j] + dw[j]
                pending[j] = dy * w[j] + pending[j]
            db[0] = db[0] + dy
            finish(t)
        with k.loop(length, length + (kernel - 1)) as t:
            finish(t)
        dbias.store(db[0], row, c)
        for j in range(kernel):
            dweight.store(dw[j], row, j, c)


def _convolve(k: Kernel, window: Array, now: Value, w: Array, bias: Value) -> Value:
    """Shift `now` into the window of the last inputs and weigh them."""
    taps = window.vectors
    for j in range(taps - 1):
        window[j] = window[j + 1]
    window[taps - 1] = now
    for j in range(taps):
        bias = window[j] * w[j] + bias
    return bias
