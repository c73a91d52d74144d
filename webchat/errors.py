"""What the chat refuses. Each message is a sentence for the person who asked.

ChatError
├── NotThere      no such conversation or message, or it is somebody else's: which of them is not told
├── BadInput      a field cannot be used; names it
└── NotNow        it can be done, but not in this moment
"""

from __future__ import annotations


class ChatError(Exception):
    """Base of all."""

    status = 400


class NotThere(ChatError):
    """No such object of this person's. Trying again cannot help."""

    status = 404

    def __init__(self, what: str = "conversation") -> None:
        super().__init__(f"There is no such {what}.")


class BadInput(ChatError):
    """A field has a value that cannot be used; the same one again is refused again."""


class NotNow(ChatError):
    """Something else must end first."""

    status = 409
