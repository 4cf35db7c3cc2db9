"""Small tokenizers for tests that need no model file."""

from __future__ import annotations

from typing import Any

__all__ = ["byte_level_metadata", "sentencepiece_metadata"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary with every byte, six merged tokens, three control tokens and `<tag>`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [*map(chr, printable), *(chr(0x100 + i) for i in range(len(others)))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    pieces = ["<s>", "</s>", "<|im_end|>", *alphabet, *(m.replace(" ", "") for m in merges), "<tag>"]
    kinds = [CONTROL] * 3 + [NORMAL] * (256 + len(merges)) + [USER_DEFINED]
    return _metadata(
        {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": pieces,
            "token_type": kinds,
            "merges": merges,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        changes,
    )


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback, a space prefix, three control tokens and `<tag>`."""
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "w", "▁w", "▁▁", "é"]
    pieces = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{b:02X}>" for b in range(256)), *words, "<tag>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), USER_DEFINED]
    scores = [0.0] * 260 + [-float(rank) for rank in range(len(words))] + [0.0]
    return _metadata(
        {
            "model": "llama",
            "pre": "default",
            "tokens": pieces,
            "token_type": kinds,
            "scores": scores,
            "unknown_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "add_space_prefix": True,
        },
        changes,
    )


def _metadata(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """GGUF keys; a change to None takes the key away."""
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}
