"""The axes of choice: how strands are stored (codec) and which of them a query sees (policy)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from plait.errors import ConfigError, IncompatibleError, UnknownNameError, suggestion
from plait.memory.rows import Segment
from plait.memory.sealing import plain_run, seal_oldest
from plait.memory.strand import FrozenStrand, Heads, Strand
from plait.ops import Mask, Partial
from plait.spec import Axis, Spec, split_specs

if TYPE_CHECKING:
    from plait.memory.memory import Memory

__all__ = [
    "CODECS",
    "POLICIES",
    "Choice",
    "Codec",
    "MemoryPlan",
    "Notes",
    "Policy",
    "Seen",
    "Visit",
    "Watcher",
]

CODECS = Axis("codec")
POLICIES = Axis("policy")


class Visit(NamedTuple):
    """One strand that queries of a segment see, and how they see it.

    Attributes:
        strand: what is visited.
        window: visible positions, the query's own included; None for no limit.
        mask: what each query of the segment sees, in place of the segment's own mask; a shared strand
            that every query sees whole is still visited once for all sequences.
        turned_at: where every query stands in the strand's frame. None for its own position; a number
            pins the distance to the strand, wherever the query is.
        queries: the run of queries, as indices within the segment, that visit; all of them when None.
        log_weight: added to the log-sum-exp of this part before it is merged with the others.
    """

    strand: Strand
    window: int | None = None
    mask: Mask | None = None
    turned_at: int | None = None
    queries: range | None = None
    log_weight: float = 0.0


class Choice:
    """Strands of which the queries of a segment see those that match them best; it stands among the visits.

    Queries are compared as if all of them stood at one frame position, and visit the strands from there, whose keys are not
    turned. The score of a strand is the product of its vectors with the mean query, summed over heads. To support it, derive
    from this class and say how numbers become strands.

    Args:
        index: (B, H D) fp32, a vector of each query head for each of the strands.
        most: strands that are seen; all of them where there are no more.
        turned_at: where every query stands in the frames of the strands.
        window, mask: as of `Visit`.

    Attributes:
        found: int64 (min(most, B),), the strands that were seen last, in rising order; written in place by whoever
            computes attention.
    """

    def __init__(
        self, index: Tensor, most: int, turned_at: int, window: int | None = None, mask: Mask | None = None
    ) -> None:
        self.index, self.most, self.turned_at = index, most, turned_at
        self.window, self.mask = window, mask
        self.found = np.arange(min(most, len(index)), dtype=np.int64)

    def choose(self, queries: Callable[[int], Tensor]) -> list[Visit]:
        """Find what matches best, and how it is seen.

        Args:
            queries: the queries (n, H, D) as if all of them stood at the given frame position.
        """
        if len(self.index) > self.most:
            mean_HD = queries(self.turned_at).detach().float().mean(dim=0)
            scores = self.index @ mean_HD.flatten()
            self.found[:] = np.sort(scores.topk(self.most).indices.cpu().numpy())
        return [
            Visit(strand, self.window, self.mask, turned_at=self.turned_at)
            for strand in self.strands(self.found.tolist())
        ]

    def strands(self, numbers: Sequence[int]) -> list[Strand]:
        """The strands with these numbers, oldest first; some may be joined to one."""
        raise NotImplementedError

    @property
    def places(self) -> Tensor | None:
        """Where all strands lie, int64 (B, 11), each `Strand.place`; None where native code cannot read them all."""
        return None


class Notes:
    """What a codec or policy keeps about one layer of one sequence, beside its strands.

    Positions are those of the sequence. A memory calls these as it changes.
    """

    # The codec or policy whose notes they are, as users write it.
    method: ClassVar[str] = ""

    def fork(self) -> Notes:
        """Notes of a twin of the memory; neither may see later changes of the other."""
        raise NotImplementedError

    def commit(self, kept: Sequence[int], count: int) -> None:
        """Of `count` rows that were pending, only those with the indices `kept` become part of the past."""

    def truncate(self, length: int) -> None:
        """Forget what was noted of tokens from position `length` on."""
        raise NotImplementedError

    def check_splice(self) -> None:
        """Raise `IncompatibleError` where `splice` is not implemented."""
        raise IncompatibleError(
            f"{self.method or type(self).__name__} notes where tokens stand and cannot take over moved ones, as edits and parallel "
            "contexts need. Use memory='full', or read the text again."
        )

    def splice(self, source: Notes, start: int, stop: int, position: int) -> None:
        """Take over what another memory's notes say of tokens [start, stop), which now stand from `position` on.

        To support it, override this and `check_splice`.
        """
        self.check_splice()

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept, so that it can be counted."""
        raise NotImplementedError


