"""What a training is made of: frozen dataclasses, read from TOML, with nothing in a file that they do not know.

Amounts and rates that differ between models are here; what belongs to the method is a constant beside the method.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, preset
from cfengine.errors import ConfigError
from cfengine.training.slots import RULES

CONFIGS = Path(__file__).parent / "configs"  # what the package ships


@dataclass(frozen=True)
class Data:
    """Where batches come from: the renderer of the small world, or clips (see `cfengine.training.clips`)."""

    source: str = "world"
    scenes: int = 3000  # of the world, each in two looks
    coupled: bool = False  # noise says what is new (see `cfengine.training.coupling`); of the world
    folder: str = ""  # of clips

    def __post_init__(self) -> None:
        if self.source not in ("world", "clips"):
            raise ConfigError(f"data.source is {self.source!r}; it is 'world' or 'clips'")
        if (self.source == "clips") != bool(self.folder):
            raise ConfigError(f"data.folder is {self.folder!r} and data.source {self.source!r}; clips need a folder")
        if self.coupled and self.source != "world":
            raise ConfigError("data.coupled is true, and nobody knows what clips show; set it to false")


@dataclass(frozen=True)
class Codec:
    """Steps of the small world's codec, and those of its decoder alone; a model with another codec trains none."""

    steps: int = 2400
    decoder_steps: int = 1000


@dataclass(frozen=True)
class Descent:
    """How weights descend: for how long, how fast, by which optimiser."""

    steps: int
    peak: float  # learning rate after `warm` steps
    warm: int
    constant: bool = False  # the rate stays at its peak; otherwise it falls along a cosine
    optimiser: str = "muon"  # for the matrices of blocks, and adamw for the rest; adamw: for everything
    betas: tuple[float, float] = (0.9, 0.98)  # of adamw
    clip: float = 1.0  # norm of the gradient
    decay: float = 0.998  # of the average of the weights
    average_from: int = 0  # step before which the average is the network itself
    batch: int = 0  # sessions of a step over all processes that the numbers are meant for; 0: any

    def __post_init__(self) -> None:
        if self.steps < 0 or self.peak <= 0 or self.warm < 1:
            raise ConfigError(
                f"steps {self.steps}, peak {self.peak} and warm {self.warm} describe no descent; "
                "give steps of 0 or more, a peak above 0, and at least 1 warm step"
            )
        if self.optimiser not in ("muon", "adamw"):
            raise ConfigError(f"optimiser is {self.optimiser!r}; it is 'muon' or 'adamw'")

    def check_batch(self, stage: str, sessions: int, processes: int) -> None:
        """Raise ConfigError where processes of `sessions` sessions do not make the batch that was asked for."""
        if self.batch and self.batch != sessions * processes:
            raise ConfigError(
                f"{stage}.batch is {self.batch} sessions, and {processes} processes of {sessions} make "
                f"{sessions * processes}; start {self.batch / sessions:g} processes, or set {stage}.batch to 0"
            )


def falling(steps: tuple[int, ...]) -> bool:
    """Whether steps fall from at most 1000 to above 0."""
    return all(a > b for a, b in zip((1001, *steps), (*steps, 0), strict=True))


@dataclass(frozen=True)
class Length:
    """Chunks of a session, sessions in a batch of one process, share of batches early and late in the training."""

    chunks: int
    sessions: int
    early: float
    late: float


