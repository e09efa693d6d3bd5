"""Take the handling of each known pitfall out, and see its test fail.

    python tests/benchmarks/mutants.py 9 11       # of two pitfalls; without numbers, of all

Every mutant is a copy of the project with one thing broken, as public trainers have had it; it
is killed when the named tests fail, and they pass without it. Exit status 1 if one survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = "pitfalls exactness update batching ranks resume"
MUTANTS = [  # pitfall, what is broken, old text, new text, tests
    (1, "score raw logits", "warp(actor, output.logits, args, tokens)", "output.logits.float()", "test_01_logprobs"),
    (1, "cut sampled tokens", "    if keep is not None:\n", "    if False:\n", "test_01_a_sampled"),
    (2, "the checkpoint's top_k", "draw_tokens(warp(actor, logits, args)", "draw_tokens(warp(actor, logits, replace(args, top_k=actor.model.generation_config.top_k))", "test_02"),
    (2, "the checkpoint's end unknown", 'getattr(model, "generation_config", None), "eos_token_id", None', 'model, "eos_token_id", None', "test_02"),
    (3, "cut at the end token", "return [row[row >= 0].tolist() for row in sampled]", "cut = torch.isin(sampled, end_ids)\n    cut[:, 0] = False\n    return [row[(row >= 0) & ~c].tolist() for row, c in zip(sampled, cut)]", "test_03"),
    (3, "padding by the pad token", 'padding = inputs["attention_mask"][:, width:] == 0', "padding = tokens == actor.tokenizer.pad_token_id", "test_03"),
    (3, "the end in the text", "words = ids[:-1] if ended else ids", "words = ids", "test_03"),
    (4, "no positions", "(mask.cumsum(1) - 1).clamp(min=0)", "torch.arange(mask.shape[1]).expand_as(mask)", "test_04"),
    (4, "positions of new tokens", 'inputs["position_ids"][:, -1:] + 1', 'inputs["position_ids"][:, -1:] * 0 + mask.shape[1] - 1', "test_generation_in_a_padded"),
    (5, "dropout as configured", "setattr(part, key, 0.0)", "pass", "test_05"),
    (6, "the checkpoint's dtype", '"dtype": torch.float32,', '"dtype": "auto",', "test_06"),
    (6, "bfloat16 scores", "scores = logits.float() /", "scores = logits /", "test_06"),
    (7, "a critic step per agent", "            losses |= update_actor(actor, chosen, agent, weights[batch], args)\n", "            losses |= update_actor(actor, chosen, agent, weights[batch], args)\n            update_critic(critic, inputs, targets[batch], args)\n", "test_07"),
    (8, "TD error of Q", 'targets - values if args.critic_type == "v" else values  # (3)', "targets - values", "test_08"),
    (9, "bootstrap over ends", ".masked_fill(done, 0.0)", "", "test_09"),
    (9, "ends by the turn limit", "k + 1 == len(samples) or samples[k + 1].turn == 0", "sample.turn + 1 == len({s.turn for s in samples})", "test_09"),
    (9, "no early end", " and s.reward <= limit]", "]", "test_09"),
    (10, "targets of white advantages", "return rewards + args.discount * next_values", "return (rewards - rewards.mean()) / rewards.std() + args.discount * next_values", "test_10"),
    (10, "whitening per minibatch", "weights[batch]", "advantages(targets[batch], values[batch], args)", "test_10"),
    (11, "means of means", "loss = -(logprobs * weights[part].to(logprobs.device)).sum() / count", "loss = -(logprobs * weights[part].to(logprobs.device)).mean()", "test_11"),
    (11, "values by micro-batch", "value_loss = value_errors(values, *judged, args).sum() / count", "value_loss = value_errors(values, *judged, args).mean()", "test_11"),
    (11, "a critic's by micro-batch", ".square().sum() / count", ".square().mean()", "test_critic_loss"),
    (11, "each rank's own mean", "return [sum(column) for column in zip(*gather(numbers), strict=True)]", "return list(numbers)", "test_11"),
    (11, "each rank's own whitening", "torch.cat(common.gather(weights))", "weights", "test_11"),
    (11, "each rank's own gradient", "    common.sum_gradients(learner)\n", "", "test_11"),
    (12, "all logits in the update", 'options = {"use_cache": False, "logits_to_keep": before}', 'options = {"use_cache": False}\n    actor.model.lm_head.register_forward_hook(lambda m, i, o: o[:, before])', "test_12"),
    (12, "all logits in sampling", "use_cache=True, logits_to_keep=1", "use_cache=True, logits_to_keep=0", "test_12"),
    (12, "a product for each sample", "hidden.float().contiguous()", "hidden.float()", "test_12"),
    (13, "a second pass for the value", "values = actor.value_head(hidden.float())", "values = critic_values(actor, prompts, args)", "test_13"),
    (13, "old log-probabilities", "        loss = -(logprobs", "        sequence_logprobs(actor, *texts, args)\n        loss = -(logprobs", "test_13"),
    (14, "text encoded again", "sample.completion_ids.append(ids)", "sample.completion_ids.append(actor.tokenizer(text).input_ids or ids[:1])", "test_14"),
    (14, "trained on text", "completions = [sample.completion_ids[agent] for", "completions = [actor.tokenizer(sample.completions[agent]).input_ids or [1] for", "test_14"),
    (15, "the first agent's tokenizer", "actor.encode(s", "actors[0].encode(s", "test_15"),
    (15, "the first critic's tokenizer", "critic.encode(sample, prompt", "critics[0].encode(sample, prompt", "test_15"),
    (16, "seeds by evaluations", 'args, "update", run.updates, ', 'args, "update", run.evaluated, ', "test_16"),
    (16, "rewards of one stream", "    torch.manual_seed(number)\n", "", "test_16"),
    (17, "lengths unchecked", " and len(rows) == count", "", "test_17"),
    (17, "types unchecked", "isinstance(v, int | float) and ", "", "test_17"),
    (17, "values unchecked", " and math.isfinite(v)", "", "test_17"),
    (18, "the last minibatch's metrics", "metrics.get(name, 0.0) + value * share", "value", "test_18"),
    (19, "float32 whitening", "centred = weights.double() - everyones.mean()", "centred = weights - weights.sum() / len(weights)", "test_19"),
    (19, "whitening of one sample", "args.advantage_normalization and len(everyones) == 1", "False", "test_19"),
    (20, "no optimizer", 'learner.optimizer.load_state_dict(state["optimizers"][learner.name])', "pass", "test_20"),
    (20, "no place in the data", 'COUNTS = ("items", ', "COUNTS = (", "test_20"),
    (20, "lines written twice", "file.truncate(", "str(", "test_20"),
    (20, "an evaluation forgotten", "        if run.due(run.evaluated, args.eval_interval):\n            run.log_evaluation(evaluate(actors, critics, task, args))\n        while", "        if run.items == 0:\n            run.log_evaluation(evaluate(actors, critics, task, args))\n        while", "test_20"),
    (21, "as many threads as cores", '"OMP_NUM_THREADS"] = "1"', '"OMP_NUM_THREADS"] = "2"', "test_21"),
    (22, "ids that are no tokens", "    scores[..., actor.unknown_ids] = -torch.inf\n", "", "test_22"),
    (23, "a formatter's item", "item = copy.deepcopy(item)\n", "pass\n", "test_23"),
    (23, "a reward's keywords", "**copy.deepcopy(options)", "**options", "test_23"),
    (23, "a transition's keywords", "**copy.deepcopy(keywords)", "**keywords", "test_23"),
    (23, "a callback's samples", "metrics_callback(copy.deepcopy(samples))", "metrics_callback(samples)", "test_23"),
    (23, "prompts that a user keeps", "return copy.deepcopy(prompt)", "return prompt", "test_23"),
    (24, "no beginning", "words if begun else self.opening + words", "words", "test_24"),
    (24, "two beginnings", "words if begun else self.opening + words", "self.opening + words", "test_24"),
    (24, "an end behind a text", "read = lambda text: tokenizer(text, add_special_tokens=False)", "read = lambda text: tokenizer(text)", "test_24"),
    (24, "an end behind the prompt", "words = list(self.read(text))", "words = self.tokenizer(text).input_ids", "test_24"),
    (24, "an end behind the action", "ids + self.read(text)", "ids + self.tokenizer(text).input_ids", "test_24"),
    (25, "a user's seed draws tokens", "torch.rand(args.max_new_tokens, len(prompts), generator=generator)", "torch.rand(args.max_new_tokens, len(prompts))", "test_25"),
    (25, "a user's seed shuffles", "torch.randperm(len(samples), generator=generator)", "torch.randperm(len(samples))", "test_25"),
    (25, "every buffer alike", 'f"{args.seed} {place}"', 'f"{args.seed}"', "test_25"),
    (26, "no probe", 'probe(learner, writes=role == "agent")', "pass", "test_26"),
    (26, "no probe of the cache", "found.append(", "str(", "test_26"),
    (27, "-inf times 0", "chosen.masked_fill(padding, 0.0)", "(chosen * ~padding)", "test_27"),
    (27, "0 times log 0", "logprobs.clamp(min=-1e9)", "logprobs", "test_27"),
    (28, "each sample's text", "return list(map(list, rows)), [rows[tuple(ids)] for ids in texts]", "return texts, list(range(len(texts)))", "test_28_a_critic"),
    (28, "each sample's prompt", "texts, rows = distinct(prompts)", "texts, rows = prompts, list(range(len(prompts)))", "test_28_generation"),
    (28, "ended rows stay", "going.nonzero().squeeze(1) if left < len(live) else None", "None", "test_28_generation"),
    (28, "another sample's draws", "live if rows is None else live[rows]", "live if rows is None else live[: len(rows)]", "test_28_generation"),
    (28, "one text for all", "uniform[live])", "uniform[live * 0])", "test_28_generation"),
]  # fmt: skip


def tests_pass(tree: Path, names: str) -> bool:
    """Whether pytest passes in `tree` for the tests of these names."""
    command = [sys.executable, "-m", "pytest", "-xqp", "no:cacheprovider", "-k", names]
    command += [f"tests/test_{name}.py" for name in FILES.split()]
    options = {"cwd": tree, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(command, check=False, capture_output=True, **options)
    if done.returncode not in (0, 1):
        sys.exit((done.stdout + done.stderr).decode()[-3000:])
    return done.returncode == 0


def main(*pitfalls: int) -> None:
    """Try every mutant, or those of the pitfalls given, and say which were killed."""
    chosen = [mutant for mutant in MUTANTS if not pitfalls or mutant[0] in pitfalls]
    if not tests_pass(ROOT, " or ".join(mutant[-1] for mutant in chosen)):
        sys.exit("the tests fail without a mutant too")
    survivors = 0
    for pitfall, what, old, new, names in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch) / "tree"
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("runs", ".*"))
            for path in [*tree.glob("*.py"), tree / "tests" / "conftest.py"]:
                path.write_text(path.read_text().replace(old, new))
            survived = tests_pass(tree, names)
        survivors += survived
        verdict = "SURVIVED" if survived else "killed"
        print(f"{pitfall:2} {verdict}: {what} ({names})", flush=True)
    sys.exit(f"{survivors} of {len(chosen)} survived" if survivors else 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
