r"""Plant known bugs, one at a time, each in a copy of the project, and see which test notices.

    python tests/studies/bugs.py                  a quarter of an hour on one core
    python tests/studies/bugs.py --only "dpo.py"  those with this in their line

A bug of BUGS is a line, and below it what is planted:

    what goes wrong | file function or class.method | where it was seen | tests, if others
        lambda …    takes the place of the function, which it may call as `old`
        a => b      replaces the regular expression a, which must match once in the function

Either survives a rewrite around it; what a function takes, and what it is for, is all that most
of them know. "Seen" is an issue, a paper or a repository where code had this bug, or `–`. The
tests are those of the bug's own file unless the line names others, as `sft` for test_sft.py.

The tests must pass on the project as it is. A bug that no test fails on has survived; one that
does not fit the code, or with which it only crashes, says nothing. Both end with exit code 1.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]

BUGS = r"""
# tokens, the template and masks
the prompt is trained on like the answer | common.py collate | – | sft
    lambda rows, device=None: (lambda tokens, mask: (
    tokens, mask.flip(1).cumsum(1).flip(1) > 0))(*old(rows, device))

masks are made from != PAD | common.py collate | trl#976 | sft
    lambda rows, device=None: (lambda tokens, mask: (tokens, mask & (tokens != PAD)))(
    *old(rows, device))

nobody learns to stop: EOS is never trained on | common.py answer_ids | trl#976 | sft
    lambda row, key="completion": old(row | {f"{key}_finished": False}, key)

a cut answer is trained on as if it had ended | common.py answer_ids | OpenRLHF#238 | common
    lambda row, key="completion": old(row | {f"{key}_finished": True}, key)

the template forgets the assistant's turn | common.py chat | trl#1073 | sft
    lambda prompt: old(prompt)[:-1]

kept answers are encoded anew | common.py response_ids | trl#1073 | rejection_sampling
    lambda rollout: [encode(decode(ids)) + [EOS] for ids in old(rollout)]

# the Transformer, its cache and its tree of prefixes
log-probs have seen the token itself | common.py token_logprobs | PaLM-rlhf#31 | sft
    lambda model, tokens, mask=None: (1 if mask is None else mask) * model(
    tokens).log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]

the critic has seen the action | common.py token_values | – | ppo
    lambda critic, tokens, mask=None: critic(tokens) * (1 if mask is None else mask)

a token sees the next one | common.py Transformer.forward | minGPT#75
    triu\((\w+) \+ 1\) => triu(\1 + 2)

positions start again at 0 behind the cache | common.py Transformer.forward | torchtune#959
    (\w+) \+ (\w+ % \w+) => \2

beginnings that only EOS tells apart are one | common.py prefix_tree | –
    lambda tokens, keep: old(tokens.masked_fill(tokens == EOS, -1), keep)

dropout while training | common.py Block.forward | trl#744 | ppo
    F\.silu\((\w+)\) => F.dropout(F.silu(\1), 0.1)

# sampling
an answer cut at the limit counts as finished | common.py generate | trl#3750
    lambda *given, **more: (lambda r: Rollout(
    r.tokens, r.response_mask, r.finished | True, r.logprobs))(old(*given, **more))

rollouts at temperature 0.9, scored at 1 | common.py generate | trl#3169 | ppo
    lambda model, prompts, max_new_tokens, temperature=0.9: old(
    model, prompts, max_new_tokens, temperature)

unlikely tokens are never sampled, as with top-p | common.py generate | NeMo-Aligner#46
    = (\w+)\.cumsum\(-1\) => = F.threshold(\1, 0.02, 0.0).cumsum(-1)

one draw for all rows: N answers are the same one | common.py generate | –
    torch\.rand\((\w+), (.*?)\)\.to => torch.rand(1, \2).repeat(\1, 1).to

# log-probs and scores of many rows; steps
rows come back in the order of their length | common.py in_passes | –
    \[\w+\.argsort\(\)\] =>

