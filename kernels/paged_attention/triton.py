"""Attention over pages on a GPU, in Triton.

One program holds a tile of queries of one head and walks the slots of the table; page ids, positions and the number of
slots in use are read on the device, so one captured launch serves every state of a memory. Per page the query tile is
turned once by t_q - t_k (a table of sines, filled by a small kernel before: angles are float64, so positions may grow
without end), and that turn serves all key tiles of the page. Softmax is online, in base 2, sums in float32.

The last keys of a page that fill no whole tile of 64 get a narrower one: 1,560 keys are 24 tiles of 64 and one of 32.
Tiles of queries may span two latent frames, every row turns by its own frame.

Pages in e4m3 are multiplied as they are where the device has such products: the turned query is rounded to e4m3 with
one scale a row, sqrt(2) wider than its largest number, since a turn may bring two channels into one; weights are
rounded 2^8 larger, so that a weight of 2^-14 of the largest still has its 3 bits. Elsewhere pages become float16,
exactly, by a shift of bits. Sums of values are kept in units of the scale of the page at hand.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from ..operands import GPU_FLOATS
from ..quantise_rows.triton import converts, e4m3
from ..rope import axis_frequencies, axis_pairs
from .operands import check_attention

LEAST = 16  # smallest side of a product on the tensor cores; 32 along the sum in e4m3
SAME, HALF, FP8 = (tl.constexpr(i) for i in range(3))  # what is multiplied: pages as q, e4m3 as float16, e4m3 as it is


@triton.jit
def _fill_turns(positions, q_positions, rates, turns, frames, PAIRS: tl.constexpr):
    """turns[slot, frame] = cosine, sine of (q_positions[frame] - positions[slot]) * rates, (2, PAIRS) float32."""
    slot, frame = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    step = (tl.load(q_positions + frame) - tl.load(positions + slot)).to(tl.float64)
    whole = step * tl.load(rates + pair) * 0.15915494309189535
    angle = ((whole - tl.floor(whole)) * 6.283185307179586).to(tl.float32)
    place = turns + (slot * frames + frame) * 2 * PAIRS + pair
    tl.store(place, tl.cos(angle))
    tl.store(place + PAIRS, tl.sin(angle))


@triton.jit
def _half(bits):
    """e4m3 from its bits as float16, 2^8 smaller: the exponent of float16 counts from 8 lower."""
    wide = bits.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _tile(
    query, k, v, start, page_tokens, channel, k_token, v_token, v_channel, top, total, sums, scale,
    HEAD: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, MODE: tl.constexpr, HARDWARE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys start .. start + N; EXACT: all of them exist; scale: of a score."""
    key = start + tl.arange(0, N)
    k_place = k + key[None, :] * k_token + channel[:, None]
    v_place = v + key[:, None] * v_token + channel[None, :] * v_channel
    inside, exists = channel < HEAD, key < page_tokens
    if EXACT:
        keys = tl.load(k_place, mask=inside[:, None], other=0.0)
    else:
        keys = tl.load(k_place, mask=inside[:, None] & exists[None, :], other=0.0)
    if MODE == HALF:
        keys = _half(keys)
    score = tl.dot(query, keys, input_precision=PRECISION) * scale
    if not EXACT:
        score = tl.where(exists[None, :], score, float("-inf"))
    peak = tl.maximum(top, tl.max(score, 1) - (8 if MODE == FP8 else 0))
    weight = tl.exp2(score - peak[:, None])
    fade = tl.exp2(top - peak)
    if EXACT:
        values = tl.load(v_place, mask=inside[None, :], other=0.0)
    else:
        values = tl.load(v_place, mask=inside[None, :] & exists[:, None], other=0.0)
    if MODE == HALF:
        values = _half(values)
    if MODE == FP8:
        rounded = e4m3(weight, HARDWARE).to(tl.float8e4nv, bitcast=True)
    else:
        rounded = weight.to(values.dtype)
    # Hopper adds e4m3 products with some 14 bits: never for longer than a tile
    sums = tl.dot(rounded, values, sums * fade[:, None], input_precision=PRECISION, max_num_imprecise_acc=N)
    return peak, total * fade + tl.sum(weight, 1), sums


