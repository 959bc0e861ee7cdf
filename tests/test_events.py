"""Events of a live session: when they count, in which order, and what is told of them."""

from __future__ import annotations

import json
import threading
from collections import deque

import pytest
import torch

from cfengine.errors import CFEngineError, ConfigError, PromptError
from cfengine.events import Prompt, Reset
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.scheduler import director as director_module
from cfengine.scheduler import prompts as prompts_module
from cfengine.scheduler.prompts import PromptCache, pure

pytestmark = pytest.mark.cpu


def shown(frames) -> bytes:
    return b"".join(frame.pixels.tobytes() for frame in frames)


def told(frames) -> tuple[int, int | None]:
    """What the frames of one chunk say of events, which must be one thing."""
    (what,) = {(frame.last_event_id, frame.applied_at_chunk) for frame in frames}
    return what


def settle(engine) -> None:
    """Wait until nothing is being encoded."""
    with engine._prompts._lock:
        asked = list(engine._prompts._asked.values())
    for future in asked:
        future.exception(timeout=30)


class Gate:
    """An encoder that waits, where it is closed."""

    def __init__(self, engine, monkeypatch) -> None:
        self.open, self.waits, self.encoded = threading.Event(), threading.Event(), []
        encode = engine._prompts._embed

        def gated(prompt: str) -> torch.Tensor:
            self.waits.set()
            assert self.open.wait(30)
            self.encoded.append(prompt)
            return encode(prompt)

        monkeypatch.setattr(engine._prompts, "_embed", gated)


# When events count ----------------------------------------------------------------------------------------------------


def test_frames_say_which_event_they_show(toy_engine):
    with toy_engine().session("a", seed=1) as session:
        seen = [told(session.next_chunk())]
        assert session.push(Prompt("b"), wait=True) == 1
        seen += [told(session.next_chunk()), told(session.next_chunk())]
        assert [session.set_prompt("c"), session.set_prompt("d")] == [2, 3]  # both at the same edge
        seen += [told(session.next_chunk())]
    assert seen == [(0, None), (1, 1), (1, 1), (3, 3)]
    assert session.closed


def test_receipts_tell_the_latency_once(toy_engine):
    with toy_engine().session("a", seed=1) as session:
        session.next_chunk()
        session.set_prompt("b")
        session.set_prompt("c")
        first, second = session.next_chunk()[0].timings, session.next_chunk()[0].timings
    assert [receipt.event_id for receipt in first.events] == [1, 2] and second.events == ()
    for receipt in first.events:
        assert receipt.pushed <= receipt.applied <= receipt.shown
        assert receipt.latency == receipt.shown - receipt.pushed > first.denoise
    assert first.text > 0 and second.text == 0


def test_no_chunk_waits_for_text(toy_engine, monkeypatch):
    """While the encoder is busy the stream goes on under the old prompt; then the new one counts, in order."""
    engine = toy_engine()
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as plain:
        engine.prefetch("known")
        settle(engine)
        gate = Gate(engine, monkeypatch)
        assert session.push(Prompt("slow")) == 1
        assert session.push(Prompt("known")) == 2  # is encoded already, but comes after
        for _ in range(2):
            frames = session.next_chunk()
            assert told(frames) == (0, None) and shown(frames) == shown(plain.next_chunk())
        gate.open.set()
        settle(engine)
        frames = session.next_chunk()
        assert told(frames) == (2, 2) and session.prompt == "known"
        assert [receipt.event_id for receipt in frames[0].timings.events] == [1, 2]
        assert frames[0].timings.text == 0
        plain.set_prompt("known")
        assert shown(frames) == shown(plain.next_chunk())


def test_an_event_that_must_count_at_once_takes_those_before_it_along(toy_engine, monkeypatch):
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        gate = Gate(engine, monkeypatch)
        session.push(Prompt("slow"))
        threading.Timer(0.2, gate.open.set).start()
        session.set_prompt("b")
        assert told(session.next_chunk()) == (2, 0) and sorted(gate.encoded) == ["b", "slow"]


