"""The words of the pocket world, and which names, values and phrasings training never sees."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIVEN = _words(
    "Anna Tom Mia Ben Lena Paul Eva Max Lily Sam Nora Jack Rosa Leo Ella Finn Ida Hugo Vera Otto Clara Emil Greta Oscar"
)
ROLES = _words(
    "baker farmer teacher sailor painter tailor doctor miller singer hunter gardener carpenter fisher cook guard clerk "
    "shepherd potter smith pilot dancer writer builder driver"
)
KINDS = _words("girl boy woman man child")
MOODS = _words("happy sad quiet brave kind clever shy proud calm curious tired merry gentle lazy careful")
COLOURS = _words("red blue green yellow white black brown grey pink purple golden silver")
ANIMALS = _words(
    "dog cat horse goat duck rabbit parrot turtle pony mouse hen pig sheep fox owl hamster donkey lamb"
)
THINGS = _words(
    "ball cup key book hat coin pen ring lamp kite drum bell map rope knife shoe scarf clock mirror brush candle basket "
    "spoon flute button letter bottle feather shell whistle needle ladder bucket blanket pillow hammer compass necklace "
    "teapot marble puppet lantern ribbon stamp stone"
)
HOLDERS = _words(
    "box bag drawer chest cupboard barrel jar crate trunk sack pot case wagon cabinet suitcase bowl tin wardrobe"
)
PLACES = _words(
    "garden kitchen forest river market school harbour tower bridge mill castle meadow village valley hill lake barn "
    "church park beach cave farm library station square orchard island inn garage attic cellar field"
)
FOODS = _words(
    "apples bread cheese soup cake honey plums rice beans pears fish grapes nuts cherries noodles carrots pancakes "
    "berries corn potatoes eggs melons cookies porridge"
)
HOBBIES = _words(
    "swimming reading fishing singing painting dancing cooking running climbing sewing riding skating sailing drawing"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SEASONS = _words("spring summer autumn winter")
ADJECTIVES = _words(
    "torpid frail brave supreme needless oval guilty nebulous damaging rapid hollow bitter gentle ancient clever dusty "
    "eager faint grand humble icy jolly keen loud mellow narrow odd plain quick rough shiny tidy urgent vivid wary young "
    "zesty broken crooked daring empty frozen giant hidden idle jagged lonely misty noisy pale quaint rusty silent tame "
    "upbeat vast wicked awake blunt crisp dense exotic fancy gloomy harsh absurd careless elated female hungry lethal "
    "modern normal obscene placid rare sour tart useful wise"
)
NOUNS = _words(
    "kid bull scarf patron lamb whip friction jeans kiwi paragraph service hash inversion anchor bottle canyon desk engine "
    "flame glove helmet insect jacket kettle ladder magnet napkin oven pencil quilt rocket saddle ticket uncle violin "
    "window yard zipper acorn badge carpet dragon eagle fabric guitar hammer island jungle kitten lemon mirror nephew "
    "orange parcel queen ribbon sugar temple union valley walnut actor bishop cactus diesel estate fossil gravy harp "
    "injury jewel knight lizard monster notebook oxygen pirate rhyme spider theory voyage"
)
_ONSETS = _words("b bl br ch d dr f fl fr g gl gr h j k kr l m n p pl pr r s sh sl st t tr v w z")
_VOWELS = _words("a e i o u")
_CODAS = _words("b d g k l m n p r s t x z")


def held_out(text: str) -> bool:
    """Whether this name, number or pair is kept from training: one in eight, by hash."""
    return zlib.crc32(text.encode()) % 8 == 0


def made_up(rng: random.Random) -> str:
    """A pronounceable word of one or two syllables, such as "brel" or "tamo"."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2)))]
    return "".join(parts) + (rng.choice(_CODAS) if len(parts) == 1 or rng.random() < 0.4 else "")


def syllables() -> Iterator[str]:
    """What made-up words are made of, endings aside."""
    return (onset + vowel for onset in _ONSETS for vowel in _VOWELS)


def first_syllable(word: str) -> str:
    """Up to its first vowel: "Bre" of "Brel"."""
    end = next((i for i, letter in enumerate(word) if letter in "aeiouAEIOU"), len(word))
    return word[: end + 1]


class Source:
    """Random names and values, either those that training may use or only those kept from it.

    Args:
      rng: what decides.
      unseen: held-out names and values, for evaluation.
      phrasing: held-out phrasings too (the last of each list); otherwise one of the others.
    """

    def __init__(self, rng: random.Random, *, unseen: bool = False, phrasing: bool = False):
        self.rng, self.unseen, self.phrasing = rng, unseen, phrasing

    def draw(self, make: Callable[[], str]) -> str:
        """The first that is held out, or not, as this source wants."""
        while held_out(text := make()) != self.unseen:
            pass
        return text

    def phrase(self, variants: Sequence[str]) -> str:
        return variants[-1] if self.phrasing else self.rng.choice(variants[:-1])

    def number(self, digits: int = 5) -> str:
        return self.draw(lambda: str(self.rng.randint(10 ** (digits - 1), 10**digits - 1)))

    def name(self) -> str:
        """Of a person or pet: a common one (in training only) or a made-up one."""
        if not self.unseen and self.rng.random() < 0.3:
            return self.rng.choice(GIVEN)
        while (name := self.draw(lambda: made_up(self.rng).capitalize())) in GIVEN:
            pass
        return name

    def pair(self) -> str:
        """Of a line, as LongChat names them: "torpid-kid"."""
        return self.draw(lambda: f"{self.rng.choice(ADJECTIVES)}-{self.rng.choice(NOUNS)}")

    def several(self, make: Callable[[], str], count: int) -> list[str]:
        """Distinct ones, in random order."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[make()] = None
        return list(found)
