"""Conversations as rows of a corpus, checked and brought into one form.

Two forms are read: ``{"messages": [{"role", "content"}, ...]}`` and that of ShareGPT,
``{"conversations": [{"from", "value"}, ...]}``.
"""

from __future__ import annotations

from typing import Any

from rankadaptor_plugin.core.errors import CorpusError
from rankadaptor_plugin.core.registry import suggestion

Message = dict[str, str]
"""``role``, one of system, user and assistant, and ``content``."""

_FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def messages_of(row: dict[str, Any], where: str) -> list[Message] | None:
    """Returns the turns of a conversation, or None if a row is none.

    Args:
        row: A row of the corpus.
        where: File and row, for messages.

    Raises:
        CorpusError: If a turn has no text or an unknown role, or if the user does not begin.
    """
    form = next((name for name in _FORMS if isinstance(row.get(name), list)), None)
    if form is None:
        return None
    role_key, text_key = _FORMS[form]
    messages: list[Message] = []
    for number, turn in enumerate(row[form], start=1):
        role, text = (
            (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(text, str):
            raise CorpusError(
                f"{where}, turn {number} is {repr(turn)[:60]}; a turn of {form} needs the texts "
                f"{role_key} and {text_key}. Correct the row."
            )
        if role not in _ROLES:
            raise CorpusError(
                f"{where}, turn {number} has the role {role!r}.{suggestion(role, list(_ROLES))} "
                f"Allowed: {', '.join(_ROLES)}. Correct the row."
            )
        messages.append({"role": _ROLES[role], "content": text})
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles[:1] != ["user"] or "system" in roles:
        raise CorpusError(
            f"{where} has the roles {', '.join(m['role'] for m in messages) or 'of no turn'}; a "
            "conversation is begun by the user, after one system turn at most. Correct the row."
        )
    return messages
