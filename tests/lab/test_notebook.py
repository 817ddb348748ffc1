"""What a notebook uses: the same numbers as the commands, and words for mistakes."""

import dataclasses
import functools
import json
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from PIL import Image
from small_run import SMALL

from diffusion_jax import gaussian, lab
from diffusion_jax.checkpoints.checkpoint import CheckpointError
from diffusion_jax.data import datasets
from diffusion_jax.lab.process import stopping
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.training import arguments, loop
from diffusion_jax.lab.wiring import build
from experiments import convert, eval_nll, sample
from experiments.configs import EXPERIMENTS

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def digits(trained):
    return lab.load(trained.folder)


def test_samples_are_those_of_the_command(digits, trained, tmp_path):
    out = tmp_path / "a.npz"
    flags = ["--count", "10", "--seed", "3", "--format", "npz", "--out", str(out)]
    how = ["--sampler", "unipc", "--steps", "3"]
    assert sample.main([str(trained.folder), *flags, *how]) == 0
    with np.load(out) as file:
        expected = file["images"]
    found = digits.sample(KEY, 10, sampler="unipc", steps=3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_the_bound_is_that_of_the_command(digits, trained):
    assert eval_nll.main([str(trained.folder), "--max-images", "6"]) == 0
    written = json.loads((trained.folder / "eval/nll_train.json").read_text())
    images = datasets.load("digits").images
    chosen = np.sort(np.random.default_rng(0).choice(len(images), 6, replace=False))
    bits = digits.bits_per_dim(images[chosen])
    assert bits.shape == (6,)
    assert bits.mean() == pytest.approx(written["bits_per_dim"], rel=1e-6)
    # Images without an axis of channels are the same.
    np.testing.assert_array_equal(digits.bits_per_dim(images[chosen, ..., 0]), bits)


def test_the_network_is_asked_in_steps(digits):
    clean = jnp.linspace(-3, 3, 2 * 64).reshape(2, 8, 8, 1)  # so that the clip is seen
    noise = gaussian.normal(KEY, clean.shape)
    apply = jax.jit(build.make_network(digits.config).apply)
    for t in (1, np.array([3, 20])):
        level = digits.schedule(t)
        x_t = gaussian.q_sample(clean, noise, level)
        pred = digits.denoise(x_t, t)
        times = np.broadcast_to(t, 2) - 1
        output = apply({"params": digits.params["net"]}, x_t, times)
        x0 = gaussian.predict("v", output, x_t, level).x0
        np.testing.assert_allclose(pred.x0, jnp.clip(x0, -1, 1), atol=1e-4)
        level = level.like(x_t)
        together = level.alpha * pred.x0 + level.sigma * pred.eps
        np.testing.assert_allclose(together, x_t, atol=1e-5)
    slope = jax.jit(jax.grad(lambda x: digits.denoise(x, 9).eps.sum()))(clean)
    assert np.abs(slope).max() > 0
    with pytest.raises(ValueError, match=r"t must be in 0..20"):
        digits.denoise(clean, 21)


def test_a_label_is_told_and_none_is_the_last_row(digits, refuses):
    config = config_of("--net.classes", "3", "--net.label-dropout", "0.1")
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # fresh ones are deaf: the last convolution is near zero
        lambda a: a + 0.1 * rng.normal(size=a.shape).astype(a.dtype),
        build.init_params(config, KEY),
    )
    loaded = dataclasses.replace(digits, config=config, params=params)
    x_t = jax.random.normal(KEY, (2, 8, 8, 1))
    apply = jax.jit(build.make_network(config).apply)
    jitted = jax.jit(lambda x: loaded.denoise(x, 9, label=jnp.array([2, 0])))
    for label, rows in ((1, [1, 1]), ([2, 0], [2, 0]), (None, [3, 3]), ("jit", [2, 0])):
        given = {"params": params["net"]}, x_t, jnp.array([8, 8]), jnp.array(rows)
        x0 = gaussian.predict("v", apply(*given), x_t, loaded.schedule(9)).x0
        found = jitted(x_t) if label == "jit" else loaded.denoise(x_t, 9, label=label)
        np.testing.assert_allclose(found.x0, jnp.clip(x0, -1, 1), atol=1e-4)
    for wrong in (3, -1, [0, 1, 2], 1.0, [0, 9]):
        with refuses(str(wrong)):
            loaded.denoise(x_t, 9, label=wrong)
    never = replace(config, "net", label_dropout=0.0)
    with refuses("none, which this network was never told"):
        dataclasses.replace(loaded, config=never).denoise(x_t, 9)


def test_any_kind_of_weights_and_network_is_loaded(digits, trained, tmp_path):
    last = lab.load(trained.folder, raw=True, step=12)
    assert (last.kind, last.step) == ("last", 12)
    said = repr(digits)
    assert said.startswith("<digits: images of 8x8x1, ")
    assert said.endswith("; averaged weights of step 12>")
    with pytest.raises(CheckpointError, match=r"step must be one of \[12\].*got 3"):
        lab.load(trained.folder, step=3)
    for out in (tmp_path / "net.safetensors", tmp_path / "folder"):
        assert convert.main([str(trained.folder), str(out)]) == 0
        found = lab.load(out)
        np.testing.assert_array_equal(found.sample(KEY, 4), digits.sample(KEY, 4))


