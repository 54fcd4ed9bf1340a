"""Which pages a decoding token attends to, and the attention over them."""

from jaxinfer.attention.quest import QuestPolicy, Selection, choose, select
from jaxinfer.attention.reuse import Chosen, choose_or_reuse, chooses_anew, remember, select_again

__all__ = [
    "Chosen",
    "QuestPolicy",
    "Selection",
    "choose",
    "choose_or_reuse",
    "chooses_anew",
    "remember",
    "select",
    "select_again",
]
