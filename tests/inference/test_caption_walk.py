"""How many files a caption passes from `ldmlab sample` to the image, by following the calls of a real run."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

import ldmlab
from ldmlab.app.cli import dispatch
from sampling_models import tiny_model

ROOT = f"{Path(ldmlab.__file__).parent}/"
CAPTION = "a red apple"


def holds(value: Any, depth: int = 0) -> bool:
    """The caption, a tensor, or what contains one of them."""
    if isinstance(value, str | Tensor):
        return isinstance(value, Tensor) or value == CAPTION
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth < 3 and any(holds(one, depth + 1) for one in inside)


def imported(frame: FrameType | None) -> bool:
    """Whether a call belongs to the import of a file."""
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(ROOT)


def test_a_caption_passes_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("caption")
    monkeypatch.setattr("ldmlab.build.load", lambda *_, **__: model)
    entered: set[str] = set()
    passed: set[str] = set()

    def follow(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT) or imported(frame):
            return
        name = code.co_filename.removeprefix(ROOT)
        entered.add(name)
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 2]
        if any(holds(frame.f_locals.get(one)) for one in arguments):
            passed.add(name)

    sys.setprofile(follow)
    try:
        dispatch(["sample", "model", CAPTION, "--steps", "2", "--out", str(tmp_path / "out")])
    finally:
        sys.setprofile(None)
    assert (tmp_path / "out" / "000000.png").exists()
    walk, all_files = ({n for n in names if not n.startswith("nn/")} for names in (passed, entered))
    assert "conditioners/text.py" in walk  # bricks of networks (nn/) belong to their network
    assert len(walk) <= 17, sorted(walk)
    assert len(all_files) <= 22, sorted(all_files)  # also files that never see it: locks, progress, settings
