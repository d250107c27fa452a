"""What the pages link and name exists, and their commands parse."""

import argparse
import importlib
import re
import shlex

import pytest

from conftest import ROOT, SCRIPTS

PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".github/results/*.md")))]
OTHER_FLAGS = {"--no-deps", "--nproc_per_node", "--raw", "--against"}  # of pip, torchrun, judge.py, bench.py
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def parse(script: str, arguments: list[str]) -> argparse.Namespace:
    module = importlib.import_module(script)
    return module.make_parser().parse_args(arguments, argparse.Namespace(**module.NOT_SETTINGS))


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Script and arguments of each command in code blocks or between backticks."""
    lines = "".join(BLOCK.findall(text(page))).replace("\\\n", " ").splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text(page)))]
    found = [re.match(r"\s*(?:\w+=\S+ )?(?:python |torchrun --\w+ \d+ )?([\w/]+)\.py( --?\w.*| \w+.*|\s*#.*)?$", part)
             for line in lines for part in line.split("&&")]
    return [(match[1], shlex.split(match[2] or "", comments=True)) for match in found if match]


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text(page)):
        if re.match(r"https://[\w.-]+/", target):
            continue
        if target.startswith("#"):  # a section of the same page
            assert f"\n## {target[1:].replace('-', ' ')}\n" in text(page).lower(), target
            continue
        name, _, line = target.partition("#L")
        path = (ROOT / page).parent / name
        assert path.is_file(), target
        if path.suffix == ".py" and re.fullmatch(r"`\w+`", label):  # the name of a function or class
            there = path.read_text().splitlines()[int(line) - 1]
            assert re.match(rf"\s*(def|class) {label.strip('`')}\b", there), f"{label} is not at {target}"
    for name in re.findall(r"`((?:tests/)?\w+\.py)\b", text(page)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for script, arguments in commands(page):
        assert (ROOT / f"{script}.py").is_file(), script
        if script in SCRIPTS and arguments != ["--help"]:
            parse(script, arguments)
        if script == "tests/reproduce":
            assert arguments[0] in importlib.import_module("reproduce").TABLES, arguments


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    parsers = [importlib.import_module(script).make_parser() for script in SCRIPTS]
    known = OTHER_FLAGS.union(*(parser._option_string_actions for parser in parsers))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text(page))) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_column_of_metrics_is_explained(script):
    module = importlib.import_module(script)
    for column in {"step", *module.METRICS, *sum(module.PANELS, ())}:
        assert f"\n| `{column}` | " in text(f".github/results/{script}.md"), column


def test_changes_of_reproduce_fit_todays_code():
    from reproduce import CHANGES, RUNS
    for script, name, flags, changes in CHANGES:
        parse(script, f"{RUNS[script]} {flags}".split())
        changed = text(f"{script}.py")
        for old, new in changes.items():
            assert changed.count(old) == 1, f"{script}, {name}: {old}"
            changed = changed.replace(old, new)
        compile(changed, name, "exec")


def test_readme_has_the_test_command():
    assert "pip install -r requirements.txt pytest && python -m pytest" in text("README.md")
    assert ("began", ["--gamma", "0.5"]) in commands("README.md")


def test_readme_quotes_the_script_and_has_short_cells():
    quoted = [block for block in BLOCK.findall(text("README.md")) if "autograd.grad" in block]
    assert len(quoted) == 1 and quoted[0] in text("wgan_gp.py")
    for row in re.findall(r"^\|(.*)\|$", text("README.md"), re.M):
        for cell in row.split("|"):
            assert len(re.sub(r"\]\(.*?\)", "]", cell).split()) <= 10, cell
