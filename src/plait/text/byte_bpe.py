"""Learning a vocabulary: byte-level BPE, which spells every text.

Source: Sennrich et al. 2016, arXiv:1508.07909, over the bytes of GPT-2 (Radford et al. 2019). The
merges are learned by the `tokenizers` package; the same texts give the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from plait.errors import ConfigError
from plait.text.tokenizer import Tokenizer

__all__ = ["END", "PLACEHOLDER", "learn_byte_bpe"]

# Special tokens that every learned vocabulary begins with: the end of a text, and the token that stands
# for one that is not known yet (lexical unit decoding).
END, PLACEHOLDER = "<|endoftext|>", "<|placeholder|>"


def learn_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens: the 256 bytes, two special tokens, and what texts merge most.

    Digits stay apart. There may be fewer tokens, when the texts have no more pairs that occur twice.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes.
    """
    special = [END, PLACEHOLDER]
    least = 256 + len(special)
    if vocab_size < least:
        raise ConfigError(
            f"learn_byte_bpe takes a vocab_size of at least {least}, for every byte. Got {vocab_size}."
        )
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        ),
    )
    return Tokenizer.from_json(made.to_str(), config={"eos_token": END})
