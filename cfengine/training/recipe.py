"""The recipe: codec, strips of latents, flow matching and lookup make the teacher; distillation makes the student, and
more of its own passes polish it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cfengine.codec.tiny_world import TinyWorldCodec
from cfengine.config import EngineConfig
from cfengine.errors import ConfigError, OutputError
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.model.weights import load_dit
from cfengine.training.clips import Clips
from cfengine.training.codec import refine_decoder, train_codec
from cfengine.training.curves import Log
from cfengine.training.data import Source, build_strips, drawn_in
from cfengine.training.diffusion import train_diffusion
from cfengine.training.distil import train_distil
from cfengine.training.lookup import train_lookup
from cfengine.training.parallel import in_processes, own_device, rank, wait
from cfengine.training.polish import train_polish
from cfengine.training.settings import Settings
from cfengine.training.state import World

TEACHER = ("preset", "model", "memory", "data", "codec", "teacher", "lookup")  # settings that make one
LATER = ("data", "codec", "teacher", "lookup", "student", "polish")  # sections that may have grown since
STUDENT = ("preset", "model", "memory", "data", "student", "polish")


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder, what is trained there, and on what."""

    out: Path
    settings: Settings
    seed: int = 0
    processes: int = 1
    device: str = "cpu"

    @property
    def log(self) -> Log:
        return Log(self.out / "log.jsonl")

    @property
    def config(self) -> EngineConfig:
        return self.settings.config


def new_world(config: EngineConfig) -> World:
    """A world with random weights, for the sizes and the prompts of a configuration."""
    return World(config.model) if config.text == "tiny_world" else World(config.model, words=0)


def steps_of(state: Path) -> int:
    """Steps that a stage has made; 0 where it has not begun."""
    return int(torch.load(state, map_location="cpu", weights_only=True, mmap=True)["step"]) if state.exists() else 0


def averaged(state: Path, config: EngineConfig) -> tuple[World, int]:
    """Load the averaged network of a stage and its step."""
    if not state.exists():
        raise ConfigError(f"there is no training state {state}; train the stage that makes it first")
    kept = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    world = new_world(config)
    world.load_state_dict(kept["average"])
    return world.requires_grad_(False), int(kept["step"])


