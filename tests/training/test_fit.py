"""Evaluation, checkpoints, panels and starts of a run, counted in our steps."""

import csv
import errno
import gc
import os
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from toy_stages import TwoGroups, diffusion_stage, image_batch, settings, train

from ldmlab import checkpoints
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.callbacks.noise_levels import NoiseLevels
from ldmlab.training.callbacks.panels import Panels
from ldmlab.training.callbacks.skipped import Skipped
from ldmlab.training.callbacks.throughput import Throughput
from ldmlab.training.checkpointing import Checkpoints, Files
from ldmlab.training.data_module import first_images
from ldmlab.training.fit import load_initial_weights
from ldmlab.training.loggers import read_metrics
from ldmlab.training.settings import TrainerSettings, trainer_node


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluations_are_exact_in_number_with_endless_data(tmp_path: Path) -> None:
    train(diffusion_stage(max_steps=10), tmp_path / "run", validate_every=4, log_every=3)
    held_out = [int(row["step"]) for row in table(tmp_path / "run") if row["val/loss"]]
    logged = [int(row["step"]) for row in table(tmp_path / "run") if row["loss"]]
    assert held_out == [4, 8, 10]
    assert logged == [1, 3, 6, 9, 10]


def test_checkpoints_hold_plain_types_and_the_newest_and_best_are_kept(tmp_path: Path) -> None:
    class Rigged(TwoGroups):
        def validation_metrics(self) -> dict[str, float]:
            return {"error": {2: 3.0, 4: 1.0, 6: 2.0}[self.step]}

    train(Rigged(max_steps=6), tmp_path / "run", validate_every=2, checkpoint_every=2, keep=2)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best_step_00000004_error_1.ckpt", "step_00000004.ckpt", "step_00000006.ckpt",
    ]  # fmt: skip
    best = torch.load(folder / "best_step_00000004_error_1.ckpt", weights_only=True)
    assert best["step"] == 4
    assert (folder / "best_step_00000004_error_1.ckpt").samefile(folder / "step_00000004.ckpt")  # written once
    assert best["notes"]["best"] == {"name": "error", "value": 1.0, "step": 4}
    assert set(best["modules"]) == {"main", "adversary"}
    assert {
        "kind",
        "step",
        "position",
        "seed",
        "averaged",
        "optimizers",
        "rng",
        "data",
        "format_version",
    } <= best.keys()


