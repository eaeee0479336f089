"""The READMEs and exercises/: what they show is there, applies, runs, and does what it says."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

import common
import dpo
import ppo
from data import zoo

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {path.stem: path.read_text() for path in (ROOT / "exercises").glob("*.diff")}
COMMANDS = {
    name: re.search(r"^ +python (.*)", text, re.M)[1] for name, text in EXERCISES.items()
}
READMES = [
    ROOT / folder / "README.md" for folder in ("", "exercises", "tests", "tests/studies")
]
TINY = "--steps 2 --lr 0.003 --max-new-tokens 6"
TINY = {"ppo.py": f"{TINY} --prompts 4 --samples 4", "dpo.py": f"{TINY} --batch 8"}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_command_names_a_file_and_flags_that_exist(readme):
    """A script, a tool or a flag renamed or dropped in the code alone."""
    text = readme.read_text().replace("`", "\n").replace("|", "\n").replace("#", "\n")
    commands = re.findall(r"python (-m tools\.\w+|[\w/]+\.py)((?: \S+)*)", text)
    commands += [command.split(" ", 1) for command in COMMANDS.values()]
    for file, rest in commands:
        source = (ROOT / re.sub(r"-m tools\.(\w+)", r"tools/\1.py", file)).read_text()
        if "import runs" in source:
            source += (ROOT / "tests/studies/runs.py").read_text()
        if file.startswith("-m"):
            source += (ROOT / "tools/sample.py").read_text()
        known = {
            x.replace("_", "-") for x in re.findall(r"^    (\w+): .* = arg\(", source, re.M)
        }
        known |= set(re.findall(r'"--([a-z-]+)"', source))  # argparse
        named = set(re.findall(r" --([a-z][a-z-]*)", rest.split(";")[0]))
        assert named <= known, f"{readme}: python {file}{rest}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_link_leads_to_a_file(readme):
    """A file moved, and the link to it not."""
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text()):
        assert link.startswith("https://") or (readme.parent / link).exists(), link


@cache
def patched(name):
    """The exercise's script as a module, after git apply to a copy."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    script = COMMANDS[name].split()[0]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / script, folder)
        diff = ROOT / "exercises" / f"{name}.diff"
        subprocess.run(["git", "apply", diff], cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location(f"{name}_patched", f"{folder}/{script}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(call, monkeypatch):
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
def test_an_exercise_is_short_and_its_run_replaces_none(name):
    """A run of the recipe, or ppo or dpo, that an exercise writes over."""
    diff = EXERCISES[name].split("\n--- a/")[1]
    assert len(re.findall(r"^[-+]", diff, re.M)) - 1 <= 15  # one is the line +++
    assert COMMANDS[name].split("--out ")[1] not in ("ppo", "dpo", *common.RECIPE)


# what each changes in the first row of metrics.csv; nothing else of the rollout or the pairs
ROLLOUT = {"reward", "kl", "J", "gold", "length", "finished", "entropy", "sampler_gap", "lr"}
PAIRS = {"nll", "chosen_logp", "rejected_logp", "lr"}
CHANGED = {
    "adaptive_beta": set(),
    "batch_mean": {"policy_loss", "grad_norm"},
    "brief": {"reward", "J", "policy_loss", "value_loss"},
    "cispo": {"policy_loss"},
    "clip_higher": set(),
    "critic_from_reward_model": {"policy_loss", "value_loss"},
    "dr_grpo": {"policy_loss", "grad_norm"},
    "gspo": {"grad_norm", "ratio_max"},
    "kl_in_loss": {"policy_loss"},
    "missing_eos": {"reward", "J", "value_loss"},
    "orpo": {"loss", "grad_norm"},
    "per_batch_token": {"policy_loss", "grad_norm"},
    "per_sequence": {"policy_loss", "grad_norm"},
    "per_token": {"value_loss"},
    "simpo": {"loss", "grad_norm"},
    "whitening": {"policy_loss", "grad_norm"},
}
# far enough to show
FLAGS = {"clip_higher": "--steps 3 --lr 0.02 --epochs 4", "adaptive_beta": "--lr 0.1"}


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_an_exercise_runs_and_changes_what_it_says(name, run):
    """A script that has moved on while the exercise has not; a change without an effect, or
    with one on the rollout, where only the update was to change."""
    plain, changed = run(name, FLAGS.get(name, ""))
    same = (ROLLOUT | PAIRS) & set(plain[0]) - CHANGED[name]
    assert {k: changed[0][k] for k in same} == {k: plain[0][k] for k in same}
    assert all(changed[0][k] != plain[0][k] for k in CHANGED[name])
    assert changed[1:] != plain[1:]


R = torch.tensor([1.0, 2, -3, 4, 5, 5, 5, 9])
MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]]).bool()


