"""Build the site in build/site from README.md, CONTRIBUTING.md, CHANGELOG.md and docs/.

The Markdown files link to each other and to sources by relative paths, as a reader of the
repository needs them. They are copied to build/docs with links for the site, and Sphinx builds that
folder. A link to another page stays a link. A link to a file that is no page becomes a link to the
repository if --repository names one, and plain text otherwise. Every warning is an error: a link to
a file or a heading that does not exist, a page that no list of pages names.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside docs/ that are pages, and their names on the site."""

CONTENTS = {
    "Use": "guide own_cells install torch reproducibility differences gallery api changelog",
    "Results": "results benchmarks",
    "Inside": "tour design options frozen cuda operators notebook gpu-notes glossary wheels "
    "contributing",
}
"""The pages by heading, in their order."""

# A fenced block, or what is between two of them.
_FENCED = re.compile(
    r"^ *(```+|~~~+).*?^ *\1 *$|.+?(?=^ *(?:```|~~~)|\Z)", re.DOTALL | re.MULTILINE
)
# A link or picture, whose text may hold code; or a piece of code, which stays as it is.
_LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^()\s]+)\)|`+(?:[^`\n]|\n(?!\n))+`+")


class BrokenLinkError(ValueError):
    """A link to a file that does not exist."""


def page_of(path: str) -> str | None:
    """The page or picture on the site of a file of the repository, or None."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def with_links(text: str, source: str, repository: str = "") -> str:
    """The Markdown of ``source``, a file of the repository, with links for the site.

    Raises:
        BrokenLinkError: a relative link to a file that does not exist.
    """
    here = posixpath.dirname(page_of(source) or source)

    def replace(match: re.Match[str]) -> str:
        bang, label, target = match.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path.startswith("..") or not (ROOT / path).exists():
            raise BrokenLinkError(f"{source}: no such file: {target}")
        page = page_of(path)
        if page is not None:
            return f"{bang}[{label}]({posixpath.relpath(page, here or '.')}{hash_}{anchor})"
        if not repository:
            return label
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{bang}[{label}]({repository.rstrip('/')}/{kind}/main/{path}{hash_}{anchor})"

    return _FENCED.sub(lambda match: match[0] if match[1] else _LINK.sub(replace, match[0]), text)


def stage(folder: Path, repository: str) -> None:
    """Writes the pages, and the files that they need, to a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = with_links(page.read_text(encoding="utf-8"), f"docs/{page.name}", repository)
        (folder / page.name).write_text(text, encoding="utf-8")
    for source, name in PAGES.items():
        text = with_links((ROOT / source).read_text(encoding="utf-8"), source, repository)
        (folder / name).write_text(text, encoding="utf-8")
    with (folder / "index.md").open("a", encoding="utf-8") as index:
        for caption, pages in CONTENTS.items():
            names = "\n".join(pages.split())
            index.write(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repository", default="", help="URL that links to sources lead to")
    arguments = parser.parse_args()
    pages, site = ROOT / "build/docs", ROOT / "build/site"
    try:
        stage(pages, arguments.repository)
    except BrokenLinkError as error:
        print(error, file=sys.stderr)
        return 1
    # Always from scratch, because a page that is not built again reports no warning.
    shutil.rmtree(site, ignore_errors=True)
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--fresh-env"]
    caches = ["--doctree-dir", str(ROOT / "build/doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, *caches, str(pages), str(site)]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        print(f"written: {site / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