@functools.cache
def config_of(*flags: str) -> lab.Config:
    """The small run's configuration, as a notebook would write it."""
    return arguments.parse(["digits", *SMALL, *flags], EXPERIMENTS, prog="train")


def test_training_on_given_images_is_that_of_the_command(digits, tmp_path, capsys):
    known = datasets.load("digits")
    config = dataclasses.replace(config_of(), output=str(tmp_path), name="given images")
    half = lab.train(replace(config, "train", stop_at=7), images=known.images)
    assert half.step == 7
    found = lab.train(config, images=known.images[..., 0])
    assert found.step == 12
    assert "going on from step 7 of 12" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, found.params, digits.params)
    # The file says which images they were, and others are refused.
    with pytest.raises(ValueError, match=r"data\.source.*force=True"):
        lab.train(config, images=known.images[::-1])
    with pytest.raises(ValueError, match=r"given in memory.*--data npz:FILE"):
        eval_nll.main([str(tmp_path / "given images")])


X = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
SAMPLING = {
    "got 'samplr'": lambda d: d.sample(KEY, 2, samplr="ddim"),
    "got 'ddimm'": lambda d: d.sample(KEY, 2, sampler="ddimm"),
    "got '5'": lambda d: d.sample(KEY, 2, steps="5"),
    "got 0.5": lambda d: d.sample(KEY, 2, sampler="heun", eta=0.5),
    "got 3": lambda d: d.sample(KEY, 2, label=3),
    "got 7": lambda d: d.sample(7, 2),
    "got 0": lambda d: d.sample(KEY, 0),
    "got True": lambda d: d.sample(KEY, True),
    "got [N, 4, 8, 1]": lambda d: d.denoise(X[:, :4] / 255.0, 5),
    "got [N, 8, 8]": lambda d: d.denoise(X[..., 0] / 255.0, 5),
    "got uint8": lambda d: d.denoise(X, 5),
    "got shape (3,)": lambda d: d.denoise(X / 255.0, [1, 2, 3]),
    "got 1": lambda d: d.denoise(X / 255.0, 5, label=1),
    "got float64": lambda d: d.bits_per_dim(X / 255.0),
    "got [N, 8, 8, 3]": lambda d: d.bits_per_dim(np.repeat(X, 3, -1)),
    "got 4. Leave them out, or say how many classes there are": (
        lambda d: d.bits_per_dim(X, labels=[0, 1, 2, 0])
    ),
    "got -1": lambda d: d.bits_per_dim(X, seed=-1),
}
TRAINING = {
    "got a dict": lambda d: lab.train({}, images=X),
    "got labels alone": lambda d: lab.train(config_of(), labels=[1]),
    "got none": lambda d: lab.train(config_of("--net.classes", "3"), images=X),
    "got 0.": lambda d: lab.train(replace(config_of(), "train", steps=0)),
    "got '2'": lambda d: lab.train(replace(config_of(), "train", steps="2")),
    "got 'a/b'": lambda d: lab.train(
        dataclasses.replace(config_of(), name="a/b"), images=X
    ),
}
LOADING = {
    "got 'nowhere'": lambda d: lab.load("nowhere"),
    "got a Trained": lambda d: lab.load(d),
    "by: download=True": lambda d: lab.load("owner/name"),
    "got 'yes'": lambda d: lab.load(d.run.folder, raw="yes"),
    "got 0.5. ": lambda d: lab.load(d.run.folder, average=0.5),
}
MISTAKES = SAMPLING | TRAINING | LOADING


@pytest.mark.parametrize("got", MISTAKES)
def test_mistakes_are_named_as_python_writes_them(got, digits, refuses, monkeypatch):
    monkeypatch.chdir(digits.run.folder)
    before = sorted(digits.run.folder.rglob("*"))
    with pytest.raises(ValueError) as error:
        MISTAKES[got](digits)
    assert "--" not in str(error.value)  # it names no flag of a command
    with refuses(got.removeprefix("got ").rstrip(".")):
        raise error.value
    assert sorted(digits.run.folder.rglob("*")) == before


