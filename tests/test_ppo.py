"""ppo.py: the return, every estimator and the clipped loss by hand or by a slow definition,
whole runs with each estimator, wrong command lines."""

import math

import pytest
import torch

import common
import ppo
from common import EOS

TINY = "--steps 2 --prompts 3 --samples 2 --minibatches 2 --max-new-tokens 3"
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()


# ------------------------------------------------------------------------ return and rewards


def test_return_by_hand():
    """KL as a bonus, its ratio inverted, averaged over tokens, or counted off the response."""
    logprobs = torch.tensor([[9.0, -1, -2, -3, 9], [9, 9, 9, -4, 9], [9, 9, -1, -1, -1]])
    ref = torch.tensor([[5.0, -2, -2, -5, 5], [5, 5, 5, -1, 5], [5, 5, -1, -1, -1]])
    score = torch.tensor([10.0, 20, 30])
    logprobs.requires_grad_()
    returns, kl = ppo.response_return(score, logprobs, ref, MASK, beta=0.5)
    assert kl.tolist() == [3, -3, 0]
    assert returns.tolist() == [8.5, 21.5, 30]
    assert not returns.requires_grad
    rewards = ppo.token_rewards(score, logprobs, ref, MASK, beta=0.5)
    assert rewards.tolist() == [[0, -0.5, 0, 9, 0], [0, 0, 0, 21.5, 0], [0, 0, 0, 0, 30]]
    assert not rewards.requires_grad


# --------------------------------------------------------------------------------- advantages


def test_rloo_by_hand():
    """The sample's own return in its baseline; groups across prompts."""
    returns = torch.tensor([1.0, 2, 6, 0, 0, 30])
    assert ppo.rloo(returns, 3).tolist() == pytest.approx([-3, -1.5, 4.5, -15, -15, 30])
    assert ppo.rloo(returns, 2).tolist() == pytest.approx([-1, 1, 6, -6, -30, 30])


def test_grpo_by_hand():
    """Sample std for population std; std over the batch; a scale or shift that matters."""
    returns = torch.tensor([1.0, 3, 5, 5, 0, 100])
    by_pairs = [-1, 1, 0, 0, -1, 1]
    assert ppo.grpo(returns, 2).tolist() == pytest.approx(by_pairs)
    by_threes = ppo.grpo(returns, 3)[:3].tolist()
    assert by_threes == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])


def test_equal_returns_give_exactly_nothing():
    """Rounding, divided by a std of rounding, would become an advantage of size 1."""
    returns = torch.tensor([0.1] * 7 + [1e6 / 3] * 7)
    assert ppo.grpo(returns, 7).tolist() == [0] * 14
    assert ppo.rloo(torch.full((8,), 1 / 3), 4).tolist() == [0] * 8


