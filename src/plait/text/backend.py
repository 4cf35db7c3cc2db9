"""The `tokenizers` package, with its failures turned into Plait's errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tokenizers

from plait.errors import ModelFileError

__all__ = ["Backend", "read_backend"]


def read_backend(text: str, name: str) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, called `name` in messages; without truncation and padding.

    Raises:
        ModelFileError: the package cannot read it.
    """
    with _failures_of(f"{name} does not describe a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


class Backend:
    """Turns text into ids, with or without special tokens; adds nothing and cuts nothing off.

    Args:
        tokenizer: the package's tokenizer, which must not be changed any more.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._parsing = tokenizer
        # Whether special tokens are recognised is a setting of the package's tokenizer, not of a call:
        # two of them around one model let threads choose freely.
        self.plain = _twin(tokenizer)
        self.plain.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        """The ids of each text, which must be Unicode.

        Raises:
            ModelFileError: the tokenizer of the model fails on a text.
        """
        tokenizer = self._parsing if parse_special else self.plain
        with _failures_of("The tokenizer of this model fails on a text"):
            if len(texts) == 1:
                # A batch starts threads, which a process that forks later must not have.
                return [tokenizer.encode(texts[0], add_special_tokens=False).ids]
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def id_of(self, token: str) -> int | None:
        """The id of a token as the model file writes it."""
        return self._parsing.token_to_id(token)


def _twin(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Another tokenizer around the same model, which is shared and not copied."""
    twin = tokenizers.Tokenizer(tokenizer.model)
    # Each of them is optional, and None cannot be assigned.
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(tokenizer, part) is not None:
            setattr(twin, part, getattr(tokenizer, part))
    twin.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    return twin


@contextmanager
def _failures_of(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The package raises the bare Exception, and panics of its Rust code are not even that.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{what}: {error}. The file is damaged; download it again.") from error