def test_the_best_checkpoint_of_an_older_run_gives_way_to_a_better_one(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    assert kept.best() is None
    checkpoints.save_checkpoint(tmp_path / "best.ckpt", {"step": 3})
    assert kept.best() == tmp_path / "best.ckpt"
    note = {"name": "kid", "value": -0.00125, "step": 5}
    checkpoints.save_checkpoint(kept.best_path(note), {"step": 5})
    kept.prune(note)
    assert [path.name for path in tmp_path.iterdir()] == ["best_step_00000005_kid_-0.00125.ckpt"]
    assert kept.best() == tmp_path / "best_step_00000005_kid_-0.00125.ckpt"
    assert kept.by_age() == []  # never taken up by a resumed run


def test_panels_and_numbers_of_the_callbacks(tmp_path: Path) -> None:
    watchers = [Panels(every=2), Throughput(), NoiseLevels(bins=5), Skipped()]
    train(diffusion_stage(max_steps=4), tmp_path / "run", callbacks=watchers, log_every=2)
    for name in ("samples", "val"):
        drawn = sorted((tmp_path / "run" / "samples" / name).iterdir())
        assert [p.name for p in drawn] == ["step_00000002.png", "step_00000004.png"]
        shown = Image.open(drawn[0])
        assert shown.width == 2 * 128 + 3 * 8  # four images of 8 x 8 in two columns, enlarged to hold their class
        assert shown.height > shown.width
    last = table(tmp_path / "run")[-1]
    assert float(last["speed/images_per_second"]) > 0
    assert float(last["memory/peak_gib"]) > 0
    assert sum(name.startswith("loss_by_noise/") for name in last) == 5
    assert last["data/skipped"] == "0"


def test_a_panel_is_drawn_from_the_same_seed(tmp_path: Path) -> None:
    stage = diffusion_stage(max_steps=1).eval()
    once, again = (stage.panels([image_batch(range(3)), image_batch(range(3, 9))]) for _ in range(2))
    assert torch.equal(once["samples"], again["samples"])
    assert once["samples"].shape == (4, 8, 8, 3)
    assert torch.equal(once["val"], image_batch(range(4))["image"].permute(0, 2, 3, 1))
    with pytest.raises(InputError, match="validation split is empty"):
        first_images([], 4)


def test_a_panel_of_stored_states_is_drawn_under_mixed_precision() -> None:
    batches = [{"position": torch.arange(3), "text.states": torch.ones(3, 5, 8, dtype=torch.float16)}] * 2
    with torch.autocast("cpu", torch.bfloat16):
        joined = first_images(batches, 4)
    assert joined["text.states"].shape == (4, 5, 8)
    assert joined["text.states"].dtype == torch.float16


def test_noise_levels_are_binned_by_their_share_of_the_schedule() -> None:
    class Fixed:
        extras = {"denoiser": {"loss": torch.tensor([1.0, 3.0, 5.0]), "level": torch.tensor([0.0, 0.19, 0.99])}}  # noqa: RUF012
        step_complete = row_due = True

        def __init__(self) -> None:
            self.row: dict[str, float] = {}
            self.log = self.row.__setitem__

    callback, stage = NoiseLevels(bins=5), Fixed()
    callback.on_train_batch_end(None, stage)
    assert stage.row == {"loss_by_noise/0.00": 2.0, "loss_by_noise/0.80": 5.0}
    stage.row.clear()
    stage.extras = {"denoiser": {"loss": torch.tensor([7.0]), "level": torch.tensor([0.5])}}
    callback.on_train_batch_end(None, stage)
    assert stage.row == {"loss_by_noise/0.40": 7.0}


def test_too_many_unreadable_images_stop_the_run(tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            batch["skipped"] += ["017: truncated"] * 5

    with pytest.raises(InputError, match=r"20 of 16 .* \(such as 017: truncated\).*max_fraction=0.01"):
        train(TwoGroups(), tmp_path / "run", callbacks=[Spoil(), Skipped()])


def resaved(path: Path, content: dict[str, Any]) -> None:
    """Another content, as it would have been saved."""
    content = {name: part for name, part in content.items() if name != "inventory"}
    checkpoints.save_checkpoint(path, {**content, "inventory": checkpoints.inventory(content)})


def test_other_data_is_refused_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(TwoGroups(max_steps=3), tmp_path / "run")
    content = load_checkpoint(path)
    resaved(path, {**content, "data": {"manifest_hash": "other"}})
    with pytest.raises(InputError, match="trained on other data"):
        train(TwoGroups(max_steps=6), tmp_path / "run")
    for best in path.parent.glob("best*"):
        best.unlink()
    resaved(path, {**content, "format_version": 99})
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        train(TwoGroups(max_steps=6), tmp_path / "run")
    assert "format 99" in capsys.readouterr().err


def test_a_run_keeps_how_its_batches_are_split(tmp_path: Path) -> None:
    path = train(TwoGroups(max_steps=3), tmp_path / "run")
    content = load_checkpoint(path)
    assert content["data"] == {"manifest_hash": "abc", "by_shard": True}
    resaved(path, {**content, "data": {"manifest_hash": "abc"}})  # as it was before shards were split among processes
    later = train(TwoGroups(max_steps=6), tmp_path / "run")
    assert load_checkpoint(later)["data"] == {"manifest_hash": "abc", "by_shard": False}


def test_a_full_disk_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(InputError, match="no space left for"):
        train(TwoGroups(), tmp_path / "run")
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.endswith((".part", ".ckpt"))]


def test_weights_to_start_from_must_fit_exactly() -> None:
    source, stage = diffusion_stage(), diffusion_stage()
    with torch.no_grad():
        source.diffusion.backbone.first.weight.add_(1)
    held = {name: dict(module.state_dict()) for name, module in source.saved().items()}
    load_initial_weights(stage, held)
    assert torch.equal(stage.diffusion.backbone.first.weight, source.diffusion.backbone.first.weight)
    held["denoiser"]["stray"] = held["denoiser"].pop("first.weight")
    with pytest.raises(InputError, match=r"1 tensors missing, 1 unknown, 0 of another shape \(such as first.weight\)"):
        load_initial_weights(stage, held)
    with pytest.raises(InputError, match="holds first_stage but no denoiser"):
        load_initial_weights(stage, {"first_stage": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"precision": "8-bit"},
            "trainer.precision=8-bit is unknown; choose auto or bf16-mixed or 16-mixed or 32-true",
        ),
        ({"precision": "16-mixed"}, "trainer.precision=16-mixed needs a CUDA GPU; use bf16-mixed or 32-true on a CPU"),
        ({"compile": "cuda_graphs"}, "trainer.compile=cuda_graphs needs a CUDA GPU; use true or false on a CPU"),
        ({"max_steps": 0}, "trainer.max_steps=0 must be at least 1"),
        ({"max_steps": 10**30}, "is more than any run can count; choose at most 1000000000000"),
        ({"averaging_decay": 1.0}, "trainer.averaging_decay=1.0 must lie"),
        ({"averaging_warmup": (1.0, 0.0)}, r"trainer.averaging_warmup=\[1.0, 0.0\] must be two numbers above 0"),
        ({"averaging_warmup": -0.1}, r"trainer.averaging_warmup=-0.1 must be two numbers above 0"),
        ({"averaging_start": -1}, "trainer.averaging_start=-1 must be 0 or a step"),
        ({"averaging_start": 5, "averaging_decay": None}, "averages of trainer.averaging_decay=None begin"),
        ({"gradient_clip": 0.0}, "trainer.gradient_clip=0.0 must be above 0"),
        ({"accelerator": "tpu"}, "trainer.accelerator=tpu"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**change).check_device()


@pytest.mark.parametrize(("bf16", "amx", "expected"), [(False, False, "32-true"), (True, False, "bf16-mixed")])
def test_automatic_precision_is_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert TrainerSettings(max_steps=1, micro_batch=1, accelerator="cpu", precision="auto").precision == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_epochs": 3}, "trainer.max_epochs=3: training counts steps; use trainer.max_steps"),
        ({"val_check_interval": 9}, "use trainer.validate_every"),
        ({"log_every_n_steps": 9}, "use trainer.log_every"),
        ({"enable_checkpointing": False}, "trainer.enable_checkpointing=False: a run is resumed by its checkpoints"),
        ({"use_distributed_sampler": True}, "reads its own part of the global order already"),
        ({"accumulate_grad_batches": 4, "accumulate": 2}, "=4 and trainer.accumulate=2 are two values of one option"),
        ({"profilr": "simple"}, "trainer.profilr: there is no such option"),
    ],
)
def test_arguments_of_the_trainer_that_contradict_a_run_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer_node({"max_steps": 4, "micro_batch": 2, **given})


