"""data/jsonl.py: a reader's own rows, in the usual formats; what is wrong is named by line."""

import json
import re

import pytest

from data import jsonl

KEYS = {
    "sft": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}
PLAIN = {"prompt": "qu", "completion": "aa", "chosen": "bb", "rejected": "cc"}


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def text(said: str) -> list[dict]:
    """What is said, in two parts."""
    return [{"type": "text", "text": said[:1]}, {"type": "text", "text": said[1:]}]


def read(folder, content: bytes, kind: str) -> dict[int, dict]:
    """What jsonl.read makes of this content."""
    (folder / "mine.jsonl").write_bytes(content)
    return jsonl.read(folder / "mine.jsonl", KEYS[kind])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": [user("qu"), assistant("aa")]}),
        ("sft", {"messages": [user(text("qu")), assistant(text("aa"))]}),
        ("sft", {"prompt": [user("qu")], "completion": [assistant("aa")]}),
        ("sft", {"prompt": "qu", "completion": "aa", "messages": None}),
        ("sft", {"prompt": "qu", "completion": "aa", "label": True}),
        ("sft", {"prompt": "qu", "completion": "aa", "completion_finished": None}),
        ("prompts", {"prompt": [user("qu")]}),
        ("prompts", {"prompt": "qu", "label": False}),  # its answer is not read
        ("prompts", {"messages": [user("qu"), assistant("aa")]}),
        ("pairs", {"prompt": [user("qu")], "chosen": [assistant("bb")],
                   "rejected": [assistant("cc")]}),
        ("pairs", {"chosen": [user("qu"), assistant("bb")],  # the prompt stands in the answers
                   "rejected": [user("qu"), assistant("cc")]}),
        ("pairs", {"prompt": "qu", "chosen": [user("qu"), assistant("bb")],
                   "rejected": [user("qu"), assistant(text("cc"))]}),
        ("pairs", {"prompt": [user("qu")], "chosen": [user("qu"), assistant("bb")],
                   "rejected": [user("qu"), assistant("cc")]}),
        ("pairs", {"prompt": "qu", "messages": [user("qu"), assistant("bb")], "label": False,
                   "chosen": [user("qu"), assistant("bb")],
                   "rejected": [user("qu"), assistant("cc")]}),  # as UltraFeedback has it
    ],
)  # fmt: skip
def test_the_usual_formats_are_read(tmp_path, kind, row):
    """The answers to a prompt exchanged, a turn or a part of a text lost, a format of public
    data sets refused. Other keys, blank lines and a byte order mark do no harm; a row keeps
    the number of its line."""
    rows = {1: PLAIN, 4: row | {"id": 7}, 5: PLAIN | {"prompt": "é"}}
    lines = [json.dumps(rows[i], ensure_ascii=False) if i in rows else " " for i in range(1, 7)]
    for mark in (b"", b"\xef\xbb\xbf"):
        found = read(tmp_path, mark + "\n".join(lines).encode(), kind)
        assert list(found) == [1, 4, 5]
        assert [found[4][key] for key in KEYS[kind]] == [PLAIN[key] for key in KEYS[kind]]
        assert found[4]["id"] == 7
        assert (found[1], found[5]["prompt"]) == (PLAIN, "é")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("sft", b'{"prompt": "qu", "completion": '),
        ("sft", b'["prompt", "completion"]'),
        ("sft", b'{"prompt": "qu", "response": "aa"}'),
        ("prompts", b'{"question": "qu"}'),
        ("prompts", b"{}"),
        ("sft", b'{"prompt": "qu", "completion": 3}'),
        ("sft", b'{"prompt": null, "completion": "aa"}'),
        ("sft", b'{"prompt": "qu", "completion": {"text": "aa"}}'),
        ("sft", b'{"prompt": "qu", "completion": "aa", "label": false}'),
        ("pairs", b'{"prompt": "qu", "chosen": "aa"}'),
        ("sft", b'{"prompt": "\xff", "completion": "aa"}'),  # not UTF-8
        ("sft", b'{"prompt": "\\ud800", "completion": "aa"}'),  # half a surrogate pair
        ("sft", {"messages": "qu"}),
        ("sft", {"messages": []}),
        ("sft", {"messages": [user("qu")]}),
        ("sft", {"messages": [user("qu"), {"role": "assistant"}]}),
        ("sft", {"messages": [user("qu"), user("aa")]}),
        ("sft", {"messages": [assistant("aa"), user("qu")]}),
        ("sft", {"messages": [user("qu"), assistant("aa")] * 2}),  # a longer conversation
        ("sft", {"messages": [{"role": "system"}, user("qu"), assistant("aa")]}),
        ("sft", {"messages": [user([{"type": "image", "url": "u"}]), assistant("aa")]}),
        ("sft", {"messages": [user([{"type": "text", "text": 3}]), assistant("aa")]}),
        ("sft", {"prompt": "p", "messages": [user("qu"), assistant("aa")]}),  # of another
        ("pairs", {"prompt": "qu", "chosen": [assistant("aa")] * 2, "rejected": "bb"}),
        ("pairs", {"prompt": [user("qu"), assistant("aa"), user("qu")],
                   "chosen": [assistant("aa")], "rejected": [assistant("bb")]}),
        ("pairs", {"chosen": [user("qu"), assistant("aa")],
                   "rejected": [user("p"), assistant("bb")]}),
        ("pairs", {"chosen": [assistant("aa")], "rejected": [assistant("bb")]}),
        ("prompts", {"prompt": [assistant("qu")]}),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, kind, line):
    """A row that is read as another, or left out; the wrong line named (a blank one counts)."""
    line = line if type(line) is bytes else json.dumps(line).encode()
    content = b"\n".join([json.dumps(PLAIN).encode()] * 9 + [b"", line, line])
    named = re.escape(f"{tmp_path}/mine.jsonl:11: ")
    with pytest.raises(ValueError, match=f"{named}.*{KEYS[kind][-1]}"):
        read(tmp_path, content, kind)


def test_only_a_newline_ends_a_line(tmp_path):
    """JSON may hold U+2028, U+0085 and a form feed as they are: a row would be cut in two."""
    row = PLAIN | {"completion": "a\u2028b\u0085c"}
    content = "\r\n".join([json.dumps(row, ensure_ascii=False)] * 3).encode()
    assert read(tmp_path, content, "sft") == dict.fromkeys((1, 2, 3), row)