def changed(known: dict, asked: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of what two nested tables both have and say differently."""
    for name in (name for name in asked if name in known and known[name] != asked[name]):
        if isinstance(known[name], dict) and isinstance(asked[name], dict) and known[name]:
            yield from changed(known[name], asked[name], f"{prefix}{name}.")
        else:
            yield prefix + name, known[name], asked[name]


def begin(run: Run, parts: tuple[str, ...]) -> None:
    """Make the folder, and write beside its states what they are made of.

    ConfigError where the folder was begun with something else, OutputError where it cannot be written.
    """
    path = run.out / "settings.json"
    asked = {"seed": run.seed, **{name: dataclasses.asdict(run.settings)[name] for name in parts}}
    plain = {part.name: dataclasses.asdict(part.default) for part in dataclasses.fields(Settings) if part.name in LATER}
    asked, plain = json.loads(json.dumps((asked, plain)))  # tuples as lists, as they are read
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        for name in known.keys() & asked.keys() & plain.keys():  # keys that are younger than the folder
            known[name] = plain[name] | known[name]
        for name, before, now in changed(known, asked):
            raise ConfigError(
                f"{run.out} was begun with {name} {before} and is now asked for {now}; "
                "choose another --out, or give what it was begun with"
            )
        if rank() == 0:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known | asked, indent=1) + "\n")
            os.replace(part, path)
    except (OSError, json.JSONDecodeError) as problem:
        raise OutputError(f"training folder {run.out} cannot be used ({problem}); choose another --out") from problem


def agree(run: Run, teacher: Path) -> None:
    """ConfigError where a teacher's folder says that its model is another, or that it reads another noise."""
    path, own = teacher / "settings.json", run.settings
    try:
        known = json.loads(path.read_text()) if path.exists() else None
    except (OSError, json.JSONDecodeError) as problem:
        raise ConfigError(
            f"{path} cannot be read ({problem}); give a folder that `teacher` or `export` made"
        ) from problem
    if known is None:
        return
    asked = {"preset": own.preset, "model": json.loads(json.dumps(own.model)), "data.coupled": own.data.coupled}
    coupled = known.get("data", {}).get("coupled", False)  # the key is younger than some teachers
    made = {"preset": known.get("preset"), "model": known.get("model"), "data.coupled": coupled}
    for name, now in asked.items():
        if made[name] != now:
            raise ConfigError(f"the teacher in {teacher} was made with {name} {made[name]}, and a student with {now}")


def source_of(run: Run, teacher: Path) -> Source:
    """Batches as settings say; `teacher`: the folder with the strips, or with the codec, of which they are made."""
    data, strips = run.settings.data, teacher / "strips.safetensors"
    if data.source == "clips":
        return Clips(data.folder, run.config)
    codec = None
    if not strips.exists() or drawn_in(strips) != data.scenes:
        path = teacher / "refined.safetensors"
        own = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        codec, strips = TinyWorldCodec.from_file(path), run.out / f"strips-{own}.safetensors"
    drawn = build_strips(codec, data.scenes, run.seed + 2, strips)
    return drawn if data.coupled else drawn._replace(landmarks=None)


def _world_files(run: Run, log: Log) -> None:
    """Codec, its refined decoder, and strips of latents: one process makes them."""
    codec = train_codec(run.out / "codec.safetensors", run.seed, run.settings.codec.steps, log)
    build_strips(codec, run.settings.data.scenes, run.seed + 2, run.out / "strips.safetensors")
    refine_decoder(codec, run.out / "refined.safetensors", run.seed + 5, run.settings.codec.decoder_steps, log)


def _stage(run: Run, state: Path, steps: int, work: Callable[..., None], *arguments) -> None:
    """Run `work` in all processes, unless its state has made all its steps; then draw the curves."""
    if steps_of(state) < steps:
        in_processes(run.processes, run.device, work, run, state, *arguments)
        wait()
    if rank() == 0:
        run.log.draw()


def _flow_matching(run: Run, state: Path) -> None:
    """The diffusion stage of one process."""
    settings = run.settings.teacher
    torch.manual_seed(run.seed + 3)
    world = new_world(run.config)
    if settings.start and not state.exists():
        world.dit.load_state_dict(load_dit(settings.start, run.config.model))
    with run.log as log:
        source = source_of(run, run.out)
        train_diffusion(state, world.to(own_device(run.device)), run.config, source, run.seed + 3, settings, log)


def _lookup(run: Run, state: Path) -> None:
    """The lookup stage of one process."""
    teacher = averaged(run.out / "dit.state", run.config)[0].to(own_device(run.device))
    with run.log as log:
        steps = run.settings.lookup.steps
        train_lookup(state, teacher, run.config, source_of(run, run.out), run.seed + 4, steps, log)


def _distillation(run: Run, state: Path, teacher: Path, own: int) -> None:
    """The distillation of one student, in one process."""
    settings, device = run.settings.student, own_device(run.device)
    begun = averaged(teacher_state(teacher, run.settings), run.config)[0].to(device)
    with run.log as log:
        train_distil(state, begun, run.config, source_of(run, teacher), run.seed + own, settings, log)


def _polishing(run: Run, state: Path, teacher: Path) -> None:
    """The polish, in one process."""
    with run.log as log:
        begun = distilled(run).to(own_device(run.device))
        settings, source = run.settings, source_of(run, teacher)
        train_polish(state, begun, run.config, source, run.seed + 6, settings.polish, settings.student, log)


def distilled(run: Run) -> World:
    """The mean of the students."""
    return mean_of([averaged(run.out / f"student{own}.state", run.config)[0] for own in run.settings.student.seeds])


def finished(run: Run) -> World:
    """The mean of the students, moved towards what polishing made of it."""
    world, polish = distilled(run), run.settings.polish
    if not polish.steps:
        return world
    return mean_of([world, averaged(run.out / "polish.state", run.config)[0]], [1 - polish.blend, polish.blend])


def teacher_state(folder: Path, settings: Settings) -> Path:
    """The last state of a teacher."""
    return folder / ("lookup.state" if settings.lookup.steps else "dit.state")


def train_teacher(run: Run) -> Path:
    """Every stage of the teacher that is not finished; the state of the last one."""
    begin(run, TEACHER)
    settings = run.settings.teacher
    for length in settings.lengths:
        settings.check_batch("teacher", length.sessions, run.processes)
    if run.settings.data.source == "clips":
        source_of(run, run.out)  # what is wrong with them is said before processes start
    if run.settings.data.source == "world" and rank() == 0:
        with run.log as log:
            _world_files(run, log)
    wait()
    _stage(run, run.out / "dit.state", run.settings.teacher.steps, _flow_matching)
    if run.settings.lookup.steps:
        _stage(run, run.out / "lookup.state", run.settings.lookup.steps, _lookup)
    return teacher_state(run.out, run.settings)


def train_student(run: Run, teacher: Path | None = None) -> Path:
    """Distil the teacher of a folder (default: of this one); the folder of weights that an engine opens."""
    teacher, settings = teacher or run.out, run.settings.student
    missing = teacher_state(teacher, run.settings)
    if not missing.exists():
        raise ConfigError(f"the teacher {missing} does not exist; train it first, or name its folder (--teacher)")
    agree(run, teacher)
    begin(run, STUDENT)
    for chunks in (*settings.short, *settings.long):
        settings.check_batch("student", settings.sessions(chunks), run.processes)
    if rank() == 0:
        source_of(run, teacher)  # strips that must be drawn first are drawn once
    wait()
    for own in settings.seeds:
        _stage(run, run.out / f"student{own}.state", settings.steps, _distillation, teacher, own)
    if run.settings.polish.steps:
        _stage(run, run.out / "polish.state", run.settings.polish.steps, _polishing, teacher)
    weights = run.out / "weights"
    if rank() == 0:
        write_weights(finished(run), weights, run.config, teacher / "refined.safetensors")
    wait()
    return weights


def write_teacher(folder: Path, target: Path) -> None:
    """Write what `train_student` takes of a teacher's folder: averaged weights in float16, the codec, its settings.

    Raises ConfigError where no stage of it is there, or where `target` has one.
    """
    states = [folder / name for name in ("dit.state", "lookup.state") if (folder / name).exists()]
    if not states:
        raise ConfigError(f"there is no teacher in {folder}; train it first")
    if any(target.glob("*.state")):
        raise ConfigError(f"{target} has training states; choose another folder for the teacher")
    target.mkdir(parents=True, exist_ok=True)
    for state in states:
        kept = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        average = {name: part.half() for name, part in kept["average"].items()}
        torch.save({"step": kept["step"], "average": average}, target / state.name)
    for path in (folder / "refined.safetensors", folder / "settings.json"):
        if path.exists():
            (target / path.name).write_bytes(path.read_bytes())


def mean_of(worlds: list[World], shares: list[float] | None = None) -> World:
    """The mean of the weights of students of one teacher, which lie close enough for it to be a student too.

    shares: of each in it; None: equal ones.  Wortsman et al., arXiv 2203.05482, average fine-tuned models so.
    """
    mean = copy.deepcopy(worlds[0])
    for parts in zip(mean.parameters(), *(world.parameters() for world in worlds), strict=True):
        each = torch.stack(parts[1:])
        weights = torch.full((len(worlds),), 1 / len(worlds)) if shares is None else torch.tensor(shares)
        parts[0].copy_(torch.tensordot(weights.to(each), each, dims=1))
    return mean


def write_weights(world: World, folder: Path, config: EngineConfig, codec: Path | None = None) -> None:
    """Write what `Engine.from_pretrained(folder)` opens, in float16.

    Of a small world: dit, text and `codec` (copied, where it exists) as .safetensors, and sizes and memory rule as
    model.json. Of another model: model.pt, which opens with the codec and the text encoder of Context Forcing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in world.dit.state_dict().items()}
    parts = {"model": dataclasses.asdict(config.model), "memory": dataclasses.asdict(config.memory)}
    if config.text == "tiny_world":
        save_file(tensors, folder / "dit.safetensors", metadata={"format": "cfengine tiny-world dit"})
        TinyTextEncoder(world.table.detach()).save(folder / "text.safetensors")
        if codec is not None and codec.exists():
            (folder / "codec.safetensors").write_bytes(codec.read_bytes())
        (folder / "model.json").write_text(json.dumps(parts, indent=1) + "\n")
    else:
        torch.save(tensors, folder / "model.pt")
