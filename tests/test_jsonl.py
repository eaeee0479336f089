"""data/jsonl.py: a reader's own rows, in the usual formats; what is wrong is named by line."""

import json
import re

import pytest

from data import jsonl

SFT, PAIRS, PROMPTS = ("prompt", "completion"), ("prompt", "chosen", "rejected"), ("prompt",)
PLAIN = {"prompt": "qu", "completion": "aa", "chosen": "bb", "rejected": "cc"}
QU = {"role": "user", "content": "qu"}
AA, BB, CC = ({"role": "assistant", "content": text} for text in ("aa", "bb", "cc"))
OTHER = QU | {"content": "another question"}
IMAGE = QU | {"content": [{"type": "image", "url": "u"}]}
IN_PARTS = QU | {"content": [{"type": "text", "text": part} for part in "qu"]}


def read(folder, content: bytes, keys: tuple[str, ...]) -> dict[int, dict]:
    """What jsonl.read makes of this content."""
    (folder / "mine.jsonl").write_bytes(content)
    return jsonl.read(folder / "mine.jsonl", keys)


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        (SFT, {"messages": [IN_PARTS, AA]}),
        (SFT, {"prompt": [QU], "completion": [AA]}),
        (SFT, {"prompt": "qu", "completion": "aa", "messages": None, "label": True}),
        (PROMPTS, {"prompt": "qu", "label": False}),  # its answer is not read
        (PAIRS, {"prompt": [QU], "chosen": [BB], "rejected": [CC]}),
        (PAIRS, {"chosen": [QU, BB], "rejected": [QU, CC]}),  # the prompt is in the answers
        (PAIRS, {"prompt": "qu", "messages": [QU, BB],  # as UltraFeedback has it
                 "chosen": [QU, BB], "rejected": [QU, CC]}),
    ],
)  # fmt: skip
def test_the_usual_formats_are_read(tmp_path, keys, row):
    """The answers to a prompt exchanged, a turn or a part of a text lost, a format of public
    data sets refused; a row cut in two where only a newline ends a line. Other keys, blank
    lines and a byte order mark do no harm; a row keeps the number of its line."""
    rows = {1: PLAIN, 4: row | {"id": 7}, 5: PLAIN | {"prompt": "é\u2028\u0085"}}
    lines = [json.dumps(rows[i], ensure_ascii=False) if i in rows else " " for i in range(1, 7)]
    for mark in (b"", b"\xef\xbb\xbf"):
        found = read(tmp_path, mark + "\r\n".join(lines).encode(), keys)
        assert list(found) == [1, 4, 5]
        assert [found[4][key] for key in keys] == [PLAIN[key] for key in keys]
        assert found[4]["id"] == 7
        assert (found[1], found[5]) == (rows[1], rows[5])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (SFT, b'{"prompt": "qu", "completion": '),
        (SFT, b'["prompt", "completion"]'),
        (SFT, b'{"prompt": "\xff", "completion": "aa"}'),  # not UTF-8
        (SFT, {"prompt": "qu", "completion": 3}),
        (SFT, {"prompt": "qu", "completion": "aa", "label": False}),
        (PAIRS, {"prompt": "qu", "chosen": "aa"}),
        (SFT, {"messages": [AA, QU]}),
        (SFT, {"messages": [QU, AA, QU, AA]}),  # a longer conversation
        (SFT, {"messages": [{"role": "system", "content": "be brief"}, QU, AA]}),
        (SFT, {"messages": [IMAGE, AA]}),
        (PAIRS, {"prompt": [QU, AA, QU], "chosen": [BB], "rejected": [CC]}),
        (PAIRS, {"chosen": [QU, BB], "rejected": [OTHER, CC]}),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(tmp_path, keys, line):
    """A row that is read as another, or left out; the wrong line named (a blank one counts)."""
    line = line if type(line) is bytes else json.dumps(line).encode()
    content = b"\n".join([json.dumps(PLAIN).encode()] * 9 + [b"", line, line])
    named = re.escape(f"{tmp_path}/mine.jsonl:11: ")
    with pytest.raises(ValueError, match=f"{named}.*{keys[-1]}"):
        read(tmp_path, content, keys)
