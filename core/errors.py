"""The error that the command line shows as one line."""

__all__ = ["UsageError"]


class UsageError(ValueError):
    """Something a user typed or pointed at is wrong: the message says what, what is allowed, and what to do.

    The command line prints the message alone and exits with code 2.
    """