def test_lightnings_names_of_our_options_are_taken() -> None:
    node = trainer_node({"max_steps": 4, "accumulate": 1, "accumulate_grad_batches": 4, "gradient_clip_val": 0.5})
    assert node == {"max_steps": 4, "accumulate": 4, "gradient_clip": 0.5}


def test_arguments_of_the_trainer_reach_it(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend([type(trainer.profiler).__name__, trainer.limit_val_batches, torch.is_anomaly_enabled()])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.global_step, batch["position"].tolist(), batch["key"]))

    lightning = {"profiler": "simple", "limit_val_batches": 0, "detect_anomaly": True, "overfit_batches": 2}
    train(TwoGroups(max_steps=4), tmp_path / "run", micro=1, lightning=lightning, callbacks=[Watch()])
    assert seen[:3] == ["SimpleProfiler", 2, True]  # overfit_batches sets how many are validated
    steps, positions, keys = zip(*seen[3:], strict=True)
    assert steps == (1, 2, 3, 4)  # not those of both optimizers
    assert keys == (["000"], ["001"], ["000"], ["001"])
    assert len({tuple(position) for position in positions}) == 4  # the noise is new
    with pytest.raises(InputError, match=r"trainer: Lightning refuses these options: .*limit_val_batches"):
        train(TwoGroups(max_steps=4), tmp_path / "other", lightning={"limit_val_batches": -3})


