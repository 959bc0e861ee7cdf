"""Names of DiT tensors as various publishers save them, brought to the official Wan 2.1 names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cfengine.checkpoint import LISTED
from cfengine.errors import CheckpointError

VARIANTS = ("generator_ema", "generator", "model")  # preferred first
LONGLIVE_ALPHA = 256.0  # LongLive `configs/longlive_inference.yaml`: rank 256, alpha 256

_DIFFUSERS_TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
_DIFFUSERS_BLOCK = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_DIFFUSERS_FFN = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3"}
_LORA = re.compile(r"(?P<name>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")


def choose_variant(found: Mapping[str, Any], variant: str | None, where: str) -> Mapping[str, Any]:
    """Return the state dict inside a training checkpoint: `variant`, or the first of VARIANTS present (EMA first).

    A flat state dict is returned as it is. CheckpointError when `variant` is asked for and absent.
    """
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if variant is not None and variant not in nested:
        raise CheckpointError(
            f"{where} has no variant {variant!r}; it holds {', '.join(nested) or 'one set of weights without variants'}"
        )
    for key in (variant,) if variant else VARIANTS:
        if key in nested:
            return found[key]
    return found


def strip_prefixes(name: str) -> str:
    """Delete every `_fsdp_wrapped_module.` and one leading `model.`."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("model.")


def official_names(found: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename to the official layout; names that are in no known layout stay, for the shape check to report."""
    renamed: dict[str, Tensor] = {}
    diffusers = any(strip_prefixes(name).startswith("condition_embedder.") for name in found)
    for name, tensor in found.items():
        plain = strip_prefixes(name)
        new = from_diffusers(plain) if diffusers else plain
        if new in renamed:
            raise CheckpointError(f"{where} holds {new} twice, the second time as {name!r}; fetch the checkpoint again")
        renamed[new] = tensor
    return renamed


def from_diffusers(name: str) -> str:
    """Translate one name of `diffusers.WanTransformer3DModel` (norm2 there is norm3 here: it alone has weights)."""
    if name == "scale_shift_table":
        return "head.modulation"
    stem, _, kind = name.rpartition(".")
    if stem in _DIFFUSERS_TOP:
        return f"{_DIFFUSERS_TOP[stem]}.{kind}"
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if not match:
        return name
    block, rest = match.groups()
    if rest == "scale_shift_table":
        return f"{block}.modulation"
    stem = rest.rpartition(".")[0]
    if stem in _DIFFUSERS_FFN:
        return f"{block}.{_DIFFUSERS_FFN[stem]}.{kind}"
    attention, _, part = stem.partition(".")
    if attention in ("attn1", "attn2") and part in _DIFFUSERS_BLOCK:
        return f"{block}.{'self_attn' if attention == 'attn1' else 'cross_attn'}.{_DIFFUSERS_BLOCK[part]}.{kind}"
    return name


def merge_lora(
    state: Mapping[str, Tensor], lora: Mapping[str, Tensor], *, alpha: float = LONGLIVE_ALPHA, where: str = "LoRA"
) -> dict[str, Tensor]:
    """Return `state` with a PEFT adapter merged: W + alpha / rank * B A, summed in float32.

    lora: `[base_model.model.]NAME.lora_A[.adapter].weight` (rank, in) and `lora_B` (out, rank) for Linear NAME
    Merged tensors are float32, the others are passed on. One CheckpointError lists all that does not fit.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in lora.items():
        match = _LORA.fullmatch(strip_prefixes(strip_prefixes(name).removeprefix("base_model.model.")))
        if match:
            halves.setdefault(match["name"], {})[match["half"]] = tensor
        else:
            problems.append(f"{name} is no LoRA tensor")
    merged = dict(state)
    for name, pair in halves.items():
        weight = state.get(f"{name}.weight")
        if weight is None:
            problems.append(f"{name}.weight is not among the base weights")
            continue
        problem = _lora_problem(name, weight, pair)
        if problem:
            problems.append(problem)
            continue
        a, b = pair["A"].float(), pair["B"].float()
        merged[f"{name}.weight"] = torch.addmm(weight.float(), b, a, alpha=alpha / a.shape[0])
    if not halves:
        problems.append("no lora_A and lora_B pairs")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"{where} does not fit the base weights: {'; '.join(problems[:LISTED])}{more}; "
            "take both files from the same release"
        )
    return merged


def _lora_problem(name: str, weight: Tensor, pair: Mapping[str, Tensor]) -> str | None:
    if len(pair) != 2:
        return f"{name} has lora_{next(iter(pair))} without its other half"
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        return f"{name}: B {list(b.shape)} times A {list(a.shape)} does not give the weight's {list(weight.shape)}"
    return None
