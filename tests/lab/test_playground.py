"""The playground: bits of `samplers.sample`, every route, its bounds and its guard."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import threading
from pathlib import Path

import codec_toys
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from diffusion_jax import editing, samplers
from diffusion_jax.codec import profile as profiles
from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import pictures
from diffusion_jax.lab.coding import coder
from diffusion_jax.lab.drawing import edits
from diffusion_jax.lab.playground import (
    alone,
    asked,
    desk,
    guard,
    server,
    subject,
    walk,
)
from diffusion_jax.lab.process import joining
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.config import replace
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.wiring import chains
from experiments import playground

ROOT = Path(__file__).resolve().parents[2]
HOST = "http://127.0.0.1:8765"
JSON = "application/json"
COOKIE = {"cookie": "playground_8765=secret"}
QUICK = {"sampler": "ddim", "steps": 4}


@pytest.fixture(scope="module")
def opened(trained):
    return subject.opened(str(trained.folder), None, Weights())


@pytest.fixture(scope="module")
def client(opened):
    app = server.application(opened, "secret", 8765, remote=False)
    with TestClient(app, HOST, headers=COOKIE, raise_server_exceptions=False) as made:
        yield made


def lines(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def draw(client, kind, **told):
    found = lines(client.post(f"/api/{kind}", json=told))
    assert "error" not in found[-1], found[-1]
    return found


def images(line, shape, name="x0"):
    flat = np.frombuffer(base64.b64decode(line[name]), np.uint8)
    return flat.reshape(shape)


def png(pixels, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def put(client, pixels):
    answer = client.put("/api/image", content=png(pixels))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def sampled(opened, key, grid=None, *, wrap=lambda rule, levels: rule, **how):
    """What `samplers.sample` draws of 3, uint8."""
    config = with_sampling(opened.config, Sampling(**how))
    grid = chains.make_grid(config) if grid is None else grid

    @jax.jit
    def run(drawable):
        levels = chains.sampling_schedule(config, drawable.params)
        rule = wrap(chains.make_sampler(config, drawable), levels)
        return samplers.sample(key, rule, grid, (3, *config.data.shape))

    return pictures.to_uint8(np.asarray(run(opened.drawable)))


def test_the_last_frame_is_what_sample_draws_to_the_bit(client, opened):
    walk._program.cache_clear()
    noise = []
    for sampler in ("ddpm", "unipc"):
        told = {"seed": 5, "count": 3, "how": {"sampler": sampler, "steps": 4}}
        begin, shape, *frames, end = draw(client, "denoise", **told)
        assert set(begin) == {"job"}
        assert shape == {"shape": [3, 8, 8, 1], "steps": 4}
        assert [frame["step"] for frame in frames] == [0, 1, 2, 3, 4]
        assert frames[-1]["t"] == 0
        assert frames[-1]["x0"] == frames[-1]["xt"]
        expected = sampled(opened, jax.random.key(5), sampler=sampler, steps=4)
        assert (images(frames[-1], shape["shape"]) == expected).all()
        assert expected.std() > 10
        config = with_sampling(opened.config, Sampling(sampler=sampler))
        program = walk._program(walk._key_of(config), 0)
        assert program._cache_size() == 1  # for all steps
        assert (end["done"], end["evaluations"]) == (True, None)
        assert end["ms"] > 0
        levels = [frame["logsnr"] for frame in frames[1:4]]
        assert levels == sorted(levels)
        run = f"python -m experiments.sample {opened.run.folder} --seed 5"
        assert end["command"].startswith(run)
        noise.append(frames[0]["xt"])
    told |= {"seed": 6, "counted": True}
    _, _, other, *_, end = draw(client, "denoise", **told)
    assert noise[0] == noise[1] != other["xt"]  # that of the seed, whatever the rule
    assert end["evaluations"] == 4
    assert not client.app.app.state.table.drawings.values  # what is done is not kept


def test_what_is_painted_leaves_the_rest_to_the_bit(client, opened):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8), np.uint8)
    told = {"image": put(client, pixels), "mask": [0, 1, 8, 9], "count": 3}
    *_, last, end = draw(client, "inpaint", seed=5, how=QUICK, **told)
    found = images(last, (3, 8, 8))
    white = np.zeros((8, 8), bool)
    white[:2, :2] = True
    assert (found[:, ~white] == pixels[~white]).all()
    assert (found[0, white] != found[1, white]).any()
    image = edits.to_float(pixels[None, ..., None])
    mask = ~white[None, ..., None]

    def wrap(rule, levels):
        return editing.inpaint(rule, levels, jax.numpy.asarray(image), mask)

    expected = sampled(opened, jax.random.key(5), wrap=wrap, **QUICK)
    assert (found[..., None] == expected).all()
    assert "inpaint IMAGE.png MASK.png --count 3 --seed 5" in end["command"]


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_mixtures_are_those_of_the_edit_command(client, opened, sampler):
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 256, (2, 8, 8), np.uint8)
    config = with_sampling(opened.config, Sampling(sampler=sampler, steps=4))
    ends = [edits.to_float(x[None, ..., None]) for x in (first, second)]
    grid, key = chains.make_grid(config), jax.random.key(7)
    static = (-1,) if sampler == "unipc" else ()

    def mix(rule, key, a, b, t):
        return editing.interpolate(
            key, *rule, grid, a, b, t, np.linspace(0, 1, 3, dtype=np.float32)
        )[0]

    mixed = edits.compiled(config, mix, static=static)
    expected = mixed(opened.drawable, key, *ends, 10)
    ids = [put(client, first), put(client, second)]
    told = {"seed": 7, "depth": 10, "how": {"sampler": sampler, "steps": 4}}
    last = draw(client, "interpolate", images=ids, count=3, **told)[-2]
    apart = images(last, expected.shape).astype(int) - expected
    assert np.abs(apart).max() <= 1  # of another program


def test_the_arc_goes_up_and_down_again(client):
    rng = np.random.default_rng(2)
    ids = [put(client, x) for x in rng.integers(0, 256, (2, 8, 8), np.uint8)]
    told = {"images": ids, "arc": True, "count": 3, "how": {"steps": 8}}
    found = draw(client, "interpolate", **told)
    assert [x["shape"][0] for x in found if "shape" in x] == [2, 3]
    steps = [x["step"] for x in found if "step" in x]
    assert steps == [*range(8), *range(9)]
    assert found[-1]["command"].count("slerp A.png B.png --count 3") == 1


def test_what_was_stopped_goes_on_to_the_same_end(client, opened):
    """A job is stopped between two steps, while another waits, and then resumed."""
    told = {"seed": 5, "count": 3, "how": {"sampler": "ddpm", "steps": 20}}
    whole = draw(client, "denoise", **told)
    answers, begun, go = [], threading.Event(), threading.Event()

    def asks():
        answers.append(client.post("/api/denoise", json=told))

    def slow(walked, kept=server.answers.walk.frames):
        for frame in kept(walked):
            yield frame
            begun.set()
            assert go.wait(60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.answers.walk, "frames", slow)
        ask = threading.Thread(target=asks)
        ask.start()
        assert begun.wait(120)
        (job,) = client.get("/api/run").json()["jobs"]
        refused = client.post("/api/resume", json={"job": job})
        assert refused.status_code == 400
        assert "running" in refused.json()["error"]
        assert client.delete(f"/api/jobs/{job}").json() == {"stopped": True}
        go.set()
        ask.join()
    first = lines(answers[0])
    assert first[-1] == {"stopped": True, "job": job}
    some = [x["step"] for x in first if "step" in x]
    assert 0 < len(some) < 20
    rest = draw(client, "resume", job=job)
    assert [x["step"] for x in rest if "step" in x] == [*range(len(some), 21)]
    assert rest[-2] == whole[-2]
    gone = client.post("/api/resume", json={"job": job})
    assert gone.status_code == 400


def test_a_fifth_that_waits_is_refused_and_the_others_are_served(client, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def held(walked, kept=server.answers.walk.frames):
        begun.set()
        assert go.wait(60)
        return kept(walked)

    monkeypatch.setattr(server.answers.walk, "frames", held)
    told, codes = {"count": 3, "how": QUICK}, []

    def ask():
        codes.append(client.post("/api/denoise", json=told).status_code)

    askers = [threading.Thread(target=ask) for _ in range(1 + desk.WAITING)]
    askers[0].start()
    assert begun.wait(120)
    # Plans are made in the thread that computes, which is held: put the others in line.
    line = client.app.app.state.table.desk.order
    line += [f"waits{k}" for k in range(desk.WAITING)]
    assert client.post("/api/denoise", json=told).status_code == 429
    del line[1:]
    go.set()
    for other in askers[1:]:
        other.start()
    for asker in askers:
        asker.join()
    assert codes == [200] * (1 + desk.WAITING)
    assert not line


HOW = [{"sampler": "ode"}, {"sampler": "euler"}, {"steps": 21}, {"steps": 10**9}]
HOW += [{"moves": 5}, {"label": 3}, {"eta": 0.5, "sampler": "ddpm"}]
WRONG = {
    "denoise": [
        *({"count": count} for count in (65, 0, 1.5)),
        *({"seed": seed} for seed in (-1, 2**32)),
        *({"how": how} for how in HOW),
        {"more": 1},
        [],
    ],
    "interpolate": [{"images": ["a"]}, {"images": ["a", "b"]}, {"images": ["a"] * 3}],
    "inpaint": [{"mask": []}, {"mask": [64]}, {"mask": [-1]}, {"mask": [0.5]}],
    "compress": [{"image": "none"}, {"image": "x" * 65}],
    "resume": [{"job": "../../etc/passwd"}],
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_out_of_bounds_is_refused_in_three_parts(client, kind):
    for told in WRONG[kind]:
        answer = client.post(f"/api/{kind}", json=told)
        assert answer.status_code == 400, told
        said = answer.json()["error"]
        assert re.search(" must .*; got ", said), said
        assert "file" not in said, said


def test_images_are_those_of_three_formats_and_of_some_size(client):
    plain = np.arange(64, dtype=np.uint8).reshape(8, 8)
    good = client.put("/api/image", content=png(plain)).json()
    assert (good["height"], good["width"]) == (8, 8)
    assert base64.b64decode(good["shown"]) == plain.tobytes()
    wide = png(np.zeros((30, 50, 3), np.uint8), "WEBP")
    wide = client.put("/api/image", content=wide).json()
    assert (wide["height"], wide["width"]) == (30, 50)
    huge = png(np.zeros((4001, 4000), np.uint8))
    for data in (b"", b"text, renamed", png(plain, "GIF"), png(plain)[:50], huge):
        answer = client.put("/api/image", content=data)
        assert answer.status_code == 400, data[:20]
        assert "must be a PNG, JPEG or WebP" in answer.json()["error"]
    kept = [client.put("/api/image", content=png(plain)).json()["id"] for _ in "a" * 33]
    told = {"mask": [0], "count": 3, "how": QUICK}
    gone = client.post("/api/inpaint", json={**told, "image": kept[0]})
    assert gone.status_code == 400
    assert client.post("/api/inpaint", json={**told, "image": kept[1]}).is_success


def test_bodies_are_bounded_while_they_are_read(client):
    def endless():
        for _ in range(10**4):
            yield b" " * 2**16

    assert client.put("/api/image", content=endless()).status_code == 413
    long, headers = b" " * (2**20 + 1), {"content-type": JSON}
    answer = client.post("/api/denoise", content=long, headers=headers)
    assert answer.status_code == 413


def test_json_is_called_json_and_addresses_are_known(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind}
        answer = client.post("/api/denoise", content=b"{}", headers=headers)
        assert answer.status_code == 415
    paths = ("nothing", "samples/12/../../x", "file/none", "samples/999")
    for path in ("/page.html", "/../x", *(f"/api/{path}" for path in paths)):
        assert client.get(path).status_code == 404, path
    assert client.get("/api/denoise").status_code == 405
    assert client.delete("/api/jobs/none").status_code == 404
    assert client.get("/api/samples/" + "9" * 5000).status_code in (400, 404)
    assert client.get("/api/metrics?since=x").status_code == 400


def test_who_comes_by_another_name_or_without_the_token_is_refused(client):
    for path in ("/", "/api/run"):
        bare = TestClient(client.app, HOST)
        assert bare.get(path).status_code == 403
        assert bare.get(f"{path}?token=guess").status_code == 403
        wrong = {"cookie": "playground_8765=guess"}
        assert bare.get(path, headers=wrong).status_code == 403
        for host in ("evil.example", "127.0.0.1.evil.example:8765", "10.0.0.1", ""):
            assert client.get(path, headers={"host": host}).status_code == 403, host
        for host in ("localhost:1", "[::1]:8765", "127.0.0.1"):
            assert client.get(path, headers={"host": host}).status_code == 200, host
    origin = {"origin": "http://evil.example"}
    assert client.post("/api/denoise", json={}, headers=origin).status_code == 403
    assert client.get("/api/run", headers={"origin": HOST}).status_code == 200


def test_the_token_becomes_a_cookie_that_no_other_site_sends(client):
    bare = TestClient(client.app, HOST, follow_redirects=False)
    answer = bare.get("/?token=secret")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    assert {"HttpOnly", "SameSite=strict"} <= {
        *answer.headers["set-cookie"].split("; ")
    }
    assert len(guard.token()) >= 22
    assert guard.token() != guard.token()


def test_the_page_is_small_and_asks_nobody_else(client):
    answer, again = client.get("/"), client.get("/")
    assert len(answer.content) < 60_000
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert answer.text.count(f'nonce="{nonce}"') == 2
    assert "__NONCE__" not in answer.text
    assert nonce not in again.text
    text = answer.text.replace("http://www.w3.org/2000/svg", "")
    for word in ("http://", "https://", "//cdn", "@import", "innerHTML", "eval("):
        assert word not in text, word
    for one in (answer, client.get("/api/run"), client.get("/nothing")):
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in one.headers


def test_a_run_is_followed_while_it_writes(client, opened, trained):
    found = client.get("/api/metrics?since=-1").json()
    assert [x["step"] for x in found["metrics"]] == [5, 10]
    assert found["samples"] == [12]
    with trained.metrics.open("a") as file:
        file.write('{"step": 15, "loss": 0.5}\n{"step": 20, "lo')
    later = client.get("/api/metrics?since=10").json()
    assert later["metrics"] == [{"step": 15, "loss": 0.5}]
    picture = client.get("/api/samples/12")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == (trained.samples / "step_00000012.png").read_bytes()
    results = trained.folder / "eval" / "results.jsonl"
    results.parent.mkdir(exist_ok=True)
    mine = {"name": "fid", "numbers": {"fd": {"mean": 2.0}}, "list": [1], "count": 3}
    for digest in (opened.drawable.sha256, "other"):
        with results.open("a") as file:
            file.write(json.dumps({**mine, "weights_sha256": digest}) + "\n")
    (told,) = client.get("/api/metrics").json()["results"]
    assert told["values"] == {"fd": 2.0, "count": 3}


def test_more_bytes_of_an_image_are_nearer_and_all_of_them_exact(client, opened):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[1:7, 3:5] = 236  # 255 is the nearest of the five that are known
    image = put(client, pixels)
    found = lines(client.post("/api/compress", json={"image": image}))
    assert "experiments.codec fit" in found[-1]["error"]
    profile, denoise = codec_toys.five((5, 20, 60, 120, 200), (8, 8, 1))
    made = coder.Coder(opened, profile, denoise)
    client.app.app.state.table.coders.append(made)
    found = draw(client, "compress", image=image, nearest=True)
    pixels[pixels > 0] = 255
    (told,) = (x for x in found if "sizes" in x)
    assert (images(told, (8, 8), "original") == pixels).all()
    cuts = [x for x in found if "cut" in x]
    shown = [images(x, (8, 8), "image").astype(int) for x in cuts]
    errors = [np.mean((x - pixels) ** 2) for x in shown]
    assert errors[0] > errors[-1] == 0
    assert (cuts[0]["whole"], cuts[-1]["whole"]) == (False, True)
    assert [x["cut"] for x in cuts] == [*range(len(cuts))]
    assert told["bytes"] == told["header"] + cuts[-1]["cut"]
    assert told["sizes"]["plain pixels"] == 64
    file = next(x["file"] for x in found if "file" in x)
    download = client.get(f"/api/file/{file}")
    assert len(download.content) == told["bytes"]
    assert "attachment" in download.headers["content-disposition"]


def test_the_network_that_is_shipped_is_what_training_left(tmp_path, monkeypatch):
    digest = hashlib.sha256(subject.SHIPPED.read_bytes()).hexdigest()
    assert digest.startswith("d98bcfa158e85e0f"), "made by another training"
    monkeypatch.chdir(tmp_path)
    own = subject.opened(None, None, Weights())
    assert own.shipped
    assert own.told == "averaged weights of step 5,000"
    profile = profiles.load(coder.path_of(own.run.folder))
    assert profile.about["weights"] == own.drawable.sha256
    app = server.application(own, "secret", 8765, remote=False)
    about = TestClient(app, HOST, headers=COOKIE).get("/api/run").json()
    assert about["name"] == "digits"
    assert about["codec"]
    assert not about["logged"]
    # The page in docs is that of this network.
    page = alone.page(own)
    written = (ROOT / "docs" / "playground_digits.html").read_text()
    assert page.partition('id="data">')[0] == written.partition('id="data">')[0]
    assert page.partition("</script>")[2] == written.partition("</script>")[2]
    data = [x.partition('"data": ')[2][:2_000_000] for x in (page, written)]
    assert data[0] == data[1]


def test_a_run_that_draws_no_pixels_is_refused(opened, refuses, monkeypatch):
    other = opened.run, replace(opened.config, "data", latent="autoencoder")
    monkeypatch.setattr(subject.opening, "opened", lambda *_, **__: other)
    with refuses("one of latents"):
        subject.opened("run", None, Weights())


def test_remote_addresses_are_asked_for_and_names_are_not_believed(opened, refuses):
    with refuses("0.0.0.0"):
        playground.main(["--address", "0.0.0.0"])
    # Those of several hosts are read before any command reads its own.
    own = {f"--{field.name}" for field in dataclasses.fields(playground.Options)}
    assert own.isdisjoint(joining.FLAGS)
    app = server.application(opened, "secret", 8765, remote=True)
    client = TestClient(app, HOST, headers=COOKIE)
    assert client.get("/api/run", headers={"host": "10.0.0.1:8765"}).is_success
    assert client.get("/api/run", headers={"host": "evil.example"}).status_code == 403


def test_a_page_without_a_server_has_the_network_inside(opened, tmp_path, refuses):
    """What it draws is compared in test_playground_page."""
    text = alone.page(opened)
    about = json.loads(text.partition('id="data">')[2].partition("</script>")[0])

    def floats(name):
        return np.frombuffer(base64.b64decode(about[name]), "<f4")

    kernel = np.asarray(opened.drawable.params["net"]["conv_in"]["kernel"]).ravel()
    at = about["index"]["conv_in.kernel"]
    assert (floats("data")[at : at + kernel.size] == kernel).all()
    assert floats("data").size == about["weights"]
    # v: x0 = alpha x - sigma v, and the steps of the network are 1..T.
    assert np.allclose(floats("of_x"), floats("alpha")[1:], atol=1e-6)
    assert np.allclose(floats("of_output"), -floats("sigma")[1:], atol=1e-6)
    for word in ("http://", "https://", "fetch(", "__DATA__"):
        assert word not in text
    with refuses("3 classes"):
        alone.page(opened._replace(config=replace(opened.config, "net", classes=3)))
    out = tmp_path / "page.html"
    assert playground.main([str(opened.run.folder), "--page", str(out)]) == 0
    assert out.read_text() == text
    out.write_text("mine")
    with pytest.raises(ConfigError):
        playground.main([str(opened.run.folder), "--page", str(out)])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sampler", "steps", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)
NAMES = sorted(
    {field.name for kind in asked.KINDS for field in dataclasses.fields(kind)}
)
PATHS = ["", "run", "image", "metrics", "file/x", "jobs/x", "samples/1"]
PATHS += [kind.__name__.lower() for kind in asked.KINDS]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS"]),
    st.sampled_from(PATHS),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)
    | st.binary(max_size=99),
)
@example("POST", "denoise", b"\xff")
@example("POST", "denoise", b"[" * 9999)
@example("POST", "denoise", b'{"seed": 1, "seed": 2}')
@example("POST", "denoise", b'{"seed": ' + b"9" * 5000 + b"}")
@example("PUT", "image", b"\x89PNG\r\n\x1a\n")
def test_no_request_breaks_a_route(client, method, path, told):
    # Nothing is drawn here: what would pass every check has an unknown sampler.
    if isinstance(told, dict):
        told = json.dumps({**told, "how": {"sampler": "none"}, "job": "x"}).encode()
    answer = client.request(
        method, f"/api/{path}", content=told, headers={"content-type": JSON}
    )
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "OPTIONS":
        assert answer.json()["error"]
