"""How byte-level vocabularies cut text into words before merging, by the name GGUF files use.

The cuts are part of each model's definition (the `pre_tokenizer` and `normalizer` of its published
tokenizer.json); a GGUF file holds only a name for them, `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split

__all__ = ["PRE_TOKENIZERS", "PreTokenization"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenization:
    """What happens to text before its words are merged into tokens.

    Args:
        cut: makes the pre-tokenizer.
        composes: whether text is first brought to Unicode's form NFC.
        ignores_merges: whether a word that is itself a token becomes that token at once.
        adds_bos: whether texts start with BOS when the file does not say.
    """

    cut: Callable[[], PreTokenizer]
    composes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


def _gpt2(*before: PreTokenizer) -> PreTokenizer:
    """GPT-2's own cut, built into `ByteLevel`, after the given ones."""
    return Sequence([*before, ByteLevel(add_prefix_space=False, use_regex=True)])


def _patterns(*patterns: str) -> PreTokenizer:
    """Cut out the matches of each pattern in turn."""
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def _words_and_numbers(digits: str, *, letter: str = r"\p{L}") -> Callable[[], PreTokenizer]:
    """The cut of cl100k and its descendants, which differ in how numbers and marks are grouped."""
    marks = letter.strip("[]")
    return lambda: _patterns(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?[^\s{marks}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _cased_words(digits: str, suffix: str) -> Callable[[], PreTokenizer]:
    """The cut of o200k and Tekken: a word is capitals, then small letters."""
    capital, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return lambda: _patterns(
        f"{before}{capital}*{small}+{suffix}|{before}{capital}+{small}*{suffix}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _digits_apart() -> PreTokenizer:
    return _gpt2(Digits(individual_digits=True))


def _falcon() -> PreTokenizer:
    return Sequence(
        [
            Punctuation("contiguous"),
            ByteLevel(add_prefix_space=False, use_regex=True),
            Digits(individual_digits=False),
            Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


def _deepseek_coder() -> PreTokenizer:
    patterns = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u0800-\u9fa5\uac00-\ud7ff]+"]
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    digits = Digits(individual_digits=True)
    return Sequence([*cuts, digits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _deepseek_v3() -> PreTokenizer:
    return _patterns(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    )


def _bloom(*after: str) -> PreTokenizer:
    marks = "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"
    return _patterns(rf" ?[^(\s|.,!?{marks})]+", *after)


def _default() -> PreTokenizer:
    """The cut of files that name none, as llama.cpp defines it."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return _patterns(r"[\p{P}\$\+<=>\^~\|]+", gpt2, r"\p{N}+", "[0-9][0-9][0-9]")


_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_GPT2 = PreTokenization(cut=_gpt2)
_NEOX = PreTokenization(cut=_gpt2, composes=True)
_STARCODER = PreTokenization(cut=_digits_apart)
_COMMAND_R = PreTokenization(cut=_digits_apart, composes=True)
_CL100K = PreTokenization(cut=_words_and_numbers(r"\p{N}{1,3}"))
_LLAMA3 = PreTokenization(cut=_words_and_numbers(r"\p{N}{1,3}"), ignores_merges=True, adds_bos=True)
_SINGLE_DIGITS = PreTokenization(cut=_words_and_numbers(r"\p{N}"))
_QWEN2 = PreTokenization(cut=_words_and_numbers(r"\p{N}"), composes=True)
_QWEN35 = PreTokenization(cut=_words_and_numbers(r"\p{N}", letter=r"[\p{L}\p{M}]"), composes=True)
_TEKKEN = PreTokenization(cut=_cased_words(r"\p{N}", ""), ignores_merges=True, adds_bos=True)
_O200K = PreTokenization(cut=_cased_words(r"\p{N}{1,3}", _CONTRACTION))
_BLOOM = PreTokenization(cut=_bloom)

PRE_TOKENIZERS: dict[str, PreTokenization] = {
    "default": PreTokenization(cut=_default),
    **dict.fromkeys(["gpt-2", "phi-2", "jais", "exaone4", "trillion", "granite-docling"], _GPT2),
    **dict.fromkeys(["gigachat", "mellum", "a.x-4.0"], _GPT2),
    **dict.fromkeys(["olmo", "mpt"], _NEOX),
    **dict.fromkeys(["smollm", "starcoder", "refact", "codeshell", "exaone"], _STARCODER),
    **dict.fromkeys(["minerva-7b", "mellum2"], _STARCODER),
    "command-r": _COMMAND_R,
    **dict.fromkeys(["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"], _LLAMA3),
    **dict.fromkeys(["midm-2.0", "lfm2"], _LLAMA3),
    **dict.fromkeys(["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], _CL100K),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "megrez"], _QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(["stablelm2", "hunyuan", "grok-2", "solar-open"], _SINGLE_DIGITS),
    "tekken": _TEKKEN,
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "minimax-m2"], _O200K),
    "deepseek-coder": PreTokenization(cut=_deepseek_coder),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense"], PreTokenization(cut=_deepseek_v3)),
    "falcon": PreTokenization(cut=_falcon),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], _BLOOM),
    "viking": PreTokenization(cut=lambda: _bloom(r"\p{N}")),
}
