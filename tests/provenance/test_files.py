"""Signed video files: what is written verifies, what is changed does not, and no frame is touched."""

import json
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np
import pytest

from cfengine import provenance
from cfengine.errors import ConfigError, OutputError, ProvenanceError
from cfengine.provenance import Record, sign, verify
from cfengine.provenance.record import HASHED_UP_TO, MADE_BY_MODEL
from cfengine.video import VideoWriter, read_video

pytestmark = pytest.mark.cpu

pytest.importorskip("c2pa")


def write(path, frames=20, **options):
    """A noisy video, so that nearly all of its bytes are media data."""
    noise = np.random.default_rng(0)
    with VideoWriter(path, fps=16, **options) as writer:
        for _ in range(frames):
            writer.write(noise.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("signed") / "a.mp4", record=Record(model="tiny-world", seed=2**64 - 1))


def changed(source: Path, target: Path, place: int) -> Path:
    """A copy with one bit of one byte flipped."""
    data = bytearray(source.read_bytes())
    data[place] ^= 1
    target.write_bytes(data)
    return target


def test_every_written_file_says_that_it_is_synthetic(tmp_path):
    report = verify(write(tmp_path / "a.mp4"))
    assert report.state == "verified" and report.synthetic is True
    assert report.content_matches and report.signature_valid and not report.failures
    assert MADE_BY_MODEL.endswith(report.source_type)
    assert report.generator.startswith("cfengine ")
    assert report.told == {}  # nothing else is told unasked
    assert report.trust == "own key"
    age = datetime.now(UTC) - datetime.fromisoformat(report.when)
    assert 0 <= age.total_seconds() < 600


def test_what_the_record_tells(signed, tmp_path):
    assert verify(signed).told == {"model": "tiny-world", "seed": str(2**64 - 1)}
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"abc")
    report = verify(write(tmp_path / "b.mp4", record=Record(weights=weights, prompt="hills, £ and 丘")))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2
    assert report.told == {"weights_sha256": known, "prompt": "hills, £ and 丘"}


def test_large_or_missing_weights_are_not_hashed(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(HASHED_UP_TO + 1)  # a hole: takes no room
    for path in (large, tmp_path / "absent"):
        assert "parameters" not in json.dumps(Record(weights=path).manifest())


def test_the_record_names_neither_file_nor_folder(tmp_path):
    path = write(tmp_path / "private-name.mp4", record=Record(model="m"))
    assert b"private-name" not in path.read_bytes()


def test_signing_touches_no_frame(tmp_path):
    plain, signed = write(tmp_path / "plain.mp4", record=None), write(tmp_path / "signed.mp4")
    before, after = list(read_video(plain)), list(read_video(signed))
    assert len(before) == len(after) == 20
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert 0 < signed.stat().st_size - plain.stat().st_size < 10_000
    data = signed.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index still comes first


def test_without_a_record_nothing_is_signed(tmp_path):
    report = verify(write(tmp_path / "a.mp4", record=None))
    assert (report.state, report.content_matches, report.synthetic) == ("absent", None, None)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_one_flipped_bit_of_media_is_found(signed, tmp_path, share):
    data = signed.read_bytes()
    begin = data.index(b"mdat")
    path = changed(signed, tmp_path / "a.mp4", begin + int((len(data) - begin) * share))
    report = verify(path)
    assert (report.state, report.content_matches, report.signature_valid) == ("tampered", False, True)
    assert "assertion.bmffHash.mismatch" in report.sentence


def test_a_changed_record_is_found(signed, tmp_path):
    """Another source type, another seed or another time: the signature holds each of them."""
    for words in (b"trainedAlgorithmicMedia", b"18446744073709551615", b"c2pa.created"):
        report = verify(changed(signed, tmp_path / "a.mp4", signed.read_bytes().index(words)))
        assert report.state == "tampered", words


def test_a_stripped_record_is_absent(signed, tmp_path):
    path = tmp_path / "bare.mp4"
    with av.open(str(signed)) as source, av.open(str(path), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    assert len(list(read_video(path))) == 20
    assert verify(path).state == "absent"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_tampered_with(signed, tmp_path, share):
    data = signed.read_bytes()
    path = tmp_path / "short.mp4"
    path.write_bytes(data[: max(200, int(len(data) * share))])  # the record begins within 200 bytes
    assert verify(path).state == "tampered"


def test_bytes_behind_the_end_are_tampering(signed, tmp_path):
    path = tmp_path / "long.mp4"
    path.write_bytes(signed.read_bytes() + b"something more")
    assert verify(path).state == "tampered"


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"hello"), ("a.mp4", b"hello"), ("a.mp4", b""), ("a", b"hello")])
def test_files_that_carry_nothing(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert verify(tmp_path / name).state == "absent"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        verify(tmp_path / "absent.mp4")
    with pytest.raises(OutputError, match="cannot be read"):
        verify(tmp_path)


def test_a_chain_of_fragments_is_signed_too(tmp_path, monkeypatch):
    """What is left where the index could not be moved to the front."""
    monkeypatch.setattr(VideoWriter, "_index_first", lambda self: None)
    path = write(tmp_path / "a.mp4", frames=40)
    assert path.read_bytes().count(b"moof") > 1
    assert verify(path).verified and len(list(read_video(path))) == 40
    assert verify(changed(path, tmp_path / "b.mp4", path.stat().st_size - 3000)).state == "tampered"


def test_a_file_that_cannot_be_signed_stays_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)  # as if it were not installed
    with pytest.warns(UserWarning, match=r"a.mp4 carries no record that it is synthetic: c2pa is not installed; pip"):
        path = write(tmp_path / "a.mp4")
    assert len(list(read_video(path))) == 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ConfigError, match="pip install c2pa-python"):
        verify(path)


