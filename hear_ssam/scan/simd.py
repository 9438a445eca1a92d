"""Vector kernels written in Python: expressions become LLVM IR, llvmlite compiles it in memory, torch's threads run it.

    def write_double(k: Kernel) -> None:
        x, y, length = k.tensor("x", 3), k.tensor("y", 3), k.integer("length")  # (batch, length, LANES) each
        with k.loop(k.begin, k.end) as row, k.loop(0, length) as t:
            y.store(2.0 * x.load(row, t, 0), row, t, 0)  # LANES numbers at once

    run(build(write_double), units=len(x), x=x, y=y, length=x.shape[1])

A kernel is a C function (begin, end, arguments) that works on the units begin ... end - 1. No compiler is needed and
nothing is written to disk. Values are vectors of LANES float32 numbers, single float32 numbers, or 64-bit integers
(indices and addresses). There are no branches: `select`, and loops that run zero times, do all that is needed.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
CPU, FEATURES = llvm.get_host_cpu_name(), llvm.get_host_cpu_features()
AVX512 = bool(FEATURES.get("avx512f"))
LANES = 16 if AVX512 else 8 if FEATURES.get("avx2") else 4  # float32 numbers in one register
LOG2E = 1.4426950408889634

_i1, _i8, _i16, _i32, _i64, _f32 = *(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType()
_vector, _bits, _halves = (ir.VectorType(kind, LANES) for kind in (_f32, _i32, _i16))


def _fit(function: Callable[[Any], Any], low: float, high: float, degree: int) -> list[float]:
    """Coefficients, constant first, of the nearly best polynomial (Chebyshev nodes) for `function` on [low, high]."""
    series = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return [float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef]


# 2^r = 1 + r P(r): exactly 1 at 0, because thousands of factors multiply. (The odd bound keeps nodes off 0.)
_EXP2 = _fit(lambda r: np.expm1(r * np.log(2)) / r, -0.5, 0.5 + 1e-9, 4)
_EXP2_NEAR = _fit(lambda r: np.expm1(r * np.log(2)) / r, -1 / 64, 1 / 64 + 1e-9, 1)
# log(1 + e) = 2 artanh(s) = s Q(s^2) with s = e / (2 + e)
_LOG1P = _fit(lambda q: 2 * np.arctanh(np.sqrt(q)) / np.sqrt(q), 0.0, 1 / 9, 5)


def _operator(name: str, swap: bool = False) -> Callable[[Value, Operand], Value]:
    def emit(self: Value, other: Operand) -> Value:
        k, b = self.kernel, self.kernel.as_value(other, self)
        left, right = (b.ir, self.ir) if swap else (self.ir, b.ir)
        if isinstance(self.ir.type, ir.IntType):
            return Value(k, getattr(k.builder, name)(left, right))
        return Value(k, getattr(k.builder, f"f{name}")(left, right, flags=("contract",)))

    return emit


class Value:
    """A number or vector in the kernel. An operator emits one instruction; a * b + c becomes a single fused one."""

    def __init__(self, kernel: Kernel, instruction: ir.Value) -> None:
        self.kernel, self.ir = kernel, instruction

    __add__ = __radd__ = _operator("add")
    __mul__ = __rmul__ = _operator("mul")
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swap=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", swap=True)
    __floordiv__ = _operator("sdiv")  # integers, not negative


Operand = Value | float


class Array:
    """Scratch memory on the stack: vectors `array[i]`; its numbers one by one `array.numbers[i]`."""

    def __init__(self, kernel: Kernel, vectors: int) -> None:
        self.kernel, self.vectors, self.kind = kernel, vectors, _vector
        self.first, self.step = 0, 1  # where vector 0 is, and how far it is to the next one
        with kernel.builder.goto_entry_block():
            self.pointer = kernel.builder.alloca(ir.ArrayType(_vector, vectors))

    @property
    def numbers(self) -> Array:
        view = copy.copy(self)
        view.kind = _f32
        return view

    def at(self, index: Operand) -> ir.Value:
        b, place = self.kernel.builder, self.kernel.as_index(index)
        if self.step > 1 and self.kind is _vector:
            place = place * self.step + self.first
        elif self.step > 1:
            vector = place // LANES
            place = (vector * self.step + self.first) * LANES + (place - vector * LANES)
        pointer = b.bitcast(self.pointer, self.kind.as_pointer())
        return b.gep(pointer, [place.ir], source_etype=self.kind)

    def __getitem__(self, index: Operand) -> Value:
        return Value(self.kernel, self.kernel.builder.load(self.at(index), typ=self.kind))

    def __setitem__(self, index: Operand, value: Value) -> None:
        self.kernel.builder.store(value.ir, self.at(index))


class Argument:
    """A tensor argument, float32 or bfloat16: its last dimension has unit stride, the others have any."""

    def __init__(self, kernel: Kernel, pointer: Value, strides: list[Value], bf16: bool) -> None:
        self.kernel, self.pointer, self.bf16 = kernel, pointer, bf16
        self.strides = [*strides, 2 if bf16 else 4]  # bytes

    def address(self, *index: Operand) -> Value:
        address = self.pointer
        for i, stride in zip(index, self.strides, strict=True):
            address = address + self.kernel.as_index(i) * stride
        return address

    def load(self, *index: Operand) -> Value:
        """The vector that begins at `index`."""
        return self.kernel.load(self.address(*index), self.bf16)

    def store(self, value: Value, *index: Operand) -> None:
        self.kernel.store(value, self.address(*index), self.bf16)

    def stream(self, value: Value, *index: Operand) -> None:
        """Store float32 past the cache, for a much later reader; the address must be aligned to whole vectors."""
        k = self.kernel
        store = k.builder.store(value.ir, k.pointer(self.address(*index), _vector), align=4 * LANES)
        store.set_metadata("nontemporal", k.module.add_metadata([ir.Constant(_i32, 1)]))

    def prefetch(self, *index: Operand, write: bool = False) -> None:
        """Ask for the cache line at `index`, which may lie outside the tensor."""
        k, i8 = self.kernel, _i8.as_pointer()
        function = k.intrinsic("llvm.prefetch.p0", ir.VoidType(), i8, _i32, _i32, _i32)
        hints = [ir.Constant(_i32, hint) for hint in (int(write), 3, 1)]  # into the first level of the data cache
        k.builder.call(function, [k.pointer(self.address(*index), _i8), *hints])

    def load_number(self, *index: Operand) -> Value:
        b = self.kernel.builder
        return Value(self.kernel, b.load(self.kernel.pointer(self.address(*index), _f32), typ=_f32))

    def store_number(self, value: Value, *index: Operand) -> None:
        self.kernel.builder.store(value.ir, self.kernel.pointer(self.address(*index), _f32))


class Kernel:
    """One function while it is written. `arguments` are (name, dimensions, whether a tensor's second one is time)."""

    def __init__(self) -> None:
        self.module = ir.Module()
        self.module.triple = llvm.get_process_triple()
        signature = ir.FunctionType(ir.VoidType(), [_i64, _i64, _i64.as_pointer()])
        self.function = ir.Function(self.module, signature, "kernel")
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        self.begin, self.end = (Value(self, x) for x in self.function.args[:2])
        self.arguments: list[tuple[str, int, bool]] = []
        self._slots = 0

    # --- arguments and memory

    def integer(self, name: str) -> Value:
        self.arguments.append((name, 0, False))
        return self._next_slot()

    def tensor(self, name: str, dims: int, bf16: bool = False, timed: bool = False) -> Argument:
        self.arguments.append((name, dims, timed))
        pointer, *strides = [self._next_slot() for _ in range(dims)]
        return Argument(self, pointer, strides, bf16)

    def rows(self, name: str, bf16: bool = False) -> Argument:
        """A tensor (batch, time, channels), which `run` may hand over reversed in time."""
        return self.tensor(name, 3, bf16, timed=True)

    def _next_slot(self) -> Value:
        slot = self.builder.gep(self.function.args[2], [ir.Constant(_i64, self._slots)], source_etype=_i64)
        self._slots += 1
        return Value(self, self.builder.load(slot, typ=_i64))

    def arrays(self, count: int, vectors: int) -> list[Array]:
        """Arrays that are used at the same indices, in turns in memory: the cache mistakes none for another."""
        whole = Array(self, count * vectors)
        parts = [copy.copy(whole) for _ in range(count)]
        for i, part in enumerate(parts):
            part.vectors, part.first, part.step = vectors, i, count
        return parts

    def variable(self, value: Value) -> Array:
        """A vector `variable[0]` that changes in a loop; the compiler keeps it in a register."""
        variable = Array(self, 1)
        variable[0] = value
        return variable

    def pointer(self, address: Value, kind: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address.ir, kind.as_pointer())

    def load(self, address: Value, bf16: bool = False) -> Value:
        b = self.builder
        if not bf16:
            return Value(self, b.load(self.pointer(address, _vector), typ=_vector, align=4))
        halves = b.load(self.pointer(address, _halves), typ=_halves, align=2)
        return Value(self, b.bitcast(b.shl(b.zext(halves, _bits), self.bits(16)), _vector))

    def store(self, value: Value, address: Value, bf16: bool = False) -> None:
        b = self.builder
        if not bf16:
            b.store(value.ir, self.pointer(address, _vector), align=4)
            return
        bits = b.bitcast(value.ir, _bits)
        odd = b.and_(b.lshr(bits, self.bits(16)), self.bits(1))
        bits = b.add(b.add(bits, odd), self.bits(0x7FFF))  # round to nearest, ties to even
        b.store(b.trunc(b.lshr(bits, self.bits(16)), _halves), self.pointer(address, _halves), align=2)

    def copy(self, target: Array, start: Value, source: Value, count: int) -> None:
        """target[start : start + count] = that many float32 numbers at the address `source`."""
        pointer = _i8.as_pointer()
        memcpy = self.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, _i64])
        to = self.builder.bitcast(target.at(start), pointer)
        size, not_volatile = ir.Constant(_i64, 4 * count), ir.Constant(_i1, 0)
        self.builder.call(memcpy, [to, self.pointer(source, _i8), size, not_volatile])

    # --- control

    @contextlib.contextmanager
    def loop(self, start: Operand, stop: Operand, step: int = 1) -> Iterator[Value]:
        b, before = self.builder, self.builder.block
        first, last = self.as_index(start).ir, self.as_index(stop).ir
        body, after = b.append_basic_block(), b.append_basic_block()
        b.cbranch(b.icmp_signed("<", first, last), body, after)
        b.position_at_end(body)
        i = b.phi(_i64)
        i.add_incoming(first, before)
        yield Value(self, i)
        following = b.add(i, ir.Constant(_i64, step))
        i.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, last), body, after)
        b.position_at_end(after)

    def select(self, a: Value, relation: str, b: Operand, then: Value, otherwise: Operand) -> Value:
        """`then` where a `relation` b ("<" or ">"), else `otherwise`."""
        compare = self.builder.icmp_signed if isinstance(a.ir.type, ir.IntType) else self.builder.fcmp_ordered
        condition = compare(relation, a.ir, self.as_value(b, a).ir)
        return Value(self, self.builder.select(condition, then.ir, self.as_value(otherwise, then).ir))

    # --- values

    def as_index(self, i: Operand) -> Value:
        return i if isinstance(i, Value) else Value(self, ir.Constant(_i64, int(i)))

    def as_value(self, x: Operand, like: Value) -> Value:
        if isinstance(like.ir.type, ir.IntType):
            return self.as_index(x)
        return x if isinstance(x, Value) else self.constant(x)

    def constant(self, number: float) -> Value:
        return Value(self, ir.Constant(_vector, [ir.Constant(_f32, float(np.float32(number)))] * LANES))

    def bits(self, number: int) -> ir.Constant:
        return ir.Constant(_bits, [number] * LANES)

    def fill(self, number: Value) -> Value:
        """A vector of one number."""
        b, empty = self.builder, ir.Constant(_vector, ir.Undefined)
        one = b.insert_element(empty, number.ir, ir.Constant(_i32, 0))
        return Value(self, b.shuffle_vector(one, empty, self.bits(0)))

    def minimum(self, a: Value, b: Operand) -> Value:
        return self.select(a, ">", b, self.as_value(b, a), a)  # a where a is not a number

    def maximum(self, a: Value, b: Operand) -> Value:
        return self.select(a, "<", b, self.as_value(b, a), a)

    def intrinsic(self, name: str, *types: ir.Type) -> ir.Function:
        """LLVM's function `name`; the first type is its result's."""
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(types[0], types[1:]), name)

    # --- functions

    def polynomial(self, x: Value, coefficients: list[float]) -> Value:
        result = self.constant(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = result * x + c
        return result

    def exp2(self, x: Value) -> Value:
        """2^x: 2^n by the exponent bits, 2^r by a polynomial; relative error 2e-7."""
        return self.exp2s([x])[0]

    def exp2s(self, xs: list[Value]) -> list[Value]:
        """2^x of several vectors, step by step side by side: no CPU looks far enough ahead to overlap the chains."""
        if AVX512:
            return [self._exp2_by_table(x) for x in xs]
        b, nearest = self.builder, self.intrinsic(f"llvm.roundeven.v{LANES}f32", _vector, _vector)
        xs = [self.maximum(x, -126.0) for x in xs]
        xs = [self.minimum(x, 127.0) for x in xs]  # 2^n must be a normal number
        ns = [Value(self, b.call(nearest, [x.ir])) for x in xs]
        rs = [x - n for x, n in zip(xs, ns, strict=True)]  # in [-1/2, 1/2]
        exponents = [b.shl(b.fptosi(n.ir, _bits), self.bits(23)) for n in ns]
        ps = [self.constant(_EXP2[-1])] * len(rs)
        for c in [*reversed(_EXP2[:-1]), 1.0]:
            ps = [p * r + c for p, r in zip(ps, rs, strict=True)]
        sums = [b.add(b.bitcast(p.ir, _bits), exponent) for p, exponent in zip(ps, exponents, strict=True)]
        return [Value(self, b.bitcast(x, _vector)) for x in sums]

    def _exp2_by_table(self, x: Value) -> Value:
        """With AVX-512: 2^(i / 32) from a table in two registers leaves so little that r times a line does."""
        b = self.builder
        shifted = x + 1.5 * 2**18  # its last bits count 32nds, to which the addition rounds
        n = shifted - 1.5 * 2**18
        r = x - n  # in [-1/64, 1/64]
        table = [ir.Constant(_f32, float(np.float32(2 ** (i / 32)))) for i in range(32)]
        low, high = ir.Constant(_vector, table[:16]), ir.Constant(_vector, table[16:])
        look_up = self.intrinsic("llvm.x86.avx512.vpermi2var.ps.512", _vector, _vector, _bits, _vector)
        power = Value(self, b.call(look_up, [low, b.bitcast(shifted.ir, _bits), high]))
        p = power * r * self.polynomial(r, _EXP2_NEAR) + power
        # One instruction for floor(n), right for every n, also where the result overflows or vanishes.
        scale = self.intrinsic("llvm.x86.avx512.mask.scalef.ps.512", _vector, *[_vector] * 3, _i16, _i32)
        unmasked = ir.Constant(_vector, ir.Undefined), ir.Constant(_i16, -1), ir.Constant(_i32, 4)
        return Value(self, b.call(scale, [p.ir, n.ir, *unmasked]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c in one instruction, where the compiler could have fused another product with the sum."""
        function = self.intrinsic(f"llvm.fma.v{LANES}f32", *[_vector] * 4)
        return Value(self, self.builder.call(function, [a.ir, b.ir, c.ir]))

    def sigmoid(self, x: Value) -> Value:
        return 1.0 / (self.exp2(x * -LOG2E) + 1.0)

    def softplus(self, x: Value) -> tuple[Value, Value]:
        """log(1 + exp(x)), relatively exact also where it is tiny, and its derivative sigmoid(x)."""
        e = self.exp2(self.minimum(x, x * -1.0) * LOG2E)  # exp(-|x|)
        s = e / (e + 2.0)
        value = s * self.polynomial(s * s, _LOG1P) + self.maximum(x, 0.0)
        return value, self.select(x, "<", 0.0, e, 1.0) / (e + 1.0)

    def fold(self, vectors: list[Value], first: int) -> Value:
        """Begin or go on to sum the lanes of vectors: halve their number by each bit of the lane from `first` on.

        Starting at bit 1 with LANES vectors, lane i of the result is the sum of all lanes of vector i.
        """
        while len(vectors) > 1:
            stay = [(LANES if i & first else 0) + i for i in range(LANES)]  # a blend: cheaper than any other shuffle
            move = [lane ^ first for lane in stay]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._shuffle(a, b, stay) + self._shuffle(a, b, move) for a, b in pairs]
            first *= 2
        return vectors[0]

    def _shuffle(self, a: Value, b: Value, lanes: list[int]) -> Value:
        return Value(self, self.builder.shuffle_vector(a.ir, b.ir, ir.Constant(_bits, lanes)))


# --- compiling and running ------------------------------------------------------------------------------------------


class Compiled:
    """A kernel as machine code, which lives as long as this object."""

    def __init__(self, kernel: Kernel) -> None:
        kernel.builder.ret_void()
        self.arguments = kernel.arguments
        # The CPU is named in full: LLVM's default is the oldest of its family, without wide registers.
        machine = llvm.Target.from_default_triple().create_target_machine(CPU, FEATURES.flatten(), opt=2, jit=True)
        module = llvm.parse_assembly(str(kernel.module))
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.address = self._engine.get_function_address("kernel")
        self.function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(self.address)


_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not inherit the lock from a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def build(write: Callable[..., None], *options: Hashable) -> Compiled:
    """The kernel that `write(kernel, *options)` describes; compiled once per process."""
    with _lock:
        return _build(write, *options)


@functools.cache
def _build(write: Callable[..., None], *options: Hashable) -> Compiled:
    kernel = Kernel()
    write(kernel, *options)
    return Compiled(kernel)


try:  # torch's own loop, a C function (begin, end, grain, kernel, arguments)
    _parallel_for: Any = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    _parallel_for.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
except (AttributeError, OSError):  # before torch 2.10
    _parallel_for = None


@functools.cache
def _warn_of_one_thread() -> None:
    reason = f"torch {torch.__version__} offers its threads to no kernel (2.10 does), so that CPU kernels run on one"
    mend = "HEAR_SSAM_BACKEND=torch uses them all, torch.set_num_threads(1) silences this."
    warnings.warn(f"hear_ssam: {reason}; {mend}", RuntimeWarning, stacklevel=3)


def run(kernel: Compiled, units: int, reverse: bool = False, **arguments: torch.Tensor | int) -> None:
    """Run all units on torch's threads (where torch does not offer them, in the calling thread), without the GIL.

    `reverse` hands the kernel's `rows` over from the last time step to the first.
    """
    values: list[int] = []
    for name, dims, timed in kernel.arguments:
        if isinstance(x := arguments[name], int):
            values.append(x)
            continue
        size, pointer, strides = x.element_size(), x.data_ptr(), list(x.stride()[: dims - 1])
        if reverse and timed:
            pointer += (x.shape[1] - 1) * strides[1] * size
            strides[1] = -strides[1]
        values += [pointer, *(stride * size for stride in strides)]
    packed = (ctypes.c_int64 * len(values))(*values)
    if _parallel_for is None:
        if torch.get_num_threads() > 1:
            _warn_of_one_thread()
        kernel.function(0, units, packed)
    elif _parallel_for(0, units, 1, kernel.address, packed):
        raise RuntimeError("torch_parallel_for failed")
