"""Does a video stay itself, and stay with its prompt? DINOv2, CLIP-F and CLIP-T over windows of time.

    python -m cfengine.bench.quality a.mp4 b.mp4 --prompt "a fox in the snow" --json FILE --plot FILE.png
    python -m cfengine.bench.quality context-forcing --prompt "a fox in the snow" --seconds 60 --seed 1 --device cuda

The measures of Context Forcing (arXiv 2602.06028). A window is a time t; with frame f shown at time(f), counted from
frame 0, and F(t) = {f : |time(f) - t| <= 0.5 s},

    DINOv2(t) = 100 mean over F(t) of cos(dinov2(f), dinov2(frame 0))
    CLIP-F(t) = 100 mean over F(t) of cos(clip_image(f), clip_image(frame 0))
    CLIP-T(t) = 100 mean over F(t) of cos(clip_image(f), clip_text(prompt))

for t = 10, 20, ... 60 s, then averaged over videos (the paper: 100 prompts, five seeds each). `dinov2` is the class
token after the last norm, `clip_*` are CLIP's projections. The released code has no evaluation, so which sizes the
paper used is not known here; the defaults are facebook/dinov2-base and openai/clip-vit-base-patch32, and every record
names what it used. Scores of different models do not compare.

A window that a video does not reach is left out, never zero; the one at a video's very end holds half as many frames.
In a window at most --rate frames a second are looked at, which at 16 is every frame of this family's videos. A prompt
is cut where CLIP's text encoder ends (77 tokens), and that is said. Frames are decoded, or made, one by one; a batch of
them is all that is held.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from itertools import repeat

import torch

from cfengine.bench.command import say
from cfengine.bench.quality_models import CLIP, DINOV2, Models, Prompt
from cfengine.bench.quality_report import Scored, header, picture, records, remarks, rows, uneven
from cfengine.bench.quality_sources import check_length, is_model, model_frames, video_frames
from cfengine.bench.quality_windows import HALF, Timed, Windows, measure, seconds
from cfengine.bench.records import write
from cfengine.config import PRESETS
from cfengine.device import check_device
from cfengine.errors import CFEngineError, ConfigError, PromptError


def number(text: str, option: str) -> Fraction:
    """A decimal number, exactly; ConfigError for anything else."""
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option} is {text!r}; give numbers such as 10 or 0.5") from None


def device_of(name: str | None) -> str:
    """cuda where there is one and nothing else was asked for; ConfigError or DeviceError for what is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"unknown device {name!r}; choose cpu, cuda or cuda:N")
    if name != "cpu":
        check_device(name)
    return name


def prompts_of(options: argparse.Namespace) -> list[str | None]:
    """A prompt a source: none, one for all, or one each. PromptError: a model without one. ConfigError: too few."""
    given, sources = options.prompt, options.source
    if len(given) not in (0, 1, len(sources)):
        raise ConfigError(
            f"{len(given)} prompts and {len(sources)} videos; give --prompt once for all, or once for each, in order"
        )
    prompts = list(given) if len(given) == len(sources) else list(repeat(given[0] if given else None, len(sources)))
    for source, prompt in zip(sources, prompts, strict=True):
        if prompt is None and is_model(source):
            raise PromptError(f"the model {source!r} has no prompt; say what to show with --prompt")
    return prompts


def frames_of(source: str, prompt: str | None, windows: Windows, options: argparse.Namespace) -> Iterator[Timed]:
    """Frames of a file, or of a model that makes them."""
    if not is_model(source):
        return video_frames(source)
    length = number(options.seconds, "--seconds") if options.seconds else windows.times[-1]
    check_length(length)
    return model_frames(source, prompt, length, options.seed, options.device)


def run(options: argparse.Namespace) -> None:
    """Check what was asked, then measure source after source; records are written after each."""
    options.device = device_of(options.device)
    times = sorted({number(text, "--at") for text in options.at.split(",") if text.strip()})
    windows = Windows(tuple(times), number(options.rate, "--rate"), options.batch)
    prompts = prompts_of(options)
    streams = [frames_of(*pair, windows, options) for pair in zip(options.source, prompts, strict=True)]
    if options.json:
        write(options.json, [])  # a place that cannot be written to is named before the work
    if options.plot:
        picture(options.plot, [], windows.times)
    models = Models.load(options.dinov2, options.clip, options.device)
    texts: dict[str | None, Prompt | None] = {None: None}
    texts |= {prompt: models.text(prompt) for prompt in set(prompts) - {None}}
    shape = described(options, windows)
    videos: list[Scored] = []
    say(header(windows.times))
    for source, prompt, stream in zip(options.source, prompts, streams, strict=True):
        text = texts[prompt]
        with closing(stream):
            measured = measure(stream, models, windows, text and text.vector)
        videos.append(Scored(source, prompt, text, measured))
        for part in (rows(videos[-1:], windows.times), *remarks(videos[-1], windows.times)):
            if part:
                say(part)
        if options.json:
            write(options.json, records(videos, windows.times, shape))
    finish(videos, windows, options)


def finish(videos: list[Scored], windows: Windows, options: argparse.Namespace) -> None:
    """Mean and picture; ConfigError where no video reached a window."""
    if not any(video.measured.frames for video in videos):
        raise ConfigError(
            f"no video has a frame within {seconds(HALF)} s of {', '.join(map(seconds, windows.times))} s; "
            "give earlier times with --at, or longer videos"
        )
    if len(videos) > 1:
        say(rows(videos, windows.times))
        if fewer := uneven(videos, windows.times):
            say(fewer)
    if options.plot:
        picture(options.plot, videos, windows.times)


def described(options: argparse.Namespace, windows: Windows) -> dict:
    """What every record says: models, windows, and how a model's video was made."""
    import transformers

    shape = {
        "dinov2": options.dinov2,
        "clip": options.clip,
        "transformers": transformers.__version__,
        "half_window_seconds": float(HALF),
        "frames_a_second": float(windows.rate),
        "on": options.device,
    }
    return shape | ({"seed": options.seed} if any(map(is_model, options.source)) else {})


def parser() -> argparse.ArgumentParser:
    """What can be asked."""
    made = argparse.ArgumentParser(prog="python -m cfengine.bench.quality", description=__doc__.split("\n")[0])
    made.add_argument("source", nargs="+", metavar="VIDEO|MODEL", help=f"file, preset ({', '.join(PRESETS)}), weights")
    made.add_argument("--prompt", action="append", default=[], help="once for all, or once for each, in their order")
    made.add_argument("--at", default="10,20,30,40,50,60", metavar="T,T,...", help="times of windows in seconds")
    made.add_argument("--rate", default="16", help="most frames a second to look at in a window (%(default)s)")
    made.add_argument("--batch", type=int, default=16, help="frames a forward (%(default)s)")
    made.add_argument("--seconds", help="length of a model's video; default: the last window's time")
    made.add_argument("--seed", type=int, default=0, help="of a model's video (%(default)s)")
    made.add_argument("--dinov2", default=DINOV2, metavar="ID|FOLDER", help="Dinov2Model (%(default)s)")
    made.add_argument("--clip", default=CLIP, metavar="ID|FOLDER", help="CLIPModel (%(default)s)")
    made.add_argument("--device", help="cuda, cuda:N or cpu; default: cuda where there is one")
    made.add_argument("--json", metavar="FILE", help="write the records there")
    made.add_argument("--plot", metavar="FILE", help="picture to write (.png)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        run(parser().parse_args(arguments))
    except CFEngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
