"""dpo.py: every loss by hand and at its optimum, cached log-probs, invariances, whole runs."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import common
import dpo

TINY = "--steps 4 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")
LN3 = math.log(3)


@pytest.mark.parametrize(
    ("name", "h", "beta", "eps", "loss"),
    [
        # step 0: the gap is 0
        ("dpo", 0.0, 0.3, 0.0, math.log(2)),
        ("dpo", 0.0, 0.3, 0.4, math.log(2)),
        ("ipo", 0.0, 0.25, 0.0, 4.0),  # 1/(4τ²)
        ("hinge", 0.0, 0.3, 0.0, 1.0),
        # pen and paper
        ("dpo", 2 * LN3, 0.5, 0.0, math.log(4 / 3)),  # σ(ln 3) = 3/4
        ("dpo", -2 * LN3, 0.5, 0.0, math.log(4)),
        ("dpo", 2 * LN3, 0.5, 0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        ("dpo", -1000.0, 0.5, 0.0, 500.0),  # log(sigmoid(x)) would be −inf
        ("ipo", 2.0, 0.25, 0.0, 0.0),  # the gap that is asked for: 1/(2τ)
        ("ipo", 5.0, 0.25, 0.0, 9.0),  # more is as wrong as less
        ("ipo", 5.0, 0.25, 0.1, 0.9 * 9 + 0.1 * 49),
        ("hinge", 2.0, 0.25, 0.0, 0.5),
        ("hinge", 4.0, 0.25, 0.0, 0.0),
        ("hinge", 9.0, 0.25, 0.0, 0.0),
        ("hinge", -2.0, 0.25, 0.2, 0.8 * 1.5 + 0.2 * 0.5),
    ],
)
def test_loss_by_hand(name, h, beta, eps, loss):
    """A sign, β in the wrong place, a mean in place of one value per pair."""
    chosen, rejected = torch.tensor([h - 1.5, 0.0]), torch.tensor([-1.5, 0.0])
    found = dpo.LOSSES[name](chosen, rejected, beta, eps)
    assert found.shape == (2,)
    assert found[0].item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_soft_labels_are_the_mean_over_flipped_labels(name):
    """label_smoothing (B,) gives each pair its own ε; at ε = ½ swapping the pair is nothing."""
    chosen, rejected = torch.tensor([0.3, -2.0, 1.0]), torch.tensor([1.1, 0.4, -3.0])
    loss, eps = dpo.LOSSES[name], torch.tensor([0.0, 0.2, 1.0])
    straight, flipped = loss(chosen, rejected, 0.3), loss(rejected, chosen, 0.3)
    found = loss(chosen, rejected, 0.3, eps)
    torch.testing.assert_close(found, (1 - eps) * straight + eps * flipped)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_known_optima_of_noisy_labels(beta, eps):
    """dpo: h* = ln((1 − ε)/ε)/β; ipo with win rate p = 1 − ε: h* = (2p − 1)/(2τ)."""
    optima = {"dpo": math.log((1 - eps) / eps) / beta, "ipo": (1 - 2 * eps) / (2 * beta)}
    h = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    for name, optimum in optima.items():
        loss = dpo.LOSSES[name](h, torch.zeros_like(h), beta, eps)
        assert h[loss.argmin()].item() == pytest.approx(optimum, abs=1e-3)


def test_gradient_at_step_0_is_half_beta():
    """∇L = −β/2 (∇ log π(y_c) − ∇ log π(y_r)) where policy and reference agree."""
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    dpo.dpo(chosen, rejected, 0.3).sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.15] * 3)
    assert rejected.grad.tolist() == pytest.approx([0.15] * 3)


def tensors(rows, pad=0):
    sides = ("chosen", "rejected")
    tokens, mask = common.collate([common.answer_ids(row, s) for row in rows for s in sides])
    tokens, mask = F.pad(tokens, (0, pad), value=common.PAD), F.pad(mask, (0, pad))
    return tokens.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


def alone(model, row, side):
    """log π(y|x) of one answer, unpadded, token by token; EOS is one of them."""
    prompt = common.chat(row["prompt"])
    ids = prompt + common.encode(row[side]) + [common.EOS]
    with torch.no_grad():
        logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(logp[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


def test_response_logprobs_are_sums_over_the_response_eos_included(tiny, pairs):
    """A mean for the sum; prompt or padding counted; EOS left out; sides mixed."""
    model, rows = tiny(), pairs(7)
    found = dpo.response_logprobs(model, *tensors(rows)).tolist()
    for row, logps in zip(rows, found):
        expected = [alone(model, row, side) for side in ("chosen", "rejected")]
        assert logps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_padding_and_the_order_of_pairs_change_no_gradient(tiny, pairs, name):
    def gradient(rows, pad):
        policy, reference = tiny(0), tiny(1)
        batch = tensors(rows, pad)
        with torch.no_grad():
            ref = dpo.response_logprobs(reference, *batch)
        ratios = dpo.response_logprobs(policy, *batch) - ref
        dpo.LOSSES[name](*ratios.unbind(1), 0.1).mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    rows = pairs(6)
    first, second = gradient(rows, 0), gradient(rows[::-1], 9)
    assert (first - second).abs().max() < 1e-5 * first.abs().max()


@pytest.mark.parametrize(
    ("flags", "loss"),
    [("", math.log(2)), ("--label-smoothing 0.2", math.log(2)), ("--loss hinge", 1.0),
     ("--loss ipo --beta 0.5", 1.0)],
)  # fmt: skip
def test_every_batch_starts_from_the_reference(call, flags, loss):
    """With lr 0 policy = reference for an epoch: a loss other than step 0's says that the
    cached reference log-probs are those of another row."""
    rows = call(dpo, f"{TINY} --steps 8 --lr 0 --out new {flags}")
    assert [float(row["loss"]) for row in rows] == pytest.approx([loss] * 8, abs=2e-5)
    assert all(abs(float(row["margin"])) < 1e-5 for row in rows)


def test_cached_reference_logprobs_are_those_recomputed_row_by_row(call, runs, capsys):
    """A stale, truncated or misplaced cache: over one epoch at lr 0 the logged implicit
    rewards must average to β (log π − log π_ref) of each answer alone."""
    keys = ("prompt", "chosen", "rejected")
    train, _ = common.split(common.read_jsonl(runs / "comparisons/comparisons.jsonl", keys))
    n = len(train) // 8 * 8  # whole batches, so that their mean is the rows' mean
    rows = call(dpo, f"{TINY} --lr 0 --init other --pairs {n} --steps {n // 8} --out new")
    assert "starts away from the reference" in capsys.readouterr().out
    common.seed_all(0)
    random.shuffle(train)  # --pairs takes the first n of this order
    policy, reference = (common.load_model(runs / m, "lm", CPU) for m in ("other", "sft"))
    for side in keys[1:]:
        gaps = [alone(policy, row, side) - alone(reference, row, side) for row in train[:n]]
        found = sum(float(row[f"reward_{side}"]) for row in rows) / len(rows)
        assert found == pytest.approx(0.3 * sum(gaps) / n, abs=1e-3)
        logp = sum(float(row[f"{side}_logp"]) for row in rows) / len(rows)
        assert logp == pytest.approx(
            sum(alone(policy, r, side) for r in train[:n]) / n, abs=1e-2
        )


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_a_run_learns_and_repeats_itself(repeats, runs, moved, name):
    """A loss that is ascended, a reference that is trained along."""
    rows = repeats(dpo, f"{TINY} --steps 24 --lr 0.002 --nll 0.1 --loss {name}")
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert float(rows[-1]["margin"]) > 0.1
    assert moved()[:2] == [True, False]  # policy, reference
    assert common.is_done(runs / "new")


def test_a_policy_that_differs_at_step_0_without_reason_stops_the_run(tiny, capsys):
    """Policy and reference through different code: log-ratios that should be 0 are not."""
    policy, reference, off = tiny(), tiny(), torch.tensor([0.0, 2e-4])
    dpo.check_start(off / 4, off / 4, 0.69, dpo.Config(), policy, reference)
    with pytest.raises(SystemExit):
        dpo.check_start(off, off, 0.69, dpo.Config(), policy, reference)
    assert "step 0" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    assert "step 2: the loss is nan" in diverges(dpo, TINY, "smoothed", 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--estimator rloo", "unrecognized arguments: --estimator rloo"),
        ("--beta -0.1", "--beta -0.1: a number ≥ 1e-06 is needed"),
        ("--beta 0", "--beta 0.0: a number ≥ 1e-06 is needed"),
        ("--loss kto", "invalid choice: 'kto'"),
        ("--label-smoothing 0.5", "labels flipped half the time say nothing"),
        ("--init nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--ref nowhere", "nowhere/model.pt is not there; make it with: python"),
        ("--comparisons nowhere", "nowhere/comparisons.jsonl is not there"),
        ("--init reward_model", "holds a reward model, and a policy is needed"),
        ("--data nowhere.jsonl", "nowhere.jsonl:0: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags, says):
    assert says in refused(dpo, flags)
