"""rejection_sampling.py: selection, what is imitated, every flag and column, whole runs."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny as world
import torch
from tiny import NAMES, PROMPTS

import common
import rejection_sampling as rs
from common import ASSISTANT, EOS, USER

TINY = "--prompts 6 --samples 3 --steps 3 --batch 4 --max-new-tokens 3"
CPU = torch.device("cpu")
R = torch.tensor([[1.0, 3, 3], [9, 0, 9], [2, 2, 2], [-5, -4, -9]])  # ties in three rows


# ------------------------------------------------------------------------------- the maths


def test_best_per_prompt_with_ties_to_the_first():
    """The best prompt of each column; a tie that goes to the last; one row or column."""
    assert rs.top_per_prompt(R).tolist() == [1, 0, 0, 1]
    assert rs.top_per_prompt(R[:1]).tolist() == [1]  # M = 1
    assert rs.top_per_prompt(R[:, :1]).tolist() == [0, 0, 0, 0]  # N = 1


def test_best_k_of_all_with_ties_to_the_lower_index():
    """The k worst; a sort that is not stable; k of each prompt; more than there are."""
    assert rs.top_k_overall(R, 5).tolist() == [3, 5, 1, 2, 6]
    assert rs.top_k_overall(R, 12).tolist() == [3, 5, 1, 2, 6, 7, 8, 0, 4, 10, 9, 11]
    assert rs.top_k_overall(R[:1], 1).tolist() == [1]  # M = 1
    assert rs.top_k_overall(R[:, :1], 4).tolist() == [1, 2, 0, 3]  # N = 1
    assert rs.top_k_overall(torch.zeros(50, 40), 2000).tolist() == list(range(2000))
    for k in (0, 13):
        with pytest.raises(ValueError, match="top_k"):
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


def test_imitation_loss_is_the_mean_over_tokens():
    """A mean of row means; a `count` that is not what the sum is divided by."""
    logprobs = torch.tensor([[0.0, -1, -2, -3], [-9, -5, -9, -9]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    assert rs.imitation_loss(logprobs, mask).item() == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert rs.imitation_loss(logprobs, mask, 5).item() == pytest.approx((1 + 2 + 3 + 5) / 5)


# -------------------------------------------------------------------- the enumerable world

POLICY = world.transformer(1)
RANDOM = torch.Generator().manual_seed(0)
REWARDS = {
    "no_ties": torch.randn(3, 40, generator=RANDOM, dtype=torch.float64),
    "ties": torch.randint(4, (3, 40), generator=RANDOM).double(),
    "all_tie": torch.zeros(3, 40, dtype=torch.float64),
}


def law(n: int, p: torch.Tensor, r: torch.Tensor, longest: int) -> torch.Tensor:
    """The law of what the script keeps, summed over all n-tuples: (K,), (K,) -> (K,)."""
    which = world.tuples(n, longest)
    cfg = rs.Config(samples=n, select="per_prompt")
    kept = which.flatten()[rs.select(cfg, r[which])]
    rows = torch.arange(len(which))
    assert torch.equal(kept, which[rows, rs.top_per_prompt(r[which])])
    return torch.zeros_like(p).index_add(0, kept, p[which].prod(1))


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(("n", "longest"), [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_the_best_of_n_has_its_exact_law(n, longest, rewards):
    """The worst picked, the wrong row picked, a tie that favours some completion; the bound
    log n − (n − 1)/n of the KL is kept, and is not what it equals when rewards tie."""
    bound = math.log(n) - (n - 1) / n
    for logp, r in zip(world.logp(POLICY, longest=longest).detach(), REWARDS[rewards]):
        p, r = logp.exp(), r[: len(logp)]
        found = law(n, p, r, longest)
        assert (found - world.best_of(n, p, r)).abs().max() < 1e-10
        kl = (found * (found.clamp(min=1e-300) / p).log()).sum()
        assert kl <= bound + 1e-10
        if rewards == "all_tie":
            assert kl.abs() < 1e-10


def test_imitation_descends_to_the_law_that_was_selected():
    """Prompt or padding counted in the loss: at the exact law of what is selected, the loss
    is the cross-entropy per token, −E log π(y|x) / E |y|."""
    rows = world.everything()
    with torch.no_grad():
        logp = world.logp(POLICY)
        laws = [world.best_of(4, q.exp(), r) for q, r in zip(logp, REWARDS["ties"])]
        weight = torch.stack(laws).flatten()[:, None]
        logprobs = common.token_logprobs(POLICY, rows.tokens)  # of the prompt as well
        found = rs.imitation_loss(logprobs, rows.response_mask * weight)
        lengths = torch.tensor([len(y) for y in world.completions()] * 3)
        exact = -(weight.flatten() * logp.flatten()).sum() / (weight.flatten() * lengths).sum()
    assert abs(found - exact) < 1e-10


@pytest.mark.parametrize("rule", ["per_prompt", "random"])
def test_main_imitates_the_law_of_the_best_of_n(
    rule, double, steps, closing, monkeypatch, tmp_path
):
    """What the whole script trains on, 1200 answers as sampled, EOS and PAD (here a word) among
    them, has the exact law of the best of 3, and of the control that of the policy (χ²): not
    the answers of another prompt, not the sampler's with the reward of another row, not text
    encoded again, which has no specials. The step's gradient is the enumerated one."""
    monkeypatch.setattr(common, "load_run", lambda *_: world.nearby(POLICY, 0.0))
    monkeypatch.setattr(common, "load_reward", lambda *_: world.Table(REWARDS["ties"]))
    monkeypatch.setattr(common, "check_inputs", lambda *_: None)
    monkeypatch.setattr(common, "read_prompts", lambda *_: (NAMES, NAMES))
    monkeypatch.setattr(common, "chat", world.chat)
    flags = dict(prompts=1200, samples=3, steps=1, batch=1200, max_new_tokens=3, seed=1)
    rs.main(rs.Config(select=rule, runs=str(tmp_path), device="cpu", **flags))
    tokens, mask = steps[0].tokens, steps[0].mask
    prompt = mask.long().argmax(1) - 2  # their lengths are 2, 3 and 4
    order = prompt.argsort(stable=True)
    assert prompt.bincount().tolist() == [400] * 3
    for x, ids in zip(prompt.tolist(), tokens.tolist()):
        assert ids[: len(PROMPTS[x])] == PROMPTS[x]
    logp = world.logp(POLICY)
    p = logp.detach().exp()
    exact = torch.stack([world.best_of(3, *row) for row in zip(p, REWARDS["ties"])])
    laws = {"per_prompt": exact, "random": p}
    answers = SimpleNamespace(tokens=tokens[order], response_mask=mask[order])
    assert world.fits(answers, laws.pop(rule)) > 1e-3
    assert world.fits(answers, *laws.values()) < 1e-6  # so it would show
    kept = world.number(tokens, mask)
    loss = -logp[prompt, kept].sum() / mask.sum()
    assert world.apart(steps[0].gradient, world.gradient(loss, POLICY)) < 1e-10


