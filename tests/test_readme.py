"""README.md and exercises/: what they show is there, applies, runs, and does what it says."""

import importlib.util
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

import common
import dpo
import ppo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXERCISES = {path.stem: path.read_text() for path in (ROOT / "exercises").glob("*.diff")}
COMMANDS = {
    name: re.search(r"^ +python (.*)", text, re.M)[1] for name, text in EXERCISES.items()
}
TINY = "--steps 2 --lr 0.003 --max-new-tokens 6"
TINY = {"ppo.py": f"{TINY} --prompts 4 --samples 4", "dpo.py": f"{TINY} --batch 8"}


# ---------------------------------------------------------------------------------- README


def test_every_command_names_a_script_and_flags_that_exist():
    """A script, a flag or a subcommand renamed or dropped in the code alone."""
    commands = re.findall(r"python ([\w/]+\.py)((?: \S+)*)", README.replace("`", "\n"))
    commands += [command.split(" ", 1) for command in COMMANDS.values()]
    assert {"ppo.py", "dpo.py", "common.py"} <= {script for script, _ in commands}
    for script, rest in commands:
        source = (ROOT / script).read_text()
        named = set(re.findall(r" --([a-z][a-z-]*)", rest))
        if script == "common.py":
            config = getattr(common, rest.split()[0].capitalize())  # Report, Sample or Export
            known = {field.name.replace("_", "-") for field in fields(config)}
        else:
            known = set(re.findall(r'"--([a-z-]+)"', source))  # argparse, in tests/
            names = re.findall(r"^    (\w+): \w+ = arg\(", source, re.M)
            known |= {name.replace("_", "-") for name in names}
        assert named <= known | {"help"}, f"python {script}{rest}"


def test_the_table_of_exercises_is_the_folder():
    """An exercise added, renamed or dropped in one of the two."""
    header = r"^\| *exercise *\| *what changes *\| *what came out *\|\n"
    text = (ROOT / "exercises" / "README.md").read_text()
    rows = re.search(header + r"((?:\|.*\n)+)", text, re.M)[1].splitlines()[1:]
    assert sorted(re.search(r"\w+", row)[0] for row in rows) == sorted(EXERCISES)


