"""Hooks of `make docs`: the pages from outside docs/, and links that work here and on a code host.

The Markdown files link to each other and to sources by relative paths, as a reader of the
repository needs them. On the site, a link to another page stays a link. A link to a file that is no
page becomes a link to the repository if mkdocs.yml has a `repo_url`, and plain text otherwise. A
link to a file that does not exist is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside docs/ that are pages, and their names on the site."""

_log = logging.getLogger("mkdocs.hooks.site_pages")
_FENCE = re.compile(r" *(```|~~~)")
# A link or picture, whose text may hold code; or a piece of code, which stays as it is.
_LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^()\s]+)\)|`+[^`]+`+")


class BrokenLinkError(ValueError):
    """A link to a file that is not there."""


def page_of(path: str) -> str | None:
    """The page or picture on the site of a file of the repository, or None."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def with_links(text: str, source: str, repository: str = "") -> str:
    """The Markdown of a file of the repository, with links for the site.

    Raises:
        BrokenLinkError: a relative link whose file does not exist.
    """
    page = page_of(source)
    here = posixpath.dirname(page or source)

    def replace(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path.startswith("..") or not (ROOT / path).exists():
            raise BrokenLinkError(f"{source}: no such file: {target}")
        found = page_of(path)
        if found is not None:
            return f"{bang}[{label}]({posixpath.relpath(found, here or '.')}{hash_}{anchor})"
        if repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{bang}[{label}]({repository.rstrip('/')}/{kind}/main/{path}{hash_}{anchor})"
        return label

    lines, fence = [], ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        elif not fence:
            line = _LINK.sub(replace, line)
        lines.append(line)
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Writes the links of a page for the site."""
    outside = {name: source for source, name in PAGES.items()}
    source = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    try:
        return with_links(markdown, source, config.repo_url or "")
    except BrokenLinkError as error:
        _log.warning(str(error))
        return markdown
