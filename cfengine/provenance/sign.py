"""The signed record in a finished file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from cfengine.errors import ProvenanceError
from cfengine.provenance.keys import own_identity
from cfengine.provenance.record import Record

# Nothing here ever speaks to the net, and no picture of the video is put into its record.
SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
    "builder": {"thumbnail": {"enabled": False}},
}


def library() -> ModuleType:
    """The C2PA library; ProvenanceError where it, or what it is used with, is not installed or does not load."""
    try:
        import c2pa
        import cryptography  # noqa: F401  what it lacks is told here, and not in the middle of a file
    except ImportError as error:
        raise ProvenanceError(
            f"{error.name or 'c2pa'} is not installed; pip install c2pa-python cryptography"
        ) from error
    except Exception as error:  # a native part for another system raises what it likes
        raise ProvenanceError(f"c2pa does not load ({error}); pip install --force-reinstall c2pa-python") from error
    return c2pa


def sign(path: Path, record: Record) -> None:
    """Put a signed C2PA record into the video file at `path`: a few KB, and no frame is touched.

    The file is replaced as a whole or stays as it was.      ProvenanceError: it stayed as it was; says why
    """
    c2pa, path, fresh = library(), path.absolute(), None
    try:
        identity = own_identity()
        handle, fresh = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        # None: no authority stamps the time, since that needs the net
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(identity.algorithm, identity.chain, identity.key, None))
        with c2pa.Context(c2pa.Settings.from_dict(SETTINGS)) as context:
            c2pa.Builder(json.dumps(record.manifest()), context=context).sign_file(path, fresh, signer)
        shutil.copymode(path, fresh)
        os.replace(fresh, path)
    except Exception as error:  # the library's own, the system's, what a key that is odd makes of both: the video stays
        raise ProvenanceError(str(error)) from error
    finally:
        if fresh is not None:
            with suppress(FileNotFoundError):
                os.unlink(fresh)
