"""Pages in a real browser: headless Chromium, where one is installed or named by RAREFY_CHROMIUM."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import frontier_samples as samples
from rarefy.evaluation.receipt import Receipt, receipt_from_dict
from rarefy.evaluation.receipt_page import receipt_page
from rarefy.search.bench_report import bench_from_lines, bench_page
from rarefy.search.html_report import frontier_page

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("RAREFY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
    "--disable-background-networking",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
]
DARK = "--blink-settings=preferredColorScheme=0"
RESULTS = Path(__file__).parents[2] / "bench" / "results"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in RAREFY_CHROMIUM")


def browse(file: Path, *flags: str) -> str:
    """Open a file and return what the browser prints; fail for errors that the page's console shows."""
    profile = file.with_name("profile")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=file.parent)
    assert ran.returncode == 0, ran.stderr
    messages = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert not messages, messages
    return ran.stdout


def pages() -> dict[str, str]:
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    receipt = {k: v for k, v in record.items() if k in Receipt.__dataclass_fields__}
    return {
        "realistic": frontier_page(samples.realistic()),
        "hostile": frontier_page(samples.hostile()),
        "no points": frontier_page(samples.small(0)),
        "receipt": receipt_page(receipt_from_dict(receipt)),
        "bench": bench_page(bench_from_lines((RESULTS / "frontier.jsonl").read_text(encoding="utf-8"))),
    }


def with_script(page: str, script: str) -> str:
    """Return a page that also runs a script, which its policy would forbid."""
    page, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert count == 1
    return page.replace("</body>", f"<script>{script}</script></body>")


def test_an_error_of_a_page_is_noticed(tmp_path):
    file = tmp_path / "broken.html"
    for body in ("<script>nothing.here()</script>", '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><img src="x.png">'):  # fmt: skip
        file.write_text(f"<!DOCTYPE html><html><head></head><body>{body}</body></html>", encoding="utf-8")
        with pytest.raises(AssertionError, match="CONSOLE"):
            browse(file, "--dump-dom")


@pytest.mark.parametrize("name", ["realistic", "hostile", "no points", "receipt", "bench"])
def test_a_page_has_no_errors_and_its_script_runs(name, tmp_path):
    page, file = pages()[name], tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    shown = browse(file, "--dump-dom")
    assert shown.count("<circle") == page.count("<circle") and shown.count("<tr") == page.count("<tr")
    heads = sum(
        table.count('<th scope="col"') for table in re.findall(r'<table class="sortable">.*?</thead>', page, re.DOTALL)
    )
    assert heads and len(re.findall(r'<th scope="col"[^>]*><button', shown)) == heads
    assert shown.count(">Copy</button>") == page.count('class="copyable"')


def test_points_are_in_the_document_and_on_the_screen(tmp_path):
    frontier, file = samples.realistic(), tmp_path / "page.html"
    frontier.report(file)
    shown = browse(file, "--dump-dom")
    measured = [str(i) for i, p in enumerate(frontier.points, 1) if p.quality is not None]
    plots = re.findall(r'<svg class="plot".*?</svg>', shown, re.DOTALL)
    for plot in plots:
        numbers = re.findall(r'<circle [^>]*data-point="(\d+)"', plot)
        assert sorted(numbers, key=int) == measured
    assert len(plots) == 2


def test_screenshots_in_light_dark_and_on_a_phone(tmp_path):
    image = pytest.importorskip("PIL.Image")
    file, colors = tmp_path / "page.html", {}
    samples.realistic().report(file)
    for name, size, flags in (("light", (1240, 1100), []), ("dark", (1240, 1100), [DARK]), ("phone", (500, 1100), [])):
        shot = tmp_path / f"{name}.png"
        browse(file, f"--window-size={size[0]},{size[1]}", "--hide-scrollbars", f"--screenshot={shot}", *flags)
        with image.open(shot) as picture:
            assert picture.size == size
            colors[name] = {color: count for count, color in picture.convert("RGB").getcolors(1 << 24)}
    ground = {name: max(count, key=count.get) for name, count in colors.items()}
    assert ground == {"light": (255, 255, 255), "dark": (0x12, 0x16, 0x1C), "phone": (255, 255, 255)}
    blue, green = (0x25, 0x63, 0xA8), (0x0B, 0x7A, 0x4B)  # marks of the front, the best mark
    assert all(colors[name].get(color, 0) > 50 for name in ("light", "phone") for color in (blue, green))


def test_tables_sort_and_marks_point_to_rows(tmp_path):
    file = tmp_path / "page.html"
    script = """
    const table = document.querySelector("table"), names = () => [...table.tBodies[0].rows].map((r) => r.dataset.point);
    const button = table.tHead.rows[0].cells[1].querySelector("button");
    button.click(); const rising = names(); button.click(); const falling = names();
    const mark = document.querySelector("circle[data-point='4']");
    mark.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    const active = [...document.querySelectorAll(".active")].map((e) => e.tagName);
    document.body.textContent = JSON.stringify({rising, falling, active, sort: table.tHead.rows[0].cells[1].ariaSort});
    """
    frontier = samples.realistic()
    file.write_text(with_script(frontier_page(frontier), script), encoding="utf-8")
    result = json.loads(re.search(r"<body>(.*)</body>", browse(file, "--dump-dom"), re.DOTALL)[1])
    qualities = {str(i): p.quality for i, p in enumerate(frontier.points, 1)} | {None: frontier.dense.quality}
    rising = [qualities[n] for n in result["rising"]]
    falling = [qualities[n] for n in result["falling"]]
    assert rising[-1] is None and rising[:-1] == sorted(rising[:-1])
    assert falling[-1] is None and falling[:-1] == sorted(falling[:-1], reverse=True) and result["sort"] == "descending"
    assert sorted(result["active"]) == ["TR", "circle", "circle"]


@pytest.mark.parametrize("name", ["hostile", "bench"])
def test_a_page_is_not_wider_than_a_phone(name, tmp_path):
    """Tables scroll inside their boxes; the page itself does not."""
    page = with_script(
        pages()[name],
        'const root = document.documentElement; parent.postMessage(root.scrollWidth + " of " + root.clientWidth, "*")',
    )
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    outer = tmp_path / "outer.html"
    listen = "onmessage = (event) => { document.title = event.data; };"
    outer.write_text(
        f"<!DOCTYPE html><html><head><script>{listen}</script></head><body>"
        '<iframe src="page.html" width="360" height="800" style="border: 0"></iframe></body></html>',
        encoding="utf-8",
    )
    width, available = map(int, re.search(r"<title>(\d+) of (\d+)</title>", browse(outer, "--dump-dom")).groups())
    assert width == available and 320 < available <= 360  # less a scroll bar
