"""Real video as training data: a folder of clips, encoded once by the codec and the text encoder of the model.

A clip is a .safetensors file with `latents` (frames, channels, rows, columns), as the model's codec encodes the clip
from its first frame, normalised as the model wants them, and `text` (n, text_dim), the rows of its prompt. Sessions are
the beginnings of clips: only there does the first latent frame stand for one video frame, as that of a session does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from cfengine.config import EngineConfig
from cfengine.errors import CheckpointError, ConfigError
from cfengine.training.data import Batch


class Clips:
    """The clips of a folder; files stay on disk, and a batch reads what it needs of them."""

    def __init__(self, folder: str | Path, config: EngineConfig) -> None:
        """ConfigError where there are none, CheckpointError where one cannot be read or has another shape."""
        self.folder, self.frames = Path(folder), config.memory.chunk_frames
        video = config.video
        self.shape = (config.model.in_channels, video.latent_height, video.latent_width)
        self.text_dim, self.text_len = config.model.text_dim, config.model.text_len
        self.lengths = {path: self._chunks(path) for path in sorted(self.folder.glob("*.safetensors"))}
        if not self.lengths:
            raise ConfigError(f"data.folder {str(folder)!r} holds no .safetensors; give a folder of encoded clips")

    def _chunks(self, path: Path) -> int:
        """Whole chunks of a clip."""
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("latents", "text")}
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"clip {path} cannot be read ({problem}); encode it again") from problem
        latents, text = shapes["latents"], shapes["text"]
        fits = len(text) == 2 and text[1] == self.text_dim and 0 < text[0] <= self.text_len
        if latents[1:] != self.shape or len(latents) != 4 or not fits:
            raise CheckpointError(
                f"clip {path} has latents {latents} and text {text}; the model takes (frames, {self.shape[0]}, "
                f"{self.shape[1]}, {self.shape[2]}) and (1 to {self.text_len}, {self.text_dim}): encode it again"
            )
        return latents[0] // self.frames

    def draw(
        self, size: int, chunks: int, draw: np.random.Generator, *, shuttles: float = 0.0, jumps: float = 0.0
    ) -> Batch:
        """`size` clips of at least `chunks` chunks; their prompts are padded with rows of zeros, as the model pads."""
        for name, share in (("shuttles", shuttles), ("jumps", jumps)):
            if share:
                raise ConfigError(f"{name} is {share}, and no camera of a clip can be chosen; set it to 0")
        enough = [path for path, length in self.lengths.items() if length >= chunks]
        if not enough:
            raise ConfigError(
                f"no clip in {self.folder} has {chunks} chunks of {self.frames} latent frames, the longest has "
                f"{max(self.lengths.values())}; add longer clips or shorten the sessions"
            )
        chosen = [enough[i] for i in draw.integers(len(enough), size=size)]
        latents, texts = zip(*(self._read(path, chunks) for path in chosen), strict=True)
        longest = max(len(text) for text in texts)
        rows = torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
        stacked = torch.stack(latents).unflatten(1, (chunks, self.frames))
        return Batch(stacked, rows[:, None].expand(-1, chunks, -1, -1), None)

    def _read(self, path: Path, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        with safe_open(path, "pt") as file:
            return file.get_slice("latents")[: chunks * self.frames].float(), file.get_tensor("text").float()
