"""Who is trained by which optimizer: a player owns parameters, and each parameter has exactly one player."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmlab.errors import InputError

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Players = Mapping[str, list[nn.Parameter]]


def factory_of(given: OptimizerFactory | Mapping[str, OptimizerFactory], player: str) -> OptimizerFactory:
    """What makes the player's optimizer: its own entry, or the one for all."""
    if not isinstance(given, Mapping):
        return given
    if player not in given:
        raise InputError(
            f"optimizer has entries for {', '.join(given)} but none for {player}; add one or give a single one."
        )
    return given[player]


def made_optimizers(players: Players, factory: Callable[[str], OptimizerFactory]) -> dict[str, Optimizer]:
    """One optimizer a player; `initial_lr` keeps the configured rate."""
    made = {player: factory(player)(parameters) for player, parameters in players.items()}
    for optimizer in made.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def set_rate(optimizer: Optimizer, share: float) -> None:
    """The learning rate of the next update, as a share of the configured one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def check_owned(module: nn.Module, players: Players) -> None:
    """Every trainable parameter of the module belongs to exactly one player."""
    owned = [id(p) for parameters in players.values() for p in parameters]
    assert len(owned) == len(set(owned)), "a parameter belongs to two players"
    stray = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in set(owned)]
    assert not stray, f"trainable parameters without an optimizer: {stray[:5]}"


@contextmanager
def alone(players: Players, player: str) -> Iterator[None]:
    """Inside, only this player's parameters require gradients."""
    others = [p for name, parameters in players.items() if name != player for p in parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def clip_gradients(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    """Norm of the gradient before clipping; None clips nothing."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.detach()


def still_frozen(module: nn.Module) -> None:
    """Frozen parts (all parameters frozen) go into evaluation mode."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        else:
            still_frozen(child)
