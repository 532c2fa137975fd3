"""Errors meant for the user: each says what is wrong, where, and what to do about it."""


class NoteLLMError(Exception):
    """Base of all errors that a user's input or set-up can cause.

    The command line prints the message alone, without a traceback.
    """


class ConfigError(NoteLLMError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(NoteLLMError):
    """A source table, image or event log cannot be used as it is."""


class ModelError(NoteLLMError):
    """A model directory or checkpoint is missing, incomplete or of another kind."""


class OutputError(NoteLLMError):
    """An output directory cannot be written, or holds something else."""
