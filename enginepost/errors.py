"""The one exception that users see: the command line prints its message without a traceback."""


class EnginepostError(Exception):
    """A user-facing error. The message says what was wrong, where, what was expected and what to do."""
