"""EDM's and EDM2's pickles are read as data: their tensors and arguments, and nothing that they name is run."""

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_import_class_models import first_stage
from torch import Tensor, nn

import ldmlab
from ldmlab.app import cli
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop.imported import read_network
from ldmlab.model_files import read_model
from modern_cases import assert_near, networks, weights_of

CASES = networks("edm") | networks("edm2")


def reconstruct(meta: dict[str, Any]) -> None:
    raise AssertionError("a network's pickle was run")


class Persistent(nn.Module):
    """A module that is pickled as `torch_utils.persistence` does it."""

    kind = "Block"

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": self.kind}
        return reconstruct, ({**meta, "state": self.__dict__},)


def official_pickle(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The file that the official program writes for a recorded network; its tensors."""
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = reconstruct  # type: ignore[attr-defined]
    state, _ = weights_of(CASES[name], name)
    root = Persistent()
    config = dict(CASES[name]["config"])
    root.kind, root._init_args = config.pop("precond", "Precond"), ()  # type: ignore[assignment]
    root._init_kwargs = config | {"device": torch.device("cpu")}  # type: ignore[assignment]
    for key, tensor in state.items():
        *parents, leaf = key.split(".")
        place: Any = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.ModuleDict() if parent in ("enc", "dec") else Persistent())
            place = place._modules[parent]
        if leaf in ("resample_filter", "freqs", "phases"):
            place.register_buffer(leaf, tensor)
        else:
            place.register_parameter(leaf, nn.Parameter(tensor))
    path.write_bytes(pickle.dumps({"ema": root, "loss_fn": Persistent(), "dataset_kwargs": {"path": "data.zip"}}))
    return state


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm2_narrow"])
def test_tensors_and_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = official_pickle(tmp_path / "network.pkl", name, monkeypatch)
    found, given = read_network(tmp_path / "network.pkl")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert given == {"precond": "Precond", **CASES[name]["config"]}


@pytest.mark.parametrize("name", ["edm_adm", "edm_ddpmpp", "edm_ncsnpp", "vp_ddpmpp", "edm2_class"])
@torch.no_grad()
def test_an_imported_network_gives_the_recorded_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arguments come from the file alone; networks of pixels need no first stage."""
    official_pickle(tmp_path / "network.pkl", name, monkeypatch)
    config, kind = CASES[name]["config"], CASES[name]["kind"]
    words = ["import", str(tmp_path / "network.pkl"), str(tmp_path / "out"), "--format", kind]
    if config["img_channels"] == 4:  # of latents
        words += ["--first-stage", str(first_stage(tmp_path / "stage", 4))]
    assert cli.dispatch(words) == 0
    left = {"edm2_class": "logvar_* (3 tensors) serve"}
    out = capsys.readouterr().out
    assert (left.get(name, "serve training alone") in out) == (name in left)
    _, recorded = weights_of(CASES[name], name)
    model = ldmlab.load(tmp_path / "out")
    diffusion = model.diffusion
    vector = None
    if config["label_dim"]:
        batch = {"class_id": recorded["labels"].argmax(1)}
        vector = diffusion.conditioners["class_label"](batch, diffusion.encode)
    for i, (x, sigma) in enumerate(zip(recorded["x"], recorded["sigma"], strict=True)):
        level = diffusion.path.level_at(float(sigma))
        row = Conditioning(vector=None if vector is None else vector[i : i + 1])
        assert_near(diffusion.denoiser(row)(level.alpha * x[None], level), recorded["out"][i : i + 1])
    if "augment_labels" in recorded:  # as training has them: further columns of the vector
        level, labels = diffusion.path.level_at(float(recorded["sigma"][0])), recorded["augment_labels"][:1]
        assert vector is not None
        row = Conditioning(vector=torch.cat([vector[:1], labels], dim=1))
        found = diffusion.denoiser(row)(level.alpha * recorded["x"][:1], level)
        assert_near(found, recorded["out_augmented"][:1])
    scale = config["img_channels"] - 2  # of the first stage: none, or by two
    images = model.sample(**({"class_id": [1]} if config["label_dim"] else {"count": 1}), steps=2, seed=0)
    assert images.shape == (1, config["img_resolution"] * scale, config["img_resolution"] * scale, 3)
    assert read_model(tmp_path / "out").spec["origin"] == {"format": kind}


class Command:
    """What a hostile file holds: a command that is run when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_nothing_that_a_file_names_is_run(tmp_path: Path) -> None:
    path, target = tmp_path / "network.pkl", tmp_path / "made"
    path.write_bytes(pickle.dumps({"ema": Command(target)}))
    with pytest.raises(InputError, match=r"holds no averaged network \(ema\)"):
        read_network(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # it would have run


def test_a_hostile_storage_is_refused(tmp_path: Path) -> None:
    """A tensor's bytes are a file of torch.save, which is read as data too."""

    class Bytes:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (pickle.dumps(Command(tmp_path / "made"), 2),)

    (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": Bytes()}))
    with pytest.raises(InputError, match="cannot be read as a network's pickle"):
        read_network(tmp_path / "network.pkl")
    assert not (tmp_path / "made").exists()
