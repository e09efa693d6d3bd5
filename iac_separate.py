"""IAC with separate critics: independent actor-critic for a team of language models.

Agent i = 1..N is prompted with h_{i,t} at turn t = 0, 1, ... and writes a_{i,t}, its tokens
up to and including the end of sequence, unseen by the others. The team is paid one reward
r_t per joint completion. Here V_t = V_i(h_{i,t}): each agent has a critic model of its
own, which reads what its agent reads and nothing else.

(1) log π_i(a|h) = Σ_tokens log softmax(warp(logits))[token], warp as in sampling
(2) y_t = r_t + γ V_{t+1}, and y_t = r_t at the last turn of the episode
(3) A_t = y_t − V_t
(4) actor loss_i = −mean[log π_i(a_{i,t}|h_{i,t}) · A_t] − entropy_coef · entropy_i
(5) critic loss = value_loss_coef · mean[(y_t − V_t)²]

With --critic-type q the critic reads the action too, Q_t = Q_i(h_{i,t}, a_{i,t}), and Q
takes the place of V in (2) and (5). The actor's weight (3) is then Q_t itself, as in the
policy-gradient theorem, centred by advantage normalization. Not y_t − Q_t: given history
and action its mean is zero once Q is right, and the policy would stop learning.

Left out on purpose: importance ratios and their clipping (samples come from the current
policy; with a train_batch_size below the buffer, later minibatches are slightly
off-policy), GAE, a KL penalty, target networks. Source: CoMLRL, arXiv 2601.21972.

    python iac_separate.py --num-agents 2     # a game that a laptop learns in a minute
"""

import math
import warnings
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn, optim
from transformers import AutoModel, AutoModelForCausalLM

import common
from common import Learner, Sample, Task

Team = list[Learner]  # actors or critics
Ids = list[list[int]]  # B texts as token ids
Rng = torch.Generator
Metrics = dict[str, float]
# Shapes: B samples, P prompt tokens, T completion tokens, L = P + T, V vocabulary, H hidden


@dataclass
class Args(common.TaskArgs):
    """The flags of this script, after those of every run."""

    # episodes and generation

    num_turns: int = 1
    """Turns of an episode at most; above 1 the task needs an external_transition."""
    num_generations: int = 1
    """Episodes per item."""
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

    critic_model: str | None = None
    """Model of every critic; None = its agent's."""
    critics: tuple[str, ...] = ()
    """One model per critic, where they differ; overrides critic_model."""
    critic_value_head_hidden_dim: int | None = None
    """Hidden units of the critics' value heads; None = one linear layer."""
    critic_type: str = "v"
    """v: critics learn the value of a history; q: of a history and an action."""
    agent_learning_rate: float = 2e-3
    """Learning rate of the actors (Adam); about 1e-5 for a pretrained model."""
    critic_learning_rate: float = 1e-3
    """Learning rate of the critics (Adam); in iac_shared.py, of the value heads alone."""
    adam_beta2: float = 0.95
    """Adam's β2; a sudden gradient moves a weight by half a rate, at 0.999 by three."""
    value_loss_coef: float = 0.1
    """Weight of the critic loss beside the policy's, where they share a model; and in clipping."""
    entropy_coef: float = 0.2
    """Weight of the policy's entropy in nats per token; 0 for a pretrained model."""
    advantage_normalization: bool = True
    """Whiten the advantages over the buffer; with critic_type q, the only baseline."""
    rollout_buffer_size: int = 64
    """Joint samples of an update, at least, of all ranks; what an epoch has left is used too."""
    train_batch_size: int | None = None
    """Samples of a minibatch at most, one optimizer step each; None = the buffer."""
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


def pad_batch(learner: Learner, prompts: Ids, completions: Ids | None = None) -> dict:
    """Left-pad the prompts and right-pad the completions: a model's inputs, each (B, L).
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
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def distinct(texts: Ids) -> tuple[Ids, list[int]]:
    """The distinct texts, and each text's row among them: a model reads each only once."""
    rows = {ids: k for k, ids in enumerate(dict.fromkeys(map(tuple, texts)))}
    return list(map(list, rows)), [rows[tuple(ids)] for ids in texts]


