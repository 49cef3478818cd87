"""Folders as diffusers and transformers of several releases write them: the same outputs, or a true sentence."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmlab.app.cli import dispatch
from ldmlab.build import build_latent_diffusion
from ldmlab.contracts import Conditioning, Level
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop import diffusers
from ldmlab.interop.diffusers.diffusers_build import filled_text
from ldmlab.interop.diffusers.diffusers_config import read_weights
from ldmlab.interop.diffusers.diffusers_schedulers import diffusion_node, sampler_node, scheduler_options
from ldmlab.interop.diffusers.diffusers_texts import bert_vocabulary, clip_length, node, write_clip_files
from ldmlab.interop.imported import assembled
from ldmlab.model_files import ModelFiles

peer = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = ["", "a red apple", "many words " * 30]
NET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
}
DDPM = NET | {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}


def text_encoder(positions: int = 77) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**sizes, max_position_embeddings=positions, projection_dim=32)
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "length"), [(77, 77), (77, 20), (77, 2), (40, 33), (77, None)])
def test_captions_are_padded_to_the_length_of_the_tokenizer(tmp_path: Path, positions: int, length: int | None) -> None:
    write_clip_files(tmp_path / "plain")
    options = {} if length is None else {"model_max_length": length}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "plain", **options)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = text_encoder(positions)
    config = encoder.config.to_dict()
    made = node(config, length=clip_length(tmp_path / "tokenizer"))
    ours = filled_text(made, encoder.state_dict())
    ids = tokenizer(
        CAPTIONS, padding="max_length", max_length=length or positions, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = encoder(ids.input_ids)[0]
        found = ours({"caption": CAPTIONS}, None)  # type: ignore[operator]
    assert found.shape == expected.shape == (3, length or positions, 32)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [0, -3, "77", 7.5, True, [77], 1])
def test_a_length_of_a_wrong_type_ends_in_a_sentence(tmp_path: Path, length: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    with pytest.raises(InputError, match="model_max_length"):
        clip_length(tmp_path)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "app", "##le", "many", "words", "##s"]


def bert_tokenizer(folder: Path, **options: Any) -> Any:
    """As newer transformers save it, without vocab.txt."""
    (folder / "plain").mkdir(parents=True)
    (folder / "plain" / "vocab.txt").write_text("\n".join([*WORDS, ""]))
    made = transformers.BertTokenizer.from_pretrained(folder / "plain", **options)
    made.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "vocab.txt").unlink(missing_ok=True)
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        transformers.BertTokenizerFast.from_pretrained(folder / "plain", **options).save_pretrained(
            folder / "tokenizer"
        )
        (folder / "tokenizer" / "vocab.txt").unlink(missing_ok=True)
    return made


def test_a_vocabulary_inside_tokenizer_json(tmp_path: Path) -> None:
    theirs = bert_tokenizer(tmp_path)
    path = bert_vocabulary(tmp_path / "tokenizer")
    assert str(path).endswith("tokenizer.json")
    config = {"encoder_ffn_dim": 64, "d_model": 16, "encoder_layers": 1, "vocab_size": len(WORDS)}
    made = node(config | {"max_position_embeddings": 12}, vocabulary=path)
    ours: Any = instantiate(made, where="conditioner")
    expected = theirs(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenizer(CAPTIONS), expected)


def test_a_tokenizer_that_keeps_capitals_is_refused(tmp_path: Path) -> None:
    bert_tokenizer(tmp_path, do_lower_case=False)
    with pytest.raises(InputError, match="keeps capitals"):
        bert_vocabulary(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}, "type": "BPE"}}', "{"]
)
def test_a_damaged_tokenizer_ends_in_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        bert_vocabulary(tmp_path)


BETAS = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
]


@pytest.mark.parametrize("betas", BETAS)
def test_schedules_without_a_terminal_signal(betas: dict[str, Any]) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler = peer.DDIMScheduler(**betas, **options)
    made = diffusion_node(dict(scheduler.config))
    schedule = Schedule(**{key: value for key, value in made["schedule"].items() if key != "_target_"})
    assert float(schedule.alpha_bar[-1]) == 0
    torch.testing.assert_close(schedule.alpha_bar.float(), scheduler.alphas_cumprod, atol=2e-6, rtol=0)
    name, options = scheduler_options(made)
    again = getattr(peer, name)(**options)
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod, atol=2e-6, rtol=0)


def pipeline(folder: Path, net: dict[str, Any], **scheduler: Any) -> Any:
    torch.manual_seed(0)
    unet = peer.UNet2DModel(**net).eval()
    made = peer.DDIMPipeline(unet=unet, scheduler=peer.DDIMScheduler(clip_sample=False, **scheduler))
    made.save_pretrained(folder)
    return made


@torch.no_grad()
def test_a_pipeline_without_a_terminal_signal_samples_as_diffusers_does(tmp_path: Path) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    theirs = pipeline(tmp_path / "p", NET, **options)
    spec, parts = diffusers.read_folder(tmp_path / "p")
    ours = assembled(ModelFiles(Path("p"), spec, parts, "raw"))
    sampler = instantiate(spec["sampler"], where="sampler")
    assert sampler.spacing == "trailing"
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        output = ours.backbone(x.float(), torch.full((len(x),), level.time or 0.0), Conditioning())
        return ours.prediction.clean(x, output, level)

    found = sampler(denoise, x, ddim_grid(ours.schedule, 10, sampler.spacing), noise=lambda step: torch.zeros_like(x))
    theirs.scheduler.set_timesteps(10)
    for t in theirs.scheduler.timesteps:
        x = theirs.scheduler.step(theirs.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(found.float(), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("final", [{}, {"euler_at_final": True}, {"lower_order_final": False}])
@pytest.mark.parametrize(("order", "kind"), [(2, "dpmsolver++"), (2, "sde-dpmsolver++"), (3, "dpmsolver++")])
def test_the_last_steps_of_a_multistep_solver(order: int, final: dict[str, Any], kind: str) -> None:
    """Before a level that is not clean, where diffusers lowers no order by itself."""
    options = {"solver_order": order, "algorithm_type": kind, "beta_schedule": "scaled_linear", **final}
    theirs = peer.DPMSolverMultistepScheduler(**options, final_sigmas_type="sigma_min")
    config = {**peer.DPMSolverMultistepScheduler(**options).config, "_class_name": type(theirs).__name__}
    sampler = instantiate(sampler_node(config), where="sampler")
    assert sampler.depth == order
    theirs.set_timesteps(8)
    ratios = theirs.sigmas.double().tolist()
    levels = [Level(1 / math.hypot(1, s), s / math.hypot(1, s), float(i)) for i, s in enumerate(ratios)]
    x, *noises = torch.randn(9, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def output(x: torch.Tensor, number: float) -> torch.Tensor:
        return torch.tanh(x + number / 10)

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        return EpsPrediction().clean(x, output(x, level.time or 0.0), level)

    found = sampler(denoise, x, levels, noise=lambda step: noises[step])
    for number, time in enumerate(theirs.timesteps):
        x = theirs.step(output(x, number), time, x, variance_noise=noises[number]).prev_sample
    torch.testing.assert_close(found.float(), x, atol=1e-4, rtol=1e-4)


def test_spacings_that_need_a_signal_are_refused_without_one() -> None:
    schedule = Schedule(zero_terminal_snr=True)
    for spacing in ("log_snr", "karras"):
        with pytest.raises(InputError, match=f"spacing={spacing} is undefined"):
            ddim_grid(schedule, 10, spacing)


@torch.no_grad()
def test_a_published_ddpm_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peer.DDPMPipeline(unet=peer.UNet2DModel(**DDPM).eval(), scheduler=peer.DDPMScheduler())
    theirs.save_pretrained(tmp_path / "ddpm")
    assert dispatch(["import", str(tmp_path / "ddpm"), str(tmp_path / "model")]) == 0
    spec, parts = diffusers.read_folder(tmp_path / "ddpm")
    ours = build_latent_diffusion(spec)
    ours.backbone.load_state_dict(parts["denoiser"])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    torch.testing.assert_close(ours.backbone(x, t, Conditioning()), theirs.unet(x, t).sample, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.schedule.alpha_bar.float(), theirs.scheduler.alphas_cumprod, atol=1e-6, rtol=0)
    assert (
        dispatch(
            ["export", "--without-card", str(tmp_path / "model"), str(tmp_path / "again"), "--format", "diffusers"]
        )
        == 0
    )


STATE = {"a": torch.ones(2), "b": torch.arange(3.0), "c": torch.zeros(1)}
S = "diffusion_pytorch_model"
INDEXES = [  # index, pattern of the parts
    (f"{S}.safetensors.index.json", S + "-0000{}-of-00002.safetensors"),
    (f"{S}.safetensors.index.fp16.json", S + ".fp16-0000{}-of-00002.safetensors"),
    (f"{S}.safetensors.index.fp16.json", S + "-0000{}-of-00002.fp16.safetensors"),
    (f"{S}.fp16.safetensors.index.json", S + ".fp16-0000{}-of-00002.safetensors"),
    (f"{S}.safetensors.fp16.index.json", S + "-0000{}-of-00002.fp16.safetensors"),
    ("model.safetensors.index.bf16.json", "model.bf16-0000{}-of-00002.safetensors"),
    (None, S + "-0000{}-of-00002.safetensors"),
    (None, S + ".bf16-0000{}-of-00002.safetensors"),
    (None, "model-0000{}-of-00002.fp16.safetensors"),
]


@pytest.mark.parametrize(("index", "part"), INDEXES)
def test_parts_under_the_names_of_any_release(tmp_path: Path, index: str | None, part: str) -> None:
    table = {"a": part.format(1), "b": part.format(2), "c": part.format(1)}
    for name in set(table.values()):
        save_file({key: STATE[key] for key in STATE if table[key] == name}, tmp_path / name)
    if index is not None:
        (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    found = read_weights(tmp_path)
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)
    (tmp_path / part.format(2)).unlink()
    with pytest.raises(InputError, match=r"00002\S* does not exist|has 1 of 2 parts"):
        read_weights(tmp_path)


@pytest.mark.parametrize("variant", ["", ".bf16", ".fp16", ".fp32", ".non_ema"])
def test_variants(tmp_path: Path, variant: str) -> None:
    save_file(STATE, tmp_path / f"{S}{variant}.safetensors")
    assert load_file(tmp_path / f"{S}{variant}.safetensors").keys() == read_weights(tmp_path).keys()


def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / f"{S}.int4.safetensors")
    with pytest.raises(InputError, match=r"int4\.safetensors, of an unknown variant"):
        read_weights(tmp_path)


@pytest.mark.parametrize("table", [None, 3, [], {"a": 3}, {"a": None}])
def test_a_damaged_index_ends_in_a_sentence(tmp_path: Path, table: object) -> None:
    (tmp_path / f"{S}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(InputError, match="weight_map"):
        read_weights(tmp_path)


LONE = [
    (
        "AutoencoderTiny",
        {"encoder_block_out_channels": [16] * 2, "decoder_block_out_channels": [16] * 2}
        | {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]},
    ),
    ("AsymmetricAutoencoderKL", {"down_block_out_channels": [32], "up_block_out_channels": [32]}),
    ("AutoencoderKLWan", None),
    ("UNet2DModel", NET),
    ("ControlNetModel", None),
]


@pytest.mark.parametrize(("kind", "options"), LONE)
def test_a_lone_module_that_is_not_supported_is_named(
    tmp_path: Path, kind: str, options: dict[str, Any] | None
) -> None:
    if options is None:
        (tmp_path / "lone").mkdir()
        (tmp_path / "lone" / "config.json").write_text(json.dumps({"_class_name": kind}))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(peer, kind)(**options).save_pretrained(tmp_path / "lone")
    with pytest.raises(InputError, match=f"{kind} alone, which is not supported; supported: AutoencoderKL, VQModel"):
        dispatch(["import", str(tmp_path / "lone"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_lone_text_encoder_is_named(tmp_path: Path) -> None:
    text_encoder().save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="CLIPTextModel alone, which is not supported"):
        dispatch(["import", str(tmp_path / "text"), str(tmp_path / "out")])
