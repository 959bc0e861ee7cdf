"""Snapshots as values: what they hold and share, whom they fit, and how they are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfengine import snapshot as snapshot_module
from cfengine.config import MemoryConfig, with_policy
from cfengine.errors import CFEngineError, OutputError, PromptError, SnapshotError
from cfengine.events import Prompt
from cfengine.snapshot import SharedPages, Snapshot, fingerprint

pytestmark = pytest.mark.cpu

SMALL = MemoryConfig(slow=3)  # full after four chunks


def seen(frames) -> list[tuple]:
    """What a consumer gets of frames; `test_detours` looks at more."""
    return [(f.pixels.tobytes(), f.index, f.time, f.last_event_id, f.applied_at_chunk) for f in frames]


def test_a_snapshot_is_a_value(toy_engine):
    """It does not change with the session, says its size, and may be used twice."""
    engine = toy_engine(memory=SMALL)
    with engine.session("a", seed=1) as session:
        for _ in range(5):
            session.next_chunk()
        snapshot, size = session.snapshot(device="cpu"), session.memory.bytes
        expected = [seen(session.next_chunk()) for _ in range(2)]
    pages = sum(part.nbytes for name, part in snapshot.tensors.items() if name.startswith(("memory.k.", "memory.v.")))
    assert 0.7 * size < pages < size < snapshot.bytes  # none that no slot shows; but latents, large in a toy
    for _ in range(2):
        with engine.resume(snapshot) as again:
            assert again.seed == 1 and again.prompt == "a"
            assert [seen(again.next_chunk()) for _ in range(2)] == expected


def test_snapshots_of_a_session_share_pages(toy_engine):
    """One a chunk later has the chunk's pages to itself; what is written again is not shared."""
    engine = toy_engine(memory=SMALL)

    def pages(snapshot: Snapshot) -> set[int]:
        return {id(part) for name, part in snapshot.tensors.items() if name.startswith("memory.k.")}

    def news(one: Snapshot, two: Snapshot) -> float:
        """Pages a layer that one has and the other has not."""
        return len(pages(one) - pages(two)) / engine.config.model.layers

    with engine.session("a", seed=1) as session:
        for _ in range(6):
            session.next_chunk()
        first = session.snapshot()
        assert news(session.snapshot(), first) == 0
        session.next_chunk()
        second = session.snapshot()
        assert 3 <= news(second, first) <= 4  # the chunk, and a page of it from the pass that promoted it
        session.rewind(first)
        again = session.snapshot()
        assert not pages(again) & (pages(first) | pages(second))
        session.set_prompt("b", "recache")
        session.next_chunk()
        last = session.snapshot()
        assert not pages(last) & pages(again)
        assert len(session._shared._given) == 2 * len(pages(last))  # keys and values
        del last
        assert not session._shared._given  # nothing but snapshots keeps copies


def test_a_snapshot_before_the_first_chunk(toy_engine):
    engine = toy_engine()
    with engine.session("a", seed=3) as session:
        session.set_prompt("b")
        snapshot = session.snapshot()
        expected = seen(session.next_chunk())
        session.rewind(snapshot)
        assert session.latents is None and seen(session.next_chunk()) == expected
    with engine.resume(snapshot) as again:
        assert seen(again.next_chunk()) == expected


def test_events_that_wait_are_part_of_it(toy_engine, tmp_path):
    engine = toy_engine()
    with engine.session("a", seed=3) as session:
        session.next_chunk()
        session.push(Prompt("b"))
        session.push(Prompt("c", "blend(2)"), wait=True)
        session.snapshot().save(tmp_path / "s")
        expected = [seen(session.next_chunk()) for _ in range(2)]
    with engine.resume(Snapshot.load(tmp_path / "s")) as again:
        frames = again.next_chunk()
        assert [seen(frames), seen(again.next_chunk())] == expected
        assert frames[0].timings.events[0].latency >= 0
        assert again.push(Prompt("d")) == 3


