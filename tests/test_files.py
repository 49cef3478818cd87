"""Atomic writes and locks: what a kill, a full disk or a second process may leave."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

from ldmlab import disks, model_files
from ldmlab.disks import FileLock, disk_sentence, locked, own_folder
from ldmlab.errors import InputError
from ldmlab.files import by_step, read_json, write_atomically, write_json, write_text


def test_text_and_json_are_written_and_read(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\n".encode()
    write_json(tmp_path / "a.json", {"b": ["é", None]})
    assert read_json(tmp_path / "a.json") == {"b": ["é", None]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "new"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000, b'{"half a pair": "\\ud83d"}'])
def test_a_damaged_json_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "none.json") is None
    os.mkfifo(tmp_path / "pipe.json")
    assert read_json(tmp_path / "pipe.json") is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left for /x/y; free some disk space"),
        (errno.EDQUOT, "no space left for /x/y"),
        (errno.EROFS, "/x/y cannot be written because its disk is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, None),
    ],
)
def test_faults_of_the_disk_are_told_apart(number: int, words: str | None) -> None:
    sentence = disk_sentence(OSError(number, os.strerror(number)), "/x/y")
    assert sentence is None if words is None else words in str(sentence)


def no_record_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.fixture(params=["record lock", "exclusive file"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "exclusive file":
        monkeypatch.setattr(disks.fcntl, "lockf", no_record_locks)
    return str(request.param)


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a forked process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(function(*arguments)))
    process.start()
    process.join()
    return queue.get()


def taken(path: Path) -> bool:
    disks._HELD.clear()  # a fork starts with its parent's
    return FileLock(path).take()


def test_one_process_at_a_time(tmp_path: Path, system: str) -> None:
    lock = FileLock(tmp_path / ".lock")
    assert lock.take()
    assert not FileLock(tmp_path / ".lock").take()  # nor twice in one process
    assert lock.holder() == "this process"
    assert not elsewhere(taken, tmp_path / ".lock")
    lock.release()
    lock.release()
    assert elsewhere(taken, tmp_path / ".lock")


def test_one_thread_of_a_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FileLock._lock

    def slow(self: FileLock, file: IO[str]) -> bool:
        time.sleep(0.05)  # so that both threads are between looking and taking
        return lock(self, file)

    monkeypatch.setattr(FileLock, "_lock", slow)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: FileLock(tmp_path / ".lock").take(), range(4))) == 1
    disks._HELD.clear()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, system: str) -> None:
    assert elsewhere(taken, tmp_path / ".lock")  # it ended without releasing
    lock = FileLock(tmp_path / ".lock")
    assert lock.take()
    lock.release(remove=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("signature", "free"),
    [
        ({"host": "another-machine", "pid": 1, "started": None}, False),
        ({"host": disks.socket.gethostname(), "pid": os.getppid(), "started": None}, False),
        ({"host": disks.socket.gethostname(), "pid": os.getppid(), "started": "0"}, True),  # the number is used again
        ({"host": disks.socket.gethostname(), "pid": 2**22 + 1, "started": "7"}, True),
        ({"host": disks.socket.gethostname(), "pid": "x", "started": "7"}, False),
        ("half", False),  # perhaps being written at this moment
    ],
)
def test_whose_exclusive_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signature: Any, free: bool
) -> None:
    monkeypatch.setattr(disks.fcntl, "lockf", no_record_locks)
    (tmp_path / ".lock.held").write_text(json.dumps(signature) if isinstance(signature, dict) else signature)
    lock = FileLock(tmp_path / ".lock")
    assert lock.take() is free
    lock.release()


def test_a_held_lock_refuses_with_its_holder(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from ldmlab.disks import locked
        with locked(Path({str(tmp_path)!r}) / ".lock", "OUT is in use"):
            print("held", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        sentence = rf"OUT is in use \(process {holder.pid} on .*\); wait"
        with pytest.raises(InputError, match=sentence), locked(tmp_path / ".lock", "OUT is in use"):
            raise AssertionError("both hold it")
    finally:
        holder.communicate("")
    with locked(tmp_path / ".lock", "OUT is in use", remove=True):
        pass
    assert not (tmp_path / ".lock").exists()


def test_waiting_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = FileLock(tmp_path / ".lock")
    assert lock.take()
    monkeypatch.setattr(disks.time, "sleep", lambda _: lock.release())
    with locked(tmp_path / ".lock", "OUT is in use", wait=True):
        assert "waiting for it" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's folder of processes")
@pytest.mark.parametrize("path", ["/proc/out.txt", f"{'../' * 20}proc/out.txt", "/proc/out/a/b.txt"])
def test_a_place_that_takes_no_files(path: str) -> None:
    with pytest.raises(InputError, match=r"/out(\.txt)? cannot be made because \S*proc takes no new files"):
        write_text(Path(path), "text")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's folder of processes")
def test_a_lock_in_a_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(InputError, match=r"/proc/out.lock cannot be (made|written)"):
        FileLock(Path("/proc/out.lock")).take()


# ---- files of steps, a folder for one command


def test_files_of_steps_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["step_99999999.ckpt", "step_00000500.ckpt", "step_100000000.ckpt"]
    for name in (*names, "step_00000500.png", "step_5.ckpt", "step_00000500-copy.ckpt", "best_step_00000500.ckpt"):
        (tmp_path / name).touch()
    assert [path.name for path in by_step(tmp_path, ".ckpt")] == [names[1], names[0], names[2]]


def test_a_run_is_loaded_from_the_checkpoint_of_its_last_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(InputError, match="no finished checkpoint"):
        model_files._locate(tmp_path)
    for step in (99_999_900, 100_000_000):
        (folder / f"step_{step:08d}.ckpt").touch()
    assert model_files._locate(tmp_path) == (tmp_path, folder / "step_100000000.ckpt")


def test_a_folder_is_for_one_command_and_goes_if_nothing_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    busy = "out={} is in use"
    with own_folder(lambda: out, ".lock", busy) as folder:
        assert folder == out
        with (
            pytest.raises(InputError, match=r"out=\S+ is in use \(this process\)"),
            own_folder(lambda: out, ".lock", busy),
        ):
            pass
        assert sorted(path.name for path in out.iterdir()) == [".lock"]
    assert not out.exists()
    with own_folder(lambda: out, ".lock", busy):
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]
