"""A run started again with other options: what applies is said, what the run keeps is refused, and files stay."""

import csv
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from format1_artefacts import config_of, unpack
from ldmlab import checkpoints
from ldmlab.app.wiring import train
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.resume import fate


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both old runs, gone on with to step 5 by this version."""
    folder = unpack(tmp_path_factory.mktemp("begun"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in ("first_stage", "model"):
            train(changed(run, {"trainer.max_steps": 5}))
    return folder


@pytest.fixture
def there(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in begun.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(begun)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(run: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration of the version before, with other values."""
    config = originals[run]() if run in originals else {}
    for name, value in changes.items():
        node: Any = config
        *path, last = name.split(".")
        for part in path:
            node = node[part]
        node[last] = value
    return config


def _original(run: str) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return config_of(unpack(Path(folder)) / run)


originals = {name: partial(_original, name) for name in ("first_stage", "model")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(run: str) -> dict[str, dict[str, str]]:
    with open(Path(run) / "metrics.csv", newline="") as file:
        return {row["step"]: row for row in csv.DictReader(file)}


REFUSED = [
    ("first_stage", {"data.mix": 4}, "data.mix=8 before, 4 now"),
    ("first_stage", {"data.flip": True}, "data.flip=false before, true now"),
    ("first_stage", {"data.balance": "class_id"}, "data.balance=null before, class_id now"),
    ("first_stage", {"loss.penalty_weights": {"kl": 1e-3}}, r"loss.penalty_weights.kl=1e-06 before, 0.001 now"),
    ("first_stage", {"loss.adversary.weight": 0.25}, "loss.adversary.weight=0.5 before, 0.25 now"),
    ("first_stage", {"first_stage.dropout": 0.5}, "first_stage.dropout=0.0 before, 0.5 now"),
    ("first_stage", {"optimizer.decay_vectors": False}, "optimizer.decay_vectors=true before"),
    ("first_stage", {"trainer.micro_batch": 8}, r"micro_batch \* accumulate \* processes=4 before, 8 now"),
    ("first_stage", {"trainer.averaging_decay": 0.5}, "trainer.averaging_decay=0.9 before, 0.5 now"),
    ("first_stage", {"init_from": "exported"}, "init_from=null before, exported now"),
    ("first_stage", {"seed": 5}, "seed=5 but"),
    ("model", {"diffusion.schedule.name": "cosine"}, "diffusion.schedule.name=scaled_linear before, cosine now"),
    ("model", {"stage.latent_scale": 0.18215}, "stage.latent_scale=measured before, 0.18215 now"),
    ("model", {"conditioner.class_label.drop": 0.5}, "conditioner.class_label.drop=0.1 before, 0.5 now"),
    ("model", {"conditioner": {}}, "conditioner"),
    ("model", {"backbone.dropout": 0.1}, "backbone.dropout=0.0 before, 0.1 now"),
    ("model", {"backbone.model_channels": 64}, "backbone.model_channels=32 before, 64 now"),
    ("model", {"backbone.num_res_blocks": 2, "data.mix": 2}, "backbone.num_res_blocks=1 before, 2 now; data.mix=8"),
    ("model", {"data.latents": None, "from_run": "exported"}, "trained on other data"),
]


@pytest.mark.parametrize(("run", "changes", "message"), REFUSED, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("steps", [5, pytest.param(8, marks=pytest.mark.slow)])  # not finished, finished
def test_what_a_run_keeps_is_refused_and_nothing_changes(
    run: str, changes: dict[str, Any], message: str, steps: int, there: Path
) -> None:
    before = contents(there)
    with pytest.raises(InputError, match=message):
        train(changed(run, {"trainer.max_steps": steps, **changes}))
    assert contents(there) == before


def test_a_finished_run_stays_byte_for_byte(there: Path) -> None:
    before = contents(there)
    for changes in ({}, {"optimizer.learning_rate": 1e-2}, {"trainer.max_steps": 4}):
        train(changed("model", {"trainer.max_steps": 5, **changes}))
    assert contents(there) == before


@pytest.mark.parametrize(
    ("changes", "column", "value"),
    [
        ({"optimizer.learning_rate": 2e-3}, "learning_rate/denoiser", 2e-3),
        ({"optimizer.betas": [0.5, 0.6], "optimizer.weight_decay": 0.5}, "learning_rate/denoiser", 1e-4),
        ({"lr_schedule.warmup_steps": 11}, "learning_rate/denoiser", 1e-4 * 6 / 12),
    ],
)
def test_what_applies_is_used_and_said(
    changes: dict[str, Any], column: str, value: float, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(changed("model", {"trainer.max_steps": 6, **changes}))
    assert float(rows("model")["6"][column]) == pytest.approx(value)
    printed = capsys.readouterr().out
    for name, now in changes.items():
        assert f"changed option: {name}=" in printed
        assert f"{now} now" in printed
    group = load_checkpoint(there / "model/checkpoints/step_00000006.ckpt")["optimizers"]["denoiser"]["param_groups"][0]
    assert list(group["betas"]) == changes.get("optimizer.betas", [0.9, 0.999])
    assert group["weight_decay"] == changes.get("optimizer.weight_decay", 0.01)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), True, "half", None])
