"""The environment of recipes/tiny/turns.yaml."""


class Shorter:
    """Asks three times. An answer is worth 1 where nothing is said, and nothing from 40 characters
    on."""

    def reset(self, row):
        self.heard = 0

    def step(self, answer):
        self.heard += 1
        return "Shorter!", max(0.0, 1 - len(answer) / 40), self.heard == 3