def test_a_push_looks_through_what_waits_while_an_edge_takes_it(toy_engine):
    """The edge comes in the middle of the look, and must wait for it."""
    looking, over = threading.Event(), threading.Event()

    class Slow(deque):
        def __reversed__(self):
            for waiting in super().__reversed__():
                looking.set()
                over.wait(0.2)  # an edge that does not wait is through by then
                yield waiting

    raised = []

    def push() -> None:
        try:
            session.push(Reset())
        except RuntimeError as error:
            raised.append(error)

    with toy_engine().session("a") as session:
        session.push(Reset())
        session.push(Reset())
        session._director._waiting = Slow(session._director._waiting)
        thread = threading.Thread(target=push)
        thread.start()
        assert looking.wait(30)
        session.next_chunk()
        over.set()
        thread.join()
        session.next_chunk()
        assert raised == [] and session._director.last_event_id == 3


def test_another_thread_may_push(toy_engine):
    """Numbers are given once and events stay in order, whatever the consumer does meanwhile."""
    given: list[list[int]] = [[] for _ in range(4)]
    with toy_engine().session("a", seed=1) as session:

        def push(numbers: list[int]) -> None:
            for word in "bcdefg":
                numbers.append(session.push(Prompt(word)))

        threads = [threading.Thread(target=push, args=(numbers,)) for numbers in given]
        for thread in threads:
            thread.start()
        seen = [session.next_chunk() for _ in range(3)]
        for thread in threads:
            thread.join()
        last = session.set_prompt("z")
        seen.append(session.next_chunk())
    assert sorted(sum(given, [])) == list(range(1, 25)) and last == 25
    assert all(numbers == sorted(numbers) for numbers in given)
    assert [receipt.event_id for frames in seen for receipt in frames[0].timings.events] == list(range(1, 26))


def test_what_is_known_to_be_wrong_is_refused_at_the_call(toy_engine):
    engine = toy_engine()
    with engine.session("a", seed=1) as session, engine.session("a", seed=1) as plain:
        with pytest.raises(PromptError, match="empty"):
            session.set_prompt("  ")
        with pytest.raises(PromptError, match="13 words"):
            session.set_prompt("x " * 13)
        with pytest.raises(ConfigError, match="unknown switch 'melt'; choose one of cross, flush, recache, blend"):
            session.set_prompt("b", "melt")
        with pytest.raises(ConfigError, match="'b' is no event"):
            session.push("b")
        with pytest.raises(ConfigError, match="unknown switch"):
            Prompt("b", f"blend({'9' * 5000})")  # more digits than Python makes an int of
        for n in (0, 17):
            with pytest.raises(ConfigError, match=f"lasts {n} chunks; choose 1 to 16"):
                Prompt("b", f"blend({n})")
        with pytest.raises(ConfigError, match="'slow_fast'.*to flush.*fifo"):
            session.set_prompt("b", "flush")
        assert session.push(Prompt("b")) == 1  # nothing was counted
        session.close()
        with pytest.raises(CFEngineError, match="session is closed"):
            session.push(Prompt("b"))
        plain.next_chunk()


def test_a_consumer_that_takes_nothing_is_told(toy_engine, monkeypatch):
    monkeypatch.setattr(director_module, "LIMIT", 3)
    with toy_engine().session("a", seed=1) as session:
        for number in range(1, 4):
            assert session.push(Prompt("b"), wait=True) == number
        with pytest.raises(CFEngineError, match="3 events wait.*ask it for chunks"):
            session.push(Prompt("b"))
        session.next_chunk()
        assert session.push(Prompt("b")) == 4


