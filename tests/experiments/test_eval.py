"""The evaluation commands, run as a person runs them."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import small_run
from PIL import Image

from diffusion_jax import errors
from diffusion_jax.checkpoints import checkpoint
from diffusion_jax.data import datasets
from diffusion_jax.errors import ConfigError
from diffusion_jax.interop import inception_weights
from diffusion_jax.lab.drawing import draws
from diffusion_jax.lab.measure import judges, reference
from diffusion_jax.lab.run_folder import results, runs
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.trained import opening
from diffusion_jax.lab.training import measuring
from diffusion_jax.lab.wiring import chains
from diffusion_jax.nets import inception
from experiments import convert, eval_fid, eval_nll, sample


@pytest.fixture
def run(trained):
    return trained


def digits_images():
    return datasets.load("digits")


def evaluate(run, *flags, name="fid.json"):
    assert eval_fid.main([str(run.folder), *flags]) == 0
    return json.loads((run.folder / "eval" / name).read_text())


def test_the_number_has_its_protocol_beside_it(run, capsys):
    result = evaluate(run, "--count", "100", "--steps", "3")
    shown = capsys.readouterr().out
    assert "fd_digits_classifier vs train" in shown
    assert "FID" not in shown.replace("fid.json", "")
    assert result["extractor"] == "digits_classifier"
    assert len(result["extractor_details"]["sha256"]) == 64
    for name, expected in {
        "count": 100,
        "seeds": [0],
        "weights": "averaged",
        "training_step": 12,
        "steps": 3,
        "evaluations_per_sample": 3,
        "variance": "small",
        "data": "digits",
        "reference": {"train": "1,797 train images"},
    }.items():
        assert result[name] == expected, name
    assert abs(sum(result["numbers"]["class_shares"]) - 1) < 1e-6
    picture = Image.open(run.folder / "eval" / "neighbours.png")
    assert picture.height == 3 * 68 + 4
    cells = np.asarray(picture)[:, -12 * 68 - 4 :]
    drawn = np.load(next((run.folder / "eval" / "samples").glob("*.npy")))
    np.testing.assert_array_equal(cells[4:68:8, 4:68:8], drawn[0, ..., 0])


def given(run, folder, images):
    """What is measured of samples in a file."""
    np.savez(folder / "given.npz", images=images)
    flags = ["--samples", f"npz:{folder / 'given.npz'}"]
    return evaluate(run, *flags, name="fid_given.json")


def test_what_the_samples_allow_is_measured(run, tmp_path, capsys, monkeypatch):
    few = functools.partial(eval_fid.metrics.kid, subsets=2)  # a hundred take long
    monkeypatch.setattr(eval_fid.metrics, "kid", few)
    kernel, distance = "kd_digits_classifier", "fd_digits_classifier"
    images = digits_images().images
    numbers = given(run, tmp_path, images)["numbers"]
    assert abs(numbers[f"{distance} vs train"]["mean"]) < 1e-6
    for name in ("precision", "recall", "coverage"):
        assert numbers[name]["mean"] == 1.0
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    numbers = given(run, tmp_path, noise)["numbers"]
    assert numbers[f"{distance} vs train"]["mean"] > 20
    assert numbers["precision"]["mean"] < 0.2
    capsys.readouterr()
    shares = {"class_shares", "sure"}
    precision = {"precision", "recall", "density", "coverage"}
    for count, names, left in (
        (64, {f"{kernel} vs train", *precision}, {distance}),
        (3, {f"{kernel} vs train"}, {distance, eval_fid.PRECISION}),
    ):
        result = given(run, tmp_path, images[:count])
        assert result["numbers"].keys() == names | shares
        assert result["left_out"].keys() == left
        said = "takes 65 or more, as digits_classifier has 64 features"
        assert f"left out for want of samples: {distance} {said}" in (
            capsys.readouterr().out
        )


def test_a_network_in_a_file_has_the_numbers_of_its_run(run, tmp_path):
    file = tmp_path / "a.safetensors"
    # It names other data, which are not there; the command line does.
    elsewhere = ["--data", "folder:elsewhere"]
    assert convert.main([str(run.folder), str(file), *elsewhere]) == 0
    one, other = run, runs.find(str(file))
    shutil.copytree(run.folder.parent / ".classifiers", other.folder / ".classifiers")
    results = []
    for name, place in ((run.folder, one), (file, other)):
        given = [str(name), "--data", "digits"]
        assert eval_fid.main([*given, "--count", "70", "--steps", "3"]) == 0
        assert eval_nll.main([*given, "--max-images", "4"]) == 0
        folder = place.folder / "eval"
        files = [folder / name for name in ("fid.json", "nll_train.json")]
        found = [json.loads(file.read_text()) for file in files]
        found[0]["extractor_details"].pop("file")
        results.append(found)
    assert results[0] == results[1]
    digests = {result["weights_sha256"] for result in results[0]}
    assert digests == {convert.of_run(run, Weights()).sha256}


@pytest.fixture
def draw(run, tmp_path):
    """Draws to the disk by chains of two steps, of some weights and seed."""
    config = with_sampling(runs.read_config(run), Sampling(steps=2))

    def drawn(count=10, *, raw=False, how=Sampling(), seed=0):
        chosen = with_sampling(config, how)
        params = opening.load(chosen, run, Weights(raw=raw))[0]
        options = {"count": count, "seed": seed, "batch_size": 4}
        return draws.to_disk(tmp_path, chosen, params, **options)

    return drawn


def test_an_interrupted_evaluation_goes_on(draw, tmp_path, capsys):
    whole = draw()
    record = next(tmp_path.glob("*.json"))
    about = json.loads(record.read_text())
    assert about["done"] == 10
    np.testing.assert_array_equal(draw(), whole)
    assert "going on" not in capsys.readouterr().out
    expected = np.array(whole)
    whole[8:] = 0
    record.write_text(json.dumps({**about, "done": 8}))
    resumed = draw()
    assert "going on from sample 8 of 10" in capsys.readouterr().out
    np.testing.assert_array_equal(resumed, expected)


def test_damaged_samples_are_drawn_again(draw, tmp_path):
    expected = np.array(draw(6))
    path, record = next(tmp_path.glob("*.npy")), next(tmp_path.glob("*.json"))
    stale = json.loads(record.read_text()) | {"seed": 1}
    for damage in (
        lambda: path.write_bytes(path.read_bytes()[:200]),
        path.unlink,
        lambda: np.save(path, np.zeros((6, 4, 4, 1), np.uint8)),
        lambda: record.write_text("{"),
        lambda: record.write_text(json.dumps(stale)),
    ):
        damage()
        np.testing.assert_array_equal(draw(6), expected)


def test_other_weights_never_meet_old_samples(draw, tmp_path):
    for other in ({}, {"raw": True}, {"how": Sampling("ddim")}, {"seed": 1}):
        draw(4, **other)
    drawn = [np.load(path).tobytes() for path in tmp_path.glob("*.npy")]
    assert len(set(drawn)) == 4


def test_samples_are_on_the_disk_before_it_is_noted(draw, monkeypatch):
    order, write = [], runs.write_json
    monkeypatch.setattr(np.memmap, "flush", lambda array: order.append("flushed"))

    def note(path, values):
        order.append(values["done"])
        write(path, values)

    monkeypatch.setattr(runs, "write_json", note)
    draw(6)
    assert order[:4] == ["flushed", 4, "flushed", 6]


def test_error_bars_and_untrained_weights(run):
    flags = ["--count", "100", "--steps", "2", "--seeds", "2", "--untrained"]
    result = evaluate(run, *flags, name="fid_untrained.json")
    number = result["numbers"]["fd_digits_classifier vs train"]
    assert len(number["of_each"]) == 2
    np.testing.assert_allclose(number["mean"], np.mean(number["of_each"]))
    np.testing.assert_allclose(number["std"], np.std(number["of_each"], ddof=1))
    assert number["std"] > 0  # the seeds have samples of their own
    assert result["weights"] == "untrained"


def test_statistics_can_come_from_a_file(run, tmp_path):
    flags = ["--count", "100", "--steps", "3"]
    truth = evaluate(run, *flags)["numbers"]["fd_digits_classifier vs train"]["mean"]
    config, images = runs.read_config(run), digits_images().images
    judge = judges.load(judges.path_of(config))
    features = judges.features_of(judge.params, judge.num_classes, images)[0]
    mu, sigma = features.mean(axis=0), np.cov(features.astype(np.float64).T)
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    given = evaluate(run, *flags, "--reference", str(tmp_path / "r.npz"))["numbers"]
    value = given["fd_digits_classifier vs reference"]["mean"]
    np.testing.assert_allclose(value, truth, rtol=1e-4)

    np.savez(tmp_path / "small.npz", mu=mu[:5], sigma=sigma[:5, :5])
    with pytest.raises(ConfigError, match=r"must be of 64 features.*got 5 in"):
        evaluate(run, *flags, "--reference", str(tmp_path / "small.npz"))


def test_reference_statistics_are_cached_by_what_made_them(run, monkeypatch):
    config, images = runs.read_config(run), digits_images().images
    calls = []

    def counted(extractor, images, **options):
        calls.append(len(images))
        return np.random.default_rng(0).normal(size=(len(images), 3)), None

    monkeypatch.setattr(reference, "extract", counted)
    extractor = eval_fid.extractors.Extractor("x", 3, None, {"sha256": "a"})
    first = reference.of(config, images, "train", extractor, batch_size=64)
    again = reference.of(config, images, "train", extractor, batch_size=64)
    assert calls == [1797]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = extractor._replace(details={"sha256": "b"})
    reference.of(config, images, "train", other, batch_size=64)
    reference.of(config, images[:500], "train", extractor, batch_size=64)
    reference.of(config, images, "test", extractor, batch_size=64)
    reference.of(config, images[::-1], "train", extractor, batch_size=64)
    assert calls == [1797, 1797, 500, 1797, 1797]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fid --count 1", "samples must be enough .*got 1: fd_.* takes 65 or"),
        ("fid --untrained --raw", "untrained must stand alone"),
        ("fid --sampler ddim --eta 2", "sample.eta must be from 0 to 1; got 2.0"),
        ("fid --variance learned", "sample.variance must be one that the network"),
        ("fid --samples pictures", "samples must be npz:FILE or folder:FOLDER; got"),
        ("fid --samples folder:/nowhere", "nowhere"),
        ("fid --weights /nowhere.pb", "path must name the Inception weights"),
        ("fid --step 5", r"one of \[12\].*; got 5\."),
        ("nll --ode --variance small", "--ode must stand without --variance"),
        ("nll --ode --rate-distortion", "--ode must stand without"),
        ("nll --variance range", "variance must be one that the network was"),
        ("nll --split test", "test"),  # digits have none
    ],
)
def test_bad_requests_are_named_before_anything_is_drawn(run, line, message):
    name, *flags = line.split()
    main = {"fid": eval_fid, "nll": eval_nll}[name].main
    before = sorted((run.folder / "eval").rglob("*"))
    with pytest.raises((ConfigError, errors.DataError, RuntimeError), match=message):
        main([str(run.folder), *flags])
    assert sorted((run.folder / "eval").rglob("*")) == before


def test_bound_and_its_terms_are_reported(run, capsys):
    argv = [str(run.folder), "--max-images", "10", "--rate-distortion"]
    assert eval_nll.main([*argv, "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((run.folder / "eval" / "nll_train.json").read_text())
    assert "(a random subset)" in shown
    assert f"{result['bits_per_dim']:.4f}" in shown
    assert (result["images"], result["subset"]) == (10, True)
    assert result["evaluations"] == 10 * 20
    assert len(result["terms"]) == len(result["mse"]) == 20
    total = result["prior"] + sum(result["terms"])
    np.testing.assert_allclose(result["bits_per_dim"], total, rtol=1e-6)
    np.testing.assert_allclose(result["rate"] + result["decoder"], total, rtol=1e-6)
    plot = Image.open(run.folder / "eval" / "rate_distortion_train.png")
    assert plot.size == (1440, 480)

    # The last batch of 8 is filled up: that must not count.
    assert eval_nll.main([*argv, "--batch-size", "16"]) == 0
    other = json.loads((run.folder / "eval" / "nll_train.json").read_text())
    np.testing.assert_allclose(other["terms"], result["terms"], rtol=1e-5)
    np.testing.assert_allclose(other["standard_error"], result["standard_error"], 1e-5)


def test_bits_of_the_probability_flow_are_reported(run, capsys, monkeypatch):
    monkeypatch.setattr(chains, "given_labels", small_run.told)
    argv = [str(run.folder), "--ode", "--max-images", "5", "--batch-size", "4"]
    flags = ["--probes", "2", "--tolerance", "1e-3", "--trace", "gaussian"]
    assert eval_nll.main([*argv, *flags]) == 0
    shown = capsys.readouterr().out
    result = json.loads((run.folder / "eval" / "nll_ode_train.json").read_text())
    assert f"{result['bits_per_dim']:.4f} +- {result['standard_error']:.4f}" in shown
    assert f"{result['evaluations_per_image']:.1f} evaluations" in shown
    assert "tolerance 0.001" in shown
    assert "2 gaussian probes" in shown
    for name, expected in {
        "images": 5,
        "subset": True,
        "trace": "gaussian",
        "probes": 2,
        "tolerance": 1e-3,
        "clip": False,
        "weights": "averaged",
        "training_step": 12,
    }.items():
        assert result[name] == expected, name
    assert 5 < result["bits_per_dim"] < 12
    assert result["evaluations_per_image"] > 13


@pytest.mark.parametrize(
    ("figure", "size"), [("progressive", (5, 8)), ("shared", (9, 4))]
)
def test_figures_of_the_paper(run, figure, size, tmp_path):
    out = tmp_path / "figure.png"
    argv = [str(run.folder), "--figure", figure, "--out", str(out)]
    assert sample.main(argv) == 0
    columns, rows = size
    picture = Image.open(out)  # with words at the left of some
    assert picture.height == 18 + rows * 68 + 4
    assert (picture.width == columns * 68 + 4) == (figure == "progressive")


def test_quality_of_x0_along_the_chain(run):
    argv = [str(run.folder), "--figure", "quality", "--count", "70"]
    assert sample.main(argv) == 0
    result = json.loads((run.folder / "draw" / "quality.json").read_text())
    assert [row["t"] for row in result["rows"]] == [20, 15, 10, 5, 0]
    assert all(row["fd_digits_classifier"] > 0 for row in result["rows"])
    with pytest.raises(ConfigError, match="count must be above 64"):
        sample.main([*argv[:-1], "64"])


def test_classifier_reads_digits_and_its_file_is_checked(run, tmp_path):
    config = runs.read_config(run)
    judge = judges.load(judges.path_of(config))
    assert judge.accuracy > 0.95
    path = tmp_path / judge.path.name
    path.write_bytes(judge.path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"; got .*it is trained again"):
        judges.load(path)
    unlabelled = digits_images()._replace(labels=None)
    with pytest.raises(ConfigError, match="labelled images"):
        judges.train(config, unlabelled)


def test_samples_that_do_not_fit_are_refused(run, tmp_path):
    """And never resized."""
    for name, sizes in {"mixed": [8] * 70 + [16], "empty": []}.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", (size, size)).save(tmp_path / name / f"{i}.png")
    given = {
        "folder:mixed": "must be 8x8.*got 16x16 in",
        "folder:empty": f"{tmp_path}/empty",
    }
    for i, shape in enumerate([(80, 16, 16, 1), (80, 8, 8, 3), (80, 8, 4, 1)]):
        np.savez(tmp_path / f"{i}.npz", images=np.zeros(shape, np.uint8))
        given[f"npz:{i}.npz"] = "must"
    for samples, message in given.items():
        samples = samples.replace(":", f":{tmp_path}/")
        with pytest.raises((ConfigError, errors.DataError), match=message):
            eval_fid.main([str(run.folder), "--samples", samples])


def test_inception_is_used_where_its_weights_are(run, tmp_path, monkeypatch):
    """Here a small one takes the place of the network, which has tests of its own."""
    net = inception.Inception()
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 8, 8, 1)))
    variables = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), shapes)

    def apply(self, variables, images):
        assert (self.preprocessing, images.dtype) == ("tensorflow", np.uint8)
        first = jax.tree.leaves(variables)[0].mean()
        told = first * images.astype(np.float32).mean(axis=(1, 2, 3))[:, None]
        return told * np.ones((1, 2048)), told * np.arange(1008)[None]

    monkeypatch.setattr(inception.Inception, "apply", apply)
    path = tmp_path / "weights.safetensors"
    sha256 = inception_weights.save(variables, path)
    config, dataset = runs.read_config(run), digits_images()
    choose = eval_fid.extractors.choose
    assert choose("auto", config, dataset).name == "digits_classifier"
    made = choose("auto", config, dataset, weights=str(path))
    assert (made.name, made.dimension) == ("inception", 2048)
    assert made.details["sha256"] == sha256
    assert (made.distance(50_000), made.distance(10_000)) == ("FID", "FID@10000")
    features, logits = eval_fid.extractors.extract(
        made, dataset.images[:3], batch_size=2, label="three"
    )
    seen = net.apply(variables, dataset.images[:3])
    np.testing.assert_allclose(features, seen[0], rtol=1e-5)
    np.testing.assert_allclose(logits, seen[1], rtol=1e-5)
    few = eval_fid.left_out(made, 2048, eval_fid.Options(), 1797)
    assert few == {"FID@2048": "takes 2,049 or more, as inception has 2,048 features"}
    assert "Inception score" in eval_fid.left_out(made, 9, eval_fid.Options(), 1797)
    assert not eval_fid.left_out(made, 2049, eval_fid.Options(), 1797)


def test_a_run_measures_itself_as_eval_fid_does(run, monkeypatch):
    real = measuring.measure

    def measure(*given):
        return real(*given) * (1e-3 if given[-1] == 6 else 1)

    monkeypatch.setattr(measuring, "measure", measure)
    flags = "--train.checkpoint-every 6 --train.keep 1 --train.measure-every 6"
    flags += " --train.measure-count 70"
    own = small_run.train_small(run.folder.parent, "measured", *flags.split())
    found = results.in_training(own)
    assert sorted(found) == [6, 12]
    numbers = evaluate(own, "--count", "70")["numbers"]
    (number,) = (v["mean"] for k, v in numbers.items() if k.startswith("fd_"))
    assert found[12] == pytest.approx(number, rel=1e-2)
    assert checkpoint.steps(own.checkpoints) == [6, 12]  # the best, and the newest
    chosen = runs.read_config(own)
    assert measuring.scores(chosen, own, [3, 6]) == {3: None, 6: found[6]}
    chosen = replace(chosen, "train", measure_every=None)
    logged = runs.read_lines(own.metrics)[0]["loss"]
    assert measuring.scores(chosen, own, [6]) == {6: pytest.approx(logged)}
    assert measuring.scores(chosen, run, [12]) == {}
