"""Small engines with random weights, for tests of everything around the model."""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cfengine.config import EngineConfig, MemoryConfig, ModelConfig, VideoConfig
from cfengine.errors import PromptError
from cfengine.model.dit import CausalDiT

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any Triton kernel is defined: they then run on the CPU


@pytest.fixture(scope="session", autouse=True)
def config_folder(tmp_path_factory):
    """A configuration folder for the tests and the processes they start: no key is made in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("config")
        patch.setenv("CFENGINE_CONFIG_DIR", str(folder))
        yield folder


TOY = EngineConfig(
    name="toy",
    model=ModelConfig(dim=48, ffn_dim=96, heads=2, layers=2, text_dim=8, text_len=12, freq_dim=16),
    memory=MemoryConfig(),
    video=VideoConfig(width=48, height=32),
)


class ToyCodec:
    """Pixels that show the latents: every latent value of channel 0 becomes an 8x8 patch."""

    latent_channels, spatial_stride, temporal_stride = 16, 8, 4

    class Decoder:
        def __init__(self) -> None:
            self.state = {}

        def draw(self, latents: torch.Tensor) -> torch.Tensor:
            shown = latents[:, :3] + (0.1 * self.state[0][:, :3] if self.state else 0)  # a little of the past
            image = (shown * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            image = image.repeat_interleave(8, 1).repeat_interleave(8, 2)
            video = image.repeat_interleave(4, 0)[0 if self.state else 3 :]
            self.state = {0: latents[-1:]}
            return video.contiguous()

        def decode(self, latents: torch.Tensor) -> np.ndarray:
            return self.draw(latents).cpu().numpy()

    def decoder(self) -> ToyCodec.Decoder:
        return self.Decoder()


class ToyText:
    """One random vector per word, the same in every run."""

    text_dim, text_len = 8, 12

    def encode(self, prompt: str) -> torch.Tensor:
        words = prompt.split()
        if len(words) > self.text_len:
            raise PromptError(f"the prompt has {len(words)} words; this encoder takes {self.text_len}")
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, word)))) for word in words]
        return torch.stack(rows)


def random_model(config: ModelConfig, seed: int = 0) -> CausalDiT:
    """A model whose every parameter is random, so that no branch is multiplied by zero or one."""
    generator = torch.Generator().manual_seed(seed)
    model = CausalDiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 or "modulation" in name else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
                parameter.add_(1)
    return model


@pytest.fixture
def toy_engine():
    """make(policy=..., memory=MemoryConfig, ...) -> Engine with random weights, toy codec and toy text."""
    from cfengine.engine import Engine

    engines = []

    def make(config: EngineConfig = TOY, *, memory: MemoryConfig | None = None, model_seed: int = 0, **options):
        if memory is not None:
            config = dataclasses.replace(config, memory=memory)
        engine = Engine(config, random_model(config.model, model_seed), ToyCodec(), ToyText(), **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def shown(session, count: int) -> list[bytes]:
    return [b"".join(frame.pixels.tobytes() for frame in session.next_chunk()) for _ in range(count)]


@pytest.fixture
def beside_a_healthy_one():
    """beside(engine) -> a context: whatever is done in it, another session of the engine shows what it shows alone."""

    @contextmanager
    def beside(engine):
        with engine.session("b c", seed=7) as alone:
            expected = shown(alone, 6)
        with engine.session("b c", seed=7) as healthy:
            found = shown(healthy, 2)
            yield
            found += shown(healthy, 4)
        assert found == expected

    return beside


class NoReads(TorchDispatchMode):
    """Refuses what makes a host wait for a device, or a graph freeze a value: reads of numbers, tensors of literals."""

    REFUSED = (
        "aten.item",
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.equal",
        "aten.lift_fresh",
        "aten.is_nonzero",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.REFUSED), f"the host takes part: {func}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_reads():
    """A context in which the host may not take part."""
    return NoReads()
