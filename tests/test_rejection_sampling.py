"""rejection_sampling.py: selection on hand-made matrices, R row by row, whole runs."""

import json
import math

import pytest
import torch

import common
import rejection_sampling as rs

TINY = "--prompts 6 --samples 3 --steps 3 --batch 4 --max-new-tokens 3"
R = torch.tensor([[1.0, 3, 3], [9, 0, 9], [2, 2, 2], [-5, -4, -9]])  # ties in three rows


def test_best_per_prompt_with_ties_to_the_first():
    assert rs.top_per_prompt(R).tolist() == [1, 0, 0, 1]
    assert rs.top_per_prompt(R[:1]).tolist() == [1]  # M = 1
    assert rs.top_per_prompt(R[:, :1]).tolist() == [0, 0, 0, 0]  # N = 1


def test_best_k_of_all_with_ties_to_the_lower_index():
    assert rs.top_k_overall(R, 5).tolist() == [3, 5, 1, 2, 6]
    assert rs.top_k_overall(R, 12).tolist() == [3, 5, 1, 2, 6, 7, 8, 0, 4, 10, 9, 11]
    assert rs.top_k_overall(R[:1], 1).tolist() == [1]  # M = 1
    assert rs.top_k_overall(R[:, :1], 4).tolist() == [1, 2, 0, 3]  # N = 1
    assert rs.top_k_overall(torch.zeros(50, 40), 2000).tolist() == list(range(2000))


@pytest.mark.parametrize("k", [0, 13])
def test_more_than_there_is_cannot_be_selected(k):
    with pytest.raises(ValueError, match=f"top_k {k} of 12"):
        rs.top_k_overall(R, k)


def test_the_control_is_blind_to_reward_and_to_order():
    """A control that prefers a column is no control."""
    draws = torch.stack([rs.random_per_prompt(R, torch.Generator().manual_seed(i))
                         for i in range(900)])  # fmt: skip
    shares = torch.stack([(draws == j).float().mean(0) for j in range(3)])
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / 900) ** 0.5
    again = rs.random_per_prompt(-R, torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])
    assert rs.random_per_prompt(R[:, :1]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rule", "expected"), [("per_prompt", [1, 3, 6, 10]), ("top_k", [3, 5, 1, 2])]
)
def test_select_gives_flat_indices(rule, expected):
    """Column j of row i is answer i·N + j, not i·M + j."""
    assert rs.select(rs.Config(select=rule, top_k=4), R).tolist() == expected
    drawn = rs.select(rs.Config(select="random"), R)
    assert (drawn // 3).tolist() == [0, 1, 2, 3]


def test_imitation_loss_is_the_mean_over_the_batchs_tokens():
    logprobs = torch.tensor([[0.0, -1, -2, -3], [-9, -5, -9, -9]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert rs.imitation_loss(logprobs, mask).item() == pytest.approx((1 + 2 + 3 + 5) / 4)


@pytest.fixture
def scored(tmp_path):
    """--reward FILE.py:r: the numbers in an answer's bytes, plus the prompt's length."""
    file = tmp_path / "mine.py"
    file.write_text("def r(x, y):\n    return [len(a) + sum(b.encode()) % 97 / 97"
                    " for a, b in zip(x, y)]\n")  # fmt: skip
    return f"{file}:r"


def test_rewards_stand_in_their_prompts_row(tiny, scored):
    """R transposed, or rows shifted where a batch of 512 ends."""
    policy, reward = tiny(), common.Reward(scored, "", torch.device("cpu"))
    prompts = [f"{'x' * i}?" for i in range(1, 11)]
    cfg = rs.Config(samples=70, max_new_tokens=2)  # 700 rows: two batches
    answers, found, row = rs.sample_and_score(cfg, prompts, policy, policy, reward)
    assert found.shape == (10, 70)
    assert [a["prompt"] for a in answers] == [p for p in prompts for _ in range(70)]
    texts = [a["completion"] for a in answers]
    again = torch.tensor(reward.function([a["prompt"] for a in answers], texts))
    torch.testing.assert_close(found.flatten(), again)
    assert row["reward"] == pytest.approx(again.mean().item())
    assert row["kl"] == 0
    assert math.isnan(row["gold"])


def selected(runs):
    lines = (runs / "new/selected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_starts_at_no_kl_and_repeats_itself(repeats, runs, scored, moved):
    """KL to oneself is exactly 0; a round that does not sample from the improved policy; what
    is selected must be readable by sft.py --data."""
    rows = repeats(rs, f"{TINY} --rounds 2 --reward {scored} --lr 0.01")
    assert [row["round"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert [float(row["kl"]) != 0 for row in rows] == [False] * 3 + [True] * 3
    assert all(float(row["selected"]) > float(row["reward"]) for row in rows)
    assert moved()[:2] == [True, False]  # policy, reference
    kept = selected(runs)
    assert [row["round"] for row in kept] == [0] * 6 + [1] * 6
    found = common.read_jsonl(runs / "new/selected.jsonl", ("prompt", "completion"))
    assert found == [row for row in kept if row["completion"].strip()]


@pytest.mark.parametrize("rule", ["per_prompt", "random", "top_k --top-k 7"])
def test_every_rule_runs_on_a_reward_model(call, runs, rule, moved):
    """A flag that does nothing: as many are kept as the rule says, and better than most."""
    rows = call(rs, f"{TINY} --out new --select {rule}")
    assert moved()[:3] == [False, True, False]  # reward model, policy, reference
    assert len(selected(runs)) == (7 if "top_k" in rule else 6)
    assert (float(rows[0]["selected"]) > float(rows[0]["reward"])) or rule == "random"


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    assert "step 2: the loss is nan" in diverges(rs, TINY, "imitation_loss", 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--sample 3", "unrecognized arguments: --sample 3"),
        ("--select best", "invalid choice: 'best'"),
        ("--select top_k --top-k 19", "--top-k 19 of M·N = 18 answers: lower it"),
        ("--temperature 0", "--temperature 0.0: a number ≥ 0.01 is needed"),
        ("--init nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--init reward_model", "holds a reward model, and a policy is needed"),
        ("--reward-model sft", "holds a policy, and a reward model is needed"),
        ("--reward nowhere.py:r", "nowhere.py:0: cannot be read"),
        ("--data nowhere.jsonl", "nowhere.jsonl:0: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags, says):
    assert says in refused(rs, f"{TINY} {flags}")
