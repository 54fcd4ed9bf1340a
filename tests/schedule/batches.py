"""Small batches, and what a prefix tree of plain dictionaries says about them."""

import numpy as np

from jaxinfer.schedule.cost import Cost
from jaxinfer.schedule.profile import Joint
from jaxinfer.schedule.workload import Workload

COST = Cost(token_seconds=3.0, key_seconds=0.5, step_seconds=20.0, joint=Joint(0.3))


def workload(prompts, limits=None) -> Workload:
    lengths = [len(prompt) for prompt in prompts]
    return Workload(
        tokens=np.asarray([token for prompt in prompts for token in prompt], np.int32),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        answer_limits=np.ones(len(prompts), np.int64) if limits is None else np.asarray(limits, np.int64),
    )


def chains(prompts, page_size):
    """The tree node of every whole page before a prompt's last token, as the tuple of tokens from the root."""
    return [
        [
            tuple(prompt[: end + page_size])
            for end in range(0, max(len(prompt) - 1, 0) // page_size * page_size, page_size)
        ]
        for prompt in prompts
    ]


def families(prompts, page_size) -> dict[tuple, list[int]]:
    """Every path of pages at which prompts part (or some end), with the requests that run through it; the root is ()."""
    through: dict[tuple, list[int]] = {(): list(range(len(prompts)))}
    paths = chains(prompts, page_size)
    for index, path in enumerate(paths):
        for node in path:
            through.setdefault(node, []).append(index)
    found = {(): through[()]}
    for node, members in through.items():
        if len(members) > 1:
            children = {tuple(paths[i][len(node) // page_size :][:1]) for i in members}
            if len(children) > 1 or children == {()}:
                found[node] = members
    return found


def unique_tokens(prompts, members, page_size, beyond=0) -> int:
    """Prompt tokens after the first `beyond` that have to be computed for these requests together."""
    paths = chains(prompts, page_size)
    pages = {node for i in members for node in paths[i] if len(node) > beyond}
    rests = sum(len(prompts[i]) - len(paths[i]) * page_size for i in members)
    return len(pages) * page_size + rests