def test_the_advantages_of_three_exercises():
    """A baseline of the wrong rows; V of one token taken off at another."""
    cfg, none = patched("batch_mean").Config(estimator="reinforce", samples=4), (None,) * 3
    A = patched("batch_mean").estimate_advantages(cfg, None, R, torch.zeros(8, 4), *none)[0]
    torch.testing.assert_close(A, (R - 3.5)[:, None])
    V, wanted = torch.arange(8.0).view(2, 4), torch.tensor([[1.0, 0, -1, -2], [-2, -3, -4, -5]])
    cfg.estimator = "value"
    A = patched("per_token").estimate_advantages(cfg, None, R[:2], V, *none)[0]
    torch.testing.assert_close(A, wanted)
    torch.testing.assert_close(patched("dr_grpo").grpo(R, 4), ppo.rloo(R, 4) * 3 / 4)


@pytest.mark.parametrize(
    ("name", "weights"),  # of each token in the mean, A = 1
    [
        ("per_sequence", [[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0]]),
        ("per_batch_token", [[0, 1 / 2, 1 / 2, 1 / 2], [0, 1 / 2, 0, 0]]),
        ("gspo", [[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0]]),
    ],
)
def test_the_weight_of_a_token_at_ratio_1(name, weights):
    """A = 1 and 2 in two rows: the gradient of a token is A times its weight / 2 rows."""
    module, logp = patched(name), (-2.0 * MASK).requires_grad_()
    new, old = logp, logp.detach()
    if name == "gspo":
        new, old = module.per_response(logp, MASK), module.per_response(old, MASK)
    A = torch.tensor([[1.0], [2.0]])
    module.policy_loss(new, old, A, MASK, 0.2).backward()
    torch.testing.assert_close(-logp.grad, torch.tensor(weights) * A / 2)


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("clip_higher", [0, -0.85, 1.25, 0]),  # of ρ A, off outside of 0.8 to 1.28
        ("cispo", [-0.8, -0.85, 1.2, 1.2]),  # clip(ρ) A, never off
    ],
)
def test_what_is_left_of_a_gradient_outside_the_clip(name, gradients):
    module, ratio = patched(name), torch.tensor([[0.75, 0.85, 1.25, 1.35]])
    A, logp = torch.tensor([[-1.0, -1, 1, 1]]), ratio.log().requires_grad_()
    value, off = module.surrogate(logp, torch.zeros(1, 4), A, 0.2)
    value.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([gradients]))
    assert off.tolist() == [[x == 0 for x in gradients]]


def test_kl_in_loss_without_its_price_is_the_plain_run(run):
    plain, changed = run("kl_in_loss", "--beta 0")
    assert plain == changed


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_no_reference_is_needed(name, run):
    """A log-ratio to π_ref left in the loss."""
    own, other = (run(name, f"--ref {ref}")[1] for ref in ("sft", "other"))
    assert [row["loss"] for row in own] == [row["loss"] for row in other]


def test_adaptive_beta_follows_its_rule_and_J_has_the_beta_of_its_step(run, runs):
    _, rows = run("adaptive_beta", "--steps 6 --lr 0.1")
    betas, beta = [], 0.3
    for row in rows:
        assert row["J"] == pytest.approx(row["reward"] - beta * row["kl"], rel=1e-3)
        betas.append(beta)
        beta *= 1 + 0.5 * max(-0.2, min(row["kl"] - 1, 0.2))
    assert [row["beta"] for row in rows] == pytest.approx(betas, rel=1e-4)
    assert min(betas) < 0.3 < max(betas)  # a KL of 0 lowers it at first; then far over 1


def test_a_verifiable_reward_is_three_for_the_right_fact(call):
    file = ROOT / "exercises/verifiable.py"
    call(ppo, f"{TINY['ppo.py']} --reward {file}:right --out verifiable")
    right = runpy.run_path(str(file))["right"]
    x, truth = "where does the owl live?", zoo.ANIMALS["owl"]["home"][0]
    texts = [f"the owl lives in the {place}." for place in zoo.VALUES["home"]]
    assert right([x] * len(texts), texts) == [3 * (truth in text) for text in texts]
