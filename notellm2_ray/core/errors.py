"""Errors for the user. Each message says what is wrong, where, and what to do about it."""


class NoteLLMError(Exception):
    """Base of all errors that a user's input or environment can cause.

    The command line prints the message without a traceback.
    """


class ConfigError(NoteLLMError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(NoteLLMError):
    """A table, an image or an event log cannot be used as it is."""


class ModelError(NoteLLMError):
    """A model directory or checkpoint is missing, incomplete, or of the wrong kind."""


class OutputError(NoteLLMError):
    """An output directory cannot be written, or holds files of another program."""


class MissingOutputError(OutputError):
    """An output that a step reads is not finished.

    Attributes:
        directory: where it should be, a path.
    """

    def __init__(self, message: str, directory: object) -> None:
        super().__init__(message)
        self.directory = directory


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