# ----------------------------------------------------------------- a whole script, by hand


@pytest.fixture
def sampled(monkeypatch):
    """What common.generate was given, and gave: prompts, limit, temperature, the policy's
    weights at that time; answers as (prompt text, prompt ids, response ids, finished)."""
    calls, honest = [], common.generate

    def generate(model, prompts, limit, temperature=1.0):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        rollout = honest(model, prompts, limit, temperature)
        rows = zip(prompts, rollout.tokens.tolist(), rollout.response_mask.tolist())
        answers = [
            (common.decode(x), x, [i for i, on in zip(ids, mask) if on], end)
            for (x, ids, mask), end in zip(rows, rollout.finished.tolist())
        ]
        found = dict(limit=limit, temperature=temperature, weights=weights, answers=answers)
        calls.append(SimpleNamespace(**found))
        return rollout

    monkeypatch.setattr(common, "generate", generate)
    return calls


@pytest.fixture
def stopping(runs, tiny):
    """The policies of `runs` anew, with EOS likely enough that answers are of many lengths."""
    for seed, name in enumerate(("sft", "other")):
        model = tiny(seed)
        with torch.no_grad():
            model.embed.weight[EOS] *= 6
        common.save_model(runs / name, model, {})


def value(prompt, text):
    return len(prompt) / 4 + sum(text.encode()) % 97 / 97


@pytest.fixture
def scored(tmp_path):
    """--reward FILE.py:r, `value`: the prompt's length and the answer's bytes. :against is its
    negative."""
    file = tmp_path / "mine.py"
    file.write_text("def r(x, y):\n    return [len(a) / 4 + sum(b.encode()) % 97 / 97"
                    " for a, b in zip(x, y)]\n"
                    "def against(x, y):\n    return [-z for z in r(x, y)]\n")  # fmt: skip
    return f"{file}:r"


