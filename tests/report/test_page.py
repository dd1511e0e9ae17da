"""Pages in a browser: one control plays, scrubs and steps all videos in sync, and pages fit a phone's screen.

Chromium and its driver are needed: apt-get install chromium chromium-driver
"""

import io
import shutil

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from analyses import compare
from config import Config
from report import results
from report.output import Formats
from training.loading import find_checkpoint

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")

CONTEXT, PREDICTED = 4, 8
FRAMES = CONTEXT + PREDICTED


def write_evaluation(directory, trained, dataset="digits"):
    """Write an evaluation of three planted test videos, and return its page.

    The grey level is 10 t in frame t, 10 t + 20 if reconstructed, and 10 t + 30 or more if predicted.
    """
    config = Config(**TINY | dict(dataset=dataset, num_examples=3, save_gifs=True))
    truth = np.broadcast_to(10 * np.arange(FRAMES, dtype=np.uint8)[:, None, None, None], (FRAMES, 64, 64, 1))
    directory.mkdir()
    for number in range(3):
        prediction = truth[CONTEXT:] + np.uint8(30 + 10 * number)
        keys = [f"{protocol}_{metric}" for protocol in ("paper", "standard") for metric in ("ssim", "psnr")]
        metrics = {key: np.linspace(1, 1 - number / 3, PREDICTED) for key in keys}
        frames = {"context": truth[:CONTEXT] + np.uint8(20), "random_sample_1": prediction}
        results.save_example(config, directory, number, truth, frames, metrics)
    results.summarise(config, find_checkpoint(trained), [], directory, 3, Formats(videos=("gif", "mp4")), False)
    return directory / "index.html"


@pytest.fixture(scope="module")
def pages(trained, tmp_path_factory):
    """Return the pages of an evaluation, and of a comparison of two evaluations."""
    folder = tmp_path_factory.mktemp("pages")
    paths = [write_evaluation(folder / name, trained) for name in ("a", "b")]
    compare.compare([*(f"model {path.parent.name}={path.parent}" for path in paths), f"--out={folder / 'both'}"])
    return {"evaluation": paths[0], "comparison": folder / "both" / "index.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('browser')}"),
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def look(browser, page, width=1280, scheme="light", motion="no-preference"):
    """Open a page from the file system in a window of a given width; wait for its pictures, and return its control."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    features = [dict(name=name, value=value) for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))
    browser.get_log("browser")
    browser.get(page.as_uri())
    WebDriverWait(browser, 20).until(lambda _: None not in shown(browser))
    return Control(browser)


def shown(browser):
    """Return the number of the frame that each video shows, all at the same time."""
    return browser.execute_script(
        "return [...document.querySelectorAll('canvas')].map((canvas) => Number(canvas.dataset.frame) || null)"
    )


def grey_levels(browser):
    """Return the grey level in the middle of each video on the screen."""
    levels = []
    for canvas in browser.find_elements(By.TAG_NAME, "canvas"):
        picture = Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("L")
        levels.append(picture.getpixel((picture.width // 2, picture.height // 2)))
    return np.array(levels)


class Control:
    """A page's control."""

    def __init__(self, browser):
        self.play, self.back, self.on, self.first = browser.find_elements(By.CSS_SELECTOR, ".player button")
        self.slider = browser.find_element(By.CSS_SELECTOR, ".player input")
        self.speed = Select(browser.find_element(By.CSS_SELECTOR, ".player select"))
        self.output = browser.find_element(By.CSS_SELECTOR, ".player output")
        self.browser = browser

    def pause(self):
        if self.play.text == "Pause":
            self.play.click()

    def scrub(self, frame):
        """Move the slider as dragging does."""
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", self.slider, frame
        )


