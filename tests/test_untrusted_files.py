"""A description that comes with a folder builds parts and nothing else: no function, path, command or absurd size."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ldmlab
from ldmlab.build import load_classifier, load_clip, load_first_stage
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_config, read_description
from refusals import refusal
from tiny_models import spec_with, write_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A description that is never done with fails its test instead of holding all of them."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("the description was still being read after a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rewrite(model: Path, **parts: Any) -> None:
    spec = {**yaml.safe_load((model / "model.yaml").read_text()), **parts}
    (model / "model.yaml").write_text(yaml.safe_dump(spec))


def test_the_model_itself_loads(model: Path) -> None:
    assert ldmlab.load(model, device="cpu").sample(class_id=[1], steps=1, seed=0).shape == (1, 16, 16, 3)


def marker(model: Path) -> Path:
    return model.parent / "RAN"


def traps(at: Path) -> dict[str, Any]:
    """Nodes that would run, read or write something if they were called."""
    command = {"_target_": "os.system", "command": f"touch {at}"}
    return {
        "os.system": command,
        "subprocess": {"_target_": "subprocess.run", "args": ["touch", str(at)]},
        "build with trust": {
            "_target_": "ldmlab.build.build_latent_diffusion",
            "trust": True,
            "spec": {"first_stage": command},
        },
        "load with trust": {"_target_": "ldmlab.build.load", "path": str(at.parent), "trust": True},
        "instantiate": {"_target_": "ldmlab.instantiate.instantiate", "node": command, "where": "x", "trust": True},
        "allow": {"_target_": "ldmlab.plugins.allow", "names": ["os"]},
        "commands": {
            "_target_": "ldmlab.app.cli.dispatch",
            "arguments": ["export", "--without-card", str(at.parent), str(at)],
        },
        "training": {"_target_": "ldmlab.app.wiring.train", "config": {}},
        "fetch": {"_target_": "ldmlab.interop.fetch.fetch", "name": "x", "url": f"file://{at}"},
        "atomic write": {"_target_": "ldmlab.files.write_text", "path": str(at), "text": "x"},
        "a re-exported module": {"_target_": "ldmlab.build.torch.load", "f": str(at)},
        "a re-exported function": {"_target_": "ldmlab.instantiate.importlib.import_module", "name": "antigravity"},
        "a re-exported class": {"_target_": "ldmlab.first_stages.kl.Tensor"},
        "a module": {"_target_": "ldmlab.first_stages.kl"},
        "a package": {"_target_": "ldmlab.first_stages"},
        "a function of the room": {"_target_": "ldmlab.first_stages.quantiser.nearest"},
        "a dunder": {"_target_": "ldmlab.first_stages.kl.KLAutoencoder.__init__"},
        "shards": {"_target_": "ldmlab.data.shard_data.ShardData", "train": "/", "val": "/", "image_size": 16},
        "a scene's writer": {"_target_": "ldmlab.data.scene_shards.SceneSettings", "emoji": "/etc"},
        "a run folder": {"_target_": "ldmlab.training.run_folder.RunFolder", "path": str(at), "run_id": "x"},
        "a logger": {"_target_": "ldmlab.training.loggers.TensorBoard", "folder": str(at)},
        "weights of a path": {"_target_": "ldmlab.nn.lpips.LPIPS", "vgg_weights": str(at)},
        "published weights": {"_target_": "ldmlab.nn.openclip.build_clip", "name": "ViT-B-32", "pretrained": str(at)},
        "interpolation": {"_target_": "${oc.env:HOME}"},
        "partial": {"_target_": "os.system", "_partial_": True},
        "recursion": {"_target_": "ldmlab.first_stages.identity.Identity", "_recursive_": False},
        "not text": {"_target_": ["os.system"]},
        "no target": {"a": 1},
        "relative": {"_target_": "..os.system"},
        "spaces": {"_target_": "os.system "},
        "unknown": {"_target_": "nobody_has_this.Part"},
    }


KINDS = tuple(traps(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place", ["first_stage", "latent_scale", "conditioner", "diffusion", "schedule", "task", "inside"]
)
def test_no_place_of_a_description_runs_anything(model: Path, place: str, kind: str) -> None:
    trap = traps(marker(model))[kind]
    if place == "conditioner":
        rewrite(model, conditioners={"class_label": trap})
    elif place == "schedule":
        rewrite(model, diffusion={**spec_with()["diffusion"], "schedule": trap})
    elif place == "inside":  # built before the part around it is
        if "_target_" not in trap:
            return
        rewrite(model, backbone={**spec_with()["backbone"], "dropout": trap})
    else:
        rewrite(model, **{place: trap})
    before = sorted(model.parent.rglob("*"))
    sentence = refusal(lambda: ldmlab.load(model, device="cpu"))
    assert "model.yaml" in sentence
    if place == "first_stage":
        refusal(lambda: load_first_stage(model))
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_description_runs_anything(model: Path, kind: str) -> None:
    trap = traps(marker(model))[kind]
    weights = {"sha256": {}, "format_version": 2, "image_size": 16}
    (model / "model.yaml").write_text(yaml.safe_dump({**weights, "kind": "clip", "clip": trap}))
    refusal(lambda: load_clip(model))
    spec = {"kind": "classifier", "classifier": trap, "latent_scale": trap, "schedule": trap}
    (model / "model.yaml").write_text(yaml.safe_dump({**weights, **spec}))
    refusal(lambda: load_classifier(model))
    assert not marker(model).exists()


@pytest.mark.parametrize("where", ["data", "logger.wandb", "protocol.metrics.fid", "sampler", "optimizer", "unheard"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("shards", "a logger")])
def test_nodes_of_a_runs_configuration_run_nothing(tmp_path: Path, kind: str, where: str) -> None:
    refusal(lambda: instantiate(traps(tmp_path / "RAN")[kind], where=where))
    assert not list(tmp_path.iterdir())


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("bcdefgh", "cdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 10)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *(f"{BOMB}{name}: *i\n" for name in ("kind", "format_version", "image_size", "first_stage", "files", "step")),
        f"{BOMB}format_version: 2\nkind: latent_diffusion\nbackbone: {{_target_: *i}}\n",
        MERGES,
        "a: &a [*a]\nformat_version: 2\n",
        "[" * 5000,
        "a: " + "[" * 2000 + "]" * 2000,
        "format_version: " + "9" * 6000,
        "format_version: 2\nkind: [first_stage]\nimage_size: 16\n",
        "format_version: true\n",
        "format_version: .nan\n",
        "format_version: 99\n",
        "format_version: '2'\n",
        "format_version: 2\nkind: latent_diffusion\nimage_size: 16\n",
        "format_version: 2\nkind: first_stage\nimage_size: -3\nfirst_stage: {}\n",
        "format_version: 2\nkind: first_stage\nimage_size: 16.5\nfirst_stage: {}\n",
        "format_version: 2\nkind: first_stage\nimage_size: 16\nfirst_stage: 7\n",
        "1: 2\n",
        "- a\n",
        "",
        "words",
        "!!python/object/apply:os.system [touch RAN]\n",
        "a: b: c\n",
        "\0",
        "when: 2001-99-99\n",
    ],
)
def test_damaged_descriptions_are_one_sentence(model: Path, text: str) -> None:
    (model / "model.yaml").write_text(text)
    (model / "config.yaml").write_text(text)
    for read in (lambda: read_description(model), lambda: ldmlab.load(model), lambda: load_first_stage(model)):
        assert len(refusal(read)) < 1600
    if text.startswith(("a: ", "[", "- ", "words", "1:", "!", "\0")) or not text:
        assert "config.yaml" in refusal(lambda: read_config(model)) or "model.yaml" in refusal(
            lambda: read_config(model)
        )


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "kind: \xe4".encode("latin-1"), b"x" * 5_000_000])
def test_bytes_that_are_no_text(model: Path, content: bytes) -> None:
    (model / "model.yaml").write_bytes(content)
    assert "model.yaml" in refusal(lambda: ldmlab.load(model))


@pytest.mark.parametrize("part", ["first_stage", "latent_scale", "backbone", "conditioners", "diffusion", "sampler"])
def test_a_missing_part_is_named(model: Path, part: str) -> None:
    spec = yaml.safe_load((model / "model.yaml").read_text())
    del spec[part]
    (model / "model.yaml").write_text(yaml.safe_dump(spec))
    assert part in refusal(lambda: ldmlab.load(model))


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("backbone", "num_res_blocks", 100_000_000),
        ("backbone", "num_res_blocks", 30_000),
        ("backbone", "model_channels", 3.2e9),
        ("backbone", "model_channels", 3_200_000_000),
        ("backbone", "model_channels", 1_000_000),
        ("backbone", "model_channels", "32"),
        ("backbone", "model_channels", None),
        ("backbone", "model_channels", -32),
        ("backbone", "model_channels", True),
        ("backbone", "channel_mult", 3),
        ("backbone", "channel_mult", ["a"]),
        ("backbone", "channel_mult", {"a": 1}),
        ("backbone", "dropout", "much"),
        ("backbone", "dropout", float("nan")),
        ("backbone", "no_such_option", 1),
        ("first_stage", "channels", 10**12),
        ("first_stage", "channels", [8]),
        ("first_stage", "latent_channels", 0),
        ("first_stage", "norm_groups", 0),
        ("latent_scale", "std", "wide"),
        ("latent_scale", "std", [[1.0]]),
        ("diffusion", "prediction", [[[]]]),
        ("diffusion", "prediction", "eps"),
        ("diffusion", "weighting", 3),
        ("diffusion", "time_sampling", [0.5]),
    ],
)
def test_absurd_and_wrong_options(model: Path, part: str, option: str, value: Any) -> None:
    spec = yaml.safe_load((model / "model.yaml").read_text())
    spec[part][option] = value
    (model / "model.yaml").write_text(yaml.safe_dump(spec))
    refusal(lambda: ldmlab.load(model))


@pytest.mark.parametrize("steps", [10**9, 10**7, 0, -1, 1.5, "1000"])
def test_absurd_schedules(model: Path, steps: Any) -> None:
    rewrite(
        model,
        diffusion={
            **spec_with()["diffusion"],
            "schedule": {"_target_": "ldmlab.diffusion.schedule.Schedule", "steps": steps},
        },
    )
    refusal(lambda: ldmlab.load(model))


def test_trust_builds_what_the_caller_vouches_for(model: Path) -> None:
    rewrite(model, sampler={"_target_": "os.getcwd"})
    ldmlab.load(model, device="cpu", trust=True)


def test_a_missing_package_is_named_with_the_way_out(model: Path) -> None:
    rewrite(model, backbone={"_target_": "their_lab.nets.Net"})
    sentence = refusal(lambda: ldmlab.load(model))
    assert "pip install their-lab" in sentence
    assert "--plugins their_lab" in sentence
    assert "LDMLAB_PLUGINS=their_lab" in sentence
    assert "pip install their-lab" in refusal(lambda: ldmlab.load(model, plugins=["their_lab"]))
    assert "Python itself" in refusal(lambda: ldmlab.load(model, plugins="subprocess"))
