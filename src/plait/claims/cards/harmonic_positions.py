"""Attention that costs by distance reads on past the length it was trained on, where rotary positions alone fail."""

from __future__ import annotations

from plait.claims.claim import Bar, Claim, Measurements, Quantity, Run

__all__ = ["CLAIM"]

_TRAINED, _LENGTH = 256, 1024


def _measure(run: Run) -> Measurements:
    from plait.claims.reading import token_nats
    from plait.claims.tuning import byte_model
    from plait.nn.distance_bias import Harmonic, Linear
    from plait.train import python_corpus

    corpus = python_corpus(code=run.pick(0.5, 0.01))
    biases = {"rotary": None, "harmonic": Harmonic(), "linear": Linear()}
    found: dict[str, Quantity] = {}
    for name, bias in biases.items():
        yield f"training a model of bytes on {_TRAINED} of them, positions: {name}"
        rows = run.pick(8, 1) * _TRAINED
        lm = byte_model(run, corpus, rows=rows, trained=_TRAINED, context=_LENGTH, distance_bias=bias)
        long = [ids for ids in map(lm.tokenizer.encode, corpus.held_out) if len(ids) >= _LENGTH]
        texts = [ids[:_LENGTH] for ids in long[-run.pick(24, 1) :]]
        yield f"reading {len(texts)} texts of {_LENGTH} bytes"
        nats = [token_nats(lm, "full", ids, _TRAINED) for ids in texts]
        for where, stop in (("256", _TRAINED - 1), ("1024", _LENGTH - 1)):
            read = [value for of_text in nats for value in of_text[:stop]]
            found[f"{name}_at_{where}"] = Quantity(sum(read) / len(read), "nats/byte", samples=len(read))
    for name in ("harmonic", "linear"):
        for what, where, sign in (("gain", "1024", -1), ("cost", "256", 1)):
            difference = found[f"{name}_at_{where}"].value - found[f"rotary_at_{where}"].value
            found[f"{name}_{what}_at_{where}"] = Quantity(sign * difference, "nats/byte")
    return found


CLAIM = Claim(
    name="harmonic-positions",
    title="Positions that cost by distance",
    headline=(
        "Rotary attention multiplied by a power of the distance, a bias of harmonic numbers, reads texts longer than those "
        "it was trained on."
    ),
    source="after Li 2024, arXiv:2410.18441; the linear bias is ALiBi, Press et al. 2022, arXiv:2108.12409",
    scale=(
        "Three models of bytes (2 blocks of width 96, 4 heads) from the same seed on the same 600 steps of 2,048 bytes of "
        "Python's library and manual, in pieces of 256: rotary positions alone, with a harmonic bias of slopes 4/h, and with a "
        "linear one of ALiBi's slopes. Each reads 24 held-out texts of 1,024 bytes; nats a byte over the first 256 of each, and over all."
    ),
    bars=(
        *(
            Bar(
                quantity=f"{name}_gain_at_1024",
                relation=">=",
                value=0.2,
                unit="nats/byte",
                why="At four times the length of training rotary positions alone must fail, and not with the bias.",
            )
            for name in ("harmonic", "linear")
        ),
        *(
            Bar(
                quantity=f"{name}_cost_at_256",
                relation="<=",
                value=0.02,
                unit="nats/byte",
                why="Within the length of training nothing may be lost.",
            )
            for name in ("harmonic", "linear")
        ),
    ),
    measure=_measure,
)
