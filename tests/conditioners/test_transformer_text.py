"""Captions to WordPiece tokens exactly as BERT's tokenizer cuts them, and to states."""

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from ldmlab.conditioners.text import VOCABULARY_FILE, TransformerText
from ldmlab.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
WORDS += ["red", "apple", "##s", "the", "un", "##believ", "##able", "cafe", ",", ".", "'", "-", "[", "]", "苹", "果"]
WORDS = list(dict.fromkeys(WORDS))
CAPTIONS = [
    "The red apples, unbelievable.",
    "",
    "   RED\tapple\n",
    "Café crème – «naïve»",  # accents are stripped, the dash and quotes are unknown
    "苹果 is an apple",
    "it's a [SEP] inside a [MASK]",
    "x" * 101,  # longer than a word may be
    "\u0000zero width\u200bjoined \ufffd",
    "red " * 20,
    "🍎",
]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def make(vocabulary: Path | None, **changes: object) -> TransformerText:
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "length": 12, "vocab_size": len(WORDS), "heads": 2} | changes
    return TransformerText(vocab=str(vocabulary) if vocabulary else None, **options)  # type: ignore[arg-type]


def states(text: TransformerText, captions: list[str]) -> torch.Tensor:
    return text({"caption": captions}, lambda pixels: pixels)


def test_tokens_are_berts(vocabulary: Path) -> None:
    theirs = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    expected = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert torch.equal(make(vocabulary).tokenizer(CAPTIONS), expected["input_ids"])


def test_long_captions_are_cut_and_counted(vocabulary: Path) -> None:
    text = make(vocabulary)
    long = "apple the red apple the red apple the red apples, gone"
    assert text.lost(long) == "s, gone"
    assert text.lost("red apple") == ""
    assert torch.equal(*states(text, [long, long.removesuffix("s, gone")]))
    assert (text.seen, text.cut) == (2, 1)


def test_nothing_given_is_the_empty_caption(vocabulary: Path) -> None:
    text = make(vocabulary)
    null = text.null({"caption": ["a", "b"]}, lambda pixels: pixels)
    torch.testing.assert_close(null, states(text, ["", ""]))
    assert null.requires_grad


def test_padding_is_attended_to(vocabulary: Path) -> None:
    """Nothing is masked in the paper's transformer: the states of words depend on what follows."""
    text = make(vocabulary)
    short, long = states(text, ["red", "red apple"])
    assert not torch.allclose(short[:2], long[:2])


def test_the_unused_head_is_carried_and_never_learns(vocabulary: Path) -> None:
    plain, carrying = make(vocabulary), make(vocabulary, unused_head=True)
    extra = carrying.state_dict().keys() - plain.state_dict().keys()
    assert extra == {"transformer.unused_head.weight", "transformer.unused_head.bias"}
    carrying.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(states(plain, ["red"]), states(carrying, ["red"]))
    states(carrying, ["red apple"]).square().sum().backward()
    assert all(p.grad is not None for p in carrying.parameters() if p.requires_grad)  # none unused, as DDP wants


def test_the_vocabulary_is_read_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path))
    text = make(None)
    with pytest.raises(InputError, match="run `ldmlab fetch wordpiece`"):
        states(text, ["red"])
    (tmp_path / VOCABULARY_FILE).write_text("\n".join(WORDS) + "\n")
    assert states(text, ["red"]).shape == (1, 12, 16)


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (WORDS, 10, f"has {len(WORDS)} tokens, more than vocab_size=10"),
        ([w for w in WORDS if w != "[CLS]"], 200, r"lacks \[CLS\]"),
    ],
)
def test_a_vocabulary_that_does_not_fit(tmp_path: Path, words: list[str], size: int, message: str) -> None:
    path = tmp_path / "other.txt"
    path.write_text("\n".join(words) + "\n")
    with pytest.raises(InputError, match=message):
        states(make(path, vocab_size=size), ["red"])
