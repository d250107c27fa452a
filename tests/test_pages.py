"""The pages: what they link and name exists, their commands parse, and the README stays short."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT, SCRIPTS

PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".github/results/*.md")))]
OTHER_FLAGS = {"--nproc_per_node", "--raw"}  # those of torchrun and of tests/judge.py
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
WRONG = re.compile(  # English that a native speaker would not write, and American spelling
    r"holds one paper|default (pictures|data ?sets?) are drawn|turned upright|to the bit\b|train nothing|plumbing|"
    r"mirror every second|\bgray|behavior|\bcenter\b|\bcolors?\b(?!=|/svg)|\blicense\b|—|/work/|\.\./shared", re.I)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Script and arguments of each command in code blocks or between backticks."""
    lines = "".join(BLOCK.findall(text(page))).replace("\\\n", " ").splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text(page)))]
    found = [re.match(r"\s*(?:python |torchrun --\w+ \d+ )?([\w/]+)\.py( --?\w.*| \w+.*|\s*#.*)?$", part)
             for line in lines for part in line.split("&&")]
    return [(match[1], shlex.split(match[2] or "", comments=True)) for match in found if match]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_exist(page):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text(page)):
        if re.match(r"https://[\w.-]+/", target):
            continue
        if target.startswith("#"):  # a section of the same page
            assert f"\n## {target[1:].replace('-', ' ')}\n" in text(page).lower(), target
            continue
        name, _, line = target.partition("#L")
        path = (ROOT / page).parent / name
        assert path.is_file(), target
        if path.suffix == ".py" and re.fullmatch(r"`\w+`", label):  # a function's or a class's name
            shown = path.read_text().splitlines()[int(line) - 1]
            assert re.match(rf"\s*(def|class) {label.strip('`')}\b", shown), f"{label} is not at {target}"
    for name in re.findall(r"`((?:tests/)?\w+\.py)\b", text(page)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:  # each has a newest run
        Path(f"runs/{script}-001").mkdir(parents=True)
        Path(f"runs/{script}-001/checkpoint.pt").touch()
    for script, arguments in commands(page):
        assert (ROOT / f"{script}.py").is_file(), script
        if script in SCRIPTS and arguments != ["--help"]:
            importlib.import_module(script).parser().parse_args(arguments)
        if script == "tests/reproduce":
            assert f'"{arguments[0]}": ' in text("tests/reproduce.py"), arguments


def test_measured_changes_are_of_todays_code():
    from reproduce import CHANGES, RUNS
    for script, name, flags, changes in CHANGES:
        importlib.import_module(script).parser().parse_args([*RUNS[script].split(), *flags.split()])
        changed = text(f"{script}.py")
        for old, new in changes.items():
            assert changed.count(old) == 1, f"{script}, {name}: {old}"
            changed = changed.replace(old, new)
        compile(changed, name, "exec")


def test_commands_are_found():
    assert len(commands("README.md")) >= 8 and ("began", ["--gamma", "0.5"]) in commands("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = OTHER_FLAGS.union(*(importlib.import_module(script).parser()._option_string_actions for script in SCRIPTS))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text(page))) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_column_of_metrics_is_explained(script):
    module, page = importlib.import_module(script), text(f".github/results/{script}.md")
    panels = sum([*module.PANELS, *getattr(module, "MODE_PANELS", [])], ())
    for column in {"step", *module.METRICS, *panels, "swd", "diversity", "seconds"}:
        assert f"\n| `{column}` | " in page, column


def test_readme_is_short_and_has_the_test_command():
    assert len(text("README.md").splitlines()) <= 150
    assert "pip install -r requirements.txt pytest && python -m pytest" in text("README.md")


@pytest.mark.parametrize("page", [*PAGES, "common.py", *(f"{script}.py" for script in SCRIPTS)])
def test_spelling(page):
    assert not [line for line in text(page).splitlines() if WRONG.search(line)]
