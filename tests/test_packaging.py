import re
from pathlib import Path

import pytest
import yaml

import keras_dalign

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "CITATION.cff").is_file():
    pytest.skip("not a checkout of the repository", allow_module_level=True)


def test_the_citation_has_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == keras_dalign.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{citation["license"]}"' in project


def test_the_changelog_begins_with_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (
        re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[0] == keras_dalign.__version__
    )


def test_the_workflow_runs_sessions_that_there_are():
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    wanted = set(jobs["checks"]["strategy"]["matrix"]["session"])
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^@nox\.session.*\ndef (\w+)", noxfile, re.MULTILINE))
    assert wanted <= sessions
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {name for name in sessions if re.search(rf"\b{name}\b", checks)} <= wanted


def links(text):
    return re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SUPPORT.md", "CODE_OF_CONDUCT.md"]
)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in links(text):
        assert "://" in link or (ROOT / link).exists(), link
