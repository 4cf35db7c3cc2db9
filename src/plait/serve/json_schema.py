"""Answers that are JSON of a given schema: a constraint by llguidance's grammars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from plait.errors import ConfigError, import_extra
from plait.text import Tokenizer

__all__ = ["Grammars", "JSONConstraint"]

# White space is allowed where JSON allows it, but not without end: some models would write nothing else.
_OPTIONS = {"whitespace_pattern": r"[ \n]{0,2}"}
_KEPT = 64


class Grammars:
    """Compiles schemas for one model.

    Args:
        tokenizer: of the model.
        vocab_size: number of logits, which may be more than the tokenizer has.
        max_bytes: largest schema.

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, max_bytes: int = 65536) -> None:
        self.guidance: Any = import_extra("llguidance", extra="serve", purpose="response_format")
        self.vocab_size = vocab_size
        self.max_bytes = max_bytes
        self.end_tokens = sorted(tokenizer.eos_ids)
        if not self.end_tokens:
            raise ConfigError("The model has no token that ends a text, so that no JSON could be complete.")
        self._tokens = self.guidance.LLTokenizer(
            _Vocabulary(tokenizer, self.end_tokens[0]), n_vocab=vocab_size, eos_token=self.end_tokens
        )
        self._known: dict[str, JSONConstraint] = {}

    def of_schema(self, schema: Any) -> JSONConstraint:
        """The constraint to JSON of a schema; True is any JSON value.

        Raises:
            ConfigError: the schema is too large, wrong, or uses what cannot be enforced.
        """
        text = json.dumps(schema)
        if len(text) > self.max_bytes:
            raise ConfigError(f"A JSON schema has at most {self.max_bytes} bytes. Got {len(text)}.")
        if text not in self._known:
            try:
                grammar = self.guidance.LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
            except ValueError as error:
                raise ConfigError(f"The JSON schema cannot be enforced: {error}.") from None
            limits = self.guidance.LLParserLimits(
                max_grammar_size=100_000, initial_lexer_fuel=500_000, verbose_errors=False
            )
            matcher = self.guidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
            if matcher.is_error():
                raise ConfigError(f"The JSON schema cannot be enforced: {_first_line(matcher.get_error())}.")
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            self._known[text] = JSONConstraint(matcher, self.vocab_size, frozenset(self.end_tokens))
        return self._known[text]


class JSONConstraint:
    """JSON of one schema.

    Args:
        matcher: at the start of a text; it is copied and never changed.
        vocab_size: number of logits.
        end_tokens: what ends a text.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.end_tokens = end_tokens

    def start(self) -> _JSONGuide:
        """A guide for a new sequence."""
        return _JSONGuide(self.matcher.deep_copy(), self.vocab_size, self.end_tokens)


class _JSONGuide:
    """Follows one sequence; it goes back where a draft tree branches."""

    def __init__(self, matcher: Any, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.end_tokens = end_tokens
        self.read: list[int] = []

    def allowed(self, generated: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        common = 0
        for ours, theirs in zip(self.read, generated, strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self.read):
            self.matcher.rollback(len(self.read) - common)
            del self.read[common:]
        coming = list(generated[common:])
        if self.end_tokens.intersection(coming):
            return None
        count = self.matcher.try_consume_tokens(coming) if coming else 0
        self.read += coming[:count]
        if count < len(coming):
            # Only a speculator tries tokens that are not allowed.
            return None
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            raise ConfigError(f"The JSON schema is too complex: {_first_line(self.matcher.get_error())}.")
        mask = np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(np.bool_)
        return np.pad(mask, (0, self.vocab_size - len(mask)))


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, end_token: int) -> None:
        self.is_tokenizer_wrapper = True
        self.eos_token_id = end_token
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0].rstrip(".")