class Seen(NamedTuple):
    """What one segment's queries found, told to whoever observes.

    Attributes:
        segment: the rows and positions of the queries.
        positions: (n,) int64, where each query stands in the sequence.
        queries: (n, H, D) fp32, rotated in the frame of the memory's tail.
        lse: (n, H) fp32, the log-sum-exp of the scores of everything they saw.
    """

    segment: Segment
    positions: Tensor
    queries: Tensor
    lse: Tensor


class Watcher(Protocol):
    """Whoever wants to know what queries visited; it must change nothing."""

    def __call__(
        self,
        memory: Memory,
        segment: Segment,
        visits: Sequence[Visit],
        parts: Sequence[Partial | None],
        merged: Partial,
    ) -> None:
        """Take the visits of one segment, the part that each gave, and all parts merged."""
        ...


class Codec(Spec, axis=CODECS):
    """How committed tokens are stored.

    New tokens stand in the memory's tail as plain numbers. A codec says how many of the oldest of them
    are `ready` and how they are stored (`encode`); or it replaces `seal` altogether.

    To add one: one file in `plait/memory/codecs/` with a frozen dataclass that derives from this
    class and the `Strand` it makes, and one import in that folder's `__init__.py`.
    """

    # Whether another codec may hold this one: `encode` is all that it does, and needs no notes.
    holdable: ClassVar[bool] = True

    # Whether a strand that it stores lacks some of the tokens that it stands for, so that it cannot be cut.
    drops_tokens: ClassVar[bool] = False

    @property
    def num_last_queries(self) -> int:
        """How many of the last queries `encode` chooses by, when its notes are `LastQueries` of a codec that holds it.

        0 for a codec that cannot be stored by another's notes.
        """
        return 0

    @property
    def exact_first(self) -> int:
        """First tokens of the sequence that stay plain numbers."""
        return 0

    @property
    def tail_dtype(self) -> torch.dtype:
        """Number format of the dense tail, where new and speculative tokens live."""
        return torch.float32

    @property
    def is_shareable(self) -> bool:
        """Whether a sequence may begin with the strands of another that has read the same tokens.

        Only a codec can promise it that keeps no notes, and stores a token in the same way whatever came
        after it and however the tokens came in pieces; `Strand.copied` of its strands must really copy.
        """
        return False

    def new_notes(self) -> Notes | None:
        """What this codec keeps beside the strands of one memory (`memory.codec_notes`); None for nothing."""
        return None

    def observe(self, memory: Memory, seen: Seen) -> None:
        """Learn from the queries of a forward pass, after their rows were written and before the commit."""

    def observes(self, memory: Memory) -> bool:
        """Whether `observe` would learn anything from the next forward pass."""
        return type(self).observe is not Codec.observe

    @property
    def learns_from_prompt(self) -> bool:
        """Whether the form of a stored token depends on a whole prompt, so that none is stored while it is read."""
        return False

    def check_heads(self, heads: Heads) -> None:
        """Raise `ConfigError` if layers of this geometry cannot be stored."""

    def holding(self, inner: Codec) -> Codec:
        """This codec, with another one to store the numbers that it keeps.

        Raises:
            IncompatibleError: it keeps none, or not in a form that the other could store.
        """
        raise IncompatibleError(
            f"Codec {self.name} cannot be followed by {inner.name}: it leaves no numbers to store. "
            f"Write {self.name} last, or choose one of them."
        )

    def whole(self, count: int) -> int:
        """The most of `count` tokens that `encode` takes at once."""
        return count

    def ready(self, count: int) -> int:
        """How many of the oldest of `count` tokens that are still plain numbers are stored now."""
        return 0

    def rows_at_once(self, memory: Memory, least: int, most: int) -> int:
        """How many pending rows of a sequence are committed together, as if they came one by one.

        A row is computed with what is stored before it. Where the codec would have stored tokens after one
        of the rows, those behind it were computed too early, so that the run ends there.

        Args:
            least: rows that are committed in any case.
            most: rows that are to be committed; at least `least`.
        """
        if type(self).ready is Codec.ready or least >= most:
            return most
        plain = sum(map(len, plain_run(memory))) - memory.pending
        position = len(memory) - memory.pending - plain
        exact = max(self.exact_first - position, 0)
        due = (n for n in range(least, most) if plain + n > exact and self.ready(plain + n - exact))
        return next(due, most)

    def encode(self, strand: FrozenStrand, notes: Notes | None) -> Strand:
        """The same tokens in this codec's form. The strand stays as it is.

        Args:
            notes: what this codec keeps beside the strands.

        Raises:
            ConfigError: numbers that the form cannot hold, such as NaN.
        """
        raise NotImplementedError

    @property
    def seals_nothing(self) -> bool:
        """Whether tokens stay in the tail as they were written, so that `seal` never does anything."""
        return False

    def seal(self, memory: Memory, *, is_prompt: bool = False) -> None:
        """Store committed tokens of the tail; called after every commit.

        Moves tokens from `memory.tail` to the end of `memory.strands`; changes no shared strand.

        Args:
            is_prompt: more of the same prompt follows. Nothing is stored then, so that a prompt is read
                with exact attention and stored at its end.
        """
        if not is_prompt:
            seal_oldest(memory, self)


