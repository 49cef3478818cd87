"""What loaders do ahead of the device: captions to token numbers, memory for a GPU, moments left in float16."""

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_maker import write_shards

from ldmlab.conditioners.text import TransformerText, open_clip_text
from ldmlab.data.decode import decode_moments
from ldmlab.data.latent_shards import npy_bytes
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.stored_names import CUT_PREFIX, IDS_PREFIX

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 4, "width": 16, "heads": 2, "layers": 1},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "image", "1", "2", "3"]


@pytest.fixture
def data(tmp_path: Path) -> ShardData:
    for split in ("train", "val"):
        write_shards(tmp_path / split, [7, 5], split=split)
    return ShardData(str(tmp_path / "train"), str(tmp_path / "val"), 8, workers=0)


def texts(folder: Path) -> dict[str, Any]:
    """Every kind of text conditioner, each with captions of two tokens cut or not."""
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    return {
        "frozen": open_clip_text(config=CLIP),
        "trained": open_clip_text(config=CLIP, trainable=True, padding="end"),
        "bert": TransformerText(16, 1, 3, len(WORDS), str(vocabulary), heads=1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_of_the_loader_give_the_same_states_and_counts(data: ShardData, workers: int, tmp_path: Path) -> None:
    for name, text in texts(tmp_path).items():
        ahead = ShardData(data.train, data.val, 8, workers=workers).with_tokenizers({name: text.tokenizer}, False)
        batches = [*islice(ahead.train_loader(4), 2), *ahead.eval_loader("val", 5)]
        for batch in batches:
            plain = {"caption": batch["caption"]}
            tokens = {"ids": batch[IDS_PREFIX + name], "cut": batch[CUT_PREFIX + name]}
            assert torch.equal(tokens["ids"], text.ids(batch["caption"]))
            before, results, cuts = text.cut, [], []
            for given in ({**plain, **tokens}, plain):
                getattr(text, "_states", {}).clear()
                results.append(text(given, lambda pixels: pixels))
                cuts.append(text.cut - before)
            assert torch.equal(*results)
            assert cuts[1] == 2 * cuts[0]
        assert text.seen == 2 * (4 + 4 + 12)
        assert (text.cut > 0) == (name == "bert" or text.tokenizer.lost("image 11") != "")


def test_a_data_set_with_tokenizers_can_be_sent_to_a_worker(data: ShardData, tmp_path: Path) -> None:
    used = {name: text.tokenizer for name, text in texts(tmp_path).items()}
    dataset = data.with_tokenizers(used, False).val_dataset()
    again = pickle.loads(pickle.dumps(dataset))
    for name in used:
        assert (again[3][IDS_PREFIX + name] == dataset[3][IDS_PREFIX + name]).all()


def test_stored_states_need_no_tokens_and_a_missing_vocabulary_is_refused_early(
    data: ShardData, tmp_path: Path
) -> None:
    bert = TransformerText(16, 1, 3, len(WORDS), str(tmp_path / "none.txt"), heads=1)
    with pytest.raises(InputError, match=r"none\.txt is no vocabulary file"):
        data.with_tokenizers({"text": bert.tokenizer}, False)
    stored = ShardData(data.train, data.val, 8, stored=("text",)).with_tokenizers({"text": bert.tokenizer}, False)
    assert stored.tokenizers == {}


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_for_a_gpu_are_pinned(data: ShardData, pinned: bool) -> None:
    ahead = data.with_tokenizers({}, pinned)
    assert ahead.train_loader(2).pin_memory == ahead.eval_loader("val", 2).pin_memory == pinned


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moments_are_widened_on_the_device(dtype: str) -> None:
    values = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0)).numpy()
    moments = decode_moments({"npy": npy_bytes("moments", values, dtype, "")}, 0)
    assert moments.dtype == (dtype if dtype == "float16" else "float32")
    assert torch.equal(torch.from_numpy(moments).float(), torch.from_numpy(values[0].astype(dtype)).float())