@dataclass(frozen=True)
class Teacher(Descent):
    """Flow matching under the model's own errors."""

    steps: int = 3000
    peak: float = 2e-3
    warm: int = 60
    start: str = ""  # file, folder or hub id of the weights to begin with; none: random ones
    recycle: float = 0.3  # probability with which a chunk of the context carries a residual from the bank of errors
    lengths: tuple[Length, ...] = (
        Length(2, 8, 0.0, 0.15),
        Length(4, 4, 0.45, 0.2),
        Length(8, 2, 0.45, 0.3),
        Length(16, 1, 0.1, 0.2),
        Length(28, 1, 0.0, 0.15),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        early, late = (sum(getattr(length, when) for length in self.lengths) for when in ("early", "late"))
        smallest = min((min(length.chunks, length.sessions) for length in self.lengths), default=0)
        if not 0 <= self.recycle <= 1:
            raise ConfigError(f"teacher.recycle is {self.recycle}; it is a probability, from 0 to 1")
        if min(early, late) <= 0 or smallest < 1:
            raise ConfigError(
                f"teacher.lengths have shares of {early} early and {late} late and at least {smallest} chunks and "
                "sessions; give shares above 0, and 1 or more of both"
            )


@dataclass(frozen=True)
class Lookup:
    """Steps that teach attention where a place was seen before; 0: none. Only the renderer knows where."""

    steps: int = 1500


@dataclass(frozen=True)
class Student(Descent):
    """Distribution matching, local and then contextual; see `cfengine.training.distil`."""

    steps: int = 300
    peak: float = 2.5e-4
    warm: int = 40
    decay: float = 0.99
    seeds: tuple[int, ...] = (21,)  # one student each, whose weights are averaged
    local: float = 0.4  # share of the steps that stage 1 takes
    first: float = 0.0  # share of batches whose sessions are their first chunk alone
    short: tuple[int, int] = (2, 7)  # chunks of a rollout in stage 1; 7 are the 21 latent frames of the paper
    long: tuple[int, int, int] = (8, 12, 28)  # in stage 2: at least, at most when it begins, at most when it ends
    window: int = 0  # chunks that are judged at a random place of a rollout; 0: all of them
    chunks: int = 16  # in a batch of one process: so many sessions that their chunks are about that
    guidance: float = 0.0  # how far the teacher is guided away from what it makes without a prompt
    critic_steps: int = 5  # for each of the student's, with its sample
    critic_pace: float = 2.0  # learning rate of the critic over that of the student
    anchor: float = 1.0  # weight of redrawing the truth, which keeps colours and copies exact, and of reading as taught
    alone: float = 0.5  # share of batches whose contexts are the student's own rollouts; the others stay near the truth
    given: float = 0.5  # share of rollouts that go on from true chunks, up to half of them
    turns: int = 4  # steps with one batch
    judges: dict[str, Any] = field(default_factory=dict)  # fields of the memory that teacher and critic have otherwise
    shuttles: float = 0.0  # share of sessions whose camera goes back and forth

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ConfigError("student.seeds is empty; give one number for each student")
        least, first, last = self.long
        if not 1 <= self.short[0] <= self.short[1] or not 1 <= least <= first <= last:
            raise ConfigError(f"student.short {self.short} and student.long {self.long} must rise from at least 1")
        if not 0 <= self.first <= 1:
            raise ConfigError(f"student.first is {self.first}; it is a share, from 0 to 1")
        if self.window < 0:
            raise ConfigError(f"student.window is {self.window}; give a number of chunks, or 0 for all of a rollout")

    def sessions(self, chunks: int) -> int:
        """Sessions of `chunks` chunks in a batch of one process."""
        return max(1, self.chunks // chunks)


@dataclass(frozen=True)
class Polish(Descent):
    """The last passes learn from more of the student's own; see `cfengine.training.polish`."""

    steps: int = 0
    peak: float = 2e-4
    warm: int = 20
    decay: float = 0.98
    passes: tuple[int, ...] = (350, 280, 220, 180, 150, 110, 80)  # of the teacher, as sampler steps
    shares: tuple[float, ...] = (0.1, 0.15, 0.4, 0.35)  # how often each of the student's passes is in a step
    held: int = 2  # passes that only keep what they answer: in them a landmark is chosen
    first: float = 0.5  # share of batches whose sessions are their first chunk alone
    far: float = 0.1  # share of batches with sessions as long as those of the student's stage 2
    blend: float = 0.67  # how far the weights go from the student to the polished one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not falling(self.passes):
            raise ConfigError(f"polish.passes are {self.passes}; they fall from at most 1000 to above 0")
        if min(self.first, self.far) < 0 or self.first + self.far > 1 or not 0 < self.blend <= 1:
            raise ConfigError(
                f"polish.first, far and blend are {self.first}, {self.far} and {self.blend}; they are shares, "
                "the first two of one whole, and the last above 0"
            )
        if min(self.shares, default=-1) < 0 or not 0.999 < sum(self.shares) < 1.001:
            raise ConfigError(f"polish.shares are {self.shares}; they are shares of one whole, one for each pass")
        if not 0 <= self.held < len(self.shares):
            raise ConfigError(f"polish.held is {self.held}; it is a number of passes, and leaves at least one to learn")


@dataclass(frozen=True)
class Evaluation:
    """A short look at the trained model: `cfengine.bench.world` and `cfengine.bench.recall` in little."""

    seeds: int = 4  # of the world bench
    seconds: float = 20.0  # of each
    scenes: int = 20  # of the recall bench
    times: tuple[float, ...] = (3.0, 8.0)  # seconds away


@dataclass(frozen=True)
class Settings:
    """Everything a training is made of; `config` is what the engine is told of it."""

    preset: str
    model: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that are not the preset's
    memory: dict[str, Any] = field(default_factory=dict)  # of MemoryConfig
    data: Data = Data()
    codec: Codec = Codec()
    teacher: Teacher = Teacher()
    lookup: Lookup = Lookup()
    student: Student = Student()
    polish: Polish = Polish()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        for title, changes in (("memory", self.memory), ("student.judges", self.student.judges)):
            check_rule(title, dataclasses.replace(self.config.memory, **changes))
        passes = len(self.config.sampler.steps)
        if self.polish.steps and len(self.polish.shares) != passes:
            raise ConfigError(f"polish.shares are {len(self.polish.shares)}, and the sampler has {passes} passes")
        if self.data.source == "clips" and self.lookup.steps:
            raise ConfigError(f"lookup.steps is {self.lookup.steps}; clips have no geometry to look up: set 0")
        if self.data.source == "world" and self.config.text != "tiny_world":
            raise ConfigError(
                f"preset {self.preset!r} reads prompts with {self.config.text!r}, and the world has concepts; "
                "set data.source to 'clips'"
            )

    @property
    def config(self) -> EngineConfig:
        base = preset(self.preset)
        model, memory = dataclasses.replace(base.model, **self.model), dataclasses.replace(base.memory, **self.memory)
        return dataclasses.replace(base, model=model, memory=memory)

    @property
    def worded(self) -> bool:
        """Whether prompts are concepts with a learned vector each."""
        return self.config.text == "tiny_world"

    def scaled(self, factor: float) -> Settings:
        """The same with every number of steps times `factor`, at least one where there were any."""
        changes = {}
        for name in ("codec", "teacher", "lookup", "student", "polish"):
            part = getattr(self, name)
            steps = {key: value for key, value in vars(part).items() if key in ("steps", "decoder_steps")}
            steps = {key: value and max(1, round(value * factor)) for key, value in steps.items()}
            changes[name] = dataclasses.replace(part, **steps)
        return dataclasses.replace(self, **changes)


def check_rule(title: str, memory: MemoryConfig) -> None:
    """Raise ConfigError where training cannot run a rule of the memory."""
    if memory.policy not in RULES or memory.scenes:
        what = f"{memory.policy!r}" + (" with scenes" if memory.scenes else "")
        raise ConfigError(
            f"{title}.policy is {what}; training runs {', '.join(RULES)}, without scenes: set {title}.policy to one"
        )


def built_in() -> list[str]:
    """Names of the configurations that the package ships."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def read(source: str, changes: Iterable[str] = ()) -> Settings:
    """Settings of a built-in name or a TOML file, with `changes` such as "student.steps=100" (TOML values) on top.

    ConfigError, one sentence, for an unknown name, what is no TOML, an unknown key, or a value of another type.
    """
    path = CONFIGS / f"{source}.toml" if source in built_in() else Path(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(
            f"training config {source!r} cannot be read ({problem}); give a TOML file or one of {', '.join(built_in())}"
        ) from problem
    for change in changes:
        try:
            _merge(tables, tomllib.loads(change))
        except tomllib.TOMLDecodeError as problem:
            raise ConfigError(f"--set {change!r} is no TOML ({problem}); write SECTION.KEY=VALUE") from problem
    kinds = {"model": ModelConfig, "memory": MemoryConfig}
    for name, kind in kinds.items():
        if isinstance(tables.get(name), dict):
            tables[name] = _fields(kind, tables[name], source, f"{name}.")
    judges = tables.get("student", {}).get("judges") if isinstance(tables.get("student"), dict) else None
    if isinstance(judges, dict):
        tables["student"]["judges"] = _fields(MemoryConfig, judges, source, "student.judges.")
    try:
        return Settings(**_fields(Settings, tables, source, ""))
    except (ConfigError, TypeError) as problem:
        raise _named(source, "", problem) from problem


def _named(source: str, key: str, problem: Exception) -> ConfigError:
    """The problem with the file and the key, unless it names them already."""
    said = str(problem)
    return ConfigError(said if said.startswith("training config") else f"training config {source!r}{key}: {said}")


def _merge(tables: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tables.get(key), dict):
            _merge(tables[key], value)
        else:
            tables[key] = value


def _fields(kind: type, table: dict[str, Any], source: str, prefix: str) -> dict[str, Any]:
    """Keyword arguments of a dataclass from a table; ConfigError names source, key, and what is known."""
    hints = typing.get_type_hints(kind)
    unknown = [key for key in table if key not in hints]
    if unknown:
        raise ConfigError(f"training config {source!r} has {prefix + unknown[0]!r}; known are {', '.join(hints)}")
    return {key: _value(hints[key], value, source, prefix + key) for key, value in table.items()}


def _value(kind: Any, value: Any, source: str, key: str) -> Any:
    """A TOML value as `kind`: a number, a text, a tuple, or a dataclass from a table or from a list of its fields."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _value(inner[0], value, source, key)
    if dataclasses.is_dataclass(kind) and isinstance(value, list):
        value = dict(zip(typing.get_type_hints(kind), value, strict=False))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        try:
            return kind(**_fields(kind, value, source, f"{key}."))
        except (ConfigError, TypeError) as problem:
            raise _named(source, f", {key}", problem) from problem
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(value):
            return tuple(_value(one, entry, source, key) for one, entry in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return value
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    wanted = str(kind) if origin else kind.__name__
    raise ConfigError(f"training config {source!r}: {key} is {value!r}, and must be {wanted}")
