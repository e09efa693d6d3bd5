"""MAAC: multi-agent actor-critic, a centralized critic for a team of language models.

Agent i = 1..N is prompted with h_{i,t} at turn t = 0, 1, ... and writes a_{i,t}, its tokens
up to and including the end of sequence, unseen by the others. The team is paid one reward
r_t per joint completion. Here V_t = V(H_t): one centralized critic model reads the joint
history H_t, the prompts of all agents, and weighs every agent's actions.

(1) log π_i(a|h) = Σ_tokens log softmax(warp(logits))[token], warp as in sampling
(2) y_t = r_t + γ V_{t+1}, and y_t = r_t at the last turn of the episode
(3) A_t = y_t − V_t
(4) actor loss_i = −mean[log π_i(a_{i,t}|h_{i,t}) · A_t] − entropy_coef · entropy_i
(5) critic loss = value_loss_coef · mean[(y_t − V_t)²]

With --critic-type q the critic reads the actions too, Q_t = Q(H_t, a_{1,t}, ..., a_{N,t}), and Q
takes the place of V in (2) and (5). The actor's weight (3) is then Q_t itself, as in the
policy-gradient theorem, centred by advantage normalization. Not y_t − Q_t: given history
and action its mean is zero once Q is right, and the policy would stop learning.

Left out on purpose: importance ratios and their clipping (samples come from the current
policy; with a train_batch_size below the buffer, later minibatches are slightly
off-policy), GAE, a KL penalty, target networks. Source: CoMLRL, arXiv 2601.21972.

    python maac.py --num-agents 2     # a game that a laptop learns in a minute
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, set_seed

import common
from common import Learner, Sample, Task

Ids = list[list[int]]  # B texts as token ids
Batch = tuple[dict[str, Tensor], int]  # a model's inputs (B, L), and P
# Shapes: B samples, P prompt tokens, T completion tokens, L = P + T, V vocabulary, H hidden


@dataclass
class Args(common.RunArgs):
    """The flags of this script, after those of every run."""

    # episodes and generation

    num_turns: int = 1
    """Turns of an episode at most; above 1 the task needs an external_transition."""
    num_generations: int = 1
    """Episodes (joint completions) per item."""
    discount: float = 1.0
    """γ, the weight of the next turn's value, from 0 to 1."""
    early_termination_threshold: float | None = None
    """A reward above it ends the episode; None = off."""
    max_new_tokens: int = 1
    """Tokens of a completion at most, the end of sequence included."""
    temperature: float = 1.0
    """Temperature of sampling, above 0."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this probability together; 1 = off."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; None = off."""

    # learning

    critic_value_head_hidden_dim: int | None = None
    """Hidden units of the critic's value head; None = one linear layer."""
    critic_type: str = "v"
    """v: critics learn the value of a history; q: of a history and an action."""
    agent_learning_rate: float = 2e-3
    """Learning rate of the actors (Adam); about 1e-5 for a pretrained model."""
    critic_learning_rate: float = 1e-3
    """Learning rate of the critics (Adam); in iac_shared.py, of the value heads alone."""
    value_loss_coef: float = 1.0
    """Weight of the critic loss; a critic's own Adam feels it under max_grad_norm only."""
    entropy_coef: float = 0.2
    """Weight of the policy's entropy in nats per token; 0 for a pretrained model."""
    advantage_normalization: bool = True
    """Whiten the advantages over the buffer."""
    rollout_buffer_size: int = 64
    """Samples (a turn of an episode each) per agent to collect before an update."""
    train_batch_size: int | None = None
    """Samples of a minibatch, one optimizer step each; None = the buffer."""
    micro_batch_size: int | None = None
    """Samples in a forward pass (gradient accumulation); None = the minibatch."""
    max_grad_norm: float = 1.0
    """Norm to which each model's gradient is clipped; 0 = off."""


# --------------------------------------------------------------------- networks


def value_head(learner: Learner, hidden_dim: int | None) -> nn.Sequential:
    """Hidden states (B, H) -> values (B,); zero until it learns."""
    hidden_size = learner.model.config.get_text_config().hidden_size
    layers = [nn.Linear(hidden_size, hidden_dim), nn.Tanh()] if hidden_dim else []
    out = nn.Linear(hidden_dim or hidden_size, 1)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return nn.Sequential(*layers, out, nn.Flatten(0)).to(learner.model.device)


