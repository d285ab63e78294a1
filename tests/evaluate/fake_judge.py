"""A judge that answers by a function, in place of an endpoint."""

from attnpo_jax.evaluate.endpoint import Answer


class FakeJudge:
    """Says `answer(ask)`, a text or a text with top log-probs; keeps what it was asked."""

    model = "judge"

    def __init__(self, answer):
        self._answer, self.asked = answer, []

    def ask(self, asks):
        self.asked += asks
        found = []
        for ask in asks:
            said = self._answer(ask)
            text, top = said if isinstance(said, tuple) else (said, None)
            found.append(Answer(text, () if top is None else (top,), "stop", 7, 1))
        return found
