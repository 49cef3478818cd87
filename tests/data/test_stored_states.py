"""States of frozen encoders beside latents: the loss of the live encoder, and no states of another one."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_maker import write_shards
from torch import Tensor

from ldmlab.app.compose import compose, plain
from ldmlab.app.encode_splits import encode_splits
from ldmlab.app.plans import diffusion
from ldmlab.app.wiring import stage_options, train, with_task
from ldmlab.checkpoints import fingerprint
from ldmlab.data.decode import decode_states
from ldmlab.data.latent_shards import state_files
from ldmlab.data.manifest import read_manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder
from ldmlab.nn.openclip import build_clip
from ldmlab.randomness import draw
from ldmlab.stored_names import STATES_PREFIX

SIZE = 16
STAGE = {
    "_target_": "ldmlab.first_stages.kl.KLAutoencoder",
    **{"channels": 8, "channel_mult": [1, 1], "latent_channels": 3, "num_res_blocks": 1, "norm_groups": 4},
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIZE},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 2},
}
TINY = [
    *("experiment=mine/text_to_image", "backbone.model_channels=32", "backbone.channel_mult=[1]", "data.workers=0"),
    *("backbone.attention_downsampling=[1]", "trainer.max_steps=2", "trainer.validate_every=2", "trainer.log_every=1"),
    *("trainer.checkpoint_every=2", "trainer.micro_batch=4", "trainer.precision=32-true", "logger=csv"),
    *("stage.panel_steps=2", "stage.panel_count=2", "stage.val_draws=1"),
]
ROUNDING = 2**-11  # of float16, relative
TOLERANCE = 1e-3  # of a loss of about 1, by the rounding of states


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a first stage, two CLIPs, and latents that carry the states of both conditioners of the first."""
    folder = tmp_path_factory.mktemp("states")
    write_shards(folder / "train", [7, 5], size=SIZE)
    write_shards(folder / "val", [4], size=SIZE, split="val")
    torch.manual_seed(0)
    stage = instantiate(STAGE, where="first_stage")
    spec = {"kind": "first_stage", "image_size": SIZE, "first_stage": STAGE}
    write_model_folder(folder / "stage", spec, {"first_stage": stage.state_dict()})
    for name in ("clip", "other"):
        clip = build_clip(config=CLIP)
        spec = {"kind": "clip", "image_size": SIZE, "clip": clip.node}
        write_model_folder(folder / name, spec, {"clip": clip.model.state_dict()})
    encode(folder, "latents", *all_of(folder))
    return folder


def all_of(root: Path) -> list[str]:
    """Both conditioners and an encoder to align with."""
    states = ["conditioner=[text,image]", *of_run(root, "text"), *of_run(root, "image")]
    return [*states, "encoder=clip", f"encoder.clip.from_run={root / 'clip'}"]


def of_run(root: Path, name: str, clip: str = "clip") -> list[str]:
    return [f"conditioner.{name}.from_run={root / clip}"]


def images(root: Path) -> list[str]:
    return ["data=shards", f"data.train={root / 'train'}", f"data.val={root / 'val'}", f"data.image_size={SIZE}"]


def encode(root: Path, out: str, *options: str) -> None:
    given = [f"from_run={root / 'stage'}", f"out={root / out}", "mirror=true", "dtype=float32", "data.workers=0"]
    encode_splits(plain(compose("encode", [*images(root), *given, *options])))


def stage_and_data(root: Path, *options: str) -> tuple[Any, ShardData]:
    """As wiring does it, for a network none of whose weights is zero."""
    given = [*images(root), "data.flip=true", f"data.latents={root / 'latents'}"]
    config = plain(compose("train", [*TINY, *given, *options]))
    data: ShardData = instantiate(config["data"], where="data", seed=0)
    if config["task"]:
        data = with_task(config, data)
    data = data.with_states([*config["conditioner"], *(f"encoder.{name}" for name in config["encoder"])])
    settings = instantiate(config["trainer"], where="trainer")
    stage: Any = diffusion(config, data, stage_options(config, settings)).stage
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stage.diffusion.backbone.named_parameters():
        if parameter.ndim > 1:  # what enters a layer leaves it as large, the states among it
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.fill_(float(name.endswith("weight")))  # norms, biases
    stage.diffusion.train()
    return stage, data


def losses(stage: Any, data: ShardData) -> tuple[list[dict[str, Any]], Tensor]:
    batches = list(islice(data.train_loader(6), 4))
    with torch.no_grad():
        return batches, torch.cat([stage.diffusion.loss(batch, 0)[0] for batch in batches])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "image"])