# ------------------------------------------------------------------------------- exercises


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """patched(name): the exercise's script as a module, after git apply to a copy."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    @cache
    def load(name):
        folder, diff = tmp_path_factory.mktemp(name), ROOT / "exercises" / f"{name}.diff"
        script = COMMANDS[name].split()[0]
        shutil.copy(ROOT / script, folder)
        subprocess.run(["git", "apply", diff], cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location(f"{name}_patched", folder / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(call, patched, monkeypatch):
    """run(name, flags): the exercise's own command, tiny -> (rows as they are without the
    change, rows with it), floats. Both sample with the same random numbers, whatever was
    drawn before the first step."""
    shuffled = common.shuffled
    monkeypatch.setattr(common, "shuffled", lambda x: [torch.manual_seed(0), shuffled(x)][1])

    def both(name, flags=""):
        script, own = COMMANDS[name].split(" ", 1)
        plain = {"ppo.py": ppo, "dpo.py": dpo}[script]
        flags = f"{own} {TINY[script]} {flags}"
        return [
            [{k: float(v or 0) for k, v in row.items()} for row in call(module, flags)]
            for module in (plain, patched(name))
        ]

    return both


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_an_exercise_is_short_and_says_why_whence_how_and_what_came_out(name):
    text, diff = EXERCISES[name].split("\n--- a/")
    assert re.search(r'chapter\s"|[A-Z]\w+ et al\. 20\d\d', text, re.I)
    assert re.search(r"^Seen: \S", text, re.M)
    assert len(re.findall(r"^[-+]", diff, re.M)) - 1 <= 15  # one is the line +++
    flags = COMMANDS[name].split()
    assert flags[flags.index("--out") + 1] not in ("ppo", "dpo", "sft", "base", "reward_model")


# what each leaves as it was in the first row of metrics.csv, and what not; see the scripts
ROLLOUT = {"reward", "kl", "J", "gold", "length", "finished", "entropy", "sampler_gap"}
PAIRS = {"nll", "reward_chosen", "reward_rejected", "chosen_logp", "rejected_logp", "margin"}
CHANGED = {
    "adaptive_beta": set(),
    "batch_mean": {"policy_loss", "grad_norm"},
    "brief": {"reward", "J", "policy_loss", "value_loss"},
    "clip_higher": {"policy_loss", "clipped"},
    "critic_from_reward_model": {"policy_loss", "value_loss"},
    "dr_grpo": {"policy_loss", "grad_norm"},
    "gspo": {"policy_loss", "grad_norm", "ratio_max"},
    "kl_in_loss": {"policy_loss"},
    "per_sequence": {"policy_loss", "grad_norm"},
    "per_token": {"value_loss"},
    "simpo": {"loss", "grad_norm"},
}


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_an_exercise_runs_and_changes_what_it_says(name, run):
    """A script that has moved on while the exercise has not; a change without an effect, or
    with one on the rollout, where only the update was to change."""
    plain, changed = run(name)
    same = (ROLLOUT | PAIRS | {"lr", "start_ratio"}) & set(plain[0]) - CHANGED[name]
    assert {k: changed[0][k] for k in same} == {k: plain[0][k] for k in same}
    assert all(changed[0][k] != plain[0][k] for k in CHANGED[name])
    assert changed[1] != plain[1]


R = torch.tensor([1.0, 2, -3, 4, 5, 5, 5, 9])
MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]).bool()


def advantages(module, estimator, **batch):
    cfg = module.Config(samples=4)
    return module.estimate_advantages(estimator, cfg, Namespace(response_mask=MASK, **batch))


def test_batch_mean_is_taken_off(patched):
    A = advantages(patched("batch_mean"), "reinforce", returns=R)
    torch.testing.assert_close(A, (R - 3.5)[:, None])


def test_per_token_takes_V_off_at_every_token(patched):
    values = torch.arange(8.0).view(2, 4)
    A = advantages(patched("per_token"), "value", returns=R[:2], values=values)
    torch.testing.assert_close(A, torch.tensor([[1.0, 0, -1, -2], [-2, -3, -4, -5]]))


@pytest.mark.parametrize("name", ["per_sequence", "gspo"])
def test_long_and_short_responses_weigh_the_same(name, patched):
    """At ratio 1: A = 1 and 2, and the gradient of every token is A / (|y| · 2 rows)."""
    logp = (-2.0 * MASK).requires_grad_()
    A = torch.tensor([[1.0], [2.0]])
    patched(name).policy_loss(logp, logp.detach(), A, MASK, 0.2).backward()
    wanted = torch.tensor([[0, 1 / 6, 1 / 6, 1 / 6], [0, 1, 0, 0]])
    torch.testing.assert_close(-logp.grad, wanted)


def test_gspo_clips_a_response_as_one(patched):
    """Ratios 1.5, 1, 1: PPO drops the first token; their geometric mean, 1.14, is inside 0.2,
    and outside 0.1."""
    old = -2.0 * MASK
    logp = (old + torch.tensor([[1, 1.5, 1, 1], [1, 1, 1, 1]]).log()).requires_grad_()
    loss = patched("gspo").policy_loss
    for clip, tokens in ((0.2, [0, 1, 1, 1]), (0.1, [0, 0, 0, 0])):
        (gradient,) = torch.autograd.grad(loss(logp, old, torch.ones(2, 1), MASK, clip), logp)
        assert (gradient[0] != 0).tolist() == [bool(token) for token in tokens]


def test_dr_grpo_is_rloo_but_for_a_constant(patched):
    found = patched("dr_grpo").grpo(R, 4)
    torch.testing.assert_close(found, ppo.rloo(R, 4) * 3 / 4)


def test_clip_higher_moves_the_upper_bound_alone(patched):
    module, ratio = patched("clip_higher"), torch.tensor([[0.75, 0.85, 1.25, 1.35]])
    A = torch.tensor([[-1.0, -1, 1, 1]])
    off = [[True, False, False, True]]
    assert module.is_clipped(ratio, A, 0.2).tolist() == off
    logp, mask = ratio.log().requires_grad_(), torch.ones(1, 4).bool()
    module.policy_loss(logp, torch.zeros(1, 4), A, mask, 0.2).backward()
    assert (logp.grad == 0).tolist() == off


def test_brief_has_its_price_in_the_reward_and_in_J(run):
    plain, changed = run("brief")
    for key in ("reward", "J"):
        price = plain[0][key] - changed[0][key]
        assert price == pytest.approx(0.3 * plain[0]["length"], abs=1e-4)


def test_kl_in_loss_without_its_price_is_the_plain_run(run):
    plain, changed = run("kl_in_loss", "--beta 0")
    assert plain == changed


def test_simpo_needs_no_reference(run):
    _, own = run("simpo")
    _, other = run("simpo", "--ref other")
    assert [row["loss"] for row in own] == [row["loss"] for row in other]
    assert own[0]["reward_chosen"] != other[0]["reward_chosen"]


def test_critic_from_reward_model_starts_as_r_centred(patched, call, runs, monkeypatch):
    module = patched("critic_from_reward_model")
    critics, honest = [], module.collect

    def spy(cfg, asked, policy, reference, critic, reward):
        critics.append({k: v.clone() for k, v in critic.state_dict().items()})
        x = [(common.chat(x), []) for x in common.read_prompts(None, 24, 160)[0]]
        V = [critic(torch.tensor([ids]))[0, -1].item() for ids, _ in x[:: len(x) // 200]]
        assert abs(sum(V) / len(V)) < 0.1 * torch.tensor(V).std()
        return honest(cfg, asked, policy, reference, critic, reward)

    monkeypatch.setattr(module, "collect", spy)
    call(module, f"{TINY['ppo.py']} --out critic --steps 1")
    r = common.load_model(runs / "reward_model", "scalar", torch.device("cpu")).state_dict()
    assert critics[0].pop("offset") != r["offset"]
    assert all(torch.equal(critics[0][key], r[key]) for key in critics[0])


def test_adaptive_beta_follows_its_rule_and_J_has_the_beta_of_its_step(run, runs):
    _, rows = run("adaptive_beta", "--steps 6 --lr 0.1")
    betas, beta = [], 0.3
    for row in rows:
        assert row["J"] == pytest.approx(row["reward"] - beta * row["kl"], rel=1e-3)
        betas.append(beta)
        beta *= 1 + 0.5 * max(-0.2, min(row["kl"] - 1, 0.2))
    assert [row["beta"] for row in rows] == pytest.approx(betas, rel=1e-4)
    assert min(betas) < 0.3 < max(betas)  # a KL of 0 lowers it at first; then far over 1
    assert '"beta": 0.3' in (runs / "adaptive_beta/config.json").read_text()


def test_pip_and_uv_install_the_same():
    """A dependency added to one of the two lists."""
    pip = {re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").open()}
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*)\]$", project, re.M)[1]
    uv = {re.split("[=<>]", name.strip(' "'))[0] for name in listed.split(",")}
    assert {name.strip() for name in pip} == uv | {"pytest"}
