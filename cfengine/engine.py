"""Build once (weights, operations, codec, text encoder), stream many."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from cfengine.codec import Codec, load_codec
from cfengine.config import PRESETS, EngineConfig, cache_dir, preset, with_policy
from cfengine.errors import CFEngineError, ConfigError, PromptError
from cfengine.memory.memory import Memory
from cfengine.model.dit import CausalDiT, CrossCache
from cfengine.model.text import CachedTextEncoder, TextEncoder
from cfengine.model.text_tiny import TinyTextEncoder
from cfengine.model.weights import infer_config, load_dit
from cfengine.ops import HINTS, not_built, row, select
from cfengine.scheduler.chunk import ChunkScheduler
from cfengine.scheduler.sampler import Schedule
from cfengine.segments.torch import TorchSegments
from cfengine.session import Session, check_num_frames, check_seed
from cfengine.types import Frame

WEIGHTS = Path(__file__).parent / "weights"  # what the package ships
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Engine:
    """A causal video diffusion model, ready to stream.

    with Engine.from_pretrained("tiny-world") as engine:
        for frame in engine.stream("pan right over a desert at sunset", seed=1, num_frames=81):
            show(frame.pixels)
    """

    def __init__(
        self,
        config: EngineConfig,
        model: CausalDiT,
        codec: Codec,
        text: TextEncoder,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take ready parts; `from_pretrained` loads them. model is moved to device and dtype and laid out here."""
        self.config, self.codec, self.text = config, codec, text
        self.device, self.dtype = device, dtype
        self.ops = select(_device_type(device), dict(config.kernels))
        missing = [op for op in not_built(_device_type(device), self.ops.names) if op not in dict(config.kernels)]
        if missing:
            hint = HINTS[row(missing[0], _device_type(device))[0].name]
            warnings.warn(
                f"compiled kernels are missing, so plain torch serves {', '.join(missing)}, slower; {hint}",
                stacklevel=2,
            )
        self.model = model.to(device=device, dtype=dtype).prepare()
        segments = TorchSegments(self.model, self.ops, config.grid)
        self._scheduler = ChunkScheduler(self.model, segments, Schedule(config.sampler))
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "tiny-world",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        config: EngineConfig | None = None,
        policy: str | None = None,
        size: tuple[int, int] | None = None,
        taehv: str | Path | None = None,
        threads: int | None = None,
    ) -> Engine:
        """Load a preset, a local checkpoint (file or folder) or a hub id.

        dtype: "float32" or "bfloat16" (default: float32 for the shipped model, bfloat16 for the others)
        config: overrides the preset's configuration; a checkpoint without one is taken as Context Forcing at the sizes
        its tensors show      policy: another memory rule over the same number of slots
        size: (width, height) in pixels      taehv: `taew2_1` weights (file, folder or hub id) to decode with, not the
        Wan VAE      threads: for torch and the compiled kernels, process-wide
        Raises ConfigError, CheckpointError or KernelError.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1")
        if _device_type(device) != "cpu" and not torch.cuda.is_available():
            raise ConfigError(
                f"device {device!r} needs CUDA, which torch {torch.__version__} does not find; use device='cpu'"
            )
        name = str(source)
        if config is None:
            config = cls._config_of(name)
        if policy is not None:
            config = dataclasses.replace(config, memory=with_policy(config.memory, policy))
        if size is not None:
            config = dataclasses.replace(config, video=dataclasses.replace(config.video, width=size[0], height=size[1]))
        if taehv is not None:
            config = dataclasses.replace(config, codec="taehv")
        shipped = WEIGHTS / name if name in PRESETS and not PRESETS[name].dit_source else None
        select(_device_type(device), dict(config.kernels))  # a choice that is not built fails before any weights load
        if threads is not None:
            torch.set_num_threads(threads)
        kind = _dtype(dtype) or (torch.float32 if shipped else torch.bfloat16)
        if shipped:
            dit, codec, text = (str(shipped / f"{part}.safetensors") for part in ("dit", "codec", "text"))
        else:
            dit = config.dit_source if name in PRESETS else name
            codec = text = name if _is_wan_folder(name) else config.base_source
        codec = str(taehv or codec)
        with torch.device("meta"):
            model = CausalDiT(config.model)
        model.load_state_dict(load_dit(dit, config.model, dtype=kind, device=device), assign=True)
        encoder = _text_encoder(config, text, device)
        pixels = load_codec(config, codec, device, torch.float32 if _device_type(device) == "cpu" else kind)
        return cls(config, model, pixels, encoder, device=device, dtype=kind)

    @staticmethod
    def _config_of(name: str) -> EngineConfig:
        """Configuration of a preset, or of a checkpoint whose sizes its tensors show."""
        if name in PRESETS:
            return preset(name)
        if "/" not in name and not Path(name).exists():
            raise ConfigError(
                f"unknown model {name!r}: no such file or folder, and the presets are {', '.join(PRESETS)}"
            )
        known = next((p for p in PRESETS.values() if p.dit_source == name), PRESETS["context-forcing"])
        return dataclasses.replace(known, name=name, model=infer_config(name))

    def implementations(self) -> dict[str, str]:
        """Which implementation serves each operation."""
        return dict(self.ops.names)

    def encode_prompt(self, prompt: str) -> list[CrossCache]:
        """Cross-attention keys and values of a prompt, per layer; PromptError for an empty or too long one."""
        self._check_open()
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError("the prompt is empty; say what the video shows")
        embeds = self.text.encode(prompt)
        with torch.inference_mode():
            return self.model.project_text(embeds.to(self.device))

    def session(self, prompt: str, *, seed: int = 0, latents: torch.Tensor | None = None) -> Session:
        """Open a live video. latents (frames, channels, height, width), if given, are its past (whole chunks)."""
        self._check_open()
        check_seed(seed)
        session = Session(
            self.config,
            self._scheduler,
            Memory(self.config, self.ops, self.dtype, self.device),
            self.codec.decoder(),
            self.encode_prompt,
            prompt,
            seed,
            self._sessions.discard,
        )
        self._sessions.add(session)
        if latents is not None:
            try:
                session.prime(latents)
            except BaseException:
                session.close()
                raise
        return session

    def stream(self, prompt: str, *, seed: int = 0, num_frames: int | None = None) -> Iterator[Frame]:
        """Yield frames as soon as each chunk is decoded, before its clean pass.

        num_frames: video frames, any positive number (natural lengths are 9 + 12 k); None never ends
        The same seed gives the same frames whatever was streamed before. Closing the generator stops the work.
        Bad arguments raise at the call, not at the first frame.
        """
        check_num_frames(num_frames)
        session = self.session(prompt, seed=seed)

        def run() -> Iterator[Frame]:
            with session:
                yield from session.frames(num_frames)

        return run()

    def _check_open(self) -> None:
        if self._closed:
            raise CFEngineError("this engine is closed; load it again with Engine.from_pretrained(...)")

    def close(self) -> None:
        """Close every session and let the weights go; harmless twice."""
        for session in list(self._sessions):
            session.close()
        self._closed = True
        self.model = self.codec = self.text = self._scheduler = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _device_type(device: torch.device | str) -> str:
    """ "cpu" or "cuda"; ConfigError for anything else."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = str(device)
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {str(device)!r}; choose cpu or cuda")
    return kind


def _text_encoder(config: EngineConfig, source: str, device: torch.device | str) -> TextEncoder:
    """The encoder that `config.text` names; large ones are loaded when a prompt is not in the cache."""
    if config.text == "tiny_world":
        return TinyTextEncoder.from_file(source)
    if config.text != "umt5":
        raise ConfigError(f"unknown text encoder {config.text!r}; choose tiny_world or umt5")
    model = config.model
    return CachedTextEncoder.umt5(
        source, cache_dir() / "prompts", device=device, text_dim=model.text_dim, text_len=model.text_len
    )


def _is_wan_folder(name: str) -> bool:
    """True for a local folder that brings its own VAE, and so its text encoder: a whole Wan release."""
    return any((Path(name) / part).exists() for part in ("Wan2.1_VAE.pth", "vae"))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; choose float32 or bfloat16")
        return _DTYPES[dtype]
    if dtype is not None and dtype not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype} is not supported; choose float32 or bfloat16")
    return dtype
