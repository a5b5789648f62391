"""What mkdocs does beside itself: links out of docs/, and the pages of the studies.

Pages link to files of the repository, so that they can be read there. Such files become
a part of the site, in a folder of their own: Markdown as pages, the rest as it is.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# The folder of the site that files from outside of docs/ are in.
OUTSIDE = "repository"
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Replaces folders in the navigation, such as `studies/`, by their pages."""
    for section in config.nav:
        for title, entry in section.items():
            if isinstance(entry, str) and entry.endswith("/"):
                found = sorted((Path(config.docs_dir) / entry).glob("*.md"))
                # The overview is called README, and stands first.
                found.sort(key=lambda path: path.stem != "README")
                section[title] = [entry + path.name for path in found]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        source = _source(waiting.pop())
        for target in _targets(source):
            name = f"{OUTSIDE}/{target}"
            if target.startswith("docs/") or files.get_file_from_path(name):
                continue
            if (ROOT / target).is_file():
                path = str(ROOT / target)
                files.append(File.generated(config, name, abs_src_path=path))
                if target.endswith(".md"):
                    waiting.append(name)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links between docs/ and the rest of the repository those of the site.

    And renders the Markdown within `<details>`, as GitHub does.

    Args:
        markdown: The text of the page.
        page: The page.
        **_: What else mkdocs gives.

    Returns:
        The text for the site.
    """
    markdown = markdown.replace("<details>", '<details markdown="1">')
    here = page.file.src_uri
    source = _source(here)

    def replaced(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = _resolved(source, link)
        if (ROOT / target).is_dir():
            # A folder is named, and not shown.
            return text[1:-1]
        if not (ROOT / target).is_file():
            # A figure that no study has drawn yet, or a mistake, which mkdocs reports.
            drawn = text.startswith("!") and "results" in Path(target).parts
            return f"*{text[2:-1]} (not run yet)*" if drawn else match[0]
        name = target.removeprefix("docs/")
        if name == target:
            name = f"{OUTSIDE}/{target}"
        name = posixpath.relpath(name, posixpath.dirname(here) or ".")
        return f"{text}({name}{anchor})"

    return _LINK.sub(replaced, markdown)


def _source(name: str) -> str:
    """The path in the repository of a file of the site."""
    inside = name.removeprefix(f"{OUTSIDE}/")
    return f"docs/{name}" if inside == name else inside


def _targets(source: str) -> Iterator[str]:
    text = (ROOT / source).read_text(encoding="utf-8")
    for _, link, _ in _LINK.findall(text):
        yield _resolved(source, link)


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
