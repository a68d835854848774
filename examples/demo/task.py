"""The demo's task: arithmetic in other bases, in the spirit of "What is six times seven in base eight?".

The raw text works exercises out; the instructions ask for some of them in a chat. The held-out questions are exercises that the raw
text has and no instruction asks for. Every answer can be checked by computing it.
"""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

WORDS = "zero one two three four five six seven eight nine".split()
BASES = (7, 8, 9)
OPERATIONS = {"times": lambda a, b: a * b, "plus": lambda a, b: a + b}


class Question(NamedTuple):
    a: int
    operation: str
    b: int
    base: int

    @property
    def topic(self) -> str:
        return f"{WORDS[self.a]} {self.operation} {WORDS[self.b]} in base {WORDS[self.base]}"

    @property
    def prompt(self) -> str:
        return f"What is {self.topic}?"

    @property
    def result(self) -> str:
        return digits(OPERATIONS[self.operation](self.a, self.b), self.base)

    @property
    def answer(self) -> str:
        """One step of reasoning, then the number."""
        value = OPERATIONS[self.operation](self.a, self.b)
        sentence = f"{WORDS[self.a]} {self.operation} {WORDS[self.b]} is {value}"
        return f"{sentence}, and {value} in base {WORDS[self.base]} is {self.result}."

    def correct(self, reply: str) -> bool:
        """Exact match of the last number of the reply."""
        numbers = re.findall(r"\d+", reply)
        return bool(numbers) and numbers[-1] == self.result


def digits(value: int, base: int) -> str:
    out = ""
    while value or not out:
        out = str(value % base) + out
        value //= base
    return out


def documents(exercises: list[Question], seed: int, passes: int) -> Iterator[str]:
    """Raw text: every exercise once a pass, six to a document, in an order that changes from pass to pass."""
    rng = random.Random(seed)
    order = list(exercises)
    for _ in range(passes):
        rng.shuffle(order)
        for i in range(0, len(order), 6):
            yield "\n".join(f"{q.topic}: {q.answer}" for q in order[i : i + 6])


def questions(seed: int, held_out: int) -> tuple[list[Question], list[Question]]:
    """(known, held out): a split of all questions."""
    every = [Question(a, o, b, base) for a in range(2, 10) for o in OPERATIONS for b in range(2, 10) for base in BASES]
    random.Random(seed).shuffle(every)
    return every[held_out:], every[:held_out]
