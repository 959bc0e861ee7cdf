"""A stream costs the same at its end as at its beginning."""

from __future__ import annotations

import time

import pytest

from cfengine.bench import length
from cfengine.errors import CFEngineError, ConfigError

pytestmark = pytest.mark.cpu

FRAMES = 900  # latent frames: 300 chunks, so that chunks 50 to 150 and the last 100 do not meet


def test_length_costs_nothing():
    result = length.stream(FRAMES, clock=time.process_time)
    assert len(result.chunk_seconds) == FRAMES // 3
    assert result.pool_bytes[0] == result.pool_bytes[1] > 0
    length.check(result)
    names = {entry["name"]: entry for entry in length.records(result)}
    assert set(names) == {"length_chunk_time_ratio", "length_rss_growth_mib"}
    assert names["length_chunk_time_ratio"]["value"] == pytest.approx(result.late / result.early)
    assert names["length_chunk_time_ratio"]["config"]["latent_frames"] == FRAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_seconds": [0.01] * 200 + [0.016] * 100}, "1.60 times"),
        ({"pool_bytes": (1000, 1012)}, "from 1000 to 1012"),
        ({"rss_bytes": (0, 5 * 2**20)}, "5.0 MiB"),
    ],
    ids=["time", "pool", "rss"],
)
def test_growth_is_refused(change, message):
    steady = {"chunk_seconds": [0.01] * 300, "pool_bytes": (1000, 1000), "rss_bytes": (2**20, 2**20)}
    length.check(length.LengthResult(**steady))
    with pytest.raises(CFEngineError, match=message):
        length.check(length.LengthResult(**(steady | change)))


def test_too_short_a_stream_is_refused():
    with pytest.raises(ConfigError, match="30 latent frames are 10 chunks.*at least 750"):
        length.stream(30)
