"""What the header, the documents and the samples teach hosts about flags."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.cpu, pytest.mark.embed]


def test_no_example_skips_an_upload_for_a_frame_that_may_be_new() -> None:
    """CF_FRAME_REPEATED is also the writer's: a program that skipped the frame before has never seen that picture."""
    files = [ROOT / "csrc/client/include/cfengine_client.h", ROOT / "docs/embed.md", ROOT / "docs/hosts.md"]
    files += [path for path in (ROOT / "csrc/client/samples").rglob("*") if path.suffix in (".c", ".h", ".cs", ".gd")]
    assert [path.name for path in files if "flags & CF_FRAME_REPEATED" in path.read_text(encoding="utf-8")] == []
