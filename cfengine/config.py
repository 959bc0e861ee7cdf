"""Configuration: frozen dataclasses, presets as values, every derived size in one place."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from cfengine.errors import ConfigError

POLICIES = ("slow_fast", "slow_fast_paper", "slow_fast_diverse", "fifo", "sink_window", "relative_window", "uniform")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a causal Wan 2.1 DiT (defaults: Wan2.1-T2V-1.3B, `Wan2.1/wan/configs/wan_t2v_1_3B.py`)."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "ffn_dim",
            "heads",
            "layers",
            "in_channels",
            "out_channels",
            "text_dim",
            "text_len",
            "freq_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; ModelConfig.{name} must be at least 1")
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} does not divide into {self.heads} heads; choose heads that divide dim")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary positions need pairs, choose an even head size")
        if self.patch[0] != 1:
            raise ConfigError(f"patch {self.patch} spans {self.patch[0]} latent frames; only 1 is supported")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class MemoryConfig:
    """What a layer remembers, in latent frames (paper section 3.3; defaults: the released configuration).

    `slots` pages are attended to at most, the chunk in flight included. `fast` counts the chunk in flight.
    """

    policy: str = "slow_fast"
    sink: int = 3
    slow: int = 12
    fast: int = 6
    chunk_frames: int = 3
    rope_length: int = 21
    keep: int = 1  # frames of a chunk that a promotion stores (slow_fast_paper, slow_fast_diverse: always one)
    threshold: float = 0.95
    interval: int = 0  # policy `uniform`: promote when first frame of chunk % interval == 0
    slots_override: int | None = None  # cache size where it differs from sink + slow + fast
    scenes: bool = False  # policy `relative_window` as Infinity-RoPE has it: the prompt holds scenes

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown policy {self.policy!r}; choose one of {', '.join(POLICIES)}")
        least = {"chunk_frames": 1, "sink": 0, "slow": 0, "fast": 0, "rope_length": 1, "keep": 0, "interval": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} is {getattr(self, name)}; MemoryConfig.{name} must be at least {smallest}")
        if self.scenes and (self.policy != "relative_window" or self.chunk_frames < 3 or self.slots < 3):
            raise ConfigError(
                f"scenes need policy relative_window, chunks and windows of at least 3 frames, not {self.policy}, "
                f"{self.chunk_frames} and {self.slots}"
            )
        if not 0 <= self.keep <= self.chunk_frames:
            raise ConfigError(
                f"keep is {self.keep}; a promotion stores between 0 and chunk_frames = {self.chunk_frames} frames"
            )
        if self.slots < self.chunk_frames:
            raise ConfigError(f"{self.slots} slots cannot hold a chunk of {self.chunk_frames}; enlarge the memory")
        if self.policy.startswith("slow_fast") or self.policy == "uniform":
            if self.slots < self.sink + self.fast:
                raise ConfigError(
                    f"{self.slots} slots cannot hold a sink of {self.sink} and a fast memory of {self.fast} frames; "
                    "enlarge the memory"
                )
            if self.fast < self.chunk_frames:
                raise ConfigError(
                    f"fast memory of {self.fast} frames cannot hold a chunk of {self.chunk_frames}; "
                    "set MemoryConfig.fast to at least chunk_frames"
                )
        if self.policy == "uniform" and self.interval < 1:
            raise ConfigError("policy 'uniform' needs MemoryConfig.interval >= 1: latent frames between kept ones")

    @property
    def kept_sink(self) -> int:
        """Frames that stay for ever: `fifo` has none."""
        return 0 if self.policy == "fifo" else self.sink

    @property
    def slots(self) -> int:
        return self.slots_override or self.sink + self.slow + self.fast


@dataclass(frozen=True)
class SamplerConfig:
    """Few-step flow matching: `steps` count from the noisy end of a schedule of 1,000, warped by `shift`."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True  # False takes the steps as timesteps
    context_timestep: float = 0.0  # of the clean pass


PRODUCTS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")  # of a block, in order


