"""Hints of the pocket training: what they say is told before where they say it, and probes learn to read them."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from bench.pocket import hints, network, tasks, tokenizer, train
from bench.pocket.data import Data
from bench.pocket.phrases import ROLES
from bench.pocket.words import Source

ARCHITECTURE = train.ARCHITECTURE | {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 32}


@pytest.fixture(scope="module")
def data():
    return Reader(tokenizer.train(200), seed=3)


class Reader(Data):
    def decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def made(data, task, seed):
    document = tasks.make(task, Source(random.Random(seed)), 300, data.size, 8)
    return document, *data.document(document, 500)


@pytest.mark.parametrize("task", ("story", "index", "needles", "plain"))
def test_a_hint_of_a_story_was_told_before_in_the_same_sentence(data, task):
    seen = 0
    for seed in range(20):
        document, ids, _, found = made(data, task, seed)
        sentences = [sentence for sentence, _ in document.told]
        for place, _, token in (hint for hint in found if hint[1] < hints.SLOTS):
            before = data.decode(ids[: place + 1])
            value = data.decode([token]).strip()
            assert any(value in s and value in before[-len(s) :] for s in sentences if overlaps(before, s))
            seen += 1
    assert seen > 100


def overlaps(text, sentence):
    """Whether the text ends within the sentence, after three words of it at least."""
    return any(text.endswith(sentence[:i]) and sentence[:i].count(" ") > 0 for i in range(8, len(sentence)))


def test_a_hint_of_a_question_is_a_value_of_its_fact(data):
    slots = set()
    for seed in range(40):
        document, ids, _, found = made(data, "story", seed)
        for place, slot, token in (hint for hint in found if hint[1] >= hints.SLOTS):
            end = ids.index(tokenizer.ASSISTANT, place)
            question = data.decode(ids[:end]).replace("<|user|>", "\n").rpartition("\n")[2]
            values = dict(next(turn.values for turn in document.turns if turn.question == question))
            slot -= hints.SLOTS
            value = values["number"][1] if slot == hints.SECOND else values[ROLES[slot]]
            assert value.startswith(data.decode([token]).strip())
            assert value not in question.split()
            slots.add(slot)
    assert slots == set(range(hints.SLOTS)) - {ROLES.index("thing")}


def test_probes_learn_their_hints_and_stay_out_of_the_model(data):
    trainer = train.Trainer(0, architecture=ARCHITECTURE)
    size = []
    for step in range(30):
        losses, _ = trainer.advance(data.batch(step, 4, 128, {"index": 1.0}), 0.02)
        size.append(float(losses.hints))
    assert np.mean(size[-5:]) < np.mean(size[:3]) - 1.5
    assert train.PROBES not in trainer._names


def test_the_loss_of_hints_is_that_of_the_tokens_named():
    rng = np.random.default_rng(0)
    halfway, head = rng.standard_normal((2, 2, 6, 4)), rng.standard_normal((4, 9))
    probes = rng.standard_normal((2 * 3, 4, 4))
    named = [[(5, 4, 7), (1, 0, 2)], [(0, 2, 8), (0, -1, 0)]]
    expected = []
    for row, found in enumerate(named):
        for place, slot, token in found:
            if slot >= 0:
                state = halfway[slot // 3, row, place]
                scores = state / np.sqrt(np.mean(state**2) + 1e-5) @ probes[slot] @ head
                expected.append(np.log(np.exp(scores).sum()) - scores[token])
    ours = network._hinted(*(jnp.asarray(a) for a in (halfway, np.asarray(named), probes, head)))
    assert np.isclose(ours, np.mean(expected), rtol=1e-4)
