"""Stable Diffusion 3's pipeline in diffusers and our MMDiT with its three text encoders: the same states and images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import HOME, describe, kl, weights
from safetensors.torch import load_file, save_file
from test_diffusers_dit import VAE, randomised
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import ldmlab
from ldmlab.app.cli import dispatch
from ldmlab.conditioners.sd3_text import Sd3Text, T5Encoder
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop import diffusers
from ldmlab.interop.diffusers.diffusers_texts import write_clip_files
from ldmlab.model_files import write_model_folder
from modern_cases import assert_near
from refusals import refusal

peer = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red apple", "many words " * 200, ""]
WORDS = ["▁a", "▁red", "▁app", "le", "▁many", "▁words", "▁", *"abcdefghijklmnopqrstuvwxyz"]
WIDTH, TEXT = 72, {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
NET = {
    **{"sample_size": 8, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16},
    **{"num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "qk_norm": "rms_norm"},
    **{"pooled_projection_dim": 88, "pos_embed_max_size": 12, "dual_attention_layers": (0,)},
}
SD3_VAE = VAE | {
    **{"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609},
}
T5 = {"vocab_size": 3 + len(WORDS), "d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 3}


def t5_tokenizer(folder: Path) -> Any:
    """Unigram pieces in T5's form: a mark for spaces, </s> at the end."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -1.0 - i / 50) for i, word in enumerate(WORDS))]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.save(str(folder / "t5.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "t5.json"), model_max_length=512, **names)


def clip(width: int, pooled: int, act: str) -> Any:
    config = {"hidden_size": width, "projection_dim": pooled, "hidden_act": act, **TEXT}
    return randomised(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)), width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sd3")
    write_clip_files(home / "clip")
    first, second = (
        transformers.CLIPTokenizer.from_pretrained(home / "clip", model_max_length=77, **more)
        for more in ({}, {"pad_token": "!"})
    )
    t5 = transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu"))
    made = peer.StableDiffusion3Pipeline(
        transformer=randomised(peer.SD3Transformer2DModel(**NET)),
        scheduler=peer.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomised(peer.AutoencoderKL(**SD3_VAE)),
        **{"text_encoder": clip(32, 40, "quick_gelu"), "tokenizer": first},
        **{"text_encoder_2": clip(36, 48, "gelu"), "tokenizer_2": second},
        **{"text_encoder_3": randomised(t5), "tokenizer_3": t5_tokenizer(home)},
    )
    made.save_pretrained(home / "pipeline")
    return home / "pipeline"


def loaded(folder: Path, **absent: None) -> Any:
    pipeline = peer.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same_states(text: Any, pipeline: Any) -> None:
    """Pooled states in the first rows, then those of all encoders, for captions of any length."""
    tokens, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    ours = text({"caption": CAPTIONS}, None)
    rows = -(-text.pooled_width // WIDTH)
    assert_near(ours[:, rows:], tokens, 1e-5)
    assert_near(ours[:, :rows].flatten(1)[:, : text.pooled_width], pooled, 1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("t5", [True, False])
def test_a_pipeline_becomes_a_model_and_a_pipeline_again(t5: bool, folder: Path, tmp_path: Path) -> None:
    absent: dict[str, None] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = loaded(folder, **absent)
    if not t5:  # as diffusers drops it
        theirs.save_pretrained(tmp_path / "less")
        folder = tmp_path / "less"
    assert dispatch(["import", str(folder), str(tmp_path / "model")]) == 0
    model = ldmlab.load(tmp_path / "model", device="cpu")
    text: Any = model.diffusion.conditioners["text"]
    same_states(text, theirs)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    words = ["a red apple", "many words"]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "np"}
    images = theirs(words, height=16, width=16, **options).images
    model.diffusion.start = lambda *_: noise  # type: ignore[method-assign]
    found = model.sample(caption=words, steps=4, guidance_scale=3.0, size=16)
    assert images.std() > 0.02
    assert (found.double() / 255 - torch.from_numpy(images)).abs().max() < 1 / 255
    assert (
        dispatch(
            ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "again"), "--format", "diffusers"]
        )
        == 0
    )
    readme = (tmp_path / "again" / "README.md").read_text()
    assert ("text_encoder_3=None, tokenizer_3=None" in readme) == (not t5)
    again = loaded(tmp_path / "again", **absent)
    again_images = again(words, height=16, width=16, **options).images
    assert_near(torch.from_numpy(again_images), torch.from_numpy(images), 1e-5)
    assert again.vae.config.shift_factor == pytest.approx(0.0609)
    if t5:
        Path(text.tokenizer.path).rename(tmp_path / "elsewhere.json")
        words = ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "never"), "--format", "diffusers"]
        assert "is gone; put T5's tokenizer.json there again" in refusal(lambda: dispatch(words))
        assert not (tmp_path / "never").exists()
        (tmp_path / "elsewhere.json").rename(text.tokenizer.path)
    assert (again.text_encoder_3 is None) == (not t5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "bf16", "fp16"])
