"""Folders of the user's own that a command could take for its own, and lists without a value."""

from pathlib import Path

import pytest

from ldmlab.app.cli import dispatch
from ldmlab.app.compose import compose, plain
from ldmlab.app.encode_splits import encode_splits
from ldmlab.app.evaluate import evaluate
from ldmlab.errors import InputError
from ldmlab.evaluation.run import check_out


def test_latents_replace_no_first_stage_and_lie_in_no_shards(tmp_path: Path) -> None:
    words = ["data=shards", "data.train=none", "data.val=none", "data.image_size=64", "from_run=emoji"]
    for name, why in (
        ("shards/manifest.json", "is a folder of shards itself"),
        ("run/first_stage/x", "would be replac"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
        out = tmp_path / Path(name).parts[0]
        with pytest.raises(InputError, match=f"out={out}.*{why}"):
            dispatch(["encode", *words, f"out={out}"])
    (tmp_path / "run" / "train").mkdir()
    (tmp_path / "run" / "train" / "encode.json").write_text("{}")  # latents that a killed command began
    for split in ("val", "train"):  # of this command, or added to what another one made
        with pytest.raises(InputError, match="none"):  # the shards are the next thing that is missing
            encode_splits(plain(compose("encode", [*words, f"splits=[{split}]", f"out={tmp_path / 'run'}"])))
    (tmp_path / "run" / "train" / "encode.json").write_text('{"fingerprint": "0123"}')
    with pytest.raises(InputError, match="run/train holds latents of another first stage"):
        dispatch(["encode", *words, "splits=[val]", f"out={tmp_path / 'run'}"])


def test_an_evaluation_replaces_no_report_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(InputError, match=r"holds report\.md, which would be replaced"):
        check_out(tmp_path)


def test_no_weights_are_no_evaluation() -> None:
    config = {"model": "emoji", "weights": [], "out": "unused", "protocol": {"name": "images"}}
    with pytest.raises(InputError, match=r"weights=\[\] names no weights"):
        evaluate(config)
