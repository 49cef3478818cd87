"""Files of tensors are whole or absent, hold data only, and are recognised by their weights."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from ldmlab import checkpoints
from ldmlab.checkpoints import (
    fingerprint,
    inventory,
    load_checkpoint,
    load_exactly,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from ldmlab.errors import InputError
from ldmlab.files import write_atomically
from ldmlab.sharded import STATE


def test_a_folder_whose_state_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000002.ckpt"
    folder.mkdir()
    (folder / STATE).write_bytes(b"junk")
    with pytest.raises(InputError, match="cannot be read as a checkpoint") as caught:
        load_checkpoint(folder)
    assert "mmap" not in str(caught.value)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"step": 3, "names": ["a"], "modules": {"net": {"w": torch.randn(2, 3, dtype=torch.bfloat16)}}}
    save_checkpoint(tmp_path / "deep" / "a.ckpt", content)
    back = load_checkpoint(tmp_path / "deep" / "a.ckpt")
    assert back["step"] == 3
    assert torch.equal(back["modules"]["net"]["w"], content["modules"]["net"]["w"])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.ckpt"]


class Payload:
    """Would run when a careless reader unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def test_files_that_would_run_code_or_are_damaged_are_refused(tmp_path: Path) -> None:
    torch.save({"modules": Payload()}, tmp_path / "evil.ckpt")
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 and no more")
    for name in ("evil.ckpt", "half.ckpt"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a checkpoint"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.ckpt")


