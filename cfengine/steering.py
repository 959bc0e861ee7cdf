"""Words of a prompt that move the camera, and what an action makes of them."""

from __future__ import annotations

import re

TURN = 1  # code of the action that turns the camera: below 0 left, above 0 right, 0 not at all
CAMERAS = {-1: "pan left", 0: "hold", 1: "pan right"}
_CAMERA = re.compile(
    r"\b(?:(?:pan(?:ning|s)?|turn(?:ing|s)?)\s+(?:to the\s+)?(?:left|right)|hold)\b[\s,]*(?:over\b\s*)?", re.I
)


def steered(prompt: str, turn: float) -> str:
    """The prompt with its camera turned: what it says of the camera goes, and `CAMERAS` says the new one.

    turn: only its sign counts
    """
    place = _CAMERA.sub("", prompt).strip(" ,")
    camera = CAMERAS[(turn > 0) - (turn < 0)]
    return f"{camera}, {place}" if place else camera