@pytest.fixture
def mine(tmp_path):
    """--data: 40 prompts in another alphabet. Returns the file, and those held out."""
    prompts = [f"где {'же ' * (i % 3)}{i}?" for i in range(40)]
    lines = "".join(json.dumps({"prompt": x}) + "\n" for x in prompts)
    (tmp_path / "mine.jsonl").write_text(lines)
    return tmp_path / "mine.jsonl", [x for x in prompts if common.held_out(x)]


def kept(runs, name="new"):
    lines = (runs / name / "selected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def token_logp(model, prompt, answer):
    """log π(y_t | x, y_<t) of an answer, the slow way: unpadded, alone."""
    logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
    return torch.stack([logp[len(prompt) + t - 1, i] for t, i in enumerate(answer)])


def token_mean(model, answers):
    parts = [token_logp(model, prompt, answer) for _, prompt, answer, _ in answers]
    return -torch.cat(parts).mean()


def chosen(rule, rewards, n, k):
    """Flat indices of what is kept, by hand."""
    if rule == "top_k":
        return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[:k]
    groups = [range(i, i + n) for i in range(0, len(rewards), n)]
    return [max(group, key=lambda i: (rewards[i], -i)) for group in groups]


@pytest.mark.parametrize(
    ("rule", "own"), [("per_prompt", False), ("per_prompt", True), ("top_k", False)]
)
def test_every_column_and_the_weights_by_hand(
    rule, own, call, runs, double, stopping, closing, sampled, scored, mine
):
    """A column of metrics.csv that is something else, or of other samples; answers imitated
    that were not selected, or encoded again from their text; a second round that samples from
    the old policy, imitates old answers, or goes on with the old optimizer or learning rate;
    a held-out prompt answered; a flag that does not arrive: --prompts, --samples, --select,
    --top-k, --rounds, --steps, --lr, --temperature, --max-new-tokens, --data, --reward,
    --init, --ref."""
    flags = f"--prompts 5 --samples 4 --select {rule} --top-k 7 --rounds 2 --steps 2 --batch 99"
    flags += f" --lr 0.005 --temperature 3 --max-new-tokens 6 --init other --reward {scored}"
    table = call(rs, f"{flags} --out new" + f" --data {mine[0]}" * own)
    policy, reference = (common.load_model(runs / x, "lm", CPU) for x in ("other", "sft"))
    asked, lines, again = [], [], 0
    assert (len(sampled), len(table)) == (2, 4)
    for i, call in enumerate(sampled):
        assert (call.limit, call.temperature) == (6, 3)
        for name, weight in policy.named_parameters():
            torch.testing.assert_close(call.weights[name], weight, rtol=0, atol=1e-9)
        answers = call.answers
        asked += [answer[0] for answer in answers[::4]]
        assert [answer[0] for answer in answers] == [x for x in asked[-5:] for _ in range(4)]
        assert all(x == [USER, *common.encode(text), ASSISTANT] for text, x, _, _ in answers)
        rows = [(text, common.decode(ids), end) for text, _, ids, end in answers]
        rewards, gold = (
            [value(*row[:2]) for row in rows],
            [common.gold_reward(*x) for x in rows],
        )
        best = chosen(rule, rewards, 4, 7)
        keys = ("prompt", "completion", "completion_finished")
        lines += [dict(zip(keys, rows[j]), reward=rewards[j], round=i) for j in best]
        again += sum([*common.encode(rows[j][1]), 0] != answers[j][2] for j in best)
        kl = 0.0
        for _, x, ids, _ in answers:
            kl += (token_logp(policy, x, ids) - token_logp(reference, x, ids)).sum().item() / 20
        mean = {"round": i, "reward": sum(rewards) / 20, "gold": sum(gold) / 20, "kl": kl}
        for key, numbers in (("selected_reward", rewards), ("selected_gold", gold)):
            mean[key] = sum(numbers[j] for j in best) / len(best)
        optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0)
        for step in range(2):
            row, lr = table[2 * i + step], 0.005 * (2 - step) / 2
            loss = token_mean(policy, [answers[j] for j in best])
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([weight.grad.flatten() for weight in policy.parameters()]).norm()
            assert norm < common.MAX_NORM
            optimizer.step()
            by_hand = mean | {"step": 2 * i + step, "loss": loss.item(), "lr": lr}
            by_hand["grad_norm"] = norm.item()
            for key in ("gold", "selected_gold") if own else ():
                assert row.pop(key) == ""
                del by_hand[key]
            assert {k: float(v) for k, v in row.items()} == pytest.approx(by_hand, rel=2e-5)
    assert again > 5  # else ids and text would be the same thing
    assert kept(runs) == lines
    assert len(set(asked)) == 10
    held = mine[1] if own else [x for x in common.QUESTIONS if common.held_out(x)]
    assert not set(held) & set(asked)
    cfg, names, reward, reward_name, prompts, device = closing[0]
    assert prompts == held
    assert names == ["sft", "other", "new"]
    assert reward_name == scored
    new = common.load_model(runs / "new", "lm", CPU)
    for name, weight in new.named_parameters():
        torch.testing.assert_close(weight, policy.get_parameter(name), rtol=0, atol=1e-9)


