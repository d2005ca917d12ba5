"""What an error must convey: its class, and one line with all facts that a user needs from it.

Facts are names, numbers, options, commands and file names. Sentences are not: they may be worded better any day.
"""

import contextlib
import re
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def raises_with(error: type[BaseException], *facts: object) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Asserts that the block raises exactly `error`, in one line with every fact."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.type is error, f"{caught.type.__name__} was raised: {caught.value}"
    assert_facts(str(caught.value), *facts)


def assert_facts(text: str, *facts: object) -> None:
    """Asserts that a text is one line with every fact as a word of its own: 8 is not in 128, nor int8 in uint8."""
    assert facts, "no fact is asserted"
    assert len(text.splitlines()) == 1, text
    missing = [str(fact) for fact in facts if not has_fact(text, fact)]
    assert not missing, f"{missing} not in: {text}"


def has_fact(text: str, fact: object) -> bool:
    """Whether a fact is in a text, as a word of its own."""
    wanted = str(fact)
    assert wanted, "an empty fact is in every text"
    begin = r"(?<!\w)(?<!\d\.)" if re.match(r"\w", wanted) else ""
    end = r"(?!\w)(?!\.\d)" if re.search(r"\w$", wanted) else ""
    if wanted.startswith("--"):
        end += r"(?!-\w)"  # or --low would be in --low-memory
    return re.search(begin + re.escape(wanted) + end, text) is not None


def memory_amounts(text: str) -> list[float]:
    """The amounts of memory in a text, in GiB, in the order in which they appear."""
    return [float(amount) for amount in re.findall(r"([\d.]+) GiB", text)]
