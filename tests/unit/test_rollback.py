"""What a rollback goes back to."""

import pytest

from online.activations import rollback_target

START = ("initial", 1)


@pytest.mark.parametrize(
    ("history", "target"),
    [
        ([], None),
        ([START], None),
        ([START, ("promotion", 2)], 1),
        ([START, ("promotion", 2), ("promotion", 3)], 2),
        ([START, ("promotion", 2), ("promotion", 3), ("rollback", 2)], 1),
        ([START, ("promotion", 2), ("promotion", 3), ("rollback", 2), ("auto_rollback", 1)], None),
        ([START, ("promotion", 2), ("rollback", 1), ("promotion", 3)], 1),
        ([START, ("promotion", 2), ("manual", 1)], 2),
        ([START, ("promotion", 2), ("promotion", 3), ("manual", 1), ("rollback", 3)], 2),
        ([START, ("promotion", 2), ("manual", 1), ("manual", 2), ("rollback", 1)], 2),
    ],
)
def test_rollbacks_pop_what_activations_pushed(
    history: list[tuple[str, int]], target: int | None
) -> None:
    """Rollbacks in a row go further back each time; they do not swing between two versions."""
    assert rollback_target(history) == target
