"""tools/sample.py: its answers are the policy's, with the numbers of those answers. Each test
names the bug it catches."""

import re

import pytest
import torch

import common
from tools import sample

HOME = "where does the owl live?"


@pytest.fixture
def asked(runs, capsys):
    """asked(*words) -> the lines that sample prints of the policy in runs/other."""

    def ask(*words):
        capsys.readouterr()
        always = [
            "other",
            HOME,
            "--runs",
            str(runs),
            "--max-new-tokens",
            "5",
            "--device",
            "cpu",
        ]
        sample.main([*always, *words])
        return capsys.readouterr().out.splitlines()

    return ask


@torch.no_grad()
def test_an_answer_a_line_and_best_is_the_best_of_them(asked, runs):
    """Best of n that prints the worst, the first or the longest; numbers of another row, of one
    token, or of another model; a seed or an -n that does not arrive; one answer n times."""
    lines, scores = asked("-n", "6", "--seed", "3"), []
    policy = common.load_model(runs / "other", "lm", "cpu")
    judge = common.load_model(runs / "reward_model", "scalar", "cpu")
    common.seed_all(3)
    rollout = common.generate(policy, [common.chat(HOME)] * 6, 5)
    rows = zip(lines, common.response_ids(rollout), common.completions(rollout), strict=True)
    for line, ids, text in rows:
        row = torch.tensor([common.chat(HOME) + ids])
        logp = (
            policy(row)[0]
            .log_softmax(-1)[-1 - len(ids) : -1][range(len(ids)), ids]
            .sum()
            .item()
        )
        scores.append(judge(row)[0, -1].item())
        found = re.fullmatch(r"r (\S+) +log π +(\S+) +(.*)", line)
        assert [float(found[1]), float(found[2])] == pytest.approx(
            [scores[-1], logp], abs=0.006
        )
        assert found[3] == repr(text)
    assert scores[0] < max(scores)
    assert asked("-n", "6", "--seed", "3", "--best") == [lines[scores.index(max(scores))]]
    assert asked("--seed", "3") == lines[:4]
    assert asked("--seed", "4") != lines[:4]


def test_r_is_by_what_is_there(asked, runs, tmp_path):
    """A missing reward model that is trained, or that ends what needs none; a reader's function
    that is called for another prompt."""
    (tmp_path / "r.py").write_text(f"def r(prompts): return [p == {HOME!r} for p in prompts]")
    assert all(line.startswith("r +1.00 ") for line in asked("--reward", f"{tmp_path}/r.py:r"))
    (runs / "reward_model/model.pt").unlink()
    assert all(line.startswith("log π ") for line in asked())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--best", "python reward_model.py --runs"),
        ("--reward typo", "--out typo"),
        ("--reward sft", "is a policy"),
        ("-n 0", "1 or more"),
        ("--max-new-tokens 155", "context"),
    ],
)
def test_what_cannot_be_asked_is_one_line(asked, runs, files, capsys, words, said):
    """A traceback, a training run, or a folder that a typo makes."""
    (runs / "reward_model/model.pt").unlink()
    before = files()
    with pytest.raises(SystemExit) as stopped:
        asked(*words.split())
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert said in error
    assert files() == before
