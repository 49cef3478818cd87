"""Signed manifests: any changed byte is reported; other certificates; commands."""

import os
from pathlib import Path

import numpy as np
import pytest
from emoji_images import emoji

from ldmlab.app.cli import dispatch
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings, save_png
from ldmlab.marking import credentials as credentials_of
from ldmlab.marking.credentials import Signer, credentials


@pytest.fixture(scope="module", autouse=True)
def _certificate(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDMLAB_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        Signer()
        yield


def signed_file(folder: Path, number: int = 0) -> Path:
    path = folder / f"{number:06d}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    save_png(path, pixels, {"prompt": "a red apple"})
    Signer().sign(path, path.name)
    return path


def test_any_changed_byte_is_reported(tmp_path: Path) -> None:
    content = signed_file(tmp_path).read_bytes()
    assert credentials(content).state == "valid"
    assert "ldmlab test certificate" in credentials(content).detail
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 300, replace=False):
        other = bytearray(content)
        other[place] ^= 1 << int(rng.integers(8))
        assert credentials(bytes(other)).state != "valid", place
    assert credentials(content + b"x").state == "changed"
    assert credentials(content[:-1]).state == "changed"


def test_settings_and_pixels_stay(tmp_path: Path) -> None:
    path = signed_file(tmp_path)
    assert read_settings(path)["prompt"] == "a red apple"


def test_a_certificate_of_ones_own_and_a_wrong_one(tmp_path: Path) -> None:
    chain, key = credentials_of._test_chain()
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(key)
    Signer(tmp_path / "chain.pem", tmp_path / "key.pem")
    with pytest.raises(InputError, match="belong together"):
        Signer(tmp_path / "chain.pem")
    with pytest.raises(InputError, match="cannot sign"):
        Signer(tmp_path / "chain.pem", tmp_path / "none.pem")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        Signer(tmp_path / "pipe", tmp_path / "key.pem")
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(InputError, match="cannot sign"):
        Signer(tmp_path / "chain.pem", tmp_path / "key.pem")


def test_verify_names_what_each_file_carries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = signed_file(tmp_path)
    plain = tmp_path / "plain.png"
    save_png(plain, emoji(1, 128)[0], {})
    assert dispatch(["verify", str(path), str(plain)]) == 0
    out = capsys.readouterr().out
    assert "credentials  valid: signed by ldmlab test certificate" in out
    assert "credentials  none" in out
    path.write_bytes(path.read_bytes() + b"x")
    assert dispatch(["verify", str(path)]) == 1
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="cannot be read"):
        dispatch(["verify", str(tmp_path / "text.png")])


@pytest.mark.slow
def test_a_thousand_files(tmp_path: Path) -> None:
    signer, rng = Signer(), np.random.default_rng(3)
    path = tmp_path / "one.png"
    for number in range(1000):
        save_png(path, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), {"index": number})
        signer.sign(path, path.name)
        content = bytearray(path.read_bytes())
        assert credentials(bytes(content)).state == "valid"
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        assert credentials(bytes(content)).state != "valid"
