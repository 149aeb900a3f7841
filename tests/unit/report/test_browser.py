"""A page in a real browser, from a file: it is drawn, and nothing in it fails."""

import re
import shutil
import subprocess
import zlib

import pytest

from ray_kd import report
from tests.report_run import Page, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")


def browse(folder, page, *arguments):
    """What a headless browser prints of a page."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000",
               "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *arguments,
               page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module", params=["run", "comparison"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "one", steps=200, starts=(0.0, 5_000.0)), write_run(folder / "two")]
    path = folder / "page.html"
    path.write_text(report.render([(run, ()) for run in runs[: 1 if request.param == "run" else 2]]))
    return path


def test_the_script_runs_and_shows_values(page, tmp_path):
    """A copy of the page with a probe at its end: the values under the middle of its first chart."""
    probe = """<script>
    const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
    const there = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
    svg.dispatchEvent(new PointerEvent("pointermove", there));
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    document.title = "too wide by " + wide;
    </script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", probe + "</body>"))
    done = browse(tmp_path, copy, "--dump-dom")
    assert re.findall(r"CONSOLE.*|Uncaught.*|net::ERR.*", done.stderr) == []
    values = re.search(r'<output class="values">([^<]+)</output>', done.stdout)
    assert values is not None
    assert re.match(r"(loss|one) [\d.]+ \(step \d+\); ", values[1])
    assert "<title>too wide by 0</title>" in done.stdout
    assert len(Page(done.stdout).all("polyline")) == len(Page(page.read_text()).all("polyline"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn(page, tmp_path, scheme):
    picture = tmp_path / "page.png"
    number = {"light": 1, "dark": 0}[scheme]
    browse(tmp_path, page, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={number}")
    content = picture.read_bytes()
    assert corner(content) > 0.7 if scheme == "light" else corner(content) < 0.3


def corner(png: bytes) -> float:
    """How bright the first pixel is, the page's margin: 0 black, 1 white. No filter of PNG changes that one."""
    data, at = b"", 8
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    return sum(zlib.decompress(data)[1:4]) / 3 / 255
