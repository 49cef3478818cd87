"""Weights beside model.yaml are the files it was written for."""

import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from ldmlab.build import load_first_stage
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_model, write_description, write_model_folder

NODE = {
    "_target_": "ldmlab.first_stages.kl.KLAutoencoder",
    "channels": 8,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "latent_channels": 2,
    "norm_groups": 4,
}
SPEC = {"kind": "first_stage", "image_size": 16, "first_stage": NODE}


def write(folder: Path, seed: int = 0) -> Path:
    """A model folder of a first stage with random weights; its file of weights."""
    torch.manual_seed(seed)
    write_model_folder(folder, SPEC, {"first_stage": instantiate(NODE, where="first_stage").state_dict()})
    return folder / "first_stage.safetensors"


@pytest.mark.parametrize("part", ["header", "first", "middle", "last"])
def test_a_flipped_bit_is_refused_with_the_file_named(tmp_path: Path, part: str) -> None:
    file = write(tmp_path / "model")
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    place = {"header": length // 2, "first": length, "middle": (length + len(content)) // 2, "last": len(content) - 1}
    content[place[part]] ^= 1 << random.Random(part).randrange(8)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"first_stage\.safetensors (has another SHA-256|is damaged)"):
        load_first_stage(tmp_path / "model")


def test_weights_of_another_model_of_the_same_shape_are_refused(tmp_path: Path) -> None:
    file, other = write(tmp_path / "model"), write(tmp_path / "other", seed=1)
    shutil.copy(other, file)
    with pytest.raises(InputError, match=r"first_stage\.safetensors has another SHA-256 than model\.yaml lists"):
        load_first_stage(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model").unlink()
    with pytest.raises(InputError, match=r"first_stage\.safetensors is missing although model\.yaml lists it"):
        load_first_stage(tmp_path / "model")


def test_a_description_is_not_written_again_for_exchanged_weights(tmp_path: Path) -> None:
    file, other = write(tmp_path / "model"), write(tmp_path / "other", seed=1)
    shutil.copy(other, file)
    with pytest.raises(InputError, match="another SHA-256"):
        write_description(tmp_path / "model", SPEC)


def test_folders_without_hashes_load(tmp_path: Path) -> None:
    write(tmp_path / "model")
    description = tmp_path / "model" / "model.yaml"
    content = yaml.safe_load(description.read_text())
    assert list(content.pop("sha256")) == ["first_stage.safetensors"]
    description.write_text(yaml.safe_dump(content))
    assert set(read_model(tmp_path / "model").parts) == {"first_stage"}


@pytest.mark.parametrize(
    "value", [None, 3, "abc", ["first_stage.safetensors"], {"first_stage.safetensors": None}, {3: 4}]
)
def test_hashes_of_a_wrong_type_end_in_a_sentence(tmp_path: Path, value: object) -> None:
    write(tmp_path / "model")
    description = tmp_path / "model" / "model.yaml"
    description.write_text(yaml.safe_dump(yaml.safe_load(description.read_text()) | {"sha256": value}))
    with pytest.raises(InputError):
        read_model(tmp_path / "model")


def test_a_changed_value_of_a_description_is_said(tmp_path: Path) -> None:
    write(tmp_path / "model")
    description = tmp_path / "model" / "model.yaml"
    content = yaml.safe_load(description.read_text())
    description.write_text(yaml.safe_dump(content | {"image_size": 32}))
    with pytest.warns(UserWarning, match=r"model\.yaml is not as it was written.* set fingerprint: '\w{16}' there"):
        read_model(tmp_path / "model")
    write_description(tmp_path / "model", SPEC | {"image_size": 32})
    description.write_text(description.read_text() + "notes: {2024-01-01: 1}\n")  # a name that is no text
    with pytest.warns(UserWarning, match="is not as it was written"):
        read_model(tmp_path / "model")
    write_description(tmp_path / "model", SPEC | {"image_size": 32})
    with warnings.catch_warnings(action="error"):
        read_model(tmp_path / "model")


@pytest.mark.parametrize("key", ["averaged", "modules"])
@pytest.mark.parametrize("value", [None, 3, "text", [1], {"denoiser": None}, {"denoiser": {"w": 3}}])
def test_a_checkpoint_of_other_content_ends_in_a_sentence(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    path = tmp_path / "run" / "checkpoints" / "step_00000001.ckpt"
    torch.save({"modules": {"denoiser": {"w": torch.ones(2)}}, "averaged": {}, "step": 1, key: value}, path)
    with pytest.raises(InputError, match=r"step_00000001\.ckpt is not a checkpoint of ours"):
        read_model(tmp_path / "run")
