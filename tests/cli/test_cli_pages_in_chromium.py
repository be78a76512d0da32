"""The HTML pages in a real browser: the figures that it renders are those of the data, and nothing of a key is markup."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from s3loader.packing import pack
from s3loader.pages import number
from s3loader.units import format_size

Command = Any
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
MEASURE = """<script>
for (const image of document.images) image.dataset.width = image.naturalWidth;
for (const bar of document.querySelectorAll("rect")) bar.dataset.shown = bar.getBoundingClientRect().width;
document.body.dataset.wide = document.documentElement.scrollWidth;
</script>"""


@pytest.fixture
def rendered(tmp_path: Path) -> Any:
    """What a browser makes of a page: its DOM after loading, with widths as it draws them."""

    def render(page: Path) -> str:
        copy = tmp_path / f"measured-{page.name}"
        copy.write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
        command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (wide,) = re.findall(r'data-wide="(\d+)"', done.stdout)
        assert int(wide) <= 1000, "nothing is wider than the page"
        return done.stdout

    return render


def data_of(dom: str) -> Any:
    (told,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', dom, re.DOTALL)
    return json.loads(told)


def cells_of(dom: str) -> list[list[str]]:
    """The tables' rows, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", dom, re.DOTALL)
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def facts_of(dom: str) -> dict[str, str]:
    return {label: value for value, label in re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span></div>", dom)}


def bars_of(dom: str) -> dict[str, float]:
    """Width of each bar as the browser draws it, by its label."""
    found = re.findall(r'<rect[^>]*data-shown="([\d.]+)"[^>]*><title>([^<]*): ', dom)
    return {html.unescape(label): float(width) for width, label in found}


def test_a_dataset_with_pictures(command: Command, tmp_path: Path, rendered: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, count in (("cat", 24), ("<b>dog</b> & co".replace("/", "-"), 6)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for at in range(count):
            out = io.BytesIO()
            image.new("RGB", (300, 200), (at * 10, 40, 90)).save(out, "JPEG")
            (tmp_path / "images" / label / f"{at:02}.jpg").write_bytes(out.getvalue())
    pack(tmp_path / "images", str(tmp_path / "train"))
    command("loader", tmp_path / "train" / "manifest.jsonl", "--html", tmp_path / "page.html", "--pictures", 8)
    dom = rendered(tmp_path / "page.html")
    data = data_of(dom)
    assert data == command.json("loader", tmp_path / "train" / "manifest.jsonl") | {"pictures": data["pictures"]}
    assert facts_of(dom)["samples"] == "30"
    assert facts_of(dom)["stored"] == format_size(data["stored"])
    widths = [int(width) for width in re.findall(r'<img[^>]*data-width="(\d+)"', dom)]
    assert len(widths) == len(data["pictures"]) == 8
    assert all(150 <= width <= 224 for width in widths), "thumbnails that a browser can show"
    bars = bars_of(dom)
    assert bars["cat"] == pytest.approx(4 * bars["<b>dog<-b> & co"], rel=0.02)
    assert ["jpg", "30", format_size(data["members"]["jpg"]["bytes"])] in cells_of(dom)
    assert "<b>dog" not in dom.partition("<h2>Pictures")[2].partition('id="data"')[0]


def test_a_measurement(command: Command, tmp_path: Path, rendered: Any) -> None:
    (tmp_path / "store").mkdir()
    quick = ("-s", "4KiB,64KiB", "-j", "1,2,4", "--seconds", "0.6", "--max-bytes", "8MiB")
    command("bench", "get", tmp_path / "store", *quick, "--html", tmp_path / "page.html")
    dom = rendered(tmp_path / "page.html")
    data = data_of(dom)
    rows = [row for row in cells_of(dom) if row]
    assert [row[:3] for row in rows] == [
        [format_size(r["size"]), str(r["concurrency"]), f"{r['requests']:,}"] for r in data["rows"]
    ]
    assert [row[5] for row in rows] == [number(row["mb_s"]) for row in data["rows"]]
    assert facts_of(dom)["most, MB/s"] == number(max(row["mb_s"] for row in data["rows"]))
    assert [html.unescape(line) for line in re.findall(r'<div class="advice">(.*?)</div>', dom)] == data["advice"]
    # both charts have a point for each row, and those of the first are as high as the figures
    heights = [float(y) for y in re.findall(r'<circle[^>]*cy="([\d.]+)"', dom)]
    assert len(heights) == 2 * len(rows)
    speeds = [row["mb_s"] for row in data["rows"]]
    low, high = min(range(6), key=speeds.__getitem__), max(range(6), key=speeds.__getitem__)
    zero = 240 - 34
    assert (zero - heights[low]) / (zero - heights[high]) == pytest.approx(speeds[low] / speeds[high], abs=0.02)


def test_an_op_log(command: Command, tmp_path: Path, rendered: Any) -> None:
    log = tmp_path / "run.tsv.zst"
    (tmp_path / "in").mkdir()
    for at in range(20):
        (tmp_path / "in" / f"<script>{at}.bin").write_bytes(bytes(1000))
    command("--op-log", log, "upload", f"{tmp_path}/in/", f"{tmp_path}/out/")
    command("--op-log", tmp_path / "second.tsv.zst", "get", f"{tmp_path}/out/", "-r")
    command("oplog", "plot", log, tmp_path / "second.tsv.zst", "-o", tmp_path / "page.html", "--title", "<i>a run</i>")
    dom = rendered(tmp_path / "page.html")
    found = command.json("oplog", "summarize", log, tmp_path / "second.tsv.zst")
    assert data_of(dom) == json.loads(json.dumps(found))
    assert facts_of(dom)["requests"] == f"{found['requests']:,}"
    assert facts_of(dom)["moved"] == format_size(found["bytes"])
    shown = {row[0]: row[1] for row in cells_of(dom) if len(row) == 12}
    assert shown == {op["op"]: f"{op['requests']:,}" for op in found["ops"]}
    assert "<i>a run" not in dom
    assert not re.search(r"<script>\d", dom)
