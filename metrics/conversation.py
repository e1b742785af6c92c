"""What a judge is told of a row: the question as it is, or a conversation of several turns."""

from collections.abc import Sequence

Turn = tuple[str, str]  # role and content


class Conversation(str):
    """A prompt of several turns. As text it is a transcript, the turn to answer last; ``turns`` has them one by one.

    So it goes wherever a prompt goes: a judge, a cache and a record that know nothing of conversations still tell two of them
    apart that end in the same words.
    """

    turns: tuple[Turn, ...]

    def __new__(cls, turns: Sequence[Turn]) -> "Conversation":
        made = super().__new__(cls, "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns))
        made.turns = tuple((role, content) for role, content in turns)
        return made

    def __getnewargs__(self) -> tuple[tuple[Turn, ...]]:  # type: ignore[override]  # what a copy or a pickle is made from
        return (self.turns,)


def prompt_of(turns: Sequence[Turn]) -> str:
    """A question alone as its own text, and all else as a `Conversation`."""
    return turns[0][1] if len(turns) == 1 else Conversation(turns)


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """The turns of a prompt; text alone is one of the user."""
    return prompt.turns if isinstance(prompt, Conversation) else (("user", prompt),)
