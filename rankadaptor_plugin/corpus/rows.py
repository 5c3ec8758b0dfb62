"""The rows of a recovery corpus: read from a file or the hub, checked, and how they read as text.

A file is told apart by its name and content: JSON or JSONL rows in Alpaca format (``instruction``,
``input``, ``output``), conversations (``{"messages": [{"role", "content"}, ...]}``, or ShareGPT's
``{"conversations": [{"from", "value"}, ...]}``), rows with ``text``, and plain text files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rankadaptor_plugin.core.errors import ConfigError, CorpusError
from rankadaptor_plugin.core.hub import hub_problem
from rankadaptor_plugin.core.registry import suggestion

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ALPACA = {
    True: (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    False: (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    ),
}
"""The prompts of Stanford Alpaca, with and without an input, as LLM-Pruner uses them."""

_SETTINGS = {
    "corpus": "[corpus] path",
    "calibration text": "[prune] calibration",
    "held-out text": "[oracle] text",
}

Message = dict[str, str]
"""``role``, one of system, user and assistant, and ``content``."""

_CHAT_FORMATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def hub_rows(name: str, limit: int = 0) -> list[dict[str, Any]]:
    """Downloads a dataset of the hub, or takes it from its cache, and returns its split ``train``.

    Args:
        name: Such as ``yahma/alpaca-cleaned``.
        limit: The first rows only; 0 takes all.

    Returns:
        As of `read_rows`.

    Raises:
        CorpusError: If it cannot be had, or a row is malformed.
    """
    import datasets  # takes a second, needed only where the hub is named

    try:
        split = datasets.load_dataset(name, split="train")
        rows = split.select(range(min(limit or len(split), len(split)))).to_list()
    except Exception as error:
        # The Hub, its client, the network and the format of the data each have errors of their own.
        raise CorpusError(f"[corpus] path: {hub_problem('dataset', name, error)}") from error
    return checked_rows(rows, name)


def check_readable(path: Path, what: str = "corpus") -> None:
    """Checks that a file that `read_rows` is to read can be opened.

    Raises:
        ConfigError: If not.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, what, error) from error


def read_rows(path: Path, what: str = "corpus") -> list[dict[str, Any]]:
    """Reads the rows of a corpus file, or of the ``"calibration text"`` or ``"held-out text"``.

    Returns:
        Dictionaries with either ``text``, or ``instruction``, ``input`` and ``output``, or
        ``messages``, a list of dictionaries with ``role`` and ``content``.

    Raises:
        ConfigError: If the file is missing.
        CorpusError: If it is malformed.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, what, error) from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"The {what} {path} is not UTF-8 text: {error}. Convert it.") from error
    if not content.strip():
        raise CorpusError(f"The {what} {path} is empty. Give a file with at least one row.")
    if path.suffix.lower() == ".json":
        rows = _parse(content, path, what, line=None)
        if not isinstance(rows, list):
            raise CorpusError(f"The {what} {path} is not a JSON list of rows. Wrap it in [ ].")
        return checked_rows(rows, str(path))
    if path.suffix.lower() == ".jsonl":
        return [
            _row(_parse(line, path, what, line=number), f"{path}, row {number}")
            # Not splitlines: JSON strings may hold the other characters that it breaks at.
            for number, line in enumerate(content.split("\n"), start=1)
            if line.strip()
        ]
    return [{"text": content}]


def checked_rows(rows: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Returns rows as `read_rows` does.

    Raises:
        CorpusError: If one is malformed; `name` says where.
    """
    return [_row(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]


def prompt_and_response(row: dict[str, Any], template: str) -> tuple[str, str]:
    """Returns prompt and response of a row; the two follow each other without a gap.

    A conversation reads as its turns, line by line, where it is taken as text.
    """
    if "messages" in row:
        *before, last = (message["content"] for message in row["messages"])
        return "".join(f"{text}\n" for text in before), last
    if template == "alpaca":
        return ALPACA[bool(row["input"])].format(**row), row["output"]
    return f"{row['instruction']} {row['input']}".strip(), f" {row['output']}"


def _unreadable(path: Path, what: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"The {what} {path} cannot be read: {error.strerror}. Correct {_SETTINGS[what]}."
    )


def _parse(content: str, path: Path, what: str, line: int | None) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        where = f"line {line}" if line else f"line {error.lineno}"
        raise CorpusError(
            f"The {what} {path} is not valid JSON in {where}: {error.msg}. Correct it."
        ) from error


def _row(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict):
        # Before `text`: Stanford's own file has both, and `text` would be trained on as a whole.
        filled = {**row, "input": row.get("input") or ""}
        texts: dict[str, Any] = {k: filled.get(k) for k in ("instruction", "input", "output")}
        if all(isinstance(text, str) for text in texts.values()):
            return texts
        messages = _messages_of(row, where)
        if messages is not None:
            return {"messages": messages}
        if isinstance(row.get("text"), str):
            return {"text": row["text"]}
    raise CorpusError(
        f"{where} is {repr(row)[:60]}; a row needs the texts instruction and output (and may have "
        "input), or text, or messages. Correct the row."
    )


def _messages_of(row: dict[str, Any], where: str) -> list[Message] | None:
    """Returns the turns of a conversation, or None if a row is not one.

    Args:
        row: A row of the corpus.
        where: File and row, for messages.

    Raises:
        CorpusError: If a turn has no text or an unknown role, or if the user does not begin.
    """
    layout = next((name for name in _CHAT_FORMATS if isinstance(row.get(name), list)), None)
    if layout is None:
        return None
    role_key, text_key = _CHAT_FORMATS[layout]
    messages: list[Message] = []
    for number, turn in enumerate(row[layout], start=1):
        role, text = (
            (turn.get(role_key), turn.get(text_key)) if isinstance(turn, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(text, str):
            raise CorpusError(
                f"{where}, turn {number} is {repr(turn)[:60]}; a turn of {layout} needs the texts "
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
