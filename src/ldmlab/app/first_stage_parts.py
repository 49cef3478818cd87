"""A first stage to train, with the frozen encoder that is its own or that its latents are aligned with."""

from collections.abc import Mapping
from typing import Any

from ldmlab.app.conditioning import build_encoders
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate

Config = Mapping[str, Any]


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
