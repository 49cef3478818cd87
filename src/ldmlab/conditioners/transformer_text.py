"""Captions through a transformer trained with the denoiser: what the paper calls BERT (section 4.3.1, appendix E.2.1).

Only the tokens are BERT's (uncased, English); the network starts from nothing and masks nothing.
"""

from typing import Any

from torch import Tensor, nn

from ldmlab.conditioners.rates import checked_rate
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.nn.transformer import TransformerEncoder
from ldmlab.nn.wordpiece import WordPiece


class TransformerText(nn.Module):
    """States of the caption's WordPiece tokens, (B, length, width); nothing given is the empty caption."""

    reads = frozenset({"caption"})
    slot = "tokens"

    def __init__(
        self,
        width: int = 1280,  # of the states
        depth: int = 32,  # blocks
        length: int = 77,  # tokens, start and end among them
        vocab_size: int = 30522,  # tokens the network knows
        vocab: str | None = None,  # path of the vocabulary, one token a line; None: `ldmlab fetch wordpiece`
        drop: float = 0.1,  # rate of empty captions in training, for guidance
        heads: int = 8,  # of 64 channels each
        unused_head: bool = False,  # carry the output layer of the official files, which nothing runs
    ) -> None:
        super().__init__()
        self.drop = checked_rate(drop)
        self.transformer = TransformerEncoder(vocab_size, length, width, depth, heads, unused_head)
        self.tokenizer = WordPiece(vocab, length, vocab_size)
        self.seen, self.cut = 0, 0  # captions given, and those longer than `length`

    def width(self, latent: LatentSpec) -> int:
        """Of the states, whatever the latent."""
        return self.transformer.width

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of the batch's captions; captions over the length are cut and counted."""
        captions = batch["caption"]
        self.seen += len(captions)
        self.cut += sum(bool(self.lost(caption)) for caption in captions)
        return self._states(list(captions))

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of as many empty captions."""
        return self._states([""]).expand(len(batch["caption"]), -1, -1)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit; empty if all does."""
        return self.tokenizer.lost(caption)

    def _states(self, captions: list[str]) -> Tensor:
        return self.transformer(self.tokenizer(captions).to(self.transformer.tokens.weight.device))
