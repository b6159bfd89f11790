"""What both engines share: many questions in, an answer each out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from lockgate.explain.names import Attempt, Names
from lockgate.explain.question import Answer, Question, QuestionError

__all__ = ["Engine", "explain"]


class Engine(Protocol):
    """Judges connections; `names` is the state of the cluster it was made with."""

    names: Names

    def judge(self, attempts: Sequence[tuple[Question, Attempt]]) -> list[Answer]:
        """One answer for each."""


def explain(engine: Engine, questions: Iterable[Question | QuestionError]) -> list[Answer]:
    """An answer to each question, in order. Of several backends the first that is denied
    answers, or else the first: a client may be given any of them. Questions that cannot be
    asked, also those that could not even be parsed, are answered with `error`."""
    answers: list[Answer | None] = []
    flat: list[tuple[Question, Attempt]] = []
    owners: list[int] = []
    for index, question in enumerate(questions):
        answers.append(None)
        if isinstance(question, QuestionError):
            answers[index] = Answer(Question("", "", None), error=str(question))
            continue
        try:
            attempts = engine.names.attempts(question)
        except QuestionError as error:
            answers[index] = Answer(question, error=str(error))
            continue
        flat += [(question, attempt) for attempt in attempts]
        owners += [index] * len(attempts)
    for index, answer in zip(owners, engine.judge(flat), strict=True):
        standing = answers[index]
        if standing is None or (
            standing.error is None and standing.verdict == "allow" and answer.verdict == "deny"
        ):
            answers[index] = answer
    return [answer for answer in answers if answer is not None]