def test_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    stage = TwoGroups(max_steps=2)
    train(stage, tmp_path / "run", fast_dev_run=2)
    assert stage.step == 2
    assert not (tmp_path / "run").exists()
    train(TwoGroups(max_steps=2), tmp_path / "run")
    with pytest.raises(InputError, match=r"fast_dev_run=2 leaves nothing behind, but .* is of a run"):
        train(TwoGroups(max_steps=4), tmp_path / "run", fast_dev_run=2)
    assert settings(fast_dev_run=True).max_steps == 1


def test_what_is_logged_by_users_stands_in_the_rows(tmp_path: Path) -> None:
    class Mine(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.log("mine", float(pl_module.step))

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log("my/val", 7.0)

    train(TwoGroups(max_steps=8), tmp_path / "run", callbacks=[Mine()])
    found = {row["step"]: (row["mine"], row["my/val"]) for row in table(tmp_path / "run")}
    assert found == {"1": ("1", ""), "4": ("4", ""), "6": ("6", "7"), "8": ("8", "7")}


def test_the_state_of_a_callback_is_kept_and_must_be_plain(tmp_path: Path) -> None:
    class Counter(pl.Callback):
        def __init__(self, unit: Any = "batches") -> None:
            self.count, self.unit = 0, unit

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "unit": self.unit}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    for steps in (3, 5):
        counter = Counter()
        train(TwoGroups(max_steps=steps), tmp_path / "run", callbacks=[counter])
        assert counter.count == steps
    with pytest.raises(InputError, match=r"the state of .*Counter holds more than tensors and plain types"):
        train(TwoGroups(max_steps=3), tmp_path / "other", callbacks=[Counter(Path("here"))])
    assert not list((tmp_path / "other" / "checkpoints").glob("*"))


def test_what_only_watches_leaves_no_trace(tmp_path: Path) -> None:
    watching = {"num_sanity_val_steps": 1, "profiler": "simple", "enable_model_summary": False}
    for name, lightning in (("plain", {}), ("watched", watching)):
        stage = diffusion_stage(dropout=0.3, max_steps=6)
        train(stage, tmp_path / name, lightning=lightning, validate_every=2, callbacks=[pl.callbacks.Timer()])
    plain, watched = (
        load_checkpoint(tmp_path / n / "checkpoints" / "step_00000006.ckpt") for n in ("plain", "watched")
    )
    for part in ("modules", "averaged", "rng", "optimizers", "notes"):
        forked.same(plain[part], watched[part])
    assert table(tmp_path / "plain") == table(tmp_path / "watched")


