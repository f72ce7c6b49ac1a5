"""Every error Voxgate raises on purpose.

    VoxgateError
    ├── InputError            what arrived cannot be used; the sender can repair it
    │   ├── AudioError        bytes that are no audio, or audio that is broken
    │   ├── RequestError      a request that contradicts itself or asks for what is not served
    │   └── ManifestError     a manifest line that cannot be read
    ├── BundleError           a model folder that is missing, altered or does not fit
    ├── ProviderError         the execution provider that was asked for is not there
    ├── ServerError           the server cannot start, or does not answer
    ├── OverloadError         the server has no room for more work
    ├── IdleError             a stream that sends nothing
    ├── NotFoundError         an operation that is not there
    ├── PermissionDeniedError a request that its sender may not make
    ├── MissingExtraError     a command whose optional packages are not installed
    ├── TrainingError         settings or data that cannot be trained on
    └── ExportError           a checkpoint that cannot become a bundle

A message says what arrived, what was expected, and the fix.
"""

from __future__ import annotations


class VoxgateError(Exception):
    """Base of all errors raised on purpose; its message is meant for the user."""


class InputError(VoxgateError):
    """What arrived cannot be used; the sender can repair it."""


class AudioError(InputError):
    """Bytes that are no audio, or audio that is broken."""


class RequestError(InputError):
    """A request that contradicts itself or asks for what is not served."""


class ManifestError(InputError):
    """A manifest that cannot be read."""


class BundleError(VoxgateError):
    """A model folder that is missing, altered or does not fit this version."""


class ProviderError(VoxgateError):
    """The execution provider that was asked for is not there."""


class ServerError(VoxgateError):
    """The server cannot start, or does not answer."""


class OverloadError(VoxgateError):
    """The server has no room for more work."""

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s
        """When it is worth trying again, seconds from now."""


class IdleError(VoxgateError):
    """A stream that sends nothing."""


class NotFoundError(VoxgateError):
    """An operation that is not there."""


class PermissionDeniedError(VoxgateError):
    """A request that its sender may not make."""


class MissingExtraError(VoxgateError):
    """A command whose optional packages or programs are not installed."""


class TrainingError(VoxgateError):
    """Settings or data that cannot be trained on."""


class ExportError(VoxgateError):
    """A checkpoint that cannot become a bundle."""
