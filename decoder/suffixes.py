"""What followed the last tokens of a text when they stood there before: drafting from the text itself."""

LONGEST, SHORTEST = 4, 1  # tokens of a suffix that are looked up


class Suffixes:
    """Where every few tokens of a text stood last. Grows with the text."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # what follows these tokens stands here
        self._read = 0  # tokens before here are in, as what follows others

    def continuation(self, tokens: list[int], drafted: list[int], count: int, shortest: int = SHORTEST) -> list[int]:
        """What may follow a text and what was drafted behind it: as many tokens as are wanted, or none.

        None where fewer than `shortest` last tokens have occurred before. What was found may run into itself: then it
        goes round.
        """
        self._take_in(tokens)
        text = [*tokens, *drafted] if drafted else tokens
        for length in range(min(LONGEST, len(text) - 1), shortest - 1, -1):
            if (at := self._after.get(tuple(text[-length:]))) is not None:
                return [text[at + i % (len(text) - at)] for i in range(count)]
        return []

    def _take_in(self, tokens: list[int]) -> None:
        for at in range(max(self._read, 1), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, at) + 1):
                self._after[tuple(tokens[at - length : at])] = at
        self._read = len(tokens)