GREY, COLOURS = X[..., 0], np.repeat(X, 3, axis=-1)
IMAGES = {
    "grey": GREY,
    "a list": list(X),
    "of Pillow": [Image.fromarray(each) for each in GREY],
    "of JAX": jnp.asarray(X),
    "three grey ones": list(GREY[:3]),
}
NO_IMAGES = {
    "from 0 to 1. If they are scaled to [0, 1]: np.round(images * 255.0)": X / 255,
    "from -1 to 1. If they are scaled to [-1, 1]": X / 127.5 - 1,
    "from 0 to 255. Convert them: np.round(images).astype": jnp.asarray(X, float),
    "from -7 to 2. Scale them to 0..255": X / 255 * 9 - 7,
    "from nan to nan. Find out": np.where(X > 9, np.nan, X),
    "all of 0 and 1. Of masks give images * 255": X % 2,
    "shape (0, 8, 8, 1). Give one image or more": X[:0],
    "shape (8, 8). Put them along a first axis": GREY[0],
    "8x3 with 1. Of a single image give images[None]": COLOURS[0],
    "(3, 8, 8), which is three grey ones, or one in colours": GREY[:3],
    "8x8 with 4. Of RGBA take": np.repeat(X, 4, axis=-1),
    "a list of several shapes. Make": [X[0], X[1, :5]],
    "'mine'. Files are named": "mine",
    "a Dataset. Give its parts": datasets.Dataset(X, None, ""),
}
NO_LABELS = {
    "float64 of shape (4,). Make them int32": [0.0, 1.0, 2.0, 0.0],
    "shape (4, 3). Of one-hot rows take np.argmax": np.eye(3)[[0, 1, 2, 0]],
    "shape (4, 1). Give labels[:, 0]": [[0], [1], [2], [0]],
    "shape (2,). Give as many": [0, 1],
    "-1..2. Leave out images without a class": [0, 1, -1, 2],
    "0..3. In training, set net.classes to 4": [0, 1, 2, 3],
    "none. Give labelled": None,
}


@pytest.fixture
def begun(monkeypatch):
    """What training is begun with, in place of which nothing is done."""

    def note(config, *, dataset, **_):
        found.update(config=config, dataset=dataset)
        raise KeyboardInterrupt

    found = {}
    monkeypatch.setattr(loop, "train", note)
    return found


def test_images_and_values_of_many_kinds_are_the_same(begun, tmp_path):
    config = config_of("--net.classes", "3")
    config = dataclasses.replace(config, output=tmp_path)  # a path is as good as text
    config = replace(config, "train", steps=np.int64(12))
    for name, images in IMAGES.items():
        for labels in ([0, 1, 2, 0], np.uint8([0, 1, 2, 0]), jnp.array([0, 1, 2, 0])):
            with pytest.raises(KeyboardInterrupt):
                lab.train(config, images=images, labels=labels[: len(images)])
            found, count = begun["dataset"], len(images)
            np.testing.assert_array_equal(found.images, X[:count], name)
            assert found.images.dtype == np.uint8
            assert found.labels.tolist() == [0, 1, 2, 0][:count]
            assert found.labels.dtype == np.int32
    assert begun["config"].output == str(tmp_path)
    assert type(begun["config"].train.steps) is int


@pytest.mark.parametrize("got", [*NO_IMAGES, *NO_LABELS])
def test_what_is_no_image_or_no_class_is_refused(got, begun, refuses):
    labels = {"labels": NO_LABELS[got]} if got in NO_LABELS else {}
    config = config_of("--net.classes", "3") if labels else config_of()
    with refuses(got):
        lab.train(config, images=NO_IMAGES.get(got, X), **labels)


def test_an_interrupt_is_noted_once_and_the_process_lives_on():
    before = signal.getsignal(signal.SIGINT)
    with stopping.interrupts() as found:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        found.note()
        signal.raise_signal(signal.SIGINT)
        assert found.numbers == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    numbers = []

    def elsewhere():
        with stopping.interrupts() as found:
            numbers.append(found.numbers)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert numbers == [[]]


def test_an_interrupted_training_returns_what_it_has(tmp_path, monkeypatch):
    has_grid = loop.has_grid

    def interrupting(config, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return has_grid(config, step)

    monkeypatch.setattr(loop, "has_grid", interrupting)
    config = dataclasses.replace(config_of(), output=str(tmp_path))
    found = lab.train(config, images=datasets.load("digits").images)
    assert 5 <= found.step < 12


@pytest.fixture
def beside_runs(trained, tmp_path, monkeypatch):
    """The tests are where the run is runs/digits, as for a person."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained.folder)
    monkeypatch.chdir(tmp_path)


def test_the_lines_of_the_readme_run(beside_runs):
    text = (processes.ROOT / "README.md").read_text()
    [lines] = [b for b in text.split("```")[1::2] if "lab.load" in b]
    scope = {}
    # The network of the tests has 20 steps, and trains for 12.
    exec(lines.removeprefix("python").replace("300)", "10)"), scope)
    assert scope["drawn"].shape == scope["seen"].shape == (16, 8, 8, 1)
    assert scope["bits"].shape == (16,)
    assert scope["own"].step == 12


def test_the_notebook_of_the_docs_runs(beside_runs):
    book = json.loads((processes.ROOT / "docs" / "notebook.ipynb").read_text())
    code = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    shown = [lines for lines in code if lines.splitlines()[-1].startswith("pictures.")]
    assert len(shown) == 3
    exec("\n".join(code), scope := {})
    assert scope["seen"].shape == scope["slope"].shape == (10, 8, 8, 1)
