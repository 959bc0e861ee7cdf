"""The bench of the ring from end to end, briefly."""

import json

import pytest

from cfengine.bench import ring

pytestmark = [pytest.mark.embed, pytest.mark.slow]


def test_records(tmp_path, capfd):
    path = tmp_path / "records.json"
    assert ring.main(["--seconds", "0.2", "--width", "64", "--height", "48", "--json", str(path)]) == 0, (
        capfd.readouterr()
    )
    records = {entry["name"]: entry for entry in json.loads(path.read_text())}
    for way in ("tight", "paced"):
        low, high, highest = (records[f"ring_acquire_{way}_p{share}"] for share in ring.PERCENTILES)
        assert 0 < low["value"] <= high["value"] <= highest["value"] and low["unit"] == "us"
        assert low["config"]["acquires"] == {"tight": 20_000, "paced": 100}[way]
    assert records["ring_publish_nv12"]["value"] > 0 and records["ring_publish_rgba8"]["unit"] == "ms"


def test_a_size_that_cannot_be(capsys):
    assert ring.main(["--seconds", "0", "--fps", "16"]) == 1
    assert "both must be positive" in capsys.readouterr().err
