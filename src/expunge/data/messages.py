"""Rows as chat data sets have them: a list of messages, each with its role and content."""

from expunge.errors import DataError

COLUMN = "messages"
_TURNS = ("user", "assistant")


def asked_and_answered(messages: object, where: str) -> tuple[str, str]:
    """What the user asks and the assistant answers, in a conversation of these two messages.

    A longer one, or one with a system message, is a `DataError`: neither can be told by a prompt.
    """
    roles = [_told(message, "role", where) for message in _list(messages, where)]
    if tuple(roles) != _TURNS:
        found = ", ".join(roles[:6]) or "none"
        raise DataError(
            f"{where}: '{COLUMN}' must be one message of the user and the assistant's answer. "
            f"Found: {found}. Make an item of each question, and leave system messages out"
        )
    asked, answered = (_told(message, "content", where) for message in _list(messages, where))
    return asked, answered


def _list(messages: object, where: str) -> list[object]:
    if not isinstance(messages, list):
        raise DataError(f"{where}: '{COLUMN}' must be a list, but is {type(messages).__name__}")
    return messages


def _told(message: object, name: str, where: str) -> str:
    value = message.get(name) if isinstance(message, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a message of '{COLUMN}' lacks its {name}, a text")
    return value
