"""A reader's own rows: JSONL, one JSON object a line. Plain Python; imports nothing of the
project."""

import json
from pathlib import Path


def read_row(line: str, keys: tuple[str, ...]) -> dict:
    """A line as a dict with these keys, all strings. Chat formats are taken too: `messages`,
    and lists of turns in place of strings. Any other line raises ValueError."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if row.get("messages") is not None:
        row["completion"] = row["messages"]
    for key in ("prompt", "completion", "chosen", "rejected"):
        if not isinstance(turns := row.get(key), list):
            continue
        roles = ["user"] if key == "prompt" else ["user", "assistant"][-len(turns) :]
        try:
            found = [turn["role"] for turn in turns]
            said = [turn["content"] for turn in turns]  # each a string, or text parts
            texts = [x if isinstance(x, str) else "".join(p["text"] for p in x) for x in said]
        except (KeyError, TypeError):
            found = None
        if found != roles:
            raise ValueError(f"{key} must be one user turn and one answer, of text")
        row[key] = texts[-1]
        if len(texts) == 2 and row.setdefault("prompt", texts[0]) != texts[0]:
            raise ValueError(f"{key} answers another prompt")
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key} is missing or no text; found are {', '.join(row)}")
        row[key].encode()  # half a surrogate pair is an error
    if "completion" in keys and row.get("label") is False:
        raise ValueError("label is false: an answer to avoid, and this trains on all answers")
    return row


def read(path: str | Path, keys: tuple[str, ...]) -> dict[int, dict]:
    """Line number -> row of a UTF-8 file, with or without a byte order mark. A line that is no
    row raises ValueError, which names file and line."""
    rows = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            if line.strip():
                rows[number] = read_row(line.decode("utf-8-sig"), keys)
        except ValueError as error:
            wanted = f"a line is a JSON object of {', '.join(keys)}"
            raise ValueError(f"{path}:{number}: {error}; {wanted}") from error
    return rows
