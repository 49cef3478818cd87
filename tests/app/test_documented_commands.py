"""Every command of the demo, the pages and the experiments' headers parses, composes and names options that exist."""

import importlib
import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from ldmlab.app.cli import COMMANDS, FILES, WITH_HYDRA, Parser, add_own_options
from ldmlab.app.commands.demo import flow
from ldmlab.app.compose import compose, conf_dir, parse_override

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docker").glob("*.md"),
    ROOT / "data" / "README.md",
]


def documented() -> list[str]:
    """Lines of fenced blocks, and of experiment headers, that call one of our commands."""
    texts = [fence for path in PAGES for fence in re.findall(r"```\w*\n(.*?)```", path.read_text(), re.S)]
    texts = [text.replace("\\\n", " ") for text in texts]  # a command over several lines
    texts += [path.read_text() for path in (conf_dir() / "experiment").rglob("*.yaml")]
    pattern = r"(?:torchrun --nproc-per-node=\d+ )?((?:python (?:train|evaluate)\.py|ldmlab \w+)\b[^\n#]*)"
    found = [match.strip() for text in texts for match in re.findall(pattern, text)]
    return sorted({line for line in found if "..." not in line and "COMMAND" not in line})


def check(words: list[str]) -> None:
    """Parse or compose the command without running it."""
    program, *options = words
    if program == "python" or options[0] in WITH_HYDRA:
        config = options.pop(0).removesuffix(".py")
        choices = [o for o in options if not o.startswith("-")]
        jobs = product(*map(swept, choices)) if "-m" in options else [choices]
        for job in jobs:
            compose(config, list(job))
        return
    command, *rest = options
    assert command in COMMANDS
    if command == "encode":
        compose("encode", rest)
        return
    module = importlib.import_module(f"ldmlab.app.commands.{FILES.get(command, command)}")
    parser = Parser(prog=command)
    module.add_arguments(parser)
    add_own_options(parser, command)
    parser.parse_intermixed_args(rest)


def swept(option: str) -> list[str]:
    """`seed=0,1` of a sweep as the values of its jobs, an interval as its ends; a list in brackets is one value."""
    item = parse_override(option)
    if item.is_interval_sweep():
        return [f"{item.key_or_group}={end}" for end in (item.value().start, item.value().end)]
    texts = item.sweep_string_iterator() if item.is_sweep_override() else [item.get_value_element_as_str()]
    return [f"{item.get_key_element()}={text}" for text in texts]


@pytest.fixture(autouse=True)
def _my_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/extending.md searches the configuration of the example package."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "my_lab")


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_is_understood(line: str) -> None:
    check(shlex.split(line.split(": ")[-1] if line.startswith("python train.py:") else line))


@pytest.mark.parametrize("recipe", ["cpu", "gpu"])
def test_the_demos_commands_are_understood(recipe: str, tmp_path: Path) -> None:
    for step in flow(tmp_path, recipe):
        words = ["ldmlab", *step.command[3:]] if step.command[1] == "-m" else ["python", *step.command[1:]]
        check(words)


def test_there_is_something_to_check() -> None:
    lines = documented()
    assert len(lines) > 15
    assert any(line.startswith("ldmlab pack") for line in lines)