def slow_gae(rewards, values, mask, gamma, lam):
    """The definition: A_t = Σ_{l ≥ 0} (γλ)^l δ_{t+l}, over the response's own tokens."""
    advantages = torch.zeros_like(values)
    for i, on in enumerate(mask.tolist()):
        at = [t for t, response in enumerate(on) if response]
        for n, t in enumerate(at):
            for m in range(n, len(at)):
                after = values[i, at[m + 1]] if m + 1 < len(at) else 0.0
                delta = rewards[i, at[m]] + gamma * after - values[i, at[m]]
                advantages[i, t] += (gamma * lam) ** (m - n) * delta
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1, 0.95), (0.9, 0.8), (1, 1), (1, 0), (0.7, 0)])
def test_gae_is_its_slow_definition(gamma, lam):
    """λ or γ left out, credit that leaks through pads, V of a pad after the end."""
    torch.manual_seed(0)
    values, rewards = torch.randn(3, 5).double(), torch.randn(3, 5).double() * MASK
    advantages, targets = ppo.gae(rewards, values, MASK, gamma, lam)
    expected = slow_gae(rewards, values, MASK, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    assert not advantages[~MASK].any()
    torch.testing.assert_close(targets * MASK, (expected + values) * MASK)
    if gamma == lam == 1:  # the target is then the reward-to-go, whatever V says
        later = rewards.flip(1).cumsum(1).flip(1)
        torch.testing.assert_close(targets * MASK, later * MASK)


def batch(estimator):
    """A hand-made batch of 4 rows and its Config: ragged, so that masks matter."""
    torch.manual_seed(1)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    logprobs, ref, values = torch.randn(3, 4, 4)
    score = torch.tensor([1.0, 2, 3, 4])
    returns, _ = ppo.response_return(score, logprobs, ref, mask, 0.3)
    tokens = torch.randint(4, 300, (4, 4))
    made = ppo.Batch(tokens, mask, logprobs, ref, score, returns, values, {})
    return ppo.Config(estimator=estimator, samples=2, beta=0.3), made


def test_value_baseline_is_v_before_the_response_begins():
    """V read at a pad, at the prompt's start, or after the action."""
    cfg, b = batch("value")
    advantages, targets, where = ppo.advantages_and_targets(cfg, b)
    v = torch.stack([b.values[0, 1], b.values[1, 2], b.values[2, 2], b.values[3, 1]])
    torch.testing.assert_close(advantages, (b.returns - v)[:, None])
    assert where.nonzero().tolist() == [[0, 1], [1, 2], [2, 2], [3, 1]]
    assert torch.equal(targets[where], b.returns)


def test_estimators_differ_in_the_baseline_alone():
    """A flag that does nothing, or a baseline of another prompt's answers."""
    cfg, b = batch("reinforce")
    r = b.returns.tolist()
    assert torch.equal(ppo.advantages_and_targets(cfg, b)[0], b.returns[:, None])
    cfg, b = batch("rloo")
    expected = [r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]]
    assert ppo.advantages_and_targets(cfg, b)[0].flatten().tolist() == pytest.approx(expected)
    cfg, b = batch("grpo")
    signs = [math.copysign(1, x) for x in expected]
    assert ppo.advantages_and_targets(cfg, b)[0].flatten().tolist() == pytest.approx(signs)
    cfg, b = batch("gae")
    cfg.lam = 1.0
    advantages, targets, where = ppo.advantages_and_targets(cfg, b)
    assert torch.equal(where, b.response_mask)
    first = where & (where.cumsum(1) == 1)  # γ = λ = 1: the first token's target is R
    torch.testing.assert_close(targets[first], b.returns)
    assert advantages.shape == (4, 4)


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("advantage", "ratio", "on"),
    [
        (1.0, 1.3, False),  # good, and already much likelier: stop
        (1.0, 0.7, True),  # good, and less likely than it was: go on
        (-1.0, 1.3, True),  # bad, and likelier than it was: go on
        (-1.0, 0.7, False),  # bad, and already much less likely: stop
        (1.0, 1.1, True),
        (-1.0, 0.9, True),
    ],
)
def test_clipping_stops_the_gradient_in_two_of_four_quadrants(advantage, ratio, on):
    """A clip split by the sign of A has its gradient on exactly where PPO turns it off."""
    old = torch.tensor([[-2.0, -3.0]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    mask = torch.tensor([[True, False]])
    ppo.policy_loss(logprobs, old, torch.tensor([[advantage]]), mask, 0.2).backward()
    assert logprobs.grad[0, 0].item() == pytest.approx(-advantage * ratio * on)
    assert logprobs.grad[0, 1] == 0


def test_policy_loss_by_hand():
    """A mean over tokens for the sum over a response's tokens; padding counted."""
    old = torch.zeros(2, 3)
    logprobs = torch.tensor([[1.1, 1.5, 9], [0.5, 9, 9]]).log()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = ppo.policy_loss(logprobs, old, torch.tensor([[2.0], [-4]]), mask, 0.2)
    assert loss.item() == pytest.approx(-((1.1 + 1.2) * 2 + 0.8 * -4) / 2)
    a = torch.tensor([[2.0, 1, 7], [-4, 7, 7]])  # gae: an advantage per token
    loss = ppo.policy_loss(logprobs, old, a, mask, 0.2)
    assert loss.item() == pytest.approx(-((1.1 * 2 + 1.2) + 0.8 * -4) / 2)


def test_at_ratio_1_the_gradient_is_reinforce_with_a_baseline(tiny):
    """−mean_y A Σ_t ∇ log π(y_t | …), here from each row alone and unpadded."""
    model, rows = tiny(), [([1, 7, 2], [9, EOS]), ([1, 2], [8, 7, 6, EOS]), ([1, 5, 2], [8])]
    tokens, mask = common.collate(rows)
    a = torch.tensor([1.5, -2.0, 0.5])
    logprobs = common.token_logprobs(model, tokens, mask)
    ppo.policy_loss(logprobs, logprobs.detach(), a[:, None], mask, 0.2).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for (x, y), advantage in zip(rows, a):
        logp = model(torch.tensor([x + y]))[0].log_softmax(-1)
        total = sum(logp[len(x) + i - 1, token] for i, token in enumerate(y))
        (-advantage * total / 3).backward()
    for grad, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_value_loss_by_hand():
    values, targets = torch.tensor([[1.0, 5], [2, 9]]), torch.tensor([[3.0, 5], [5, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ppo.value_loss(values, targets, mask).item() == pytest.approx((4 + 0 + 9) / 3 / 2)


# --------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("estimator", ["value", "rloo", "grpo", "reinforce", "gae"])
def test_a_run_starts_at_no_kl_and_repeats_itself(repeats, moved, estimator):
    """KL to oneself is exactly 0; sampling and scoring agree; J is what it says."""
    rows = repeats(ppo, f"{TINY} --lr 0.01 --estimator {estimator}")
    assert [float(row["kl"]) != 0 for row in rows] == [False, True]
    for row in rows:
        assert float(row["sampler_gap"]) < 1e-5
        expected = float(row["reward"]) - 0.3 * float(row["kl"])
        assert float(row["J"]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (rows[0]["value_loss"] != "") == (estimator in ("value", "gae"))
    assert moved()[:3] == [False, True, False]  # reward model, policy, reference


def test_one_epoch_of_one_minibatch_never_leaves_ratio_1(call):
    """With K = 1 and one minibatch nothing is ever clipped: plain REINFORCE."""
    once, more = (
        call(ppo, f"{TINY} --lr 0.01 --out new --epochs {k} --minibatches 1") for k in (1, 3)
    )
    for row in once:
        assert float(row["ratio_max"]) == pytest.approx(1, abs=1e-5)
        assert float(row["clipped"]) == 0
    assert float(more[0]["ratio_max"]) > 1.01


def test_a_reward_function_is_maximised_on_own_prompts(call, tmp_path):
    """Descent of J for ascent. Outside the world gold is an empty cell."""
    code, data = tmp_path / "mine.py", tmp_path / "mine.jsonl"
    code.write_text("def r(x, y):\n    return [float(b.startswith(' ')) for b in y]\n")
    data.write_text("".join(f'{{"prompt": "где {i}?"}}\n' for i in range(30)))
    flags = "--beta 0 --steps 16 --lr 0.01 --prompts 32 --minibatches 1 --max-new-tokens 1"
    rows = call(ppo, f"{flags} --reward {code}:r --data {data} --estimator rloo --out new")
    reward = [float(row["reward"]) for row in rows]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.15
    assert {row["gold"] for row in rows} == {""}


def test_the_critic_learns_what_a_prompt_is_worth(call, tmp_path):
    """Targets of other rows, answers grouped by sample and not by prompt: the critic would
    then know no better than the mean return, and err by ½ Var R = 2."""
    code, data = tmp_path / "mine.py", tmp_path / "mine.jsonl"
    code.write_text("def r(x, y):\n    return [4.0 * ('zebra' in p) for p in x]\n")
    words = ["zebra", "bear"] * 15
    data.write_text("".join(f'{{"prompt": "{w} {i}?"}}\n' for i, w in enumerate(words)))
    flags = "--steps 12 --lr 0.02 --prompts 16 --max-new-tokens 1 --beta 0 --out new"
    for estimator in ("value", "gae"):
        rows = call(ppo, f"{flags} --estimator {estimator} --reward {code}:r --data {data}")
        assert float(rows[-1]["value_loss"]) < 0.2


def test_collected_rows_of_a_prompt_stand_together(tiny, tmp_path):
    """rloo and grpo compare n consecutive rows: they must be answers to one prompt."""
    (tmp_path / "mine.py").write_text("def r(x, y):\n    return [len(p) for p in x]\n")
    reward = common.Reward(f"{tmp_path}/mine.py:r", "", torch.device("cpu"))
    cfg, policy, prompts = ppo.Config(samples=3, max_new_tokens=2), tiny(), ["a", "bc", "def"]
    found = ppo.collect(cfg, prompts, policy, tiny(1), None, reward)
    assert found.reward.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for i, (ids, on) in enumerate(zip(found.tokens.tolist(), found.response_mask.tolist())):
        assert ids[: on.index(True)] == common.chat(prompts[i // 3])


def test_later_updates_are_measured_against_the_policy_that_sampled(call, monkeypatch):
    """Old log-probs recomputed before each update: the ratio is 1 for ever, nothing clips."""
    loss, gaps = ppo.policy_loss, []

    def spy(logprobs, old, *args):
        gaps.append((logprobs - old).abs().max().item())
        return loss(logprobs, old, *args)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    call(ppo, f"{TINY} --lr 0.01 --steps 1 --out new")
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-3


def test_policy_and_reference_may_differ_from_the_start(call, capsys):
    rows = call(ppo, f"{TINY} --init other --out new")
    assert float(rows[0]["kl"]) != 0
    assert "starting KL of other to sft" in capsys.readouterr().out


def test_a_policy_that_is_not_the_one_that_sampled_stops_the_run(call, monkeypatch, capsys):
    """The check of the first minibatch: |log ratio| ≤ 1e-5."""
    collect = ppo.collect

    def stale(*args):
        found = collect(*args)
        found.logprobs += 2e-5
        return found

    monkeypatch.setattr(ppo, "collect", stale)
    with pytest.raises(SystemExit) as stopped:
        call(ppo, TINY)
    assert stopped.value.code == 1
    assert "step 0, minibatch 0: log ratio 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_loss_that_is_not_finite_stops_the_run(diverges, name):
    assert "step 1, minibatch 1: the loss is nan" in diverges(ppo, TINY, name, 6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--gamma 1", "unrecognized arguments: --gamma 1"),
        ("--beta -0.1", "--beta -0.1: a number ≥ 0 is needed"),
        ("--beta inf", "--beta inf: a number ≥ 0 is needed"),
        ("--estimator a2c", "invalid choice: 'a2c'"),
        ("--samples 1 --estimator rloo", "--samples 1: rloo compares samples"),
        ("--samples 1 --estimator grpo", "--samples 1: grpo compares samples"),
        ("--init nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--ref nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--reward-model nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--init reward_model", "holds a reward model, and a policy is needed"),
        ("--reward-model sft", "holds a policy, and a reward model is needed"),
        ("--reward nowhere.py:r", "nowhere.py:0: cannot be read"),
        ("--data nowhere.jsonl", "nowhere.jsonl:0: cannot be read"),
        ("--reward mine.py", "--reward mine.py: name the function too"),
        ("--out sft", "--out sft: other runs start from it"),
        ("--ref other --out other", "--out other: other runs start from it"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags, says):
    assert says in refused(ppo, f"{TINY} {flags}")
