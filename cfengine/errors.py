"""Errors that a user can act on: each message names the thing, what was found, what was expected, and the remedy."""


class CFEngineError(Exception):
    """Base of every error that cfengine raises on purpose; the command line prints it as one sentence.

    event_id: of the event of `Session.push` that it is about, which is dropped while the session goes on; None where it
    is about none
    """

    event_id: int | None = None


class ConfigError(CFEngineError):
    """A size, preset, policy or option that cannot work."""


class PromptError(CFEngineError):
    """A prompt that is empty or longer than the text encoder takes."""


class CheckpointError(CFEngineError):
    """A weight file that is missing, corrupt, or whose keys or shapes do not fit the model."""


class OutputError(CFEngineError):
    """A place that cannot be written to."""


class ProvenanceError(CFEngineError):
    """A record of where a file comes from that cannot be made, or a key that cannot sign it."""


class KernelError(CFEngineError):
    """An implementation that is not built, or operands that it cannot take."""


class DeviceError(CFEngineError):
    """A GPU that is too old, too full, without a driver that serves it, or lost."""


class CapacityError(CFEngineError):
    """A session too many for the pages that an engine set aside; in bytes: needed, free, budget."""

    def __init__(self, message: str, *, needed: int = 0, free: int = 0, budget: int = 0) -> None:
        super().__init__(message)
        self.needed, self.free, self.budget = needed, free, budget


class FaultError(CFEngineError):
    """Work on a chunk that failed in one session, which is closed; others go on.

    part: "decode", "latents" or "recache"
    """

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class SnapshotError(CFEngineError):
    """A snapshot that is damaged, of another format, or made by another model or configuration."""


class RingError(CFEngineError):
    """A frame ring that cannot be made, found or used; `result` names the code of the C interface, if it has one."""

    def __init__(self, message: str, result: str = "") -> None:
        super().__init__(message)
        self.result = result


class ExportError(CFEngineError):
    """A graph or an engine that cannot be made, is damaged, or was made for another model, version or GPU."""
