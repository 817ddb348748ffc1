"""The page of the playground as a person uses it, in a real Chromium.

Skipped where there is none: apt install chromium, pip install .[browser].
"""

import base64
import io
import re
import shutil
import threading
from pathlib import Path

import codec_toys
import jax
import numpy as np
import pytest
import uvicorn
from PIL import Image

from diffusion_jax import samplers
from diffusion_jax.codec import profile as profiles
from diffusion_jax.lab.coding import coder
from diffusion_jax.lab.playground import server, subject
from diffusion_jax.lab.schema.checks import with_sampling
from diffusion_jax.lab.schema.choices import Weights
from diffusion_jax.lab.schema.sampling import Sampling
from diffusion_jax.lab.wiring import chains
from experiments import playground, sample

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update"""


class Served:
    """The server of a network, which can be ended and started again."""

    def __init__(self, opened, made):
        self.opened, self.made, self.port = opened, made, 0
        self.start()

    def start(self):
        listening = playground.bound("127.0.0.1", self.port)
        self.port = listening.getsockname()[1]
        app = server.application(self.opened, "secret", self.port, remote=False)
        app.app.state.table.coders.append(self.made)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        self.server, self.listening = uvicorn.Server(config), listening
        run = self.server.run
        self.thread = threading.Thread(target=run, kwargs={"sockets": [listening]})
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.listening.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def served(trained):
    opened = subject.opened(str(trained.folder), None, Weights())
    profile, denoise = codec_toys.five((5, 20, 60, 120, 200), (8, 8, 1))
    profiles.save(profile, coder.path_of(opened.run.folder))
    made = Served(opened, coder.Coder(opened, profile, denoise))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def seen():
    """What the browser asked of others, and what it complained of."""
    return []


@pytest.fixture(scope="module")
def page(served, seen):
    with api.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": FLAGS.split()}
        browser = driver.chromium.launch(**options)
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.set_default_timeout(120_000)
        api.expect.set_options(timeout=120_000)

        def checked(route):
            if not route.request.url.startswith((served.url, "data:", "blob:")):
                seen.append(route.request.url)
                return route.abort()
            return route.continue_()

        opened.route("**/*", checked)
        opened.on("pageerror", lambda error: seen.append(str(error)))
        opened.on("console", lambda said: seen.append(said.text))
        opened.goto(f"{served.url}?token=secret")
        yield opened
        browser.close()


@pytest.fixture(autouse=True)
def nothing_wrong(seen):
    yield
    found = list(seen)
    seen.clear()
    assert not found


def idle(page):
    api.expect(page.locator("#status")).to_have_text("idle")
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


def go(page, **fields):
    for name, value in fields.items():
        field = page.locator(f"#{name}")
        tag = field.evaluate("e => e.tagName")
        field.select_option(value) if tag == "SELECT" else field.fill(value)
    page.click("#go")
    idle(page)


def pixels(canvas):
    """The pixels of a canvas, uint8 [H, W, 4]."""
    text = canvas.evaluate("c => c.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def give(page, name, data, file="a.png"):
    chosen = page.get_by_label(f"{name}: a file").locator("visible=true")
    chosen.set_input_files({"name": file, "mimeType": "image/png", "buffer": data})


def panel(page, name):
    page.click(f"#tab-{name}")
    return page.locator(f"#panel-{name}")


def test_a_seed_gives_one_picture_and_each_step_can_be_seen(page):
    idle(page)  # the page draws as it opens
    place = panel(page, "denoise")
    go(page, count="4", steps="10", seed="3")
    x0, xt = place.locator("canvas").all()
    first = pixels(x0)
    assert first[..., :3].std() > 10
    assert (first == pixels(xt)).all()  # at the end both are the same
    go(page)
    assert (pixels(x0) == first).all()
    slider = place.get_by_label("Step of the drawing")
    slider.press("Home")
    api.expect(place).to_contain_text("step 0 of 10")
    assert (pixels(x0) != pixels(xt)).any()
    assert (pixels(x0) != first).any()
    slider.press("ArrowRight")
    api.expect(place).to_contain_text("step 1 of 10")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    api.expect(place).to_contain_text("step 5 of 10")
    place.get_by_text("noisy x_t", exact=True).first.click()
    assert place.locator("canvas").count() == 1
    slider.press("End")
    last = pixels(place.locator("canvas"))
    place.get_by_text("predicted x0", exact=True).first.click()
    assert (pixels(place.locator("canvas")) == last).all()
    place.get_by_role("button", name="Play").click()
    api.expect(place).to_contain_text(re.compile("step [1-8] of 10"))
    api.expect(place.get_by_role("button", name="Play")).to_be_visible()
    api.expect(place).to_contain_text("step 10 of 10")


def test_the_command_at_the_bottom_draws_the_same(page, tmp_path):
    place = panel(page, "denoise")
    go(page, count="1", steps="4", seed="8")
    argv = page.inner_text("#command").split()
    assert argv[:3] == ["python", "-m", "experiments.sample"]
    out = tmp_path / "drawn.png"
    argv = [str(out) if word == "drawn.png" else word for word in argv[3:]]
    assert sample.main(argv) == 0
    drawn = np.asarray(Image.open(out))[4:68:8, 4:68:8].astype(int)
    shown = pixels(place.locator("canvas").first)[..., 0]
    cell = shown.shape[0] // 8
    assert np.abs(shown[cell // 2 :: cell, cell // 2 :: cell] - drawn).max() <= 1


def test_what_is_stopped_goes_on(page, monkeypatch):
    on = threading.Event()

    def held(walked, kept=server.answers.walk.frames):
        for frame in kept(walked):
            yield frame
            assert frame.step < 3 or on.wait(60)

    place = panel(page, "denoise")
    go(page, count="4", steps="20", seed="3")
    whole = pixels(place.locator("canvas").first)
    monkeypatch.setattr(server.answers.walk, "frames", held)
    page.click("#go")
    api.expect(place).to_contain_text("step 3 of 20")
    page.click("#stop")
    page.wait_for_timeout(300)
    on.set()
    api.expect(page.locator("#status")).to_have_text("stopped")
    api.expect(page.locator("#on")).to_be_visible()
    assert "step 20 of 20" not in place.inner_text()
    page.click("#on")
    idle(page)
    api.expect(place).to_contain_text("step 20 of 20")
    assert (pixels(place.locator("canvas").first) == whole).all()
    # A new drawing ends the one before it.
    on.clear()
    page.click("#go")
    api.expect(place).to_contain_text("step 3 of 20")
    page.click("#go")
    page.wait_for_timeout(300)
    on.set()
    api.expect(place).to_contain_text("step 20 of 20")
    idle(page)
    assert (pixels(place.locator("canvas").first) == whole).all()


def test_samplers_are_compared_from_the_same_noise(page):
    place = panel(page, "compare")
    for k, steps in enumerate(("4", "5", "6")):
        page.get_by_label(f"steps of sampler {k + 1}").fill(steps)
    go(page, count="4")
    shown = place.locator("figcaption").all_inner_texts()
    words = [" ".join(text.split()).partition(" evaluations")[0] for text in shown]
    assert words == ["ddpm, 4 steps 4", "ddim, 5 steps 5", "unipc, 6 steps 6"]
    place.get_by_text("noisy x_t", exact=True).click()
    for key, same in (("Home", True), ("End", False)):
        place.get_by_label("Step of the drawing").press(key)
        first, *others = [pixels(canvas) for canvas in place.locator("canvas").all()]
        assert [(other == first).all() for other in others] == [same] * 2


def test_what_is_painted_is_drawn_and_the_rest_stays(page, seen):
    place = panel(page, "paint")
    give(page, "Picture", b"text", "a.png")
    api.expect(page.locator("#alert span")).to_contain_text("must be a PNG, JPEG or W")
    assert all("400 (Bad Request)" in each for each in seen)
    seen.clear()
    give(page, "Picture", png(200), "light.png")
    api.expect(place).to_contain_text("light.png")
    api.expect(page.locator("#alert")).to_be_hidden()
    box = page.locator("#mask").bounding_box()
    cell = box["width"] / 8
    page.mouse.move(box["x"] + 1.5 * cell, box["y"] + 2.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 4.5 * cell, box["y"] + 2.5 * cell, steps=4)
    page.mouse.up()
    page.locator("#mask").focus()
    for key in ["ArrowDown"] * 6 + [" "]:
        page.keyboard.press(key)
    go(page, steps="4")
    shown = pixels(place.locator(".stages canvas").first)[..., 0]
    side = (shown.shape[0] - 4) // 16  # of a pixel: two images and a gap
    drawn = shown[side // 2 :: side, side // 2 :: side][:8, :8]
    painted = np.zeros((8, 8), bool)
    painted[2, 1:5] = painted[6, 0] = True
    assert (drawn[~painted] == 200).all()
    assert (drawn[painted] != 200).any()


def test_a_slider_goes_from_one_picture_to_the_other(page):
    panel(page, "denoise")
    go(page, count="4", steps="4", seed="3")
    shown = page.locator("#panel-denoise canvas").first
    box = shown.bounding_box()
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    page.get_by_role("button", name="A", exact=True).click()
    place = page.locator("#panel-between")
    api.expect(place).to_be_visible()
    api.expect(place).to_contain_text("drawn, seed 3")
    give(page, "B", png(255), "b.png")
    api.expect(place).to_contain_text("b.png")
    go(page, steps="4", way="")
    mixture, share = page.get_by_label("the mixture"), page.get_by_label("Share of B")
    share.press("Home")
    first = pixels(mixture)
    share.press("End")
    assert (pixels(mixture) != first).any()
    api.expect(place).to_contain_text("λ = 1.00")
    go(page, way="arc", steps="6")
    assert "slerp A.png B.png" in page.inner_text("#command")


def test_more_bytes_are_nearer_and_all_of_them_exact(page):
    place = panel(page, "compress")
    give(page, "Picture", png(100), "grey.png")
    api.expect(place).to_contain_text("grey.png")
    go(page)
    cut, errors = page.get_by_label("Bytes that are read"), []
    for key in ("Home", "End"):
        cut.press(key)
        errors.append(float(re.search(r"RMSE ([\d.]+)", place.inner_text())[1]))
    assert errors[0] > errors[1] == 0
    api.expect(place).to_contain_text("64 of 64")
    with page.expect_download() as loaded:
        page.get_by_text("Download .ddpx").click()
    assert loaded.value.suggested_filename == "image.ddpx"


def test_a_run_is_followed_while_it_writes(page, served):
    place = panel(page, "run")
    chart = place.get_by_label("Loss by step")
    api.expect(chart).to_be_visible()
    with served.opened.run.metrics.open("a") as file:
        file.write('{"step": 15, "loss": 0.123}\n')
    chart = place.get_by_label("Loss by step, now 0.123")
    api.expect(chart).to_be_visible()
    api.expect(page.get_by_alt_text("samples of step 12")).to_be_visible()


NAMELESS = """() => [...document.querySelectorAll("button, input, select, canvas, a")]
  .filter(e => e.checkVisibility() && !(e.ariaLabel || e.innerText?.trim() ||
    e.labels?.length || e.closest("label")))
  .map(e => e.outerHTML.slice(0, 99))"""
FAINT = """() => {
  const canvas = document.createElement("canvas")
    .getContext("2d", {willReadFrequently: true});
  const rgb = (text, under) => {
    canvas.fillStyle = under || "#fff"; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = c => c.map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(c)) return c;
    }
    return "#fff";
  };
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
    !e.disabled && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => {
      const [a, b] = [rgb(getComputedStyle(e).color), rgb(ground(e))].map(light);
      const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      return [ratio, e.outerHTML.slice(0, 80)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_has_a_name_and_can_be_read_on_any_screen(page, scheme):
    page.emulate_media(color_scheme=scheme)
    for width in (400, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        for name in ("denoise", "compare", "between", "paint", "compress", "run"):
            panel(page, name)
            assert page.evaluate(NAMELESS) == []
            assert page.evaluate(FAINT) == []
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, name
    page.emulate_media(color_scheme="light")


def test_the_keyboard_is_enough(page):
    page.locator("#tab-denoise").focus()
    page.keyboard.press("ArrowRight")
    api.expect(page.locator("#panel-compare")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    reached = [""]
    while reached[-1] != "go" and len(reached) < 20:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"seed", "count", "sampler", "steps", "grid", "go"} <= {*reached}
    page.keyboard.press("Enter")
    idle(page)


def test_a_page_without_a_server_draws_what_jax_draws(page, tmp_path):
    """The noise of a seed, and 20 steps of ddim, by the page that is in docs."""
    shipped = subject.opened(str(subject.SHIPPED), None, Weights())
    config = with_sampling(shipped.config, Sampling(sampler="ddim", steps=20))
    alone, asked = page.context.browser.new_page(), []
    alone.on("request", lambda request: asked.append(request.url))
    alone.on("pageerror", lambda error: asked.append(str(error)))
    alone.goto((ROOT / "docs" / "playground_digits.html").as_uri())
    drawn = alone.evaluate("[...ddim(5, 2, 20)].at(-1).x0.map(image => [...image])")
    noise = alone.evaluate("[...normal(fold(fold([0, 5], 1), 0), 64)]")
    api.expect(alone.locator("#said")).to_contain_text("step 20 of 20, t = 0; drawn in")
    assert pixels(alone.locator("canvas")).std() > 10
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    alone.close()

    @jax.jit
    def run(drawable):
        rule, grid = chains.make_sampler(config, drawable), chains.make_grid(config)
        return samplers.sample(jax.random.key(5), rule, grid, (2, 8, 8, 1))

    expected = np.asarray(run(shipped.drawable)).reshape(2, 64)
    assert np.abs(np.array(drawn) - expected).max() < 1e-4
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), 0)
    assert np.allclose(noise, jax.random.normal(key, [64]), atol=1e-5)


def test_a_server_that_ends_is_missed_and_found_again(page, served, seen):
    panel(page, "denoise")
    served.stop()
    page.click("#go")
    alert = page.locator("#alert")
    api.expect(alert).to_contain_text("The server does not answer")
    served.start()
    api.expect(alert).to_be_hidden()
    assert all("net::ERR_" in each for each in seen)
    seen.clear()
    go(page, count="4", steps="4")
