"""dpo.py: every loss and its optimum, the reference, every flag and column, whole runs."""

import json
import math
import random

import pytest
import tiny as world
import torch
import torch.nn.functional as F
from tiny import NAMES, PROMPTS
from torch import Tensor

import common
import dpo
from common import ASSISTANT, EOS, USER

TINY = "--steps 4 --batch 8 --max-new-tokens 3"
CPU = torch.device("cpu")
SIDES = ("chosen", "rejected")


# ------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize(
    ("name", "h", "beta", "eps", "loss"),
    [  # σ(ln 3) = 3/4; IPO asks for a gap of 1/(2τ) = 2
        ("dpo", 2 * math.log(3), 0.5, 0.1, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),
        ("ipo", 5.0, 0.25, 0.1, 0.9 * 9 + 0.1 * 49),
        ("hinge", -2.0, 0.25, 0.2, 0.8 * 1.5 + 0.2 * 0.5),
        ("dpo", -1000.0, 0.5, 0.0, 500.0),  # log(sigmoid(x)) would be −inf
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


def test_a_hinge_is_done_at_its_gap():
    """A hinge that goes on pushing pairs apart, or that is done before h = 1/β."""
    h = torch.tensor([3.0, 4.0, 9.0], requires_grad=True)
    loss = dpo.hinge(h, torch.zeros(3), 0.25)
    loss.sum().backward()
    assert loss.tolist() == [0.25, 0, 0]
    assert h.grad.tolist() == [-0.25, 0, 0]


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


# -------------------------------------------------------------------- the enumerable world

TWO = 2  # at most two tokens: 13 completions, 156 ordered pairs per prompt
N = len(world.completions(TWO))
START = world.transformer(8, channels=16, hidden=32, layers=1)
R = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = (~torch.eye(N).bool()).nonzero().T  # all ordered pairs
PREFERRED = torch.sigmoid(R[:, FIRST] - R[:, SECOND])  # P(first ≻ second), Bradley-Terry


def minimised(policy, loss, gradient: float = 1e-6) -> None:
    """L-BFGS to the end: what the loss is least at, with no optimizer to blame."""
    until = dict(max_iter=400, tolerance_grad=gradient, tolerance_change=0)
    optimizer = torch.optim.LBFGS(policy.parameters(), line_search_fn="strong_wolfe", **until)

    def closure():
        optimizer.zero_grad()
        value = loss(policy)
        value.backward()
        return value

    optimizer.step(closure)


def pairwise(name: str, beta: float):
    """The loss of all ordered pairs of all prompts, with their exact soft labels."""
    rows = world.listed([(x, y) for x in PROMPTS for y in world.completions(TWO) for _ in "cr"])
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    with torch.no_grad():
        ref_logprobs = dpo.response_logprobs(START, tokens, mask)

    def loss(policy):
        ratios = dpo.response_logprobs(policy, tokens, mask) - ref_logprobs
        h = ratios[:, 0].view(3, N)  # each completion stands twice, as its own pair
        return dpo.LOSSES[name](h[:, FIRST], h[:, SECOND], beta, 1 - PREFERRED).mean()

    return loss


def total_variation(policy, target: Tensor) -> float:
    p = world.logp(policy, longest=TWO).exp()
    return (0.5 * (p - target.exp()).abs().sum(1).max()).item()


def test_dpo_on_exact_preferences_reaches_the_optimal_policy():
    """Chosen and rejected swapped, no reference, β in the wrong place: π* is elsewhere."""
    policy = world.nearby(START, 0.1)
    minimised(policy, pairwise("dpo", 1.0))
    best, _ = world.optimum(world.logp(START, longest=TWO), R, 1.0)
    assert total_variation(START, best) > 0.1
    assert total_variation(policy, best) < 1e-3


def test_ipo_on_exact_preferences_reaches_its_own_fixed_point():
    """log π/π_ref (y|x) = mean over y′ of (2 P(y ≻ y′) − 1)/(2τ), up to a constant, y′ = y
    counted as 0: IPO's is not π*."""
    policy, tau = world.nearby(START, 0.1), 0.5
    minimised(policy, pairwise("ipo", tau))
    gap = torch.zeros(3, N, dtype=torch.float64).index_add(1, FIRST, 2 * PREFERRED - 1)
    gap = gap / N / (2 * tau)
    fixed = (world.logp(START, longest=TWO) + gap).log_softmax(1)
    best, _ = world.optimum(world.logp(START, longest=TWO), R, tau)
    assert total_variation(policy, fixed) < 1e-3
    assert total_variation(policy, best) > 0.01


@pytest.mark.parametrize(
    ("name", "beta", "eps", "known"),
    [("ipo", 0.4, 0.2, (1 - 2 * 0.2) / (2 * 0.4)), ("ipo", 0.4, 0.0, 1 / 0.8),
     ("dpo", 0.4, 0.2, math.log(0.8 / 0.2) / 0.4), ("dpo", 1.0, 0.05, math.log(19.0))],
)  # fmt: skip
def test_one_pair_stops_at_its_known_gap(name, beta, eps, known):
    """IPO: h* = (2p − 1)/(2τ); smoothed DPO: h* = ln((1 − ε)/ε)/β. ε on the wrong side turns
    the sign. The slope there is 0, and a Transformer trained on the pair stops there."""
    h = torch.tensor([known], dtype=torch.float64, requires_grad=True)
    dpo.LOSSES[name](h, torch.zeros(1), beta, eps).sum().backward()
    assert h.grad.abs().item() < 1e-10
    pair = [(PROMPTS[1], y) for y in ((1, 2, 0), (3,))]
    policy, rows = world.nearby(START), world.listed(pair)
    tokens, mask = rows.tokens[None], rows.response_mask[None]
    ref_logprobs = dpo.response_logprobs(START, tokens, mask).detach()

    def gap(policy):
        return (dpo.response_logprobs(policy, tokens, mask) - ref_logprobs).unbind(1)

    minimised(policy, lambda policy: dpo.LOSSES[name](*gap(policy), beta, eps).mean(), 1e-13)
    chosen, rejected = gap(policy)
    assert (chosen - rejected).item() == pytest.approx(known, abs=1e-6)


def test_response_logprobs_are_the_enumerated_ones():
    """Prompt or padding counted, EOS or a PAD that was said left out, a mean for the sum."""
    rows = world.everything()
    tokens, mask = (part.unflatten(0, (-1, 2)) for part in (rows.tokens, rows.response_mask))
    found = dpo.response_logprobs(START, tokens, mask).view(3, 40)
    assert (found - world.logp(START)).abs().max() < 1e-10


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_what_train_descends_in_the_enumerable_world(
    name, double, steps, monkeypatch, tmp_path
):
    """No reference in the ratio, or that of another row; prompt or padding counted; an NLL
    per answer, not per token, or with the wrong sign: the loss and gradient of train's own
    step, on all ordered pairs, are the enumerated ones."""
    made, policy = world.completions(TWO), world.nearby(START, 0.1)
    ids = lambda row, side: (world.chat(row["prompt"]), list(made[row[side]]))  # noqa: E731
    monkeypatch.setattr(common, "answer_ids", ids)
    pairs = list(zip(FIRST.tolist(), SECOND.tolist()))
    rows = [dict(prompt=x, chosen=c, rejected=r) for x in NAMES for c, r in pairs]
    flags = dict(loss=name, beta=0.7, label_smoothing=0.1, nll=0.2, init="near")
    cfg = dpo.Config(runs=str(tmp_path), steps=1, batch=len(rows), **flags)
    dpo.train(cfg, policy, START, rows)
    logp = world.logp(policy, longest=TWO)
    h = logp - world.logp(START, longest=TWO).detach()
    h = h[:, FIRST] - h[:, SECOND]
    one = {
        "dpo": lambda h: (1 + (-0.7 * h).exp()).log(),
        "ipo": lambda h: (h - 1 / 1.4) ** 2,
        "hinge": lambda h: (1 - 0.7 * h).clamp(min=0),
    }[name]
    nll = -(logp / torch.tensor([len(y) for y in made]))[:, FIRST].mean()
    exact = (0.9 * one(h) + 0.1 * one(-h)).mean() + 0.2 * nll
    assert abs(steps[0].loss - exact) < 1e-10
    assert world.apart(steps[0].gradient, world.gradient(exact, policy)) < 1e-10


# -------------------------------------------------------------------------- pairs as tensors


def tensors(rows, pad=0):
    tokens, mask = common.encode_pairs(rows, CPU)
    return F.pad(tokens, (0, pad), value=common.PAD), F.pad(mask, (0, pad))


def token_logps(model, row, side):
    """log π(y_t | x, y_<t) of one answer, unpadded, alone; EOS is its last token, unless it
    was cut off."""
    prompt = [USER, *common.encode(row["prompt"]), ASSISTANT]
    answer = [*common.encode(row[side]), *[EOS] * row.get(f"{side}_finished", True)]
    logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return torch.stack([logp[len(prompt) + t - 1, i] for t, i in enumerate(answer)])


def test_response_logprobs_are_sums_over_each_answer_of_a_pair(tiny, pairs):
    """Sides mixed by a reshape; EOS left out, or there where the answer was cut off."""
    model, rows = tiny(), pairs(7)
    rows[3]["chosen_finished"] = False
    found = dpo.response_logprobs(model, *tensors(rows)).tolist()
    for row, logps in zip(rows, found):
        expected = [token_logps(model, row, side).sum().item() for side in SIDES]
        assert logps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_padding_and_the_order_of_pairs_change_no_gradient(tiny, pairs, name):
    """Losses that depend on who else is in the batch."""

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


# ----------------------------------------------------------------- a whole script, by hand


@pytest.fixture
def mine(tmp_path):
    """--data: 40 pairs in another alphabet. Returns the file and its rows."""
    rows = [{"prompt": f"где {i}?", "chosen": "там" + "!" * (i % 4), "rejected": "нет" * (i % 3)
             or "-"} for i in range(40)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.jsonl", rows


def one(name, beta, eps, h):
    loss = {
        "dpo": lambda h: (1 + (-beta * h).exp()).log(),
        "ipo": lambda h: (h - 1 / (2 * beta)) ** 2,
        "hinge": lambda h: (1 - beta * h).clamp(min=0),
    }[name]
    return (1 - eps) * loss(h) + eps * loss(-h)


def by_hand(policy, reference, rows, name="dpo", beta=0.3, eps=0.0, weight=0.0):
    """What a batch of these rows descends, and its columns."""
    logps = [[token_logps(policy, row, side) for side in SIDES] for row in rows]
    sums = torch.stack([torch.stack([c.sum(), r.sum()]) for c, r in logps])
    with torch.no_grad():
        ref = [[token_logps(reference, row, side).sum() for side in SIDES] for row in rows]
    chosen, rejected = (sums - torch.tensor(ref)).unbind(1)
    loss = one(name, beta, eps, chosen - rejected).mean()
    nll = -torch.stack([c.mean() for c, _ in logps]).mean()
    columns = dict(loss=loss, nll=nll, margin=beta * (chosen - rejected).mean())
    columns |= dict(reward_chosen=beta * chosen.mean(), reward_rejected=beta * rejected.mean())
    columns |= dict(accuracy=(chosen > rejected).float().mean())
    columns |= dict(chosen_logp=sums[:, 0].mean(), rejected_logp=sums[:, 1].mean())
    return loss + weight * nll, {key: value.item() for key, value in columns.items()}


@pytest.mark.parametrize(
    ("own", "flags", "means"),
    [
        (True, "", ("dpo", 0.3, 0.0, 0.0)),
        (False, "--loss ipo --beta 0.7 --label-smoothing 0.2", ("ipo", 0.7, 0.2, 0.0)),
        (False, "--loss hinge --beta 0.05 --nll 0.6", ("hinge", 0.05, 0.0, 0.6)),
    ],
)
def test_every_column_and_the_weights_by_hand(
    own, flags, means, call, runs, double, closing, mine
):
    """A column of metrics.csv that is something else, as a gradient's norm after clipping,
    which the second of these needs; a held-out pair trained on; a reference that is the policy,
    or moves with it; a flag that does not arrive, or with the wrong sign: --loss, --beta,
    --label-smoothing, --nll, --steps, --lr, --data, --init, --ref; a learning rate that does
    not fall to 0: three steps of all pairs, as AdamW alone takes them."""
    file, rows = mine
    train = world.parted(rows if own else world.judged(runs))[0]
    flags += f" --data {file}" if own else ""
    table = call(dpo, f"{flags} --init other --steps 3 --batch 99 --lr 0.003 --out new")
    policy, reference = (common.load_model(runs / x, "lm", CPU) for x in ("other", "sft"))
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0)
    assert len(table) == 3
    for step, row in enumerate(table):
        loss, columns = by_hand(policy, reference, train, *means)
        columns |= {"step": step, "lr": 0.003 * (3 - step) / 3}
        optimizer.param_groups[0]["lr"] = columns["lr"]
        optimizer.zero_grad()
        loss.backward()
        grads = [weight.grad for weight in policy.parameters()]
        columns["grad_norm"] = torch.cat([g.flatten() for g in grads]).norm().item()
        for g in grads:
            g *= min(1, 100 / (columns["grad_norm"] + 1e-6))
        optimizer.step()
        assert {k: float(v) for k, v in row.items()} == pytest.approx(columns, rel=2e-5)
    new = common.load_model(runs / "new", "lm", CPU)
    for name, weight in new.named_parameters():
        torch.testing.assert_close(weight, policy.get_parameter(name), rtol=0, atol=1e-9)


def test_every_batch_by_hand(call, runs, double, steps, closing):
    """Reference log-probs of other rows; --batch that does not arrive; pairs that come
    twice in an epoch, or never: an epoch of minibatches, the last of them smaller."""
    train = world.parted(world.judged(runs))[0]
    n = math.ceil(len(train) / 8)
    assert len(train) % 8
    flags = "--label-smoothing 0.2 --nll 0.6 --init other"
    call(dpo, f"{flags} --steps {n} --batch 8 --out new")
    policy, reference = (common.load_model(runs / x, "lm", CPU) for x in ("other", "sft"))
    known, seen = {tuple(row[k] for k in ("prompt", *SIDES)): row for row in train}, []
    assert [len(step.mask) for step in steps].count(8) == n - 1
    for step in steps:
        rows = [known[pair] for pair in world.pair_texts(step)]
        seen += rows
        loss, _ = by_hand(policy, reference, rows, "dpo", 0.3, 0.2, 0.6)
        assert step.loss == pytest.approx(loss.item(), abs=1e-10)
        assert world.apart(step.gradient, world.gradient(loss, policy)) < 1e-10
    key = lambda row: row["prompt"]  # noqa: E731
    assert sorted(seen, key=key) == sorted(train, key=key)


@pytest.mark.parametrize(
    ("flags", "loss"),
    [("", math.log(2)), ("--label-smoothing 0.2", math.log(2)), ("--loss hinge", 1.0),
     ("--loss ipo --beta 0.25", 4.0)],
)  # fmt: skip
def test_every_batch_starts_from_the_reference(call, runs, pairs, closing, flags, loss):
    """With lr 0 policy = reference for an epoch: a loss other than step 0's (ln 2, 1/(4τ²), 1)
    says that the reference log-probs are those of another row, or of another model."""
    lines = "".join(json.dumps(row) + "\n" for row in pairs(400))
    common.write(runs / "many/comparisons.jsonl", lines)
    rows = call(dpo, f"--steps 6 --batch 64 --lr 0 --comparisons many --out new {flags}")
    assert {float(row["accuracy"]) for row in rows} == {0}  # no margin is > 0
    assert [float(row["loss"]) for row in rows] == pytest.approx([loss] * 6, abs=2e-5)
    assert all(abs(float(row["margin"])) < 1e-5 for row in rows)


def test_pairs_come_from_all_files_alike(call, steps, closing, runs, pairs):
    """--pairs that takes the first file's only, or that is ignored; a second file that is not
    read; a held-out pair trained on."""
    second = [row | {"chosen": "green."} for row in pairs(100)]
    lines = "".join(json.dumps(row) + "\n" for row in second)
    common.write(runs / "second/comparisons.jsonl", lines)
    both = "--comparisons comparisons,second --out new --batch 20"
    call(dpo, f"{both} --pairs 60 --steps 6")
    epochs = [sum(map(world.pair_texts, part), []) for part in (steps[:3], steps[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 60
    known = [
        {(row["prompt"], row["chosen"], row["rejected"]) for row in world.parted(some)[0]}
        for some in (world.judged(runs), second)
    ]
    of_second = len(set(epochs[0]) & known[1])
    assert len(set(epochs[0]) & known[0]) + of_second == 60
    assert 60 * 0.45 < of_second < 60 * 0.75  # 100 of 164 pairs
    steps.clear()
    call(dpo, f"{both} --steps 8")
    assert {pair for step in steps for pair in world.pair_texts(step)} == known[0] | known[1]


def test_missing_comparisons_are_answers_of_init(
    call, steps, closing, runs, pairs, monkeypatch
):
    """Comparisons collected from π_ref instead of --init, or as many as they happen to be; a
    file that is there collected anew; random numbers used up on the way; a seed ignored."""
    made = []

    def collect(policy, n, path):
        made.append((policy.embed.weight.clone(), n, path))
        torch.rand(3), random.random()
        common.write(path, "".join(json.dumps(row) + "\n" for row in pairs(50)))

    monkeypatch.setattr(common, "collect_comparisons", collect)
    flags, metrics = (
        f"{TINY} --init other --comparisons fresh --out new",
        runs / "new/metrics.csv",
    )
    call(dpo, flags)
    other = common.load_model(runs / "other", "lm", CPU)
    assert [(n, path) for _, n, path in made] == [
        (common.PAIRS, runs / "fresh/comparisons.jsonl")
    ]
    assert torch.equal(made[0][0], other.embed.weight)
    first = metrics.read_bytes()
    call(dpo, flags)
    assert len(made) == 1
    assert metrics.read_bytes() == first
    call(dpo, f"{flags} --seed 1")
    assert metrics.read_bytes() != first


@pytest.mark.parametrize("own", [False, True])
def test_the_closing_table_asks_held_out_prompts(own, call, closing, steps, mine, runs):
    """A table of training prompts; a table without π_ref, or what it started from."""
    file, rows = mine
    call(dpo, f"{TINY} --ref other --out new" + f" --data {file}" * own)
    cfg, names, reward, reward_name, prompts, device = closing[0]
    held = [x for x in common.QUESTIONS if common.held_out(x)]
    assert prompts == ([row["prompt"] for row in world.parted(rows)[1]] if own else held)
    assert names == ["other", "sft", "new"]
    assert reward_name == "reward_model"


# ------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_a_run_learns_and_repeats_itself(repeats, runs, moved, name):
    """A loss that is ascended, a reference that is trained along, a seed that is not set."""
    rows = repeats(dpo, f"{TINY} --steps 24 --lr 0.002 --nll 0.1 --loss {name}")
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert float(rows[-1]["margin"]) > 0.1
    assert moved()[:2] == [False, True]  # reference, policy
    common.load_model(runs / "new", "lm", CPU)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("same", [True, False])
def test_a_policy_that_differs_at_step_0_without_reason_stops_the_run(
    same, side, call, files, monkeypatch, closing
):
    """Policy and reference through different code: log-ratios that should be 0 are not, of one
    side alone, or both alike, which no loss shows. Another --init may differ."""
    honest, before = dpo.response_logprobs, files()

    def planted(model, *given):
        off = torch.zeros(2)
        off[side] = -2e-4 if any(p.requires_grad for p in model.parameters()) else 0.0
        return honest(model, *given) + off

    monkeypatch.setattr(dpo, "response_logprobs", planted)
    if same:
        with pytest.raises(SystemExit) as stopped:
            call(dpo, f"{TINY} --out new")
        assert stopped.value.code == 1
        assert files() == before
    else:
        assert len(call(dpo, f"{TINY} --init other --out new")) == 4


def test_a_loss_that_is_not_finite_stops_the_run(diverges, monkeypatch):
    """NaN that is stepped on, skipped in silence, or saved."""
    monkeypatch.setattr(dpo, "LOSSES", {"dpo": lambda *given: dpo.dpo(*given)})
    assert "step 2" in diverges(dpo, TINY, "dpo", 3)


def test_a_reference_with_a_shorter_context(call, runs, tiny, monkeypatch):
    """What fits into the policy's context, and not into the reference's."""
    common.save_model(runs / "short", tiny(3, context=26), {})
    read, honest = [], common.comparisons
    monkeypatch.setattr(common, "comparisons", lambda *x: read.append(x[1]) or honest(*x))
    call(dpo, f"{TINY} --ref short --out new")
    assert read == [26]


@pytest.mark.parametrize(
    "flags",
    [
        "--estimator rloo",
        "--beta -0.1",
        "--beta 0",
        "--loss kto",
        "--label-smoothing 0.5",
        "--nll -1",
        "--init nowhere",
        "--ref nowhere",
        "--init nowhere --comparisons missing",
        "--init reward_model",
        "--data nowhere.jsonl",
        "--data nowhere.jsonl --comparisons other",
        "--out sft",
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags):
    """A flag that is ignored; what is wrong said after training, or over many lines."""
    refused(dpo, f"{TINY} {flags}")
