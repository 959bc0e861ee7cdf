"""The verify command: what a file says of its making, and whether that holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cfengine.provenance import Report, verify

_COLOURS = {"verified": "green", "absent": "yellow"}  # whatever else is red
_SAYS = {
    True: "synthetic, made by a model or with one",
    False: "a source that is no trained model",
    None: "nothing of how it was made",
}
_TRUST = {
    "own key": "the key of this user",
    "anchors": "vouched for by the certificates given",
    "": "nobody known here vouches for that name",
}


def run(file: Path, as_json: bool, trust: Path | None) -> int:
    """Print the findings; return 0 for a record that holds and 1 for one that does not, or none."""
    import typer

    report = verify(file, anchors=trust)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(report), "verified": report.verified}, indent=2))
    else:
        typer.secho(f"{report.path}: {report.state}: {report.sentence}", fg=_COLOURS.get(report.state, "red"))
        for name, text in lines(report):
            typer.echo(f"  {name:<14} {text}")
    return 0 if report.verified else 1


def lines(report: Report) -> list[tuple[str, str]]:
    """What the record says, a name and a text each; nothing where there is none to read."""
    if not (report.signer or report.generator):
        return []
    kind = f" ({report.source_type})" if report.source_type else ""
    found = [
        ("says", _SAYS[report.synthetic] + kind + ("" if report.verified else ", which cannot be relied on")),
        ("content", "matches" if report.content_matches else "differs from what was signed"),
        ("signature", "valid" if report.signature_valid else "not valid"),
        ("signer", f"{report.signer or 'unknown'}; {_TRUST[report.trust]}"),
        ("generator", report.generator),
        ("time", report.when and f"{report.when}, by the clock of its maker"),
        *((name, str(value)) for name, value in report.told.items()),
    ]
    return [(name, _printable(text)) for name, text in found if text]


def _printable(text: str) -> str:
    """Text of a stranger's file without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
