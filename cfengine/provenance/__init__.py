"""Provenance of video files: a signed C2PA record that says a file is synthetic, and the check of such records."""

from cfengine.provenance.record import SYNTHETIC, Record
from cfengine.provenance.sign import sign
from cfengine.provenance.verify import Report, verify

__all__ = ["SYNTHETIC", "Record", "Report", "sign", "verify"]