class Policy(Spec, axis=POLICIES):
    """Which strands a query sees.

    To add one: one file in `plait/memory/policies/` with a frozen dataclass that derives from this
    class, and one import in that folder's `__init__.py`.
    """

    @property
    def max_distance(self) -> int | None:
        """The largest distance at which a query sees a token; None where it grows with the sequence.

        Where there is one, a sequence may be longer than those that a model was trained on.
        """
        return None

    # Whether what is seen ends at a place in a strand, which is cut there; one that cannot be cut would be in the way.
    cuts_strands: ClassVar[bool] = False

    @property
    def stores(self) -> bool:
        """Whether this policy has tokens stored itself (`Codec.encode`); the codec seals none then."""
        return False

    def redrawn(self, number: int) -> Self:
        """This policy with the draws of a step of training, counted from 0; itself where nothing is drawn.

        A model that met the same draws in every step would learn those, and not what the policy is.
        """
        return self

    def check_layer(self, heads: Heads) -> None:
        """Raise `IncompatibleError` if this policy cannot serve a layer of that geometry."""
        if self.max_distance is not None and heads.rope is not None and heads.rope.rule is not None:
            raise IncompatibleError(
                f"{self} limits distances, but this model turns keys at speeds that depend on the length of the "
                "sequence. Choose memory='window', or another model."
            )

    def new_notes(self) -> Notes | None:
        """What this policy keeps beside the strands of one memory (`memory.policy_notes`); None for nothing."""
        return None

    def observe(self, memory: Memory, seen: Seen) -> None:
        """Learn from the queries of a forward pass, after their rows were written and before the commit."""

    def observes(self, memory: Memory) -> bool:
        """Whether `observe` would learn anything from the next forward pass."""
        return type(self).observe is not Policy.observe

    def runs(self, segment: Segment) -> list[range]:
        """The segment's queries in runs that are attended one after the other; all at once by default."""
        return [range(segment.length)]

    def visits(self, memory: Memory, segment: Segment) -> Sequence[Visit | Choice]:
        """The strands that the segment's queries see, oldest first; the tail is one of them.

        Called when the segment's rows are written; by a native program when there is room for them, which it fills later.
        A visit to a copy that was made of them needs a `Far` mask, which the program leaves to the modules.
        """
        return [Visit(strand, memory.window) for strand in memory.all_strands()]

    def visits_key(self, memory: Memory, segment: Segment) -> Hashable | None:
        """What the visits of a segment depend on beside the strands that are held and their lengths.

        While it stays the same, the visits of an earlier segment of no other kind of mask stand for those of this one. None
        where they have to be asked for in each pass.
        """
        return () if type(self).visits is Policy.visits else None

    @property
    def is_shareable(self) -> bool:
        """Whether a sequence may begin with the strands of another that has read the same tokens.

        Only a policy can promise it that keeps no notes and neither drops nor rearranges strands.
        """
        return False

    def rows_at_once(self, memory: Memory, least: int, most: int) -> int:
        """How many pending rows saw what they would have seen one by one; see `Codec.rows_at_once`."""
        return most

    def gather(self, memory: Memory) -> None:
        """Take what is needed of tokens just committed, before the codec stores them; called by every commit."""

    def settle(self, memory: Memory) -> None:
        """Drop or rearrange strands after a commit or a fork.

        May change `memory.strands` and `memory.tail`, but no shared strand itself.
        """

    def check_truncate(self, memory: Memory, length: int) -> None:
        """Raise `ConfigError` if the token after `length` tokens would see one that was dropped."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The choice made on each axis, for every layer of a sequence.

    Args:
        codec: how strands are stored.
        policy: which strands a query sees.
        device: where strands live.
        differentiable: whether pending rows keep the graph that computed them, so that a model is trained
            through the memory: queries see what they will see in use. What a commit moves elsewhere is detached.

    Raises:
        IncompatibleError: the policy has tokens stored while a prompt is read, the codec only behind it; the policy
            cuts strands, of which the codec drops tokens; or gradients are to flow through tokens that are stored
            in another form.
    """

    codec: Codec = field(default_factory=lambda: CODECS.parse("dense"))
    policy: Policy = field(default_factory=lambda: POLICIES.parse("full"))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    differentiable: bool = False

    def __post_init__(self) -> None:
        if self.differentiable and (self.policy.stores or not self.codec.seals_nothing):
            raise IncompatibleError(
                f"No gradient flows through {self}, which stores tokens in another form. Train through a policy that "
                "keeps plain numbers, such as prflash, lm-infinite or window, without a codec."
            )
        if self.policy.stores and self.codec.learns_from_prompt:
            raise IncompatibleError(
                f"Policy {self.policy.name} stores blocks while a prompt is read, but codec {self.codec.name} chooses "
                f"what to keep at its end. Use another codec with {self.policy.name}, such as gear."
            )
        if self.policy.cuts_strands and self.codec.drops_tokens:
            raise IncompatibleError(
                f"Policy {self.policy.name} sees tokens by where they stand, but codec {self.codec.name} keeps some of a "
                f"run without their places. Use another codec with {self.policy.name}, such as gear, or policy full."
            )

    @classmethod
    def parse(cls, text: str, device: torch.device | str = "cpu") -> MemoryPlan:
        """Read a spec string such as `"window:size=1024,think:ratio=0.4,gear:bits=4"`.

        Each codec stores what the one before it leaves.

        Raises:
            ConfigError: an unknown method or setting, two policies, or two codecs that do not stack.
        """
        codecs: list[Codec] = []
        policy: Policy | None = None
        for spec in split_specs(text):
            name = spec.partition(":")[0]
            if name in CODECS.methods:
                codecs.append(CODECS.parse(spec))
            elif name in POLICIES.methods:
                if policy is not None:
                    raise ConfigError(f"Two policies in {text!r}: {policy.name} and {name}. Choose one.")
                policy = POLICIES.parse(spec)
            else:
                known = [*CODECS.names(), *POLICIES.names()]
                raise UnknownNameError(
                    f"Unknown memory method {name!r}.{suggestion(name, known)}"
                    f" Codecs: {', '.join(CODECS.names())}. Policies: {', '.join(POLICIES.names())}."
                )
        while len(codecs) > 1:
            inner = codecs.pop()
            codecs[-1] = codecs[-1].holding(inner)
        return cls(
            codec=codecs[0] if codecs else CODECS.parse("dense"),
            policy=policy or POLICIES.parse("full"),
            device=torch.device(device),
        )

    @property
    def is_shareable(self) -> bool:
        """Whether sequences may share what they remember of a common beginning."""
        return self.codec.is_shareable and self.policy.is_shareable

    @property
    def may_observe(self) -> bool:
        """Whether codec or policy ever learn from queries; `Memory.is_observed` says whether they want the next ones."""
        policy, codec = type(self.policy), type(self.codec)
        return policy.observe is not Policy.observe or codec.observe is not Codec.observe

    @property
    def keeps_as_written(self) -> bool:
        """Whether a commit changes nothing: no token is stored in another form, noted, moved or dropped."""
        policy = type(self.policy)
        is_passive = policy.gather is Policy.gather and policy.settle is Policy.settle
        return is_passive and not self.policy.stores and self.codec.seals_nothing

    def longest(self, trained: int) -> int:
        """Tokens that a sequence may have under this plan, of a model trained on sequences of `trained` tokens.

        Without end where the policy keeps every distance within what was trained.
        """
        limit = self.policy.max_distance
        return trained if limit is None or limit > trained else sys.maxsize

    def __str__(self) -> str:
        return f"{self.policy},{self.codec}"
