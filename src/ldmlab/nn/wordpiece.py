"""WordPiece tokens of captions as BERT (uncased, English) cuts them; the vocabulary is a file, one token a line."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.fetched import weights_folder

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
        model = models.WordPiece.from_file(str(self.path), unk_token=_UNKNOWN)
        tokenizer = Tokenizer(model)
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
