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
from PIL import Image

from ldmlab.disks import disk_errors, locked
from ldmlab.errors import InputError
from ldmlab.files import read_text, weights_folder, write_atomically

_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_TEST = "ldmlab test certificate"
_PNG = b"\x89PNG\r\n\x1a\n"
_ALGORITHMS = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


class Credentials(NamedTuple):
    """What a file's manifest says."""

    state: str  # none | valid | changed | not read
    detail: str  # who signed, or what does not fit


class Signer:
    """Signs PNG files with a certificate chain and its private key, both PEM; None: a test certificate."""

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        if (certificate is None) != (key is None):
            raise InputError("--certificate and --key belong together; give both, or neither for a test certificate.")
        paths = _test_files() if certificate is None or key is None else (certificate, key)
        self._context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})  # 10 kB instead of 280
        try:
            self._signer = _signer(*paths)
            _check(self._signed(_probe(), "probe.png"))
        except (OSError, ValueError, TypeError, c2pa.C2paError) as error:
            if certificate is None:
                raise InputError(
                    f"the test certificate of this machine cannot sign ({error}); delete {paths[0].parent}, and a new "
                    "one is made."
                ) from error
            raise InputError(
                f"--certificate {paths[0]} and --key {paths[1]} cannot sign ({error}); give the PEM chain of a valid "
                "signing certificate, its own first, and its EC key without password."
            ) from error

    def sign(self, path: Path, title: str) -> None:
        """Put the manifest into the file."""
        try:
            signed = self._signed(path.read_bytes(), title)
        except c2pa.C2paError as error:  # a certificate may expire
            raise InputError(f"{path} cannot be signed ({error}); renew the certificate.") from error
        write_atomically(path, lambda temporary: temporary.write_bytes(signed))

    def _signed(self, content: bytes, title: str) -> bytes:
        action = {"action": "c2pa.created", "digitalSourceType": _GENERATED}
        manifest = {
            "claim_generator_info": [{"name": "ldmlab", "version": version("ldmlab")}],
            "format": "image/png",
            "title": title,
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, "image/png", io.BytesIO(content), signed)
        return signed.getvalue()


def _signer(certificate: Path, key: Path) -> c2pa.Signer:
    """ValueError, TypeError or C2paError for files that are no certificate or no EC key."""
    private = serialization.load_pem_private_key(read_text(key).encode(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in _ALGORITHMS:
        raise ValueError(f"the key is none of an elliptic curve of {', '.join(_ALGORITHMS)}")
    chain = x509.load_pem_x509_certificates(read_text(certificate).encode())
    certificates = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)
    # all that is given as the chain gets into every signed file: a key beside the certificates does not belong there
    return c2pa.Signer.from_info(
        c2pa.C2paSignerInfo(_ALGORITHMS[private.curve.name], certificates, _pem(private), None)
    )


def _probe() -> bytes:
    """A PNG of one pixel."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()


def _check(signed: bytes) -> None:
    """ValueError where what was signed is not valid."""
    if (found := credentials(signed)).state != "valid":
        raise ValueError(found.detail)


def credentials(content: bytes) -> Credentials:
    """Whether the bytes of a PNG are those that were signed, padding included, and by whom."""
    if not content.startswith(_PNG):
        return Credentials("not read", "only those in PNG files are")
    if b"caBX" not in content:
        return Credentials("none", "")
    if (chunks := _chunks(content)) is None:
        return Credentials("changed", "a chunk of the PNG differs from its checksum")
    if b"caBX" not in chunks:  # but in a text
        return Credentials("none", "")
    try:  # no file has an address called
        context = c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False}})
        with c2pa.Reader("image/png", io.BytesIO(content), context=context) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        return Credentials("changed", str(error))
    codes = [status["code"] for status in found.get("validation_status", [])]
    wrong = [code for code in codes if code != "signingCredential.untrusted"]
    if found.get("validation_state") not in ("Valid", "Trusted") or wrong:
        return Credentials("changed", ", ".join(wrong) or str(found.get("validation_state")))
    manifest = found["manifests"][found["active_manifest"]]
    signature = manifest.get("signature_info", {})
    trust = "" if found["validation_state"] == "Trusted" else ", not looked up in a trust list"
    stated = _GENERATED in json.dumps(manifest.get("assertions"))
    made = "" if stated else ", which does not state that it was generated"
    return Credentials("valid", f"signed by {signature.get('common_name') or signature.get('issuer')}{trust}{made}")


def _chunks(content: bytes) -> set[bytes] | None:
    """The types of the chunks; None unless every chunk fits its checksum and nothing follows the last one."""
    place, types = len(_PNG), set[bytes]()
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4])
        end = place + 12 + length
        if zlib.crc32(content[place + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            return None
        types.add(content[place + 4 : place + 8])
        if content[place + 4 : place + 8] == b"IEND":
            return types if end == len(content) else None
        place = end
    return None


def _test_files() -> tuple[Path, Path]:
    """Certificate chain and key of this machine, made once."""
    folder = weights_folder() / "credentials"
    paths = folder / "test-chain.pem", folder / "test-key.pem"
    if all(path.is_file() for path in paths):
        return paths
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"{folder} is being written", wait=True, quiet=True):
        if not all(path.is_file() for path in paths):  # another process may have been first
            chain, key = _test_chain()
            write_atomically(paths[1], lambda temporary: temporary.write_bytes(key))
            paths[1].chmod(0o600)
            write_atomically(paths[0], lambda temporary: temporary.write_bytes(chain))
    return paths


def _test_chain() -> tuple[bytes, bytes]:
    """A certificate for ten years below a root whose key is thrown away."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = [_certificate(key, root_key, authority=False), _certificate(root_key, root_key, authority=True)]
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain), _pem(key)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


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
