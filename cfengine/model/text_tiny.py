"""Text encoder of the small world: words to concepts to learned vectors.

A prompt names at most one concept of each group (camera, light, land, weather); a group it does not mention
takes its default. The encoding is one vector a group, in the order of GROUPS.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cfengine.errors import CheckpointError, PromptError

GROUPS: dict[str, tuple[str, ...]] = {  # the first concept of a group is its default
    "camera": ("hold", "left", "right"),
    "light": ("day", "sunset", "night"),
    "land": ("meadow", "desert", "snow"),
    "weather": ("clear", "overcast", "fog"),
}
CONCEPTS: tuple[str, ...] = tuple(concept for group in GROUPS.values() for concept in group)

_SYNONYMS = {
    "hold": "still static stay stop stopped stationary fixed motionless wait freeze halt rest pause unmoving",
    "left": "leftward leftwards west westward counterclockwise anticlockwise",
    "right": "rightward rightwards east eastward clockwise",
    "day": "daylight daytime noon midday morning sunny sun bright blue",
    "sunset": "sunrise dusk dawn evening twilight golden orange",
    "night": "nighttime midnight dark darkness moonlight moonlit nocturnal",
    "meadow": "meadows grass grassland green field fields plain plains pasture prairie lawn",
    "desert": "sand sandy dunes dune dry arid sahara",
    "snow": "snowy winter ice icy arctic frozen tundra white",
    "clear": "cloudless fair fine sunlit",
    "overcast": "cloudy clouds cloud grey gray dull",
    "fog": "foggy mist misty haze hazy",
}
_FILLER = frozenset(
    "a an the and or of on in at to by with over under across through into from for is are it its as while then now "
    "pan pans panning turn turns turning look looks looking rotate rotates rotating swing swings swinging spin spins "
    "spinning move moves moving go goes going camera view shot scene landscape panorama world video horizon sky "
    "ground land landscape weather light lit time landmarks landmark towers tower cones cone balls ball "
    "arches arch hills hill wide distant far around about toward towards keep keeps side one some very "
    "slight slightly cinematic please show me us there where we you see seen beautiful quiet coloured colored "
    "colourful colorful shapes shape direction".split()
)
_WORDS = {word: concept for concept, words in _SYNONYMS.items() for word in [concept, *words.split()]}
_GROUP_OF = {concept: group for group, concepts in GROUPS.items() for concept in concepts}


def concepts_of(prompt: str, limit: int = 16) -> tuple[str, ...]:
    """Read one concept of every group out of a prompt.

    Unknown words are ignored with one notice that names them; where a prompt names two concepts of a group the last
    one counts, with a notice. PromptError: empty, no known word, or more than `limit` words that carry meaning.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    if not words:
        raise PromptError(
            "the prompt is empty; name a camera move and a place, for example 'pan right, desert, sunset'"
        )
    known = [_WORDS[word] for word in words if word in _WORDS]
    if not known:
        raise PromptError(f"no word of the prompt {prompt!r} is known to tiny-world; it knows {', '.join(CONCEPTS)}")
    if len(known) > limit:
        raise PromptError(f"the prompt has {len(known)} meaningful words but the text limit is {limit}; shorten it")
    unknown = sorted({word for word in words if word not in _WORDS and word not in _FILLER})
    if unknown:
        warnings.warn(f"tiny-world does not know and ignores: {', '.join(unknown)}", stacklevel=3)
    chosen = {group: concepts[0] for group, concepts in GROUPS.items()}
    named: dict[str, str] = {}
    for concept in known:
        group = _GROUP_OF[concept]
        if named.get(group, concept) != concept:
            warnings.warn(f"the prompt names two kinds of {group}; '{concept}' replaces '{named[group]}'", stacklevel=3)
        named[group] = concept
    return tuple((chosen | named).values())


class TinyTextEncoder:
    """A table with one learned vector a concept."""

    def __init__(self, table: torch.Tensor, text_len: int = 16) -> None:
        if table.shape[0] != len(CONCEPTS):
            raise CheckpointError(
                f"text table has {table.shape[0]} rows but the vocabulary has {len(CONCEPTS)} concepts; train it again"
            )
        self.table, self.text_dim, self.text_len = table.float(), table.shape[1], text_len

    @classmethod
    def from_file(cls, path: str | Path, text_len: int = 16) -> TinyTextEncoder:
        """Load the table written by `save`; CheckpointError where the file is missing or damaged."""
        try:
            return cls(load_file(path)["table"], text_len)
        except (OSError, KeyError, SafetensorError) as problem:
            raise CheckpointError(
                f"text encoder file {path} cannot be read ({problem}); download or train it again"
            ) from problem

    def save(self, path: str | Path) -> None:
        """Write the table as float16 safetensors."""
        save_file({"table": self.table.half().contiguous()}, path, metadata={"concepts": " ".join(CONCEPTS)})

    def check(self, prompt: str) -> None:
        """Raise PromptError for a prompt that cannot be encoded."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices come when it is encoded
            concepts_of(prompt, self.text_len)

    def encode(self, prompt: str) -> torch.Tensor:
        """(n, text_dim) float32, one row a group; errors and notices as in `concepts_of`."""
        return self.table[[CONCEPTS.index(concept) for concept in concepts_of(prompt, self.text_len)]]