@pytest.mark.parametrize("batch", [False, True])
def test_what_turns_out_wrong_later_is_told_once(toy_engine, batch):
    engine = toy_engine()
    with engine.batch(["a", "b"], seeds=[1, 2]) as group, engine.batch(["a", "b"], seeds=[1, 2]) as plain:
        session, move = group.sessions[0], group.next_chunk
        if not batch:
            session = engine.session("a", seed=1)
            move = session.next_chunk
        session.push(Prompt("x " * 13))
        group.sessions[1].set_prompt("c")
        plain.sessions[1].set_prompt("c")
        settle(engine)
        with pytest.raises(PromptError, match=r"event 1 \('x x .*dropped.*13 words"):
            move()
        assert not session.closed and session.push(Prompt("d"), wait=True) == 2
        plain.sessions[0].set_prompt("d")
        frames, expected = move(), plain.next_chunk()
        if batch:
            assert [shown(part) for part in frames] == [shown(part) for part in expected]
            assert [told(part) for part in frames] == [(2, 0), (1, 0)]
        else:
            assert told(frames) == (2, 0)
            session.close()


def test_an_encoder_that_breaks_is_one_of_our_errors(toy_engine, monkeypatch):
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        monkeypatch.setattr(engine._prompts, "_embed", lambda prompt: 1 / 0)
        session.push(Prompt("b"))
        settle(engine)
        with pytest.raises(CFEngineError, match="event 1.*division by zero"):
            session.next_chunk()
        assert len(session.next_chunk()) == 9


def test_the_small_world_knows_a_bad_prompt_before_it_encodes():
    encoder = TinyTextEncoder(torch.zeros(12, 4), text_len=3)
    encoder.check("pan left, snow")
    with pytest.raises(PromptError, match="4 meaningful words"):
        encoder.check("left snow fog night")


# Text beside the chunks -----------------------------------------------------------------------------------------------


def test_prefetch_spares_the_encoding(toy_engine, monkeypatch):
    engine = toy_engine()
    gate = Gate(engine, monkeypatch)
    gate.open.set()
    engine.prefetch("b c")
    settle(engine)
    with engine.session("a") as session:
        session.push(Prompt("b c"))
        assert told(session.next_chunk()) == (1, 0)
    assert gate.encoded == ["b c", "a"]
    with pytest.raises(PromptError, match="empty"):
        engine.prefetch("")


def test_a_cache_keeps_the_latest_in_its_bytes(toy_engine, monkeypatch):
    engine = toy_engine()
    keys = engine.encode_prompt("a b")
    size = sum(cache.k.nbytes + cache.v.nbytes for cache in keys)
    monkeypatch.setattr(prompts_module, "KEPT_BYTES", 3 * size)
    for prompt in ("c d", "e f", "a b", "g h"):
        engine.encode_prompt(prompt)
    assert list(engine._prompts._made) == [pure("e f"), pure("a b"), pure("g h")]
    assert engine.encode_prompt("a b") is keys


def test_a_prompt_that_is_only_asked_for_stays_in_use(toy_engine, monkeypatch):
    """As one that a program pushes again and again."""
    engine = toy_engine()
    keys = engine.encode_prompt("left")
    monkeypatch.setattr(prompts_module, "KEPT_BYTES", 2 * sum(cache.k.nbytes + cache.v.nbytes for cache in keys))
    for other in "abc":
        engine.prefetch("left")
        engine.encode_prompt(other)
    assert engine.encode_prompt("left") is keys


def test_what_is_kept_waits_for_no_other_encoding(toy_engine, monkeypatch):
    engine = toy_engine()
    keys = engine.encode_prompt("known")
    gate = Gate(engine, monkeypatch)
    try:
        engine.prefetch("slow")
        assert gate.waits.wait(30)
        found: list = []
        thread = threading.Thread(target=lambda: found.append(engine.encode_prompt("known")), daemon=True)
        thread.start()
        thread.join(10)
        assert found == [keys]
    finally:
        gate.open.set()


