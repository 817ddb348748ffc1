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


def test_damaged_graph_is_an_error_and_nothing_else():
    """Of many changes each is either harmless or named."""
    content = b"".join([*OTHERS, constant("a", golden.uniform("x", (3, 5)))])
    rng = np.random.default_rng(0)
    damaged, refused = [content[:n] for n in range(len(content))], []
    for _ in range(1000):
        other = bytearray(content)
        other[rng.integers(len(content))] = rng.integers(256)
        damaged.append(bytes(other))
    for other in damaged:
        try:
            graphdef.read(other, "a.pb")
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 500
    head = "a.pb must be a whole TensorFlow GraphDef; got "
    assert all(message.startswith(head) for message in refused)


def shaped(*dims, content=bytes(4)):
    """A constant whose shape is any list of numbers."""
    sizes = b"".join(field(2, field(1, n)) for n in dims)
    tensor = field(1, 1) + field(2, sizes) + field(5, content)
    return node("a", "Const", attribute("value", field(8, tensor)))


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (shaped(2**63, 2**63), "1 numbers for a"),
        (shaped(0, 2**64 - 1), "1 numbers for a"),
        (shaped(-1 % 2**64, -1 % 2**64), "1 numbers for a"),
        (shaped(*[1] * 100), ""),
        (shaped(2**20 + 1), "1 numbers for a"),
        (shaped(2**20) * 40, "numbers repeated beyond"),
        (shaped(3, content=b"abc"), ""),
        (shaped(1, content=bytes(40)), "10 numbers for a"),
        (b"\n" + b"\xff" * 20, "Error parsing message"),
    ],
)
def test_what_lies_reserves_no_memory(refuses, content, got):
    with nonsense.little_memory(), nonsense.little_time(), refuses(got):
        graphdef.read(content, "a.pb")
