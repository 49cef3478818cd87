"""`ldmlab.load` holds a model's weights once: nothing is allocated to be overwritten."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from exported_models import describe, kl, unet, weights

import ldmlab
from ldmlab.checkpoints import inventory, load_checkpoint, save_checkpoint, save_tensors
from ldmlab.model_files import write_description, write_model_folder

PROGRAM = """
import sys
import ldmlab

def peak():  # MiB; getrusage would count the parent's memory
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

ldmlab.load(sys.argv[1], device="cpu")  # brings the imports
before = peak()
model = ldmlab.load(sys.argv[2], device="cpu")
assert not any(p.is_meta for p in model.diffusion.parameters())
print("took", peak() - before)
"""


def size(parts: dict[str, dict[str, torch.Tensor]]) -> float:
    """MiB."""
    return sum(t.nbytes for part in parts.values() for t in part.values()) / 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """The same weights as a model folder and as a run, whose checkpoint holds them four times; and their MiB."""
    root = tmp_path_factory.mktemp("models")
    spec = describe(kl(2), unet(4, model_channels=96, num_res_blocks=2, channel_mult=[1, 2, 2]))
    parts = weights(spec)
    write_model_folder(root / "model", spec, parts)
    (root / "run").mkdir()
    save_tensors(root / "run" / "first_stage.safetensors", parts["first_stage"])
    averaged = {name: tensor + 1 for name, tensor in parts["denoiser"].items()}
    optimizer = [{name: torch.zeros_like(tensor) for name, tensor in averaged.items()} for _ in range(2)]
    content = {"modules": {"denoiser": parts["denoiser"]}, "averaged": {"denoiser": {"weights": averaged}}, "step": 1}
    save_checkpoint(root / "run" / "checkpoints" / "step_00000001.ckpt", {**content, "optimizer": optimizer})
    write_description(root / "run", spec)
    return root / "model", root / "run", size(parts)


@pytest.fixture(scope="module")
def in_parts(folders: tuple[Path, Path, float], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, had three processes trained it: rows of every tensor in three files, as the documentation has it."""
    run = tmp_path_factory.mktemp("parts") / "run"
    shutil.copytree(folders[1], run)
    file = run / "checkpoints" / "step_00000001.ckpt"
    content, shards = load_checkpoint(file), [{}, {}, {}]
    file.unlink()

    def cut(part: Any, path: str) -> Any:
        if isinstance(part, dict):
            return {name: cut(value, f"{path}/{name}") for name, value in part.items()}
        if isinstance(part, list):
            return [cut(value, f"{path}/{index}") for index, value in enumerate(part)]
        if not isinstance(part, torch.Tensor):
            return part
        begin = 0
        for shard, rows in zip(shards, part.tensor_split(3), strict=True):
            if len(rows):
                shard[f"{path}@{','.join(map(str, [begin] + [0] * (part.ndim - 1)))}"] = rows.contiguous()
            begin += len(rows)
        return part.to("meta")

    content = cut(content, "")
    for number, shard in enumerate(shards):
        save_tensors(file / f"shard_{number:05d}.safetensors", shard)
    content["shards"] = {
        f.name: [f.stat().st_size, google_crc32c.value(f.read_bytes())] for f in file.glob("*.safetensors")
    }
    save_checkpoint(file / "state.ckpt", {**content, "inventory": inventory(content)})
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model folder", "run", "run in parts"])
def test_weights_are_in_memory_once(
    folders: tuple[Path, Path, float], in_parts: Path, kind: str, tmp_path: Path
) -> None:
    small = describe(kl(2), unet(4))
    write_model_folder(tmp_path / "small", small, weights(small))
    folder = {"model folder": folders[0], "run": folders[1], "run in parts": in_parts}[kind]
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(folder)]
    message = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    # a run's averages are read from the file's pages and kept: those pages count until the file is closed
    limit = 1.4 if kind == "model folder" else 2.4
    assert float(message.split()[-1]) < limit * folders[2], f"{message.strip()} of {folders[2]:.0f} MiB"
    assert float(message.split()[-1]) > 0.8 * folders[2]


@pytest.mark.slow
def test_a_run_in_parts_gives_the_same_weights(folders: tuple[Path, Path, float], in_parts: Path) -> None:
    for kind in ("averaged", "raw"):
        whole = ldmlab.load(folders[1], weights=kind, device="cpu").diffusion.state_dict()
        for path in (in_parts, in_parts / "checkpoints" / "step_00000001.ckpt"):
            read = ldmlab.load(path, weights=kind, device="cpu").diffusion.state_dict()
            assert read.keys() == whole.keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())


def test_both_give_the_weights(folders: tuple[Path, Path, float]) -> None:
    model, run = (ldmlab.load(folder, device="cpu").diffusion for folder in folders[:2])
    assert not any(p.requires_grad for p in model.parameters())
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor + 1, run.backbone.state_dict()[name])
    for name, tensor in model.first_stage.state_dict().items():
        assert torch.equal(tensor, run.first_stage.state_dict()[name])
    raw = ldmlab.load(folders[1], weights="raw", device="cpu").diffusion
    assert torch.equal(raw.backbone.state_dict()["conv_in.weight"], model.backbone.state_dict()["conv_in.weight"])
