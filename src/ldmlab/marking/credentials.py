"""Content Credentials: a signed C2PA manifest in a PNG that says which program generated it (c2pa.org, 2.x).

Without a certificate of one's own a test certificate is made on this machine: the signature then shows changes, but not
who signed. A certificate that viewers trust comes from a certification authority of the C2PA trust list.
"""

import datetime
import io
import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ldmlab.errors import InputError
from ldmlab.files import read_text, weights_folder, write_atomically

_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_TEST = "ldmlab test certificate"
_PNG = b"\x89PNG\r\n\x1a\n"
_ALGORITHMS = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


class Credentials(NamedTuple):
    """What a file's manifest says."""

    state: str  # none | valid | changed
    detail: str  # who signed, or what does not fit


class Signer:
    """Signs PNG files with a certificate chain and its private key, both PEM; None: a test certificate."""

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        if (certificate is None) != (key is None):
            raise InputError("--certificate and --key belong together; give both, or neither for a test certificate.")
        paths = _test_files() if certificate is None or key is None else (certificate, key)
        try:
            chain, private = (read_text(path).encode() for path in paths)
            curve = serialization.load_pem_private_key(private, None).curve.name  # type: ignore[union-attr]
            signing = c2pa.C2paSignerInfo(_ALGORITHMS[curve], chain, private, None)
            self._signer = c2pa.Signer.from_info(signing)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, c2pa.C2paError) as error:
            raise InputError(
                f"--certificate {paths[0]} and --key {paths[1]} cannot sign ({error}); give the PEM chain of a signing "
                "certificate and its EC key without password."
            ) from error
        self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})  # 10 kB instead of 280

    def sign(self, path: Path, title: str) -> None:
        """Put the manifest into the file."""
        action = {"action": "c2pa.created", "digitalSourceType": _GENERATED}
        manifest = {
            "claim_generator_info": [{"name": "ldmlab", "version": version("ldmlab")}],
            "format": "image/png",
            "title": title,
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, "image/png", io.BytesIO(path.read_bytes()), signed)
        write_atomically(path, lambda temporary: temporary.write_bytes(signed.getvalue()))


def credentials(content: bytes) -> Credentials:
    """Whether the bytes of a PNG are those that were signed, padding included, and by whom."""
    if not content.startswith(_PNG) or b"caBX" not in content:
        return Credentials("none", "")
    if not _whole(content):
        return Credentials("changed", "a chunk of the PNG differs from its checksum")
    try:
        with c2pa.Reader("image/png", io.BytesIO(content)) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        return Credentials("changed", str(error))
    codes = [status["code"] for status in found.get("validation_status", [])]
    wrong = [code for code in codes if code != "signingCredential.untrusted"]
    if found.get("validation_state") not in ("Valid", "Trusted") or wrong:
        return Credentials("changed", ", ".join(wrong) or str(found.get("validation_state")))
    signature = found["manifests"][found["active_manifest"]].get("signature_info", {})
    trust = "" if found["validation_state"] == "Trusted" else ", not looked up in a trust list"
    return Credentials("valid", f"signed by {signature.get('common_name') or signature.get('issuer')}{trust}")


def _whole(content: bytes) -> bool:
    """Whether every chunk fits its checksum and nothing follows the last one."""
    place = len(_PNG)
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4])
        end = place + 12 + length
        if zlib.crc32(content[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            return False
        if content[place + 4 : place + 8] == b"IEND":
            return end == len(content)
        place = end
    return False


def _test_files() -> tuple[Path, Path]:
    """Certificate chain and key of this machine, made once."""
    folder = weights_folder() / "credentials"
    paths = folder / "test-chain.pem", folder / "test-key.pem"
    if not all(path.is_file() for path in paths):
        chain, key = _test_chain()
        write_atomically(paths[0], lambda temporary: temporary.write_bytes(chain))
        write_atomically(paths[1], lambda temporary: temporary.write_bytes(key))
        paths[1].chmod(0o600)
    return paths


def _test_chain() -> tuple[bytes, bytes]:
    """A certificate for ten years below a root whose key is thrown away."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = [_certificate(key, root_key, authority=False), _certificate(root_key, root_key, authority=True)]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain), private


def _certificate(
    key: ec.EllipticCurvePrivateKey, root: ec.EllipticCurvePrivateKey, *, authority: bool
) -> x509.Certificate:
    def named(name: str) -> x509.Name:
        attributes = ((NameOID.ORGANIZATION_NAME, _TEST), (NameOID.COMMON_NAME, name))
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])

    usages = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usage = dict.fromkeys((*usages, "encipher_only", "decipher_only"), False)
    usage |= {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(f"{_TEST}, root" if authority else _TEST))
        .issuer_name(named(f"{_TEST}, root"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
        .add_extension(x509.KeyUsage(**usage), critical=True)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(root, hashes.SHA256())