# ------------------------------------------------------------------- generation


def warp(
    actor: Learner, logits: Tensor, args: Args, keep: Tensor | None = None
) -> Tensor:
    """Temperature, then top-k, then top-p, over the tokenizer's tokens: the same for sampling
    and for (1). Logits (..., V) -> float32 scores (..., V), -inf where cut. The tokens `keep`
    (...) are never cut, so that no rounding makes a sampled token impossible."""
    scores = logits.float() / args.temperature
    scores[..., actor.unknown_ids] = -torch.inf
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


def draw_tokens(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B,) from scores (B, V), by the inverse of the cumulative distribution at
    uniforms (B,) from [0, 1)."""
    cumulative = scores.softmax(-1).double().cumsum(-1)  # (B, V)
    level = uniforms.double() * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, level.unsqueeze(-1), right=True)
    return tokens.squeeze(-1).clamp(max=scores.shape[-1] - 1)


@torch.no_grad()
def generate(actor: Learner, prompts: Ids, generator: Rng, args: Args) -> Ids:
    """Sample a completion for each prompt, all in one batch. It goes up to its first
    end-of-sequence token, inclusive, or to max_new_tokens; the others go on without it."""
    texts, rows = distinct(prompts)
    inputs = pad_batch(actor, texts)
    rows = torch.tensor(rows, device=actor.model.device)  # of the batch, which go on
    live, cache = torch.arange(len(rows), device=rows.device), None  # their samples
    end_ids = rows.new_tensor(actor.end_ids)
    sampled = rows.new_full((len(rows), args.max_new_tokens), -1)  # (B, T), -1: none
    uniforms = torch.rand(args.max_new_tokens, len(prompts), generator=generator)
    for position, uniform in enumerate(uniforms.to(rows.device)):
        output = actor.model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.cache  # once past_key_values
        if rows is not None:  # at first a row for each sample of the distinct prompts
            logits = logits[rows]  # (live samples, V)
            cache.reorder_cache(rows)
            inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        tokens = draw_tokens(warp(actor, logits, args), uniform[live])
        sampled[live, position] = tokens
        going = ~torch.isin(tokens, end_ids)
        if (left := int(going.sum())) == 0:
            break
        mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs |= {"input_ids": tokens[:, None], "attention_mask": mask}
        inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
        rows = going.nonzero().squeeze(1) if left < len(live) else None
        live = live if rows is None else live[rows]
    return [row[row >= 0].tolist() for row in sampled]


# ------------------------------------------------------------ log-probabilities


def sequence_logprobs(
    actor: Learner, prompts: Ids, completions: Ids, args: Args
) -> tuple[Tensor, Tensor]:
    """log π(a|h) (B,), and the entropy in nats summed over the completion's tokens (B,)."""
    inputs = pad_batch(actor, prompts, completions)
    width = max(map(len, prompts))
    tokens = inputs["input_ids"][:, width:]  # (B, T)
    padding = inputs["attention_mask"][:, width:] == 0  # (B, T)
    before = torch.arange(width - 1, width - 1 + tokens.shape[1], device=tokens.device)
    options = {"use_cache": False, "logits_to_keep": before}  # those before a token
    with common.autocast(actor, args):
        output = actor.model(**inputs, **options)
    logprobs = warp(actor, output.logits, args, tokens).log_softmax(-1)  # (B, T, V)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, T)
    with torch.set_grad_enabled(args.entropy_coef > 0):  # else only a metric
        entropies = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)  # 0 where cut
    entropy = entropies.masked_fill(padding, 0.0).sum(-1)
    return chosen.masked_fill(padding, 0.0).sum(-1), entropy  # (1)


# --------------------------------------------------------------------- rollouts


def critic_texts(critics: Team, sample: Sample, args: Args) -> Ids:
    """h as each agent's critic reads it. Q needs room for the longest action: whether a turn is
    played must not hang on what agents write."""
    room = args.max_new_tokens if args.critic_type == "q" else 0
    pairs = zip(critics, sample.prompts, strict=True)
    return [critic.encode(sample, prompt, room) for critic, prompt in pairs]


