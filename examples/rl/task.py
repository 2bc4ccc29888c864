"""The task: add two numbers of two digits, the answer written from its last digit to its first.

    47+85=231.           132, reversed, three digits, and a full stop that ends it
    47+85=?122?1231.     the same with a calculator: `?` asks for the sum of the next column

One character is one token. All prompts have one length, so a batch needs padding on the right
only, where a causal model does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIGITS = 2
VOCABULARY = "0123456789+=.?_"
PADDED_VOCABULARY = 32
END, CALL, PADDING = (VOCABULARY.index(character) for character in ".?_")
PROMPT_LENGTH = 2 * DIGITS + 2
ANSWER_LENGTH = DIGITS + 2  # one digit more than a summand, and the full stop
TOOL_LENGTH = 2  # what the calculator answers: 0 to 18, always two digits


@dataclass(frozen=True)
class Problem:
    """One sum."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first:0{DIGITS}}+{self.second:0{DIGITS}}="

    @property
    def answer(self) -> str:
        return f"{self.first + self.second:0{DIGITS + 1}}"[::-1] + "."

    @property
    def worked(self) -> str:
        """The answer as somebody writes it who asks the calculator at each column."""
        return "".join(
            (f"?{self.column(place)}" if place < DIGITS else "") + digit
            for place, digit in enumerate(self.answer)
        )

    @property
    def is_held_out(self) -> bool:
        return (self.first + 3 * self.second) % 8 == 0

    def column(self, place: int) -> str:
        """The calculator: the two digits in one column added, without what is carried into it."""
        first, second = (
            int(f"{number:0{DIGITS + 1}}"[::-1][place]) if place <= DIGITS else 0
            for number in (self.first, self.second)
        )
        return f"{first + second:0{TOOL_LENGTH}}"


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return [VOCABULARY.index(character) for character in text]


def decode(tokens: list[int]) -> str:
    """The text of token ids; those that only fill up the vocabulary read as spaces."""
    return "".join(VOCABULARY[token] if token < len(VOCABULARY) else " " for token in tokens)


def problems(count: int, dice: torch.Generator, *, held_out: bool = False) -> list[Problem]:
    """Random problems, the same for the same state of the generator.

    One in eight of all sums is held out: never trained on, neither in the supervised start nor
    in RL.
    """
    found: list[Problem] = []
    while len(found) < count:
        numbers = torch.randint(10**DIGITS, (count, 2), generator=dice).tolist()
        drawn = (Problem(first, second) for first, second in numbers)
        found += [problem for problem in drawn if problem.is_held_out == held_out]
    return found[:count]


def reward(problem: Problem, tokens: list[int], chosen: list[bool] | None = None) -> float:
    """1 for the right answer and nothing after it, else 0.

    Args:
        problem: what was asked.
        tokens: all that followed the prompt.
        chosen: which of them the policy wrote; None where all are its own. Calls, and what the
            calculator said, are no part of the answer.

    """
    own = tokens if chosen is None else [t for t, c in zip(tokens, chosen, strict=True) if c]
    return float(decode([token for token in own if token != CALL]) == problem.answer)
