"""`ldmlab import` on whole official files of every family at small widths, and everything it must refuse."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from official_files import MODELS, VOCABULARY, official_state, small_config, stable_diffusion
from safetensors.torch import save_file
from torch import Tensor

import ldmlab
from ldmlab.app.cli import dispatch
from ldmlab.checkpoints import load_tensors
from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.interop import compvis
from ldmlab.interop.compvis import compvis_config
from ldmlab.interop.model_folders import new_folder
from ldmlab.samplers.ddim import Ddim
from write_kills import writes_of

QUICK = "ldm__lsun_churches256"  # scaled by a buffer, residual resampling, no conditions
SD = {
    "sd1": (stable_diffusion(1), 1),
    "sd1_inpainting": (stable_diffusion(1, inpainting=True), 1),
    "sd2": (stable_diffusion(2), 2),
    "sd2_v": (stable_diffusion(2, parameterization="v"), 2),
}


@pytest.fixture(autouse=True)
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few words for the text transformers, where fetched files lie."""
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/bert-base-uncased-vocab.txt").write_text("\n".join(VOCABULARY))


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], ending: str = ".ckpt") -> list[str]:
    """The file and its YAML; the command line that imports them to folder/model."""
    path = folder / f"official{ending}"
    if ending == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 12}, path)
    (folder / "official.yaml").write_text(yaml.safe_dump(config))
    return ["import", str(path), str(folder / "model"), "--config", str(folder / "official.yaml")]


def images(model: LoadedModel) -> Tensor:
    """Two images in three steps, with something in every field."""
    image = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).remainder(256).to(torch.uint8)
    fields: dict[str, Any] = {
        "class_id": torch.tensor([1, 2]),
        "caption": ["a red apple", "a"],
        "boxes": [[{"class_id": 3, "box": [0.0, 0.1, 0.5, 0.9]}], []],
        "segmentation": image[:, 0].long() % 7,
        "low_resolution": image[:, :, :8, :8],
        "image": image,
        "mask": (image[:, :1] > 100).to(torch.uint8),
    }
    settings = model.resolved(ldmlab.inference.sample_settings.SampleSettings(steps=5))
    batch = {name: value for name, value in fields.items() if name in model.reads}
    return model.diffusion.sample(
        batch, sampler=Ddim(), grid=model.grid(settings), index=torch.arange(2), size=(32, 32), seed=3
    )


def imported(arguments: list[str]) -> LoadedModel:
    assert dispatch(arguments) == 0
    return ldmlab.load(arguments[2], device="cpu")


def check_family(folder: Path, config: dict[str, Any], tower: int | None) -> None:
    """Import, sample, export, import again: the same description, tensors and images; averaged weights are others."""
    state = official_state(config, tower=tower)
    arguments = write(folder, config, state)
    model = imported(arguments)
    first = images(model)
    assert first.shape == (2, 3, 32, 32)
    assert bool(torch.isfinite(first).all())
    assert model.info["weights"] == "averaged"
    assert model.info["step"] == 12

    raw = compvis.load(arguments[1], arguments[4], weights="raw", device="cpu")
    assert not torch.equal(images(raw), first)

    spec = model.info["spec"]
    parts = {name: load_tensors(folder / f"model/{name}.safetensors") for name in _names(folder / "model")}
    exported, again = compvis.export(spec, parts)
    kept = {key for key in state if not key.startswith("model_ema.") and key != "scale_factor"}
    assert exported.keys() == {key for key in kept if not key.endswith("position_ids")}
    for key in exported.keys() - {key for key in exported if key.startswith("model.")}:
        torch.testing.assert_close(exported[key], state[key], atol=0, rtol=1e-6)
    second = folder / "second"
    second.mkdir()
    back = imported(write(second, again, exported, ".safetensors"))
    assert {**back.info["spec"], "step": 12, "weights": "averaged"} == spec
    assert torch.equal(images(back), first)


def _names(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.safetensors")]


@pytest.mark.slow
def test_a_family(tmp_path: Path) -> None:
    check_family(tmp_path, small_config(QUICK), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != QUICK])
def test_the_other_families(name: str, tmp_path: Path) -> None:
    check_family(tmp_path, small_config(name), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SD)
def test_stable_diffusion(name: str, tmp_path: Path) -> None:
    check_family(tmp_path, *SD[name])