@pytest.mark.slow
def test_what_a_checkpoint_held_is_freed_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    read = Files.load_checkpoint

    def watched(self: Files, *arguments: Any, **options: Any) -> dict[str, Any]:
        content = read(self, *arguments, **options)
        moments = content["optimizers"]["main"]["state"][0]["exp_avg"]
        held.extend([weakref.ref(content["modules"]["main"]["weight"]), weakref.ref(moments)])
        return content

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            freed.extend(ref() is None for ref in held)
            mapped.append(".ckpt" in Path("/proc/self/maps").read_text())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gc.collect()
            mapped.append(".ckpt" in Path("/proc/self/maps").read_text())

    freed: list[bool] = []
    mapped: list[bool] = []
    monkeypatch.setattr(Files, "load_checkpoint", watched)
    for steps in (4, 6):  # the opponent's optimizer has a state from step 3 on
        train(TwoGroups(max_steps=steps), tmp_path / "run", callbacks=[Watch()])
    assert freed == [True, True]
    assert mapped == [False] * 5 + [True] + [False] * 2  # the random state, until the first step; no view is left


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(TwoGroups(max_steps=3), tmp_path / "straight")
    write, begun, later = checkpoints._torch_save, threading.Event(), threading.Event()

    class Meet(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.step == 5:
                met.append(begun.wait(60))
                later.set()

    def slowly(content: dict[str, Any], path: Path) -> None:
        begun.set()
        met.append(later.wait(60))
        write(content, path)

    met: list[bool] = []
    monkeypatch.setattr(checkpoints, "_torch_save", slowly)
    train(TwoGroups(max_steps=6), tmp_path / "run", callbacks=[Meet()], validate_every=10)
    assert met == [True, True, True]  # step 5 was made before step 3 was written
    read = [load_checkpoint(tmp_path / n / "checkpoints" / "step_00000003.ckpt") for n in ("straight", "run")]
    for part in ("modules", "averaged", "optimizers", "rng", "step"):
        forked.same(read[0][part], read[1][part])


def test_the_best_is_a_copy_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("ldmlab.files.os.link", no_links)
    path = train(TwoGroups(max_steps=3), tmp_path / "run")
    (best,) = path.parent.glob("best*")
    assert best.read_bytes() == path.read_bytes()
    assert not best.samefile(path)


def test_what_keeps_a_checkpoint_from_being_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(content: dict[str, Any], path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "_torch_save", broken)
    with pytest.raises(InputError, match=r"step_00000003.ckpt was not written \(OSError\(5, 'Input/output error'\)\)"):
        train(TwoGroups(max_steps=4), tmp_path / "run", validate_every=10)


def test_the_best_checkpoint_resumes_a_run_whose_others_are_lost(tmp_path: Path) -> None:
    path = train(TwoGroups(max_steps=3), tmp_path / "run")
    path.unlink()
    stage = TwoGroups(max_steps=6)
    train(stage, tmp_path / "run")
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")[1]]
    assert stage.step == 6
    assert steps[0] == "1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"benchmark": 7}, "trainer.benchmark=7 does not fit; give true or false or null."),
        ({"limit_val_batches": "lots"}, "trainer.limit_val_batches=lots does not fit"),
        ({"min_steps": 2}, "trainer.min_steps=2: training goes to trainer.max_steps"),
    ],
)
def test_arguments_of_the_trainer_of_another_type(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        trainer_node({"max_steps": 4, "micro_batch": 2, **given})


def test_a_trial_of_fewer_than_one_step_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer\.fast_dev_run=-1 must be at least 1"):
        TrainerSettings(max_steps=3, micro_batch=1, fast_dev_run=-1)


@pytest.mark.parametrize(("micro", "processes", "accumulate"), [(50, 8, 3), (75, 8, 2), (60, 4, 5), (1200, 1, 1)])
def test_a_global_batch_is_made_of_micro_batches(
    micro: int, processes: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmlab.distributed.world_size", lambda: processes)
    assert TrainerSettings(max_steps=1, micro_batch=micro, global_batch=1200).accumulate == accumulate
    assert TrainerSettings(max_steps=1, micro_batch=micro, global_batch=1200, accumulate=accumulate).accumulate


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({"micro_batch": 60}, 8, "not made of micro-batches of 60 on 8 process(es); use trainer.micro_batch=50 or 75."),
        ({"micro_batch": 400}, 8, "use trainer.micro_batch=150."),
        ({"micro_batch": 60}, 7, "cannot be shared by 7 processes; use 1197 or 1204, or a number of processes that"),
        ({"micro_batch": 60, "accumulate": 4}, 1, "contradict each other: the batch takes 20 micro-batches of 60"),
        ({"micro_batch": 60, "global_batch": 0}, 1, "trainer.global_batch=0 must be a whole number"),
    ],
)
def test_a_global_batch_that_cannot_be_made_is_refused(
    given: dict[str, int], processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmlab.distributed.world_size", lambda: processes)
    with pytest.raises(InputError, match=re.escape(message)):
        TrainerSettings(max_steps=1, **{"global_batch": 1200, **given})  # type: ignore[arg-type]
