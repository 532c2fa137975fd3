"""What reasoning models think before they answer, between two marks."""

from __future__ import annotations

_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
)


def closed_thought(prompt: str) -> str:
    """The words of a prompt with a thought closed that they leave open: an answer would be read inside of it."""
    for opening, closing in _MARKS:
        if prompt.rfind(opening) > prompt.rfind(closing):
            return f"{prompt.rstrip()}\n\n{closing}\n\n"
    return prompt


def without_thought(answer: str) -> str:
    """The answer alone; nothing if the thought has no end."""
    for opening, closing in _MARKS:
        if closing in answer:
            answer = answer.rpartition(closing)[2]
        elif answer.lstrip().startswith(opening):
            return ""
    return answer