def test_a_checkpoint_saved_again_with_other_weights_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    """Another layout of the same numbers in memory is the same content."""
    state = {"w": torch.randn(2, 3, 4, 4), "half": torch.ones(3, dtype=torch.bfloat16), "on": torch.tensor(True)}
    state |= {"part": torch.arange(9.0)[3:8], "none": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    content = {"step": 3, "modules": {"net": state}, "rng": [torch.arange(9, dtype=torch.uint8)]}
    saved = {**content, "inventory": inventory(content)}
    save_checkpoint(tmp_path / "a.ckpt", saved)
    assert load_checkpoint(tmp_path / "a.ckpt")["inventory"] == saved["inventory"]
    again = {**state, "w": state["w"].to(memory_format=torch.channels_last)}
    save_checkpoint(tmp_path / "a.ckpt", {**saved, "modules": {"net": again}})
    load_checkpoint(tmp_path / "a.ckpt")
    for name, tensor in state.items():
        if not tensor.numel():
            continue
        other = tensor.logical_not() if tensor.dtype == torch.bool else tensor * 1.01
        save_checkpoint(tmp_path / "b.ckpt", {**saved, "modules": {"net": {**state, name: other}}})
        for lazily in (False, True):
            with pytest.raises(InputError, match=r"b\.ckpt holds other weights than it was saved with"):
                load_checkpoint(tmp_path / "b.ckpt", lazily=lazily)
    for view in (torch.randn(4, 5)[..., :1], torch.zeros(1).expand(2**22, 2**22)):  # the latter would fill any memory
        save_checkpoint(tmp_path / "b.ckpt", {**saved, "modules": {"net": {**state, "w": view}}})
        with pytest.raises(InputError, match=r"b\.ckpt lacks a part that it was saved with"):
            load_checkpoint(tmp_path / "b.ckpt")
    save_checkpoint(tmp_path / "b.ckpt", {**saved, "step": 4})
    with pytest.raises(InputError, match=r"b\.ckpt lacks a part that it was saved with"):
        load_checkpoint(tmp_path / "b.ckpt")
    early = {**saved, "inventory": saved["inventory"][:16]}  # without the sums, as the first ones were
    save_checkpoint(tmp_path / "b.ckpt", {**early, "modules": {"net": {**state, "w": state["w"] + 1}}})
    assert load_checkpoint(tmp_path / "b.ckpt")["step"] == 3


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"step": 1})

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(InputError, match=r"no space left for .*a.ckpt"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def fill(folder: Path) -> None:
    """A limit on the size of files is the nearest thing to a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for save in (save_checkpoint, save_tensors):
        with pytest.raises(InputError, match="no space left for"):
            save(folder / "big", {"w": torch.zeros(10**6)})


def test_a_file_that_cannot_grow_ends_in_one_sentence(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_other_failures_keep_their_own_error(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        write_atomically(tmp_path / "a", broken)
    assert not list(tmp_path.iterdir())


def test_state_dicts_in_safetensors(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    save_tensors(tmp_path / "net.safetensors", net.state_dict(), {"kind": "toy"})
    back = load_tensors(tmp_path / "net.safetensors")
    assert torch.equal(back["weight"], net.weight)
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(data[:-4])
    with pytest.raises(InputError, match="is damaged"):
        load_tensors(tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="is missing"):
        load_tensors(tmp_path / "absent.safetensors")


def test_tensors_must_fit_exactly() -> None:
    net = nn.Linear(3, 2)
    load_exactly(net, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "file")
    assert net.weight.sum() == 6
    with pytest.raises(InputError, match="1 tensors missing, 1 unknown, 1 of another shape"):
        load_exactly(net, {"weight": torch.ones(3, 3), "scale": torch.ones(2)}, "file")


def test_a_fingerprint_is_of_values_not_of_order_or_layout() -> None:
    a = {"x": torch.randn(2, 3, 4, 4), "n": torch.tensor(3)}
    same = {"n": a["n"].clone(), "x": a["x"].to(memory_format=torch.channels_last)}
    assert fingerprint(a) == fingerprint(same)
    assert len(fingerprint(a)) == 16
    changed = {**a, "x": a["x"].clone()}
    changed["x"].view(-1)[5] += 1e-3
    others = [
        changed,
        {**a, "y": a["x"]},
        {"x": a["x"].half(), "n": a["n"]},
        {"x": a["x"].reshape(6, 4, 4), "n": a["n"]},
    ]
    assert len({fingerprint(a), *(fingerprint(o) for o in others)}) == 5


_REAL = [  # name, content, what the message must say it is
    ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "Git LFS pointer"),
    ("a.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "Git LFS pointer"),
    ("a.safetensors", b"\n<!DOCTYPE html><html>404</html>", "web page"),
    ("a.ckpt", b"<html>sign in</html>", "web page"),
    ("a.safetensors", pickle.dumps({"a": 1}), "a pickle"),
    ("a.safetensors", b"PK\x03\x04" + bytes(40), "archive as torch.save"),
    ("a.ckpt", b"PK\x03\x04" + bytes(40), "archive as torch.save"),
    ("a.ckpt", b"", "empty"),
    ("a.safetensors", b"", "empty"),
    ("a.safetensors", bytes(5000), "zeros"),
    ("a.ckpt", b"\x1f\x8b\x08\x00" + bytes(30), "gzip"),
    ("a.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(30), "an image"),
    ("a.safetensors", (90).to_bytes(8, "little") + b'{"w":{', "within its header"),
]


@pytest.mark.parametrize(("name", "content", "kind"), _REAL)
def test_a_file_under_a_wrong_name_is_called_what_it_is(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=kind) as refusal:
        (load_tensors if name.endswith("safetensors") else load_checkpoint)(tmp_path / name)
    assert "weights_only" not in str(refusal.value)
    assert str(tmp_path / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_safetensors_under_the_name_of_a_checkpoint_and_code_in_either_format(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.ckpt", {"w": torch.ones(3)})
    with pytest.raises(InputError, match="it is a safetensors file"):
        load_checkpoint(tmp_path / "a.ckpt")
    for zipped in (True, False):
        torch.save({"modules": Payload()}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"refers to \w+\.system, which could run any code") as refusal:
            load_checkpoint(tmp_path / "evil.ckpt")
        assert "weights_only" not in str(refusal.value)
