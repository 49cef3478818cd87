"""Captions to states, one vector a token: the `tokens` of cross-attention.

By a CLIP text tower, or by a transformer trained with the denoiser: what the paper calls BERT (section 4.3.1,
appendix E.2.1), though only the tokens are BERT's (uncased, English); it starts from random weights and has no mask.

Shapes: B batch, L the tower's context length, D its width.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ldmlab.checkpoints import fingerprint, load_tensors
from ldmlab.conditioners import BaseConditioner
from ldmlab.contracts import Encode
from ldmlab.errors import InputError, first_line
from ldmlab.files import weights_folder
from ldmlab.nn.attention import TransformerEncoder
from ldmlab.nn.openclip import ClipTokens, build_clip, check_source, make_tokenizer
from ldmlab.nn.openclip_towers import TextTower, build_text_tower

_CHUNK = 64  # captions encoded at once on an accelerator


class Captions(BaseConditioner):
    """States of captions, (B, L, D); the null condition is the empty caption, as in the paper."""

    reads = frozenset({"caption"})
    slot = "tokens"

    tokenizer: "ClipTokens | WordPiece"

    def __init__(self, drop: float, width: int) -> None:
        super().__init__(drop, width)
        self.seen, self.cut = 0, 0  # captions seen, and those longer than the context
        self._empty: Tensor | None = None  # token numbers of the empty caption, on the device

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of the batch's captions, (B, L, D); captions over the context length are cut and counted.

        `ids` and `cut` of the batch come from the loader, else captions are tokenised here.
        """
        captions = list(batch["caption"])
        self.seen += len(captions)
        self.cut += sum(batch["cut"] if "cut" in batch else (bool(self.lost(caption)) for caption in captions))
        return self.states(captions, batch.get("ids"))

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of as many empty captions."""
        if self._empty is None or self._empty.device != self._device:
            self._empty = self.ids([""])
        return self.states([""], self._empty).expand(len(batch["caption"]), -1, -1)

    def states(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        """Captions, or their token numbers (B, L) where they are known => (B, L, D)."""
        raise NotImplementedError

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions => token numbers (B, L), on the device."""
        return self.tokenizer(captions).to(self._device)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit into the context; empty if all does."""
        return self.tokenizer.lost(caption)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


class OpenClipText(Captions):
    """Per-token states of an open_clip text tower."""

    def __init__(
        self,
        tower: TextTower,
        tokenizer: SimpleTokenizer,
        *,
        drop: float = 0.1,  # rate of empty captions in training, for guidance
        padding: str = "zero",  # tokens after the caption's end: zero as in open_clip | end as in Stable Diffusion 1.x
        trainable: bool = False,  # trained with the denoiser, or frozen
        cache_mib: int = 256,  # frozen: memory for states of captions seen before
    ) -> None:
        super().__init__(drop, tower.width)
        self.tower, self.tokenizer, self.padding = tower, ClipTokens(tokenizer, padding), padding
        self.trainable = trainable
        self.node: dict[str, Any] = {}  # for model.yaml: what `open_clip_text` needs to rebuild it without a network
        self._capacity = max(1, cache_mib * 2**20 // (4 * tower.context_length * tower.width))
        self._states: OrderedDict[str, Tensor] = OrderedDict()  # caption => (L, D)
        self.register_load_state_dict_post_hook(lambda *_: self._states.clear())
        if not trainable:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> "OpenClipText":
        """A frozen tower stays in evaluation mode."""
        return super().train(mode and self.trainable)

    def states(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        """From the tower, or of a frozen one from the cache: captions are encoded once, in float32."""
        if self.trainable:
            return self.tower(self.ids(captions) if ids is None else ids)
        if self._states and next(iter(self._states.values())).device != self._device:
            self._states.clear()
        new = {c: row for row, c in enumerate(captions) if c not in self._states}
        self._encode(list(new), None if ids is None else [ids[row] for row in new.values()])
        found = torch.stack([self._states[caption] for caption in captions])
        for caption in captions:
            self._states.move_to_end(caption)
        while len(self._states) > self._capacity:  # the least recently used
            self._states.popitem(last=False)
        return found

    def made_by(self) -> dict[str, Any]:
        """Everything that determines the states, as plain data; stored with them."""
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("tower.unused.")}
        config = self.node.get("config", {})
        built = {name: config.get(name) for name in ("text_cfg", "quick_gelu")}
        return {"layer": self.tower.layer, "padding": self.padding, **built, "weights": fingerprint(weights)}

    def _encode(self, captions: list[str], ids: list[Tensor] | None) -> None:
        """New captions through the tower; one by one on a CPU, so that no state depends on the batch."""
        size = 1 if self._device.type == "cpu" else _CHUNK
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            for start in range(0, len(captions), size):
                chunk = captions[start : start + size]
                rows = self.ids(chunk) if ids is None else torch.stack(ids[start : start + size])
                self._states.update({c: s.clone() for c, s in zip(chunk, self.tower(rows), strict=True)})


def open_clip_text(
    name: str | None = None,  # published architecture, such as ViT-L-14, or
    pretrained: str | None = None,  # with name: tag of its weights or path of a file
    config: Mapping[str, Any] | None = None,  # architecture of our own, as in the model.yaml of a CLIP run
    weights: str | None = None,  # with config: .safetensors of the CLIP model; None: loaded later or trained
    layer: str = "last",  # last | penultimate | pooled, the last layer at the caption's end as one token
    padding: str = "zero",  # zero | end
    unused: bool = False,  # carry the weights of the published text tower that are not run
    drop: float = 0.1,
    trainable: bool = False,
    cache_mib: int = 256,
) -> OpenClipText:
    """The text conditioner of a published model or of a CLIP run of ours; exactly one of `name` and `config`."""
    if name is None and config is None:
        raise InputError("conditioner: give either name or config (in training: from_run, a CLIP run of yours).")
    check_source("conditioner", name, pretrained, config, weights)
    if name is not None:
        clip = build_clip(name, pretrained)
        tower, full = TextTower(clip.model, layer, unused), clip.config
    else:
        assert config is not None
        full = dict(config)
        tower = build_text_tower(full, layer, unused)
        if weights is not None:
            tower.load_clip(load_tensors(Path(weights)))
    options = {"padding": padding, "drop": drop, "trainable": trainable, "cache_mib": cache_mib}
    text = OpenClipText(tower, make_tokenizer(full), **options)  # type: ignore[arg-type]
    kept = {"layer": layer, "unused": unused, **options}
    text.node = {"_target_": "ldmlab.conditioners.text.open_clip_text", "config": full, **kept}
    return text


VOCABULARY_FILE = "bert-base-uncased-vocab.txt"  # under the folder of fetched files
_START, _END, _PAD, _UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"
_LARGEST_VOCABULARY = 1 << 26  # bytes; BERT's have a quarter of one MiB


class WordPiece:
    """[CLS] tokens [SEP], cut or padded with [PAD] to `length`; the vocabulary is read when first needed."""

    def __init__(self, vocabulary: Path | str | None, length: int, size: int) -> None:
        """vocabulary: path, or None for the fetched one; size: of the token table."""
        self.length, self.size = length, size
        self.path = weights_folder() / VOCABULARY_FILE if vocabulary is None else Path(vocabulary)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token numbers (B, length), int64; one by one: a batch would start threads, at odds with forked workers."""
        rows = [self._tokenizer.encode(caption).ids for caption in captions]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit into the length; empty if all does."""
        rest = self._tokenizer.encode(caption).overflowing
        return caption[rest[0].offsets[1][0] :].strip() if rest else ""  # after [CLS]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if not self.path.is_file() or self.path.stat().st_size > _LARGEST_VOCABULARY:
            raise InputError(
                f"conditioner.vocab={self.path} is no vocabulary file; run `ldmlab fetch wordpiece` on a machine with "
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
        numbers = {token: cast(int, tokenizer.token_to_id(token)) for token in (_START, _END, _PAD)}
        tokenizer.post_processor = processors.BertProcessing((_END, numbers[_END]), (_START, numbers[_START]))
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=numbers[_PAD], pad_token=_PAD)
        return tokenizer

    def _model(self) -> models.WordPiece:
        """The vocabulary: one token a line, or the tokenizer.json of transformers."""
        try:
            if self.path.suffix == ".json":
                table = json.loads(self.path.read_text(encoding="utf-8"))["model"]["vocab"]
                return models.WordPiece(dict(table), unk_token=_UNKNOWN)
            return models.WordPiece.from_file(str(self.path), unk_token=_UNKNOWN)
        except Exception as error:  # the library raises bare ones
            reason = first_line(error)
            raise InputError(f"conditioner.vocab={self.path} cannot be read as a vocabulary ({reason}).") from None


class TransformerText(Captions):
    """States of the caption's WordPiece tokens, (B, length, width)."""

    def __init__(
        self,
        width: int = 1280,  # of the states
        depth: int = 32,  # blocks
        length: int = 77,  # tokens, start and end among them
        vocab_size: int = 30522,  # size of the token table
        vocab: str | None = None,  # path of the vocabulary (vocab.txt, tokenizer.json); None: `ldmlab fetch wordpiece`
        drop: float = 0.1,  # rate of empty captions in training, for guidance
        heads: int = 8,  # of 64 channels each
        unused_head: bool = False,  # keep the unused output layer of the official files
    ) -> None:
        super().__init__(drop, width)
        self.transformer = TransformerEncoder(vocab_size, length, width, depth, heads, unused_head)
        self.tokenizer = WordPiece(vocab, length, vocab_size)

    def states(self, captions: list[str], ids: Tensor | None = None) -> Tensor:
        return self.transformer(self.ids(captions) if ids is None else ids)
