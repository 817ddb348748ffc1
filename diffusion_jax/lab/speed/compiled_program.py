"""Reads the kernels of a compiled program, and the bytes they move, from its text.

A step of a network of many small layers is bound by memory and by the number of its
kernels, not by its arithmetic. Both are known once it is compiled, before it runs, and
on a machine that could not run it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What costs nothing: names and views of what is there.
FREE = (
    *("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all"),
    *("partition-id", "replica-id"),
)
CONTROL = ("call", "while", "conditional", "async-start")
CUTS = ("slice", "dynamic-slice", "gather")
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
# Whose shape has what they copy, its copy, and a flag.
REPEATS = ("all-gather-start", "collective-permute-start", "copy-start")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))(?:e\w+)?\[([\d,]*)\]")
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


_Body = dict[str, _Instruction]
_Program = dict[str, _Body]
"""Instructions by name, of computations by name."""


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
    computations: _Program = {}
    entry, current = None, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] = _Instruction(*found.groups()[1:])
    if entry is None:
        raise ValueError(
            "text must be that of a compiled module, with an ENTRY; got "
            f"{text[:40]!r}. Give compiled.as_text()."
        )
    return list(_walk(computations, entry, 1))


def _walk(computations: _Program, name: str, times: int) -> Iterator[Kernel]:
    body = computations[name]
    for label, one in body.items():
        if one.operation in FREE or one.operation.endswith(("-done", "-update")):
            continue
        if one.operation in CONTROL:
            runs = _quoted(r'"known_trip_count":\{"n":', one) or 1
            for inner in _called(one):
                yield from _walk(computations, inner, times * int(runs))
            continue
        fused = computations[_called(one)[0]] if one.operation == "fusion" else {}
        moved = _read(one, body, fused) + _written(one)
        source = _quoted("op_name=", one)
        yield Kernel(_kind(one, fused), label, moved, times, source)


def _quoted(before: str, one: _Instruction) -> str:
    """Returns the quoted text after a name; "" where there is none."""
    found = re.search(f'{before}"([^"]*)"', one.rest)
    return found[1] if found else ""


def size(shape: str) -> int:
    """Returns the bytes of the arrays in a shape, such as "(f32[3,4]{1,0}, pred[])".

    >>> size("(bf16[2,3]{1,0}, f32[])")
    16
    """
    return sum(each * count for each, count in _arrays(shape))


def _arrays(shape: str) -> list[tuple[int, int]]:
    """Returns the bytes of an element and the number of them, of each array."""
    return [  # pred has no bits in its name; four bits take a byte
        (
            max(1, int(bits or 8) // 8),
            math.prod(int(n) for n in dimensions.split(",") if n),
        )
        for bits, dimensions in _ARRAY.findall(shape)
    ]


def _cut(whole: str, part: str) -> int:
    """Returns the bytes that are read of an array to cut a part out of it."""
    return _arrays(whole)[0][0] * _arrays(part)[0][1]


def _called(one: _Instruction) -> list[str]:
    """Returns the computations that an instruction runs: of a loop, its body."""
    names = r"(?:to_apply|calls|body|\w+_computation)=%?([\w.\-]+)"
    branches = re.findall(r"branch_computations=\{(.*?)\}", one.rest)
    return re.findall(names, one.rest) + _NAME.findall(" ".join(branches))


def _read(one: _Instruction, body: _Body, fused: _Body) -> int:
    """Returns the bytes that an instruction reads, each operand once."""
    shapes = [body[n].shape if n in body else "" for n in _NAME.findall(one.operands)]
    if one.operation in CUTS:
        return _cut(shapes[0], one.shape)
    return sum(_read_inside(fused, i, shape) for i, shape in enumerate(shapes))


def _read_inside(fused: _Body, index: int, shape: str) -> int:
    """Returns the bytes that a fusion reads of an operand: less where it is cut."""
    parameter = ("parameter", str(index))
    waiting = [n for n, one in fused.items() if (one[1], one[2]) == parameter]
    total = 0 if waiting else size(shape)
    while waiting:
        name = waiting.pop()
        for label, one in fused.items():
            if name not in _NAME.findall(one.operands):
                continue
            if one.operation in ("bitcast", "convert"):
                waiting.append(label)
            else:
                cut = one.operation in CUTS
                total += _cut(shape, one.shape) if cut else size(shape)
    return min(total, size(shape))


def _written(one: _Instruction) -> int:
    if one.operation in REPEATS:
        each, count = _arrays(one.shape)[1]
        return each * count
    if one.operation == "custom-call":
        return size(re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", one.shape))  # its scratch
    return size(one.shape)


def _kind(one: _Instruction, fused: _Body) -> str:
    operations = {each.operation for each in fused.values()} or {one.operation}
    called = _quoted("custom_call_target=", one).lower()
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
