"""Keys that sign files: the user's own in the configuration folder, made at first use."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cfengine.config import config_dir
from cfengine.errors import ProvenanceError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

NAME = "signing.pem"
ORGANISATION = "unverified cfengine user"  # C2PA's library takes no signer without an organisation
YEARS = 30  # no renewal: a file must stay verifiable, and there is no time stamp that would outlive the certificate
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class Identity(NamedTuple):
    """What signs.      algorithm: C2PA's name      chain, key: PEM, the signer's certificate first"""

    algorithm: str
    chain: bytes
    key: bytes

    @property
    def issuer(self) -> bytes:
        """The last certificate of the chain, PEM: whoever it vouches for is this identity's owner."""
        begin = b"-----BEGIN CERTIFICATE-----"
        return begin + self.chain.rsplit(begin, 1)[-1]


def identity_path() -> Path:
    """File of the private key and its certificates."""
    return config_dir() / NAME


def own_identity() -> Identity:
    """The user's identity, made at first use; one for this call alone where the folder cannot be written to.

    ProvenanceError: the file is there and cannot sign.
    """
    try:
        path = identity_path()
    except RuntimeError:  # this user has no home, as in some containers
        return parse_identity(make_identity(), Path(NAME))
    try:
        if not os.path.exists(path):  # Path.exists raises where a folder may not be entered
            _write_private(path, make_identity())
        data = path.read_bytes()
    except OSError as error:
        if os.path.exists(path):
            raise ProvenanceError(f"{path} cannot be read ({error.strerror}); make it yours (chown, chmod)") from None
        # The home is read-only, full or not there: a signed file is worth more than a key that lasts.
        data = make_identity()
    return parse_identity(data, path)


def parse_identity(data: bytes, path: Path) -> Identity:
    """Read a PEM file of one private key and its chain, the signer's certificate first; path: for messages."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(data, password=None)
        chain = x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError) as error:  # TypeError: the key is encrypted
        raise ProvenanceError(
            f"{path} is no private key with its certificates in PEM, not encrypted ({error}); "
            "repair it, or delete it and a new one is made"
        ) from error
    return _pack(key, chain, path)


def make_identity() -> bytes:
    """PEM of a fresh P-256 key, its certificate, and the certificate of the authority that vouched for it once.

    C2PA takes no self-signed certificate, so an authority with a key of its own signs; that key is then forgotten, so
    no second certificate of this authority can ever be made, and trusting it is trusting this one key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    number = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:12]
    root_name, name = _name(f"authority of {number}"), _name(f"key {number}")
    root = (
        _certificate(root_name, root_name, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        _certificate(name, root_name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + leaf.public_bytes(pem) + root.public_bytes(pem)


def _pack(key: PrivateKeyTypes, chain: list[x509.Certificate], path: Path) -> Identity:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    algorithm = None
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = _CURVES.get(key.curve.name)
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    elif isinstance(key, rsa.RSAPrivateKey):
        algorithm = "ps256"
    if algorithm is None:
        raise ProvenanceError(f"{path} has a key that C2PA does not take; give P-256, P-384, P-521, Ed25519 or RSA")
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(algorithm, b"".join(certificate.public_bytes(pem) for certificate in chain), private)


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    parts = ((NameOID.ORGANIZATION_NAME, ORGANISATION), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts])


def _certificate(subject: x509.Name, issuer: x509.Name, public) -> x509.CertificateBuilder:
    """What the two certificates have in common: valid from yesterday, for clocks that differ, for `YEARS`."""
    from cryptography import x509

    begin = datetime.now(UTC) - timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=365 * YEARS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    """Signing of files, or of certificates; never both."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=sign,
        key_cert_sign=not sign,
        crl_sign=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read, unless another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        with suppress(FileExistsError):
            os.link(fresh, path)  # unlike a rename, it never replaces the key that another process just made
    finally:
        os.unlink(fresh)
