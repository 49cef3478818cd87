"""Commands explain themselves without loading torch, and refuse bad input in one sentence with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldmlab.app import cli
from ldmlab.app.cli import run_command
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[2]


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_help_of_the_programs_loads_neither_torch_nor_hydra(program: str) -> None:
    result = in_new_process(
        f"import sys; sys.argv = ['{program}.py', '--help']\n"
        "from ldmlab.app.cli import main\n"
        f"try: main('{program}')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'hydra'} & sys.modules.keys()"
    )
    assert result.returncode == 0, result.stderr
    assert "group=name" in result.stdout
    assert "--multirun" in result.stdout


def test_help_of_ldmlab_names_every_command_and_loads_no_torch() -> None:
    result = in_new_process(
        "import sys; from ldmlab.app.cli import dispatch; dispatch(['--help']); assert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr
    assert all(f"  {name}" in result.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself_without_torch(command: str) -> None:
    result = in_new_process(
        "import sys; from ldmlab.app.cli import dispatch\n"
        f"try: dispatch(['{command}', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr
    assert (f"usage: python {command}.py" if command in cli.WITH_HYDRA else cli.COMMANDS[command]) in result.stdout


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: cli.dispatch(["sampel"])) == 2
    assert "did you mean sample?" in capsys.readouterr().err


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean --guidance-scale"):
        cli.dispatch(["sample", "model", "a cat", "--guidence-scale", "3"])


def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "runs/x")

    assert run_command(full) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
