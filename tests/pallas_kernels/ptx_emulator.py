"""Runs a compiled kernel without a GPU: PTX, one block of threads at a time, in numpy.

It takes the PTX that LLVM made of a Mosaic GPU kernel (what ptxas turns into machine code) and
executes it, so that layouts of fragments, swizzles, addresses, asynchronous copies and barriers of
the *compiled* kernel are checked, which Pallas' interpreter never sees. Semantics follow NVIDIA's
PTX ISA manual, version 9; an instruction that is not here raises.

All threads of a block go in step, which no GPU does, so what a GPU could do in another order is
looked for: each byte of shared memory keeps who read and wrote it last, and two threads that touch
it without a barrier between them, one of them writing, are a race. `cp.async` puts poison where it
will write and copies as late as allowed, when the thread waits for its group; until then, touching
either is a race. Every access must lie within an array or the block's shared memory.

Limits: one warpgroup or more, but branches must be taken by all threads of a block alike; nothing
of Hopper's (TMA, mbarriers, wgmma); rounding within an `mma` is numpy's.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

_SMEM_BASE = 1024  # addresses are offsets into one array: shared memory first, then the arrays
_GUARD = 4096  # bytes between arrays that belong to nobody
_POISON = 0xFF  # four bytes of it are a NaN, as two are
_WARP = 32
_FLOATS = {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "f16": np.dtype(np.float16)}
_FLOATS["bf16"] = np.dtype(jnp.bfloat16)
_NARROW_FLOATS = {"e4m3x2": np.dtype(jnp.float8_e4m3fn)}  # pairs in 16 bits


class EmulationError(Exception):
    """The kernel did what no correct kernel does, or what is not emulated."""


@dataclass(frozen=True, slots=True)
class _Instruction:
    opcode: list[str]  # "ld", "shared", "v4", "b32"
    operands: list[str]
    guard: str | None
    negated: bool
    text: str


@dataclass
class Kernel:
    """The one kernel of a PTX module."""

    instructions: list[_Instruction]
    labels: dict[str, int]
    parameters: list[str]
    num_threads: int

    @classmethod
    def parse(cls, ptx: str) -> "Kernel":
        """Of the text of a module with one entry."""
        ptx = re.sub(r"//[^\n]*", "", ptx)
        head, body = ptx.split(".entry", 1)[1].split("{", 1)
        parameters = re.findall(r"\.param[^,)]*?(\w+)\s*(?=[,)])", head)
        match = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", head)
        if match is None:
            raise EmulationError("the kernel does not say how many threads it has")
        instructions: list[_Instruction] = []
        labels: dict[str, int] = {}
        body = body[: body.rindex("}")]
        for statement in re.split(r";|(?<=:)\n", re.sub(r"\.loc[^\n]*\n|\.file[^\n]*\n", "", body)):
            text = " ".join(statement.split())
            while label := re.match(r"(\$?\w+):\s*|[{}]\s*", text):  # or a brace of inline PTX
                if label[1]:
                    labels[label[1]] = len(instructions)
                text = text[label.end() :]
            if not text or text.startswith((".reg", ".shared", ".section", ".pragma")):
                continue
            guard = re.match(r"@(!?)(%\w+)\s+", text)
            rest = text[guard.end() :] if guard else text
            name, _, arguments = rest.partition(" ")
            instructions.append(
                _Instruction(
                    opcode=re.split(r"\.|::", name),
                    operands=_split(arguments),
                    guard=guard[2] if guard else None,
                    negated=bool(guard and guard[1]),
                    text=text,
                )
            )
        return cls(instructions, labels, parameters, int(match[1]))

    def cut(self, what: str) -> None:
        """Take out every instruction that starts with `what`; with "a > b", only the first b after
        each a."""
        before, _, text = what.rpartition(" > ")
        found, looking = 0, not before
        for index, step in enumerate(self.instructions):
            if before and step.text.startswith(before):
                looking = True
            elif looking and step.text.startswith(text):
                self.instructions[index] = _Instruction(["nop"], [], None, False, "nop")
                found, looking = found + 1, not before
        if not found:
            raise EmulationError(f"the kernel has no {what}")


def _split(arguments: str) -> list[str]:
    """Operands, with a vector's braces or an address's brackets kept together."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,{\[]*", arguments)
    return [part.strip() for part in parts]


