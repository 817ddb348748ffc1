"""Files that PyTorch wrote, read by content, and never run."""

import collections
import hashlib

import jax.numpy as jnp
import nonsense
import numpy as np
import pytest

from diffusion_jax.errors import DataError
from diffusion_jax.storage import tensor_files

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("ending", ["bin", "pth", "safetensors"])
def test_tensors_are_read_to_the_bit(tmp_path, zipped, ending):
    path = tmp_path / f"a.{ending}"
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    tensor, brain = torch.tensor(values), values.astype(jnp.bfloat16)
    scalar = torch.tensor(1.5, dtype=torch.bfloat16)
    pairs = {
        "kernel": (torch.nn.Parameter(tensor), values),
        "transposed": (tensor.T, values.T),
        "brain": (tensor.bfloat16().T, brain.T),
        "half": (tensor.half(), values.astype(np.float16)),
        "step": (torch.tensor(790_000), np.int64(790_000)),
        "scalar": (scalar, np.asarray(1.5, jnp.bfloat16)),
        "none": (torch.zeros(0, 2), np.zeros((0, 2), np.float32)),
    }
    state = collections.OrderedDict((n, tensor) for n, (tensor, _) in pairs.items())
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert tensor_files.kind_of(path) == "pytorch"
    found = tensor_files.read(path, progress=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.format, found.meta, found.sha256) == ("pytorch", {}, digest)
    assert found.arrays.keys() == pairs.keys()
    for name, (_, array) in pairs.items():
        np.testing.assert_array_equal(
            found.arrays[name], np.asarray(array), strict=True
        )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", ["code", "nested", "tensor", "list", "cut"])
def test_anything_else_is_refused_and_not_run(tmp_path, zipped, content):
    path, canary = tmp_path / "a.bin", tmp_path / "canary"
    states = {
        "code": {"a": nonsense.Evil(canary)},
        "nested": {"state_dict": {"a": torch.zeros(2)}},
        "tensor": torch.zeros(2),
        "list": [torch.zeros(2)],
        "cut": {"a": torch.zeros(1000)},
    }
    torch.save(states[content], path, _use_new_zipfile_serialization=zipped)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    said = r"must hold .*; got .*\. It was not run\. "
    with pytest.raises(DataError, match=said) as e:
        tensor_files.read(path)
    # Nor is it told to be trusted, as PyTorch does.
    assert "trust" not in str(e.value)
    assert ("'state_dict' is a dict." in str(e.value)) == (content == "nested")
    assert not canary.exists()