def test_every_token_weighs_the_same(
    call, runs, double, stopping, steps, closing, sampled, scored
):
    """A batch that divides by its own tokens or by its rows; a constant that forgets that the
    last batch is smaller, or is left from the round before; --batch that does not arrive. The
    mean gradient over an epoch's batches is that of the token mean of all that was selected."""
    flags = "--prompts 21 --samples 2 --rounds 2 --steps 3 --batch 8 --max-new-tokens 9"
    call(rs, f"{flags} --reward {scored} --out new")
    policy, counts = common.load_model(runs / "sft", "lm", CPU), []
    for part, call in zip((steps[:3], steps[3:]), sampled):
        rewards = [value(row[0], common.decode(row[2])) for row in call.answers]
        best = [call.answers[i] for i in chosen("per_prompt", rewards, 2, 0)]
        whole = token_mean(policy, best)
        exact = world.gradient(whole, policy)
        assert sorted(len(step.mask) for step in part) == [5, 8, 8]
        assert sum(step.loss for step in part) / 3 == pytest.approx(whole.item(), abs=1e-10)
        assert world.apart(sum(step.gradient for step in part) / 3, exact) < 1e-10
        own = [step.mask.sum() for step in part]
        other = sum(step.gradient * sum(own) / 3 / n for step, n in zip(part, own)) / 3
        assert world.apart(other, exact) > 0.01  # so the difference would show
        counts.append(sum(own))
    assert counts[0] != counts[1]


def test_rewards_stand_in_their_prompts_row(tiny, scored):
    """R transposed, or rows shifted where a batch of 512 ends; a KL of some samples only,
    inverted, or per token."""
    policy, reference = tiny(), tiny(1)
    prompts = [f"{'x' * i}?" for i in range(1, 11)]
    cfg = rs.Config(samples=70, max_new_tokens=2)  # 700 rows: 7 prompts, then 3
    reward = common.load_reward(cfg, scored, CPU)
    answers, ids, found, gold, kl = rs.sample_and_score(cfg, prompts, policy, reference, reward)
    assert found.shape == gold.shape == (10, 70)
    assert [a["prompt"] for a in answers] == [p for p in prompts for _ in range(70)]
    again = [value(a["prompt"], a["completion"]) for a in answers]
    torch.testing.assert_close(found.flatten(), torch.tensor(again))
    assert gold.isnan().all()
    total = 0.0
    with torch.no_grad():
        for (prompt, answer), row in zip(ids, answers):
            assert prompt == common.chat(row["prompt"])
            ratio = token_logp(policy, prompt, answer) - token_logp(reference, prompt, answer)
            total += ratio.sum().item()
    assert kl.item() == pytest.approx(total / 700, rel=1e-4)


def test_the_control_is_blind_and_another_seed_is_another_draw(call, runs, closing, scored):
    """A control that looks at the reward, as it does if the rules are mixed up; --seed that
    does not arrive."""
    flags = f"{TINY} --select random --temperature 2 --out"

    def texts(name):
        return [(row["prompt"], row["completion"]) for row in kept(runs, name)]

    call(rs, f"{flags} for --reward {scored}")
    call(rs, f"{flags} against --reward {scored[:-1]}against")
    call(rs, f"{flags} seed_1 --reward {scored} --seed 1")
    assert texts("for") == texts("against") != texts("seed_1")
    assert [row["reward"] for row in kept(runs, "for")] == pytest.approx(
        [-row["reward"] for row in kept(runs, "against")]
    )


