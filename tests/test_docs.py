"""The documents: docs/cli.md is the help, commands parse, Python calls what exists, links lead somewhere."""

import ast
import inspect
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import streamprune
from streamprune.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "benchmarks.md"  # of what was typed then
CURRENT = [page for page in PAGES if page != LOG]
OTHERS = {"--help", "--parts"}  # click's, sbatch's, bench_gpu.py's


def command_lines(page: Path) -> Iterator[list[str]]:
    """Arguments of every `streamprune COMMAND ...` in the code blocks of a page, usage lines left out."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (?:until )?streamprune (\S.*)", text, re.MULTILINE):
        if "[OPTIONS]" not in line:
            yield shlex.split(line.partition(";")[0], comments=True)


def test_the_command_page_is_the_help() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]
    assert (ROOT / "docs" / "cli.md").read_text() == page(), "run `make docs`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_commands_are_found() -> None:
    names = {arguments[0] for page in CURRENT for arguments in command_lines(page)}
    assert names == set(cli.commands)
    assert [line[0] for line in command_lines(ROOT / "README.md")] == ["compress", "verify", "generate"]


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for name, *arguments in command_lines(page):
        cli.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("line", ["compress MODEL", "compress MODEL --out OUT --sparsity 0.5", "verify"])
def test_a_wrong_command_would_be_seen(line: str) -> None:
    name, *arguments = line.split()
    with pytest.raises(click.UsageError):
        cli.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_options_that_are_named_exist(page: Path) -> None:
    known = {
        name
        for command in [cli, *cli.commands.values()]
        for o in command.params
        for name in (*o.opts, *o.secondary_opts)
    }
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())
    ours = [code for code in inline if code.startswith(("--", "streamprune "))]
    named = {option for code in ours for option in re.findall(r"--[a-z][a-z-]*", code)}
    assert named <= known | OTHERS


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_python_calls_what_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Attribute(ast.Name("streamprune"), name):
                    named = {word.arg: None for word in call.keywords if word.arg}
                    inspect.signature(getattr(streamprune, name)).bind(*call.args, **named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
