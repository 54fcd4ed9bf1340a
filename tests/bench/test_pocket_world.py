"""The pocket world: right answers, nothing of the evaluation in training, the same from the same seed."""

import random
import re

import pytest

from bench.pocket import items, stories, tasks, words
from bench.pocket.phrases import FACTS
from bench.pocket.words import Source, held_out


def size(text):
    return len(re.findall(r"\w+|[^\w\s]|\s", text))


def documents(task, count=40, *, unseen=False, tokens=400):
    for seed in range(count):
        yield tasks.make(task, Source(random.Random(seed), unseen=unseen), tokens, size, 6)


def test_pass_keys_are_in_the_context_after_their_owner():
    for document in documents("passkey"):
        for question, answer, _ in document.turns:
            subject = question.split("? ")[1].removesuffix(" is")
            found = re.findall(rf"{subject} is (\d+)\.", document.context)
            assert found == [answer.strip(" .")]


def test_lines_are_found_by_their_names():
    asked = 0
    for document in documents("lines"):
        record = dict(
            re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", document.context, re.MULTILINE)
        )
        for question, answer, _ in document.turns:
            name = re.search(r"line (\S+?)\?", question)[1]
            assert answer == f"line {name}: REGISTER_CONTENT is <{record[name]}>"
            asked += 1
    assert asked > 50


def test_a_question_of_a_story_has_one_answer_that_the_text_holds():
    for document in documents("story"):
        questions = [turn.question for turn in document.turns]
        assert len(set(questions)) == len(questions)
        for _, answer, _ in document.turns:
            told = [
                word
                for word in re.findall(r"\w+", answer)
                if (word[0].isupper() and word != "The") or word.isdigit()
            ]
            assert all(word in document.context for word in told)


# every phrasing of a fact as a pattern, and from it the answer: an independent reading of the story
def _readings(text):
    for kind, facts in FACTS.items():
        for told in facts[0].told:
            pattern = re.escape(told).replace(r"\{", "{").replace(r"\}", "}")
            seen = set()
            for slot in re.findall(r"\{(\d)\}", pattern):
                group = f"(?P<v{slot}>[\\w-]+)" if slot not in seen else f"(?P=v{slot})"
                pattern = pattern.replace("{" + slot + "}", group, 1)
                seen.add(slot)
            for match in re.finditer(rf"(?:^|(?<=[.?!\"\n] )|(?<=\n)){pattern}", text):
                values = {int(name[1:]): value for name, value in match.groupdict().items()}
                filled = [values.get(i, "") for i in range(4)]
                yield from (fact.answer.format(*filled) for fact in FACTS[kind])


def test_answers_of_a_story_can_be_read_from_it():
    for seed in range(60):
        made = stories.story(Source(random.Random(seed), phrasing=seed % 2 == 1), 12)
        answers = set(_readings(made.text))
        assert {turn.answer for turn in made.turns} <= answers


def test_counts_and_comparisons():
    for document in documents("count"):
        shelf = re.search(r"On the shelf: (.*?)\.", document.context)[1].split(", ")
        has = {name: int(n) for name, n in re.findall(r"(\w+) had (\d+) ", document.context)}
        for question, answer, _ in document.turns:
            if question.startswith("How many"):
                thing = question.split()[4]
                assert answer == f"{thing}: {shelf.count(thing)}"
            else:
                pair = re.search(r"more, (\w+) or (\w+)\?", question).groups()
                assert answer == f"{max(pair, key=has.get)} had more."


def test_examples_of_the_asked_group_come_before():
    for document in documents("classify"):
        shown = dict(line.split(" -> ") for line in document.context.split("\n")[1:])
        group = {word: name for name, members in tasks.GROUPS.items() for word in members}
        labels = {}
        for word, label in shown.items():
            names = [name for name, members in tasks.GROUPS.items() if word in members]
            labels.setdefault(label, set()).update(names)
        for question, answer, _ in document.turns:
            word = question.removesuffix(" ->")
            assert word not in shown
            assert group[word] in labels[answer.strip()] or any(
                word in tasks.GROUPS[name] for name in labels[answer.strip()]
            )


@pytest.mark.parametrize("task", items.CASES)
def test_evaluation_is_the_same_every_time_and_fits(task):
    first, again = items.items(task, 600, size, 5), items.items(task, 600, size, 5)
    assert first == again
    assert len({item.prompt for item in first}) == 5
    assert all(size(item.prompt + item.answer) <= 600 for item in first)


def test_evaluation_asks_for_what_training_never_saw():
    assert all(held_out(re.search(r"\d+", item.answer)[0]) for item in items.items("passkey", 600, size, 20))
    for item in items.items("lines", 600, size, 20):
        assert all(map(held_out, re.findall(r"^line (\S+):", item.prompt, re.MULTILINE)))
    for document in documents("lines", 10):
        assert not any(map(held_out, re.findall(r"^line (\S+):", document.context, re.MULTILINE)))
    seen = {s.name() for s in [Source(random.Random(0))] for _ in range(2000)}
    unseen = {s.name() for s in [Source(random.Random(0), unseen=True)] for _ in range(2000)}
    assert not seen & unseen


def test_held_out_phrasings_are_never_trained_on():
    source, other = Source(random.Random(0)), Source(random.Random(0), phrasing=True)
    variants = ("a", "b", "c")
    assert {source.phrase(variants) for _ in range(50)} == {"a", "b"}
    assert {other.phrase(variants) for _ in range(50)} == {"c"}


def test_depths_cover_the_whole_context():
    asked = items.items("passkey", 900, size, 11)
    places = [item.prompt.index("Remember it.") / len(item.prompt) for item in asked]
    assert [item.depth for item in asked] == [i / 10 for i in range(11)]
    assert places == sorted(places) and places[0] < 0.25 and places[-1] > 0.85


def test_judging():
    passkey = items.Item("passkey", "", " 12345.", False)
    assert passkey.is_right(" 12345. The") and not passkey.is_right(" 1234. 12345")
    line = items.Item("lines", "", "line a-b: REGISTER_CONTENT is <777>", True)
    assert line.is_right("It is <777>.") and not line.is_right("line 777: <778>")
    assert items.Item("story", "", "Mia liked rice.", True).is_right("Mia liked rice. ")


def test_made_up_words_are_words():
    rng = random.Random(0)
    assert all(re.fullmatch(r"[a-z]{2,16}", words.made_up(rng)) for _ in range(500))