the score is read at a PAD | common.py score | transformers#35352 | reward_model
    lambda model, tokens, response_mask: old(model, tokens, response_mask.cumsum(1) > 0)

rows of like length share a batch | common.py minibatches | –
    torch\.randperm\(len\((\w+)\)\) => (lambda order:
    order[mask[order].flatten(1).sum(1).argsort(stable=True)])(torch.randperm(len(\1)))

gradients of the step before are left | common.py descend | – | sft
    \w+\.zero_grad\(\) => pass

Adam is made anew for each step | common.py descend | – | ppo
    lambda loss, model, optimizer, lr: old(loss, model, adam(model), lr)

gradients are always clipped | common.py descend | – | sft
    , MAX_NORM\) => , 1e-2)

the learning rate does not fall | sft.py train | –
    \* \(1 - (\w+) / (\w+)\) =>

# instruction tuning, the base model, the data
a mean of row means: short answers weigh more | sft.py sft_loss | nanochat#59
    lambda logprobs, mask: -((logprobs * mask).sum(1) / mask.sum(1)).mean()

held-out rows train too | common.py split | – | sft
    lambda rows, own: (rows, old(rows, own)[1])

a held-out question trains behind another greeting | data/zoo.py without_opening | –
    lambda prompt: prompt

annotators are never wrong | data/zoo.py prefers | –
    lambda prompt, a, b: gold_reward(prompt, *a) > gold_reward(prompt, *b)

pairs of equal answers are kept | common.py read_jsonl | rlhf-book#503
    "rejected" in \w+ and => False and

# runs
a loss of NaN is skipped in silence | common.py Run.log | –
    not math\.isfinite\(\w+\) => False

a seed for torch, none for Python | common.py seed_all | – | dpo
    lambda seed: torch.manual_seed(seed)

# the reward model
chosen and rejected the wrong way round | reward_model.py bradley_terry_loss | –
    lambda chosen, rejected, margin=0.0: old(rejected, chosen, margin)

policy and critic share a trunk | common.py scalar_copy | transformers#31467 | ppo
    lambda model: (lambda copy: (setattr(copy, "blocks", model.blocks), copy)[1])(old(model))

# rejection sampling
R is filled by columns | rejection_sampling.py train | –
    \.view\((\w+\.prompts), (\w+\.samples)\) => .view(\2, \1).T

the control prefers what scores well | rejection_sampling.py random_per_prompt | rlhf-book#350
    lambda rewards, generator=None: torch.multinomial(
    rewards.softmax(1), 1, generator=generator)[:, 0]

# DPO
chosen and rejected the wrong way round | dpo.py dpo | –
    lambda chosen, rejected, beta, label_smoothing=0.0: old(
    rejected, chosen, beta, label_smoothing)

no π_ref in the log-ratio | dpo.py train | DPO#34
    = \((\w+) - \w+\)\.unbind => = \1.unbind

log π of an answer is a mean over tokens | dpo.py response_logprobs | DPO#40
    lambda model, tokens, mask: old(model, tokens, mask) / mask.sum(-1)

IPO aims at a gap of 1/τ | dpo.py ipo | –
    lambda chosen, rejected, beta, label_smoothing=0.0: old(
    chosen, rejected, beta / 2, label_smoothing)

--label-smoothing does not arrive | dpo.py train | trl#1655
    , \w+\.label_smoothing =>

the NLL is that of the rejected answer | dpo.py train | –
    \[:, 0\] / (\w+)\[:, 0\] => [:, 1] / \1[:, 1]

logged rewards lack their β | dpo.py measure | –
    lambda beta, *given: old(1.0, *given)

# PPO: the return
the log-ratio of the KL is inverted | ppo.py response_return | rlhf-book#489
    lambda score, logprobs, ref_logprobs, response_mask, beta: old(
    score, ref_logprobs, logprobs, response_mask, beta)

KL is a mean over tokens | ppo.py response_return | trl#3104
    lambda score, logprobs, ref_logprobs, response_mask, beta: old(
    score, *(x / response_mask.sum(1, keepdim=True) for x in (logprobs, ref_logprobs)),
    response_mask, beta)

