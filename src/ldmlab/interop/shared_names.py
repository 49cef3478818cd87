"""Module names that foreign formats have in common: CompVis' spatial transformer is diffusers' too."""

from collections.abc import Iterator, Mapping

Pairs = Iterator[tuple[str, str]]  # (their module, our module)

_TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
_TRANSFORMER_BLOCK = {
    "norm1": "norm_self",
    "norm2": "norm_cross",
    "norm3": "norm_mlp",
    "ff.net.0.proj": "mlp.expand",
    "ff.net.2": "mlp.out",
    **{
        f"{theirs}.{product}": f"{ours}.{name}"
        for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention"))
        for product, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
    },
}


def under(theirs: str, ours: str, names: Mapping[str, str]) -> Pairs:
    """The names (theirs => ours) of what is inside a module."""
    return ((f"{theirs}.{name}", f"{ours}.{own}") for name, own in names.items())


def spatial_transformer(theirs: str, ours: str, depth: int) -> Pairs:
    """Attention over pixels and to tokens, at one place of a U-Net."""
    yield from under(theirs, ours, _TRANSFORMER)
    for i in range(depth):
        yield from under(f"{theirs}.transformer_blocks.{i}", f"{ours}.blocks.{i}", _TRANSFORMER_BLOCK)
