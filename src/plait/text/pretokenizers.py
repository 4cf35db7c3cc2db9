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
_THREE_DIGITS, _ONE_DIGIT = r"\p{N}{1,3}", r"\p{N}"

_CL100K = _words_and_numbers(_THREE_DIGITS)
_QWEN = _words_and_numbers(_ONE_DIGIT)
_QWEN_WITH_MARKS = _words_and_numbers(_ONE_DIGIT, letter=r"[\p{L}\p{M}]")
_TEKKEN = _cased_words(_ONE_DIGIT, "")
_O200K = _cased_words(_THREE_DIGITS, _CONTRACTION)

_NAMES: tuple[tuple[PreTokenization, str], ...] = (
    (PreTokenization(cut=_default), "default"),
    (PreTokenization(cut=_gpt2), "gpt-2 phi-2 jais exaone4 trillion granite-docling gigachat mellum a.x-4.0"),
    (PreTokenization(cut=_gpt2, composes=True), "olmo mpt"),
    (PreTokenization(cut=_digits_apart), "smollm starcoder refact codeshell exaone minerva-7b mellum2"),
    (PreTokenization(cut=_digits_apart, composes=True), "command-r"),
    (PreTokenization(cut=_CL100K), "dbrx smaug-bpe chatglm-bpe glm4"),
    (
        PreTokenization(cut=_CL100K, ignores_merges=True, adds_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (PreTokenization(cut=_QWEN), "stablelm2 hunyuan grok-2 solar-open"),
    (PreTokenization(cut=_QWEN, composes=True), "qwen2 deepseek-r1-qwen megrez"),
    (PreTokenization(cut=_QWEN_WITH_MARKS, composes=True), "qwen35"),
    (PreTokenization(cut=_TEKKEN, ignores_merges=True, adds_bos=True), "tekken"),
    (PreTokenization(cut=_O200K), "gpt-4o llama4 kanana2 minimax-m2"),
    (PreTokenization(cut=_deepseek_coder), "deepseek-coder"),
    (PreTokenization(cut=_deepseek_v3), "deepseek-v3 hunyuan-dense"),
    (PreTokenization(cut=_falcon), "falcon"),
    (PreTokenization(cut=_bloom), "bloom poro-chat gpt3-finnish"),
    (PreTokenization(cut=lambda: _bloom(r"\p{N}")), "viking"),
)

PRE_TOKENIZERS = {name: known for known, names in _NAMES for name in names.split()}
