"""What `cfengine export` does: load a model, write or check a folder of graphs, say what came of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cfengine.engine import Engine
from cfengine.errors import ConfigError
from cfengine.segments.manifest import PRECISIONS, Manifest

if TYPE_CHECKING:
    from cfengine.export.calibrate import Calibration
    from cfengine.export.check import Row


def onnx(
    model: str, out: Path, precision: str, sessions: str, size: tuple[int, int] | None, taehv: Path | None
) -> None:
    """Export a model's segments, embeddings and decoder to `out`."""
    from cfengine.export.folder import export

    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} cannot be exported; choose one of {', '.join(PRECISIONS)}")
    if sessions != "open" and not (sessions.isdigit() and int(sessions) > 0):
        raise ConfigError(f"sessions is {sessions!r}; give a number from 1, or 'open'")
    began = time.monotonic()
    with load(model, precision, size, taehv) as engine:
        manifest = export(
            engine.config,
            engine.model,
            out,
            codec=engine.codec,
            codec_source=str(taehv) if taehv else None,
            precision=precision,
            sessions="sessions" if sessions == "open" else int(sessions),
            progress=progress,
        )
    size_mb = sum(about["bytes"] for about in manifest.files.values()) / 1e6
    sys.stdout.write(
        f"{out}: {len(manifest.graphs)} graphs of {manifest.layers} layers in {manifest.precision}, "
        f"{size_mb:.1f} MB, {time.monotonic() - began:.1f} s\n"
    )


def check(folder: Path, model: str | None, taehv: Path | None) -> bool:
    """Compare a folder with the torch that it was made from, and print a table; True where all is within tolerance."""
    from cfengine.export.check import check as compare

    manifest = Manifest.load(folder)
    if manifest.codec == "taehv" and taehv is None and manifest.codec_source is None:
        raise ConfigError(f"{folder} decodes with TAEHV, whose weights are not part of a model; give --taehv FILE")
    name = model or manifest.model_name
    with load(name, manifest.precision, manifest.pixels, taehv or manifest.codec_source) as engine:
        rows = compare(manifest, engine.config, engine.model, engine.codec, say)
    show(rows, manifest)
    return all(row.passed for row in rows)


def tensorrt(folder: Path, target: str, precision: str, model: str | None, taehv: Path | None, device: str) -> None:
    """Build TensorRT plans of an export; fp8 and nvfp4 are calibrated first, unless that was done before."""
    from cfengine.export.build import build, check_request
    from cfengine.export.tensorrt_quantise import SCALED
    from cfengine.segments.tensorrt_plans import describe, place

    manifest = Manifest.load(folder)
    check_request(manifest, target, precision)
    calibration = calibrated(manifest, model, taehv, device) if precision in SCALED else None
    began = time.monotonic()
    built = build(folder, target=target, precision=precision, calibration=calibration, progress=progress)
    for plans in built:
        files = plans.files.values()
        sizes = [sum(file.bytes for file in files), sum(file.weight_bytes for file in files)]
        sizes.append(max(file.workspace_bytes for file in files))
        plan_mb, weight_mb, workspace_mb = (size / 1e6 for size in sizes)
        sys.stdout.write(
            f"{plans.folder / place(plans.capability)}: {len(files)} plans in {precision} for compute capability "
            f"{plans.capability}, {plan_mb:.1f} MB ({weight_mb:.1f} MB of weights), workspace {workspace_mb:.1f} MB\n"
        )
    for capability, why in describe(built[0].folder)["skipped"].items():
        sys.stdout.write(f"left out {capability}: {why}\n")
    sys.stdout.write(f"{built[0].library} {built[0].library_version}, {time.monotonic() - began:.1f} s\n")


def calibrated(manifest: Manifest, model: str | None, taehv: Path | None, device: str) -> Calibration:
    """The folder's calibration, made by streaming with the model where there is none."""
    from cfengine.export.calibrate import Calibration, calibrate

    found = Calibration.load(manifest.folder, manifest.model_hash)
    if found is None:
        name = model or manifest.model_name
        with load(name, manifest.precision, manifest.pixels, taehv or manifest.codec_source, device) as engine:
            manifest.check_model(engine.model, name)
            encode = engine.text.encode
            found = calibrate(engine.config, engine.model, encode, manifest.model_hash, progress=progress)
        found.save(manifest.folder)
    return found


def load(
    model: str, precision: str, size: tuple[int, int] | None, taehv: Path | str | None, device: str = "cpu"
) -> Engine:
    """The model in float32, or as it is run where that is bfloat16: the hash of its weights depends on it."""
    return Engine.from_pretrained(
        model, dtype="bfloat16" if precision == "bf16" else "float32", size=size, taehv=taehv, device=device
    )


def show(rows: list[Row], manifest: Manifest) -> None:
    """Print one line a comparison."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "relative error", "allowed", "", box=None, pad_edge=False)
    for row in rows:
        if row.error is None:
            table.add_row(row.what, "-", "-", "parsed, not run: ONNX Runtime has no bfloat16 product on the CPU")
        else:
            table.add_row(
                row.what, f"{row.error:.1e}", f"{row.tolerance:.0e}", "" if row.passed else "beyond tolerance"
            )
    Console().print(table)
    ran = [row for row in rows if row.error is not None]
    failed = sum(not row.passed for row in ran)
    verdict = f"{failed} of {len(ran)} beyond tolerance" if failed else f"all {len(ran)} within tolerance"
    if not ran:
        verdict = f"{len(rows)} graphs parsed, nothing compared"
    sys.stdout.write(f"{manifest.folder} ({manifest.model_name}, {manifest.precision}): {verdict}\n")


def progress(what: str, done: int, total: int) -> None:
    """One line a step on standard error."""
    say(f"{done}/{total} {what}")


def say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()
