"""Signed manifests: any changed byte is reported; other certificates; commands."""

import os
import socket
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
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


@pytest.mark.parametrize("fault", ["another key", "expired", "order", "none"])
def test_what_cannot_sign_is_refused_before_an_image_is_made(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "expired":
        at_that_time = SimpleNamespace(now=lambda zone: datetime.now(zone) - timedelta(days=5000))
        module = SimpleNamespace(datetime=at_that_time, timedelta=timedelta, UTC=UTC)
        monkeypatch.setattr(credentials_of, "datetime", module)
    chain, key = credentials_of._test_chain()
    end = b"-----END CERTIFICATE-----\n"
    own, root, _ = chain.split(end)
    chain = {"order": root + end + own + end, "none": b"no chain"}.get(fault, chain)
    (tmp_path / "chain.pem").write_bytes(chain)
    (tmp_path / "key.pem").write_bytes(credentials_of._test_chain()[1] if fault == "another key" else key)
    with pytest.raises(InputError, match="cannot sign"):
        Signer(tmp_path / "chain.pem", tmp_path / "key.pem")


def test_a_key_beside_the_certificates_stays_out_of_signed_files(tmp_path: Path) -> None:
    chain, key = credentials_of._test_chain()
    (tmp_path / "both.pem").write_bytes(chain + key)
    path = tmp_path / "image.png"
    save_png(path, emoji(1, 128)[0], {})
    Signer(tmp_path / "both.pem", tmp_path / "both.pem").sign(path, "image")
    content = path.read_bytes()
    assert credentials(content).state == "valid"
    numbers = serialization.load_pem_private_key(key, None).private_numbers()  # type: ignore[union-attr]
    assert numbers.private_value.to_bytes(32) not in content


def test_a_damaged_test_certificate_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path))
    Signer()
    (tmp_path / "credentials" / "test-key.pem").write_bytes(credentials_of._test_chain()[1])
    with pytest.raises(InputError, match=r"delete .*credentials, and a new one is made"):
        Signer()


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """One pixel, with more chunks after the header."""
    content = credentials_of._probe()
    more = (len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks)
    return content[:33] + b"".join(more) + content[33:]


def test_the_name_of_the_chunk_in_a_text_is_no_manifest() -> None:
    assert credentials(png_with((b"tEXt", b"Comment\0about caBX"))) == ("none", "")
    assert credentials(png_with((b"caBX", b"junk" * 20))).state == "changed"


def test_other_formats_are_not_said_to_be_without_manifest() -> None:
    assert credentials(b"\xff\xd8\xff").state == "not read"


def test_an_address_in_a_file_is_not_called() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        place = f"http://127.0.0.1:{server.getsockname()[1]}/x.c2pa"
        xmp = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            f'dcterms:provenance="{place}"/></rdf:RDF></x:xmpmeta>'
        )
        text = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode())
        assert credentials(png_with(text)).state == "none"
        assert credentials(png_with(text, (b"caBX", b""))).state == "changed"
        with pytest.raises(TimeoutError):
            server.accept()


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
    others = [str(tmp_path / "text.png"), str(tmp_path / "missing.png"), str(path), str(plain)]
    with pytest.raises(InputError, match=r"2 of 4 files cannot be read \(.*text.png, .*missing.png\); give image"):
        dispatch(["verify", *others])
    out = capsys.readouterr().out
    assert all(f"{name}\n" in out for name in others)  # those after an unreadable one, too
    assert out.count("cannot be read: ") == 2
    assert "credentials  changed" in out


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
