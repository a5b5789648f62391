import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from fabricated import fabricate, grid

from pipelines import report
from pipelines.layout import Layout

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    methods = ("base", "base_bn", "base_short", "dalign", "two_phase_random")
    kinds = ("none", "standard")
    params = grid(root, datasets=("mnist",), augmentations=kinds, methods=methods)
    layout = Layout(root)
    for run in params.grid.runs():
        if run.augmentation == "none":
            title = "MNIST <5> (5,000 of 60,000)"
            fabricate(layout, run, 0.1, partial=True, title=title)
    report.main(params=params, root=root)
    return layout.html


class Parsed(HTMLParser):
    """What a page refers to, and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    assert len(set(parsed.ids)) == len(parsed.ids)
    anchors = {each[1:] for each in parsed.links if each.startswith("#")}
    assert anchors == set(parsed.ids)
    others = [each for each in parsed.links if not each.startswith("#")]
    assert sum(each.startswith("data:image/png;base64,") for each in others) == 4
    assert all(each.startswith("data:") for each in others)
    assert not re.search(r"url\(|@import|<script", text)
    assert "MNIST &lt;5&gt; (5,000 of 60,000)" in text
    assert "<5>" not in text
    # The answer comes first, and what was missed near the end.
    assert parsed.ids[0] == "answer"
    assert parsed.ids[-3:] == ["targets", "provenance", "reading"]


def test_page_renders_in_a_browser(page, tmp_path):
    dom, said = rendered(page, tmp_path)
    assert "CONSOLE" not in said
    for text in ("The answer", "two-phase, random gates", "10.00 ± 0.00", "not run"):
        assert text in dom
    # What the next test sees, this one would have seen.
    assert "</footer>" in dom


def test_browser_would_tell_of_a_request(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    other = tmp_path / "other.html"
    image = '<img src="http://localhost:9/x.png">'
    other.write_text(text.replace("<main>", f"<main>{image}"), encoding="utf-8")
    _, said = rendered(other, tmp_path)
    assert "CONSOLE" in said
    assert "Content Security Policy" in said


def rendered(page: Path, folder: Path) -> tuple[str, str]:
    """The page's DOM as text, and what the browser said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    result = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'browser'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return result.stdout, result.stderr
