"""What `ldmlab score` writes, and over what it does not write."""

from pathlib import Path

import pytest

from ldmlab.app.cli import dispatch
from ldmlab.errors import InputError


@pytest.mark.parametrize("option", ["--out", "--npz"])
def test_a_file_of_the_users_is_not_written_over(option: str, tmp_path: Path) -> None:
    for name in ("own.json", "own.npz", "own.png"):
        (tmp_path / name).write_text('{"own": 1}')
    (tmp_path / "folder.json").mkdir()
    for name, why in (
        ("own.png", "does not end in"),
        ("own.json" if option == "--out" else "own.npz", "is there already"),
        *([("folder.json", "is there already")] if option == "--out" else []),
    ):
        with pytest.raises(InputError, match=f"{option} .*{why}"):
            dispatch(["score", str(tmp_path), str(tmp_path), "--features", "pixels", option, str(tmp_path / name)])
    assert (tmp_path / "own.npz").read_text() == '{"own": 1}'