gae: the score lands one token early | ppo.py token_rewards | trl#1893
    == 1 => == 2

a reader's reward is given answers as prompts | common.py load_reward | –
    "prompts", "completions" => "completions", "prompts"

# PPO: the advantage
rloo: the baseline holds the sample itself | ppo.py rloo | –
    lambda returns, n: old(returns, n) * (n - 1) / n

grpo: the std of the whole batch | ppo.py grpo | open-r1#239
    lambda returns, n: rloo(returns, n) * (n - 1) / n / returns.std(correction=0)

gae: the critic's targets lack its own V | ppo.py gae | trl PR#1536
    lambda *given: (lambda advantages, _: (advantages, advantages))(*old(*given))

advantages are whitened | ppo.py estimate_advantages | lm-human-preference-details
    lambda *given: (lambda A, targets: ((A - A.mean()) / A.std(), targets))(*old(*given))

answers to a prompt do not stand together | ppo.py train | –
    \[(\w+) for \1 in (\w+) for _ in range\((.*?)\)\] => [\1 for _ in range(\3) for \1 in \2]

V starts as noise | ppo.py main | trl#1783
    torch\.nn\.init\.zeros_\(.*?\) => pass

# PPO: the update
ρ is 1 for ever: old log-probs are those of now | ppo.py policy_loss | torchforge#571
    lambda logprobs, old_logprobs, *given: old(logprobs, logprobs.detach(), *given)

the clip is split by the sign of A | ppo.py surrogate | –
    lambda logprobs, old_logprobs, advantages, clip: (lambda free, clipped: (torch.where(
    advantages < 0, torch.max(free, clipped), torch.min(free, clipped)), clipped < free))(
    *((logprobs - old_logprobs).exp().clamp(low, high) * advantages
    for low, high in ((0, None), (1 - clip, 1 + clip))))

a mean over each answer's tokens | ppo.py aggregate | arXiv 2503.20783
    lambda per_token, mask: ((per_token * mask).sum(1) / mask.sum(1)).mean()

a minibatch has the advantages of other rows | ppo.py train | –
    (\w+)\[(\w+)\], (\w+)\[\2\]\n => \1[\2], \3[: len(\2)]\n

the reference moves with the policy | ppo.py train | trl#1340
    lambda cfg, policy, reference, *given: old(cfg, policy, policy, *given)

# PPO: what is logged
J is logged without its KL | ppo.py measure | –
    lambda *given: (lambda row: row | {"J": row["reward"]})(old(*given))

every ρ outside of 1 ± ε counts as clipped | ppo.py surrogate | –
    lambda logprobs, old_logprobs, advantages, clip: (
    old(logprobs, old_logprobs, advantages, clip)[0],
    (((logprobs - old_logprobs).exp() - 1).abs() > clip) & (advantages == advantages))

the trace shows r of other answers | ppo.py trace | –
    lambda *given: (lambda found: found | {"answers": [y | {"r": other["r"]}
    for y, other in zip(found["answers"], found["answers"][::-1])]})(old(*given))

# tables and the report
the table's KL is to the run itself | common.py evaluate | –
    lambda policy, reference, *given, **more: old(policy, policy, *given, **more)

a tie is won | common.py win_rate | –
    lambda gold, other: (gold[:, :, None] >= other[:, None, :]).float().mean()

the standard error takes all answers as independent | common.py standard_error | –
    lambda values, groups: old(values, list(range(len(groups))))

best-of-n: a tie has a winner | tools/report.py best_of_n | arXiv 2401.01879
    lambda r, n: old(r.argsort(dim=1, stable=True).argsort(1), n)

π* with β upside down | tools/report.py frontier | –
    / (\w+)\)\.softmax => * \1).softmax
