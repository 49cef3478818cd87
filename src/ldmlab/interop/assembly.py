"""A model from its description and tensors read elsewhere, without a second copy of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ldmlab.build import build_latent_diffusion, pick_device
from ldmlab.checkpoints import fill, fingerprint, without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.mismatch import compare, refuse_mismatch

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
    from ldmlab.inference.model import LoadedModel


@dataclass(frozen=True)
class Imported:
    """What was read of a model in a foreign format: model.yaml, and tensors under our names."""

    source: str
    spec: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]  # first_stage | denoiser | conditioner, in the dtype of the source
    weights: str  # averaged | raw
    step: int | None = None
    notes: tuple[str, ...] = ()  # what the user should know


def assembled(imported: Imported) -> "LatentDiffusion":
    """The latent diffusion model, frozen, in float32."""
    with without_weights():
        model = build_latent_diffusion(imported.spec)
    modules = {"first_stage": model.first_stage, "denoiser": model.backbone, "conditioner": model.conditioners}
    given = {name: imported.parts.get(name, {}) for name in modules}
    refuse_mismatch({name: compare(given[name], module.state_dict()) for name, module in modules.items()})
    for name, module in modules.items():
        fill(module, given[name])
    return model.eval().requires_grad_(False)


def assembled_first_stage(imported: Imported) -> nn.Module:
    """The first stage of a model, or alone, in float32."""
    with without_weights():
        module: nn.Module = instantiate(imported.spec["first_stage"], where="first_stage")
    given = imported.parts["first_stage"]
    refuse_mismatch({"first stage": compare(given, module.state_dict())})
    fill(module, given)
    return module.eval().requires_grad_(False)


def loaded_model(imported: Imported, device: str = "auto") -> "LoadedModel":
    """Ready to sample, as `ldmlab.load` gives it."""
    from ldmlab.inference.model import LoadedModel

    if imported.spec["kind"] != "latent_diffusion":
        raise InputError(f"{imported.source} is a {imported.spec['kind']}, which samples nothing; use `ldmlab import`.")
    model = assembled(imported)
    info = {
        "path": imported.source,
        "weights": imported.weights,
        "step": imported.step,
        "fingerprint": fingerprint(model.backbone.state_dict()),
        "spec": imported.spec,
    }
    return LoadedModel(model.to(pick_device(device)), image_size=imported.spec["image_size"], info=info)
