"""A package index over a folder of wheels and sdists, as static pages (PEP 503), and checksums.

Usage: python tools/wheel_index.py DIST. Writes DIST/simple, which is what pip's --index-url takes,
and DIST/SHA256SUMS, which `sha256sum --check` reads.
"""

from __future__ import annotations

import hashlib
import html
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="pypi:repository-version" content="1.0">
<title>{title}</title>
</head>
<body>
{links}
</body>
</html>
"""


class WheelError(Exception):
    """An input or a result is not the expected one. The message says both."""


class Distribution(NamedTuple):
    project: str  # normalised
    version: Version
    path: Path
    sha256: str


def distribution(path: Path) -> Distribution:
    try:
        if path.suffix == ".whl":
            project, version, *_ = parse_wheel_filename(path.name)
        else:
            project, version = parse_sdist_filename(path.name)
    except (InvalidWheelFilename, InvalidSdistFilename) as error:
        raise WheelError(f"want a wheel or an sdist, got {path}: {error}") from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Distribution(canonicalize_name(project), version, path, sha256)


def distributions(folder: Path) -> list[Distribution]:
    """The distributions in the folder, by project, version and name."""
    paths = [path for pattern in ("*.whl", "*.tar.gz") for path in folder.glob(pattern)]
    if not paths:
        raise WheelError(f"want a folder with wheels or sdists, got {folder}")
    return sorted(map(distribution, paths), key=lambda d: (d.project, d.version, d.path.name))


def page(title: str, links: Iterable[tuple[str, str]]) -> str:
    """A page of links, each an address and its text."""
    lines = [f'<a href="{html.escape(url)}">{html.escape(text)}</a><br>' for url, text in links]
    return PAGE.format(title=html.escape(title), links="\n".join(lines))


def project_page(project: str, files: Iterable[Distribution]) -> str:
    return page(
        f"Links for {project}",
        ((f"../../{quote(f.path.name)}#sha256={f.sha256}", f.path.name) for f in files),
    )


def root_page(projects: Iterable[str]) -> str:
    return page("Simple index", ((f"{project}/", project) for project in projects))


def checksums(files: Iterable[Distribution]) -> str:
    return "".join(f"{f.sha256}  {f.path.name}\n" for f in files)


def write_index(folder: Path) -> list[Distribution]:
    """Rewrites index and checksums, and returns the distributions in them."""
    found = distributions(folder)
    projects = sorted({f.project for f in found})
    simple = folder / "simple"
    shutil.rmtree(simple, ignore_errors=True)
    for project in projects:
        place = simple / project
        place.mkdir(parents=True)
        own = [f for f in found if f.project == project]
        (place / "index.html").write_text(project_page(project, own))
    (simple / "index.html").write_text(root_page(projects))
    (folder / "SHA256SUMS").write_text(checksums(found))
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/wheel_index.py DIST", file=sys.stderr)
        return 2
    try:
        found = write_index(Path(arguments[0]))
    except WheelError as error:
        print(f"wheel_index: {error}", file=sys.stderr)
        return 1
    print(f"wheel_index: {len(found)} files in {arguments[0]}/simple")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
