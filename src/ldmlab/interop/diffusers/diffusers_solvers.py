"""Solvers of diffusers' schedulers as samplers of ours, with the rule of their steps."""

import math
from collections.abc import Mapping
from typing import Any

from ldmlab.errors import InputError

Config = Mapping[str, Any]
EDM_MULTISTEP = "EDMDPMSolverMultistepScheduler"
_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
_KIND = "dpmsolver++"  # algorithm_type unless another is named


def ddim_spacing(config: Config) -> str:
    """The rule of ours for a scheduler whose solver is DDIM, or becomes it."""
    spacing, own = config.get("timestep_spacing", "leading"), config.get("_class_name") in _DDIM
    if own and spacing == "leading" and not config.get("steps_offset") and config.get("set_alpha_to_one", True):
        return "leading"  # from time 0 up, as DiT's
    return "trailing" if spacing == "trailing" else "official"


def other_steps(config: Config) -> bool:
    """Whether a DDIMScheduler visits levels, or ends at one, by a rule that DDIM here does not have."""
    if config.get("_class_name") not in _DDIM:
        return False
    spacing, ends_clean = config.get("timestep_spacing", "leading"), config.get("set_alpha_to_one", True)
    if ddim_spacing(config) == "official":
        return (spacing, config.get("steps_offset"), ends_clean) != ("leading", 1, False)
    return not ends_clean


def ddim(eta: float, spacing: str) -> dict[str, Any]:
    """DDIM by a rule; LDM's own is its default."""
    rule = {} if spacing == "official" else {"spacing": spacing}
    return {"_target_": "ldmlab.samplers.ddim.Ddim", "eta": eta, **rule}


def multistep(config: Config) -> dict[str, Any] | None:
    """The solver on the scheduler's steps, of first order DDIM; None for other solvers and steps."""
    clipped = config.get("lambda_min_clipped") not in (None, -math.inf, "-inf")
    others = ("use_beta_sigmas", "use_flow_sigmas", "thresholding")
    spacing = _multistep_spacing(config)
    if spacing is None or clipped or any(config.get(name) for name in others):
        return None
    if config.get("solver_order", 2) > 1:
        node = _solver(config)
        return None if node is None else node | {"spacing": spacing}
    eta = {"dpmsolver++": 0.0, "dpmsolver": 0.0, "sde-dpmsolver++": 1.0}.get(config.get("algorithm_type", _KIND))
    return None if eta is None else ddim(eta, spacing)


def _multistep_spacing(config: Config) -> str | None:
    """The rule of ours for its steps; None where there is none."""
    kinds = {"use_karras_sigmas": "karras", "use_lu_lambdas": "log_snr", "use_exponential_sigmas": "log_snr"}
    if kind := next((ours for name, ours in kinds.items() if config.get(name)), None):
        return kind
    leading = "leading:open" if config.get("steps_offset", 0) == 1 else None
    rules = {"linspace": "linspace:open", "leading": leading, "trailing": "trailing"}
    return rules.get(config.get("timestep_spacing", "linspace"))


def _solver(config: Config) -> dict[str, Any] | None:
    """The solver whatever its steps; None for another curve, as its third-order SDE has."""
    order, kind = config.get("solver_order", 2), config.get("algorithm_type", _KIND)
    if (order, kind) not in ((2, "dpmsolver++"), (2, "sde-dpmsolver++"), (3, "dpmsolver++")):
        return None
    return {
        "_target_": f"ldmlab.samplers.dpmpp_{order}m_sde.Dpmpp{order}MSde",
        "eta": float(kind == "sde-dpmsolver++"),
        "midpoint": config.get("solver_type", "midpoint") != "heun",
        "lower_order_final": config.get("lower_order_final", True),
        "euler_at_final": config.get("euler_at_final", False),
    }


def edm_sampler(options: Config) -> dict[str, Any]:
    """The sampler of a scheduler of EDM; InputError where it has none here."""
    order, kind = options.get("solver_order", 1), options.get("algorithm_type", _KIND)
    if order == 1:
        ours = "euler_ancestral.EulerAncestral" if kind == "sde-dpmsolver++" else "euler.Euler"
        return {"_target_": f"ldmlab.samplers.{ours}"}
    if (node := _solver(options)) is None:
        raise InputError(
            f"{EDM_MULTISTEP} with solver_order={order}, algorithm_type={kind} is not supported; supported: order 1 "
            "or 2 of both types, 3 of dpmsolver++."
        )
    return node
