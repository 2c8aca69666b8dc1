"""What layerprune says when it refuses: one sentence, with the value given, what is allowed, what to try."""

from __future__ import annotations


class LayerpruneError(Exception):
    """Something that the user can mend. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(LayerpruneError):
    """The arguments contradict each other or the model: exit code 2."""

    exit_code = 2


class Refused(LayerpruneError):
    """The input cannot be used, or the result would be wrong: exit code 1."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C where the work could still be saved; the message says where it goes on. The command line exits with `exit_code`."""

    exit_code = 130


def model_errors() -> tuple[type[Exception], ...]:
    """What transformers and model code raise when a config asks for something that they were not written for."""
    import huggingface_hub.errors as hub
    from safetensors import SafetensorError

    strict = getattr(hub, "StrictDataclassError", ValueError)  # older clients do not check configs
    plain = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ImportError, OSError)
    return (*plain, SafetensorError, strict)


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises when a connection fails: OSError, and the root error of its HTTP library.

    That library is httpx or one of its successors; the client's own errors derive from its root error.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
