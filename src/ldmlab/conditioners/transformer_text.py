"""Captions through a transformer trained with the denoiser: what the paper calls BERT (section 4.3.1, appendix E.2.1).

Only the tokens are BERT's (uncased, English); the network starts from nothing and masks nothing.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from ldmlab.conditioners.rates import checked_rate
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError
from ldmlab.fetched import weights_folder
from ldmlab.nn.transformer import TransformerEncoder

VOCABULARY_FILE = "bert-base-uncased-vocab.txt"  # under the folder of fetched files
_START, _END, _PAD, _UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"


class WordPiece:
    """[CLS] tokens [SEP], cut or padded with [PAD] to `length`; the vocabulary is read when first needed."""

    def __init__(self, vocabulary: Path | str | None, length: int, size: int) -> None:
        """vocabulary: path, or None for the fetched one; size: number of tokens the network knows."""
        self.length, self.size = length, size
        self.path = weights_folder() / VOCABULARY_FILE if vocabulary is None else Path(vocabulary)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token numbers (B, length), int64."""
        start, end, pad = (self._number(token) for token in (_START, _END, _PAD))
        rows = []
        for caption in captions:  # one by one: a batch would start threads, which forked loader workers warn about
            encoding = self._tokenizer.encode(caption, add_special_tokens=False)
            row = [start, *encoding.ids[: self.length - 2], end]
            rows.append(row + [pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit into the length; empty if all does."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        over = encoding.offsets[self.length - 2 :]  # start and end take two places
        return caption[over[0][0] :].strip() if over else ""

    def _number(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        assert number is not None  # checked when read
        return number

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if not self.path.is_file():
            raise InputError(
                f"conditioner.vocab={self.path} does not exist; run `ldmlab fetch wordpiece` on a machine with "
                "internet, or give the path of a WordPiece vocabulary, one token a line."
            )
        tokenizer = Tokenizer(self._model())
        missing = [t for t in (_START, _END, _PAD, _UNKNOWN) if tokenizer.token_to_id(t) is None]
        found = tokenizer.get_vocab_size()
        if missing or found > self.size:
            what = f"lacks {missing[0]}" if missing else f"has {found} tokens, more than vocab_size={self.size}"
            raise InputError(f"conditioner.vocab={self.path} {what}; give the vocabulary the network was trained with.")
        named = [t for t in (_START, _END, _PAD, _UNKNOWN, "[MASK]") if tokenizer.token_to_id(t) is not None]
        tokenizer.add_special_tokens(named)  # also where a caption spells them out
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    def _model(self) -> models.WordPiece:
        """The vocabulary: one token a line, or the tokenizer.json of transformers."""
        try:
            if self.path.suffix == ".json":
                table = json.loads(self.path.read_text(encoding="utf-8"))["model"]["vocab"]
                return models.WordPiece(dict(table), unk_token=_UNKNOWN)
            return models.WordPiece.from_file(str(self.path), unk_token=_UNKNOWN)
        except Exception as error:  # the library raises bare ones
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"conditioner.vocab={self.path} cannot be read as a vocabulary ({reason}).") from None


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
        vocab: str | None = None,  # path of the vocabulary (vocab.txt, tokenizer.json); None: `ldmlab fetch wordpiece`
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
