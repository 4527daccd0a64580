"""Pages in a real browser, on a desk and on a phone: silent, without requests, and no wider than the window.

The checks that need no browser are in tests/pages.py.
"""

import json
import re
import shutil
import subprocess
from html import escape

import pytest
from made_up import RESULT, record

from ptq.baselines.page import page as table_page
from ptq.baselines.presets import PRESETS
from ptq.baselines.sections import build_sections
from ptq.report.page import Generations
from ptq.report.page import page as report_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--hide-scrollbars",
)  # fmt: skip
BROWSERS_OWN = "not an origin"  # who asks for what the browser fetches for itself at a start
SCHEMES = {"dark": 0, "light": 1}
# A frame may be as narrow as a phone; a window of Chromium may not.
FRAME = """<title></title><iframe style="border: 0; height: 900px; width: {width}px" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  document.title = event.target.contentDocument.documentElement.scrollWidth
}}</script>"""


def seen(page, tmp_path, *, width=1280, scheme="light"):
    """(lines of the console, requests, width that it needs) of a page."""
    (tmp_path / "page.html").write_text(FRAME.format(width=width, page=escape(page)), encoding="utf-8")
    log = tmp_path / "requests.json"
    where = [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--window-size=1400,900"]
    look = [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=1000", "--dump-dom"]
    command = [CHROMIUM, *FLAGS, *where, *look, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    foreign = {a["url"] for a in asked if a.get("initiator", BROWSERS_OWN) != BROWSERS_OWN and a["url"][:4] == "http"}
    return re.findall("CONSOLE.*", done.stderr), sorted(foreign), int(re.search("<title>(.*?)</title>", done.stdout)[1])


def pages():
    preset, texts = PRESETS["greenbit"], Generations("import", "os\n" * 30, "a long line without an end " * 20)
    tables = build_sections(preset.grids, preset.settings, preset.sources, lambda cell: RESULT, stand_in=True)
    return {"report": report_page(record(40), texts), "table": table_page("Baselines", ["head"], tables)}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", ["report", "table"])
def test_a_page_is_silent_and_fits(name, width, scheme, tmp_path):
    console, requests, needed = seen(pages()[name], tmp_path, width=width, scheme=scheme)
    assert (console, requests) == ([], []) and needed == width


def test_noise_is_seen(tmp_path):
    page = '<title>x</title><script>console.error("oh")</script><img src="http://127.0.0.1:9/x.png">'
    console, requests, needed = seen(page + '<p style="width: 3000px">x</p>', tmp_path)
    assert '"oh"' in console[0] and requests == ["http://127.0.0.1:9/x.png"] and needed >= 3000