def test_a_scale_that_no_latents_can_have_is_refused(scale: Any, there: Path) -> None:
    shown = {"True": "true", "None": "null"}.get(str(scale), scale)
    with pytest.raises(InputError, match=f"stage.latent_scale={shown}"):
        train(changed("model", {"run.dir": "new", "stage.latent_scale": scale}))
    assert not (there / "new").exists()


def test_moved_data_and_another_machine_are_no_change(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "latents").rename(there / "moved")
    train(changed("model", {"trainer.max_steps": 6, "data.latents": "moved", "trainer.micro_batch": 2}
                  | {"trainer.global_batch": 4, "data.cache": True, "run.group": "other"}))  # fmt: skip
    assert "6" in rows("model")
    assert "changed option: trainer.max_steps=5 before, 6 now" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.yaml", "model.yaml", "metrics.csv", "provenance.json", "finished.json"])
@pytest.mark.parametrize("damage", [None, b"", b"[]\n[]\n", b"\xff\xfe\x00\n", b"loss,psnr\n1,2\n3,4\n"])
def test_checkpoints_are_enough(file: str, damage: bytes | None, there: Path) -> None:
    path = there / "first_stage" / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    train(changed("first_stage", {"trainer.max_steps": 6}))
    assert (there / "first_stage/checkpoints/step_00000006.ckpt").exists()
    assert rows("first_stage")["6"]["val/psnr"]


@pytest.mark.slow
def test_a_flipped_byte_anywhere_is_found_and_the_checkpoint_before_is_taken(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = there / "first_stage/checkpoints/step_00000005.ckpt"
    whole, choose = newest.read_bytes(), random.Random(3)
    for place in [choose.randrange(len(whole)) for _ in range(60)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << choose.randrange(8)
        newest.write_bytes(flipped)
        try:
            content = load_checkpoint(newest)
        except InputError:
            continue
        assert checkpoints.inventory({k: v for k, v in content.items() if k != "inventory"}) == content["inventory"]
        fresh = torch.load(newest, weights_only=True)
        newest.write_bytes(whole)
        same(fresh, load_checkpoint(newest))  # alignment padding between records, which nobody reads
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    newest.write_bytes(flipped)
    train(changed("first_stage", {"trainer.max_steps": 5}))
    assert "Trying the one before it" in capsys.readouterr().err


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)


@pytest.mark.parametrize("part", ["rng", "modules", "optimizers", "averaged", "notes", "metrics", "run", "seed"])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_checkpoint_without_a_part_ends_in_a_sentence(part: str, vouched: bool, there: Path) -> None:
    folder = there / "model/checkpoints"
    for old in folder.glob("step_0000000[1-4].ckpt"):
        old.unlink()
    path = folder / "step_00000005.ckpt"
    content = {name: value for name, value in load_checkpoint(path).items() if name != part}
    if vouched:
        content.pop("inventory")
        content["inventory"] = checkpoints.inventory(content)
    checkpoints.save_checkpoint(path, content)
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        train(changed("model", {"trainer.max_steps": 6}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "key"),
    [("optimizers", "denoiser"), ("modules", "denoiser"), ("modules", "latent_scale"), ("averaged", "denoiser")],
)
def test_an_inner_part_that_is_missing_ends_in_a_sentence(where: str, key: str, there: Path) -> None:
    path = there / "model/checkpoints/step_00000005.ckpt"
    content = load_checkpoint(path)
    del content[where][key]
    content.pop("inventory")
    checkpoints.save_checkpoint(path, {**content, "inventory": checkpoints.inventory(content)})
    with pytest.raises(InputError):
        train(changed("model", {"trainer.max_steps": 6}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimizer.learning_rate", "applied"),
        ("optimizer.learning_rate.x", "applied"),
        ("optimizer.new_option", "refused"),
        ("data.workers", "harmless"),
        ("data.new_option", "refused"),
        ("stage.anything", "refused"),
        ("callbacks.mine.every", "applied"),
        ("unknown", "refused"),
    ],
)
def test_an_option_that_nobody_listed_is_refused(name: str, expected: str) -> None:
    assert fate(name) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"data.train": "/nowhere"},
        {"data.val": "/nowhere"},
        {"first_stage.channels": 3},
        {"optimizer.learning_rate": float("nan")},
        {"optimizer.learning_rate": float("inf")},
        {"optimizer.betas": [2, 3]},
        {"optimizer.epsilon": 0},
        {"optimizer.weight_decay": float("nan")},
        {"trainer.gradient_clip": float("nan")},
        {"trainer.max_steps": 4.5},
        {"trainer.max_steps": None},
        {"trainer.accelerator": "gpu"},
        {"lr_schedule.warmup_steps": -1},
        {"lr_schedule.warmup_steps": 1.5},
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that must not be there")
def test_a_refused_start_leaves_no_folder(changes: dict[str, Any], there: Path) -> None:
    with pytest.raises(InputError):
        train(changed("first_stage", {"run.dir": None, "run.name": "new", **changes}))
    with pytest.raises(InputError):
        train(changed("first_stage", {"run.dir": "exactly", **changes}))
    assert not (there / "exactly").exists()
    assert not list(there.glob("**/new-*"))
