"""The text encoder of the small world."""

from __future__ import annotations

import warnings

import pytest
import torch

from cfengine.errors import CheckpointError, PromptError
from cfengine.model.text_tiny import CONCEPTS, TinyTextEncoder, concepts_of

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("pan right over a desert at sunset, fog", ("right", "sunset", "desert", "fog")),
        ("Turn LEFT, snowy night!", ("left", "night", "snow", "clear")),
        ("hold", ("hold", "day", "meadow", "clear")),
        ("the camera looks right at a cloudy meadow", ("right", "day", "meadow", "overcast")),
    ],
)
def test_prompts_without_a_notice(prompt: str, expected: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert concepts_of(prompt) == expected


def test_unknown_words_are_named_once() -> None:
    with pytest.warns(UserWarning, match="dragon, knight") as notices:
        assert concepts_of("pan left, a dragon, a knight, a dragon")[0] == "left"
    assert len(notices) == 1


def test_the_last_of_two_contrary_words_counts() -> None:
    with pytest.warns(UserWarning, match="'left' replaces 'right'"):
        assert concepts_of("pan right, pan left")[0] == "left"


@pytest.mark.parametrize("prompt", ["", "  ,.! ", "xyzzy plugh", "the a of"])
def test_prompts_that_say_nothing(prompt: str) -> None:
    with pytest.raises(PromptError):
        concepts_of(prompt)


def test_too_long() -> None:
    assert concepts_of("left " * 16)[0] == "left"
    with pytest.raises(PromptError, match="17 meaningful words but the text limit is 16"):
        concepts_of("left " * 17)


def test_rows_of_the_table_survive_a_file(tmp_path) -> None:
    table = torch.arange(len(CONCEPTS) * 4).view(-1, 4) / 8  # exact in float16
    TinyTextEncoder(table).save(tmp_path / "text.safetensors")
    encoder = TinyTextEncoder.from_file(tmp_path / "text.safetensors")
    assert (encoder.text_dim, encoder.text_len) == (4, 16)
    rows = encoder.encode("pan left, fog, night")
    assert torch.equal(rows, table[[CONCEPTS.index(c) for c in ("left", "night", "meadow", "fog")]])


def test_damaged_file(tmp_path) -> None:
    (tmp_path / "text.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="text.safetensors"):
        TinyTextEncoder.from_file(tmp_path / "text.safetensors")