def adam(learner: Learner, learning_rate: float, args: Args) -> torch.optim.Adam:
    """The optimizer of a model, and of its value head, which learns at the critic's rate."""
    groups = [{"params": list(learner.model.parameters()), "lr": learning_rate}]
    if learner.value_head is not None:
        head = list(learner.value_head.parameters())
        groups += [{"params": head, "lr": args.critic_learning_rate}]
    return torch.optim.Adam(groups, fused=True)


def pad_batch(learner: Learner, prompts: Ids, completions: Ids | None = None) -> Batch:
    """Left-pad the prompts and right-pad the completions: the model's inputs (B, L), and P.
    Positions count from each sample's first token, not from the padding."""
    completions = completions or [[]] * len(prompts)
    width, more = max(map(len, prompts)), max(map(len, completions))
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        left, right = width - len(prompt), more - len(completion)
        rows.append([-1] * left + prompt + completion + [-1] * right)
    ids = torch.tensor(rows, device=learner.model.device)  # (B, L), -1 is padding
    mask = (ids >= 0).long()
    ids = ids.masked_fill(mask == 0, learner.tokenizer.pad_token_id)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}, width


# ------------------------------------------------------------------- generation


def warp(logits: Tensor, args: Args, keep: Tensor | None = None) -> Tensor:
    """Temperature, then top-k, then top-p: the same for sampling and for (1).
    Logits (..., V) -> float32 scores (..., V), -inf where cut. The tokens `keep` (...) are
    never cut, so that no rounding makes a sampled token impossible."""
    scores = logits.float() / args.temperature
    if args.top_k is None and args.top_p == 1:
        return scores
    cut = torch.zeros_like(scores, dtype=torch.bool)
    if args.top_k is not None:
        cut = scores < scores.topk(min(args.top_k, scores.shape[-1])).values[..., -1:]
    if args.top_p < 1:
        ranked, order = scores.masked_fill(cut, -torch.inf).sort(descending=True)
        likelier = ranked.softmax(-1).cumsum(-1).roll(1, -1)  # mass before each token
        likelier[..., 0] = 0
        cut |= (likelier >= args.top_p).gather(-1, order.argsort(-1))
    if keep is not None:
        cut = cut.scatter(-1, keep.unsqueeze(-1), False)
    return scores.masked_fill(cut, -torch.inf)


@common.timed("generation")
@torch.no_grad()
def generate(actor: Learner, prompts: Ids, args: Args) -> Ids:
    """Sample a completion for each prompt, all in one batch. It goes up to its first
    end-of-sequence token, inclusive, or to max_new_tokens."""
    inputs, _ = pad_batch(actor, prompts)
    end_ids = torch.tensor(actor.end_ids, device=actor.model.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=actor.model.device)
    sampled, cache = [], None
    for _ in range(args.max_new_tokens):
        options = {"cache": cache, "use_cache": True, "logits_to_keep": 1}
        output = actor.model(**inputs, **options)
        probabilities = warp(output.logits[:, -1], args).softmax(-1)  # (B, V)
        common.check_finite(actor, "probability", probabilities[:, 0], prompts)
        tokens = torch.multinomial(probabilities, 1)  # (B, 1)
        sampled.append(tokens)
        ended |= torch.isin(tokens[:, 0], end_ids)
        if ended.all():
            break
        cache, places = output.cache, inputs["position_ids"][:, -1:] + 1
        mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
    rows = torch.cat(sampled, dim=1).tolist()
    ends = [[token in actor.end_ids for token in row] + [True] for row in rows]
    return [row[: end.index(True) + 1] for row, end in zip(rows, ends, strict=True)]


# ------------------------------------------------------------ log-probabilities


def token_logprobs(logits: Tensor, tokens: Tensor, args: Args) -> Tensor:
    """Log-probabilities of tokens (B, T), and entropies, from logits (B, T, V): (2, B, T)."""
    logprobs = warp(logits, args, tokens).log_softmax(-1)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if args.entropy_coef == 0:  # the entropy is a metric then, without gradient
        logprobs = logprobs.detach()
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)  # -inf · 0 is 0 here
    return torch.stack([chosen, entropy])


