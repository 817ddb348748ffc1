"""Constants of a TensorFlow graph, read without TensorFlow.

A frozen graph is a Protocol Buffers message in which the weights are `Const` nodes. Of
its format this describes what these nodes need, and protobuf reads it as data; nothing
is run.
"""

import functools
import math
import os
from typing import Any

import numpy as np

from diffusion_jax.errors import DataError

# The fields of each message: names, numbers and types; a star means repeated.
_MESSAGES = {
    "Dim": {"size": (1, "int64")},
    "Shape": {"dim": (2, "Dim*")},
    "Tensor": {
        "dtype": (1, "int32"),
        "shape": (2, "Shape"),
        "content": (4, "bytes"),
        "float_val": (5, "float*"),
    },
    "Value": {"tensor": (8, "Tensor")},
    "Attribute": {"key": (1, "string"), "value": (2, "Value")},
    "Node": {"name": (1, "string"), "op": (2, "string"), "attr": (5, "Attribute*")},
    "Graph": {"node": (1, "Node*")},
}
_FLOAT = 1
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
    from google.protobuf.message import DecodeError

    constants, room = {}, len(content) + _MAX_ADDED
    try:
        for node in _graph().FromString(content).node:
            values = [a.value.tensor for a in node.attr if a.key == "value"]
            if node.op == "Const" and values and values[-1].dtype == _FLOAT:
                array = constants[node.name] = _array(values[-1], node.name)
                room -= array.nbytes
                if room < 0:
                    raise ValueError(f"numbers repeated beyond {_MAX_ADDED} bytes")
    except (DecodeError, ValueError, MemoryError) as error:
        raise DataError(
            f"{what} must be a whole TensorFlow GraphDef; got {error}. Download it "
            "again: it was cut off, or is another kind of file."
        ) from error
    return constants


@functools.cache
def _graph() -> Any:
    """Returns the message class of a graph."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", syntax="proto3")
    for message, fields in _MESSAGES.items():
        made = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = "LABEL_REPEATED" if kind.endswith("*") else "LABEL_OPTIONAL"
            field = made.field.add(name=name, number=number, label=label)
            if kind.rstrip("*") in _MESSAGES:
                field.type_name = kind.rstrip("*")
            else:
                field.type = f"TYPE_{kind.rstrip('*').upper()}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Graph"))


def _array(tensor: Any, name: str) -> np.ndarray:
    shape = [dim.size for dim in tensor.shape.dim]
    size = math.prod(shape)
    if tensor.content:
        array = np.frombuffer(tensor.content, "<f4").astype(np.float32)
    else:
        array = np.array(tensor.float_val, np.float32)
        if 0 < array.size < size <= _MAX_REPEATED:
            # Listed values may stop early: the last one goes on to the end.
            array = np.pad(array, (0, size - array.size), mode="edge")
    if array.size != size or min([0, *shape]) < 0:
        raise ValueError(f"{array.size} numbers for {name} of shape {shape}")
    return array.reshape(shape)