@dataclass
class Races:
    """What was found wrong with the order of accesses to shared memory."""

    reports: list[str] = field(default_factory=list)

    def add(self, what: str, text: str) -> None:
        """Keeps the first few."""
        if len(self.reports) < 20:
            self.reports.append(f"{what}: {text}")


class _Block:
    """The state of one block of threads."""

    def __init__(self, kernel: Kernel, memory: np.ndarray, owned: np.ndarray, smem: int) -> None:
        self.kernel, self.memory, self.owned = kernel, memory, owned
        self.num_threads = kernel.num_threads
        self.thread = np.arange(self.num_threads)
        self.registers: dict[str, np.ndarray] = {}
        self.smem_end = _SMEM_BASE + smem
        self.memory[_SMEM_BASE : self.smem_end] = _POISON
        self.epoch = 1  # barriers so far
        size = self.smem_end
        self.writer, self.write_epoch = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        self.reader, self.read_epoch = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        self.pending = np.zeros(size, bool)  # bytes that a cp.async is to write
        self.groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[]]  # the last: open
        self.races = Races()

    # Operands

    def read(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """An operand of every thread as `dtype`: [threads]."""
        if operand in self.registers:
            bits = self.registers[operand]
            if bits.dtype.itemsize != dtype.itemsize:
                if dtype.kind == "f" or "b" in (bits.dtype.kind, dtype.kind):
                    raise EmulationError(f"{operand} holds {bits.dtype}, not {dtype}")
                return bits.astype(f"u{dtype.itemsize}").view(dtype)
            return bits.view(dtype)
        return np.full(self.num_threads, self.constant(operand, dtype))

    def read_pairs(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """Two values of 16 bits in an operand of every thread: [threads, 2]."""
        words = np.ascontiguousarray(self.read(operand, np.dtype(np.uint32)))
        return words.view(dtype).reshape(-1, 2)

    def constant(self, operand: str, dtype: np.dtype) -> Any:
        """An immediate or a symbol's address."""
        if operand.startswith("__dynamic_shmem__"):
            return np.array(_SMEM_BASE, dtype)
        if operand.startswith(("0f", "0F")):
            return np.array(int(operand[2:], 16), np.uint32).view(dtype)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            bits = np.array(int(operand.rstrip("U"), 0) % (1 << (8 * dtype.itemsize)), np.uint64)
            return bits.astype(f"u{dtype.itemsize}").view(dtype)
        if operand in ("true", "false"):
            return operand == "true"
        raise EmulationError(f"operand {operand} was never written")

    def write(self, operand: str, value: np.ndarray, active: np.ndarray) -> None:
        """A register of the active threads; kept as unsigned bits, or as bool."""
        value = np.broadcast_to(value, (self.num_threads,))
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        old = self.registers.get(operand)
        if old is None or active.all():
            old = value
        self.registers[operand] = np.where(active, value, old)

    def address(self, operand: str) -> np.ndarray:
        """What `[register + offset]` names: [threads]."""
        match = re.fullmatch(r"\[([^+\]]+?)\s*(?:\+\s*(-?\w+))?\]", operand)
        if match is None:
            raise EmulationError(f"no address: {operand}")
        offset = int(match[2], 0) if match[2] else 0
        bits = self.registers.get(match[1])
        size = 4 if bits is not None and bits.dtype.itemsize == 4 else 8
        return self.read(match[1], np.dtype(f"i{size}")).astype(np.int64) + offset

    # Memory

    def bytes_at(self, address: np.ndarray, size: int, text: str) -> np.ndarray:
        """The addresses of `size` bytes from each address: [..., size], all of them owned."""
        where = address[..., None] + np.arange(size)
        if (address % size).any():
            raise EmulationError(f"misaligned: {text}")
        inside = (where >= 0) & (where < len(self.memory))
        if not inside.all() or not self.owned[where].all():
            raise EmulationError(f"out of bounds: {text}")
        return where

    def note_read(self, where: np.ndarray, who: np.ndarray, text: str) -> None:
        """Check and keep reads of shared memory by threads `who`, one for each row of `where`."""
        who = np.broadcast_to(who.reshape(-1, 1), where.reshape(len(who), -1).shape).ravel()
        where = where.ravel()
        shared = where < self.smem_end
        where, who = where[shared], who[shared]
        if self.pending[where].any():
            self.races.add("read before the copy was waited for", text)
        if ((self.write_epoch[where] == self.epoch) & (self.writer[where] != who)).any():
            self.races.add("read of what another thread wrote since the last barrier", text)
        same = (self.read_epoch[where] == self.epoch) & (self.reader[where] != who)
        self.reader[where] = np.where(same, -2, who)
        order = np.argsort(where, kind="stable")
        twice = where[order][1:][where[order][1:] == where[order][:-1]]
        self.reader[twice] = -2
        self.read_epoch[where] = self.epoch

    def note_write(self, where: np.ndarray, who: np.ndarray, text: str) -> None:
        """Check and keep writes to shared memory."""
        who = np.broadcast_to(who.reshape(-1, 1), where.reshape(len(who), -1).shape).ravel()
        where = where.ravel()
        shared = where < self.smem_end
        where, who = where[shared], who[shared]
        if self.pending[where].any():
            self.races.add("write to what a copy is about to write", text)
        if ((self.write_epoch[where] == self.epoch) & (self.writer[where] != who)).any():
            self.races.add("write over what another thread wrote since the last barrier", text)
        if ((self.read_epoch[where] == self.epoch) & (self.reader[where] != who)).any():
            self.races.add("write over what another thread read since the last barrier", text)
        self.writer[where], self.write_epoch[where] = who, self.epoch

    def store(self, where: np.ndarray, data: np.ndarray, who: np.ndarray, text: str) -> None:
        """Bytes `data` to the addresses `where`, by threads `who`; both [threads, size]."""
        self.note_write(where, who, text)
        self.memory[where] = data
        if (self.memory[where] != data).any():
            self.races.add("threads write different values to one place", text)

    def wait_groups(self, allowed: int, active: np.ndarray) -> None:
        """Finish all but the newest `allowed` committed groups of copies."""
        if not active.all():
            raise EmulationError("a wait for copies that not all threads reach")
        done, self.groups = self.groups[: -1 - allowed], self.groups[-1 - allowed :]
        for source, target, who in itertools.chain.from_iterable(done):
            self.pending[target] = False
            self.store(target, self.memory[source], who, "cp.async, when it completed")


def launch(
    kernel: Kernel, arrays: Sequence[np.ndarray], grid: tuple[int, int, int], smem_bytes: int
) -> Races:
    """Run every block of the grid; `arrays` are the kernel's pointers, written to in place."""
    starts, size = [], _SMEM_BASE + smem_bytes + _GUARD
    for array in arrays:
        size = -(-size // 256) * 256
        starts.append(size)
        size += array.nbytes + _GUARD
    memory, owned = np.full(size, _POISON, np.uint8), np.zeros(size, bool)
    owned[_SMEM_BASE : _SMEM_BASE + smem_bytes] = True
    for array, start in zip(arrays, starts, strict=True):
        memory[start : start + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
        owned[start : start + array.nbytes] = True
    if len(kernel.parameters) != len(arrays):
        raise EmulationError(f"{len(kernel.parameters)} parameters for {len(arrays)} arrays")
    parameters = dict(zip(kernel.parameters, starts, strict=True))
    races = Races()
    for z, y, x in np.ndindex(grid[::-1]):
        block = _Block(kernel, memory, owned, smem_bytes)
        special = {f"%ctaid.{name}": index for name, index in zip("xyz", (x, y, z), strict=True)}
        special |= {f"%nctaid.{name}": count for name, count in zip("xyz", grid, strict=True)}
        for name, value in special.items():
            block.registers[name] = np.full(kernel.num_threads, value, np.uint32)
        block.registers["%tid.x"] = block.thread.astype(np.uint32)
        block.registers["%tid.y"] = block.registers["%tid.z"] = np.zeros_like(
            block.registers["%tid.x"]
        )
        block.registers["%laneid"] = (block.thread % _WARP).astype(np.uint32)
        for name, value in parameters.items():
            block.registers[name] = np.full(kernel.num_threads, value, np.uint64)
        _run(block)
        races.reports += block.races.reports[: 20 - len(races.reports)]
    for array, start in zip(arrays, starts, strict=True):
        raw = memory[start : start + array.nbytes].view(array.dtype)
        array[...] = raw.reshape(array.shape)
    return races


def _run(block: _Block) -> None:
    kernel = block.kernel
    everyone = np.ones(block.num_threads, bool)
    counter = 0
    for _ in range(10_000_000):
        step = kernel.instructions[counter]
        counter += 1
        active = everyone
        if step.guard is not None:
            active = block.registers[step.guard]
            if step.negated:
                active = ~active
        name = step.opcode[0]
        if name == "ret":
            return
        if name == "nop":
            continue
        if name == "bra":
            if active.any() != active.all():
                raise EmulationError(f"threads part ways: {step.text}")
            if active.all():
                counter = kernel.labels[step.operands[0]]
            continue
        handler = _HANDLERS.get(name)
        if handler is None:
            raise EmulationError(f"not emulated: {step.text}")
        try:
            with np.errstate(all="ignore"):
                handler(block, step, active)
        except EmulationError:
            raise
        except Exception as error:
            raise EmulationError(f"{step.text}: {error}") from error
    raise EmulationError("the kernel does not end")


def _type(name: str) -> np.dtype:
    """Of a PTX type: "s32", "b64", "f32", "pred"."""
    if name in _FLOATS:
        return _FLOATS[name]
    if name == "pred":
        return np.dtype(bool)
    kind = "i" if name[0] == "s" else "u"
    return np.dtype(f"{kind}{int(name[1:]) // 8}")


def _elements(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{}").split(",")]


Handler = Callable[[_Block, _Instruction, np.ndarray], None]


def _elementwise(function: Callable[..., np.ndarray], kind: int = -1) -> Handler:
    """An instruction whose result is a function of its operands, all of type opcode[kind]."""

    def handler(block: _Block, step: _Instruction, active: np.ndarray) -> None:
        pairs = step.opcode[kind].endswith("x2")
        dtype = _type(step.opcode[kind].removesuffix("x2"))
        read = block.read_pairs if pairs else block.read
        values = [read(each, dtype) for each in step.operands[1:]]
        result = np.asarray(function(*values)).astype(dtype, copy=False)
        block.write(step.operands[0], _packed(result) if pairs else result, active)

    return handler


def _packed(pairs: np.ndarray) -> np.ndarray:
    """Two values of 16 bits a thread, [threads, 2], as one register each."""
    return np.ascontiguousarray(pairs).view(np.uint32)[:, 0]


def _wide_or_low(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    """mul and mad: of floats, or of integers to twice the width or to its low or high half."""
    if step.opcode[-1].endswith("x2"):
        _elementwise(np.multiply)(block, step, active)
        return
    dtype = _type(step.opcode[-1])
    dtype_out = dtype
    if step.opcode[1] in ("wide", "hi"):
        dtype_out = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    a, b = (block.read(each, dtype).astype(dtype_out) for each in step.operands[1:3])
    result = a * b
    if step.opcode[1] == "hi":
        result = (result >> dtype_out.type(8 * dtype.itemsize)).astype(dtype)
        dtype_out = dtype
    if len(step.operands) == 4:
        result = result + block.read(step.operands[3], dtype_out)
    block.write(step.operands[0], result, active)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)


def _shift(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    value = block.read(step.operands[1], dtype)
    amount = block.read(step.operands[2], np.dtype(np.uint32))
    most = 8 * dtype.itemsize
    within = np.minimum(amount, most - 1).astype(dtype)
    if step.opcode[0] == "shl":
        result = np.where(amount < most, value << within, np.zeros_like(value))
    else:
        result = value >> within
        if dtype.kind == "u":
            result = np.where(amount < most, result, np.zeros_like(value))
    block.write(step.operands[0], result, active)


def _bfe(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    value = block.read(step.operands[1], _type(step.opcode[1]))
    if step.opcode[1] != "u32":
        raise EmulationError(f"not emulated: {step.text}")
    start, length = (int(each) for each in step.operands[2:])
    block.write(
        step.operands[0], (value >> np.uint32(start)) & np.uint32((1 << length) - 1), active
    )


def _setp(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    a, b = (block.read(each, dtype) for each in step.operands[1:3])
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "hi": np.greater,
        "ls": np.less_equal,
        "hs": np.greater_equal,
    }[step.opcode[1]]
    block.write(step.operands[0], compare(a, b), active)


def _selp(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    a, b = (block.read(each, dtype) for each in step.operands[1:3])
    block.write(
        step.operands[0], np.where(block.read(step.operands[3], np.dtype(bool)), a, b), active
    )


def _mov(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    """Also between a register and a vector of smaller ones."""
    target, source = step.operands
    dtype = _type(step.opcode[-1])
    if target.startswith("{"):
        parts = _elements(target)
        small = np.dtype(f"u{dtype.itemsize // len(parts)}")
        values = np.ascontiguousarray(block.read(source, dtype)).view(small).reshape(-1, len(parts))
        for index, part in enumerate(parts):
            if part != "_":
                block.write(part, values[:, index], active)
    elif source.startswith("{"):
        parts = _elements(source)
        small = np.dtype(f"u{dtype.itemsize // len(parts)}")
        values = np.stack([block.read(part, small) for part in parts], axis=1)
        block.write(target, np.ascontiguousarray(values).view(dtype)[:, 0], active)
    else:
        block.write(target, block.read(source, dtype), active)


def _cvt(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    to, source = step.opcode[-2:]
    if to in ("bf16x2", "f16x2") and source == "f32":
        dtype = _FLOATS[to[:-2]]
        high, low = (block.read(each, np.dtype(np.float32)) for each in step.operands[1:])
        pair = np.stack([low.astype(dtype), high.astype(dtype)], axis=1)
        block.write(step.operands[0], _packed(pair), active)
        return
    if (narrow := _NARROW_FLOATS.get(source)) is not None:
        pair = np.ascontiguousarray(block.read(step.operands[1], np.dtype(np.uint16)))
        pair = pair.view(narrow).reshape(-1, 2).astype(_FLOATS[to.removesuffix("x2")])
        block.write(step.operands[0], _packed(pair), active)
        return
    value = block.read(step.operands[1], _type(source))
    block.write(step.operands[0], value.astype(_type(to)), active)


def _cvta(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    block.write(step.operands[0], block.read(step.operands[1], np.dtype(np.uint64)), active)


def _prmt(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    a, b, select = (block.read(each, np.dtype(np.uint32)) for each in step.operands[1:])
    source = np.stack([a, b], axis=1).view(np.uint8).reshape(-1, 8)
    picks = np.stack([(select >> np.uint32(4 * i)) & np.uint32(7) for i in range(4)], axis=1)
    result = np.take_along_axis(source, picks.astype(np.int64), axis=1)
    block.write(step.operands[0], np.ascontiguousarray(result).view(np.uint32)[:, 0], active)


def _load(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    if step.opcode[1] == "param":
        block.write(step.operands[0], block.read(step.operands[1].strip("[]"), dtype), active)
        return
    targets = _elements(step.operands[0])
    size = dtype.itemsize * len(targets)
    where = block.bytes_at(block.address(step.operands[1])[active], size, step.text)
    block.note_read(where, block.thread[active], step.text)
    values = np.zeros((block.num_threads, len(targets)), dtype)
    values[active] = block.memory[where].view(dtype)
    for index, target in enumerate(targets):
        block.write(target, values[:, index], active)


def _store(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    sources = _elements(step.operands[1])
    size = dtype.itemsize * len(sources)
    where = block.bytes_at(block.address(step.operands[0])[active], size, step.text)
    data = np.stack([block.read(each, dtype) for each in sources], axis=1)[active]
    block.store(where, np.ascontiguousarray(data).view(np.uint8), block.thread[active], step.text)


def _cp(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    """cp.async: a copy from an array to shared memory that ends when it is waited for."""
    if step.opcode[2] == "commit_group":
        block.groups.append([])
    elif step.opcode[2] == "wait_group":
        block.wait_groups(int(step.operands[0]), active)
    elif step.opcode[2] == "wait_all":
        block.wait_groups(0, active)
    elif step.opcode[2] in ("ca", "cg"):
        size = int(step.operands[2])
        target = block.bytes_at(block.address(step.operands[0])[active], size, step.text)
        source = block.bytes_at(block.address(step.operands[1])[active], size, step.text)
        block.note_write(target, block.thread[active], step.text)
        block.memory[target] = _POISON
        block.pending[target] = True
        block.groups[-1].append((source, target, block.thread[active]))
    else:
        raise EmulationError(f"not emulated: {step.text}")


def _bar(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    if step.opcode[1] not in ("sync", "warp") or not active.all():
        raise EmulationError(f"not emulated: {step.text}")
    if step.opcode[1] == "warp":
        return
    count = block.read(step.operands[1], np.dtype(np.uint32)) if len(step.operands) > 1 else None
    if count is not None and (count != block.num_threads).any():
        raise EmulationError(f"a barrier of some threads is not emulated: {step.text}")
    block.epoch += 1


def _shfl(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    value = block.read(step.operands[1], np.dtype(np.uint32)).reshape(-1, _WARP)
    lane = np.arange(_WARP)
    amount = block.read(step.operands[2], np.dtype(np.uint32)).reshape(-1, _WARP)
    if step.opcode[2] == "bfly":
        source = lane ^ amount
    elif step.opcode[2] == "idx":
        source = amount
    else:
        raise EmulationError(f"not emulated: {step.text}")
    result = np.take_along_axis(value, source.astype(np.int64), axis=1)
    block.write(step.operands[0].split("|")[0], result.reshape(-1), active)


def _ldmatrix(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    """8x8 matrices of 16 bits: lane 8i + r gives the address of row r of matrix i."""
    targets = _elements(step.operands[0])
    count = len(targets)
    address = block.address(step.operands[1]).reshape(-1, _WARP)[:, : 8 * count]
    warps = len(address)
    where = block.bytes_at(address, 16, step.text).reshape(warps, count, 8, 8, 2)
    if "trans" in step.opcode:
        where = where.swapaxes(2, 3)
    # Thread 4r + c of a warp gets elements 2c and 2c + 1 of row r.
    where = where.reshape(warps, count, _WARP, 4).swapaxes(1, 2).reshape(block.num_threads, -1)
    block.note_read(where, block.thread, step.text)
    values = block.memory[where].reshape(block.num_threads, count, 4)
    for index, target in enumerate(targets):
        value = np.ascontiguousarray(values[:, index]).view(np.uint32)[:, 0]
        block.write(target, value, active)


def _mma(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    """m16n8k16 of 16-bit floats; lane 4g + t holds rows g, g + 8 and columns 2t, 2t + 1."""
    if step.opcode[3:6] != ["m16n8k16", "row", "col"] or not active.all():
        raise EmulationError(f"not emulated: {step.text}")
    dtype = _FLOATS[step.opcode[7]]
    out, a, b, c = (_elements(each) for each in step.operands)
    warps = block.num_threads // _WARP

    def pairs(registers: list[str]) -> np.ndarray:  # [warps, g, t, register, 2]
        words = np.stack([block.read(each, np.dtype(np.uint32)) for each in registers], axis=1)
        return words.view(dtype).astype(np.float32).reshape(warps, 8, 4, len(registers), 2)

    left = pairs(a).reshape(warps, 8, 4, 2, 2, 2)  # g, t, half of k, half of m, 2
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)
    right = pairs(b).transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)  # half of k, t, 2, g
    sums = np.stack([block.read(each, np.dtype(np.float32)) for each in c], axis=1)
    sums = sums.reshape(warps, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(warps, 16, 8)
    sums = sums + left @ right
    sums = sums.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(block.num_threads, 4)
    for index, target in enumerate(out):
        block.write(target, np.ascontiguousarray(sums[:, index]), active)


def _extreme(block: _Block, step: _Instruction, active: np.ndarray) -> None:
    dtype = _type(step.opcode[-1])
    a, b = (block.read(each, dtype) for each in step.operands[1:])
    if dtype.kind != "f" or "NaN" in step.opcode:
        function = np.maximum if step.opcode[0] == "max" else np.minimum
    else:
        function = np.fmax if step.opcode[0] == "max" else np.fmin
    block.write(step.operands[0], function(a, b), active)


_HANDLERS: dict[str, Handler] = {
    "add": _elementwise(np.add),
    "and": _elementwise(np.bitwise_and),
    "bar": _bar,
    "bfe": _bfe,
    "cp": _cp,
    "cvt": _cvt,
    "cvta": _cvta,
    "div": _elementwise(np.divide),
    "ex2": _elementwise(np.exp2),
    "fma": _elementwise(_fma),
    "ld": _load,
    "ldmatrix": _ldmatrix,
    "lg2": _elementwise(np.log2),
    "mad": _wide_or_low,
    "max": _extreme,
    "min": _extreme,
    "mma": _mma,
    "mov": _mov,
    "mul": _wide_or_low,
    "neg": _elementwise(np.negative),
    "not": _elementwise(np.invert),
    "or": _elementwise(np.bitwise_or),
    "prmt": _prmt,
    "rcp": _elementwise(np.reciprocal),
    "selp": _selp,
    "setp": _setp,
    "shfl": _shfl,
    "shl": _shift,
    "shr": _shift,
    "st": _store,
    "sub": _elementwise(np.subtract),
    "xor": _elementwise(np.bitwise_xor),
}
