"""`ldmlab doctor` says what is here, and each fault with its way out."""

import errno
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from ldmlab.app.cli import dispatch
from ldmlab.app.commands import doctor
from ldmlab.interop.published_weights import WEIGHTS


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("LDMLAB_PLUGINS", raising=False)


def test_a_sound_machine_ends_with_0_and_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert not dispatch(["doctor"])
    out = capsys.readouterr().out
    assert version("torch") in out
    assert "`ldmlab fetch inception` (91 MiB); Apache-2.0" in out
    assert out.endswith("nothing is wrong\n")


def test_damaged_weights_are_named_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights" / WEIGHTS["inception"].file
    path.parent.mkdir()
    path.write_bytes(b"half of it")
    assert dispatch(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"1 to mend:\n  {path} is damaged; delete it and run `ldmlab fetch inception`." in out


def test_a_plugin_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ldmlab.plugins.by_entry_point", lambda: frozenset({"no_such_lab"}))
    assert dispatch(["doctor"]) == 1
    assert "no_such_lab is not installed; run `pip install no-such-lab`" in capsys.readouterr().out


def test_a_full_disk_and_small_shared_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    assert dispatch(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "has 0.1 GiB left; free some space." in out
    if Path("/dev/shm").is_dir():
        assert "/dev/shm has 0.06 GiB for the batches of workers; `docker run --shm-size=8g`, or data.workers=0." in out


def test_a_package_that_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = ["torch>=99", "no-such-package>=1", "optuna>=99; extra == 'cluster'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    assert dispatch(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"torch: {version('torch')} instead of >=99; run `pip install 'torch>=99'`." in out
    assert "no-such-package: missing; run `pip install 'no-such-package>=1'`." in out
    assert "pip install 'ldmlab[cluster]'" in out


def test_a_folder_that_may_not_be_read_is_a_finding_and_the_rest_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "here")
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/weights")

    monkeypatch.setattr(doctor, "weights", refused)
    assert dispatch(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "/closed/weights cannot be read (permission denied); make it readable" in out
    assert "plugins" in out.partition("/closed")[2]