def test_numbers_of_events_are_not_given_twice(toy_engine):
    with toy_engine().session("a", seed=3) as session:
        snapshot = session.snapshot()
        assert session.set_prompt("b") == 1
        session.rewind(snapshot)
        assert session.next_chunk()[0].last_event_id == 0
        assert session.set_prompt("b") == 2


def test_one_of_a_batch_is_rewound_or_goes_on_alone(toy_engine):
    engine = toy_engine(memory=SMALL)
    with engine.batch(["a", "b c"], seeds=[4, 5]) as batch, engine.batch(["a", "b c"], seeds=[4, 5]) as plain:
        first = [plain.next_chunk() for _ in range(6)]
        for _ in range(2):
            batch.next_chunk()
        snapshot = batch.sessions[1].snapshot()
        batch.next_chunk()
        batch.sessions[1].rewind(snapshot)
        ours = batch.next_chunk()
        assert seen(ours[0]) == seen(first[3][0]) and seen(ours[1]) == seen(first[2][1])
        with batch.sessions[0].branch() as alone:
            one, two = alone.next_chunk(), batch.next_chunk()[0]
            assert [frame.index for frame in one] == [frame.index for frame in two]
            # products over fewer rows may sum in another order: 1 level where a value sits on a rounding edge
            assert all(abs(a.pixels.astype(int) - b.pixels).max() <= 1 for a, b in zip(one, two, strict=True))


def test_a_snapshot_of_another_engine_is_refused(toy_engine):
    with toy_engine(memory=SMALL).session("a") as session:
        session.next_chunk()
        snapshot = session.snapshot()
    refused = (
        (toy_engine(memory=MemoryConfig(slow=6)), r"memory.slow 3 and this engine has 6"),
        (toy_engine(memory=with_policy(SMALL, "fifo")), r"memory.* and this engine has "),
        (toy_engine(memory=SMALL, model_seed=1), r"weights '\w+' and this engine has '\w+'"),
        (toy_engine(memory=SMALL, dtype=torch.bfloat16), r"dtype 'torch.float32' and this engine has 'torch.bfloat16'"),
    )
    for engine, words in refused:
        with pytest.raises(SnapshotError, match=words):
            engine.resume(snapshot)
        with engine.session("b", seed=2) as other, engine.session("b", seed=2) as plain:
            with pytest.raises(SnapshotError, match=words):
                other.rewind(snapshot)
            assert seen(other.next_chunk()) == seen(plain.next_chunk())
        assert not engine._sessions


def test_a_prompt_that_cannot_be_encoded_any_more_changes_nothing(toy_engine):
    engine = toy_engine()
    with engine.session("a", seed=2) as session, engine.session("a", seed=2) as plain:
        snapshot = session.snapshot()
        about = json.loads(json.dumps(snapshot.about).replace('"text": "a"', '"text": "' + "x " * 13 + '"'))
        with pytest.raises(PromptError, match="13 words"):
            session.rewind(dataclasses.replace(snapshot, about=about))
        assert seen(session.next_chunk()) == seen(plain.next_chunk())
        with pytest.raises(PromptError, match="13 words"):
            engine.resume(dataclasses.replace(snapshot, about=about))
    assert not engine._sessions


