"""The pages: their code runs, and what they name exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import importable

from rnnkern.bench import cli

pytestmark = pytest.mark.cpu_only
ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/README.md")])
}
# A fence with its language, and what is in it.
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "sh", "text", "{eval-rst}"}
FILE = re.compile(r"(rnnkern|csrc|tests|tools|benchmarks|examples|cmake|docs)/[\w./-]+")
CODE = re.compile(r"`([^`\n]+)`")
# What a shell block may run besides the commands that are looked at.
KNOWN_COMMANDS = {"benchmarks/gpu/run_all.sh", "nvcc", "./constants", ".venv/bin/pre-commit"}


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(PAGES[page]) if kind == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def test_every_page_is_looked_at() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/guide.md"} <= set(PAGES)
    assert "benchmarks/gpu/README.md" in PAGES
    assert len(pages_with("python")) >= 5
    assert len(pages_with("sh")) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """So that no code stays unseen by the tests below."""
    assert PAGES[page].count("\n```") == 2 * len(BLOCK.findall(PAGES[page]))
    assert {kind for kind, _ in BLOCK.findall(PAGES[page])} <= LANGUAGES
    prose = BLOCK.sub("", PAGES[page])
    assert not re.findall(r"(?:\A|\n\n) {4,}\S.*", prose), "an indented block: use a fence"


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for number, body in enumerate(blocks(page, "python")):
        exec(compile(body, f"{page}, block {number}", "exec"), space)
    assert any(name in space for name in ("lstm", "model", "layer"))


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z0-9-]+):", text, re.MULTILINE))


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments and settings of variables."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


def check(words: list[str]) -> None:
    """Fails unless the command is one that there is, with the options that it has."""
    program, *rest = words
    if program == "make":
        named = [word for word in rest if "=" not in word]
        assert named, words
        assert set(named) <= targets(), words
        for word in rest:
            name, _, value = word.partition("=")
            if name == "ARGS" and named == ["compare"]:
                check(["rnnkern", "compare", *shlex.split(value)])
    elif program == "rnnkern":
        # Without a GPU the parser refuses its name.
        cli._parser().parse_args([word if word != "cuda" else "cpu" for word in rest])
    elif program == "python":
        check_python(rest)
    elif program == "pip":
        assert rest[0] == "install", words
        for group in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(group.split(",")) <= extras(), words
    elif program == ".ci/run":
        assert (ROOT / program).is_file()
    else:
        assert program in KNOWN_COMMANDS, words


def check_all(text: str) -> None:
    for words in commands(text):
        check(words)


def check_python(words: list[str]) -> None:
    path = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    assert path.is_file(), words
    # An example takes its common options from another file.
    sources = [path, path.parent / "common.py"]
    text = "".join(source.read_text(encoding="utf-8") for source in sources if source.is_file())
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in text, (words, option)


@pytest.mark.parametrize("page", pages_with("sh"))
def test_shell_blocks_name_what_there_is(page: str) -> None:
    for body in blocks(page, "sh"):
        check_all(body)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_name_what_there_is(page: str) -> None:
    for code in CODE.findall(BLOCK.sub("", PAGES[page])):
        is_command = re.match(r"(make [a-z]|python (-m )?\w|rnnkern (compare|info)\b|\.ci/)", code)
        if is_command and "NAME" not in code:  # which is to be filled in
            check_all(code)


@pytest.mark.parametrize(
    "command",
    ["make nothing", "make compare ARGS=--none", "rnnkern compare --none", "python examples/no.py",
     "python examples/sine.py --none", "python -m benchmarks.no", "pip install '.[no]'", "nothing"],
)  # fmt: skip
def test_a_command_that_there_is_not_fails(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_all(command)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_in_the_text_exist(page: str) -> None:
    file = ""
    for code in CODE.findall(BLOCK.sub("", PAGES[page])):
        match = re.fullmatch(r"((?:tests/)?test_\w+\.py)?(?:::(test_\w+))?", code)
        if match and (match[1] or match[2]):
            file = match[1] or file
            path = ROOT / "tests" / file.removeprefix("tests/")
            assert path.is_file(), code
            if match[2]:
                assert match[2] in functions(path), code
        elif FILE.fullmatch(code) and not re.search(r"[A-Z]{4,}", code):  # to be filled in
            assert (ROOT / code).exists(), code


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.fixture
def build_docs() -> Iterator[ModuleType]:
    with importable(ROOT / "tools"):
        spec = importlib.util.find_spec("build_docs")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("build_docs", None)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str, build_docs: ModuleType) -> None:
    """Links to headings are what `make docs` looks at."""
    build_docs.with_links(PAGES[page], page)


def test_links_on_the_site(build_docs: ModuleType) -> None:
    text = "\n".join(
        [
            "a [page](docs/guide.md#export) and a [wrapped",
            "`x`](LICENSE), `[no](link)`, ![picture](docs/speedup.png), [out](https://example.org)",
            "```python",
            "x[0](LICENSE)",
            "```",
            "[folder](tests)",
        ]
    )
    alone = build_docs.with_links(text, "README.md")
    assert alone == "\n".join(
        [
            "a [page](guide.md#export) and a wrapped",
            "`x`, `[no](link)`, ![picture](speedup.png), [out](https://example.org)",
            "```python",
            "x[0](LICENSE)",
            "```",
            "folder",
        ]
    )
    hosted = build_docs.with_links(text, "README.md", "https://example.org/r/")
    assert "[wrapped\n`x`](https://example.org/r/blob/main/LICENSE)" in hosted
    assert "[folder](https://example.org/r/tree/main/tests)" in hosted
    up = build_docs.with_links("[a](../CHANGELOG.md) [b](wheels.md)", "docs/install.md")
    assert up == "[a](changelog.md) [b](wheels.md)"
    with pytest.raises(build_docs.BrokenLinkError, match=r"no such file: nothing\.md"):
        build_docs.with_links("[a](nothing.md)", "README.md")


def test_every_page_is_in_the_contents(build_docs: ModuleType) -> None:
    listed = " ".join(build_docs.CONTENTS.values()).split()
    pages = {build_docs.page_of(page) for page in PAGES} - {None, "index.md"}
    assert {f"{name}.md" for name in listed} == pages
    assert len(listed) == len(set(listed))


# Lines at most; what is longer is not read.
@pytest.mark.parametrize(("page", "most"), [("README.md", 180), ("docs/design.md", 200)])
def test_pages_are_no_longer_than_they_may_be(page: str, most: int) -> None:
    assert len(PAGES[page].splitlines()) <= most


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/benchmarks.md"])
def test_lines_fit_100_columns(page: str) -> None:
    """But for tables, pictures and signatures, which cannot be wrapped."""
    long = [line for line in PAGES[page].splitlines() if len(line) > 100]
    assert [line for line in long if not line.lstrip().startswith(("|", "![", ".. "))] == []


def test_glossary() -> None:
    """At most 60 terms, none of them twice."""
    terms = re.findall(r"^\| (?!term)([^|-][^|]*) \|", PAGES["docs/glossary.md"], re.MULTILINE)
    assert 30 < len(terms) <= 60
    assert len(terms) == len(set(terms))
