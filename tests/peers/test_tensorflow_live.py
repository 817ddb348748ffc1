"""Checkpoints that TensorFlow wrote, as the authors' training leaves them behind."""

import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_unets import TWO_LEVELS, normal, parameters

from diffusion_jax.interop import unet_names
from diffusion_jax.storage import tensor_files

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
tensorflow = pytest.importorskip("tensorflow")
v1 = tensorflow.compat.v1

STEP = 790_000
OWN = unet_names.shapes(TWO_LEVELS, 3, image_size=16)


PARAMS = parameters(TWO_LEVELS, normal(1, 16, 16, 3), np.zeros(1, np.float32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its prefix, with the values that averages and last weights had in training.

    The names and values of the moving averages and of what Adam keeps are TensorFlow's
    own doing: one step of both is made.
    """
    prefix = tmp_path_factory.mktemp("tf") / f"model.ckpt-{STEP}"
    names = unet_names.official_names(OWN, average=False)
    with tensorflow.Graph().as_default(), v1.Session() as session:
        variables = {
            name: v1.get_variable(name, initializer=value, use_resource=False)
            for name, value in unet_names.to_tensors(PARAMS, names).items()
        }
        each, step = list(variables.values()), v1.train.create_global_step()
        loss = tensorflow.add_n([tensorflow.reduce_sum(v**2) for v in each])
        update = v1.train.AdamOptimizer(0.1).minimize(loss, var_list=each)
        average = v1.train.ExponentialMovingAverage(0.5)
        with v1.control_dependencies([update]):
            track = average.apply(each)
        # An average begins as what it is of, which by then has to be something.
        session.run(v1.variables_initializer(each))
        session.run(v1.global_variables_initializer())
        session.run(v1.assign(step, STEP))
        session.run(track)
        v1.train.Saver().save(session, str(prefix))
        kept = {name: average.average(v) for name, v in variables.items()}
        return prefix, session.run({True: kept, False: variables})


@pytest.mark.parametrize("average", [True, False])
def test_weights_come_in_to_the_bit(checkpoint, average):
    prefix, values = checkpoint
    found = tensor_files.read(prefix, progress=True)
    params = unet_names.from_tensors(
        found.arrays,
        unet_names.official_names(OWN, average=average),
        OWN,
        where=str(prefix),
        ignore=unet_names.official_others(OWN),
    )
    names = unet_names.official_names(OWN, average=False)
    back = unet_names.to_tensors(params, names)
    assert back.keys() == values[average].keys()
    for name, value in values[average].items():
        np.testing.assert_array_equal(back[name], value)
        assert not np.array_equal(value, values[not average][name])
    assert (found.format, found.meta) == ("tensorflow", {})
    assert found.arrays["global_step"] == STEP
    # Weights, their averages, two moments each; the step and the powers of the decays.
    assert len(found.arrays) == 4 * len(OWN) + 3
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)


def test_each_of_its_names_will_do(checkpoint):
    prefix, _ = checkpoint
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    for path in (prefix, data, prefix.with_name(f"{prefix.name}.index")):
        assert tensor_files.kind_of(path) == "tensorflow"
        assert tensor_files.read(path).sha256 == digest


def test_data_in_two_files_are_read(tmp_path, refuses):
    prefix = tmp_path / "model.ckpt"
    two = v1.ConfigProto(device_count={"CPU": 2})
    with tensorflow.Graph().as_default(), v1.Session(config=two) as session:
        for i in range(2):
            with v1.device(f"/cpu:{i}"):
                v1.get_variable(f"v{i}", initializer=np.float32(i), use_resource=False)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(sharded=True).save(session, str(prefix))
    files = sorted(tmp_path.glob("model.ckpt.data-*-of-00002"))
    found = tensor_files.read(prefix)
    assert {name: float(x) for name, x in found.arrays.items()} == {"v0": 0, "v1": 1}
    content = b"".join(file.read_bytes() for file in files)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert tensor_files.read(files[1]).sha256 == found.sha256
    files[1].unlink()
    with refuses("00001-of-00002"):
        tensor_files.read(prefix)


@pytest.mark.parametrize("which", ["data", "index"])
@pytest.mark.parametrize("how", ["cut", "empty", "changed"])
def test_damage_is_refused(checkpoint, tmp_path, refuses, which, how):
    prefix, _ = checkpoint
    damaged = {"cut": lambda x: x[: 2 * len(x) // 3], "empty": lambda x: b""}
    damaged["changed"] = lambda x: x[:50] + bytes([x[50] ^ 1]) + x[51:]
    for file in prefix.parent.glob(f"{prefix.name}.*"):
        content = file.read_bytes()
        if f".{which}" in file.name:
            content = damaged[how](content)
        (tmp_path / file.name).write_bytes(content)
    with refuses("download both files again"):
        tensor_files.read(tmp_path / prefix.name)


def test_text_is_refused(tmp_path, refuses):
    prefix = tmp_path / "model.ckpt"
    tensorflow.train.Checkpoint(v=tensorflow.Variable(1.0)).write(str(prefix))
    with refuses("text for _CHECKPOINTABLE_OBJECT_GRAPH"):
        tensor_files.read(prefix)


def test_tensorflow_says_nothing_and_leaves_accelerators(checkpoint):
    program = (
        "import sys; from diffusion_jax.storage import tensor_files;"
        "tensor_files.read(sys.argv[1]); import tensorflow;"
        "assert not tensorflow.config.get_visible_devices('GPU')"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    command = [sys.executable, "-c", program, str(checkpoint[0])]
    done = subprocess.run(command, env=quiet, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