def test_bad_files_are_refused(toy_engine, tmp_path):
    with toy_engine().session("a") as session:
        snapshot = session.snapshot()
    good = tmp_path / "good.safetensors"
    snapshot.save(good)
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]
    data = good.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "noise").write_bytes(b"\x80\x04" + data[:64])
    save_file(load_file(good), tmp_path / "plain")
    save_file(load_file(good), tmp_path / "later", {"cfengine snapshot": json.dumps({"format": 2})})
    save_file(load_file(good), tmp_path / "half", {"cfengine snapshot": json.dumps({"format": 1})})
    for name, words in (
        ("missing", "missing or damaged"),
        ("cut", "missing or damaged"),
        ("noise", "missing or damaged"),
        ("plain", "is no snapshot and .* reads snapshots of format 1"),
        ("later", "is a snapshot of format 2 and .* reads snapshots of format 1"),
        ("half", "cannot be read"),
    ):
        with pytest.raises(SnapshotError, match=words):
            Snapshot.load(tmp_path / name)
    with toy_engine().session("a") as session:
        session.next_chunk()
        whole = session.snapshot()
        first = next(name for name in whole.tensors if name.startswith("memory.k.1."))
        far = whole.tensors["memory.page_ids"].clone()
        far[1, 0] = 99
        for tensors, words in (
            (whole.tensors | {first: torch.zeros(3)}, f"{first} missing"),
            ({name: part for name, part in whole.tensors.items() if name != first}, f"{first} missing"),
            ({name: part for name, part in whole.tensors.items() if name != "memory.seen"}, r"memory.seen missing"),
            (whole.tensors | {"memory.sources": torch.zeros(3)}, r"memory.sources missing or mis-shaped"),
            (whole.tensors | {"memory.page_ids": far}, r"memory.k.1.99, memory.v.1.99 missing"),
        ):
            with pytest.raises(SnapshotError, match=words):
                session.rewind(Snapshot(whole.made_for, whole.about, tensors))
        with pytest.raises(SnapshotError, match="counters missing"):
            session.rewind(Snapshot(whole.made_for, {}, whole.tensors))
        assert len(session.next_chunk()) == 12
    for place in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(OutputError, match=r"snapshot of \d+ bytes cannot be written"):
            snapshot.save(place)
    assert not list(tmp_path.glob("*.partial"))


def test_a_hostile_file_is_refused_and_nothing_changed(toy_engine, tmp_path):
    """Rules and kernels index by what tables say: what they cannot say never reaches them."""
    engine = toy_engine(memory=SMALL)
    with engine.session("a", seed=2) as session, engine.session("a", seed=2) as plain:
        session.next_chunk()
        plain.next_chunk()
        whole = session.snapshot()
        pages = whole.tensors["memory.page_ids"]

        def refused(words: str, tensors=None, about=None) -> None:
            bad = dataclasses.replace(whole, tensors=whole.tensors | (tensors or {}), about=whole.about | (about or {}))
            for take in (session.rewind, engine.resume):
                with pytest.raises(SnapshotError, match=words):
                    take(bad)
            assert not session.closed

        for name, value in (
            ("page_ids", -1), ("spare_ids", 10**6), ("spare_ids", 0), ("count", 99), ("ends", -3), ("promoted", 99),
            ("sources", 3), ("seen", 0), ("seen", 2**31 - 1),
        ):  # fmt: skip
            changed = whole.tensors[f"memory.{name}"].clone()
            changed[-1, -1] = value
            refused(f"memory.{name}", {f"memory.{name}": changed})
        refused("memory.page_ids", {"memory.page_ids": pages.float()})
        refused("kept.starts", {"kept.starts": torch.zeros(2, dtype=torch.int64)})
        refused("kept.latents", {"kept.latents": torch.zeros(3)})
        refused("shown.counts", {"shown.counts": torch.zeros(3)})
        refused("latents", {"latents": torch.zeros(3)})
        refused("memory.other", {"memory.other": torch.zeros(3)})
        refused("decoder.first", {"decoder.first": torch.zeros(3)})
        for name in ("seed", "start", "index", "chunks", "effort"):
            for value in (-1, "1", None, 0.5, True):
                refused("counters", about={name: value})
        refused("effort 4 and this session has 4 level", about={"effort": 4})
        for far in (2**40, 2**63):
            refused("memory.seen", about={"start": far})
        refused("director", about={"director": []})
        director = whole.about["director"]
        for change in (
            {"script": []}, {"script": [{"text": "a", "more": 1}, 0, []]}, {"script": [{"text": "a"}, "x", []]},
            {"script": [{"text": "a"}, 0, [[1, 2]]]},
            {"script": [{"text": "a"}, 0, [["b", float("nan")]]]},
            {"waiting": [1]}, {"next": None}, {"events": "9"},
            {"applied": 3}, {"applied_at_chunk": "x"}, {"flush": 1}, {"reset": [1, None]}, {"reset": [True, -1]},
            {"reset": True}, {"waiting": [[1, {"seed": "x"}, False]]}, {"waiting": [[1, {"text": " "}, False]]},
        ):  # fmt: skip
            refused("makes no sense", about={"director": director | change})
        refused("makes no sense", about={"director": {}})
        assert seen(session.next_chunk()) == seen(plain.next_chunk())
    assert not engine._sessions
    headers = "[]", "1", "NaN", "[" * 100_000, '{"format": 1, "made_for": [], "about": {}}', '{"format": 1, "about": 3}'
    for header in headers:
        save_file({"a": torch.zeros(1)}, tmp_path / "bad", {"cfengine snapshot": header})
        with pytest.raises(SnapshotError):
            Snapshot.load(tmp_path / "bad")