# ------------------------------------------------------------------------------- whole runs


def test_a_run_starts_at_no_kl_and_repeats_itself(repeats, runs, scored, moved):
    """KL to oneself is exactly 0; a round that does not sample from the improved policy; what
    is selected must be readable by sft.py --data."""
    rows = repeats(rs, f"{TINY} --rounds 2 --reward {scored} --lr 0.01")
    assert [row["round"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert [float(row["kl"]) != 0 for row in rows] == [False] * 3 + [True] * 3
    assert all(float(row["selected_reward"]) > float(row["reward"]) for row in rows)
    assert moved()[:2] == [True, False]  # policy, reference
    made = kept(runs)
    assert [row["round"] for row in made] == [0] * 6 + [1] * 6
    found = common.read_jsonl(runs / "new/selected.jsonl", ("prompt", "completion"))
    assert found == [row for row in made if row["completion"].strip()]


@pytest.mark.parametrize("rule", ["per_prompt", "random", "top_k --top-k 7"])
def test_every_rule_runs_on_a_reward_model(call, runs, rule, moved, sampled, tiny):
    """--reward that is not the run that it names, or is trained along; a rule that keeps
    another number of answers."""
    common.save_model(runs / "mine", tiny(7, "scalar"), {})
    rows = call(rs, f"{TINY} --out new --reward mine --select {rule}")
    assert moved()[:3] == [False, True, False]  # reward model, policy, reference
    judge = common.load_model(runs / "mine", "scalar", CPU)
    with torch.no_grad():
        r = [
            judge(torch.tensor([x + ids]))[0, -1].item() for _, x, ids, _ in sampled[0].answers
        ]
    assert float(rows[0]["reward"]) == pytest.approx(sum(r) / 18, rel=1e-4)
    assert len(kept(runs)) == (7 if "top_k" in rule else 6)
    if rule != "random":
        best = [r[i] for i in chosen(rule.split()[0], r, 3, 7)]
        assert [row["reward"] for row in kept(runs)] == pytest.approx(best, abs=1e-5)


def test_no_prompt_is_asked_again_before_all_were(call, closing, sampled, scored, mine):
    """A round that begins with the prompts of the round before, or draws with replacement."""
    n = (40 - len(mine[1])) // 2
    flags = f"--prompts {n} --samples 1 --rounds 2 --steps 1 --max-new-tokens 2 --out new"
    call(rs, f"{flags} --data {mine[0]} --reward {scored}")
    asked = [prompt for made in sampled for prompt, *_ in made.answers]
    assert len(set(asked)) == len(asked) == 2 * n


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    assert "step 2" in diverges(rs, TINY, "imitation_loss", 3)


def test_a_reward_model_with_a_shorter_context(refused, runs, tiny):
    """Answers that its context cannot hold: a traceback."""
    common.save_model(runs / "short", tiny(3, "scalar", context=9), {})
    assert "short" in refused(rs, f"{TINY} --reward short --out new")


def test_a_reference_with_a_shorter_context(call, runs, tiny, monkeypatch):
    """What fits into the policy's context, and not into the reference's."""
    common.save_model(runs / "short", tiny(3, context=20), {})
    honest = common.read_prompts

    def read_prompts(data, room, context):
        assert context == 20
        return honest(data, room, context)

    monkeypatch.setattr(common, "read_prompts", read_prompts)
    rows = call(rs, f"{TINY} --prompts 30 --max-new-tokens 9 --ref short --out new")
    assert rows


@pytest.mark.parametrize(
    "flags",
    [
        "--sample 3",
        "--select best",
        "--select top_k --top-k 19",  # of 18 answers
        "--temperature 0",
        "--init nowhere",
        "--init reward_model",
        "--ref nowhere",
        "--reward sft",
        "--reward nowhere",
        "--reward nowhere.py:r",
        "--data nowhere.jsonl",
        "--max-new-tokens 155",  # of a context of 160
        "--out reward_model",
        "--init other --out other",
    ],
)
def test_a_wrong_command_line_is_refused(refused, flags):
    """A flag that is ignored; what is wrong said after training, or over many lines."""
    refused(rs, f"{TINY} {flags}")
