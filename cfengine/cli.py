"""The command line: thin commands with lazy imports, so that help and mistakes answer at once."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cfengine.config import POLICIES, PRECISIONS, PRESETS, MemoryConfig
from cfengine.errors import CFEngineError, CheckpointError, ConfigError, OutputError, PromptError, RingError

USER_ERRORS = (ConfigError, PromptError, CheckpointError, OutputError, RingError)  # exit code 2; all others 1

WORLD = "pan right over a meadow, clear day"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Live video from a causal few-step diffusion transformer with Slow-Fast memory.",
    epilog="Exit codes: 0 done, 1 failure, 2 mistake in what was asked, 130 stopped with Ctrl-C.",
)


@contextmanager
def sentences() -> Iterator[None]:
    """Turn the engine's own errors into one red sentence and an exit code; a bug keeps its traceback."""
    try:
        yield
    except CFEngineError as error:
        complain(str(error))
        raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from None
    except KeyboardInterrupt:
        complain("stopped")
        raise typer.Exit(130) from None


def complain(message: str) -> None:
    """Print one sentence on standard error, red on a terminal."""
    typer.secho(f"error: {message}", fg="red", err=True)


def version() -> str:
    try:
        return importlib.metadata.version("cfengine")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed; run pip install -e .)"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cfengine {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")] = WORLD,
    output: Annotated[Path, typer.Option("--output", "-o", help="Video file to write (.mp4, H.264).")] = Path(
        "out.mp4"
    ),
    model: Annotated[
        str, typer.Option("--model", "-m", help=f"Preset ({', '.join(PRESETS)}), checkpoint path or hub id.")
    ] = "tiny-world",
    seconds: Annotated[float | None, typer.Option(help="Length of the video.", show_default="4")] = None,
    frames: Annotated[int | None, typer.Option(help="Length in video frames, instead of --seconds.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and prompt give the same video.")] = 0,
    policy: Annotated[
        str | None, typer.Option(help=f"Memory policy: {', '.join(POLICIES)}.", show_default="the model's")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 16.", show_default="the model's")
    ] = None,
    taehv: Annotated[
        Path | None,
        typer.Option(help="taew2_1 weights of TAEHV, to decode faster than with the Wan VAE.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="the device's")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(PRECISIONS)}: of products, pages and attention.", show_default="the model's"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    scale: Annotated[
        int | None,
        typer.Option(help="Repeat each pixel N times both ways.", show_default="4 up to 128 pixels wide, else 1"),
    ] = None,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Sign the file as synthetic (C2PA).")
    ] = True,
    record_prompt: Annotated[bool, typer.Option("--record-prompt", help="Tell the prompt in that record too.")] = False,
    backend: Annotated[
        str, typer.Option(help="What runs the transformer: torch, onnxruntime (CPU), tensorrt (GPU), or auto.")
    ] = "torch",
    exported: Annotated[
        Path | None,
        typer.Option(help="Folder of cfengine export for it.", show_default="the cache's, made on first use"),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture to go on from; it is not written again.", show_default=False)
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="Video to go on from, of any length; likewise.", show_default=False)
    ] = None,
) -> None:
    """Make a video from a prompt, chunk by chunk.

    The file can be played whatever stops the run: Ctrl-C keeps the frames made so far.
    """
    from cfengine.cli_generate import Request, run

    with sentences():
        request = Request(
            prompt=prompt,
            output=output,
            model=model,
            seconds=seconds,
            frames=frames,
            seed=seed,
            policy=policy,
            size=size,
            taehv=taehv,
            device=device,
            dtype=dtype,
            precision=precision,
            threads=threads,
            scale=scale,
            provenance=provenance,
            record_prompt=record_prompt,
            backend=backend,
            exported=exported,
            image=image,
            video=video,
        )
        code = run(request)
    raise typer.Exit(code)


