"""DINOv2 and CLIP as `transformers` has them: frames and prompts to vectors of unit length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cfengine import checkpoint
from cfengine.errors import CheckpointError, ConfigError, PromptError

DINOV2, CLIP = "facebook/dinov2-base", "openai/clip-vit-base-patch32"
INSTALL = "pip install 'cfengine[quality]'"
DINOV2_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*")
CLIP_FILES = (
    *DINOV2_FILES,
    "pytorch_model.bin",  # the usual CLIP is published so
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


class Prompt(NamedTuple):
    """vector: (e,) unit length, on the CPU      tokens: of the prompt, start and end included      read: of them."""

    vector: Tensor
    tokens: int
    read: int


class Models:
    """DINOv2's class token (after its last norm) and CLIP's two projections, in float32."""

    def __init__(self, dinov2: Any, clip: Any, views: dict[str, Any], tokenizer: Any, device: str = "cpu") -> None:
        """Take a `Dinov2Model`, a `CLIPModel`, their image processors as {"dinov2", "clip"}, and CLIP's tokenizer."""
        self.dinov2, self.clip = (model.float().eval().requires_grad_(False).to(device) for model in (dinov2, clip))
        self.views, self.tokenizer, self.device = views, tokenizer, device

    @classmethod
    def load(cls, dinov2: str = DINOV2, clip: str = CLIP, device: str = "cpu") -> Models:
        """Load both from hub ids or folders that `save_pretrained` wrote.

        ConfigError: packages are missing.  CheckpointError: a model is missing, of another kind, or incomplete.
        """
        transformers = _transformers()
        eye, eye_view, _ = _load(transformers, "Dinov2Model", "dinov2", dinov2, DINOV2_FILES)
        clip_model, clip_view, folder = _load(transformers, "CLIPModel", "clip", clip, CLIP_FILES)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises what its parsers raise
            raise _unusable("--clip", folder, error, CLIP) from error
        return cls(eye, clip_model, {"dinov2": eye_view, "clip": clip_view}, tokenizer, device)

    @torch.inference_mode()
    def images(self, frames: list[np.ndarray]) -> dict[str, Tensor]:
        """frames: (height, width, 3) uint8 RGB each -> {"dinov2": (frames, d), "clip": (frames, e)}, unit rows."""
        shown = {
            name: view(images=frames, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            for name, view in self.views.items()
        }
        eye = self.dinov2(pixel_values=shown["dinov2"].to(self.device)).pooler_output
        seen = self.clip.vision_model(pixel_values=shown["clip"].to(self.device)).pooler_output
        return {"dinov2": _unit(eye), "clip": _unit(self.clip.visual_projection(seen))}

    @torch.inference_mode()
    def text(self, prompt: str) -> Prompt:
        """The prompt as CLIP reads it: what is beyond its positions (77 as published) is cut off, the end token kept.

        PromptError: nothing to read.
        """
        if not prompt.strip():
            raise PromptError("the prompt is empty; say what the video shows, or leave --prompt out")
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        ids = self.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        ids = ids.to(self.device)
        read = self.clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
        return Prompt(_unit(self.clip.text_projection(read))[0], tokens, ids.shape[1])


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows, dim=-1).cpu()


def _transformers() -> Any:
    try:
        import PIL  # noqa: F401  its image processors need Pillow and say so only when they are made
        import transformers
    except ImportError as error:
        raise ConfigError(f"DINOv2 and CLIP need transformers and Pillow ({error}); {INSTALL}") from error
    return transformers


def _load(transformers: Any, name: str, kind: str, source: str, files: tuple[str, ...]) -> tuple[Any, Any, Path]:
    """(model, image processor, folder) of a hub id or a folder; kind: also the name of its option."""
    option, usual = f"--{kind}", {"dinov2": DINOV2, "clip": CLIP}[kind]
    folder = checkpoint.fetch(source, files, f"{name} ({option})")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{option} {folder} holds no config.json; give a folder of a model such as {usual}")
    found = checkpoint.read_json(folder / "config.json").get("model_type")
    if found != kind:  # transformers would go on with random weights
        raise CheckpointError(f"{option} {folder} holds a model of type {found!r}, not {kind!r}; give one as {usual}")
    try:
        # eager attention: the same sums whatever else a build of torch offers
        model, info = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, attn_implementation="eager"
        )
        view = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises what its parsers raise
        raise _unusable(option, folder, error, usual) from error
    absent = sorted(map(str, info["missing_keys"])) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if absent:  # transformers has filled them with random numbers
        shown = ", ".join(absent[: checkpoint.LISTED])
        raise CheckpointError(
            f"{option} {folder} lacks {len(absent)} tensors or has them in another shape: {shown}; fetch it again"
        )
    return model, view, folder


def _unusable(option: str, folder: Path, error: Exception, usual: str) -> CheckpointError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"{option} {folder} cannot be loaded ({reason}); fetch it again, whole, or give a folder of {usual}"
    )
