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
PLAIN = {"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}


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
        ("sft", {"messages": [user("q"), assistant("a")]}),
        ("sft", {"messages": [user(text("q")), assistant(text("a"))]}),
        ("sft", {"prompt": [user("q")], "completion": [assistant("a")]}),
        ("sft", {"prompt": "q", "completion": "a", "messages": None}),
        ("sft", {"prompt": "q", "completion": "a", "label": True}),
        ("sft", {"prompt": "q", "completion": "a", "completion_finished": None}),
        ("prompts", {"prompt": [user("q")]}),
        ("prompts", {"prompt": "q", "label": False}),  # its answer is not read
        ("prompts", {"messages": [user("q"), assistant("a")]}),
        ("pairs", {"prompt": [user("q")], "chosen": [assistant("b")],
                   "rejected": [assistant("c")]}),
        ("pairs", {"chosen": [user("q"), assistant("b")],  # the prompt stands in the answers
                   "rejected": [user("q"), assistant("c")]}),
        ("pairs", {"prompt": "q", "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant(text("c"))]}),
        ("pairs", {"prompt": [user("q")], "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant("c")]}),
        ("pairs", {"prompt": "q", "messages": [user("q"), assistant("b")], "label": False,
                   "chosen": [user("q"), assistant("b")],
                   "rejected": [user("q"), assistant("c")]}),  # as UltraFeedback has it
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
        ("sft", b'{"prompt": "q", "completion": '),
        ("sft", b'["prompt", "completion"]'),
        ("sft", b'{"prompt": "q", "response": "a"}'),
        ("prompts", b'{"question": "q"}'),
        ("prompts", b"{}"),
        ("sft", b'{"prompt": "q", "completion": 3}'),
        ("sft", b'{"prompt": null, "completion": "a"}'),
        ("sft", b'{"prompt": "q", "completion": {"text": "a"}}'),
        ("sft", b'{"prompt": "q", "completion": "a", "label": false}'),
        ("pairs", b'{"prompt": "q", "chosen": "a"}'),
        ("sft", b'{"prompt": "\xff", "completion": "a"}'),  # not UTF-8
        ("sft", b'{"prompt": "\\ud800", "completion": "a"}'),  # half a surrogate pair
        ("sft", {"messages": "q"}),
        ("sft", {"messages": []}),
        ("sft", {"messages": [user("q")]}),
        ("sft", {"messages": [user("q"), {"role": "assistant"}]}),
        ("sft", {"messages": [user("q"), user("a")]}),
        ("sft", {"messages": [assistant("a"), user("q")]}),
        ("sft", {"messages": [user("q"), assistant("a")] * 2}),  # a longer conversation
        ("sft", {"messages": [{"role": "system"}, user("q"), assistant("a")]}),
        ("sft", {"messages": [user([{"type": "image", "url": "u"}]), assistant("a")]}),
        ("sft", {"messages": [user([{"type": "text", "text": 3}]), assistant("a")]}),
        ("sft", {"prompt": "p", "messages": [user("q"), assistant("a")]}),  # of another prompt
        ("pairs", {"prompt": "q", "chosen": [assistant("a")] * 2, "rejected": "b"}),
        ("pairs", {"prompt": [user("q"), assistant("a"), user("q")],
                   "chosen": [assistant("a")], "rejected": [assistant("b")]}),
        ("pairs", {"chosen": [user("q"), assistant("a")],
                   "rejected": [user("p"), assistant("b")]}),
        ("pairs", {"chosen": [assistant("a")], "rejected": [assistant("b")]}),
        ("prompts", {"prompt": [assistant("q")]}),
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