@pytest.mark.slow
@pytest.mark.parametrize("inpainting", [False, True])
def test_stable_diffusion_1_needs_no_configuration(inpainting: bool, tmp_path: Path) -> None:
    config = stable_diffusion(1, inpainting=inpainting)
    state = official_state(config, averages=False, tower=1)
    arguments = write(tmp_path, config, state, ".safetensors")
    described, alone = compvis.read(arguments[1], arguments[4]), compvis.read(arguments[1])
    backbone = described.spec["backbone"] | {
        "attention_downsampling": [1, 2, 4]
    }  # from coarse to fine in the YAML file
    task = {"task": described.spec["task"] | {"image_size": 512}} if inpainting else {}
    assert alone.spec == described.spec | {"image_size": 512, "backbone": backbone} | task
    assert alone.weights == "raw"
    assert "one set of weights" in alone.notes[0]


@pytest.mark.slow
def test_stable_diffusion_2_must_be_told_its_prediction(tmp_path: Path) -> None:
    config = stable_diffusion(2)
    config["model"]["params"]["unet_config"]["params"] |= {"model_channels": 64, "num_head_channels": 64}
    path = write(tmp_path, config, official_state(config, averages=False, tower=2))[1]
    with pytest.raises(InputError, match=r"--prediction eps .* or --prediction v"):
        compvis.read(path)
    spec = compvis.read(path, prediction="v").spec
    assert spec["diffusion"]["prediction"]["_target_"].endswith("VPrediction")
    assert (spec["image_size"], spec["backbone"]["head_channels"]) == (768, 64)
    assert compvis.read(path, prediction="eps").spec["image_size"] == 512


