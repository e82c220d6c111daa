"""The page of results and that of a check in a real browser, where one is installed: no error, no horizontal scroll, filter and sort."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_check import rows_of, run, written
from test_report import row

from suite.report.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")

LONG = "a_very_long_name_" * 6
# Runs in the page, after its own script: what a reader would see and do.
PROBE = """
const errors = []; addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => setTimeout(() => {
  const seen = () => [...document.querySelectorAll("#table tbody tr")].filter(r => r.style.display !== "none").map(r => r.id);
  const answer = {errors, scroll: document.documentElement.scrollWidth - innerWidth};
  if (document.getElementById("table")) {
    answer.first = seen();
    document.querySelectorAll("#table th button")[2].click(); answer.sorted = seen();
    document.querySelectorAll("#table th button")[2].click(); answer.reversed = seen();
    const search = document.getElementById("search");
    search.value = "needle"; search.dispatchEvent(new Event("input", {bubbles: true})); answer.searched = seen();
    search.value = ""; search.dispatchEvent(new Event("input", {bubbles: true}));
    const box = document.querySelector('input[data-verdict="FAIL"]');
    box.checked = false; box.dispatchEvent(new Event("input", {bubbles: true})); answer.without = seen();
    dispatchEvent(new HashChangeEvent("hashchange")); location.hash = "#rows:C8.desk.FAIL";
  }
  setTimeout(() => { answer.followed = document.getElementById("table") ? seen() : null;
    const out = parent.document.createElement("pre"); out.textContent = "ANSWER" + JSON.stringify(answer) + "END"; parent.document.body.append(out); }, 200);
}, 200));
"""


def answers(tmp_path, page: str, *widths: int) -> list[dict]:
    """What PROBE says of a page in frames of these widths, in pixels."""
    probed = html.escape(page.replace("<head>", f"<head><script>{PROBE}</script>"))
    frames = "".join(f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{probed}"></iframe>' for width in widths)
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frames.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return [json.loads(html.unescape(text)) for text in re.findall(r"<pre>ANSWER(.*?)END</pre>", shown)]


def test_the_results_fit_any_width_and_can_be_sorted_searched_and_filtered(tmp_path):
    rows = [
        row(task="t", claim_id="C1-a", estimate=60.0, reason="needle", fingerprint=f"cpu-{LONG}"), row(task="t", claim="C8", claim_id="C8-b", verdict="FAIL", estimate=5.0),
        row(task=LONG, claim="C10", claim_id=f"C10-{LONG}", estimate=7.0, statement=LONG, reason=LONG * 3), row(task="w", claim_id="C1-w", fingerprint=None, verdict="NOT_RUN"),
    ]  # fmt: skip
    page = render(rows, [(LONG, LONG, "x.svg", LONG)], [])
    narrow, wide = answers(tmp_path, page, 390, 1280)
    ids = ["t.C1-a", "t.C8-b", LONG]
    short = lambda names: [next(one for one in (*ids, "w.C1-w") if name.startswith(one)) for name in names]  # noqa: E731
    for one in (narrow, wide):
        assert one["errors"] == [] and one["scroll"] <= 0
        assert short(one["first"]) == ids, "what was not run is hidden"
        assert short(one["sorted"]) == ["t.C8-b", LONG, "t.C1-a"] and short(one["reversed"]) == ["t.C1-a", LONG, "t.C8-b"]
        assert short(one["searched"]) == ["t.C1-a"] and sorted(short(one["without"])) == sorted(["t.C1-a", LONG])
        assert short(one["followed"]) == ["t.C8-b"], "a word of the matrix leads to its rows"


def test_the_page_of_a_check_fits_any_width(tmp_path, capsys):
    path = written(tmp_path / f"{LONG}.jsonl", rows_of(("bf16", "fp16"), (0, 1)))
    assert run("--evidence", path, "--html", tmp_path / "check.html") == 0
    for one in answers(tmp_path, (tmp_path / "check.html").read_text(), 390, 1280):
        assert one["errors"] == [] and one["scroll"] <= 0
