"""The official LightningDiT (hustvl/LightningDiT, models/lightningdit.py): SiT's network with its options."""

from ldmlab.interop.dit import ARGUMENTS, OfficialTransformer, filled_parts
from ldmlab.interop.renaming import Node, State, refuse_unknown

_OPTIONS = {"use_swiglu": "swiglu", "use_rope": "rotary_positions", "use_rmsnorm": "rms_norm", "use_qknorm": "qk_norm"}


def as_official(config: Node, state_dict: State) -> OfficialTransformer:
    """The official `LightningDiT(**config)` with these weights: `model(x, t, y)` with t in 0 .. 1, 0 being noise."""
    refuse_unknown(config, {*ARGUMENTS, *_OPTIONS, "wo_shift", "use_checkpoint"})
    return OfficialTransformer(filled_parts({"in_channels": 32, **config}, state_dict, options(config))).eval()


def options(config: Node) -> dict[str, bool]:
    """What LightningDiT changes of our DiT."""
    own = {ours: bool(config.get(theirs, False)) for theirs, ours in _OPTIONS.items()}
    return own | {"shift": not config.get("wo_shift", False), "unused_half": bool(config.get("learn_sigma", False))}