@triton.jit
def _attend(
    q, k_pages, v_pages, k_scale, v_scale, page_ids, count, turns, out, tokens, frames, page_tokens, scale,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, v_channel, out_token, out_head,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, REST: tl.constexpr,
    MODE: tl.constexpr, HARDWARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(turned q . k / sqrt(HEAD)) v of a tile of M queries and one head; scale carries log2(e) too."""
    head = tl.program_id(1)
    row, channel = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    PAIRS: tl.constexpr = WIDTH // 2
    pair = tl.arange(0, PAIRS)
    mask = (row < tokens)[:, None] & (channel < HEAD)[None, :]
    place = q + row[:, None] * q_token + head * q_head + channel[None, :]
    frame = tl.minimum(row // (tokens // frames), frames - 1)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, WIDTH), tl.float32)
    used = tl.load(count)
    full = page_tokens // N * N
    unit = 1.0  # of sums: the scale of the page that was added last
    if MODE == FP8:
        largest = tl.max(tl.abs(tl.load(place, mask=mask, other=0.0).to(tl.float32)), 1)
        span = tl.maximum(largest, 1e-12) * (1.4142136 / 448.0)  # one e4m3 unit of a turned query
    for slot in range(0, used):
        # loaded again for every page, from the L2 cache: kept in registers it would push the sums out of them
        query = tl.load(place, mask=mask, other=0.0, volatile=True)
        even, odd = tl.split(tl.reshape(query.to(tl.float32), (M, PAIRS, 2)))
        turn = turns + ((slot * frames + frame) * 2 * PAIRS)[:, None] + pair[None, :]
        cosine, sine = tl.load(turn), tl.load(turn + PAIRS)
        turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (M, WIDTH))
        page = tl.load(page_ids + slot).to(tl.int64)
        score_scale = scale
        if MODE == SAME:
            turned = turned.to(q.dtype.element_ty)
        else:
            own = page * tl.num_programs(1) + head
            score_scale = scale * tl.load(k_scale + own)
            new = tl.maximum(tl.load(v_scale + own), 1e-20)  # a page of zeros may come with a scale of 0
            sums = sums * (unit / new)
            unit = new
        if MODE == HALF:
            turned = turned.to(tl.float16)
            score_scale = score_scale * 256.0
        if MODE == FP8:
            turned = e4m3(turned * (1.0 / span)[:, None], HARDWARE).to(tl.float8e4nv, bitcast=True)
            score_scale = (score_scale * span)[:, None]
        k = k_pages + page * k_page + head * k_head
        v = v_pages + page * v_page + head * v_head
        for start in range(0, full, N):
            top, total, sums = _tile(
                turned, k, v, start, page_tokens, channel, k_token, v_token, v_channel, top, total, sums, score_scale,
                HEAD, N, True, MODE, HARDWARE, PRECISION,
            )  # fmt: skip
        if REST:
            top, total, sums = _tile(
                turned, k, v, full, page_tokens, channel, k_token, v_token, v_channel, top, total, sums, score_scale,
                HEAD, REST, False, MODE, HARDWARE, PRECISION,
            )  # fmt: skip
    if MODE == HALF:
        unit = unit * 256.0
    result = (sums * (unit / total)[:, None]).to(q.dtype.element_ty)
    tl.store(out + row[:, None] * out_token + head * out_head + channel[None, :], result, mask=mask)


def tiles(width: int, exact: bool) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps, for a padded head size; exact: float32.

    Chosen by the compiler's report (tests/kernels/test_triton_code.py), not by a clock: at a head size of 128, 64
    keys spill registers on every target, and 64 queries or 16 warps spill more on 8.0 and 12.0.
    """
    if exact:
        return 64, 32, 4
    return (128, 64, 8) if width <= 64 else (128, 32, 8)


@cache  # kept: a captured graph holds the address
def _rates(head_dim: int, width: int, theta: float, device: torch.device) -> torch.Tensor:
    """(width / 2,) float64 turning rates of all pairs of a head; zero where a pair is not temporal."""
    rates = torch.zeros(width // 2, dtype=torch.float64)
    pairs = axis_pairs(head_dim)[0]
    rates[:pairs] = axis_frequencies(pairs, theta)
    return rates.to(device)


def paged_attention(
    q, k_pages, v_pages, page_ids, positions, count, q_positions, *, theta: float = 10000.0, k_scale=None, v_scale=None,
    wide: bool = False,
):  # fmt: skip
    """See `reference.paged_attention`. float32, bfloat16 or float16; any even head_dim up to 256.

    e4m3 pages are multiplied in e4m3 from compute capability 8.9 on, in float16 before, or where `wide` asks for it.
    """
    table = (page_ids, positions, count, q_positions)
    device = q.device
    check_attention(
        q, k_pages, v_pages, *table, dtypes=GPU_FLOATS, device=device.type, k_scale=k_scale, v_scale=v_scale
    )
    mode, exact = SAME.value, q.dtype == torch.float32
    if k_scale is None:
        k_scale = v_scale = count  # an unread pointer
    elif not wide and (converts(device) or device.type == "cpu"):  # the interpreter multiplies e4m3 too
        mode = FP8.value
    else:
        mode, k_pages, v_pages = HALF.value, k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    tokens, heads, head_dim = q.shape
    page_tokens, frames, slots = k_pages.shape[1], q_positions.shape[0], page_ids.shape[0]
    least = 2 * LEAST if mode == FP8.value else LEAST
    width = max(least, triton.next_power_of_2(head_dim))
    m, n, warps = tiles(width, exact)
    rest = page_tokens % n and max(least, triton.next_power_of_2(page_tokens % n))
    turns = torch.empty((slots, frames, 2, width // 2), dtype=torch.float32, device=device)
    _fill_turns[slots, frames](
        positions, q_positions, _rates(head_dim, width, theta, device), turns, frames, PAIRS=width // 2, num_warps=1
    )
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=device)
    _attend[triton.cdiv(tokens, m), heads](
        q, k_pages, v_pages, k_scale, v_scale, page_ids, count, turns, out, tokens, frames, page_tokens,
        math.log2(math.e) / math.sqrt(head_dim), *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride(),
        *out.stride()[:2], HEAD=head_dim, WIDTH=width, M=m, N=n, REST=rest, MODE=mode, HARDWARE=converts(device),
        PRECISION="ieee" if exact else "tf32", num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out