@pytest.mark.slow
def test_half_precision_keeps_its_size(tmp_path: Path) -> None:
    config = small_config(QUICK)
    state = {key: t.half() if t.is_floating_point() else t for key, t in official_state(config).items()}
    model = imported(write(tmp_path, config, state, ".safetensors"))
    assert {t.dtype for t in load_tensors(tmp_path / "model/denoiser.safetensors").values()} == {torch.float16}
    assert {p.dtype for p in model.diffusion.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_stage_kl-f4", "first_stage_vq-f8"])
def test_a_first_stage_alone(name: str, tmp_path: Path) -> None:
    whole = small_config("ldm__lsun_churches256" if "kl" in name else "ldm__cin256")
    stage = whole["model"]["params"]["first_stage_config"]
    prefix = "first_stage_model."
    state = {
        key.removeprefix(prefix): tensor for key, tensor in official_state(whole).items() if key.startswith(prefix)
    } | {"loss.discriminator.main.0.weight": torch.ones(2)}
    arguments = write(tmp_path, {"model": stage}, state)
    assert dispatch(arguments) == 0
    assert compvis.read(arguments[1]).spec == compvis.read(arguments[1], arguments[4]).spec  # from shapes
    from ldmlab.build import load_first_stage

    stage_module = load_first_stage(tmp_path / "model").module
    direct = compvis.build_first_stage(stage["params"], state)
    for key, tensor in direct.state_dict().items():
        assert torch.equal(tensor, stage_module.state_dict()[key])
    exported, config = compvis.export(*_files(tmp_path / "model"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in exported.items())
    assert len(exported) == len(state) - 1
    assert (
        compvis.build_first_stage(config["model"]["params"], exported).state_dict().keys() == direct.state_dict().keys()
    )


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    spec = yaml.safe_load((folder / "model.yaml").read_text())
    return spec, {name: load_tensors(folder / f"{name}.safetensors") for name in _names(folder)}


# What can be wrong with a file or its configuration: changes of tensors, changes of params, words of the refusal.
CONFIG = small_config(QUICK)
STATE = official_state(CONFIG)
UNET = "model.diffusion_model."
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": (
        {f"{UNET}out.2.bias": None, "first_stage_model.quant_conv.bias": None},
        {},
        "first stage has 1 missing",
    ),
    "averaged missing": ({"model_ema.diffusion_modelout2bias": None}, {}, "averaged U-Net has 1 missing"),
    "unexpected": ({"control_model.x": torch.ones(1)}, {}, r"file has 1 unexpected \(control_model.x\)"),
    "inside": ({f"{UNET}extra.weight": torch.ones(1)}, {}, "U-Net has 1 unexpected"),
    "shape": ({f"{UNET}out.2.bias": torch.ones(5)}, {}, r"out.2.bias \[5\] instead of \[4\]"),
    "betas": ({}, {"linear_end": 0.0195}, "trained with 1000 betas 0.0015 .. 0.0155"),
    "scale": ({"scale_factor": None}, {}, "scale_by_std"),
    "conditioner": ({"cond_stage_model.x": torch.ones(2)}, {}, "the configuration has none"),
    "not a number": ({"first_stage_model.quant_conv.bias": torch.full((8,), torch.nan)}, {}, "not a number"),
    "infinite": ({"first_stage_model.quant_conv.bias": torch.full((8,), torch.inf)}, {}, "no numbers"),
    "prediction": ({}, {"parameterization": "x0"}, "parameterization: x0"),
    "own betas": ({}, {"given_betas": [0.1]}, "betas of its own"),
    "no unet": ({}, {"unet_config": None}, "describes no model|no unet_config"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    tensors, params, message = REFUSALS[name]
    state = {key: t for key, t in (STATE | tensors).items() if t is not None}
    described = {key: v for key, v in (CONFIG["model"]["params"] | params).items() if v is not None}
    weights = "raw" if name in ("missing", "inside", "shape") else "averaged"
    arguments = write(tmp_path, {"model": CONFIG["model"] | {"params": described}}, state)
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        dispatch([*arguments, "--weights", weights])
    assert set(tmp_path.iterdir()) == before


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    class Sly:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for zipped in (True, False):
        path = tmp_path / f"sly{zipped}.ckpt"
        torch.save({"state_dict": {"a": torch.ones(1)}, "more": Sly()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="could run any code"):
            dispatch(["import", str(path), str(tmp_path / "model")])
    assert {p.name for p in tmp_path.iterdir()} == {"weights", "slyTrue.ckpt", "slyFalse.ckpt"}


def test_notes_of_old_trainers_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from ldmlab.interop.imported import read_weights

    name = "pytorch_lightning.old_callbacks"
    module = types.ModuleType(name)
    module.Old = type("Old", (), {"__module__": name})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    old = module.Old()
    old.best = 3
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": {module.Old: old}}, tmp_path / "old.ckpt")
    monkeypatch.delitem(sys.modules, name)
    state, step = read_weights(tmp_path / "old.ckpt")
    assert torch.equal(state["a"], torch.ones(1))
    assert step is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no file of torch", "cannot be read"), (b"", "cannot be read"), (None, "does not exist")],
)
def test_broken_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        dispatch(["import", str(path), str(tmp_path / "model")])


def test_a_configuration_that_grows_without_limit_is_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"config=\S+bomb\.yaml: .* repeats its values"):
        compvis_config.read_config(tmp_path / "bomb.yaml")
    with pytest.raises(InputError, match=r"config=\S+absent\.yaml: .* is missing"):
        compvis_config.read_config(tmp_path / "absent.yaml")


@pytest.mark.slow
def test_an_import_that_was_killed_at_any_write_is_done_again(tmp_path: Path) -> None:
    words = write(tmp_path, small_config(QUICK), official_state(small_config(QUICK)))
    before = set(tmp_path.iterdir())
    writes = writes_of(words, tmp_path)
    names = ("README.md", "denoiser.safetensors", "first_stage.safetensors", "model.yaml")
    contents = {tmp_path / "model" / name: (tmp_path / "model" / name).read_bytes() for name in names}
    for moment in [*range(2, writes, 5), writes]:
        shutil.rmtree(tmp_path / "model")
        writes_of(words, tmp_path, moment)
        if not (tmp_path / "model").exists():
            writes_of(words, tmp_path)
            assert set(tmp_path.iterdir()) == {*before, tmp_path / "model"}  # nor what the killed one left
        assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == contents


def test_what_a_killed_writer_left_of_the_same_folder_goes(tmp_path: Path) -> None:
    others = [tmp_path / name for name in (".model.b.01234567.part", ".model2.01234567.part", "model.01234567.part")]
    for folder in (tmp_path / ".model.01234567.part", *others):
        folder.mkdir()
        (folder / "denoiser.safetensors").write_text("half")
    with new_folder(tmp_path / "model") as folder:
        (folder / "model.yaml").write_text("whole")
    assert set(tmp_path.iterdir()) == {tmp_path / "weights", tmp_path / "model", *others}


def test_out_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        dispatch(["import", str(tmp_path / "any.ckpt"), str(tmp_path / "model")])
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]
