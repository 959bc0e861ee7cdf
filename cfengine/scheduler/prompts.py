"""Keys and values of prompts and of mixes of prompts, made beside the chunks that will need them."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from cfengine.errors import CFEngineError
from cfengine.model.dit import CrossCache

Mix = tuple[tuple[str, float], ...]  # prompts, and the weights of their rows, which add up to 1
Keys = list[CrossCache]  # per layer

KEPT_BYTES = 256 * 2**20  # keys and values of prompts lately used: 13 prompts of 100 tokens at 1.3 billion parameters
MIX_LIMIT = 16  # prompts that a blend begins with: blends that overtake blends without end would add one each
KEPT_ROWS = 32  # prompts whose rows are kept, at most 4 MiB each in the same model


def pure(prompt: str) -> Mix:
    """One prompt and nothing else."""
    return ((prompt, 1.0),)


def mixed(origin: Mix, prompt: str, weight: float) -> Mix:
    """`weight` of a prompt, the rest of `origin`."""
    if weight >= 1 or origin == pure(prompt):
        return pure(prompt)
    parts = {text: (1 - weight) * share for text, share in origin}
    parts[prompt] = parts.get(prompt, 0.0) + weight
    return tuple(parts.items())


def trimmed(mix: Mix) -> Mix:
    """The heaviest MIX_LIMIT parts of a mix, of equal ones those that came last, with weights that add up to 1."""
    if len(mix) <= MIX_LIMIT:
        return mix
    lightest = sorted(range(len(mix)), key=lambda place: mix[place][1])[: len(mix) - MIX_LIMIT]
    parts = [part for place, part in enumerate(mix) if place not in lightest]
    total = sum(weight for _, weight in parts)
    return tuple((prompt, weight / total) for prompt, weight in parts)


def finished(keys: Keys) -> Future:
    """A Future that is done."""
    future: Future = Future()
    future.set_result(keys)
    return future


def mixed_rows(parts: list[tuple[Tensor, float]]) -> Tensor:
    """Weighted sum of the rows of prompts, (n, text_dim) each; shorter ones count as zeros where they end, as padding.

    One prompt alone is given back as it is, else float32.
    """
    if len(parts) == 1:
        return parts[0][0]
    longest = max((rows for rows, _ in parts), key=len)
    total = torch.zeros(longest.shape, device=longest.device)
    for rows, weight in parts:
        total[: len(rows)] += weight * rows.float()
    return total


class PromptCache:
    """What sessions of an engine read by cross-attention, by mix of prompts; the latest are kept.

    `now` makes what is missing in the thread that calls, `ask` in one thread of the engine, which ends with it. One
    encoding runs at a time, so that an encoder need not be thread-safe.
    """

    def __init__(
        self,
        embed: Callable[[str], Tensor],
        project: Callable[[Tensor], Keys],
        run: Callable[[Callable[[], Keys]], Keys],
        check: Callable[[str], None] = lambda prompt: None,
    ) -> None:
        """embed: prompt to rows (n, text_dim), PromptError for a bad one      project: rows to keys and values

        run: calls what it is given where a device wants it      check: see `check`
        """
        self.check = check  # raises PromptError for what is wrong with a prompt and can be told without encoding it
        self._embed, self._project, self._run = embed, project, run
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._made: OrderedDict[Mix, Keys] = OrderedDict()
        self._asked: dict[Mix, Future] = {}
        self._encoding, self._lock = threading.Lock(), threading.Lock()  # the second guards the tables above
        self._jobs: queue.SimpleQueue | None = None
        self._closed = False

    def now(self, mix: Mix) -> Keys:
        """Keys and values of a mix; makes them where they are not kept.  Raises what the encoder raises."""
        with self._lock:
            if (kept := self._kept(mix)) is not None:  # and no other encoding is waited for
                return kept
        with self._encoding:
            with self._lock:
                if (kept := self._kept(mix)) is not None:
                    return kept
                embed, project, run = self._embed, self._project, self._run  # `close` lets go of them at any moment
            made = run(lambda: project(mixed_rows([(self._rows_of(text, embed), weight) for text, weight in mix])))
            with self._lock:
                if not self._closed:
                    self._made[mix] = made
                    while len(self._made) > 1 and sum(map(bytes_of, self._made.values())) > KEPT_BYTES:
                        self._made.popitem(last=False)
                else:
                    self._rows.clear()
            return made

    def _kept(self, mix: Mix) -> Keys | None:
        """What is kept of a mix, which is then the latest in use; the caller holds the lock."""
        self._check_open()
        if mix in self._made:
            self._made.move_to_end(mix)
        return self._made.get(mix)

    def _rows_of(self, prompt: str, embed: Callable[[str], Tensor]) -> Tensor:
        rows = self._rows.pop(prompt, None)
        self._rows[prompt] = rows = embed(prompt) if rows is None else rows
        while len(self._rows) > KEPT_ROWS:
            self._rows.popitem(last=False)
        return rows

    def ask(self, mix: Mix) -> Future:
        """The same without waiting: a Future of keys and values, done at once where they are kept."""
        with self._lock:
            if (kept := self._kept(mix)) is not None:
                return finished(kept)
            if mix not in self._asked:
                self._asked[mix] = Future()
                self._start().put((self, mix, self._asked[mix]))
            return self._asked[mix]

    def _start(self) -> queue.SimpleQueue:
        """Where the thread takes its work from; it starts with the first of it."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._jobs,), name="cfengine-prompts", daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)  # the thread holds nothing but its queue
        return self._jobs

    def _answer(self, mix: Mix, future: Future) -> None:
        made, trouble = None, None
        try:
            made = self.now(mix)
        except BaseException as error:  # of whatever kind, it is for who asked
            trouble = error
        with self._lock:  # whoever asks from now on finds what was made, or has it made again
            self._asked.pop(mix, None)
            future.set_exception(trouble) if trouble else future.set_result(made)

    def _check_open(self) -> None:
        if self._closed:
            raise CFEngineError("this engine is closed; load it again with Engine.from_pretrained(...)")

    def close(self) -> None:
        """Let everything go and end the thread, after what it is encoding; what is still asked for fails.

        Harmless twice.
        """
        with self._lock:
            self._closed = True
            self._rows, self._made = OrderedDict(), OrderedDict()
            self._embed = self._project = self._run = None
            if self._jobs is not None:
                self._jobs.put(None)


def _serve(jobs: queue.SimpleQueue) -> None:
    """The thread: one job after the other until there is none."""
    while (job := jobs.get()) is not None:
        cache, mix, future = job
        cache._answer(mix, future)
        del cache, mix, future, job


def bytes_of(keys: Keys) -> int:
    """Size of keys and values of all layers."""
    return sum(cache.k.nbytes + cache.v.nbytes for cache in keys)