def sequence_logprobs(
    actor: Learner, prompts: Ids, completions: Ids, args: Args
) -> tuple[Tensor, ...]:
    """log π(a|h) (B,), and the entropy in nats summed over the completion's tokens (B,)."""
    inputs, width = pad_batch(actor, prompts, completions)
    tokens = inputs["input_ids"][:, width:]  # (B, T)
    mask = inputs["attention_mask"][:, width:]  # (B, T)
    places = torch.arange(width - 1, width - 1 + tokens.shape[1], device=tokens.device)
    options = {"use_cache": False, "logits_to_keep": places}  # those before a token
    with common.autocast(actor, args):
        output = actor.model(**inputs, **options)
    rows = max(1, 2**22 // output.logits[0].numel())  # pieces of 16 MB, not all at once
    pieces = zip(output.logits.split(rows), tokens.split(rows), strict=True)
    scores = torch.cat([token_logprobs(*piece, args) for piece in pieces], dim=1)
    logprobs, entropies = (scores * mask).sum(-1)  # (2, B), (1)
    return logprobs, entropies


# --------------------------------------------------------------------- rollouts


def collect(
    actors: list[Learner], task: Task, items: list[dict], args: Args
) -> list[Sample]:
    """Play num_generations episodes of each item, all of them side by side. Returns the
    samples, episode after episode, turn after turn."""
    samples: list[Sample] = []
    live = common.first_turn(task, items, args)
    while live:
        for agent, actor in enumerate(actors):
            prompts = [sample.prompts[agent] for sample in live]
            prompt_ids = common.encode(actor, prompts, room=args.max_new_tokens)
            with common.autocast(actor, args):  # one region: the weights are cast once
                completion_ids = generate(actor, prompt_ids, args)
            for sample, *ids in zip(live, prompt_ids, completion_ids, strict=True):
                sample.add(actor, *ids)
        common.end_turn(task, live, args)
        samples += live
        live = common.next_turn(task, live, args)
    return sorted(samples, key=lambda sample: (sample.episode, sample.turn))


# ------------------------------------------------------- targets and advantages


def critic_texts(critic: Learner, samples: list[Sample], args: Args) -> Ids:
    """What the critic reads, by its own tokenizer: H (v), or H and all completions (q)."""
    agents, line = range(args.num_agents), "Agent {}: {}\n".format
    histories = [map(line, agents, map(common.render, s.prompts)) for s in samples]
    actions = ["".join(map(line, agents, s.actions(critic))) for s in samples]
    prompts = ["".join(history) for history in histories]
    return common.encode(critic, prompts, actions if args.critic_type == "q" else None)


def critic_values(critic: Learner, texts: Ids, args: Args) -> Tensor:
    """V or Q of each text, read at its last token: (B,)."""
    inputs, _ = pad_batch(critic, texts)
    with common.autocast(critic, args):
        output = critic.model.base_model(**inputs, use_cache=False)
    return critic.value_head(output.last_hidden_state[:, -1].float())  # from (B, L, H)


@common.timed("values")
@torch.no_grad()
def estimate_values(critic: Learner, texts: Ids, args: Args) -> Tensor:
    """The values of a whole buffer before its update: (B,), on the CPU."""
    size = args.micro_batch_size or args.train_batch_size
    parts = common.slices(len(texts), size)
    values = [critic_values(critic, texts[part], args).cpu() for part in parts]
    values = torch.cat([torch.zeros(0), *values])
    common.check_finite(critic, "value", values, texts)
    return values


def td_targets(samples: list[Sample], values: Tensor, args: Args) -> Tensor:
    """The targets (2) of samples, turn after turn, from their values: (B,)."""
    rewards = torch.tensor([sample.reward for sample in samples])
    done = torch.tensor([sample.done for sample in samples], dtype=torch.bool)
    next_values = values.roll(-1).masked_fill(done, 0.0)  # a buffer ends with an end
    return rewards + args.discount * next_values  # (2)


def advantages(targets: Tensor, values: Tensor, args: Args) -> Tensor:
    """The actor's weights (3), whitened over all ranks' buffers if asked for: (B,)."""
    weights = targets - values if args.critic_type == "v" else values  # (3)
    everyones = torch.cat(common.gather(weights)).double()
    if args.advantage_normalization and len(everyones) == 1:
        warnings.warn("a buffer of one sample cannot be whitened", stacklevel=2)
    elif args.advantage_normalization:
        centred = weights.double() - everyones.mean()  # equal ones become exactly 0
        weights = (centred / (everyones.std() + 1e-8)).float()
    return weights


# ----------------------------------------------------------------------- update


@common.timed("update")
def update_critic(
    critic: Learner, texts: Ids, targets: Tensor, args: Args
) -> dict[str, float]:
    """One optimizer step of (5) on a minibatch of texts and their targets (B,)."""
    (count,) = common.total(len(texts))
    value_loss = 0.0
    for part in common.slices(len(texts), args.micro_batch_size):
        values = critic_values(critic, texts[part], args)
        errors = (targets[part].to(values.device) - values).square()  # (B,)
        common.check_finite(critic, "value loss", errors, texts[part])
        loss = errors.sum() / count
        (args.value_loss_coef * loss).backward()  # (5)
        value_loss += loss.item()
    return common.optimizer_step(critic, {"value_loss": value_loss}, texts, args)


@common.timed("update")
def update_actor(
    actor: Learner, samples: list[Sample], agent: int, weights: Tensor, args: Args
) -> dict[str, float]:
    """One optimizer step of (4) on a minibatch of samples and their weights (B,)."""
    prompts = [sample.prompt_ids[agent] for sample in samples]
    completions = [sample.completion_ids[agent] for sample in samples]
    count, tokens = common.total(len(prompts), sum(map(len, completions)))
    sums = {"policy_loss": 0.0, "entropy": 0.0}
    for part in common.slices(len(prompts), args.micro_batch_size):
        texts = prompts[part], completions[part]
        logprobs, entropies = sequence_logprobs(actor, *texts, args)
        losses = -logprobs * weights[part].to(logprobs.device)  # (B,)
        common.check_finite(actor, "policy loss", losses, prompts[part])
        loss = losses.sum() / count
        bonus = entropies.sum() / tokens
        (loss - args.entropy_coef * bonus).backward()  # (4)
        sums["policy_loss"] += loss.item()
        sums["entropy"] += bonus.item()
    return common.optimizer_step(actor, sums, prompts, args)


def update(
    actors: list[Learner], critics: list[Learner], samples: list[Sample], args: Args
) -> dict[str, float]:
    """One pass over the buffer; returns the losses, averaged over all ranks' samples."""
    metrics: dict[str, float] = defaultdict(float)
    batches = common.minibatches(samples, args)
    (critic,) = critics  # it takes one step per minibatch, for however many agents
    texts = critic_texts(critic, samples, args)
    values = estimate_values(critic, texts, args)
    targets = td_targets(samples, values, args)
    weights = advantages(targets, values, args)
    metrics |= common.diagnostics(critic, samples, values, targets, args)
    for batch, share in batches:
        inputs = [texts[k] for k in batch]
        losses = update_critic(critic, inputs, targets[batch], args)
        chosen = [samples[k] for k in batch]
        for agent, actor in enumerate(actors):
            losses |= update_actor(actor, chosen, agent, weights[batch], args)
        for name, value in losses.items():
            metrics[f"losses/{name}"] += value * share
    return metrics


# ------------------------------------------------------------------- evaluation


def evaluate(actors: list[Learner], task: Task, args: Args) -> list[Sample]:
    """An episode of each of this rank's evaluation items; random states stay as they were."""
    samples: list[Sample] = []
    with common.fresh_randomness(args.seed + common.rank()):
        for items in common.evaluation_batches(task, args):
            samples += collect(actors, task, items, replace(args, num_generations=1))
    return samples


# ------------------------------------------------------------------------ train


def train(args: Args, task: Task | None = None) -> Path:
    """Train a team on `task`, or on the one that args names; returns the run folder.
    Raises InputError where the arguments or the task cannot be used."""
    common.check_args(args)
    actor_names = common.model_names(args)
    critic_names = common.critic_names(args, actor_names[:1])
    task = common.load_task(args, task)
    set_seed(args.seed)

    actors = common.load_learners("agent", AutoModelForCausalLM, actor_names, args)
    critics = common.load_learners("critic", AutoModel, critic_names, args)
    for actor in actors:
        actor.optimizer = adam(actor, args.agent_learning_rate, args)
    for critic in critics:
        critic.value_head = value_head(critic, args.critic_value_head_hidden_dim)
        critic.optimizer = adam(critic, args.critic_learning_rate, args)
    common.restore_heads(critics, args)
    for first in common.first_samples(task, actors, args):
        critic_texts(critics[0], first, args)  # refuses what is too long to read

    with common.Run(args, task, Path(__file__).stem, actors + critics) as run:
        if run.evaluation_due():
            run.log_evaluation(evaluate(actors, task, args))
        for samples in run.buffers(lambda items: collect(actors, task, items, args)):
            run.log_update(samples, update(actors, critics, samples, args))
            if run.evaluation_due():
                run.log_evaluation(evaluate(actors, task, args))
        run.save()
    return run.folder


if __name__ == "__main__":
    with common.one_sentence_errors():
        train(common.parse_args(Args))
