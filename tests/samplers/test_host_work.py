"""Operations that the host starts in a guided step outside the network, ours against diffusers' loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmlab.contracts import Conditioning
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import sampler_by_name

peer = pytest.importorskip("diffusers")
PEERS = {  # samplers that both have
    "ddim": peer.DDIMScheduler,
    "ddpm": peer.DDPMScheduler,
    "dpmpp_2m": peer.DPMSolverMultistepScheduler,
    "euler": peer.EulerDiscreteScheduler,
    "euler_ancestral": peer.EulerAncestralDiscreteScheduler,
    "heun": peer.HeunDiscreteScheduler,
    "lms": peer.LMSDiscreteScheduler,
    "plms": peer.PNDMScheduler,
    "unipc": peer.UniPCMultistepScheduler,
}
NOISE = torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8)


class Network(nn.Module):
    """It costs no operation but a view."""

    accepts = frozenset({"tokens"})

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Any = None) -> Tensor:
        return x[:]


class Operations(TorchDispatchMode):
    """Counts all that reaches a device or is computed from small tensors on the host, views too."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def ours(name: str, steps: int) -> Callable[[], Any]:
    sampler, schedule, tokens = sampler_by_name(name), Schedule(), Conditioning(tokens=torch.ones(2, 3, 8))
    model = LatentDiffusion(Identity(), LatentScale(), Network(), {}, schedule, EpsPrediction(), guidance_trained=True)
    grid, denoise = ddim_grid(schedule, steps, sampler.spacing), model.denoiser(tokens, tokens, Guidance(3.0))
    return lambda: sampler(denoise, NOISE, grid, noise=lambda step: torch.randn_like(NOISE))


def theirs(name: str, steps: int) -> Callable[[], Any]:
    options = {"skip_prk_steps": True} if name == "plms" else {"clip_sample": False} if name.startswith("dd") else {}
    scheduler, network = PEERS[name](beta_schedule="scaled_linear", **options), Network()
    scheduler.set_timesteps(steps)

    def loop() -> None:
        x = NOISE
        for t in scheduler.timesteps:
            without, given = network(scheduler.scale_model_input(torch.cat([x, x]), t), t).chunk(2)
            x = scheduler.step(without + 3.0 * (given - without), t, x).prev_sample

    return loop


@torch.no_grad()
def a_step(make: Callable[[str, int], Callable[[], Any]], name: str) -> float:
    counts = []
    for steps in (10, 20):
        run = make(name, steps)
        with Operations() as operations:
            run()
        counts.append(operations.count)
    return (counts[1] - counts[0]) / 10


@pytest.mark.parametrize("name", PEERS)
def test_a_step_is_no_more_operations_than_in_diffusers(name: str) -> None:
    assert a_step(ours, name) <= a_step(theirs, name)
