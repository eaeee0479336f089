"""tools/sample.py: its answers are the policy's, with the numbers of those answers. Each test
names the bugs it catches."""

import json
import re

import pytest
import torch

import common
from tools import sample

HOME = "where does the owl live?"


@pytest.fixture
def asked(runs, capsys):
    """asked(*words) -> the lines that sample prints of the policy in runs/other, whose own
    table has answers of at most 5 tokens."""
    common.write(runs / "other/config.json", '{"flags": {"max_new_tokens": 5}}')

    def ask(*words):
        capsys.readouterr()
        sample.main(["other", HOME, "--runs", str(runs), *words])
        return capsys.readouterr().out.splitlines()

    return ask


@torch.no_grad()
def test_an_answer_a_line_and_best_is_the_best_of_them(asked, runs):
    """Best of n that prints the worst, the first or the longest; numbers of another row, of one
    token, or of another model; a seed, an -n or a length that does not arrive; one answer n
    times."""
    lines, scores = asked("-n", "6", "--seed", "3"), []
    policy = common.load_model(runs / "other", "lm", "cpu")
    judge = common.load_model(runs / "reward_model", "scalar", "cpu")
    common.seed_all(3)
    rollout = common.generate(policy, [common.chat(HOME)] * 6, 5)
    rows = zip(lines, common.response_ids(rollout), common.completions(rollout), strict=True)
    for line, ids, text in rows:
        row = torch.tensor([common.chat(HOME) + ids])
        logp = policy(row)[0].log_softmax(-1)[-1 - len(ids) : -1]
        scores.append(judge(row)[0, -1].item())
        found = re.fullmatch(r"r (\S+) +log π +(\S+) +(.*)", line)
        expected = [scores[-1], sum(logp[t, i].item() for t, i in enumerate(ids))]
        assert [float(x) for x in found.groups()[:2]] == pytest.approx(expected, abs=0.006)
        assert found[3] == repr(text)
    best = scores.index(max(scores))
    assert best not in (0, scores.index(min(scores)))
    assert asked("-n", "6", "--seed", "3", "--best") == [lines[best]]
    assert asked("--seed", "4")[:4] != lines[:4]


def test_r_is_what_the_policy_was_trained_on(asked, runs, tmp_path, stops):
    """The reward model where there is another r; a missing one that is trained, or that ends
    what needs none; a reader's function that is called for another prompt."""
    (runs / "reward_model").rename(runs / "gone")
    assert all(line.startswith("log π ") for line in asked())
    assert f"python reward_model.py --runs {runs}" in stops(asked, "--best")
    (tmp_path / "r.py").write_text(f"def r(prompts): return [p == {HOME!r} for p in prompts]")
    flags = json.dumps({"flags": {"reward": f"{tmp_path}/r.py:r"}})
    common.write(runs / "other/config.json", flags)
    assert all(line.startswith("r +1.00 ") for line in asked())
