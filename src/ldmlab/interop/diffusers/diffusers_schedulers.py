"""Schedulers of diffusers and ours, both ways: discrete noise schedules, flows, and EDM's."""

from collections.abc import Mapping
from typing import Any

import torch

from ldmlab.diffusion.respacing import checked_spacing
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import resolved
from ldmlab.interop.diffusers.diffusers_solvers import EDM_MULTISTEP, ddim, ddim_spacing, edm_sampler, multistep

Config = Mapping[str, Any]
_NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}  # diffusers => ours
_PREDICTIONS = {"epsilon": "EpsPrediction", "v_prediction": "VPrediction"}
_HOME = "ldmlab.diffusion."
_SAME = 1e-6  # float32 of betas below 0.02 is much closer
_MULTISTEP = "DPMSolverMultistep"
FLOW, _FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
EDM = "EDMEulerScheduler"
_DISCRETE = (  # whose noise levels are those of betas
    *("DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "LCM", "TCD", "SASolver"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
    *(_MULTISTEP, "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep"),
)
_EXACT = ("DDIM", "DDPM", "LCM", "TCD")  # with a terminal SNR of 0; others leave the least signal of half precision
_RULES = ("karras", "exponential", "beta")  # use_RULE_sigmas


def diffusion_node(config: Config, token_values: int = 64) -> dict[str, Any]:
    """Our diffusion node for a `scheduler_config.json`: the noise levels and what is predicted; of flows the steps too.

    token_values: of a latent for each of the tokens that `use_dynamic_shifting` counts.
    """
    name = config.get("_class_name", f"{_DISCRETE[0]}Scheduler")
    if name in (FLOW, _FLOW_HEUN):
        return _flow_node(config, name, token_values)
    if name in (EDM, EDM_MULTISTEP):
        return _edm_node(config, name)
    if name.removesuffix("Scheduler") not in _DISCRETE:
        known = f"{FLOW}, {_FLOW_HEUN}, {EDM}, {EDM_MULTISTEP} and those of betas"
        raise InputError(f"scheduler {name} is not supported; supported: {known}.")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise InputError(
            f"scheduler prediction_type={prediction} is not supported; supported: {', '.join(_PREDICTIONS)}."
        )
    schedule = {"_target_": f"{_HOME}schedule.Schedule", **_schedule(config)}
    if config.get("rescale_betas_zero_snr"):
        schedule |= {"zero_terminal_snr": True} | ({} if name.startswith(_EXACT) else {"least_alpha_bar": 2**-24})
    if name == f"{_MULTISTEP}Scheduler" and config.get("final_sigmas_type") == "sigma_min":
        schedule["noisy_end"] = True
    return {
        "_target_": f"{_HOME}latent_diffusion.LatentDiffusion",
        "prediction": {"_target_": f"{_HOME}parameterization.{_PREDICTIONS[prediction]}"},
        "schedule": schedule,
    }


def token_values(backbone: Mapping[str, Any]) -> int:
    """Values of a latent for each patch, by whose number diffusers shifts the times of flows."""
    return int(backbone["in_channels"] * backbone.get("patch_size", 2) ** 2)


def _flow_node(config: Config, name: str, token_values: int) -> dict[str, Any]:
    """Rectified flow on the scheduler's steps; with `invert_sigmas` the times and the velocity run to the data."""
    options = resolved(config, name, "scheduler")
    ends = {"clean_time": 0.0, "noise_time": float(config.get("num_train_timesteps", 1000))}
    inverted = options.get("invert_sigmas")
    if inverted and options["stochastic_sampling"]:
        raise InputError(
            "scheduler invert_sigmas with stochastic_sampling adds noise at the data's end; set one of them to false."
        )
    if inverted:
        ends = {"clean_time": ends["noise_time"], "noise_time": 0.0}
    path: dict[str, Any] = {"_target_": f"{_HOME}flow_match.FlowMatchPath", **ends}
    if options.get("use_dynamic_shifting"):
        pairs = (("base_image_seq_len", "base_shift"), ("max_image_seq_len", "max_shift"))
        path["dynamic"] = [v for size, mu in pairs for v in (options[size] * token_values, options[mu])]
        path["dynamic_type"] = options["time_shift_type"]
    else:
        path["shift"] = options["shift"]
    path |= {"terminal": options["shift_terminal"]} if options.get("shift_terminal") else {}
    if rules := [rule for rule in _RULES if options.get(f"use_{rule}_sigmas")]:
        path["rule"] = rules[0]
    path |= {"fresh_noise": True} if options.get("stochastic_sampling") else {}
    towards = {"towards": "data" if inverted else "noise"}
    return {
        "_target_": f"{_HOME}latent_diffusion.LatentDiffusion",
        "prediction": {"_target_": f"{_HOME}parameterization.VelocityPrediction", **towards},
        "schedule": path,
    }


def _edm_node(config: Config, name: str) -> dict[str, Any]:
    """EDM's path on the scheduler's steps; with `v_prediction` its network has the other sign."""
    options = resolved(config, name, "scheduler")
    rule = "log_snr" if options["sigma_schedule"] == "exponential" else f"karras:{options['rho']:g}"
    sampler = edm_sampler(options)
    words = [f"{option}={str(value).lower()}" for option, value in sampler.items() if option != "_target_"]
    solver = ":".join([sampler["_target_"].split(".")[-2], *words])
    path = {"sigma_min": options["sigma_min"], "sigma_max": options["sigma_max"], "solver": [solver, rule, 50]}
    predicted = {"sigma_data": options["sigma_data"], "negative": options["prediction_type"] == "v_prediction"}
    ends = {"wide_start": True} | ({"noisy_end": True} if options["final_sigmas_type"] == "sigma_min" else {})
    return {
        "_target_": f"{_HOME}latent_diffusion.LatentDiffusion",
        "prediction": {"_target_": f"{_HOME}parameterization.EdmPrediction", **predicted},
        "schedule": {"_target_": f"{_HOME}paths.EdmPath", **path, **ends},
    }


def _edm_options(path: Mapping[str, Any], prediction: Mapping[str, Any]) -> Config:
    """Options of an EDMEulerScheduler for EDM's path; InputError for steps that it has no name for."""
    solver = path.get("solver", ("heun", "karras", 18))
    rule, power = checked_spacing(solver[1], ("karras", "log_snr"))
    return {
        **{name: path[name] for name in ("sigma_min", "sigma_max") if name in path},
        "sigma_data": prediction.get("sigma_data", 0.5),
        **({"sigma_schedule": "exponential"} if rule == "log_snr" else {"rho": power}),
        "prediction_type": "v_prediction" if prediction.get("negative") else "epsilon",
        "final_sigmas_type": "sigma_min" if path.get("noisy_end") else "zero",
    }


def _flow_options(schedule: Mapping[str, Any], towards: str, token_values: int) -> Config:
    """Options of a FlowMatchEulerDiscreteScheduler for a flow of ours; InputError for what it has none for."""
    node = {"clean_time": 0.0, "noise_time": 1000.0, "shift": 1.0, "shift_base": None, "margins": (0, 0), **schedule}
    clean, noise = node["clean_time"], node["noise_time"]
    if min(clean, noise) != 0 or (clean > noise) != (towards == "data") or max(clean, noise) <= 1:
        raise InputError(
            f"diffusion.schedule.clean_time={clean}, noise_time={noise} with a velocity towards {towards}: {FLOW} "
            "counts 0 .. 1000 and its velocity runs with the times; use --format ldmlab."
        )
    if node["shift_base"] is not None or any(node["margins"]):
        raise InputError(f"diffusion.schedule.shift_base and margins are no options of {FLOW}; use --format ldmlab.")
    config = {
        **{"num_train_timesteps": int(max(clean, noise)), "shift": node["shift"], "invert_sigmas": clean > noise},
        **{"shift_terminal": node.get("terminal") or None, "stochastic_sampling": node.get("fresh_noise", False)},
        **{f"use_{rule}_sigmas": node.get("rule") == rule for rule in _RULES},
    }
    if (dynamic := node.get("dynamic")) is None:
        return config
    few, many = (dynamic[i] / token_values for i in (0, 2))
    if not (few.is_integer() and many.is_integer()):
        raise InputError(f"diffusion.schedule.dynamic={dynamic}: {FLOW} counts tokens of {token_values} values.")
    shifts = {"base_image_seq_len": int(few), "base_shift": dynamic[1], "max_image_seq_len": int(many)}
    kind = {"time_shift_type": node.get("dynamic_type", "exponential"), "max_shift": dynamic[3]}
    return config | {"use_dynamic_shifting": True, **shifts, **kind}


def _schedule(config: Config) -> dict[str, Any]:
    """Name and options of the schedule of ours, by its name there or by its betas."""
    if (betas := config.get("trained_betas")) is not None:
        table = torch.tensor(betas, dtype=torch.float64)
        start, end = float(table[0]), float(table[-1])
        plain, squares = {"start": start, "end": end}, {"start": start**2, "end": end**2}
        ends = {"scaled_linear": plain, "linear": plain, "sqrt": squares, "cosine": {}}
        for name, options in ends.items():
            found: dict[str, Any] = {"name": name, **options, "steps": len(table)}
            if torch.allclose(Schedule(**found).betas, table, atol=_SAME, rtol=0):
                return found
        raise InputError(
            f"scheduler trained_betas={start} .. {end} belong to none of the supported schedules; use another model."
        )
    name, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if name not in _NAMES:
        raise InputError(f"scheduler beta_schedule={name} is not supported; supported: {', '.join(_NAMES)}.")
    if name == "squaredcos_cap_v2":
        return {"name": "cosine", "steps": steps}
    ends = {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
    return {"name": _NAMES[name], **ends, "steps": steps}


def sampler_node(config: Config) -> dict[str, Any]:
    """What samples an imported model unless another sampler is named: the scheduler's solver, see `is_replaced`.

    DPM-Solver++ as a DPMSolverMultistepScheduler has it, EDM's solvers, of flows the path's own; of all others DDIM,
    with the scheduler's step rule where it is `trailing`, as models without a terminal signal need, or DDIM's from 0.
    """
    name = config.get("_class_name")
    if name in (FLOW, _FLOW_HEUN):
        heun = {"_target_": "ldmlab.samplers.heun.Heun", "variable": "position"}
        return heun if name == _FLOW_HEUN else {"_target_": "ldmlab.samplers._auto.Auto"}
    if name in (EDM, EDM_MULTISTEP):
        return edm_sampler(resolved(config, name, "scheduler"))
    if name == f"{_MULTISTEP}Scheduler" and (node := multistep(config)) is not None:
        return node
    return ddim(0.0, ddim_spacing(config))


def is_replaced(config: Config) -> bool:
    """Whether `sampler_node` is another solver than the scheduler's."""
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name == f"{_MULTISTEP}Scheduler":
        return multistep(config) is None
    return name not in (FLOW, _FLOW_HEUN) and not name.startswith(("DDIM", "EDM"))


def clips(config: Config) -> bool:
    """Whether the scheduler limits every clean estimate, as those of pixels do unless they are told otherwise."""
    usual = str(config.get("_class_name", "DDIMScheduler")).startswith(("DDIM", "DDPM"))
    return bool(config.get("clip_sample", usual) or config.get("thresholding"))


def scheduler_options(node: Mapping[str, Any], token_values: int = 64) -> tuple[str, Config]:
    """diffusers' class and options for a diffusion node of ours: a flow's steps, or DDIM's as the official sampler's.

    A learned variance is left out, as diffusers' DiTPipeline does.
    """
    predicted = node["prediction"]
    predicted = predicted.get("mean", predicted)
    prediction = str(predicted["_target_"]).rpartition(".")[2]
    foreign = {ours: name for name, ours in _PREDICTIONS.items()}
    path = str(node["schedule"]["_target_"]).rpartition(".")[2]
    if prediction == "VelocityPrediction" and path in ("LinearPath", "FlowMatchPath"):
        return FLOW, _flow_options(node["schedule"], predicted.get("towards", "noise"), token_values)
    if (prediction, path) == ("EdmPrediction", "EdmPath"):
        return EDM, _edm_options(node["schedule"], predicted)
    if prediction not in foreign or path != "Schedule":
        raise InputError(f"diffusion.prediction={prediction} on {path} has no scheduler here; use --format ldmlab.")
    return "DDIMScheduler", _discrete_options(node["schedule"], foreign[prediction])


def _discrete_options(node: Mapping[str, Any], prediction: str) -> Config:
    options = {key: value for key, value in node.items() if key != "_target_"}
    rescaled = bool(options.pop("zero_terminal_snr", False))  # by the scheduler itself
    for name in ("noisy_end", "least_alpha_bar"):  # DDIM's steps end there anyway; its terminal SNR is 0
        options.pop(name, None)
    schedule = Schedule(**options)
    config: dict[str, Any] = {
        "num_train_timesteps": schedule.steps,
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": False,  # the last step goes to the first level of the schedule
    }
    if rescaled:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        config |= {"steps_offset": 1, "timestep_spacing": "leading"}
    if schedule.name in ("scaled_linear", "linear"):
        ends = {"beta_start": options.get("start", 0.0015), "beta_end": options.get("end", 0.0195)}
        return config | {"beta_schedule": schedule.name, **ends}
    return config | {"trained_betas": schedule.betas.tolist()}
