"""What a context shows: the renderer's geometry says which columns of the world stand in the pages of a chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cfengine.training.data import COLUMNS, VIEW
from cfengine.training.forward import Context, Pages

LAYER = 3  # whose pages are asked; each layer chooses its own, nearly the same


class Columns(NamedTuple):
    """What chunks show, (B, C, c, VIEW) each.

    column: of the world
    entering: 1 where the chunk before did not show it; 0 in a first chunk
    returning: of those, 1 where a chunk before that did
    """

    column: Tensor
    entering: Tensor
    returning: Tensor


def seen_columns(yaws: Tensor) -> Columns:
    """Of views at yaws (B, C, c) in columns."""
    columns = (yaws[..., None] + torch.arange(VIEW, device=yaws.device)) % COLUMNS
    shown = torch.zeros(*yaws.shape[:2], COLUMNS, device=yaws.device).scatter_(-1, columns.flatten(2), 1.0)
    before = shown.roll(1, 1)
    before[:, 0] = 0
    ever = before.cumsum(1).clamp(max=1)
    entering, returning = (
        part.gather(-1, columns.flatten(2)).view(columns.shape) for part in (1 - before, ever - before)
    )
    entering[:, 0] = 0
    return Columns(columns, entering, returning)


def shown_columns(columns: Tensor, pages: Pages, first: int = 0) -> Tensor:
    """1 where a column of a chunk stands in a page that the chunk sees: (B, chunks of `pages`, c, VIEW).

    columns: (B, C, c, VIEW) of the whole sequence, of which `pages` may be those of chunks from `first` on
    """
    B, C, slots = pages.ids.shape
    width = columns.shape[-1]
    if not slots:
        return torch.zeros_like(columns[:, first : first + C], dtype=torch.float32)
    seen = columns.reshape(-1, width)[pages.ids]  # (B, C, slots, VIEW)
    there = ~pages.hidden.view(B, C, slots, -1)[..., :1].expand(-1, -1, -1, width)
    shown = torch.zeros(B, C, COLUMNS, device=columns.device)
    shown = shown.scatter_reduce(-1, seen.flatten(2), there.flatten(2).to(shown), "amax")
    own = columns[:, first : first + C]
    return shown.gather(-1, own.flatten(2)).view(own.shape)


def shown_in(context: Context, yaws: Tensor | None, first: int = 0) -> Tensor | None:
    """(B, chunks, c, VIEW): 1 where `context`, that of chunks from `first` on, shows a column of them already.

    yaws: (B, C, c) of the whole sequence; None: nobody knows
    """
    if yaws is None:
        return None
    return shown_columns(seen_columns(yaws).column, context.layers[LAYER % len(context.layers)], first)
