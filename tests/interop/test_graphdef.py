"""Constants of TensorFlow's graphs in every spelling, whole and damaged."""

import make_inception_golden as golden
import nonsense
import numpy as np
import pytest
from graph_writer import OTHERS, attribute, constant, field, node

from diffusion_jax.errors import DataError
from diffusion_jax.interop import graphdef


@pytest.mark.parametrize("how", ["content", "packed", "listed"])
@pytest.mark.parametrize("shape", [(), (1,), (300,), (2, 3, 1, 4)])
def test_graph_constants_are_read_in_every_spelling(how, shape):
    array = golden.uniform("x", shape)
    content = b"".join([*OTHERS, constant("a/b", array, how=how)])
    read = graphdef.read(content, "a")
    assert set(read) == {"a/b", "Sub/y"}
    np.testing.assert_array_equal(read["a/b"], array)


def test_last_number_of_a_constant_goes_on():
    content = constant("a", np.array([3, 0, 0, 0]), how="first")
    np.testing.assert_array_equal(graphdef.read(content, "a")["a"], [3, 3, 3, 3])


def test_hand_written_graph_is_protocol_buffers():
    """The library itself reads the same from it."""
    descriptors = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptors.FileDescriptorProto(name="graph.proto", syntax="proto3")
    text, number, many = 9, 5, 3  # TYPE_STRING, TYPE_INT32, LABEL_REPEATED
    fields = {
        "Dim": [("size", 1, 3, 1, None)],
        "Shape": [("dim", 2, 11, many, "Dim")],
        "Tensor": [
            ("dtype", 1, number, 1, None),
            ("shape", 2, 11, 1, "Shape"),
            ("content", 4, 12, 1, None),
            ("float_val", 5, 2, many, None),
        ],
        "Value": [("tensor", 8, 11, 1, "Tensor")],
        "Entry": [("key", 1, text, 1, None), ("value", 2, 11, 1, "Value")],
        "Node": [
            ("name", 1, text, 1, None),
            ("op", 2, text, 1, None),
            ("attr", 5, 11, many, "Entry"),
        ],
        "Graph": [("node", 1, 11, many, "Node")],
    }
    for name, rows in fields.items():
        message = file.message_type.add(name=name)
        for field_name, index, kind, label, of in rows:
            message.field.add(
                name=field_name, number=index, type=kind, label=label, type_name=of
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    graph_class = message_factory.GetMessageClass(pool.FindMessageTypeByName("Graph"))
    array = golden.uniform("x", (2, 3))
    graph = graph_class.FromString(b"".join([*OTHERS, constant("a", array)]))
    assert [n.name for n in graph.node][-1] == "a"
    tensor = graph.node[-1].attr[1].value.tensor
    assert [d.size for d in tensor.shape.dim] == [2, 3]
    assert tensor.content == array.tobytes()

    made = graph_class()
    written = made.node.add(name="b", op="Const").attr.add(key="value").value.tensor
    written.dtype = 1
    written.shape.dim.add(size=3)
    written.float_val.extend([1, 2, 3])
    read = graphdef.read(made.SerializeToString(), "a")
    np.testing.assert_array_equal(read["b"], [1, 2, 3])


def test_damaged_graph_is_an_error_and_nothing_else():
    """Of 2000 changes each is either harmless or named."""
    content = b"".join([*OTHERS, constant("a", golden.uniform("x", (3, 5)))])
    rng = np.random.default_rng(0)
    damaged = [content[:n] for n in range(len(content))]
    for _ in range(2000 - len(damaged)):
        other = bytearray(content)
        other[rng.integers(len(content))] = rng.integers(256)
        damaged.append(bytes(other))
    refused = []
    for other in damaged:
        try:
            graphdef.read(other, "a.pb")
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 500
    head = "a.pb must be a whole TensorFlow GraphDef; got "
    assert all(message.startswith(head) for message in refused)


def shaped(*dims, content=bytes(4)):
    """A constant whose shape is any list of numbers, with content or without."""
    sizes = b"".join(field(2, field(1, n)) for n in dims)
    tensor = field(1, 1) + field(2, sizes) + (field(5, content) if content else b"")
    return node("a", "Const", attribute("value", field(8, tensor)))


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (shaped(2**20, 2**20, 2**20), "4 bytes for a"),
        (shaped(0, 2**40, content=b""), "0 bytes for a"),
        (shaped(2**63, 2**63), "4 bytes for a"),
        (shaped(0, 2**64 - 1), "4 bytes for a"),
        (shaped(*[1] * 100), ""),
        (shaped(2**30), "4 bytes for a"),
        (shaped(2**27) * 20, "1 numbers for a"),
        (shaped(2**20) * 40, "numbers repeated beyond"),
        (shaped(3, content=b"abc"), "3 bytes for a"),
        (shaped(1, content=bytes(40)), "10 numbers for a"),
        (b"\n" + b"\xff" * 20, "a number that does not end"),
        (b"\n\2\x0b\x0c", "a field of wire type 3"),
        (b"\n\x04\n\2\xff\xfe", "utf-8"),
    ],
)
def test_what_lies_reserves_no_memory(refuses, content, got):
    with nonsense.little_memory(), nonsense.little_time(), refuses(got):
        graphdef.read(content, "a.pb")
