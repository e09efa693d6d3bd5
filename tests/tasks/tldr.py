"""tldr: agent 0 summarises a post, agent 1 writes the longer version; paid by tldr_reward.

Posts come from --train-file, or from the dataset trl-lib/tldr. Source: arXiv 2601.21972.
"""

import importlib.util
import re

from common import Prompt, Task, attempting, require

STOP_WORDS = """a about after all also am an and any are as at be because been being but by can
could did do does for from had has have he her here him his how i if in into is it its just me
more most my no not now of on only or other our out over own she should so some such than that
the their them then there these they this those to too up us very was we were what when where
which while who why will with would you your"""
TRANSITIONS = {  # a category of transition words, and its words and phrases
    "addition": "also, besides, furthermore, moreover, additionally, in addition, as well as",
    "example": "for example, for instance, such as, namely, including, in particular",
    "explanation": "that is, in other words, in fact, indeed, to clarify, simply put",
    "cause": "therefore, thus, hence, so, because, consequently, as a result, due to",
    "contrast": "but, however, yet, instead, whereas, in contrast, on the other hand",
    "concession": "although, though, even though, despite, in spite of, nevertheless, still",
    "condition": "if, unless, otherwise, provided that, as long as, in case, whether",
    "sequence": "first, second, third, next, then, finally, lastly, to begin with",
    "time": "when, while, before, after, until, since, during, later, meanwhile, eventually",
    "comparison": "similarly, likewise, equally, just as, in the same way, compared to",
    "emphasis": "certainly, clearly, definitely, of course, obviously, above all, especially",
    "summary": "overall, in short, in summary, in conclusion, to sum up, ultimately, all in all",
}


def tldr_reward(summary: str, longer: str) -> float:
    """What a summary and a longer version of it earn, 0 to 2.98: four levels, each a gate.

    1: 0.5 if both have 8 to 256 words. 2: their ratio in characters, 1 from 1.6 to 3.2, falling
    to 0 at 1.1 and 5. 3: their ratio in unique words, 0.5 from 2 up, falling to 0 at 1.3.
    4: categories of transition words in the longer one, and content words in common. A level
    out of bounds ends the count.
    """
    texts = (summary.lower(), longer.lower())
    if not all(8 <= len(text.split()) <= 256 for text in texts):
        return 0.0
    ratio = len(longer) / len(summary)
    if not 1.1 <= ratio <= 5:
        return 0.5
    reward = 0.5 + min(1.0, (ratio - 1.1) / 0.5, (5 - ratio) / 1.8)
    words, more_words = (set(re.findall(r"\w+", text)) for text in texts)
    unique = len(more_words) / len(words) if words else 0.0
    if unique < 1.3:
        return reward
    reward += min(0.5, 0.5 * (unique - 1.3) / 0.7)
    found = sum(
        re.search(rf"\b({phrases.replace(', ', '|')})\b", texts[1]) is not None
        for phrases in TRANSITIONS.values()
    )
    reward += 0.4 * min(1.0, 0.4 + 0.05 * (found - 1)) if found else 0.0
    content, more_content = (w - set(STOP_WORDS.split()) for w in (words, more_words))
    union = content | more_content
    jaccard = len(content & more_content) / len(union) if union else 1.0
    return reward + 0.6 * min(jaccard, 0.03) / 0.03


def asking(request: str):
    """The formatter that puts a request behind the post."""

    def chat(item: dict) -> Prompt:
        return [{"role": "user", "content": f"{item['prompt']}\n\n{request}"}]

    return chat


def make_task(args) -> Task:
    """The task for two agents; InputError for another number, or where there are no posts."""
    require(args.num_agents == 2, "task tldr is for two agents: num_agents must be 2")
    posts, held_out = [], []  # --train-file takes their place
    if args.train_file is None:
        found = importlib.util.find_spec("datasets")
        needs = "task tldr needs the package datasets (pip install datasets), or a train_file"
        require(found, needs)
        from datasets import load_dataset

        with attempting("dataset trl-lib/tldr cannot be loaded (give a train_file?)"):
            splits = load_dataset("trl-lib/tldr")
            posts, held_out = splits["train"], splits["validation"]
    requests = (
        "Summarise this post in one short sentence.",
        "Summarise this post in three sentences, joined by transition words.",
    )
    return Task(
        posts,
        lambda *texts: [tldr_reward(*pair) for pair in zip(*texts, strict=True)],
        held_out,
        formatters=list(map(asking, requests)),
    )
