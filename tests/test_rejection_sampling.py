"""rejection_sampling.py: selection, what is imitated, two rounds by hand, whole runs."""

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
from data import zoo

TINY = "--prompts 6 --samples 3 --steps 3 --batch 4 --max-new-tokens 3"
CPU = torch.device("cpu")
R = torch.tensor([[1.0, 3, 3], [9, 0, 9], [2, 2, 2], [-5, -4, -9]])  # ties in three rows


def test_best_per_prompt_with_ties_to_the_first():
    """The best prompt of each column; a tie that goes to the last."""
    assert rs.top_per_prompt(R).tolist() == [1, 0, 0, 1]


def test_best_k_of_all_with_ties_to_the_lower_index():
    """The k worst; a sort that is not stable; k of each prompt."""
    assert rs.top_k_overall(R, 5).tolist() == [3, 5, 1, 2, 6]
    assert rs.top_k_overall(R, 12).tolist() == [3, 5, 1, 2, 6, 7, 8, 0, 4, 10, 9, 11]
    assert rs.top_k_overall(torch.zeros(50, 40), 2000).tolist() == list(range(2000))


def test_select_gives_flat_indices():
    """Column j of row i is answer i·N + j, not i·M + j; rules mixed up; a control that prefers
    a place, looks at the reward, or keeps another number; answers that random_k keeps twice."""
    assert rs.select("per_prompt", R, 5).tolist() == [1, 3, 6, 10]
    assert rs.select("top_k", R, 4).tolist() == [3, 5, 1, 2]
    torch.manual_seed(0)
    places = torch.arange(12)
    for rule, n in ("random", 4), ("random_k", 5):
        draws = torch.stack([rs.select(rule, R, 5) for _ in range(1200)])
        assert all(len(set(draw)) == n for draw in draws.tolist())
        shares = (draws[..., None] == places).double().mean((0, 1)) * n  # of each answer
        assert (shares - n / 12).abs().max() < 4.5 * (n / 12 * (1 - n / 12) / 1200) ** 0.5
        if rule == "random":
            assert (draws // 3 == torch.arange(4)).all()  # one answer to each prompt


POLICY = world.transformer(1)
RANDOM = torch.Generator().manual_seed(0)
REWARDS = {
    "no_ties": torch.randn(3, 40, generator=RANDOM, dtype=torch.float64),
    "ties": torch.randint(4, (3, 40), generator=RANDOM).double(),
    "all_tie": torch.zeros(3, 40, dtype=torch.float64),
}


@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize(("n", "longest"), [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_the_best_of_n_has_its_exact_law(n, longest, rewards):
    """The worst picked, the wrong row picked, a tie that favours some completion, summed over
    all n-tuples; the bound log n − (n − 1)/n of the KL is kept, and is not what it equals when
    rewards tie."""
    for logp, r in zip(world.logp(POLICY, longest=longest).detach(), REWARDS[rewards]):
        p, r, which = logp.exp(), r[: len(logp)], world.tuples(n, longest)
        kept = which.flatten()[rs.select("per_prompt", r[which], 1)]
        law = torch.zeros_like(p).index_add(0, kept, p[which].prod(1))
        assert (law - world.best_of(n, p, r)).abs().max() < 1e-10
        kl = (law * (law.clamp(min=1e-300) / p).log()).sum()
        assert kl <= math.log(n) - (n - 1) / n + 1e-10
        assert rewards != "all_tie" or kl.abs() < 1e-10


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


@pytest.fixture
def sampled(monkeypatch):
    """What common.generate was given, and gave: limit, temperature, the policy's weights at
    that time; answers as (prompt text, prompt ids, response ids, finished)."""
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
        common.save_model(runs / name, model)


def value(prompt, text):
    return len(prompt) / 4 + sum(text.encode()) % 97 / 97


@pytest.fixture
def scored(tmp_path):
    """--reward FILE.py:r, which is `value` of each row."""
    text = "from test_rejection_sampling import value\n"
    text += "def r(prompts, completions): return list(map(value, prompts, completions))"
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path}/mine.py:r"


def chosen(rule, rewards):
    """Flat indices of what is kept, by hand: of 5 prompts × 4 answers, or the best 5."""
    best_first = sorted(range(20), key=lambda i: (-rewards[i], i))
    if rule == "top_k":
        return best_first[:5]
    return [next(i for i in best_first if i // 4 == row) for row in range(5)]


@pytest.mark.parametrize(("rule", "own"), [("per_prompt", False), ("top_k", True)])
def test_two_rounds_by_hand(
    rule, own, call, runs, double, stopping, closing, sampled, scored, mine, drawn, slow,
    monkeypatch,
):  # fmt: skip
    """A second round that samples from the old policy, asks the prompts of the first, imitates
    old answers, or goes on with the old optimizer, rate or batches; a column that is something
    else, or of other samples, as of the last batch alone; answers imitated that were not
    selected, or encoded again from their text; kept answers of one round only; a held-out
    prompt answered; a flag that does not arrive: --prompts, --samples, --select, --top-k,
    --rounds, --steps, --batch, --lr, --temperature, --max-new-tokens, --data, --reward, --init,
    --ref; a table of training prompts, or without π_ref or the start."""
    monkeypatch.setattr(common, "ROLLOUT", 4 * 2 * 25)  # several batches of answers a round
    if not own:  # a gold reward that tells these answers apart
        monkeypatch.setattr(zoo, "gold_reward", lambda x, y, end: len(x + y) % 7 - 3.0 * end)
    flags = f"--prompts 5 --samples 4 --select {rule} --top-k 5 --rounds 2 --steps 3 --batch 3"
    flags += f" --lr 0.005 --temperature 3 --max-new-tokens 6 --init other --reward {scored}"
    table = call(rs, f"{flags} --out new" + f" --data {mine[0]}" * own)
    policy, reference = (common.load_model(runs / x, "lm", CPU) for x in ("other", "sft"))
    asked, lines, again = [], [], 0
    assert (len(table), len(drawn)) == (6, 6)
    for number in range(2):
        answers, batches = [], 0
        while len(answers) < 20:
            one, batches = sampled.pop(0), batches + 1
            assert (one.limit, one.temperature) == (6, 3)
            for name, weight in policy.named_parameters():
                torch.testing.assert_close(one.weights[name], weight, rtol=0, atol=1e-7)
            answers += one.answers
        assert (len(answers), batches > 1) == (20, True)
        asked += [answer[0] for answer in answers[::4]]
        assert [answer[0] for answer in answers] == [x for x in asked[-5:] for _ in range(4)]
        assert all(x == [USER, *common.encode(text), ASSISTANT] for text, x, *_ in answers)
        rows = [(text, common.decode(ids), end) for text, _, ids, end in answers]
        rewards = [value(*row[:2]) for row in rows]
        gold = [zoo.gold_reward(*row) for row in rows]
        best = chosen(rule, rewards)
        keys = ("prompt", "completion", "completion_finished")
        lines += [dict(zip(keys, rows[j]), reward=rewards[j]) for j in best]
        again += sum([*common.encode(rows[j][1]), EOS] != answers[j][2] for j in best)
        with torch.no_grad():
            gaps = [slow.logp(policy, *x[1:3]) - slow.logp(reference, *x[1:3]) for x in answers]
        means = {"round": number, "reward": sum(rewards) / 20, "gold": sum(gold) / 20}
        means["kl"] = torch.cat(gaps).sum().item() / 20
        means["selected_reward"] = sum(rewards[j] for j in best) / 5
        means["selected_gold"] = sum(gold[j] for j in best) / 5
        if own:
            means |= {"gold": None, "selected_gold": None}
        assert sorted(drawn[0] + drawn[1]) == sorted(answers[j][1:3] for j in best)
        take = slow.descent(policy, 0.005, 3)
        for step in range(3):
            numbers = means | take(slow.token_mean(policy, drawn.pop(0)))
            slow.same(table.pop(0), numbers | {"step": 3 * number + step})
    assert sampled == []
    assert again > 5  # else ids and text would be the same thing
    saved = (runs / "new/selected.jsonl").read_text()
    assert [json.loads(line) for line in saved.splitlines()] == lines
    assert not own or "где" in saved  # to be read
    slow.same_weights(runs / "new", policy)
    assert len(set(asked)) == 10
    file, _, rows = mine
    held = list(dict.fromkeys(row["prompt"] for row in rows)) if own else zoo.HELD_OUT_PROMPTS
    assert not set(held) & set(asked)
    cfg, names, reward, reward_name, prompts, device = closing[0]
    assert (names, prompts) == (["sft", "other", "new"], held)
    assert reward_name.endswith("mine.py:r")
    rollout = world.listed([([1, 5], (7, 0))])
    assert reward(["prompt"], rollout).item() == pytest.approx(
        value("prompt", common.decode([7]))
    )


def test_a_reward_model_is_the_one_that_is_named(call, runs, sampled, slow, tiny, closing):
    """--reward that is not the run that it names."""
    common.save_model(runs / "mine", tiny(7, "scalar"))
    rows = call(rs, f"{TINY} --out new --reward mine")
    judge = common.load_model(runs / "mine", "scalar", CPU)
    with torch.no_grad():
        r = [slow.score(judge, x, ids).item() for _, x, ids, _ in sampled[0].answers]
    assert float(rows[0]["reward"]) == pytest.approx(sum(r) / 18, rel=1e-4)
    best = [max(r[i : i + 3]) for i in range(0, 18, 3)]
    assert float(rows[0]["selected_reward"]) == pytest.approx(sum(best) / 6, rel=1e-4)
    assert closing[0][3] == "mine"


def test_every_round_and_every_seed_draws_anew(call, closing, sampled, scored, runs):
    """A generator that starts again in each round; --seed that does not arrive. One prompt is
    enough."""
    (runs / "mine.jsonl").write_text('{"prompt": "где?"}')
    flags = "--prompts 1 --samples 6 --rounds 2 --steps 1 --lr 0 --max-new-tokens 3 --out new"
    for seed in (0, 1):
        call(rs, f"{flags} --data {runs}/mine.jsonl --reward {scored} --seed {seed}")
    assert len({str(made.answers) for made in sampled}) == len(sampled) == 4


def test_one_seed_one_result_whatever_had_to_be_made(repeats, closing, runs, tiny, monkeypatch):
    """Random numbers used up by making the reward model shift those of the sampling; all
    answers kept, which is as many as there are, refused."""
    (runs / "reward_model/model.pt").unlink()
    model = tiny(2, "scalar")

    def make(cfg, name):
        torch.manual_seed(9)
        common.save_model(runs / name, model)

    monkeypatch.setattr(common, "make", make)
    repeats(rs, f"{TINY} --rounds 2 --select random_k --top-k 18")


def test_a_loss_that_is_not_finite_stops_the_run(diverges):
    """NaN that is stepped on, skipped in silence, or saved."""
    assert "step 2" in diverges(rs, TINY, "imitation_loss", 3)


@pytest.mark.parametrize("flags", ["--select best", "--select top_k --top-k 19",
                                   "--select random_k --top-k 19", "--temperature 0",
                                   "--max-new-tokens 158"])  # fmt: skip
def test_a_wrong_command_line_is_refused(call, stops, flags):
    """A flag that is ignored; what is wrong said after training. 18 answers, 160 tokens."""
    stops(call, rs, f"{TINY} {flags}")
