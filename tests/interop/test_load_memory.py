"""`ldmlab.load` holds a model's weights once: nothing is allocated to be overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_models import describe, kl, unet, weights

import ldmlab
from ldmlab.checkpoints import save_checkpoint, save_tensors
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


@pytest.mark.parametrize("kind", ["model folder", "run"])
def test_weights_are_in_memory_once(folders: tuple[Path, Path, float], kind: str, tmp_path: Path) -> None:
    small = describe(kl(2), unet(4))
    write_model_folder(tmp_path / "small", small, weights(small))
    folder = folders[kind == "run"]
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(folder)]
    message = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    # a run's averages are read from the file's pages and kept: those pages count until the file is closed
    limit = 1.4 if kind == "model folder" else 2.4
    assert float(message.split()[-1]) < limit * folders[2], f"{message.strip()} of {folders[2]:.0f} MiB"
    assert float(message.split()[-1]) > 0.8 * folders[2]


def test_both_give_the_weights(folders: tuple[Path, Path, float]) -> None:
    model, run = (ldmlab.load(folder, device="cpu").diffusion for folder in folders[:2])
    assert not any(p.requires_grad for p in model.parameters())
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor + 1, run.backbone.state_dict()[name])
    for name, tensor in model.first_stage.state_dict().items():
        assert torch.equal(tensor, run.first_stage.state_dict()[name])
    raw = ldmlab.load(folders[1], weights="raw", device="cpu").diffusion
    assert torch.equal(raw.backbone.state_dict()["conv_in.weight"], model.backbone.state_dict()["conv_in.weight"])
