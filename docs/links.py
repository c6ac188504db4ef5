"""A hook of mkdocs: pages that lie beside docs/, and the files that pages link to."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = (
    *sorted(ROOT.glob("plugins/*/README.md")),
    *sorted(ROOT.glob("plugins/*/src/*/model/README.md")),
    ROOT / "benchmarks/README.md",
    ROOT / "CHANGELOG.md",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)\s#]+")
LOADED = re.compile(
    r"<(?:script|img|iframe|link)[^>]* (?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)"
)

log = logging.getLogger("mkdocs.plugins.pilotfish")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere, under their own paths."""
    for page in PAGES:
        files.append(_file(page, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that are right in the repository be right in the site, and bring what they name.

    What does not exist is left as it is, and mkdocs warns of it.
    """
    here = Path(page.file.abs_src_path or DOCS).parent

    def moved(match: re.Match[str]) -> str:
        target = (here / match[0]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[0]
        file = _file(target, config)
        if files.get_file_from_path(file.src_uri) is None:
            files.append(file)
        return posixpath.relpath(file.src_uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of whatever a page would load from the network."""
    for address in LOADED.findall(output):
        log.warning("%s loads %s", page.file.src_uri, address)
    return output


def _file(path: Path, config: MkDocsConfig) -> File:
    """A file of the repository; docs/ is the site's root, everything else keeps its path."""
    folder = DOCS if path.is_relative_to(DOCS) else ROOT
    uri = path.relative_to(folder).as_posix()
    return File.generated(config, uri, abs_src_path=str(path))
