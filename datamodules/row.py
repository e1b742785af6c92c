"""A row of a data set: a conversation and its answer.

Here and in every setting, a *row* is this. What an evaluation leaves as a line of ``attacks.csv`` is a *result*
(``records.rows.ResultRow``).
"""

from dataclasses import dataclass, field

from casehard.metrics.conversation import prompt_of


@dataclass(frozen=True)
class Row:
    """One conversation: everything before the answer, and the answer.

    Args:
        messages: turns before the answer, each a role (system, user, assistant) and its content; the last is the user's.
        response: the answer, or None where a row only asks.
        where: it was read, such as ``rows.jsonl, line 7``; rows of two places are equal all the same.
    """

    messages: tuple[tuple[str, str], ...]
    response: str | None = None
    where: str = field(default="", compare=False)

    @property
    def prompt(self) -> str:
        """What is asked, for judges and records: the user's turn where it is the only one, else the whole ``Conversation``."""
        return prompt_of(self.messages)

    def chat(self, answered: bool = False) -> list[dict[str, str]]:
        """The turns as chat templates take them, with the response as the last one if ``answered``."""
        turns = [*self.messages, ("assistant", self.response or "")] if answered else self.messages
        return [{"role": role, "content": content} for role, content in turns]
