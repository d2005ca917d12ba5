"""How plans are written for people: a label, then a text, in columns."""

_WIDTH = 16


def labelled(label: str, text: str) -> str:
    """One line of a plan."""
    return f"{label:<{_WIDTH}} {text}"
