"""Graphs as TensorFlow saves them: Protocol Buffers, written here by hand."""

import struct

import numpy as np


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n % 128 + 128]), n // 128
    return out + bytes([n])


def field(number, content):
    """A field of a message: a number, or bytes."""
    if isinstance(content, int):
        return varint(8 * number) + varint(content)
    return varint(8 * number + 2) + varint(len(content)) + content


def tensor_proto(array, *, how="content"):
    dims = b"".join(field(2, field(1, n)) for n in array.shape)
    raw = np.asarray(array, "<f4").tobytes()
    values = {
        "content": lambda: field(4, raw),
        "packed": lambda: field(5, raw),
        "listed": lambda: b"".join(
            varint(8 * 5 + 5) + raw[i : i + 4] for i in range(0, len(raw), 4)
        ),
        "first": lambda: field(5, raw[:4]),
    }
    return field(1, 1) + field(2, dims) + field(3, 0) + values[how]()


def attribute(key, value):
    return field(5, field(1, key.encode()) + field(2, value))


def node(name, op, *attributes, inputs=()):
    head = field(1, name.encode()) + field(2, op.encode())
    names = b"".join(field(3, name.encode()) for name in inputs)
    return field(1, head + names + field(4, b"/cpu:0") + b"".join(attributes))


def constant(name, array, *, how="content"):
    value = attribute("value", field(8, tensor_proto(array, how=how)))
    return node(name, "Const", attribute("dtype", field(6, 1)), value)


# What else the released graph has: constants of other types, operations, a version.
STRINGS = field(1, 7) + field(2, b"") + field(8, b"jpeg")
OTHERS = [
    node("DecodeJpeg/contents", "Const", attribute("value", field(8, STRINGS))),
    node(
        "conv/batchnorm",
        "BatchNormWithGlobalNormalization",
        attribute("variance_epsilon", varint(8 * 4 + 5) + struct.pack("<f", 1e-3)),
        attribute("scale_after_normalization", field(5, 0)),
        inputs=("conv/Conv2D", "conv/batchnorm/moving_mean"),
    ),
    constant("Sub/y", np.float32(128)),
    field(4, field(1, 8)),
]