def test_the_loss_is_that_of_the_live_encoder(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where conditions are dropped, and for mirrored images."""
    choice = [f"conditioner={name}", f"conditioner.{name}.drop=0.4", *of_run(root, name)]
    choice += ["task=variations", "task.crop=null"] if name == "image" else []
    stage, data = stage_and_data(root, *choice)
    module = stage.diffusion.conditioners[name]
    batches, stored = losses(stage, data)
    assert all(batch[STATES_PREFIX + name].dtype == torch.float16 for batch in batches)
    drawn = [draw(0, batch["position"], {}, [f"drop.{name}"]) for batch in batches]
    dropped = torch.cat([stage.diffusion.drops(numbers)[name] for numbers in drawn])
    assert 0 < dropped.sum() < len(dropped)
    online, live_data = stage_and_data(root, *choice, "data.latents=null", f"from_run={root / 'stage'}")
    online.diffusion.latent_scale.load_state_dict(stage.diffusion.latent_scale.state_dict())
    live_batches, live = losses(online, live_data)
    assert [batch["key"] for batch in batches] == [batch["key"] for batch in live_batches]
    for batch, shown in zip(batches, live_batches, strict=True):
        expected = module(shown, None)
        assert (batch[STATES_PREFIX + name].float() - expected).abs().max() < 2 * ROUNDING * expected.abs().max()
    torch.testing.assert_close(stored, live, atol=TOLERANCE * float(live.mean()), rtol=0)
    other, _ = stage_and_data(root, *choice, *of_run(root, name, "other"), "data.states=false")
    other.diffusion.latent_scale.load_state_dict(stage.diffusion.latent_scale.state_dict())
    with torch.no_grad():
        another = torch.cat([other.diffusion.loss(batch, 0)[0] for batch in live_batches])
    assert (stored - live).abs().max() < (another - live).abs().max() / 50  # what another encoder would have moved
    monkeypatch.setattr(module.tower, "forward", lambda *_: pytest.fail("the encoder ran"))
    losses(stage, data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["conditioner.text.from_run=ROOT/other"], r"another conditioner.text than this run's \(weights="),
        (
            ["conditioner.text.from_run=ROOT/clip", "conditioner.text.layer=penultimate"],
            "layer=last there, penultimate",
        ),
        (["conditioner.text.from_run=ROOT/clip", "conditioner.text.padding=end"], "padding=zero there, end here"),
        (["conditioner.text.from_run=ROOT/clip", "conditioner.text.trainable=true"], "conditioner.text is trainable"),
    ],
)
def test_states_of_another_encoder_are_refused(root: Path, options: list[str], words: str) -> None:
    given = ["conditioner=text", *(option.replace("ROOT", str(root)) for option in options)]
    with pytest.raises(InputError, match=words):
        stage_and_data(root, *given)
    stage_and_data(root, *given, "data.states=false")


@pytest.mark.slow
def test_stored_features_are_those_of_the_encoder(root: Path) -> None:
    """Of both views; the term and its gradient follow. Another encoder, and latents without features, are refused."""
    choice = ["alignment=repa", "alignment.hidden=8", "conditioner=none", "encoder=clip"]
    choice += ["backbone=unet_demo", "backbone.heads=4"]
    stored, data = stage_and_data(root, *choice, f"encoder.clip.from_run={root / 'clip'}")
    live, live_data = stage_and_data(
        root, *choice, f"encoder.clip.from_run={root / 'clip'}", "data.latents=null", f"from_run={root / 'stage'}"
    )
    assert not stored.alignment.encoders
    live.alignment.projectors.load_state_dict(stored.alignment.projectors.state_dict())
    batches = [list(islice(one.train_loader(6), 4)) for one in (data, live_data)]
    for batch, shown in zip(*batches, strict=True):
        features, expected = stored.alignment.target("clip", batch), live.alignment.target("clip", shown)
        assert expected.shape == (6, 32, 2, 2)
        assert (features - expected).abs().max() <= 1e-3 * max(1.0, float(expected.abs().max()))
        seen = torch.randn(6, 32, 8, 8)
        torch.testing.assert_close(stored.alignment(seen, batch), live.alignment(seen, shown), atol=1e-3, rtol=0)
    with pytest.raises(InputError, match=r"states of another encoder\.clip than this run's \(weights="):
        stage_and_data(root, *choice, f"encoder.clip.from_run={root / 'other'}")
    with pytest.raises(InputError, match="holds no features of encoder=clip"):
        stage_and_data(root, *choice, f"encoder.clip.from_run={root / 'clip'}", "data.states=false")


@pytest.mark.slow
def test_an_encoder_that_comes_with_first_weights_is_held_against_the_states(root: Path) -> None:
    given = [*TINY, *images(root), f"data.latents={root / 'latents'}", "data.fields=[caption,class_id]"]
    given += ["conditioner=[text,class_label]", "conditioner.class_label.classes=3", "conditioner.class_label.width=16"]
    first = [*of_run(root, "text", "other"), "data.states=false", f"run.dir={root / 'first'}"]
    train(plain(compose("train", [*given, *first])))
    second = [*of_run(root, "text"), f"init_from={root / 'first'}", f"run.dir={root / 'second'}"]
    with pytest.raises(
        InputError, match=r"conditioner.text.from_run=.*/clip: its weights are not those that init_from="
    ):
        train(plain(compose("train", [*given, *second])))


def test_a_run_reads_only_what_it_is_told(root: Path) -> None:
    _, data = stage_and_data(root, "conditioner=text", *of_run(root, "text"))
    assert data.stored == ("text",)
    _, data = stage_and_data(root, "conditioner=none")
    assert not any(field.startswith("states.") for field in next(iter(data.train_loader(2))))


def test_the_manifest_says_what_made_them(root: Path) -> None:
    made = (read_manifest(root / "latents" / "val").latents or {})["states"]
    assert made.keys() == {"text", "image", "encoder.clip"}
    assert (made["text"]["reads"], made["text"]["dtype"], made["text"]["layer"]) == (["caption"], "float16", "last")
    stage, _ = stage_and_data(root, "conditioner=text", *of_run(root, "text"))
    assert made["text"]["weights"] == fingerprint(stage.diffusion.conditioners["text"].state_dict())
    encode(root, "latents", *all_of(root))  # finished: kept
    with pytest.raises(InputError, match=r"begun with states\."):
        encode(root, "latents", "conditioner=text", *of_run(root, "text"))


def test_what_cannot_be_stored_is_refused(root: Path) -> None:
    for options, words in (
        (["conditioner=class_label"], "conditioner.class_label is trained with"),
        (["conditioner=low_resolution"], "no frozen encoder"),
        (["conditioner=text", *of_run(root, "text"), "conditioner.text.trainable=true"], "conditioner.text is trained"),
    ):
        with pytest.raises(InputError, match=words):
            encode(root, "never", *options)
    with pytest.raises(InputError, match=r"states of conditioner.text for 007 do not fit float16"):
        state_files("007", {"text": np.full((1, 2, 3), 1e6, np.float32)})


def test_views() -> None:
    states = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    files = state_files("007", {"image": states, "text": states[:1]})
    assert sorted(files) == ["image.states.npy", "text.states.npy"]
    for view in (0, 1):
        assert np.array_equal(decode_states(files, "image", view, {}), states[view])
        assert np.array_equal(decode_states(files, "text", view, {}), states[0])


def test_states_of_another_shape_make_a_bad_sample() -> None:
    shapes = dict[str, tuple[int, ...]]()
    for length in (2, 2, 3):
        files = state_files("007", {"text": np.zeros((1, length, 4), np.float32)})
        if length == 2:
            assert decode_states(files, "text", 0, shapes).shape == (2, 4)
        else:
            with pytest.raises(ValueError, match=r"shape \(3, 4\), and \(2, 4\) in the first sample"):
                decode_states(files, "text", 0, shapes)
    with pytest.raises(ValueError, match=r"no \.image\.states\.npy among its files \(text\.states\.npy\)"):
        decode_states(files, "image", 0, shapes)


@pytest.mark.slow
def test_variations_train_and_draw_panels_from_stored_embeddings(root: Path) -> None:
    choice = ["conditioner=image", *of_run(root, "image"), "task=variations", "task.crop=null"]
    config = [*TINY, *images(root), f"data.latents={root / 'latents'}", *choice, f"run.dir={root / 'run'}"]
    train(plain(compose("train", config)))
    assert (root / "run" / "finished.json").exists()
    assert list((root / "run" / "samples").iterdir())
    _, data = stage_and_data(root, *choice, "data.states=false")
    with pytest.raises(InputError, match="task=variations needs images"):
        data.train_dataset()
