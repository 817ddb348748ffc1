"""Constants of a TensorFlow graph, read without TensorFlow.

A frozen graph is a Protocol Buffers message in which the weights are `Const` nodes. Of
that format this reads what these nodes need, and runs nothing:

  GraphDef          1 node
  NodeDef           1 name, 2 op, 5 attr: a map, entries of 1 key and 2 value
  AttrValue         8 tensor
  TensorProto       1 dtype, 2 tensor_shape, 4 tensor_content, 5 float_val
  TensorShapeProto  2 dim: 1 size
"""

import math
import os
from collections.abc import Iterator

import numpy as np

from diffusion_jax.errors import DataError

_FLOAT = 1
# More elements than any tensor here has: a shape must not reserve memory by lying.
_MAX_SIZE = 2**28
# Elements of a tensor that is written down as one number, repeated: a bias has some.
_MAX_REPEATED = 2**20
# Bytes by which the numbers of a whole file may so become more than the file.
_MAX_ADDED = 2**26


def read(content: bytes, what: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the float32 constants of a graph, by name; other nodes are passed over.

    Args:
      content: a serialised GraphDef.
      what: what to call it in errors.

    Raises:
      DataError: it is cut off, or is something else.
    """
    constants, room = {}, len(content) + _MAX_ADDED
    try:
        for number, _, node in _fields(memoryview(content)):
            if number == 1:
                name, array = _constant(node)
                if array is None:
                    continue
                room -= array.nbytes
                if room < 0:
                    raise ValueError(f"numbers repeated beyond {_MAX_ADDED} bytes")
                constants[name] = array
    except ValueError as error:
        raise DataError(
            f"{what} must be a whole TensorFlow GraphDef; got {error}. Download it "
            "again: it was cut off, or is another kind of file."
        ) from error
    return constants


def _constant(node: memoryview) -> tuple[str, np.ndarray | None]:
    """Returns a node's name, and its value if it is a constant of type float32."""
    name, op, value = "", "", None
    for number, _, raw in _fields(node):
        if number == 1:
            name = str(raw, "utf-8")
        elif number == 2:
            op = str(raw, "utf-8")
        elif number == 5:
            entry = {key: part for key, _, part in _fields(raw)}
            if entry.get(1) == b"value":
                value = entry.get(2)
    if op != "Const" or value is None:
        return name, None
    tensors = [raw for number, _, raw in _fields(value) if number == 8]
    return name, _tensor(tensors[-1], name) if tensors else None


def _tensor(raw: memoryview, name: str) -> np.ndarray | None:
    """Returns a tensor of type float32, and None for one of another type."""
    kind, shape, content, values = 0, [], b"", []
    for number, value, part in _fields(raw):
        if number == 1:
            kind = value
        elif number == 2:
            shape = [_size(dim) for n, _, dim in _fields(part) if n == 2]
        elif number == 4:
            content = bytes(part)
        elif number == 5:  # packed or one by one: four bytes a number both ways
            values.append(bytes(part))
    if kind != _FLOAT:
        return None
    data = content or b"".join(values)
    size = math.prod(shape)
    # An axis of 0 would hide any other.
    if len(data) % 4 or max(size, *shape, 0) > _MAX_SIZE:
        raise ValueError(f"{len(data)} bytes for {name} of shape {shape}")
    array = np.frombuffer(data, "<f4").astype(np.float32)
    if not content and 0 < array.size < size:
        # Listed values may stop early: the last one goes on to the end.
        if size > _MAX_REPEATED:
            raise ValueError(f"{array.size} numbers for {name} of shape {shape}")
        array = np.pad(array, (0, size - array.size), mode="edge")
    if array.size != size:
        raise ValueError(f"{array.size} numbers for {name} of shape {shape}")
    return array.reshape(shape)


def _size(dim: memoryview) -> int:
    """Returns the length of an axis; one that is not written down is 0."""
    return {n: value for n, value, _ in _fields(dim)}.get(1, 0)


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yields each field of a message: its number, its value and its bytes.

    A field has either a value (wire type 0) or bytes (types 1, 2 and 5).
    """
    at, empty = 0, data[:0]
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value, empty
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes where {len(data) - at} are left")
        yield number, 0, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Returns the number written from a position on, and the position after it."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"a number that does not end at byte {at}")
