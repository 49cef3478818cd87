"""The alignment of a denoiser, or of a first stage to train, with frozen encoders, from configuration."""

from collections.abc import Mapping
from typing import Any

from ldmlab.app.conditioning import as_states, build_encoders, check_states, encoders_of
from ldmlab.contracts import LatentSpec
from ldmlab.data.shard_data import ShardData
from ldmlab.diffusion.alignment import Alignment
from ldmlab.diffusion.few_steps import FewSteps
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate
from ldmlab.stored_names import ENCODER_PREFIX
from ldmlab.training.sharded_start import built_sharded

Config = Mapping[str, Any]


def alignment_of(
    config: Config, model: LatentDiffusion, latent: LatentSpec, data: ShardData | None
) -> Alignment | None:
    """The alignment of a denoiser with the encoders of the configuration; None without one, or at weight 0.

    data: stored features are held against the encoders, which run where there are none; None: of a plan.
    """
    given = encoders_of(config)
    if not given:
        return None
    if not accepts(config["alignment"], "backbone", where="alignment"):
        raise InputError(
            f"alignment._target_={config['alignment']['_target_']} aligns first stages; choose "
            "alignment=repa, irepa or urepa."
        )
    encoders = build_encoders(given, trained=data is not None)
    if isinstance(model, FewSteps):
        raise InputError(f"alignment: {type(model).__name__} runs its network several times a step; leave it out.")
    if data is not None:
        check_states(as_states(encoders), data)
        if missing := [n for n in encoders if data.latents and ENCODER_PREFIX + n not in data.stored]:
            raise InputError(
                f"data.latents={data.latents} holds no features of encoder={missing[0]} (or data.states=false); encode "
                f"again with encoder={missing[0]} and its options, or train on images with from_run=RUN."
            )
    derived: dict[str, Any] = {
        "backbone": model.backbone,
        "widths": {name: encoder.width for name, encoder in encoders.items()},
        "size": (latent.height, latent.width),
    }
    alignment: Alignment = built_sharded(
        config["trainer"], lambda: instantiate(config["alignment"], where="alignment", **derived)
    )
    if data is None or not data.latents:
        alignment.run(encoders)
    return alignment


def first_stage_with_encoder(config: Config, trained: bool = True) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A first stage, its node for model.yaml, and the loss's `alignment`, where one is chosen; the frozen encoder is
    the first stage's own, or what its latents are aligned with. trained: refuse an encoder without its weights."""
    node, alignment = dict(config["first_stage"]), config.get("alignment")
    takes = accepts(node, "encoder", where="first_stage")
    if takes and alignment:
        raise InputError("alignment: a frozen first stage has an encoder's features already; set alignment=none.")
    encoders = build_encoders(config.get("encoder") or {}, trained)
    if len(encoders) != takes + bool(alignment):
        readers = [node["_target_"]] * takes + ([alignment["_target_"]] if alignment else [])
        raise InputError(
            f"encoder={', '.join(encoders) or 'none'}, which {' and '.join(readers) or 'no other option'} reads; give "
            "encoder=dinov2 or encoder=clip with a frozen first stage or with alignment=va_vae, else encoder=none."
        )
    encoder = next(iter(encoders.values()), None)
    if takes:
        first_stage = instantiate(node, where="first_stage", encoder=encoder)
        return first_stage, {**node, "encoder": dict(getattr(encoder, "node", {}))}, {}
    first_stage = instantiate(node, where="first_stage")
    if not alignment:
        return first_stage, node, {}
    if not accepts(alignment, "latent_channels", where="alignment"):
        raise InputError(f"alignment._target_={alignment['_target_']} aligns denoisers; choose alignment=va_vae.")
    derived = {"encoder": encoder, "latent_channels": first_stage.latent_channels}
    return first_stage, node, {"alignment": instantiate(alignment, where="alignment", **derived)}