@app.command()
def serve(
    ring: Annotated[str, typer.Option(help="Name of the frame ring, which other programs open.")],
    prompt: Annotated[str, typer.Argument(help="What to show until a program asks for something else.")] = WORLD,
    model: Annotated[str, typer.Option(help="Preset, folder, file or hub id.")] = "tiny-world",
    seconds: Annotated[float | None, typer.Option(help="Length.", show_default="until Ctrl-C", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="the model's")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="one a core", min=1)] = None,
    format: Annotated[str, typer.Option(help="How pixels lie: rgba8 or nv12.")] = "rgba8",
    memory: Annotated[
        str, typer.Option(help="Where frames lie: host; on a GPU opaque_fd (Vulkan and CUDA) or cuda_ipc (CUDA alone).")
    ] = "host",
) -> None:
    """Show a live video to games and other programs through shared memory, and take their events (docs/embed.md)."""
    from cfengine.cli_serve import Request, run

    with sentences():
        code = run(Request(ring, prompt, model, seconds, seed, device, dtype, threads, format, memory))
    raise typer.Exit(code)


@app.command()
def play(
    prompt: Annotated[str, typer.Argument(help="What to show at first.")] = WORLD,
    model: Annotated[str, typer.Option(help="Preset, folder, file or hub id.")] = "tiny-world",
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    scale: Annotated[
        int | None, typer.Option(help="Screen pixels a pixel.", show_default="8 up to 128 pixels wide, else 1", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="the model's")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="one a core", min=1)] = None,
    frames: Annotated[
        int | None, typer.Option(help="End after N different frames.", show_default="never", min=1)
    ] = None,
    screenshot: Annotated[
        Path | None, typer.Option(help="Write the window as a PNG at the end.", show_default=False)
    ] = None,
    press: Annotated[
        list[str] | None, typer.Option(help="FRAME:KEY, as if KEY were pressed then.", show_default=False)
    ] = None,
) -> None:
    """Open a window on a live video and steer it with the keyboard.

    Left and right turn the camera, down holds it, Tab takes a prompt, space pauses, s keeps the moment and b goes
    back to it, r begins again, n too but with another seed, Esc ends. Where chunks take longer than they last, they are
    made with fewer passes until they keep up; the title says so.
    """
    from cfengine.cli_play import Request, run

    with sentences():
        code = run(Request(prompt, model, seed, scale, device, dtype, threads, frames, screenshot, tuple(press or ())))
    raise typer.Exit(code)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A video or picture, of cfengine or any other maker.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    trust: Annotated[
        Path | None,
        typer.Option(help="PEM certificates that vouch for signers.", show_default="the key of this user"),
    ] = None,
) -> None:
    """Check what a file says of its making (C2PA): is it whole, is it signed, is it synthetic.

    Exit code 0 when its record holds, 1 when there is none or the file was changed, 2 when it cannot be checked.
    """
    from cfengine.cli_verify import run

    with sentences():
        code = run(file, as_json, trust)
    raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Say what this machine and this build can do, and how to add what is missing.

    Exit code 1 when something that `cfengine generate` needs is missing.
    """
    from cfengine.doctor import examine, render

    with sentences():
        report = examine()
        render(report)
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def models() -> None:
    """List the presets: where their weights come from, their sizes and their memory."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width; whole names are worth more than a narrow table
    table = Table("preset", "DiT weights", "text encoder and VAE", "video", "model", "memory", box=None, pad_edge=False)
    for name, config in PRESETS.items():
        video, model = config.video, config.model
        table.add_row(
            name,
            config.dit_source or "shipped with the package",
            config.base_source or "shipped with the package",
            f"{video.width}x{video.height}, {video.fps} frames/s",
            f"dim {model.dim}, {model.layers} layers, {model.heads} heads",
            memory_words(config.memory),
        )
    console.print(table)


