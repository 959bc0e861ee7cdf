"""Prompts to embeddings: UMT5-XXL as Wan 2.1 uses it, and a cache on disk that spares loading it."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cfengine import checkpoint
from cfengine.config import ModelConfig
from cfengine.errors import CheckpointError, ConfigError, PromptError

WHAT = "text encoder"
OFFICIAL = "models_t5_umt5-xxl-enc-bf16"  # stem of the file in Wan-AI/Wan2.1-T2V-1.3B
TOKENIZERS = (
    "google/umt5-xxl",
    "tokenizer",
    ".",
)  # folders beside the weights: official, diffusers, plain transformers
HUB_FILES = (
    f"{OFFICIAL}.safetensors",
    f"{OFFICIAL}.pth",
    "google/umt5-xxl/*",
    "text_encoder/config.json",
    "text_encoder/model*.safetensors*",
    "tokenizer/*",
)
REMEDY = "Pass the folder of Wan-AI/Wan2.1-T2V-1.3B as published, or of its diffusers release"
INSTALL = "pip install 'cfengine[text]'"

_TOP = {"token_embedding.weight": "encoder.embed_tokens.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {  # official name inside blocks.N -> transformers name inside encoder.block.N.layer
    "norm1": "0.layer_norm",
    "attn.q": "0.SelfAttention.q",
    "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v",
    "attn.o": "0.SelfAttention.o",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}


class TextEncoder(Protocol):
    """What turns a prompt into rows for the cross-attention."""

    text_dim: int
    text_len: int

    def encode(self, prompt: str) -> Tensor:
        """prompt -> (n, text_dim), n <= text_len live tokens without padding; PromptError: empty or too long."""
        ...


def clean(prompt: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice), make every run of white space one blank.

    As `wan/modules/tokenizers.py` of Wan-Video/Wan2.1 does before the tokenizer. PromptError when nothing is left.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ConfigError(f"cleaning a prompt needs ftfy; {INSTALL}") from error
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
    if not text:
        raise PromptError("the prompt is empty; describe the scene in a sentence or two")
    return text


def from_official(name: str) -> str:
    """Translate one name of `models_t5_umt5-xxl-enc-bf16.pth` (`wan/modules/t5.py`); unknown names stay."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if not match or match[2] not in _BLOCK:
        return name
    return f"encoder.block.{match[1]}.layer.{_BLOCK[match[2]]}.weight"


class UMT5Encoder:
    """The encoder half of UMT5, all of its tokens live (interface `TextEncoder`)."""

    def __init__(self, model: Any, tokenizer: Any, *, text_len: int = ModelConfig.text_len) -> None:
        """Take a `transformers.UMT5EncoderModel` and its tokenizer."""
        self.model, self.tokenizer, self.text_len = model.eval().requires_grad_(False), tokenizer, text_len
        self.text_dim: int = model.config.d_model

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_len: int = ModelConfig.text_len,
    ) -> UMT5Encoder:
        """Load the official or the hub layout from a folder or hub id (11 GB in bfloat16, the type it is published in).

        Raises CheckpointError for what is missing or does not fit, ConfigError where transformers is not installed.
        """
        transformers = _transformers()
        folder = checkpoint.fetch(source, HUB_FILES, WHAT)
        path = _weights_in(folder)
        tokenizer = _tokenizer(_root(path), transformers)
        state = checkpoint.read_tensors(path)
        if "token_embedding.weight" in state:
            state = {from_official(name): tensor for name, tensor in state.items()}
            config = transformers.UMT5Config(**_sizes(state, path))
        else:
            config = transformers.UMT5Config.from_dict(checkpoint.read_json(path.parent / "config.json"))
        with torch.device("meta"):
            model = transformers.UMT5EncoderModel(config)
        state = _encoder_half(state)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        checkpoint.check_shapes(state, expected, str(path), REMEDY)
        model.load_state_dict(state, assign=True)
        model.set_input_embeddings(model.encoder.embed_tokens)  # one module under both names, so one copy on the device
        return cls(model.to(device=device, dtype=dtype), tokenizer, text_len=text_len)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        ids = self.tokenizer(clean(prompt), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        if len(ids) > self.text_len:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the model reads {self.text_len}; shorten it by about "
                f"{100 * (len(ids) - self.text_len) / len(ids):.0f} %"
            )
        batch = torch.tensor([ids], device=self.model.device)
        return self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state[0]