"""


def read(text: str) -> list[dict[str, str]]:
    """BUGS, parsed."""
    bugs = []
    for block in re.split(r"\n\s*\n", re.sub("(?m)^#.*", "", text).strip()):
        line, *planted = block.strip().split("\n")
        name, place, seen, *tests = (part.strip() for part in line.split(" | "))
        file, function = place.split()
        tests = tests[0].split() if tests else [Path(file).stem]
        found = dict(name=name, place=place, file=file, function=function, seen=seen)
        found |= dict(line=line, planted=" ".join(x.strip() for x in planted))
        bugs.append(found | {"tests": [f"tests/test_{x}.py" for x in tests]})
    return bugs


def edited(source: str, function: str, planted: str) -> str:
    """The source of a file with the bug in it. ValueError if it does not fit."""
    nodes, name = [ast.parse(source)], function.split(".")
    for part in name:
        nodes += [x for x in nodes[-1].body if getattr(x, "name", None) == part]
    if len(nodes) != 1 + len(name):
        raise ValueError(f"there is no {function}")
    lines = source.splitlines(keepends=True)
    if planted.startswith("lambda"):
        end = nodes[1].end_lineno  # behind the function, or behind its class
        added = f"\n\n{function} = (lambda old: {planted})({function})\n\n"
        return "".join([*lines[:end], added, *lines[end:]])
    start, end = nodes[-1].lineno - 1, nodes[-1].end_lineno
    pattern, _, by = (part.strip() for part in planted.partition("=>"))
    text, n = re.subn(pattern, by, "".join(lines[start:end]))
    if n != 1:
        raise ValueError(f"{n} × {pattern}")
    return "".join([*lines[:start], text, *lines[end:]])


def fails(folder: Path, tests: list[str]) -> tuple[str, str] | None:
    """The first test that fails in a copy of the project, and why; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    # pytest cuts the lines of its summary to the terminal
    env = os.environ | {"COLUMNS": "999", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *tests], cwd=folder, capture_output=True, text=True, env=env
    )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*?\])?(?: - (.*))?$", done.stdout, re.M)
    return (found[1], found[2] or "") if found else ("pytest", done.stdout[-300:])


def copied(folder: str) -> Path:
    """A copy of the project."""
    unneeded = shutil.ignore_patterns(".*", "runs*", "__pycache__", "*.png", "studies")
    return shutil.copytree(ROOT, Path(folder) / "project", ignore=unneeded)


CRASHES = ("NameError", "AttributeError", "TypeError", "SyntaxError", "ImportError")


def plant(bug: dict) -> tuple[bool, str]:
    """(was it caught, by what) of a bug."""
    with tempfile.TemporaryDirectory() as folder:
        path = copied(folder) / bug["file"]
        try:
            path.write_text(edited(path.read_text("utf-8"), bug["function"], bug["planted"]))
        except ValueError as error:
            return False, f"DOES NOT APPLY: {error}"
        found = fails(Path(folder) / "project", bug["tests"])
    if found is None:
        return False, f"SURVIVED {' '.join(bug['tests'])}"
    test, why = found
    test = test.removeprefix("tests/")
    if test == "pytest" or why.startswith(CRASHES):
        return False, f"CRASHES in {test}: {why}"
    return True, f"`{test}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs with this in their line")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    cfg = parser.parse_args()
    bugs = [bug for bug in read(BUGS) if cfg.only in bug["line"]]
    with tempfile.TemporaryDirectory() as folder:
        tests = sorted({test for bug in bugs for test in bug["tests"]})
        if found := fails(copied(folder), tests):
            sys.exit(f"without any bug, {found[0]} fails: {found[1]}")
    caught = 0
    print("| what goes wrong | where | seen in | caught by |\n|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(cfg.jobs) as pool, tqdm(total=len(bugs), disable=None) as bar:
        for bug, (hit, by) in zip(bugs, pool.map(plant, bugs)):
            caught += hit
            row = f"| {bug['name']} | `{bug['place']}` | {bug['seen']} | {by} |"
            bar.write(row, file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    print(f"\n{caught} of {len(bugs)} caught")
    sys.exit(caught != len(bugs))


if __name__ == "__main__":
    main()
