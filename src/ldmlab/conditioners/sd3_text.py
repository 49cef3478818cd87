"""Captions as Stable Diffusion 3 reads them: two CLIP text towers and T5 (Esser et al. 2024, arXiv 2403.03206).

T5 v1.1: Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020 for its gated MLPs. Shapes: B batch, L tokens, D width of
the states, H heads, d width of a head.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.checkpoints import load_tensors
from ldmlab.conditioners.text import Captions
from ldmlab.errors import InputError, first_line
from ldmlab.nn.blocks import RMSNorm, pooled_first
from ldmlab.nn.openclip import ClipTokens, make_tokenizer
from ldmlab.nn.openclip_towers import build_text_tower


class T5Block(nn.Module):
    """x + out(attention(norm(x))), then x + shrink(gelu(gate(norm(x))) expand(norm(x))); no biases."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.gate, self.expand = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.shrink = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1, H, L, L) of the scores, which are not scaled => (B, L, D)."""
        h = self.norm_attention(x)
        q, k, v = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)  # (B, H, L, d)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        return x + self.shrink(F.gelu(self.gate(h), approximate="tanh") * self.expand(h))


class T5Encoder(nn.Module):
    """Token numbers to states; positions act through a bias of the scores, the same in every block."""

    def __init__(
        self,
        vocab_size: int = 32128,
        width: int = 4096,  # D
        depth: int = 24,  # blocks
        heads: int = 64,  # H
        head_width: int = 64,  # d
        hidden: int = 10240,  # of the MLPs
        buckets: int = 32,  # of distances, half of them for tokens that follow
        longest: int = 128,  # distance from which all are one bucket
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.width, self.buckets, self.longest = width, buckets, longest
        self.tokens, self.bias = nn.Embedding(vocab_size, width), nn.Embedding(buckets, heads)
        self.blocks = nn.ModuleList(T5Block(width, heads, head_width, hidden, eps) for _ in range(depth))
        self.norm = RMSNorm(width, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) => (B, L, D); padding is attended to, as SD3's pipelines do."""
        x = self.tokens(ids)
        bias = self.bias(self.distance_buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None]  # (1, H, L, L)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def distance_buckets(self, length: int, device: torch.device | None = None) -> Tensor:
        """(L, L): of key j seen from query i; exact for short distances, logarithmic up to `longest`."""
        places = torch.arange(length, device=device)
        ahead = places[None] - places[:, None]
        half = self.buckets // 2
        exact, distance = half // 2, ahead.abs()
        ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.longest / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
        return half * (ahead > 0) + torch.where(distance < exact, distance, far)


_LARGEST = 1 << 26  # bytes of a vocabulary; T5's has a twentieth


class Sd3Text(Captions):
    """(B, P + L + L', D): pooled states of both towers in P rows, their states side by side, and those of T5.

    States of the towers are those before the last block, without a norm, zeros beyond both widths. Without T5 its L'
    states are zeros. Frozen.
    """

    def __init__(
        self,
        width: int,  # D: of T5, and of the network's tokens
        clip: Mapping[str, Any],  # open_clip configurations, as `open_clip_text` takes them
        clip_2: Mapping[str, Any],
        t5: Mapping[str, Any] | None = None,  # arguments of `T5Encoder`; None: without
        t5_length: int = 256,  # L'
        vocab: str | None = None,  # with T5: path of its tokenizer.json
        paddings: Sequence[str] = ("end", "zero"),  # of the towers' tokens, as `open_clip_text`
        drop: float = 0.1,  # rate of empty captions in training, for guidance
        weights: str | None = None,  # conditioner.safetensors of an imported model; None: loaded later
    ) -> None:
        super().__init__(drop, width)
        if (t5 is None) != (vocab is None):
            raise InputError("conditioner.t5 and conditioner.vocab belong together; give both or neither.")
        self.clip, self.clip_2 = ProjectedClip(clip), ProjectedClip(clip_2)
        self.t5 = None if t5 is None else T5Encoder(**{"width": width, **t5})
        wide = self.clip.width + self.clip_2.width
        if wide > width or (self.t5 is not None and self.t5.width != width):
            raise InputError(f"conditioner.width={width} must be T5's width and hold both towers' states ({wide}).")
        pairs = zip((clip, clip_2), paddings, strict=True)
        clips = [ClipTokens(make_tokenizer(config), padding) for config, padding in pairs]
        self.t5_length = t5_length
        self.tokenizer = Sd3Tokens(clips, vocab, t5_length)  # type: ignore[assignment]
        self.requires_grad_(False)
        if weights is not None and not next(self.parameters()).is_meta:
            self._load(Path(weights))
        options = {"width": width, "clip": clip, "clip_2": clip_2, "t5": t5, "t5_length": t5_length, "vocab": vocab}
        home = f"{type(self).__module__}.{type(self).__name__}"  # for model.yaml, which holds the weights beside
        self.node = {"_target_": home, **options, "paddings": list(paddings), "drop": drop}

    def _load(self, path: Path) -> None:
        """The tensors of all encoders that are used, under any name of the conditioner."""
        found = {name.partition(".")[2]: tensor for name, tensor in load_tensors(path).items()}
        found = {name: tensor for name, tensor in found.items() if self.t5 is not None or not name.startswith("t5.")}
        own = {name: tensor.shape for name, tensor in self.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in found.items()}:
            raise InputError(
                f"conditioner.weights={path} holds no encoders of these sizes; give conditioner.safetensors of an "
                "imported Stable Diffusion 3, and with t5 one that has T5."
            )
        self.load_state_dict(found)

    @property
    def pooled_width(self) -> int:
        """Of the pooled states of both towers."""
        return self.clip.pooled_width + self.clip_2.pooled_width

    def states(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        """From the encoders, in float32; on a CPU one by one, so that no state depends on the batch."""
        ids = self.ids(captions) if ids is None else ids.to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return torch.cat([self._encoded(row) for row in ids.split(1 if ids.device.type == "cpu" else len(ids))])

    def _encoded(self, ids: Tensor) -> Tensor:
        first, second, third = ids.split([self.clip.length, self.clip_2.length, ids.shape[1] - self._clips], dim=1)
        states, pooled = zip(self.clip(first), self.clip_2(second), strict=True)
        clips = torch.cat(states, dim=2)
        tokens = F.pad(clips, (0, self._width - clips.shape[2]))
        more = tokens.new_zeros(len(ids), self.t5_length, self._width) if self.t5 is None else self.t5(third)
        return pooled_first(torch.cat(pooled, dim=1), torch.cat([tokens, more], dim=1))

    @property
    def _clips(self) -> int:
        return self.clip.length + self.clip_2.length


class ProjectedClip(nn.Module):
    """A CLIP text tower: states before the last block, and the projected state of the caption's end."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.tower = build_text_tower(config)
        self.length, self.width, self.pooled_width = self.tower.context_length, self.tower.width, config["embed_dim"]
        self.projection = nn.Linear(self.width, self.pooled_width, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) => (B, L, width), (B, pooled width)."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        *blocks, last = tower.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask=mask)
        ends = tower.ln_final(last(x, attn_mask=mask))[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
        return x, self.projection(ends)


class Sd3Tokens:
    """Numbers of the tokens of both towers and of T5, one after the other."""

    def __init__(self, clips: Sequence[ClipTokens], vocab: str | None, length: int) -> None:
        self.clips, self.path, self.length = clips, None if vocab is None else Path(vocab), length

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L + L + L') int64, without T5's where there is none."""
        parts = [tokens(captions) for tokens in self.clips]
        if self.path is not None:
            rows = [self._t5.encode(caption).ids for caption in captions]
            parts.append(torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length))
        return torch.cat(parts, dim=1)

    def lost(self, caption: str) -> str:
        """The end of a caption that no encoder sees."""
        if self.path is None:
            return self.clips[0].lost(caption)
        rest = self._t5.encode(caption).overflowing
        return caption[rest[0].offsets[0][0] :].strip() if rest else ""

    @cached_property
    def _t5(self) -> Tokenizer:
        """Read when first needed; padded with number 0, cut so that the end mark stays."""
        if self.path is None or not self.path.is_file() or self.path.stat().st_size > _LARGEST:
            raise InputError(f"conditioner.vocab={self.path} is no file of T5's tokens; give its tokenizer.json.")
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"conditioner.vocab={self.path} is no tokenizer.json of T5 ({reason}).") from None
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=0, pad_token="<pad>")
        return tokenizer