class CachedTextEncoder:
    """Embeddings kept in `folder`, one file per prompt; the encoder behind is made on the first prompt not found.

    A file is named by the hash of encoder and cleaned prompt and written at once, so that processes may share a folder.
    A file that cannot be read is made again. Where nothing can be written a warning says so and the work goes on.
    """

    def __init__(
        self,
        factory: Callable[[], TextEncoder],
        folder: str | Path,
        *,
        identity: str,
        text_dim: int = ModelConfig.text_dim,
        text_len: int = ModelConfig.text_len,
    ) -> None:
        """identity: tells encoders apart that would embed a prompt differently (see `identity_of`)."""
        self.text_dim, self.text_len = text_dim, text_len
        self._factory, self._folder, self._identity = factory, Path(folder), identity
        self._encoder: TextEncoder | None = None

    @classmethod
    def umt5(
        cls,
        source: str | Path,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_dim: int = ModelConfig.text_dim,
        text_len: int = ModelConfig.text_len,
    ) -> CachedTextEncoder:
        """Cache `UMT5Encoder.from_pretrained(source)` in `folder` without loading it now."""

        def load() -> UMT5Encoder:
            return UMT5Encoder.from_pretrained(source, device=device, dtype=dtype, text_len=text_len)

        return cls(load, folder, identity=f"{identity_of(source)} {dtype}", text_dim=text_dim, text_len=text_len)

    def check(self, prompt: str) -> None:
        """Raise PromptError for an empty prompt, or one of so many words that it must be too long; loads nothing."""
        least = len(clean(prompt).split()) + 1  # a token a word, and one for the end
        if least > self.text_len:
            raise PromptError(
                f"the prompt has {least} tokens or more and the model reads {self.text_len}; shorten it by about "
                f"{100 * (least - self.text_len) / least:.0f} %"
            )

    def encode(self, prompt: str) -> Tensor:
        text = clean(prompt)
        path = self.path_of(text)
        found = self._read(path)
        if found is not None:
            return found
        if self._encoder is None:
            self._encoder = self._factory()
        made = self._encoder.encode(text).cpu()
        if made.shape[1] != self.text_dim:
            raise ConfigError(
                f"the text encoder gives rows of {made.shape[1]} and the model takes {self.text_dim}; "
                "choose the encoder of this model, or set ModelConfig.text_dim"
            )
        self._write(path, made)
        return made

    def path_of(self, text: str) -> Path:
        """Name the file of a cleaned prompt."""
        key = json.dumps([self._identity, text]).encode()
        return self._folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"

    def _read(self, path: Path) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            found = checkpoint.read_tensors(path).get("embedding")
        except CheckpointError:
            return None  # made again and overwritten by the caller
        if found is None or found.ndim != 2 or found.shape[1] != self.text_dim:
            return None
        return found if 0 < found.shape[0] <= self.text_len else None

    def _write(self, path: Path, embedding: Tensor) -> None:
        from safetensors.torch import save

        partial = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".partial", delete=False) as file:
                partial = Path(file.name)
                file.write(save({"embedding": embedding.contiguous()}))
            os.replace(partial, path)
        except OSError as error:
            if partial is not None:
                partial.unlink(missing_ok=True)
            warnings.warn(
                f"prompt embedding not cached in {self._folder} ({error}); set CFENGINE_CACHE_DIR to a writable folder",
                stacklevel=3,
            )


def identity_of(source: str | Path) -> str:
    """Describe an encoder's source without reading it: a hub id as it is, a path with its files' sizes and times."""
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    weights = _weights_in(path)
    files = [weights, *sorted(file for name in TOKENIZERS for file in (_root(weights) / name).glob("*token*"))]
    return json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"UMT5 needs transformers; {INSTALL}") from error
    return transformers


def _weights_in(found: Path) -> Path:
    if found.is_file():
        return found
    path = checkpoint.find(found, (OFFICIAL, "text_encoder/model", "model"))
    if path is None:
        wanted = (f"{OFFICIAL}.pth", "text_encoder/model.safetensors", "model.safetensors")
        raise checkpoint.nothing_found(found, wanted, WHAT)
    return path


def _root(weights: Path) -> Path:
    """Return the folder of a release that a weight file is in."""
    return weights.parent.parent if weights.parent.name == "text_encoder" else weights.parent


def _tokenizer(root: Path, transformers: Any) -> Any:
    places = [root / name for name in TOKENIZERS]
    folder = next(
        (place for place in places if any(place.glob("tokenizer*.json")) or any(place.glob("spiece.*"))), None
    )
    if folder is None:
        shown = ", ".join(str(place) for place in places)
        raise CheckpointError(f"no tokenizer of the text encoder in any of {shown}. {REMEDY}")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises what its parsers raise
        raise CheckpointError(f"the tokenizer in {folder} is not usable ({error}); fetch it again") from error


def _sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read UMT5 sizes off the shapes of a renamed official state dict."""
    layer = "encoder.block.0.layer"
    names = ("0.SelfAttention.relative_attention_bias", "0.SelfAttention.q", "1.DenseReluDense.wo")
    bias, q, wo = (state.get(f"{layer}.{name}.weight") for name in names)
    if bias is None or q is None or wo is None or not bias.ndim == q.ndim == wo.ndim == 2:
        raise CheckpointError(f"{path} lacks the attention and feed-forward weights of block 0. {REMEDY}")
    vocabulary, width = state[_TOP["token_embedding.weight"]].shape
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.block.")}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": q.shape[0] // bias.shape[1],
        "d_ff": wo.shape[1],
        "num_layers": len(layers),
        "num_heads": bias.shape[1],
        "relative_attention_num_buckets": bias.shape[0],
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }


def _encoder_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the decoder of a whole UMT5 and give the token table both of its names."""
    half = {name: tensor for name, tensor in state.items() if not name.startswith(("decoder.", "lm_head."))}
    for name, other in (
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ):
        if name not in half and other in half:
            half[name] = half[other]
    return half