def test_a_failure_while_signing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    import c2pa

    path = write(tmp_path / "a.mp4", record=None)
    before = path.read_bytes()

    def full(self, source, target, signer=None):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(c2pa.Builder, "sign_file", full)
    with pytest.raises(ProvenanceError, match="No space left"):
        sign(path, Record())
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_signing_keeps_the_permissions_of_the_file(tmp_path):
    path = write(tmp_path / "a.mp4", record=None)
    path.chmod(0o640)
    sign(path, Record())
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_empty_run_signs_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoWriter(tmp_path / "a.mp4", fps=16).close()
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_maker(tmp_path):
    """A picture by another program: captured by a camera, then edited by a second one."""
    import c2pa

    from cfengine.provenance.keys import make_identity, parse_identity
    from cfengine.provenance.sign import SETTINGS

    identity = parse_identity(make_identity(), tmp_path)
    context = c2pa.Context(c2pa.Settings.from_dict(SETTINGS))

    def put(source, target, generator, action, relation=None):
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(identity.algorithm, identity.chain, identity.key, None))
        actions = {"label": "c2pa.actions", "data": {"actions": [action]}}
        builder = c2pa.Builder({"claim_generator_info": [generator], "assertions": [actions]}, context=context)
        if relation:
            with source.open("rb") as file:
                builder.add_ingredient({"relationship": relation, "label": "parent"}, "image/png", file)
        builder.sign_file(source, target, signer)

    plain, taken, edited = (tmp_path / f"{name}.png" for name in ("plain", "taken", "edited"))
    pytest.importorskip("PIL.Image").fromarray(np.zeros((16, 16, 3), np.uint8)).save(plain)
    kind = MADE_BY_MODEL.replace("trainedAlgorithmicMedia", "digitalCapture")
    put(plain, taken, {"name": "Camera", "version": "1"}, {"action": "c2pa.created", "digitalSourceType": kind})
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["parent"]}}
    put(taken, edited, {"name": "Editor"}, opened, "parentOf")

    report = verify(taken)
    assert report.verified and report.synthetic is False and report.source_type == "digitalCapture"
    assert (report.generator, report.trust) == ("Camera 1", "")
    report = verify(edited)
    assert report.verified and report.generator == "Editor" and report.source_type == "digitalCapture"


def test_public_names():
    assert set(provenance.__all__) == {"SYNTHETIC", "Record", "Report", "sign", "verify"}
