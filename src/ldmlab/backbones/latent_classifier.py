"""The classifier of noisy latents that guides sampling: the downward half of the U-Net and attention pooling.

assumed: the paper prints neither architecture nor training of the one behind LDM-8-G. 506M - 395M leave it 111M, and
the way down and the middle of LDM-8's own U-Net, with a pooling head as in Dhariwal & Nichol 2021, come to 111.5M.
Shapes: B batch, C channels, h w latent size, E = 4 model_channels, N positions of the coarsest map.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.unet import Blocks
from ldmlab.errors import InputError
from ldmlab.nn.attention import PixelAttention, attend, split_heads, to_tokens
from ldmlab.nn.blocks import TimeMLP, conv3, group_norm


class AttentionPool(nn.Module):
    """Attention from the mean of all positions to all of them: (B, C, h, w) => (B, width_out), any h and w."""

    def __init__(self, channels: int, heads: int, width_out: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, width_out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)  # (B, N, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # (B, 1 + N, C)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        return self.out(attend(q[:, :, :1], k, v)[:, 0])


class LatentClassifier(nn.Module):
    """log p(class | x, t) up to a constant: logits of a latent of any size at any noise level."""

    def __init__(
        self,
        latent_channels: int,  # of the latent; derived in wiring
        classes: int,  # numbered from 0
        model_channels: int,  # width of the finest level
        channel_mult: Sequence[int],  # width of every level, in multiples of model_channels
        num_res_blocks: int,  # per level
        attention_downsampling: Sequence[int],  # levels with attention, by downsampling factor; the middle has it
        head_channels: int,  # width of an attention head
        dropout: float = 0.0,  # in the residual blocks
        scale_shift: bool = False,  # the time vector scales and shifts norms instead of being added
    ) -> None:
        super().__init__()
        if classes < 2:
            raise InputError(f"classifier.classes={classes} leaves nothing to distinguish; give 2 or more.")
        self.classes = classes
        self.time = TimeMLP(model_channels)
        self.conv_in = conv3(latent_channels, model_channels)
        blocks = Blocks(self.time.width, dropout, scale_shift, None, head_channels, group="classifier")
        widths = [model_channels * m for m in channel_mult]
        self.down = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise([model_channels, *widths])):
            for number in range(num_res_blocks):
                self.down.append(blocks.res_block(width if number else width_in, width))
                if 2**level in attention_downsampling:
                    self.down.append(blocks.attention(width))
            if level < len(widths) - 1:
                self.down.append(blocks.shrink(width))
        last = widths[-1]
        self.middle = nn.ModuleList(
            [blocks.res_block(last, last), blocks.attention(last), blocks.res_block(last, last)]
        )
        self.norm_out = group_norm(last)
        self.pool = AttentionPool(last, blocks.heads_of(last), classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C, h, w), t (B,), the time as for a denoiser => logits (B, classes)."""
        emb = F.silu(self.time(t))  # (B, E)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        for module in [*self.down, *self.middle]:
            h = module(h) if isinstance(module, PixelAttention) else module(h, emb)
        return self.pool(F.silu(self.norm_out(h)))
