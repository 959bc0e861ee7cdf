"""Train a model: `python -m cfengine.training train --config tiny-world --out DIR`.

`train` is `teacher`, `student` and `evaluate`, one after the other. A stage that was cut goes on where it was saved, a
finished one is skipped, and curves of everything reported are drawn as DIR/curves.png.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from cfengine.cli_display import PlainDisplay
from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import launched
from cfengine.errors import CFEngineError, ConfigError
from cfengine.training.curves import can_draw
from cfengine.training.data import build_strips
from cfengine.training.dry import student_step, table, teacher_step
from cfengine.training.parallel import check_devices, joined, rank, size
from cfengine.training.recipe import Run, averaged, train_student, train_teacher, write_teacher, write_weights
from cfengine.training.settings import Settings, built_in, read

COMMANDS = {
    "train": "everything, from nothing to weights and their evaluation",
    "teacher": "codec, strips of latents, flow matching under the memory, lookup",
    "student": "distil the teacher; DIR/weights opens with Engine.from_pretrained",
    "evaluate": "measure DIR/weights in little, into DIR/evaluation.json",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m cfengine.training", description=__doc__.splitlines()[0])
    commands = made.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--config", default="tiny-world", help=f"TOML file, or one of {', '.join(built_in())}")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as student.steps=100")
        command.add_argument("--steps-scale", type=float, default=1.0, metavar="F", help="times every number of steps")
        command.add_argument("--dry-run", action="store_true", help="a step without values: sizes and FLOPs")
        command.add_argument("--out", type=Path, help="folder of states, log and weights")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--processes", type=int, help="default: 2 on a CPU (a core each), 1 on a GPU")
        if name == "student":
            command.add_argument("--teacher", type=Path, help="folder of the teacher; default: --out")
    look = commands.add_parser("probe", help="how whole the landmarks are that a state of the small world draws")
    look.add_argument("state", type=Path, help="a .state file, with the codec and the strips beside it")
    look.add_argument("--passes", type=int, default=24)
    look.add_argument("--scenes", type=int, default=100)
    look.add_argument("--seed", type=int, default=0, help="that the folder was begun with")
    dump = commands.add_parser("export", help="write the averaged weights of a stage, or a teacher for --teacher")
    dump.add_argument("state", type=Path, help="a .state file, or the folder of a teacher")
    dump.add_argument("folder", type=Path)
    for command in (look, dump):
        command.add_argument("--config", default="tiny-world")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return made


def dry_run(command: str, settings: Settings) -> None:
    """Say what steps of the stages of a command take."""
    steps = {"teacher": [teacher_step], "student": [student_step]}.get(command, [teacher_step, student_step])
    sys.stdout.write(table([step(settings) for step in steps]) + "\n")


def work(options: argparse.Namespace, settings: Settings, run: Run, say: PlainDisplay) -> None:
    """Run the stages of a command."""
    if options.command in ("train", "teacher"):
        state = train_teacher(run)
        say.done(f"teacher: {state}")
    if options.command in ("train", "student"):
        weights = train_student(run, getattr(options, "teacher", None))
        say.done(f"weights: {weights}")
    if options.command in ("train", "evaluate") and settings.worded and rank() == 0:
        from cfengine.training.evaluate import evaluate

        for record in evaluate(run.out / "weights", run.out, settings.evaluation):
            say.done(f"{record['name']:44s} {record['value']:8.3f} {record['unit']}")


def export(options: argparse.Namespace, settings: Settings, say: PlainDisplay) -> None:
    """Weights of a state, with the codec that lies beside it; of a folder, its teacher."""
    if options.state.is_dir():
        write_teacher(options.state, options.folder)
        say.done(f"the teacher is in {options.folder}; student --teacher {options.folder} distils it")
        return
    world, step = averaged(options.state, settings.config)
    write_weights(world, options.folder, settings.config, options.state.with_name("refined.safetensors"))
    say.done(f"weights of step {step} are in {options.folder}")


def say_what_it_draws(options: argparse.Namespace, settings: Settings, say: PlainDisplay) -> None:
    """See `cfengine.training.probe`."""
    from cfengine.training.probe import probe, reading

    if not settings.worded:
        raise ConfigError("probe measures the small world")
    if min(options.passes, options.scenes) < 1:
        raise ConfigError(f"--passes is {options.passes} and --scenes {options.scenes}; give 1 or more")
    world, step = averaged(options.state, settings.config)
    codec = TinyWorldCodec.from_file(options.state.with_name("refined.safetensors"))
    strips = build_strips(codec, settings.data.scenes, options.seed + 2, options.state.with_name("strips.safetensors"))
    drawn = probe(world, settings.config, strips, codec, options.scenes, options.passes)
    shapes = ", ".join(f"{shape} {share:.2f}" for shape, share in drawn.shapes.items())
    say.done(f"step {step}: {drawn.landmarks:.2f} landmarks a view, whole {drawn.whole:.3f}; of these {shapes}")
    if settings.data.coupled:
        read = reading(world, settings.config, strips)
        errors = f"{read.said:.3f} in noise that says which, {read.unsaid:.3f} in other noise"
        say.done(f"landmarks that enter: error {errors}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0, 2 where something is wrong with what was asked, or 130 after Ctrl-C."""
    made = parser()
    options, say = made.parse_args(arguments), PlainDisplay()
    try:
        settings = read(options.config, options.set)
        if options.command in ("export", "probe"):
            {"export": export, "probe": say_what_it_draws}[options.command](options, settings, say)
            return 0
        settings = settings.scaled(options.steps_scale)
        if options.dry_run:
            dry_run(options.command, settings)
            return 0
        if options.out is None:
            made.error("--out DIR is needed")
        if options.command == "evaluate" and not settings.worded:
            raise ConfigError("evaluate measures the small world; for other models there is cfengine.bench.quality")
        alone = not launched()
        processes = (2 if options.device == "cpu" else 1) if options.processes is None else options.processes
        check_devices(options.device, processes if alone else 1)
        if alone and options.device == "cpu":
            torch.set_num_threads(processes)  # for the stages that one process runs
        with nullcontext() if alone else joined(options.device):
            if rank() == 0 and not can_draw():
                say.notice("curves.png needs matplotlib; pip install 'cfengine[plot]'")
            run = Run(options.out, settings, options.seed, processes if alone else size(), options.device)
            work(options, settings, run, say if rank() == 0 else _Silent())
        return 0
    except KeyboardInterrupt:
        say.stopped("stopped; the same command goes on from what was saved last")
        return 130
    except CFEngineError as error:
        say.failed(str(error))
        return 2


class _Silent(PlainDisplay):
    """What processes other than the first say."""

    def done(self, message: str) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
