"""Every command of the demo, the pages and the experiments' headers parses, composes and names options that exist."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from ldmlab.app.cli import COMMANDS, WITH_HYDRA, parser_of
from ldmlab.app.commands.demo import flow
from ldmlab.app.compose import compose, conf_dir, parse_override

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "docker").glob("*.md"),
    ROOT / "data" / "README.md",
]
OURS = r"(?<![\w./-])(?:(?:train|evaluate)\.py|ldmlab [a-z][\w-]*|sbatch (?:--\S+ )*examples/cluster/\w+\.sh)"


def blocks() -> list[str]:
    """Fenced blocks of commands, those over several lines joined."""
    found = [fence for path in PAGES for fence in re.findall(r"```(\w*)\n(.*?)```", path.read_text(), re.S)]
    return [text.replace("\\\n", " ") for language, text in found if language not in ("python", "yaml")]


def documented() -> list[str]:
    """Lines of fenced blocks, and of experiment headers, from one of our commands on."""
    texts = blocks() + [path.read_text() for path in (conf_dir() / "experiment").rglob("*.yaml")]
    found = [match.strip() for text in texts for match in re.findall(rf"({OURS}\b[^\n#]*)", text)]
    return sorted({line for line in found if not line.startswith("sbatch") or "=" in line})


def mentioned() -> list[str]:
    """Our commands in the prose and tables of the pages."""
    prose = [re.sub(r"```.*?```", "", path.read_text(), flags=re.S) for path in PAGES]
    found = [" ".join(code.split()) for text in prose for code in re.findall(r"`(ldmlab [a-z][\w-]*[^`]*)`", text)]
    return sorted(set(found))


def check(words: list[str]) -> None:
    """Parse or compose the command without running it; `experiment=...` stands for any."""
    start = next(at for at, word in enumerate(words) if not word.startswith("-") and word not in ("ldmlab", "sbatch"))
    command, rest = words[start].removesuffix(".py"), words[start + 1 :]
    if command.endswith(".sh"):  # scripts of examples/cluster, which take the options of train
        command = "train"
    if command not in WITH_HYDRA | {"encode"}:
        assert command in COMMANDS
        parser_of(command)[0].parse_intermixed_args(["X" if word == "..." else word for word in rest])
        return
    choices = [option for option in rest if not option.startswith("-") and "..." not in option]
    for job in product(*map(swept, choices)) if "-m" in rest else [choices]:
        compose(command, list(job))


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
    check(shlex.split(line))


@pytest.mark.parametrize("line", mentioned())
def test_a_command_in_prose_exists_with_its_options(line: str) -> None:
    command = line.split()[1]
    assert command in COMMANDS
    options = re.findall(r"(?<=\s)--[a-z][\w-]*", line)
    if options and command not in WITH_HYDRA and command != "encode":
        known = parser_of(command)[0].format_help()
        assert [option for option in options if option not in known] == []


def test_make_has_every_documented_target() -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    texts = [*blocks(), *(code for path in PAGES for code in re.findall(r"`(make [^`]*)`", path.read_text()))]
    named = {name for text in texts for name in re.findall(r"^make (?:\w+=\S+ )?([a-z][\w-]*)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named <= set(targets)


@pytest.mark.parametrize("recipe", ["cpu", "gpu"])
def test_the_demos_commands_are_understood(recipe: str, tmp_path: Path) -> None:
    for step in flow(tmp_path, recipe):
        words = (
            ["ldmlab", *step.command[3:]]
            if step.command[1] == "-m"
            else [Path(step.command[1]).name, *step.command[2:]]
        )
        check(words)


def test_there_is_something_to_check() -> None:
    lines = documented()
    assert len(lines) > 15
    assert any(line.startswith("ldmlab pack") for line in lines)
