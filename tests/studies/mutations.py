"""Plant known bugs, one at a time, and see which exact test catches each.

    python tests/mutations.py            about three minutes on two cores; not part of CI

Each bug is an edit of one line in a copy of the project. The test named beside it is run
alone in that copy and must fail with an assertion: an import error or a crash in the code
does not count as a catch. First every test named is run on the project as it is, and passes.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSERTION = "assert", "AssertionError"

# (what went wrong, file, the line as it is, the line with the bug, the test that catches it)
BUGS = [
    (
        "KL counted as a bonus: + β KL",
        "ppo.py",
        "(score - beta * kl).detach()",
        "(score + beta * kl).detach()",
        "tests/test_exact_ppo.py::test_mean_return_is_J_and_mean_kl_is_KL",
    ),
    (
        "log-ratio of the KL inverted",
        "ppo.py",
        "((logprobs - ref_logprobs) * response_mask).sum(1)",
        "((ref_logprobs - logprobs) * response_mask).sum(1)",
        "tests/test_exact_ppo.py::test_mean_return_is_J_and_mean_kl_is_KL",
    ),
    (
        "KL averaged over tokens",
        "ppo.py",
        "kl = ((logprobs - ref_logprobs) * response_mask).sum(1)",
        "kl = ((logprobs - ref_logprobs) * response_mask).sum(1) / response_mask.sum(1)",
        "tests/test_exact_ppo.py::test_mean_return_is_J_and_mean_kl_is_KL",
    ),
    (
        "response mask shifted by one",
        "common.py",
        "response = (column >= lengths[:, None])",
        "response = (column > lengths[:, None])",
        "tests/test_exact_common.py::test_what_generate_says_of_its_samples",
    ),
    (
        "EOS dropped from the response",
        "common.py",
        "response &= eos.cumsum(1) - eos.long() == 0",
        "response &= eos.cumsum(1) == 0",
        "tests/test_exact_common.py::test_generate_samples_from_exactly_pi",
    ),
    (
        "clip split by the sign of A",
        "ppo.py",
        "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)",
        "torch.where(advantages >= 0, "
        "torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), "
        "torch.max(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages))",
        "tests/test_exact_ppo.py::test_later_updates_descend_the_clipped_surrogate",
    ),
    (
        "mean over a response's tokens for the sum",
        "ppo.py",
        "return -(surrogate * response_mask).sum(1).mean()",
        "return -((surrogate * response_mask).sum(1) / response_mask.sum(1)).mean()",
        "tests/test_exact_ppo.py::test_one_sample_estimators_ascend_J",
    ),
    (
        "padding counted in the policy loss",
        "ppo.py",
        "return -(surrogate * response_mask).sum(1).mean()",
        "return -surrogate.sum(1).mean()",
        "tests/test_exact_ppo.py::test_later_updates_descend_the_clipped_surrogate",
    ),
    (
        "reference is the policy itself",
        "ppo.py",
        'reference = common.load_model(ref, "lm", device).requires_grad_(False)',
        "reference = policy",
        "tests/test_exact_ppo.py::test_the_reference_stays_what_the_policy_was",
    ),
    (
        "score on the last token but one",
        "ppo.py",
        "(response_mask & (later == 1))",
        "(response_mask & (later == 2))",
        "tests/test_exact_ppo.py::test_one_sample_estimators_ascend_J",
    ),
    (
        "values unshifted: the critic sees the action",
        "common.py",
        "return _after(critic(tokens[:, :-1], keep), keep)",
        "return critic(tokens)",
        "tests/test_exact_ppo.py::test_one_sample_estimators_ascend_J",
    ),
    (
        "V read after the response instead of before",
        "ppo.py",
        "first = mask & (mask.cumsum(1) == 1)",
        "first = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
        "tests/test_exact_ppo.py::test_one_sample_estimators_ascend_J",
    ),
    (
        "causal flag for a single cached query",
        "common.py",
        "causal = T > 1",
        "causal = True",
        "tests/test_exact_common.py::test_what_generate_says_of_its_samples",
    ),
    (
        "old log-probs recomputed after the update",
        "ppo.py",
        "loss = policy_loss(logprobs, old, advantages[rows], mask, cfg.clip)",
        "loss = policy_loss(logprobs, logprobs.detach(), advantages[rows], mask, cfg.clip)",
        "tests/test_exact_ppo.py::test_later_updates_descend_the_clipped_surrogate",
    ),
    (
        "leave-one-out mean includes the sample itself",
        "ppo.py",
        ".flatten() * n / (n - 1)",
        ".flatten()",
        "tests/test_exact_ppo.py::test_rloo_ascends_J",
    ),
    (
        "group std with n − 1",
        "ppo.py",
        "groups.std(1, correction=0, keepdim=True)",
        "groups.std(1, correction=1, keepdim=True)",
        "tests/test_exact_ppo.py::test_grpo_of_two_ascends_twice_the_win_rate",
    ),
    (
        "λ left out of GAE's recursion",
        "ppo.py",
        "later = (delta + gamma * lam * later)",
        "later = (delta + gamma * later)",
        "tests/test_exact_ppo.py::test_gae_weighs_later_errors_by_lambda",
    ),
    (
        "temperature ignored when sampling",
        "common.py",
        "(logits / temperature).softmax(-1)",
        "logits.softmax(-1)",
        "tests/test_exact_common.py::test_generate_samples_at_its_temperature",
    ),
    (
        "log-probs of the next token's column",
        "common.py",
        "return F.pad(outputs, (1, 0))",
        "return F.pad(outputs, (0, 1))",
        "tests/test_exact_common.py::test_token_logprobs_are_the_enumerated_ones",
    ),
    (
        "score read at the last column, padding or not",
        "common.py",
        "return reward_model(tokens, column == last)",
        "return reward_model(tokens)[:, -1]",
        "tests/test_exact_common.py::test_score_is_read_at_the_last_response_token",
    ),
    (
        "DPO without the reference",
        "dpo.py",
        "chosen, rejected = (logprobs - ref_logprobs[part]).unbind(1)",
        "chosen, rejected = logprobs.unbind(1)",
        "tests/test_exact_dpo.py::test_what_train_descends",
    ),
    (
        "DPO counts prompt and padding",
        "dpo.py",
        "logprobs = common.token_logprobs(model, tokens.flatten(0, 1), mask.flatten(0, 1))",
        "logprobs = common.token_logprobs(model, tokens.flatten(0, 1))",
        "tests/test_exact_dpo.py::test_response_logprobs_are_the_enumerated_ones",
    ),
    (
        "chosen and rejected swapped",
        "reward_model.py",
        "return -F.logsigmoid(chosen - rejected - margin)",
        "return -F.logsigmoid(rejected - chosen - margin)",
        "tests/test_exact_reward_model.py::test_reward_is_recovered_up_to_a_constant_per_prompt",
    ),
    (
        "label smoothing on the wrong side",
        "dpo.py",
        "return (1 - eps) * loss(h) + eps * loss(-h)",
        "return eps * loss(h) + (1 - eps) * loss(-h)",
        "tests/test_exact_dpo.py::test_one_pair_stops_at_its_known_gap",
    ),
    (
        "the worst of N selected",
        "rejection_sampling.py",
        "return rewards.argmax(1)",
        "return rewards.argmin(1)",
        "tests/test_exact_rejection_sampling.py::test_the_best_of_n_has_its_exact_law",
    ),
    (
        "prompt not masked in SFT",
        "sft.py",
        "return -(logprobs * mask).sum() / mask.sum()",
        "return -logprobs.sum() / mask.sum()",
        "tests/test_exact_sft.py::test_sft_loss_is_that_of_the_response_alone",
    ),
]


def run(folder: str | Path, test: str) -> tuple[bool, str]:
    """(passed, why not) of one test in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", test]
    wide = os.environ | {"COLUMNS": "999"}  # pytest cuts its summary's lines to the terminal
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=wide)
    why = re.findall(r"^(?:FAILED|ERROR) .*? - (.*)", done.stdout, re.M) or [done.stdout[-200:]]
    crashed = [line for line in why if not line.startswith(ASSERTION)]
    return done.returncode == 0, (crashed or why)[0]


def main() -> None:
    for test in sorted({bug[-1] for bug in BUGS}):
        passed, why = run(ROOT, test)
        assert passed, f"{test} fails without any bug: {why}"
    caught = 0
    print("| bug | caught by |\n|---|---|")
    for name, file, line, bug, test in BUGS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "project"
            shutil.copytree(
                ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__")
            )
            source = (copy / file).read_text()
            assert source.count(line) == 1, f"{file}: {source.count(line)} × {line}"
            (copy / file).write_text(source.replace(line, bug))
            passed, why = run(copy, test)
        killed = not passed and why.startswith(ASSERTION)
        caught += killed
        print(
            f"| {name} | {'`' + test + '`' if killed else 'NOT CAUGHT: ' + why} |", flush=True
        )
    print(f"\n{caught} of {len(BUGS)} caught")
    sys.exit(caught != len(BUGS))


if __name__ == "__main__":
    main()
