"""The check of a file's C2PA record: does it hold, what does it say, and who signed it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfengine.errors import ConfigError, OutputError, ProvenanceError
from cfengine.provenance.keys import identity_path, parse_identity
from cfengine.provenance.record import SOURCE_TYPES
from cfengine.provenance.sign import SETTINGS, library

SYNTHETIC_TYPES = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
UNTRUSTED = "signingCredential.untrusted"  # says nothing of the file, only that no anchor vouches for its signer
_STORE = b"jumdc2pa"  # how a box that holds C2PA records begins, whatever kind of file it lies in


@dataclass(frozen=True)
class Report:
    """What was found.

    state: "verified", "tampered" (file or record is not what was signed), "invalid" (the record breaks other rules of
    C2PA) or "absent"      sentence: the same in words
    content_matches, signature_valid: None where there is no record to read
    synthetic: what the record says; None where it does not say      trust: "own key", "anchors" (of those given) or ""
    told: whatever else the maker put beside the action that created the file      failures: C2PA's codes
    """

    path: str
    state: str
    sentence: str
    content_matches: bool | None = None
    signature_valid: bool | None = None
    synthetic: bool | None = None
    source_type: str = ""
    generator: str = ""
    when: str = ""
    signer: str = ""
    trust: str = ""
    told: dict[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        return self.state == "verified"


def verify(path: str | Path, *, anchors: str | Path | None = None) -> Report:
    """Read and check the record of a file of any kind and any maker that the C2PA library knows; nothing is fetched.

    anchors: PEM certificates of authorities that vouch for signers; without them the user's own key alone is known
    OutputError: no such file, or not readable      ConfigError: anchors without a certificate, library not installed
    """
    path = Path(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror}); check its path and its permissions") from None
    try:
        c2pa = library()
    except ProvenanceError as error:
        raise ConfigError(f"{path} cannot be checked: {error}") from error
    own = None if anchors else _own_certificate()
    trusted = _read_anchors(Path(anchors)) if anchors else own and own[1]
    settings = {**SETTINGS, "trust": {"user_anchors": trusted}} if trusted else SETTINGS
    try:
        with c2pa.Context(c2pa.Settings.from_dict(settings)) as context, c2pa.Reader(path, context=context) as reader:
            store = json.loads(reader.json())
    except c2pa.C2paError.RemoteManifest:
        return Report(str(path), "absent", "it only points to a record on the net, which is not fetched")
    except c2pa.C2paError as error:
        return _without(path, error)
    return _report(path, store, own[0] if own else "")


def _without(path: Path, error: Exception) -> Report:
    """A file whose record cannot be read: it has none, or it had one and is damaged."""
    if _mentions_record(path):
        return Report(
            str(path), "tampered", f"it has a C2PA record, but the file is damaged or was cut ({error})", False, False
        )
    return Report(str(path), "absent", "it carries no C2PA record, so it says nothing of where it comes from")


def _mentions_record(path: Path) -> bool:
    if not path.stat().st_size:
        return False  # which cannot be mapped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_STORE) >= 0


def _report(path: Path, store: dict[str, Any], own_serial: str) -> Report:
    """Put the library's findings in order. store: its JSON      own_serial: of the user's own certificate, or empty"""
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signer, made = manifest.get("signature_info", {}), _creation(store)
    kind = made.get("digitalSourceType", "").removeprefix(SOURCE_TYPES)
    trust = ""
    if store.get("validation_state") == "Trusted":
        # An authority gives a serial number once, so under an anchor it is as good as the key.
        trust = ("own key" if signer.get("cert_serial_number") == own_serial else "") if own_serial else "anchors"
    return Report(
        str(path),
        **_judgement(store),
        synthetic=kind in SYNTHETIC_TYPES if kind else None,
        source_type=kind,
        generator=_generator(manifest),
        when=made.get("when", ""),
        signer=", ".join(filter(None, (signer.get("common_name"), signer.get("issuer")))),
        trust=trust,
        told={
            name: value for name, value in sorted(made.get("parameters", {}).items()) if isinstance(value, str | int)
        },
    )


def _judgement(store: dict[str, Any]) -> dict[str, Any]:
    """Whether the record holds: state, sentence, content_matches, signature_valid and failures of a `Report`."""
    found = store.get("validation_results", {})
    active = found.get("activeManifest", {})
    deltas = [delta.get("validationDeltas", {}) for delta in found.get("ingredientDeltas") or ()]
    passed = [entry["code"] for entry in active.get("success", ())]
    failed = [entry["code"] for part in (active, *deltas) for entry in part.get("failure", ())]
    failed = [code for code in dict.fromkeys(failed) if code != UNTRUSTED]
    differs = any(code.endswith(".mismatch") for code in failed)
    content = any(code.endswith("Hash.match") for code in passed) and not differs
    signature = "claimSignature.validated" in passed and not any(code.startswith("claimSignature.") for code in failed)
    if store.get("validation_state") in ("Valid", "Trusted") and content and signature:
        state, sentence = "verified", "the signature is valid and the file is as it was when it was signed"
    elif differs or not signature:
        what = "the file or its record was changed after it was signed"
        state, sentence = "tampered", f"{what} ({', '.join(failed) or 'no valid signature'})"
    else:
        state, sentence = "invalid", f"its record breaks the rules of C2PA ({', '.join(failed) or 'nothing binds it'})"
    return {
        "state": state,
        "sentence": sentence,
        "content_matches": content,
        "signature_valid": signature,
        "failures": tuple(failed),
    }


def _creation(store: dict[str, Any]) -> dict[str, Any]:
    """The latest action that says from what source a file is; that of an edited file lies with what it was made of."""
    for manifest in _lineage(store):
        for assertion in manifest.get("assertions", ()):
            if assertion.get("label", "").startswith("c2pa.actions"):
                for action in assertion.get("data", {}).get("actions", ()):
                    if action.get("digitalSourceType"):
                        return action
    return {}


def _lineage(store: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The active manifest, then that of the file it was made from, and so on."""
    manifests, label, seen = store.get("manifests", {}), store.get("active_manifest"), set()
    while label in manifests and label not in seen:
        seen.add(label)
        yield manifests[label]
        parents = [i for i in manifests[label].get("ingredients", ()) if i.get("relationship") == "parentOf"]
        label = parents[0].get("active_manifest") if parents else None


def _generator(manifest: dict[str, Any]) -> str:
    """Name and version of the program that made the record; old records have one line of text."""
    for entry in manifest.get("claim_generator_info") or ():
        return " ".join(filter(None, (entry.get("name"), entry.get("version"))))
    return manifest.get("claim_generator", "")


def _own_certificate() -> tuple[str, str] | None:
    """Serial number and issuer's certificate (PEM) of the user's key; None without one, and none is made here."""
    from cryptography import x509

    try:
        path = identity_path()
        identity = parse_identity(path.read_bytes(), path)
    except (OSError, RuntimeError, ProvenanceError):
        return None
    leaf = x509.load_pem_x509_certificates(identity.chain)[0]
    return str(leaf.serial_number), identity.issuer.decode()


def _read_anchors(path: Path) -> str:
    """The certificates of a PEM file, as text."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a PEM file of certificates") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} holds no readable certificates ({error}); give a PEM file of those you trust"
        ) from None
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in found).decode()
