"""conf/experiment/modern/dc_ae_*: the three phases of deep-compression first stages, one starting from the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from paper_experiments import composed, header, settings

from ldmlab.app.compose import group_choices
from ldmlab.app.wiring import train
from ldmlab.build import load_first_stage
from scenes import write_scenes

ROOT = Path(__file__).parents[2]
PHASES = [name for name in group_choices("experiment") if name.startswith("modern/dc_ae_")]
F32 = [name for name in PHASES if "f32" in name]


@pytest.mark.parametrize("name", PHASES)
def test_a_header_is_complete(name: str) -> None:
    told, phase = header(name), int(name[-1])
    start = f" init_from=PHASE_{phase - 1}" if phase > 1 else ""
    assert f"python train.py experiment={name}{start}" in told["commands"]
    assert told["Settings"] == [settings(composed(name))]
    assert told["Cost"]
    assert told["Score"]
    assert told["assumed"]
    assert [x for x in (ROOT / "docs/experiments.md").read_text().splitlines() if x.startswith(f"| `{name}` |")]


def reduced(name: str, root: Path) -> dict[str, Any]:
    """The experiment on the scenes with a narrow network and two steps; all else as it is."""
    config = composed(name)
    config["data"] |= {"train": f"{root}/train", "val": f"{root}/val", "workers": 0}
    config["data"]["image_size"] //= 4
    for side in ("encoder", "decoder"):
        widths = config["first_stage"][f"{side}_block_out_channels"]
        config["first_stage"][f"{side}_block_out_channels"] = [width // 32 for width in widths]
        config["first_stage"][f"{side}_layers_per_block"] = [0] + [1] * (len(widths) - 1)
    config["first_stage"] |= {"latent_channels": 16, "attention_head_dim": 8}
    config["loss"]["lpips_weight"] = 0.0  # its weights are not here
    if config["loss"]["adversary"]:
        config["loss"]["adversary"]["discriminator"] |= {"channels": 8, "layers": 2}
    config["trainer"] |= {"max_steps": 2, "micro_batch": 2, "global_batch": None, "precision": "32-true"}
    config["trainer"] |= {"log_every": 1, "validate_every": 2, "checkpoint_every": 2, "averaging_decay": None}
    config["run"]["dir"] = str(root / "runs" / name)
    return config | {"logger": {}}


@pytest.mark.slow
def test_every_phase_starts_from_the_one_before_and_moves_its_own_part(tmp_path: Path) -> None:
    write_scenes(tmp_path / "train", 6, size=(128, 128))
    write_scenes(tmp_path / "val", 4, size=(128, 128))
    before: dict[str, torch.Tensor] = {}
    for name in F32:
        config = reduced(name, tmp_path)
        train(config | ({"init_from": str(tmp_path / "runs" / F32[F32.index(name) - 1])} if before else {}))
        state = load_first_stage(tmp_path / "runs" / name).module.state_dict()
        if before:
            moved = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
            assert moved == {key for key in state if key.startswith(tuple(config["stage"]["trained"]))}
        before = state
    assert len(F32) == 3