def product_names(layers: int) -> list[str]:
    """Products of a model: `blocks.<number>.<product>`, block by block."""
    return [f"blocks.{number}.{product}" for number in range(layers) for product in PRODUCTS]


class Kept(NamedTuple):
    """Products of blocks that stay in the type of the weights: a pattern of `blocks.<number>.<product>`, and why."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class PrecisionConfig:
    """What is rounded to e4m3 ("fp8") and what keeps the type of the weights ("bf16").

    linears: the products of the blocks (PRODUCTS), but for those that `keep` names. Patch, text and time embeddings,
    the head and the cross-attention keys and values are never rounded: they are less than 1 % of a pass, or run once a
    prompt or a timestep, and the head's output is the flow itself.
    pages: keys and values in memory, one scale a page and head      attention: its two products, on such pages
    """

    linears: str = "bf16"
    keep: tuple[Kept, ...] = ()
    pages: str = "bf16"
    attention: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("linears", "pages", "attention"):
            if getattr(self, name) not in ("bf16", "fp8"):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; PrecisionConfig.{name} is 'bf16' or 'fp8'")
        if self.attention == "fp8" and self.pages != "fp8":
            raise ConfigError("attention in fp8 reads pages in fp8, not in bf16; set PrecisionConfig.pages to 'fp8'")

    def check_kept(self, layers: int) -> None:
        """Raise ConfigError where a pattern of `keep` is the name of no product of a model of `layers` blocks."""
        names = product_names(layers)
        for pattern, _ in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"PrecisionConfig.keep names {pattern!r}, which no product of {layers} blocks is called; "
                    f"choose among blocks.<number>.<product> with {', '.join(PRODUCTS)}"
                )

    @property
    def fp8(self) -> bool:
        """Whether anything is in e4m3."""
        return "fp8" in (self.linears, self.pages, self.attention)

    def fp8_products(self, block: int) -> frozenset[str]:
        """Products of a block that are in e4m3."""
        if self.linears != "fp8":
            return frozenset()
        kept = {p for p in PRODUCTS for k in self.keep if fnmatchcase(f"blocks.{block}.{p}", k.pattern)}
        return frozenset(PRODUCTS) - kept


PRECISIONS: dict[str, PrecisionConfig] = {
    "bf16": PrecisionConfig(),
    "fp8": PrecisionConfig(linears="fp8", pages="fp8", attention="fp8"),
}


def precision(name: str) -> PrecisionConfig:
    """Return the precision called `name`; ConfigError lists the known ones."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ConfigError(f"unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}") from None