def test_a_save_that_is_interrupted_leaves_nothing(toy_engine, tmp_path, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot_module, "save_file", interrupted)
    with toy_engine().session("a") as session, pytest.raises(KeyboardInterrupt):
        session.snapshot().save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_closed_session_and_one_of_no_engine(toy_engine):
    engine = toy_engine()
    session = engine.session("a")
    snapshot = session.snapshot()
    session.close()
    for call in (session.snapshot, session.branch, lambda: session.rewind(snapshot)):
        with pytest.raises(CFEngineError, match="session is closed"):
            call()
    engine.close()
    with pytest.raises(CFEngineError, match="engine is closed"):
        engine.resume(snapshot)


def test_failure_inside_closes_the_session(toy_engine, monkeypatch):
    engine = toy_engine()
    for what in ("snapshot", "rewind"):
        session = engine.session("a")
        session.next_chunk()
        snapshot = session.snapshot()
        session.next_chunk()
        with monkeypatch.context() as patch:
            patch.setattr(type(session._lane), "state" if what == "snapshot" else "restore", None)
            with pytest.raises(TypeError):
                session.snapshot() if what == "snapshot" else session.rewind(snapshot)
        assert session.closed
    assert not engine._sessions


def test_a_decoder_that_is_half_a_step_ahead_is_refused(toy_engine):
    """As the Wan VAE after a single latent frame, which keeps a word in place of what it has not seen."""
    with toy_engine().session("a") as session:
        session.next_chunk()
        state = session._lane._decoders[0].state
        session._lane._decoders[0].state = {**state, 1: "Rep"}
        with pytest.raises(SnapshotError, match="take the snapshot a chunk later"):
            session.snapshot()
        session._lane._decoders[0].state = state
        session.snapshot()


def test_no_room_for_a_copy_leaves_the_session_open(toy_engine, monkeypatch):
    engine = toy_engine()
    with engine.session("a", seed=2) as session, engine.session("a", seed=2) as plain:
        with monkeypatch.context() as patch:
            patch.setattr(SharedPages, "taken", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.snapshot()
        assert seen(session.next_chunk()) == seen(plain.next_chunk())


def test_a_fine_tune_is_another_model(toy_engine):
    """A change of any one weight is seen, by a few numbers of it."""
    engine = toy_engine()
    model, before = engine.model, engine._fingerprint
    for name, weight in list(model.named_parameters())[:: len(list(model.parameters())) // 5]:
        with torch.no_grad():
            kept = weight.clone()
            weight.mul_(1.001).add_(1e-4)
            assert fingerprint(model.named_parameters()) != before, name
            weight.copy_(kept)
    assert fingerprint(model.named_parameters()) == before
