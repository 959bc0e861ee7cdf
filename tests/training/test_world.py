"""The renderer and what is measured with it."""

from __future__ import annotations

import numpy as np
import pytest

from cfengine.codec.tiny_world import SPACE, TIME
from cfengine.model.text_tiny import concepts_of
from cfengine.training import measure, world

pytestmark = pytest.mark.cpu

PLAIN = world.Look()


def scene_of(colour: str = "red", shape: str = "ball", look: world.Look = PLAIN) -> world.Scene:
    return world.Scene(look, (world.Landmark(36.0, shape, colour),), ((5, 1.5, 0.3),))


def test_rendering_is_a_function_of_the_scene() -> None:
    first, again = (world.render(world.random_scene(np.random.default_rng(7)), np.arange(4.0)) for _ in range(2))
    assert (first == again).all()
    assert (first != world.render(world.random_scene(np.random.default_rng(8)), np.arange(4.0))).any()


def test_yaw_to_the_right_moves_the_image_left_by_whole_pixels_exactly() -> None:
    before, after = world.render(scene_of(), np.array([10.0, 15.0]))
    assert (before[:, 5:] == after[:, :-5]).all()


def test_a_turn_comes_back() -> None:
    before, after = world.render(world.random_scene(np.random.default_rng(0)), np.array([3.25, 3.25 + world.TURN]))
    assert (before == after).all()


def test_camera_script_by_hand() -> None:
    """9 frames at 16 pixels a 12 frames, the first at the start; then 12 at -8."""
    yaws = world.camera_yaws([16, -8], 100.0)
    assert len(yaws) == 21
    assert yaws[0] == 100.0
    assert yaws[8] == pytest.approx(100 + 8 * 16 / 12)
    assert yaws[20] == pytest.approx(100 + 8 * 16 / 12 - 8)


def test_pans_move_by_whole_latent_columns() -> None:
    """What the model and the strips of latents rest on."""
    assert world.COLUMN == SPACE
    for rate in world.RATES.values():
        assert rate * TIME % (world.CHUNK_VIDEO_FRAMES * SPACE) == 0
    assert {world.random_yaw(np.random.default_rng(seed)) % SPACE for seed in range(20)} == {0}


def test_landmarks_keep_their_distance() -> None:
    for seed in range(20):
        bearings = sorted(
            mark.bearing / world.DEGREES_PER_PIXEL for mark in world.random_scene(np.random.default_rng(seed)).landmarks
        )
        gaps = np.diff([*bearings, bearings[0] + world.TURN])
        assert gaps.min() >= 40
        assert all(bearing % world.COLUMN == 0 for bearing in bearings)


@pytest.mark.parametrize("rate", sorted(world.RATES.values()))
def test_shift_is_measured_to_a_tenth_of_a_pixel(rate: int) -> None:
    for seed in range(5):
        scene = world.random_scene(np.random.default_rng(seed))
        video = world.render(scene, world.camera_yaws([rate, rate], 31.4))
        # 8-bit rounding and the parabola are good for 0.05 pixels
        assert measure.image_shift(video[8], video[20]) == pytest.approx(rate, abs=0.1)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("colour", list(world.COLOURS))
def test_landmarks_are_recognised_in_every_light_and_weather(shape: str, colour: str) -> None:
    for light in world.LIGHTS:
        for weather in world.WEATHERS:
            look = world.Look(light, "desert", weather)
            frame = world.render(scene_of(colour, shape, look), np.array([7.3]))[0]
            (seen,) = measure.landmarks_in(frame, look)
            assert (seen.shape, seen.colour) == (shape, colour)
            assert seen.centre == pytest.approx(36.0 / world.DEGREES_PER_PIXEL - 7.3, abs=0.6)
            assert seen.fit > 0.9


def test_a_shape_of_the_wrong_kind_fits_badly() -> None:
    """A square of a landmark colour is none of the shapes: the fit stays under what the evaluation accepts."""
    look = world.Look()
    frame = world.render(scene_of(), np.array([200.0]))[0].copy()
    frame[20:48, 30:58] = world.COLOURS["red"]
    (seen,) = measure.landmarks_in(frame, look)
    assert seen.fit < 0.8


def test_palette_error_tells_looks_apart() -> None:
    looks = [
        world.Look(light, land, weather) for light in world.LIGHTS for land in world.LANDS for weather in world.WEATHERS
    ]
    for look in looks:
        frame = world.render(scene_of(look=look), np.array([0.0]))[0]
        assert measure.palette_error(frame, look) < 1.0  # rounding to 8 bits
        nearest = min(measure.palette_error(frame, other) for other in looks if other != look)
        assert nearest > 4.0


def test_prompts_name_what_they_mean() -> None:
    assert concepts_of(world.prompt_for(-24, world.Look("night", "snow", "fog"))) == ("left", "night", "snow", "fog")
    assert concepts_of(world.prompt_for(0, world.Look())) == ("hold", "day", "meadow", "clear")


def test_distance_to_the_palette() -> None:
    """A true render is off by what rounding to bytes takes, half a level at most; another light by the difference."""
    look = world.Look("day", "meadow", "clear")
    frame = world.render(world.random_scene(np.random.default_rng(0), look), np.zeros(1))[0]
    assert measure.palette_distance(frame, look) <= 0.5
    shuffled = np.random.default_rng(1).permutation(frame, axis=1)
    assert measure.palette_distance(shuffled, look) == measure.palette_distance(frame, look)  # colours, not places
    assert measure.palette_distance(frame, world.Look("night", "meadow", "clear")) > 40
