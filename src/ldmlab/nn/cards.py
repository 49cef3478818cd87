"""Memory and peak TFLOP/s of GPUs, for `ldmlab plan` and MFU."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """TFLOP/s of dense products by the data sheet, without sparsity."""

    memory_gib: float  # available to torch
    half: float  # TFLOP/s in bfloat16; of a V100 in float16
    single: float  # TFLOP/s in float32, as TF32 where there is one
    name: str  # pattern of torch's name for it

    def tflops(self, precision: str) -> float:
        """TFLOP/s of the products of a precision of the Trainer."""
        return self.single if precision.startswith(("32", "64")) else self.half


CARDS = {
    "v100-32gb": Card(31.7, 125, 15.7, r"V100.*32GB"),
    "rtx4090": Card(23.5, 165, 82.6, r"RTX 4090$"),
    "a100-40gb": Card(39.4, 312, 156, r"A100.*40GB"),
    "a100-80gb": Card(79.2, 312, 156, r"A100.*80GB"),
    "l40s": Card(44.4, 362, 183, r"L40S$"),
    "h100-80gb": Card(79.2, 989, 494, r"H100 80GB HBM3$"),  # SXM
    "h100-pcie": Card(79.2, 756, 378, r"H100 PCIe$"),
    "h200-141gb": Card(139.8, 989, 494, r"H200$"),
    "b200": Card(178.4, 2250, 1125, r"B200$"),
}


def card_named(name: str) -> Card | None:
    """The card of a name as torch.cuda.get_device_name() gives it, such as NVIDIA A100-SXM4-80GB; None: unknown."""
    return next((card for card in CARDS.values() if re.search(card.name, name)), None)
