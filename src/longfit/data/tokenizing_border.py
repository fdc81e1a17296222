"""What goes wrong in a tokenizer while it reads a text becomes an error of ours that names it.

A ``tokenizer.json`` carries regular expressions. One that would try for ever is given up by the library that matches
it, with a panic, which is not even an Exception.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from longfit.errors import ModelError
from longfit.files.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizing(tokenizer: "PreTrainedTokenizerBase") -> AbstractContextManager[None]:
    """Enter this around every call of a tokenizer with a text from outside.

    Raises: ModelError: for every exception inside.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    return reading(name, "a text, with this tokenizer,", ModelError, do="fetch its files again, or give another model")