def test_layouts_of_files(kind: str, folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "pipeline"
    shutil.copytree(folder, home)
    if kind == "sharded":
        shutil.rmtree(home / "transformer")
        loaded(folder).transformer.save_pretrained(home / "transformer", max_shard_size="60KB")
        assert (home / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    else:
        for path in [*home.glob("*/model.safetensors"), *home.glob("*/diffusion_pytorch_model.safetensors")]:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
            state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
            path.unlink()
            save_file(state, path.with_suffix(f".{kind}.safetensors"))
    spec, parts = diffusers.read_folder(home)
    plain, tensors = diffusers.read_folder(folder)
    assert spec["backbone"] == plain["backbone"]
    for part in tensors:
        for name, tensor in tensors[part].items():
            assert parts[part][name].dtype == torch.float32
            assert_near(parts[part][name], tensor, 0 if kind == "sharded" else 1e-2)


@pytest.mark.slow
def test_what_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "pipeline"
    shutil.copytree(folder, home)
    words = ["import", str(home), str(tmp_path / "out")]

    def changed(file: str, **changes: Any) -> str:
        before = (home / file).read_text()
        (home / file).write_text(json.dumps(json.loads(before) | changes))
        sentence = refusal(lambda: dispatch(words))
        (home / file).write_text(before)
        return sentence

    assert "feed_forward_proj=relu is not supported" in changed("text_encoder_3/config.json", feed_forward_proj="relu")
    index = {"text_encoder_2": [None, None]}
    assert "has None as text_encoder_2, which is not supported" in changed("model_index.json", **index)
    assert "scheduler DDIMParScheduler is" in changed("scheduler/scheduler_config.json", _class_name="DDIMParScheduler")
    (home / "tokenizer_3/tokenizer.json").unlink()
    assert "has no tokenizer.json; save it there with transformers" in refusal(lambda: dispatch(words))
    assert not (tmp_path / "out").exists()


def test_conditioners_that_do_not_fit_are_refused() -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    clips = {name: {"embed_dim": 32, "text_cfg": text} for name in ("clip", "clip_2")}
    with pytest.raises(InputError, match="belong together"):
        Sd3Text(width=64, **clips, t5={})
    with pytest.raises(InputError, match=r"conditioner\.width=48 must be"):
        Sd3Text(width=48, **clips)
    node = {"_target_": f"{HOME}backbones.mmdit.MMDiT", "in_channels": 4, "out_channels": 4, "width": 32, "depth": 1}
    both = {"heads": 2, "context_width": 8, "vector_width": 8, "pooled_width": 8}
    with pytest.raises(InputError, match="pooled_width=8: a vector conditioner fills that"):
        instantiate({**node, **both}, where="backbone")
    with pytest.raises(InputError, match=r"no tokenizer\.json of T5"):
        Sd3Text(width=64, **clips, t5={"vocab_size": 8, "depth": 1, "heads": 1, "head_width": 8, "hidden": 8},
                vocab=__file__)({"caption": ["a"]}, None)  # type: ignore[arg-type]  # fmt: skip


def test_a_model_of_ours(tmp_path: Path) -> None:
    """An MMDiT with other conditions: its modules, and conditioners beside them; not all options have a class."""
    net = {"in_channels": 16, "out_channels": 16, "width": 32, "depth": 2, "heads": 2, "context_width": 24}
    net |= {"vector_width": 16, "position_grid": 8, "position_base": 4, "_target_": f"{HOME}backbones.mmdit.MMDiT"}
    label = f"{HOME}conditioners.class_label.ClassEmbedder"
    conditions = {
        "tokens": {"_target_": label, "classes": 5, "width": 24},
        "pooled": {"_target_": label, "classes": 5, "width": 16, "slot": "vector"},
    }
    flow = {"prediction": "VelocityPrediction", "schedule": {"_target_": f"{HOME}diffusion.paths.LinearPath"}}
    stage = kl(2, latent_channels=16, latent_projection=False)

    def exported(name: str, **more: Any) -> list[str]:
        spec = describe(stage, {**net, **more}, conditions, image_size=16, std=0.6, shift=0.1, **flow)
        write_model_folder(tmp_path / name, {**spec, "weights": "raw", "step": 1}, weights(spec))
        return [
            "export",
            "--without-card",
            str(tmp_path / name),
            str(tmp_path / f"{name}.out"),
            "--format",
            "diffusers",
        ]

    assert dispatch(exported("model")) == 0
    out = tmp_path / "model.out"
    found = peer.SD3Transformer2DModel.from_pretrained(out / "transformer")
    assert found.config.qk_norm == "rms_norm"
    assert (out / "conditioner.safetensors").is_file()
    assert peer.AutoencoderKL.from_pretrained(out / "vae").config.scaling_factor == 1.0  # it is in the weights
    assert "mlp_ratio=2.0: SD3Transformer2DModel has" in refusal(lambda: dispatch(exported("other", mlp_ratio=2.0)))
    assert not (tmp_path / "other.out").exists()


def test_distances_of_t5() -> None:
    """Also beyond the longest one, and with few buckets."""
    for buckets, longest, length in ((32, 128, 300), (8, 20, 40)):
        config = transformers.T5Config(**T5 | {"num_heads": 2}, relative_attention_num_buckets=buckets)
        config.relative_attention_max_distance = longest
        theirs = transformers.models.t5.modeling_t5.T5Attention(config, has_relative_attention_bias=True)
        places = torch.arange(length)
        expected = theirs._relative_position_bucket(
            places[None] - places[:, None], bidirectional=True, num_buckets=buckets, max_distance=longest
        )
        encoder = T5Encoder(8, 16, 0, 2, 8, 8, buckets, longest)
        assert torch.equal(encoder.distance_buckets(length), expected)
