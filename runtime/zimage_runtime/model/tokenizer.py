"""Prompt → token ids, with Qwen's chat template.

Source: ``_encode_prompt`` in ``pipeline_z_image.py``: one user message, the generation prompt added, thinking
enabled, at most 512 tokens with the rest cut off on the right. Special tokens written in a prompt count as such.
"""

from pathlib import Path

from tokenizers import Tokenizer

from ..errors import BundleError, RequestError
from ..mistaken_files import mistaken_file

MAX_PROMPT_TOKENS = 512
"""The most tokens of a prompt that the model sees, including the template's."""


def apply_template(prompt: str) -> str:
    """The text that the text encoder reads for a prompt."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


class PromptTokenizer:
    """A bundle's tokenizer."""

    def __init__(self, path: Path) -> None:
        """Raises `BundleError` if the file is not a tokenizer."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            mistaken = mistaken_file(path)
            raise BundleError(f"{path}: {mistaken or f'not a tokenizer: {_first_line(error)}'}") from None
        # a tokenizer.json may carry padding and truncation of its own; ours are the only ones
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt in its template, 1 to 512 of them. Raises `RequestError` for broken Unicode."""
        return self.encode_counted(prompt)[0]

    def encode_counted(self, prompt: str) -> tuple[list[int], int]:
        """The ids of a prompt, and how many of its tokens were cut off."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError("the prompt is not valid UTF-8; check the terminal's encoding") from None
        ids: list[int] = self._tokenizer.encode(apply_template(prompt)).ids
        return ids[:MAX_PROMPT_TOKENS], max(len(ids) - MAX_PROMPT_TOKENS, 0)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
