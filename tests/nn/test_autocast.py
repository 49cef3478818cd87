"""Dtypes under a GPU's autocast, of tensors that have a device but no memory; choice of the attention's kernel."""

from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ldmlab.backbones.tokens import gained_norm
from ldmlab.nn.attention import PixelAttention, SpatialTransformer, by_products
from ldmlab.nn.blocks import GroupNorm, LayerNorm, ResBlock
from ldmlab.nn.openclip import build_clip

KERNELS = ("convolution", "native_group_norm", "native_layer_norm", "silu", "gelu", "mm", "addmm", "_fused_rms_norm")


class Dtypes(TorchDispatchMode):
    """Dtype of what every kernel gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        first = found[0] if isinstance(found, tuple) else found
        name = func._schema.name.removeprefix("aten::")
        if name in KERNELS:
            self.seen.setdefault(name, set()).add(first.dtype)
        return found


def on_a_gpu(module: nn.Module) -> nn.Module:
    """The module with stand-ins for its parameters."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty(value.shape, device="cuda"))
    return module


@pytest.fixture
def autocast(monkeypatch: pytest.MonkeyPatch) -> torch.autocast:
    """Of a GPU in bfloat16, which torch refuses where there is none."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    return torch.autocast("cuda", torch.bfloat16)


def test_norms_and_activations_keep_half_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, autocast: torch.autocast
) -> None:
    attended: list[torch.dtype] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.dtype == k.dtype == v.dtype
        attended.append(q.dtype)
        return fused(q, k, v)

    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    parts = [ResBlock(64, 64, 32), PixelAttention(64, 1), SpatialTransformer(64, 2, 32, 1, 16)]
    with FakeTensorMode():
        res, pixels, tokens = (on_a_gpu(part) for part in parts)
        x, emb, context = (torch.empty(size, device="cuda") for size in ((2, 64, 8, 8), (2, 32), (2, 5, 16)))
        with autocast, Dtypes() as dtypes:
            assert torch.is_autocast_enabled("cuda")
            x = res.conv_in(x.to(memory_format=torch.channels_last))
            x = tokens(pixels(res(x, emb)), tokens.precompute_kv(context))
    assert x.dtype == torch.bfloat16
    assert {"convolution", "native_group_norm", "native_layer_norm", "silu", "gelu"} <= dtypes.seen.keys()
    assert attended == [torch.bfloat16] * 3  # without a device torch runs its plain form, in float32 inside
    assert {name: kinds for name, kinds in dtypes.seen.items() if kinds != {torch.bfloat16}} == {}


def test_norms_of_transformers_keep_half_precision_too(autocast: torch.autocast) -> None:
    vision, text = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}, {"width": 32, "heads": 2, "layers": 1}
    clip = build_clip(config={"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, image_size=16).model
    norms = [module for module in clip.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 7  # two a block, before and after the image's blocks, after the text's
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norms[0](x), open_clip.transformer.LayerNorm(32)(x))
    with FakeTensorMode():
        x = torch.empty(2, 5, 32, device="cuda", dtype=torch.bfloat16)
        with autocast, Dtypes() as dtypes:
            for norm in (*norms, gained_norm(32)):
                assert on_a_gpu(norm)(x).dtype == torch.bfloat16
    assert dtypes.seen == {name: {torch.bfloat16} for name in ("native_layer_norm", "_fused_rms_norm")}


def test_compiled_norms_on_a_gpu_keep_channels_last_without_a_copy(autocast: torch.autocast) -> None:
    with FakeTensorMode():
        norm = on_a_gpu(GroupNorm(32, 64))
        x = torch.empty(2, 64, 8, 6, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        with autocast, torch.no_grad():
            made = make_fx(lambda x: nn.functional.silu(norm(x)), decomposition_table=select_decomp_table())(x)
    values = [node.meta["val"] for node in made.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    maps = [value for value in values if value.shape == x.shape]
    assert len(maps) > 4  # the sums and what follows them
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)
    assert not {node.target for node in made.graph.nodes} & {torch.ops.aten.clone.default, torch.ops.aten.copy.default}
    assert maps[-1].dtype == torch.bfloat16


def test_on_a_cpu_norms_are_those_of_torch() -> None:
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(GroupNorm(32, 64)(x), nn.GroupNorm(32, 64)(x))
        assert torch.equal(LayerNorm(4)(x), nn.LayerNorm(4)(x))


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "width", "expected"),
    [
        ("cuda", torch.bfloat16, 32 * 32, 384, True),  # the paper's ImageNet U-Net, one head
        ("cuda", torch.bfloat16, 8 * 8, 960, True),
        ("cuda", torch.float16, 16 * 16, 512, True),  # a first stage's middle
        ("cuda", torch.bfloat16, 64 * 64, 512, False),  # 16 million scores an image
        ("cuda", torch.bfloat16, 32 * 32, 64, False),  # the fused kernel takes it
        ("cuda", torch.bfloat16, 32 * 32, 256, False),
        ("cuda", torch.float32, 16 * 16, 512, False),
        ("cpu", torch.bfloat16, 16 * 16, 64, True),
        ("cpu", torch.float32, 16 * 16, 64, False),
        ("cpu", torch.bfloat16, 32 * 32, 64, False),
        ("meta", torch.bfloat16, 16 * 16, 512, False),
    ],
)
def test_which_attention_is_two_products(
    device: str, dtype: torch.dtype, tokens: int, width: int, expected: bool
) -> None:
    assert by_products(device, dtype, tokens, tokens, width) is expected
