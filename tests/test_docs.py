"""The README and the pages in docs/: their code runs, and says what they say."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_hub
import keras
import pages
import pytest

import keras_dalign as kd

pytest.importorskip("sklearn")

ROOT = pages.ROOT
BACKEND = keras.backend.backend()
# Distribution is set up for a whole process.
OWN_PROCESS = ("devices.md",)
# Seconds each, mostly of compiling.
SLOW = (
    "README.md",
    "alignment.md",
    "index.md",
    "last-layer.md",
    "linear-probe.md",
    "swap-last-layer.md",
    "two-phases.md",
)
# What is shown for other set-ups than one process, and tested in test_distribution.py.
NOT_RUN = {"docs/devices.md": 2}


def name(path):
    return path.relative_to(ROOT).as_posix()


def with_code():
    for path in pages.PAGES:
        if pages.blocks(path.read_text(encoding="utf-8")):
            marks = [pytest.mark.slow] if path.name in SLOW else []
            yield pytest.param(path, id=name(path), marks=marks)


@pytest.fixture
def as_before():
    """What pages set for the whole process is set back."""
    policy = keras.config.dtype_policy()
    keras.config.disable_interactive_logging()
    yield
    keras.config.enable_interactive_logging()
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("path", list(with_code()))
def test_code_of_pages_runs_and_prints_what_they_say(
    path, as_before, tmp_path, monkeypatch
):
    if path.name == "hub.md":
        fake_hub.installed(tmp_path, monkeypatch)
    if path.name not in OWN_PROCESS:
        pages.check(path, BACKEND)
        return
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29541",
    }
    command = [sys.executable, str(ROOT / "tests" / "pages.py"), str(path)]
    subprocess.run(command, env=environment, check=True, timeout=600)


def test_all_code_is_run_on_some_backend():
    backends = ("tensorflow", "jax", "torch")
    left_out = {}
    for path in pages.PAGES:
        found = pages.blocks(path.read_text(encoding="utf-8"))
        no = [b for b in found if not any(b.runs_on(each) for each in backends)]
        if no:
            left_out[name(path)] = len(no)
    assert left_out == NOT_RUN


def test_a_page_that_says_something_else_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n",
        encoding="utf-8",
    )
    with pytest.raises(AssertionError, match=r"page.md:6 prints\n2"):
        pages.check(page, BACKEND)
    pages.write(page, BACKEND)
    pages.check(page, BACKEND)
    assert "\n```text\n2\n```\n" in page.read_text(encoding="utf-8")


def test_illustrations_are_not_compared_and_marks_choose_a_backend(tmp_path):
    other = "jax" if BACKEND != "jax" else "torch"
    page = tmp_path / "page.md"
    page.write_text(
        f"<!-- run: {other} -->\n```python\n1 / 0\n```\n\n"
        "<!-- run: no, it needs a cluster -->\n```python\n1 / 0\n```\n\n"
        "```python\nprint(1)\n```\n\n<!-- illustration -->\n```text\n2\n```\n",
        encoding="utf-8",
    )
    pages.check(page, BACKEND)


def test_every_public_name_has_an_example_and_its_documentation():
    reference = ROOT / "docs" / "reference"
    text = "".join(
        path.read_text(encoding="utf-8") for path in sorted(reference.glob("*.md"))
    )
    code = "".join(
        block.code for path in reference.glob("*.md")
        for block in pages.blocks(path.read_text(encoding="utf-8"))
    )  # fmt: skip
    for public in kd.__all__:
        assert re.search(rf"^::: keras_dalign\.{public}\b", text, re.MULTILINE), public
        assert re.search(rf"\bkd\.{public}\b", code), public


def test_the_readme_is_short_and_the_pages_have_titles():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    for path in pages.PAGES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), path
        for alternative in re.findall(r"!\[([^\]]*)\]", text):
            assert len(alternative) > 10, f"{path}: an image needs a description"


def sentences():
    """All texts in the package, with `...` for what is filled in."""
    for path in Path(kd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "..."
                    for part in node.values
                )


def test_messages_are_those_of_the_package():
    text = (ROOT / "docs" / "reference" / "messages.md").read_text(encoding="utf-8")
    said = list(sentences())
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    quoted = re.findall(r'^- \*\*"(.+)"\*\*', text, re.MULTILINE)
    assert len(headings) > 40
    for message in headings + quoted:
        assert any(message in each for each in said), message


def test_every_warning_is_among_the_messages():
    """The page has a heading that is a part of each text given to `warnings.warn`."""
    text = (ROOT / "docs" / "reference" / "messages.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    found = 0
    for path in Path(kd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != (
                "warnings.warn"
            ):
                continue
            literal = ast.unparse(node.args[0])
            if isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
                found += 1
                assert any(each in literal for each in headings), literal
    assert found >= 3


def test_commands_of_pages_exist():
    nox = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session", nox, re.MULTILINE))
    for path in pages.PAGES:
        text = path.read_text(encoding="utf-8")
        for session in re.findall(r"nox -s (\w+)", text):
            assert session in sessions, f"{name(path)}: nox -s {session}"
        for module in re.findall(r"python -m (benchmarks|pipelines)\.(\w+)", text):
            assert (ROOT / module[0] / f"{module[1]}.py").is_file(), module
        for folder in re.findall(r"dvc repro (\S+/dvc\.yaml)", text):
            assert (ROOT / folder).is_file(), folder


def test_links_lead_somewhere():
    for path in pages.PAGES:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text):
            outside = target.startswith(("http:", "https:", "mailto:"))
            # Of a study that is not run, the figure is to come.
            to_come = "Not run yet." in text and "/results/" in target
            if not outside and not to_come:
                assert (path.parent / target).exists(), f"{name(path)}: {target}"


def test_navigation_has_every_page():
    yaml = pytest.importorskip("yaml")
    found = set()

    def walk(node):
        for each in node if isinstance(node, list) else node.values():
            if isinstance(each, str):
                found.add(each)
            else:
                walk(each)

    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    walk(yaml.safe_load(config)["nav"])
    docs = ROOT / "docs"
    for path in docs.rglob("*.md"):
        page = path.relative_to(docs).as_posix()
        assert page in found or f"{page.partition('/')[0]}/" in found, page


@pytest.mark.slow
def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = ROOT / "docs" / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    drawn = figures.main(tmp_path, "two-phases", "certificate", size=0.1)
    assert all(each.stat().st_size > 5000 for each in drawn)
    images = {each.stem for each in (ROOT / "docs" / "images").glob("*.png")}
    assert images == set(figures.FIGURES)
