"""The text that `doctor` reads where none is given: some prose, arithmetic, code, and questions with answers.

Written for this package, so that no model has read it before.
"""

from __future__ import annotations

from deepen_ext.errors import InputError

SAMPLE_TEXT = '''\
The ferry to the island leaves twice a day, and in winter only when the captain likes the look of the sky. \
Marta had missed the morning boat by four minutes. She sat on her suitcase at the end of the pier, ate \
half of the sandwich that was meant for lunch, and watched a cormorant dry its wings on a post. There was \
nothing to be done about it. By noon the wind had turned to the north, and the harbour office put up a \
sign: no crossing until further notice. She read it twice, laughed, and went to look for a room.

Question: A gardener plants 6 rows of 14 tulips. A frost kills 9 of the plants, and she buys 3 trays of 8 \
to replace them. How many tulips does she have now?
Answer: She planted 6 * 14 = 84 tulips. After the frost 84 - 9 = 75 are left. The trays hold 3 * 8 = 24 \
more, so she has 75 + 24 = 99 tulips. The answer is 99.

def longest_run(values: list[int]) -> int:
    """Length of the longest stretch of equal neighbours."""
    best = current = 0
    previous = None
    for value in values:
        current = current + 1 if value == previous else 1
        best = max(best, current)
        previous = value
    return best

Question: Why does a metal spoon feel colder than a wooden one in the same room?
Answer: Both have the same temperature. Metal conducts heat well, so it draws warmth out of the hand \
faster than wood does, and the skin notices how fast it loses heat rather than how cold the spoon is.

Question: Which river flows through Vienna, Budapest and Belgrade?
Answer: The Danube.

Glass is made from sand, soda and lime. The mixture is melted at about 1,500 degrees, and it is soft \
enough to be blown or pressed long before it is cold. It must then cool slowly: if the outside hardens \
while the inside is still hot, the stress that remains can break the finished piece days later, without a \
touch. Large mirrors for telescopes are cooled over several months for the same reason.
'''


def split_sample(text: str) -> tuple[str, str]:
    """A first word as context, so that what a tokenizer puts before a text makes no difference, and the rest.

    Raises:
        InputError: there are no two words.
    """
    words = text.split(maxsplit=1)
    if len(words) < 2:
        raise InputError("the sample text has fewer than two words; give a text of a few hundred characters")
    at = text.index(words[0]) + len(words[0])
    return text[:at], text[at:]
