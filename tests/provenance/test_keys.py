"""The key that signs: made once, private, replaceable, and never a reason to lose a video."""

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from cfengine.errors import ConfigError, ProvenanceError
from cfengine.provenance import verify
from cfengine.provenance.keys import _certificate, _name, _usage, identity_path, make_identity, own_identity
from cfengine.video import VideoWriter

pytestmark = pytest.mark.cpu

pytest.importorskip("c2pa")
PARTS = "cryptography.hazmat.primitives"
x509, hashes, serialization = (
    pytest.importorskip(name) for name in ("cryptography.x509", f"{PARTS}.hashes", f"{PARTS}.serialization")
)
ec, ed25519, rsa = (pytest.importorskip(f"{PARTS}.asymmetric.{name}") for name in ("ec", "ed25519", "rsa"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A configuration folder that does not exist yet."""
    monkeypatch.setenv("CFENGINE_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def write(path) -> Path:
    with VideoWriter(path, fps=16) as writer:
        for level in range(5):
            writer.write(np.full((64, 96, 3), level * 40, np.uint8))
    return path


def test_the_key_is_made_once_and_its_owner_alone_reads_it(folder, tmp_path):
    before = os.umask(0)  # the mode does not hang on what the shell takes away
    try:
        first = own_identity()
    finally:
        os.umask(before)
    assert [entry.name for entry in folder.iterdir()] == ["signing.pem"]
    assert stat.S_IMODE(identity_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert own_identity() == first
    assert b"PRIVATE" not in write(tmp_path / "a.mp4").read_bytes()


def test_processes_that_start_together_share_one_key(folder):
    found = []
    threads = [threading.Thread(target=lambda: found.append(own_identity())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_another_users_key_is_valid_and_unknown(folder, tmp_path):
    path = write(tmp_path / "a.mp4")
    assert verify(path).trust == "own key"
    anchors = tmp_path / "anchors.pem"
    anchors.write_bytes(own_identity().issuer)
    identity_path().unlink()
    report = verify(path)
    assert report.verified and report.trust == "" and not identity_path().exists()
    own_identity()  # another key of the same organisation
    assert verify(path).trust == ""
    assert verify(path, anchors=anchors).trust == "anchors"


def test_anchors_without_certificates_are_refused(folder, tmp_path):
    path = write(tmp_path / "a.mp4")
    for text in ("hello", "-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"):
        (tmp_path / "anchors.pem").write_text(text)
        with pytest.raises(ConfigError, match="holds no readable certificates"):
            verify(path, anchors=tmp_path / "anchors.pem")
    with pytest.raises(ConfigError, match="cannot be read"):
        verify(path, anchors=tmp_path / "absent.pem")


def test_a_folder_that_cannot_be_made_gives_a_passing_key(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CFENGINE_CONFIG_DIR", str(tmp_path / "file" / "config"))
    report = verify(write(tmp_path / "a.mp4"))
    assert report.verified and report.synthetic and report.trust == ""


def test_a_user_without_a_home_signs_too(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CFENGINE_CONFIG_DIR")
    monkeypatch.setattr(Path, "home", homeless)
    assert verify(write(tmp_path / "a.mp4")).verified


def own(key) -> bytes:
    """PEM of a user's own key and certificate, from an authority of theirs."""
    authority = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        _certificate(_name("Ada"), _name("Her authority"), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + leaf.public_bytes(pem)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate,
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["es384", "es512", "ed25519", "ps256"],
)
def test_a_certificate_of_ones_own(folder, tmp_path, make):
    folder.mkdir()
    identity_path().write_bytes(own(make()))
    report = verify(write(tmp_path / "a.mp4"))
    assert report.verified and report.signer.startswith("Ada")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is no private key with its certificates"),
        (make_identity().split(b"-----BEGIN CERTIFICATE")[0], "is no private key with its certificates"),
        (own(ec.generate_private_key(ec.SECP256K1())), "a key that C2PA does not take"),
    ],
    ids=["text", "key alone", "secp256k1"],
)
def test_a_file_that_cannot_sign_is_named(folder, tmp_path, content, message):
    folder.mkdir()
    identity_path().write_bytes(content)
    with pytest.raises(ProvenanceError, match=message):
        own_identity()
    with pytest.warns(UserWarning, match="carries no record that it is synthetic.*signing.pem"):
        path = write(tmp_path / "a.mp4")
    assert verify(path).state == "absent"  # and the key is left to its owner
    assert identity_path().read_bytes() == content


def test_a_key_of_another_certificate_is_noticed(folder, tmp_path):
    folder.mkdir()
    key, _ = make_identity().split(b"-----BEGIN CERTIFICATE", 1)
    _, chain = make_identity().split(b"-----BEGIN CERTIFICATE", 1)
    identity_path().write_bytes(key + b"-----BEGIN CERTIFICATE" + chain)
    with pytest.warns(UserWarning, match="carries no record"):
        path = write(tmp_path / "a.mp4")
    assert verify(path).state == "absent"
