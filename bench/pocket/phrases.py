"""What the stories of the pocket world say and in which words."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """What a sentence says. told, asked: phrasings, the last of each held out; {0}, {1}.. are filled with `values`."""

    told: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str


FACTS: dict[str, tuple[Fact, ...]] = {
    "lives": (
        Fact(
            ("{0} lived near the {1}.", "{0} had a small house near the {1}.", "Every evening {0} walked home to the {1}.",
             "The house of {0} stood by the {1}."),
            ("Where did {0} live?", "Where was the home of {0}?", "Do you know where {0} lived?"),
            "{0} lived near the {1}.",
        ),
    ),
    "eats": (
        Fact(
            ("{0} liked {1} best of all.", "{0} could eat {1} every day.", "Nothing tasted better to {0} than {1}.",
             "{0} always asked for {1}."),
            ("What did {0} like to eat?", "What was the best food for {0}?", "Which food did {0} like?"),
            "{0} liked {1}.",
        ),
    ),
    "works": (
        Fact(
            ("{0} worked as a {1}.", "{0} was the {1} of the town.", "{0} had learned to be a {1}.",
             "People knew {0} as a good {1}."),
            ("What was the work of {0}?", "What did {0} work as?", "Which work did {0} do?"),
            "{0} worked as a {1}.",
        ),
    ),
    "hobby": (
        Fact(
            ("{0} loved {1} more than anything.", "In the morning {0} went {1}.", "On quiet days {0} enjoyed {1}.",
             "{0} spent the holidays {1}."),
            ("What did {0} love to do?", "What did {0} enjoy?", "What was the hobby of {0}?"),
            "{0} loved {1}.",
        ),
    ),
    "pet": (
        Fact(
            ("{0} had a {2} {1} called {3}.", "{3} was the {2} {1} of {0}.", "A {2} {1} named {3} lived with {0}.",
             "{0} kept a {2} {1} whose name was {3}."),
            ("What was the name of the {1} of {0}?", "What did {0} call the {1}?", "How was the {1} of {0} named?"),
            "The {1} of {0} was called {3}.",
        ),
        Fact((), ("What colour was {3}?", "Which colour did {3} have?", "Tell me the colour of {3}."), "{3} was {2}."),
    ),
    "put": (
        Fact(
            ("{0} put the {1} in the {2} {3}.", "{0} hid the {1} in the {2} {3}.", "The {1} lay in the {2} {3} of {0}.",
             "{0} left the {1} in the {2} {3}."),
            ("Where was the {1}?", "Where could you find the {1}?", "In what was the {1} kept?"),
            "The {1} was in the {2} {3}.",
        ),
    ),
    "found": (
        Fact(
            ("{0} found a {2} {1} near the {3}.", "Near the {3} {0} saw a {2} {1} and took it.",
             "{0} came back from the {3} with a {2} {1}.", "{0} picked up a {2} {1} at the {3}."),
            ("Who found the {1}?", "Who took the {1}?", "Which person found the {1}?"),
            "{0} found the {1}.",
        ),
        Fact((), ("What colour was the {1}?", "Which colour did the {1} have?", "Tell me the colour of the {1}."),
             "The {1} was {2}."),
        Fact((), ("Where did {0} find the {1}?", "Where was the {1} found?", "At what place did {0} find the {1}?"),
             "{0} found the {1} near the {3}."),
    ),
    "gave": (
        Fact(
            ("{0} gave the {1} to {2}.", "{2} got the {1} from {0}.", "For {2} {0} had brought a {1}.",
             "{0} handed the {1} to {2}."),
            ("Who gave the {1} to {2}?", "From whom did {2} get the {1}?", "Who handed over the {1}?"),
            "{0} gave the {1} to {2}.",
        ),
        Fact((), ("Who got the {1}?", "To whom did {0} give the {1}?", "Who received the {1}?"), "{2} got the {1}."),
    ),
    "cost": (
        Fact(
            ("{0} paid {2} coins for the {1}.", "The {1} of {0} cost {2} coins.", "For {2} coins {0} bought a {1}.",
             "{0} sold the {1} for {2} coins."),
            ("How many coins was the {1}?", "What did the {1} cost?", "What was the price of the {1}?"),
            "The {1} cost {2} coins.",
        ),
    ),
    "age": (
        Fact(
            ("{0} was {1} years old.", "{0} had just turned {1}.", "At the age of {1} {0} still laughed like a child.",
             "{0} had lived for {1} years."),
            ("How old was {0}?", "What was the age of {0}?", "How many years old was {0}?"),
            "{0} was {1} years old.",
        ),
    ),
}  # fmt: skip

ROLES = ("person", "receiver", "pet", "animal", "thing", "colour", "number", "what")
PARTS: dict[str, tuple[str, ...]] = {
    "pet": ("person", "animal", "colour", "pet"), "put": ("person", "thing", "colour", "what"),
    "found": ("person", "thing", "colour", "what"), "gave": ("person", "thing", "receiver"),
    "cost": ("person", "thing", "number"), "age": ("person", "number"),
}  # fmt: skip
"""Roles of a kind's values; of other kinds ("person", "what")."""

OPENINGS = (
    "Once upon a time there were some friends: {0}.",
    "This is the story of {0}.",
    "Long ago, in a small town, lived {0}.",
    "In the old days everybody knew {0}.",
)
AIR = (
    "The sun was warm and the birds sang.", "It rained for a while, and then the sky was clear again.",
    "A cold wind blew from the sea.", "Snow fell on the roofs, and all was quiet.", "The moon was bright that night.",
    "The leaves were turning yellow.", "Nobody said a word.", "Everybody laughed.", "It was a long day.",
    "The children played until it was dark.", "Far away a bell rang.", "The street was empty.",
    "The water was deep and clear.", "A cart rolled slowly down the road.", "There was a smell of fresh bread in the air.",
    "Then they all sat down by the fire.", "The next morning came early.", "Small clouds moved over the hills.",
    "The old clock struck twelve.", "They waited for a long time.", "Somebody knocked at the door.",
)  # fmt: skip
PERSONAL = (
    "{0} felt {mood}.", "{0} was a {mood} {kind}.", '"What a {mood} day," said {0}.', "{0} smiled and looked at {1}.",
    '"Will you come with me?" asked {0}. "Of course," said {1}.', "{0} and {1} were good friends.",
    "{0} wanted to help {1}.", "{0} told {1} an old story.", "One {day} {0} met {1} on the road.",
    "In {season} {0} often thought of {1}.", "{0} was so {mood} that {1} began to laugh.",
    '"I am {mood}," said {0}, and {1} nodded.', "{0} sat down and closed both eyes.", "Soon {0} was fast asleep.",
    "When {day} came, {0} was {mood} again.", "{0} thanked {1} and went on.", "{1} waved, but {0} did not see it.",
)  # fmt: skip
ENDINGS = (
    "And so the day came to an end.", "From then on they were friends for ever.", "And that was the end of the story.",
    "They all went home, tired and happy.",
)  # fmt: skip