def assert_in_sync(browser, frame, videos):
    """Check that all videos report and show this frame: truth, prediction and error of each example."""
    assert shown(browser) == [frame] * videos
    grey, want = 10 * (frame - 1), []
    for number in range(3):
        error = 30 + 10 * number if frame > CONTEXT else 20
        want += [grey] + [grey + error, error] * (videos // 6)
    np.testing.assert_allclose(grey_levels(browser), want, atol=1)


@pytest.mark.parametrize("kind, videos", [("evaluation", 9), ("comparison", 15)])
def test_videos_scrub_and_step_in_sync(browser, pages, kind, videos):
    control = look(browser, pages[kind])
    control.pause()
    control.scrub(7)
    assert_in_sync(browser, 7, videos)
    assert control.output.text == "Frame 7 of 12: predicted frame 3 of 8"
    assert browser.find_elements(By.CSS_SELECTOR, ".player.predicted")
    control.on.click()
    assert_in_sync(browser, 8, videos)
    for _ in range(5):
        control.back.click()
    assert_in_sync(browser, 3, videos)
    assert control.output.text == "Frame 3 of 12: context, frames 1 to 4"
    assert browser.find_elements(By.CSS_SELECTOR, ".player.context")
    control.first.click()
    assert_in_sync(browser, CONTEXT + 1, videos)
    control.slider.send_keys(Keys.END)
    assert_in_sync(browser, FRAMES, videos)
    control.on.click()
    assert shown(browser) == [1] * videos and control.slider.get_attribute("value") == "1"
    assert browser.get_log("browser") == []


def test_videos_play_in_sync(browser, pages):
    control = look(browser, pages["evaluation"])
    assert control.play.text == "Pause"  # it begins by itself
    seen = set()
    for speed in "¼x", "4x":
        control.speed.select_by_visible_text(speed)
        for _ in range(20):
            (frame,) = set(shown(browser))
            seen.add(frame)
    WebDriverWait(browser, 20).until(lambda _: seen.add(shown(browser)[0]) or len(seen) > FRAMES / 2)
    control.play.click()
    assert control.play.text == "Play"
    (frame,) = set(shown(browser))
    assert_in_sync(browser, frame, 9)  # which takes a while, and nothing moves
    control.play.click()
    WebDriverWait(browser, 20).until(lambda _: set(shown(browser)) != {frame})
    assert browser.get_log("browser") == []


def test_speeds_multiply_the_frame_rate(browser, pages):
    """The frame follows from the browser's time: 20 frames a second, times the speed."""
    control = look(browser, pages["evaluation"], motion="reduce")
    for speed in "½x", "2x":
        control.speed.select_by_visible_text(speed)
        control.scrub(1)
        frames = browser.execute_script(
            "playing = true; last = due = 0; for (let i = 0; i <= 26; i++) tick(1000 + i * 10); playing = false; return now"
        )
        assert frames == {"½x": 2, "2x": 10}[speed]


def test_videos_wait_for_users_who_prefer_no_motion(browser, pages):
    control = look(browser, pages["evaluation"], motion="reduce")
    assert control.play.text == "Play" and set(shown(browser)) == {1}
    control.play.click()
    WebDriverWait(browser, 20).until(lambda _: set(shown(browser)) != {1})


@pytest.mark.parametrize("kind", ["evaluation", "comparison"])
@pytest.mark.parametrize("width", [1280, 420])
def test_pages_fit_the_window_in_both_themes(browser, pages, kind, width):
    """The page itself never scrolls sideways. In a narrow window, some tables scroll in boxes with a border."""
    colours = []
    for scheme in "light", "dark":
        look(browser, pages[kind], width, scheme).pause()
        browser.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true })")
        assert (
            browser.execute_script("const page = document.documentElement; return page.scrollWidth - page.clientWidth")
            == 0
        )
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('.scroll')].map((box) => [box.scrollWidth > box.clientWidth, "
            "getComputedStyle(box).borderRightWidth, box.getBoundingClientRect().right])"
        )
        assert all(border == "1px" and right <= width for _, border, right in boxes)
        assert any(scrolls for scrolls, *_ in boxes) == (width == 420)
        script = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        colours.append(browser.execute_script(script))
        assert browser.get_log("browser") == []
    (light_text, light_page), (dark_text, dark_page) = colours
    assert (light_page, dark_page) == ("rgb(255, 255, 255)", "rgb(22, 24, 27)") and light_text != dark_text


@pytest.mark.parametrize("kind", ["evaluation", "comparison"])
def test_links_and_pictures_exist(browser, pages, kind):
    look(browser, pages[kind])
    script = "return [...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))"
    linked = set(browser.execute_script(script))
    folder = pages[kind].parent
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".npz", ".csv", ".json")}
    assert files <= linked and all((folder / path).is_file() for path in linked)
    assert browser.execute_script("return [...document.images].every((image) => image.naturalWidth > 0)")
