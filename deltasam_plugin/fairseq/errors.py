"""Errors that end fairseq-train and fairseq-hydra-train with one message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException


class _OneMessage(CompactHydraException, SystemExit):
    """Python prints the ``code`` of an uncaught SystemExit. Hydra prints the message of a CompactHydraException.

    Everybody else can catch it as an ordinary exception.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = f"deltasam_plugin: error: {message}"  # the exit status is 1 then


class InvalidValue(_OneMessage, ValueError):
    """A value that breaks its rule."""


class Unsupported(_OneMessage, RuntimeError):
    """Something that δ-SAM cannot train."""


@contextmanager
def one_message(kinds: tuple[type[Exception], ...] = (ValueError, RuntimeError)) -> Iterator[None]:
    """An error within this context ends the run with one message.

    Args:
        kinds: of errors; by default those that code of ours raises.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, ValueError):
            raise InvalidValue(str(error)) from error
        raise Unsupported(str(error)) from error
