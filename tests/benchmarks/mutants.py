"""Take the handling of each known pitfall out, and see its test fail.

    python tests/benchmarks/mutants.py            # all of them, some minutes
    python tests/benchmarks/mutants.py 9 11       # those of two pitfalls

Every mutant is a copy of the project with one thing broken, as public trainers have had it
broken; it is killed when the named tests fail, and they pass without it. Exit status 1 if a
mutant survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = [  # pitfall, what is broken, old text, new text, tests
    (1, "score raw logits", "warp(logits, args, tokens)", "logits.float()", "test_01_logprobs"),
    (1, "cut sampled tokens", "    if keep is not None:\n", "    if False:\n", "test_01_a_sampled"),
    (2, "the checkpoint's sampling", "    if model.can_generate():\n", "    if not model.can_generate():\n", "test_02"),
    (2, "top_k 50 in sampling", "probabilities = warp(output.logits[:, -1], args)", "probabilities = warp(output.logits[:, -1].where(output.logits[:, -1] >= output.logits[:, -1].topk(3).values[:, -1:], -torch.inf), args)", "test_02"),
    (3, "cut at the end token", "row[: end.index(True) + 1]", "row[: max(end.index(True), 1)]", "test_03"),
    (3, "one end id", "return self.model.generation_config.eos_token_id", "return self.model.generation_config.eos_token_id[:1]", "test_03"),
    (4, "no positions", "(mask.cumsum(1) - 1).clamp(min=0)", "torch.arange(mask.shape[1]).expand_as(mask)", "test_04"),
    (5, "dropout as configured", "setattr(config, key, 0.0)", "pass", "test_05"),
    (6, "the checkpoint's dtype", '"dtype": torch.float32}', '"dtype": "auto"}', "test_06"),
    (7, "a critic step per agent", "        chosen = [samples[k] for k in batch]\n        for agent, actor in enumerate(actors):\n", "        chosen = [samples[k] for k in batch]\n        for agent, actor in enumerate(actors):\n            update_critic(critic, inputs, targets[batch], args)\n", "test_07"),
    (8, "TD error of Q", 'targets - values if args.critic_type == "v" else values', "targets - values", "test_08"),
    (9, "bootstrap over ends", ".masked_fill(done, 0.0)", "", "test_09"),
    (9, "no early end", "sample.done = early or sample.turn", "sample.done = sample.turn", "test_09"),
    (10, "targets of white advantages", "return rewards + args.discount * next_values", "return (rewards - rewards.mean()) / rewards.std() + args.discount * next_values", "test_10"),
    (10, "whitening per minibatch", "weights[batch], args)", "advantages(targets[batch], values[batch], args), args)", "test_10"),
    (11, "means of means", "loss = losses.sum() / count", "loss = losses.mean()", "test_11"),
    (11, "entropy by micro-batch", "bonus = entropies.sum() / tokens", "bonus = entropies.sum() / sum(map(len, completions[part]))", "test_11"),
    (11, "each rank's own mean", "return [sum(column) for column in zip(*gather(numbers), strict=True)]", "return list(numbers)", "test_11"),
    (11, "each rank's own whitening", "torch.cat(common.gather(weights))", "weights", "test_11"),
    (12, "all logits in the update", '"logits_to_keep": places}', '"logits_to_keep": torch.arange(width + len(places), device=places.device)}', "test_12"),
    (12, "all logits in sampling", '"logits_to_keep": 1}', '"logits_to_keep": 0}', "test_12"),
    (13, "a second pass for the value", "    values = actor.value_head(hidden.float())\n", "    values = critic_values(actor, prompts, args)\n", "test_13"),
    (14, "text encoded again", "self.completion_ids.append(completion)", "self.completion_ids.append(actor.tokenizer(actor.tokenizer.decode(completion)).input_ids[::-1])", "test_14"),
    (15, "the first agent's tokenizer", "common.encode(actor, prompts, room", "common.encode(actors[0], prompts, room", "test_15"),
    (16, "evaluation on training's randomness", "    finally:\n        set_random_states(states)\n", "    finally:\n        pass\n", "test_16"),
    (16, "Python's randomness not put back", "    random.setstate(states[\"python\"])\n", "", "test_16"),
    (17, "lengths unchecked", "len(rows) == count", "True", "test_17"),
    (17, "values unchecked", "good = good and all(isinstance(v, types) and math.isfinite(v) for v in rows)", "pass", "test_17"),
    (18, "the last minibatch's metrics", 'metrics[f"losses/{name}"] += value * share', 'metrics[f"losses/{name}"] = value', "test_18"),
    (19, "float32 whitening", "centred = weights.double() - everyones.mean()", "centred = weights - weights.sum() / len(weights)", "test_19"),
    (19, "whitening of one sample", "args.advantage_normalization and len(everyones) == 1", "False", "test_19"),
    (20, "no optimizer", '("model", "value_head", "optimizer")', '("model", "value_head")', "test_20"),
    (20, "no random states", "self.taken, self.random = state[\"ranks\"][rank()]", "self.taken, _ = state[\"ranks\"][rank()]", "test_20"),
    (20, "no place in the data", "[rank() :: ranks()][self.taken :]", "[rank() :: ranks()]", "test_20"),
    (20, "lines written twice", "file.truncate(self.sizes[name])", "pass", "test_20"),
    (20, "an evaluation forgotten", "        if run.evaluation_due():\n            run.log_evaluation(evaluate(actors, task, args))\n        for", "        if run.items == 0:\n            run.log_evaluation(evaluate(actors, task, args))\n        for", "test_20"),
]  # fmt: skip


def tests_pass(tree: Path, names: str) -> bool:
    """Whether pytest passes in `tree` for the tests of these names."""
    chosen = " or ".join(names.split())
    command = [sys.executable, "-m", "pytest", "-x", "-q", "tests", "-k", chosen]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, check=False, cwd=tree, capture_output=True, env=environment
    )
    if done.returncode not in (0, 1):
        sys.exit((done.stdout + done.stderr).decode()[-3000:])
    return done.returncode == 0


def main(pitfalls: tyro.conf.Positional[tuple[int, ...]] = ()) -> None:
    """Try every mutant, or those of the pitfalls given, and say which were killed."""
    chosen = [mutant for mutant in MUTANTS if not pitfalls or mutant[0] in pitfalls]
    survivors = 0
    for pitfall, what, old, new, names in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch) / "tree"
            ignored = shutil.ignore_patterns("runs", ".*", "__pycache__")
            shutil.copytree(ROOT, tree, ignore=ignored)
            found = 0
            for path in tree.glob("*.py"):
                text = path.read_text()
                found += old in text
                path.write_text(text.replace(old, new))
            if not found:
                sys.exit(
                    f"pitfall {pitfall}, {what}: the text to break is gone: {old!r}"
                )
            killed = not tests_pass(tree, names)
        survivors += not killed
        print(
            f"{pitfall:2} {'killed' if killed else 'SURVIVED'}: {what} ({names})",
            flush=True,
        )
    if not tests_pass(ROOT, "test_pitfalls"):
        sys.exit("the tests fail without a mutant too")
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    tyro.cli(main)