@dataclass(frozen=True)
class VideoConfig:
    """Pixels and their clock. A stream's first latent frame gives 1 video frame, later ones `temporal_stride`."""

    width: int = 832
    height: int = 480
    fps: int = 16
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        if self.fps < 1:
            raise ConfigError(f"fps is {self.fps}; it must be at least 1")
        self.check_patch((1, 1))

    def check_patch(self, patch: tuple[int, int]) -> None:
        """Raise ConfigError unless patches of (rows, columns) of latents fill the picture."""
        for name, size in (("height", patch[0]), ("width", patch[1])):
            value, unit = getattr(self, name), size * self.spatial_stride
            if value < unit or value % unit:
                raise ConfigError(
                    f"{name} {value} is not a multiple of {unit} (codec stride {self.spatial_stride} x patch {size})"
                )

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine is built from; presets are values of this class."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    codec: str = "wan_vae"  # tiny_world | wan_vae | taehv
    text: str = "umt5"  # tiny_world | umt5
    dit_source: str = ""  # hub id or path of the DiT weights
    base_source: str = ""  # hub id or path of text encoder and VAE
    kernels: tuple[tuple[str, str], ...] = ()  # (op, implementation) choices that override the automatic one

    def __post_init__(self) -> None:
        self.video.check_patch(self.model.patch[1:])
        self.precision.check_kept(self.model.layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        _, ph, pw = self.model.patch
        return self.video.latent_height // ph, self.video.latent_width // pw

    @property
    def page_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU ($TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ($RANK of $WORLD_SIZE)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_display() -> bool:
    """Whether a window can be tried; on Linux $DISPLAY, $WAYLAND_DISPLAY or $SDL_VIDEODRIVER say so."""
    return sys.platform != "linux" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    )


def runtime_dir() -> Path | None:
    """Folder of this user's sockets, $XDG_RUNTIME_DIR, where there is one."""
    named = os.environ.get("XDG_RUNTIME_DIR")
    return Path(named) if named else None


def cache_dir() -> Path:
    """Folder for prompt embeddings and measurements: $CFENGINE_CACHE_DIR, else ~/.cache/cfengine."""
    return Path(os.environ.get("CFENGINE_CACHE_DIR") or Path.home() / ".cache" / "cfengine")


def config_dir() -> Path:
    """Folder for the key that signs files: $CFENGINE_CONFIG_DIR, else ~/.config/cfengine."""
    return Path(os.environ.get("CFENGINE_CONFIG_DIR") or Path.home() / ".config" / "cfengine")


_WAN = "Wan-AI/Wan2.1-T2V-1.3B"

# tokens of 4 latent rows by 1 column: a pan moves the picture by one latent column, one token, a latent frame
TINY_MODEL = ModelConfig(
    patch=(1, 4, 1), dim=192, ffn_dim=768, heads=6, layers=6, text_dim=64, text_len=16, freq_dim=64
)

PRESETS: dict[str, EngineConfig] = {
    preset.name: preset
    for preset in (
        EngineConfig(
            name="tiny-world",
            model=TINY_MODEL,
            # the mean keys of a small net hardly move. In the blocks that look things up a pan keeps less than 0.9975
            # from chunk to chunk, "hold" mostly more than 0.999: waiting pushes nothing out of slow memory
            memory=MemoryConfig(policy="slow_fast_paper", threshold=0.998),
            # noise levels 1, 0.88, 0.73, 0.47: landmarks are decided in the middle, and the last pass sees more of them
            sampler=SamplerConfig(steps=(1000, 600, 350, 150)),
            video=VideoConfig(width=96, height=64),
            codec="tiny_world",
            text="tiny_world",
        ),
        EngineConfig(name="context-forcing", dit_source="ShuoChen20/context_forcing", base_source=_WAN),
        EngineConfig(
            name="self-forcing",
            memory=MemoryConfig(policy="fifo", sink=0, slow=0, fast=21),
            dit_source="gdhe17/Self-Forcing",
            base_source=_WAN,
        ),
        EngineConfig(
            name="longlive",
            memory=MemoryConfig(policy="sink_window", sink=3, slow=0, fast=9),
            dit_source="Efficient-Large-Model/LongLive-1.3B",
            base_source=_WAN,
        ),
        EngineConfig(
            name="infinity-rope",
            memory=MemoryConfig(policy="relative_window", sink=1, slow=0, fast=5, scenes=True),
            dit_source="gdhe17/Self-Forcing",
            base_source=_WAN,
        ),
        EngineConfig(name="wan2.1-t2v-1.3b", dit_source=_WAN, base_source=_WAN),
    )
}


def preset(name: str) -> EngineConfig:
    """Return the preset called `name`; ConfigError lists the known ones."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}") from None


def with_policy(memory: MemoryConfig, policy: str) -> MemoryConfig:
    """The same number of slots under another rule; `uniform` keeps a frame of every second chunk."""
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if policy == memory.policy:
        return memory
    memory = replace(memory, scenes=False, rope_length=memory.slots)
    sink = 0 if policy == "fifo" else memory.sink or memory.chunk_frames
    if policy in ("fifo", "sink_window", "relative_window"):
        return replace(memory, policy=policy, sink=sink, slow=0, fast=memory.slots - sink)
    fast = min(2 * memory.chunk_frames, memory.slots - sink)
    interval = 2 * memory.chunk_frames if policy == "uniform" else 0
    return replace(memory, policy=policy, sink=sink, slow=memory.slots - sink - fast, fast=fast, interval=interval)