def memory_words(memory: MemoryConfig) -> str:
    """Policy and its parts in latent frames, such as "slow_fast, 3 sink + 12 slow + 6 fast"."""
    parts = [f"{getattr(memory, part)} {part}" for part in ("sink", "slow", "fast") if getattr(memory, part)]
    return f"{memory.policy}, {' + '.join(parts)}"


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Module of cfengine.bench.")] = "",
) -> None:
    """Run a benchmark: `cfengine bench cpu --help` is `python -m cfengine.bench.cpu --help`."""
    import importlib.util
    import pkgutil
    import runpy

    import cfengine.bench as benches

    with sentences():
        known = sorted(module.name for module in pkgutil.iter_modules(benches.__path__) if runnable(module))
        if name not in known:
            raise ConfigError(f"unknown benchmark {name!r}; known: {', '.join(known) or 'none'}")
        spec = importlib.util.find_spec(f"cfengine.bench.{name}")
        sys.argv = [spec.origin or name, *context.args]
        runpy.run_module(spec.name, run_name="__main__", alter_sys=True)


def runnable(module) -> bool:
    """Tell a benchmark from a module that benchmarks share: it can be run as a program."""
    import importlib.util

    spec = importlib.util.find_spec(f"cfengine.bench.{module.name}")
    return bool(spec and spec.origin and '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8"))


export_app = typer.Typer(no_args_is_help=True, help="Write a model as ONNX graphs, and check them.")
app.add_typer(export_app, name="export")
_EXPORT = Annotated[Path, typer.Argument(help="Folder that cfengine export onnx wrote.")]
_ITS_MODEL = Annotated[
    str | None, typer.Option("--model", "-m", help="Where the weights are, if not where the export took them from.")
]
_ITS_TAEHV = Annotated[Path | None, typer.Option("--taehv", help="The taew2_1 weights that were exported.")]


@export_app.command("onnx")
def export_onnx(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; an earlier export in it is replaced.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help=f"Preset ({', '.join(PRESETS)}), checkpoint path or hub id.")
    ] = "tiny-world",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16: of weights and operands.")] = "fp32",
    sessions: Annotated[
        str, typer.Option(help="Live videos that move in lock-step: a number, or 'open' for any number.")
    ] = "1",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", show_default="the model's")] = None,
    taehv: Annotated[
        Path | None, typer.Option(help="taew2_1 weights of TAEHV, to decode with it.", show_default=False)
    ] = None,
) -> None:
    """Export segments, embeddings and decoder as ONNX graphs with standard operators, weights beside them."""
    from cfengine import cli_export
    from cfengine.cli_generate import pixels_of

    with sentences():
        cli_export.onnx(model, out, precision, sessions, pixels_of(size), taehv)


@export_app.command("check")
def export_check(folder: _EXPORT, model: _ITS_MODEL = None, taehv: _ITS_TAEHV = None) -> None:
    """Run every graph in ONNX Runtime against torch, then a whole chunk.

    Exit code 1 when an error is beyond its tolerance.
    """
    from cfengine import cli_export

    with sentences():
        passed = cli_export.check(folder, model, taehv)
    raise typer.Exit(0 if passed else 1)


@export_app.command("tensorrt")
def export_tensorrt(
    folder: _EXPORT,
    target: Annotated[
        str,
        typer.Option(help="rtx: TensorRT-RTX, for RTX 30, 40 and 50, without a GPU; current: for the GPU at hand."),
    ] = "rtx",
    precision: Annotated[
        str, typer.Option(help="bf16 or fp16, as the export is; fp8 or nvfp4, calibrated with its model.")
    ] = "bf16",
    model: _ITS_MODEL = None,
    taehv: _ITS_TAEHV = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N, to calibrate on.")] = "cpu",
) -> None:
    """Build TensorRT engines of every graph and layer; what is built already is kept."""
    from cfengine import cli_export

    with sentences():
        cli_export.tensorrt(folder, target, precision, model, taehv, device)


def main() -> None:
    """Entry point of the `cfengine` command."""
    app()


if __name__ == "__main__":
    main()
