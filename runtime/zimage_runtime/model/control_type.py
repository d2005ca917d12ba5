"""What can be made of a photograph before a ControlNet reads it. Commands list the names before they need more."""

from enum import StrEnum


class ControlType(StrEnum):
    """The names of the kinds."""

    CANNY = "canny"  # edges, white on black
