"""FSQ, LFQ, BSQ and IBQ against the official modules: vectors, codes, penalties and gradients on the same input.

The reference was computed once in float64 by: `FSQ` of google-research/google-research@5e78683 (fsq/fsq.ipynb, jax
0.10.2); `GroupFSQ` of Tencent-Hunyuan/iFSQ@e78bd70; `LFQ` and `IndexPropagationQuantize` of
TencentARC/SEED-Voken@b9a17ea; `BinarySphericalQuantizer` of zhaoyue-zephyrus/bsq-vit@37d212d, on unit vectors as in
its model. Gradients are those of sum(vectors * upstream) + 3 entropy + 5 (commitment or codebook).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldmlab.first_stages.index_backpropagation import IBQ
from ldmlab.first_stages.lookup_free import BSQ, FSQ, LFQ
from ldmlab.first_stages.quantiser import Quantiser

REFERENCE = load_file(Path(__file__).parents[1] / "assets" / "reference" / "quantisers.safetensors")
OURS = {
    "fsq": lambda: FSQ([8, 5, 4, 3]),
    "ifsq": lambda: FSQ([17, 7, 5, 3], activation="sigmoid"),
    "lfq6": lambda: LFQ(6, batch_weight=0.7),
    "lfq7": lambda: LFQ(7, batch_weight=0.7),
    "bsq1": lambda: BSQ(6, batch_weight=0.7),
    "bsq3": lambda: BSQ(6, group_size=3, temperature=0.5, batch_weight=0.7),
    "ibq": lambda: IBQ(16, 4, temperature=0.05, batch_weight=0.7),
}


def close(ours: Tensor, theirs: Tensor, share: float = 1e-6) -> None:
    """Within 1e-6 of the largest value or of 1: float32 against float64."""
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=share * max(float(theirs.abs().max()), 1))


@pytest.mark.parametrize("name", OURS)
def test_official_values_and_gradients(name: str) -> None:
    given = {key.partition(".")[2]: value for key, value in REFERENCE.items() if key.startswith(f"{name}.")}
    made: Quantiser = OURS[name]()
    if isinstance(made, IBQ):
        made.load_state_dict({"codebook.weight": given["table"]})
    x = given["x"].requires_grad_()
    latents = made.bounded(x)
    found = made(latents)
    assert torch.equal(found.codes, given["codes"])
    close(found.latents, given["latents"])
    for penalty, value in found.penalties.items():
        close(value, given[penalty])
    assert found.penalties.keys() == given.keys() & {"entropy", "commitment", "codebook"}
    weights = {"entropy": 3, "commitment": 5, "codebook": 5}
    total = (found.latents * given["upstream"]).sum()
    sum((weights[k] * value for k, value in found.penalties.items()), total).backward()
    assert x.grad is not None
    close(x.grad, given["grad"], 2e-6)  # sums of products with 4 / T = 400 in float32
    if isinstance(made, IBQ):
        assert made.codebook.weight.grad is not None
        close(made.codebook.weight.grad, given["table_grad"], 2e-6)
    decoded, codes = made.quantise(latents)
    assert torch.equal(codes, found.codes)
    assert torch.equal(decoded, made.vectors_of(codes))
    if not isinstance(made, IBQ):
        assert torch.equal(made.quantise(decoded)[0], decoded)  # vectors of codes are their own nearest
