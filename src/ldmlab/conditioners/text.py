"""Captions to the states of a CLIP text tower, one vector a token: the `tokens` of cross-attention.

Shapes: B batch, L the tower's context length, D its width.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ldmlab.checkpoints import fingerprint, load_tensors
from ldmlab.conditioners.rates import checked_rate
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError
from ldmlab.nn.openclip import TextTower, build_clip, build_text_tower, make_tokenizer

_CHUNK = 64  # captions encoded at once on an accelerator


class OpenClipText(nn.Module):
    """Per-token states of an open_clip text tower; nothing given is the empty caption, as in the paper."""

    reads = frozenset({"caption"})
    slot = "tokens"

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
        super().__init__()
        if padding not in ("zero", "end"):
            raise InputError(f"conditioner.padding={padding} is unknown; choose zero or end.")
        self.tower, self.tokenizer, self.padding = tower, tokenizer, padding
        self.drop, self.trainable = checked_rate(drop), trainable
        self.node: dict[str, Any] = {}  # for model.yaml: what `open_clip_text` needs to rebuild it without a network
        self.seen, self.cut = 0, 0  # captions given, and those longer than the context
        self._capacity = max(1, cache_mib * 2**20 // (4 * tower.context_length * tower.width))
        self._states: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()  # caption => (L, D), whether it was cut
        self.register_load_state_dict_post_hook(lambda *_: self._states.clear())
        if not trainable:
            self.requires_grad_(False)
            self.eval()

    def width(self, latent: LatentSpec) -> int:
        """D, whatever the latent."""
        return self.tower.width

    def train(self, mode: bool = True) -> "OpenClipText":
        """A frozen tower stays in evaluation mode."""
        return super().train(mode and self.trainable)

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of the batch's captions, (B, L, D); captions over the context length are cut and counted."""
        captions = batch["caption"]
        self.seen += len(captions)
        if self.trainable:
            self.cut += sum(bool(self.lost(caption)) for caption in captions)
            return self.tower(self.ids(captions))
        return self._frozen(captions)

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of as many empty captions."""
        count = len(batch["caption"])
        states = self.tower(self.ids([""])) if self.trainable else self._frozen([""])
        return states.expand(count, -1, -1)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions => token ids (B, L), cut to the context and padded, on the tower's device."""
        ids = self.tokenizer(list(captions)).to(self._device)
        if self.padding == "zero":
            return ids
        end = self.tokenizer.eot_token_id
        return ids.masked_fill((ids == end).cumsum(1) > 0, end)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit into the context; empty if all does."""
        ids = self.tokenizer.encode(caption)
        return self.tokenizer.decode(ids[self.tower.context_length - 2 :]).strip()  # start and end take two places

    def made_by(self) -> dict[str, Any]:
        """What decides the states, in plain data; kept where they are stored."""
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("tower.unused.")}
        config = self.node.get("config", {})
        built = {name: config.get(name) for name in ("text_cfg", "quick_gelu")}
        return {"layer": self.tower.layer, "padding": self.padding, **built, "weights": fingerprint(weights)}

    @property
    def _device(self) -> torch.device:
        return self.tower.positional_embedding.device

    def _frozen(self, captions: Sequence[str]) -> Tensor:
        """States from the cache; new captions are encoded once, in float32, and the longest unused ones make room."""
        if self._states and next(iter(self._states.values()))[0].device != self._device:
            self._states.clear()
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._states]
        fresh = self._encoded(new)
        entries = []
        for caption in captions:
            entry = fresh.get(caption) or self._states[caption]
            self.cut += entry[1]
            entries.append(entry[0])
        self._states.update(fresh)
        for caption in captions:
            self._states.move_to_end(caption)
        while len(self._states) > self._capacity:
            self._states.popitem(last=False)
        return torch.stack(entries)

    def _encoded(self, captions: list[str]) -> dict[str, tuple[Tensor, bool]]:
        """New captions through the tower; one by one on a CPU, so that no state depends on the company it came in."""
        size = 1 if self._device.type == "cpu" else _CHUNK
        result: dict[str, tuple[Tensor, bool]] = {}
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            for start in range(0, len(captions), size):
                chunk = captions[start : start + size]
                states = self.tower(self.ids(chunk))
                result |= {c: (s.clone(), bool(self.lost(c))) for c, s in zip(chunk, states, strict=True)}
        return result


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
    if (name is None) == (config is None):
        raise InputError("conditioner: give either name or config (in training: from_run, a CLIP run of yours).")
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
