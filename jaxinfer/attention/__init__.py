"""Which pages a decoding token attends to, and the attention over them."""

from jaxinfer.attention.quest import QuestPolicy, Selection, choose, select, select_again

__all__ = ["QuestPolicy", "Selection", "choose", "select", "select_again"]