def with_actions(critics: Team, sample: Sample) -> Ids:
    """h and then a, as each agent's critic reads them for Q."""
    rows = zip(critics, sample.critic_ids, sample.completions, sample.ended)
    return [critic.encode_action(ids, text, ended) for critic, ids, text, ended in rows]


def act(actors: Team, samples: list[Sample], generator: Rng, args: Args) -> None:
    """Each agent writes its completion for each sample, unseen by the others."""
    for agent, actor in enumerate(actors if samples else ()):
        prompts = [sample.prompt_ids[agent] for sample in samples]
        with torch.no_grad(), common.autocast(actor, args):  # the weights are cast once
            completions = generate(actor, prompts, generator, args)
        for sample, ids in zip(samples, completions, strict=True):
            ended = ids[-1] in actor.end_ids
            words = ids[:-1] if ended else ids  # the end is part of the action only
            text = actor.tokenizer.decode(words, skip_special_tokens=True)
            sample.completion_ids.append(ids)
            sample.completions.append(text)
            sample.ended.append(ended)


def play(
    actors: Team, critics: Team, task: Task, items: list, generator: Rng, args: Args
) -> list[Sample]:
    """Play num_generations episodes of each item, all of them side by side. Returns the
    samples, episode after episode, turn after turn."""
    limit = args.early_termination_threshold
    limit = math.inf if limit is None else limit
    samples, live = [], []
    for item in items:
        for _ in range(args.num_generations):
            prompts = [task.format(item, agent) for agent in range(args.num_agents)]
            live.append(Sample(item, len(live), 0, prompts))
    while live:
        for s in live:
            for actor, prompt in zip(actors, s.prompts, strict=True):
                s.prompt_ids.append(actor.encode(s, prompt, args.max_new_tokens))
            s.critic_ids = critic_texts(critics, s, args)
        live = [s for s in live if all(s.prompt_ids + s.critic_ids)]  # all can read it
        act(actors, live, generator, args)
        for s in live if args.critic_type == "q" else ():
            s.critic_ids = with_actions(critics, s)
        for _, joint in groupby(live, lambda s: s.episode // args.num_generations):
            joint = list(joint)  # the generations of one item
            for sample, reward in zip(joint, task.pay(joint), strict=True):
                sample.reward = reward
        samples += live
        going = [s for s in live if s.turn + 1 < args.num_turns and s.reward <= limit]
        live = []
        for s in going:
            prompts = task.transition(s, args.external_prompt_passthrough)
            live.append(Sample(s.item, s.episode, s.turn + 1, prompts, [*s.history, s]))
    samples.sort(key=lambda sample: (sample.episode, sample.turn))
    for k, sample in enumerate(samples):  # an episode is over where another one follows
        sample.done = k + 1 == len(samples) or samples[k + 1].turn == 0
    return samples


def collect(
    actors: Team, critics: Team, task: Task, places: list, generator: Rng, args: Args
) -> list[Sample]:
    """Play the train items at these places, as many at once as are sure to be needed, until the
    buffers of all ranks are full or the items are over. Returns this rank's samples."""
    samples, count = [], 0
    while count < args.rollout_buffer_size and places:
        at_most = args.num_turns * args.num_generations  # samples of an item
        needed = math.ceil((args.rollout_buffer_size - count) / at_most)
        items = common.pick_items(task.train_dataset, places[:needed])
        samples += play(actors, critics, task, items, generator, args)
        places = places[needed:]
        (count,) = common.total(len(samples))
    return samples


# ------------------------------------------------------- targets and advantages


def critic_values(critic: Learner, texts: Ids, args: Args) -> Tensor:
    """V or Q of each text, read at its last token: (B,)."""
    texts, rows = distinct(texts)
    with common.autocast(critic, args):
        output = critic.model.base_model(**pad_batch(critic, texts), use_cache=False)
    hidden = output.last_hidden_state[rows, -1]  # (B, H) from (distinct texts, L, H)
    return critic.value_head(hidden.float())


@torch.no_grad()
def estimate_values(critic: Learner, texts: Ids, args: Args) -> Tensor:
    """The values of a whole buffer before its update: (B,), on the CPU."""
    parts = common.slices(len(texts), args.micro_batch_size or args.train_batch_size)
    values = [critic_values(critic, texts[part], args).cpu() for part in parts]
    return torch.cat([torch.zeros(0), *values])


def td_targets(samples: list[Sample], values: Tensor, args: Args) -> Tensor:
    """The targets (2) of samples, turn after turn, from their values: (B,)."""
    rewards = torch.tensor([sample.reward for sample in samples])
    done = torch.tensor([sample.done for sample in samples], dtype=torch.bool)
    next_values = values.roll(-1).masked_fill(done, 0.0)  # the last sample is done
    return rewards + args.discount * next_values  # (2)


def advantages(targets: Tensor, values: Tensor, args: Args) -> Tensor:
    """What weighs log π in (4): (3), whitened over all ranks' buffers if asked for: (B,)."""
    weights = targets - values if args.critic_type == "v" else values  # (3)
    everyones = torch.cat(common.gather(weights)).double()
    if args.advantage_normalization and len(everyones) == 1:
        warnings.warn("a buffer of one sample cannot be whitened", stacklevel=2)
    elif args.advantage_normalization:
        centred = weights.double() - everyones.mean()  # equal ones become exactly 0
        weights = (centred / (everyones.std() + 1e-8)).float()
    return weights


# ----------------------------------------------------------------------- update


def minibatches(samples: list[Sample], generator: Rng, args: Args) -> list[tuple]:
    """The places of a buffer's samples in random order, dealt into minibatches, as many on every
    rank; with each its share in the buffer, both over all ranks. Within one, samples
    stand by length, so that micro-batches need little padding."""
    counts = common.gather(len(samples))
    number = math.ceil(sum(counts) / (args.train_batch_size or sum(counts)))
    first = sum(counts[: common.rank()])  # dealt on where the ranks before stop
    order = torch.randperm(len(samples), generator=generator)
    lengths = [sum(map(len, s.prompt_ids + s.completion_ids)) for s in samples]
    parts = [order[(k - first) % number :: number].tolist() for k in range(number)]
    batches = [sorted(part, key=lengths.__getitem__) for part in parts]
    shares = [size / sum(counts) for size in common.total(*map(len, batches))]
    return list(zip(batches, shares, strict=True))


def step(learner: Learner, sums: Metrics, args: Args) -> Metrics:
    """Sum the gradients over the ranks, clip, and take the optimizer's step. Returns the sums
    over the ranks, and the gradient's norm before clipping."""
    common.sum_gradients(learner)
    limit = args.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(learner.parameters(), limit)
    failure = f"{learner.name}: the gradient is not finite; no step took it"
    common.require(norm.isfinite(), f"{failure}, try a smaller learning rate")
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    sums = dict(zip(sums, common.total(*sums.values()), strict=True))
    role = "critic" if learner.name.startswith("critic") else "actor"
    sums[f"{role}_grad_norm"] = norm.item()
    return {f"losses/{name}/{learner.name}": value for name, value in sums.items()}


def update_critic(critic: Learner, texts: Ids, targets: Tensor, args: Args) -> Metrics:
    """One optimizer step of (5) on a minibatch of texts and their targets (B,)."""
    (count,) = common.total(len(texts))
    value_loss = 0.0
    for part in common.slices(len(texts), args.micro_batch_size):
        values = critic_values(critic, texts[part], args)
        loss = (targets[part].to(values.device) - values).square().sum() / count
        (args.value_loss_coef * loss).backward()  # (5)
        value_loss += loss.item()
    return step(critic, {"value_loss": value_loss}, args)


def update_actor(
    actor: Learner, samples: list[Sample], agent: int, weights: Tensor, args: Args
) -> Metrics:
    """One optimizer step of (4) on a minibatch of samples and their weights (B,)."""
    prompts = [sample.prompt_ids[agent] for sample in samples]
    completions = [sample.completion_ids[agent] for sample in samples]
    count, tokens = common.total(len(prompts), sum(map(len, completions)))
    sums = {"policy_loss": 0.0, "entropy": 0.0}
    for part in common.slices(len(prompts), args.micro_batch_size):
        texts = prompts[part], completions[part]
        logprobs, entropies = sequence_logprobs(actor, *texts, args)
        loss = -(logprobs * weights[part].to(logprobs.device)).sum() / count
        bonus = entropies.sum() / tokens
        (loss - args.entropy_coef * bonus).backward()  # (4)
        sums["policy_loss"] += loss.item()
        sums["entropy"] += bonus.item()
    return step(actor, sums, args)


def update(
    actors: Team, critics: Team, samples: list[Sample], generator: Rng, args: Args
) -> Metrics:
    """One pass over the buffer; returns the losses, averaged over all ranks' samples."""
    metrics: Metrics = {}
    batches = minibatches(samples, generator, args)
    for agent, (actor, critic) in enumerate(zip(actors, critics, strict=True)):
        texts = [sample.critic_ids[agent] for sample in samples]
        values = estimate_values(critic, texts, args)
        targets = td_targets(samples, values, args)
        weights = advantages(targets, values, args)
        metrics |= common.critic_metrics(critic, samples, values, targets, args)
        for batch, share in batches:
            inputs = [texts[k] for k in batch]
            losses = update_critic(critic, inputs, targets[batch], args)
            chosen = [samples[k] for k in batch]
            losses |= update_actor(actor, chosen, agent, weights[batch], args)
            for name, value in losses.items():
                metrics[name] = metrics.get(name, 0.0) + value * share
    return metrics


# ------------------------------------------------------------------- evaluation


def evaluate(actors: Team, critics: Team, task: Task, args: Args) -> list[Sample]:
    """An episode of each of this rank's evaluation items, with randomness of its own."""
    args = replace(args, num_generations=1)
    generator = common.seeded(args, "evaluation", common.rank())
    places = list(range(min(args.eval_num_samples, len(task.eval_dataset))))
    samples: list[Sample] = []
    for part in common.slices(len(places), args.eval_batch_size):
        items = common.pick_items(task.eval_dataset, places[part])
        samples += play(actors, critics, task, items, generator, args)
    return samples


# ------------------------------------------------------------------------ train


def train(args: Args, task: Task | None = None) -> Path:
    """Train a team on `task`, or on the one that args names; returns the run folder.
    Raises InputError where the arguments or the task cannot be used."""
    task = common.setup(args, task)
    count = args.num_agents
    names = args.agents or (args.agent_model,) * count
    actors = common.load_learners("agent", AutoModelForCausalLM, names, count, args)
    names = args.critics or [args.critic_model or name for name in names]
    critics = common.load_learners("critic", AutoModel, names, count, args, actors)
    adam = {"betas": (0.9, args.adam_beta2), "fused": True}
    for actor in actors:
        weights = [weight for weight in actor.parameters() if weight.requires_grad]
        actor.optimizer = optim.Adam(weights, args.agent_learning_rate, **adam)
    for critic in critics:
        critic.value_head = value_head(critic, args.critic_value_head_hidden_dim)
        weights = [weight for weight in critic.parameters() if weight.requires_grad]
        critic.optimizer = optim.Adam(weights, args.critic_learning_rate, **adam)

    with common.Run(args, task, __file__, actors + critics) as run:
        if run.due(run.evaluated, args.eval_interval):
            run.log_evaluation(evaluate(actors, critics, task, args))
        while run.items < run.total_items:
            epoch, played = divmod(run.items, len(task.train_dataset))
            shuffle = common.seeded(args, "epoch", epoch)  # the same on every rank
            order = torch.randperm(len(task.train_dataset), generator=shuffle).tolist()
            generator = common.seeded(args, "update", run.updates, common.rank())
            samples = collect(actors, critics, task, order[played:], generator, args)
            run.begin_update(samples)  # their items are counted in log_update
            run.log_update(update(actors, critics, samples, generator, args))
            if run.due(run.evaluated, args.eval_interval):
                run.log_evaluation(evaluate(actors, critics, task, args))
        run.save()
    return run.folder


if __name__ == "__main__":
    common.main(Args, train)
