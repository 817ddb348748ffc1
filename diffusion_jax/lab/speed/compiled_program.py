"""What a compiled program does, read from its text: kernels and the bytes they move.

A step of a network of many small layers is bound by memory and by the number of its
kernels, not by its arithmetic. Both are known once it is compiled, before it runs, and
on a machine that could not run it.
"""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Of types whose name does not end in their bits, or which are stored in more."""

# What costs nothing: names and views of what is there.
FREE = (
    "parameter",
    "constant",
    "bitcast",
    "get-tuple-element",
    "tuple",
    "after-all",
    "partition-id",
    "replica-id",
)
CONTROL = ("call", "while", "conditional", "async-start")
CUTS = ("slice", "dynamic-slice", "gather")
REPEATS = ("all-gather-start", "collective-permute-start", "copy-start")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)(?:e\w+)?\[([\d,]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(r"\b(?:[a-z]+\d+|pred)(?:e\w+)?\[[\d,]*\]")
_NAME = re.compile(r"%([\w.\-]+)")


class Kernel(NamedTuple):
    """One thing that a device is told to do."""

    kind: str
    """convolution, product, reduction, elementwise, copy, collective, "our own" (of
    Pallas), or the name of another operation."""
    name: str
    """The operation, or what a fusion is called."""
    moved: int
    """Bytes read and written, when each operand is read once."""
    times: int
    """How often a run of the program does it."""
    source: str
    """Where it comes from, as JAX names it; of a fusion one of several places."""


class _Instruction(NamedTuple):
    shape: str
    operation: str
    operands: str
    rest: str


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a compiled program.

    Bodies of loops count as often as they run; where the compiler does not know that,
    once. Of a conditional, every branch counts. An update in place counts as one of the
    whole array.

    Args:
      text: of an optimised module, `compiled.as_text()`.

    Raises:
      ValueError: a text without an entry.

    >>> import jax, jax.numpy as jnp
    >>> run = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(1000)).compile()
    >>> [(kernel.kind, kernel.moved) for kernel in kernels(run.as_text())]
    [('elementwise', 8000)]
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError(
            "text must be that of a compiled module, with an ENTRY; got "
            f"{text[:40]!r}. Give compiled.as_text()."
        )
    found: list[Kernel] = []

    def walk(name: str, times: int) -> None:
        body = computations[name]
        for label, one in body.items():
            if one.operation in FREE or one.operation.endswith(("-done", "-update")):
                continue
            inner = _called(one)
            if one.operation in CONTROL:
                again = times * _trips(one)
                for each in inner:
                    walk(each, again)
                continue
            found.append(_kernel(label, one, body, computations, inner, times))

    walk(entry, 1)
    return found


def size(shape: str) -> int:
    """Returns the bytes of the arrays in a shape, such as "(f32[3,4]{1,0}, pred[])".

    >>> size("(bf16[2,3]{1,0}, f32[])")
    16
    """
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        bits = re.search(r"\d+$", kind)
        each = BYTES.get(kind) or int(bits[0] if bits else 8) // 8
        total += each * math.prod(int(n) for n in dimensions.split(",") if n)
    return total


def _each(body: dict[str, _Instruction], names: list[str]) -> list[int]:
    """Returns the bytes of an element of arrays."""
    shapes = [body[name].shape for name in names]
    return [size(shape) // max(1, _elements(shape)) for shape in shapes]


def _elements(shape: str) -> int:
    return sum(
        math.prod(int(n) for n in dimensions.split(",") if n)
        for _, dimensions in _ARRAY.findall(shape)
    )


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str | None]:
    """Returns the instructions of each computation by name, and the entry's name."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                current[found[1]] = _Instruction(*found.groups()[1:])
    return computations, entry


def _called(one: _Instruction) -> list[str]:
    """Returns the computations that an instruction runs: of a loop, its body."""
    names = re.findall(
        r"(?:to_apply|calls|body|\w+_computation)=%?([\w.\-]+)", one.rest
    )
    for branches in re.findall(r"branch_computations=\{(.*?)\}", one.rest):
        names += _NAME.findall(branches)
    return names


def _trips(one: _Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
    return int(known[1]) if known else 1


def _kernel(
    label: str,
    one: _Instruction,
    body: dict[str, _Instruction],
    computations: dict[str, dict[str, _Instruction]],
    inner: list[str],
    times: int,
) -> Kernel:
    names = _NAME.findall(one.operands)
    reads = [size(body[name].shape) if name in body else 0 for name in names]
    fused: dict[str, _Instruction] = {}
    if one.operation == "fusion":
        fused = computations[inner[0]]
        reads = [min(full, _read(fused, i, full)) for i, full in enumerate(reads)]
    elif one.operation in CUTS:
        reads = [_elements(one.shape) * each for each in _each(body, names[:1])]
    written = size(one.shape)
    if one.operation in REPEATS:
        # What begins a copy is written down with what it copies, and a flag.
        written = size(_ARRAY_WITH_LAYOUT.findall(one.shape)[1])
    elif one.operation == "custom-call":
        written = size(re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", one.shape))  # its scratch
    source = re.search(r'op_name="([^"]*)"', one.rest)
    return Kernel(
        _kind(one, fused),
        label,
        sum(reads) + written,
        times,
        source[1] if source else "",
    )


def _read(fused: dict[str, _Instruction], index: int, full: int) -> int:
    """Returns the bytes that a fusion reads of an operand: less where it is cut."""
    label = next(
        (
            name
            for name, one in fused.items()
            if one.operation == "parameter" and one.operands == str(index)
        ),
        None,
    )
    if label is None:
        return full
    total, waiting = 0, [label]
    each = _each(fused, [label])[0]
    while waiting:
        name = waiting.pop()
        for other, one in fused.items():
            if name not in _NAME.findall(one.operands):
                continue
            if one.operation in ("bitcast", "convert"):
                waiting.append(other)
            elif one.operation in CUTS:
                total += each * _elements(one.shape)
            else:
                return full
    return total


def _kind(one: _Instruction, fused: dict[str, _Instruction]) -> str:
    operations = {each.operation for each in fused.values()} or {one.operation}
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    called = target[1].lower() if target else ""
    convolves = "conv" in called and "convert" not in called
    if convolves or "convolution" in operations:
        return "convolution"
    if "matmul" in called or "gemm" in called or "dot" in operations:
        return "product"
    if "triton" in called or "mosaic" in called:
        return "our own"
    if any(name.removesuffix("-start") in COLLECTIVES for name in operations):
        return "collective"
    if operations & {"reduce", "reduce-window"}:
        return "reduction"
    if operations & {"transpose", "copy", "copy-start"}:
        return "copy"
    return "elementwise" if fused else called or one.operation
