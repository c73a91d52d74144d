"""What goes wrong with the facts. Each class says when it is raised and whether a retry can help.

RegistryError
├── BudgetExhausted       a request could cost more than a hard budget has left
├── InvalidTransition     the object has moved on
├── InvalidInput          a field cannot be used; names it
├── JoinRefused           a node may not join
├── NotAllowed            this person may not do that
└── StillInUse            something that runs depends on it
"""

from __future__ import annotations


class RegistryError(Exception):
    """Base of all; its message is a sentence for people."""


class BudgetExhausted(RegistryError):
    """A request could cost more than a hard budget has left; names the budget and when it begins anew.

    A retry helps then, or, where only running requests have set the rest aside, when these have ended.
    """

    def __init__(self, message: str, *, retry_after: float | None, passing: bool) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds; None: it never begins anew."""
        self.passing = passing
        """Only running requests stand in the way."""


class InvalidTransition(RegistryError):
    """The object is not in a state from which it may move there. Read it again before trying again."""


class InvalidInput(RegistryError):
    """A field has a value that cannot be used. Retrying with the same value cannot help."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class JoinRefused(RegistryError):
    """The join token is unknown, used up or expired, or the node's name is taken. A new token helps."""


class NotAllowed(RegistryError):
    """This person's role does not allow it. Another role helps, trying again does not."""


class StillInUse(RegistryError):
    """The object still has live workers. Scale to 0 first, then try again."""