def test_a_blend_that_the_cache_cannot_hold_is_made_once(toy_engine, monkeypatch):
    """`set_prompt` makes every step, and no edge after it makes one again."""
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        monkeypatch.setattr(prompts_module, "KEPT_BYTES", 1)  # one prompt is kept
        session.set_prompt("b", "blend(4)")
        monkeypatch.setattr(engine._prompts, "now", None)
        for _ in range(5):
            assert told(session.next_chunk()) == (1, 0)


def test_blends_that_overtake_blends_for_ever_do_not_grow(toy_engine):
    engine = toy_engine()
    words = [f"{a}{b}" for a in "abcdef" for b in "abcdefgh"]
    with engine.session("a", seed=1) as session:
        for word in words[:40]:
            session.set_prompt(word, "blend(16)")
            session._director.edge()
            session._director.take()
            mix = session._director._script.at(session._director.next).mix
            assert len(mix) <= prompts_module.MIX_LIMIT + 1 and sum(weight for _, weight in mix) == pytest.approx(1)
            assert word in dict(mix)
        assert len(json.dumps(session._director.about())) < 2000


def overtaken(engine, session, monkeypatch) -> Gate:
    """A blend goes on while the text of another one is encoded, until the gate is opened."""
    session.set_prompt("b", "blend(8)")
    session.next_chunk()
    gate = Gate(engine, monkeypatch)
    session.push(Prompt("c", "blend(3)"))
    return gate


def test_an_event_that_waits_holds_no_more_than_it_can_need(toy_engine, monkeypatch):
    """While its text is encoded another blend goes on, and what its steps begin with changes from chunk to chunk."""
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        gate = overtaken(engine, session, monkeypatch)
        for _ in range(5):
            session.next_chunk()
            (waiting,) = session._director._waiting
            assert len(waiting.asked) <= 3  # two steps and the prompt itself
        gate.open.set()
        settle(engine)


def test_a_closed_engine_keeps_no_rows_of_what_was_being_encoded(toy_engine, monkeypatch):
    engine = toy_engine()
    gate = Gate(engine, monkeypatch)
    engine.prefetch("a")
    (future,) = engine._prompts._asked.values()
    assert gate.waits.wait(30)
    engine.close()
    gate.open.set()
    future.result(timeout=30)
    assert not engine._prompts._rows and not engine._prompts._made


def test_an_engine_that_is_closed_ends_its_thread(toy_engine, monkeypatch):
    engine, before = toy_engine(), set(threading.enumerate())
    gate = Gate(engine, monkeypatch)
    engine.prefetch("a")
    engine.prefetch("b")
    futures = list(engine._prompts._asked.values())
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon and gate.waits.wait(30)
    engine.close()
    gate.open.set()
    thread.join(30)
    assert not thread.is_alive()
    assert futures[0].exception() is None and "closed" in str(futures[1].exception())
    with pytest.raises(CFEngineError, match="closed"):
        engine.prefetch("c")


def test_a_dropped_cache_ends_its_thread():
    before = set(threading.enumerate())
    cache = PromptCache(lambda prompt: torch.zeros(1, 2), lambda rows: [], lambda work: work())
    cache.ask(pure("a")).result(timeout=30)
    (thread,) = set(threading.enumerate()) - before
    del cache
    thread.join(30)
    assert not thread.is_alive()


def test_a_blend_is_made_ahead(toy_engine, monkeypatch):
    """No edge projects anything, also where the picture had moved on before the text was there."""
    engine = toy_engine()
    with engine.session("a", seed=1) as session:
        gate = overtaken(engine, session, monkeypatch)
        for _ in range(2):  # the first blend goes on
            assert told(session.next_chunk()) == (1, 0)
        gate.open.set()
        settle(engine)
        monkeypatch.setattr(engine._prompts, "now", None)
        assert told(session.next_chunk()) == (2, 3)
        for _ in range(3):
            session.next_chunk()
        assert session.prompt == "c"
