"""A loaded model: what most users hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias, get_args, overload

import torch

from plait.decode import Constraint, Sampling
from plait.decode.bytes import Marginal
from plait.decode.ngrams import NgramCounts
from plait.decode.search import BeamSearch, Superposed, beam_search, superposed_drafts
from plait.decode.speculate import DraftBudget, PassTimes, SpeculatorConfig
from plait.engine.adapters import Adapters
from plait.engine.byte_model import ByteLM, Settled
from plait.engine.engine import Engine
from plait.engine.passes import Timer, one_torch_thread
from plait.engine.prefill import ROWS_PER_PASS, read_packed
from plait.engine.request import Beam, Generation, Piece, Request, Suggestion
from plait.engine.scoring import Score, score_windows, windows_of
from plait.engine.sequence import RunningSequence
from plait.engine.session import Session
from plait.errors import CapacityError, ConfigError, suggestion
from plait.memory import MemoryPlan
from plait.nn import ElasticWeights, Transformer
from plait.text import ByteVocabulary, ChatTemplate, Tokenizer, byte_vocabulary

PromptBoundary: TypeAlias = Literal["token", "exact", "healed"]

__all__ = ["LanguageModel", "Message"]

Message = Mapping[str, Any]


class LanguageModel:
    """A model with its tokenizer and the choices made when it was loaded.

    Args:
        name: what it was loaded as.
        model: the transformer.
        tokenizer: text to ids and back.
        chat_template: how a conversation becomes a prompt; None for a model without one.
        plan: how the past of a sequence is kept.
        draft: how continuations are guessed.
        draft_model: a cheaper model of the same vocabulary to guess with, where the draft takes one.

    Attributes:
        adapters: that requests may choose by name; `lm.adapters.add("FOLDER")` loads one.

    Raises:
        ConfigError: the draft cannot work with these models.
    """

    def __init__(
        self,
        *,
        name: str,
        model: Transformer,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        plan: MemoryPlan,
        draft: SpeculatorConfig,
        draft_model: Transformer | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.plan = plan
        self.draft_model = draft_model
        self._pass_times = PassTimes()
        self.draft = draft
        self.adapters = Adapters(model)
        self._byte_vocabulary: ByteVocabulary | None = None

    @property
    def draft(self) -> SpeculatorConfig:
        """How continuations are guessed; setting it takes effect from the next request on."""
        return self._draft

    @draft.setter
    def draft(self, draft: SpeculatorConfig) -> None:
        # Made once and kept, so that what a draft learns in one request helps the next.
        self._new_speculator = draft.for_model(self.model, self.draft_model)
        self.draft_budget = DraftBudget(draft.budget, times=self._pass_times)
        self._draft = draft

    @torch.inference_mode()
    def time_passes(self) -> None:
        """Time forward passes of a few rows, once, so that no request with a draft has to.

        Raises:
            IncompatibleError: the model has layers that take no drafts.
        """
        with one_torch_thread(self.model):
            self.draft_budget.prepare(Timer(self.model, self.draft_budget.clock))

    def __repr__(self) -> str:
        return f"<LanguageModel {self.name}: memory={str(self.plan)!r}, draft={str(self.draft)!r}>"

    def new_engine(self, **options: Any) -> Engine:
        """An engine for many requests; `options` are those of `Engine`."""
        options.setdefault("budget", self.draft_budget)
        return Engine(
            self.model,
            self.tokenizer,
            self.plan,
            new_speculator=self._new_speculator,
            adapters=self.adapters,
            **options,
        )

    def with_memory(self, plan: MemoryPlan | str) -> Self:
        """The same model, which keeps the past of a sequence in another way; all else is shared.

        Args:
            plan: a plan, or a spec string such as `window:size=1024`.

        Raises:
            ConfigError: no such memory.
        """
        plan = MemoryPlan.parse(plan) if isinstance(plan, str) else plan
        if not isinstance(plan, MemoryPlan):
            raise ConfigError(f"with_memory takes a MemoryPlan or a spec string. Got {plan!r}.")
        twin = copy.copy(self)
        twin.plan = plan
        return twin

    def session(self, adapter: str = "") -> Session:
        """A conversation or document that is read once and continued many times.

        Args:
            adapter: the name of the adapter that reads and answers; see `plait.engine.Adapters`.
        """
        return Session(self, adapter)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the start token where the model wants one."""
        return self.tokenizer.encode(text, add_special=True)

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            messages: one user message, or mappings with `role` and `content`.

        Raises:
            ConfigError: the model has no chat template.
            TemplateError: the template refuses the messages.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self.name} has no chat template. Use generate with a plain prompt.")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.chat_template.render(messages)
        return self.tokenizer.encode(text, parse_special=True)

    @overload
    def generate(self, prompt: str, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        prompt_boundary: PromptBoundary = "token",
        **options: Any,
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several at once without padding.

        Args:
            prompt: a text, or a sequence of texts of any lengths.
            prompt_boundary: `token` continues the prompt's tokens; `exact` finishes a last word that was cut
                anywhere in bytes first, and `healed` chooses the last token again; see `settle`.
            options: `max_new_tokens` (256), `stop` (a text or several), the other fields of `Request`, and
                the fields of `Sampling`, where `temperature` is 0 (greedy) unless given.

        Returns:
            A `Generation`, or one for each prompt in the same order.

        Example:
            >>> lm.generate("The capital of France is", max_new_tokens=8).text  # doctest: +SKIP
        """
        if prompt_boundary not in get_args(PromptBoundary):
            raise ConfigError(f"prompt_boundary must be token, exact or healed. Got {prompt_boundary!r}.")
        texts = _texts(prompt)
        if prompt_boundary == "token":
            answers = self._finish([self.request(self.encode(text), **options) for text in texts])
        else:
            sampling = self.request([0], **options).sampling
            settled = [self.settle(text, sampling, prompt_boundary) for text in texts]
            found = self._finish([self.request(each.ids, **options) for each in settled])
            answers = [
                begun.before(answer, options.get("stop", ()))
                for begun, answer in zip(settled, found, strict=True)
            ]
        return answers[0] if isinstance(prompt, str) else answers

    def bytes(self, *, marginal: Marginal | None = None, start: Sequence[int] | None = None) -> ByteLM:
        """This model as a model of bytes, whose prompts may end anywhere; see `plait.engine.ByteLM`.

        Args:
            marginal: sum over all token sequences of the last word, in a beam, and not only over those that
                the tokenizer makes.
            start: tokens before every text; those that the model wants, or else its end-of-text token.

        Raises:
            IncompatibleError: the tokenizer normalises text, or is not made of byte pairs.
            ConfigError: the model names no token that starts a text.

        Example:
            >>> lm.bytes().generate("import nump", max_bytes=8).text  # doctest: +SKIP
        """
        if self._byte_vocabulary is None:
            self._byte_vocabulary = byte_vocabulary(self.tokenizer)
        if start is None:
            start = (
                self.tokenizer.start_ids
                or [
                    id
                    for id in (self.tokenizer.id_of("<|endoftext|>"), self.tokenizer.bos_id)
                    if id is not None
                ][:1]
            )
        if not start:
            raise ConfigError(f"{self.name} names no token that starts a text. Give bytes start=[id].")
        if outside := [id for id in start if not 0 <= id < self.model.config.vocab_size]:
            raise ConfigError(
                f"start names token {outside[0]}; ids must be in [0, {self.model.config.vocab_size})."
            )
        return ByteLM(self, self._byte_vocabulary, start, marginal)

    def settle(
        self, prompt: str, sampling: Sampling | None = None, how: Literal["exact", "healed"] = "exact"
    ) -> Settled:
        """Finish the last word of a prompt that was cut anywhere, so that tokens can go on.

        Args:
            prompt: the text so far.
            sampling: how bytes or the token are chosen; greedy when left out.
            how: `exact`, byte by byte, or `healed`: the last token is chosen again among those that begin with
                its text.

        Raises:
            As `bytes`, and for prompts that its models refuse.
        """
        byte_lm = self.bytes()
        return byte_lm.heal(prompt, sampling) if how == "healed" else byte_lm.settle(prompt, sampling)

    def chat(self, messages: str | Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation; options are those of `generate`."""
        return self._finish([self.request(self.encode_chat(messages), **options)])[0]

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Generator[Piece, None, None]:
        """Continue a prompt (text or ids), yielding text as it is generated.

        Closing the iterator cancels the generation.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        engine = self.new_engine()
        sequence = engine.submit(self.request(ids, **options))
        try:
            for _, piece in engine.run():
                yield piece
        finally:
            if not sequence.is_finished:
                engine.cancel(sequence)

    def beam_search(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 32,
        ignore_end: bool = False,
        rank_by: Literal["group", "score", "logprob"] = "group",
        **settings: Any,
    ) -> list[Beam]:
        """Several likely continuations of a prompt (text or ids) by beam search or diverse beam search.

        Args:
            prompt: what to continue.
            max_new_tokens: most tokens of each continuation.
            ignore_end: go on after an end-of-sequence token.
            rank_by: order of the result: group after group and best score first, or best score or
                log-probability of all first.
            settings: fields of `plait.decode.search.BeamSearch`.

        Raises:
            ConfigError: an unknown setting, or a value outside its limits.
            CapacityError: the prompt fills the model's context.

        Example:
            >>> lm.beam_search("The sea is", num_beams=6, num_groups=3)  # doctest: +SKIP
        """
        if rank_by not in ("group", "score", "logprob"):
            raise ConfigError(f"rank_by must be group, score or logprob. Got {rank_by!r}.")
        found = beam_search(
            self.model,
            self.plan,
            self.encode(prompt) if isinstance(prompt, str) else prompt,
            BeamSearch.from_json(settings),
            max_new_tokens=max_new_tokens,
            end_tokens=frozenset() if ignore_end else self.tokenizer.eos_ids,
        )
        if rank_by != "group":
            found.sort(key=lambda hypothesis: -getattr(hypothesis, rank_by))
        return [
            Beam(self._draft_text(each.tokens, each.ended), each.tokens, each.logprob, each.score, each.group)
            for each in found
        ]

    def suggest(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 10,
        ngrams: NgramCounts | None = None,
        **settings: Any,
    ) -> list[Suggestion]:
        """A few short drafts of what may follow a prompt (text or ids), for one forward pass a token.

        Approximate, by superposed decoding (Shen et al. 2024, arXiv:2405.18400): for suggestions while
        somebody types.

        Args:
            prompt: what to continue.
            max_new_tokens: tokens of a draft; quality falls with its length.
            ngrams: counts over texts of the same kind, from `count_ngrams`; they keep the drafts apart.
            settings: fields of `plait.decode.search.Superposed`.

        Returns:
            Drafts, best first.

        Raises:
            ConfigError: an unknown setting, or a value outside its limits.
            CapacityError: the prompt fills the model's context.
        """
        found = superposed_drafts(
            self.model,
            self.plan,
            self.encode(prompt) if isinstance(prompt, str) else prompt,
            Superposed.from_json(settings),
            max_new_tokens=max_new_tokens,
            end_tokens=self.tokenizer.eos_ids,
            ngrams=ngrams,
        )
        return [
            Suggestion(self._draft_text(each.tokens, each.ended), each.tokens, each.logprob) for each in found
        ]

    def count_ngrams(self, texts: Iterable[str]) -> NgramCounts:
        """What followed every run of 1 to 5 tokens in some texts, for `suggest`."""
        return NgramCounts(self.tokenizer.encode(text) for text in texts)

    def _draft_text(self, tokens: Sequence[int], ended: bool) -> str:
        return self.tokenizer.decode(tokens[:-1] if ended else tokens, continues=True)

    def request(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        tenant: str = "",
        branch: int = 0,
        constraint: Constraint | None = None,
        trace: bool = False,
        adapter: str = "",
        sampling: Sampling | None = None,
        **settings: Any,
    ) -> Request:
        """A request from plain options; see `generate`.

        Raises:
            ConfigError: an unknown option, or a value outside its limits.
        """
        if sampling is None:
            try:
                sampling = Sampling(**{"temperature": 0.0, **settings})
            except TypeError:
                raise ConfigError(_unknown_option(settings)) from None
        elif settings:
            raise ConfigError(f"Give either sampling or its settings. Got both, with {', '.join(settings)}.")
        return Request(
            prompt=prompt,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=tuple(_texts(stop, "stop")),
            ignore_end=ignore_end,
            tenant=tenant,
            branch=branch,
            constraint=constraint,
            trace=trace,
            adapter=adapter,
        )

    def prefill(
        self, prompts: Sequence[str | Sequence[int]], *, rows_per_pass: int = ROWS_PER_PASS
    ) -> list[Session]:
        """Read prompts of any lengths side by side, without padding, each into a session of its own.

        The last token of each is left to its first answer, which begins with what the model says to it.
        Source: Zhao et al. 2024, arXiv:2404.09529 (prepacking).

        Args:
            prompts: texts or token ids.
            rows_per_pass: most tokens of one forward pass; prompts share passes as
                `plait.memory.arrangements.pack` says, and a longer one takes several.

        Returns:
            One session for each prompt, in the same order.

        Raises:
            ConfigError: an empty prompt, an id outside the vocabulary, or `rows_per_pass` below 1.
            CapacityError: a prompt fills the model's context.
        """
        if rows_per_pass < 1:
            raise ConfigError(f"prefill takes rows_per_pass of at least 1. Got {rows_per_pass}.")
        sessions = [self.session() for _ in prompts]
        for index, (prompt, session) in enumerate(zip(prompts, sessions, strict=True)):
            ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise ConfigError(f"Prompt {index} is empty. Give each at least one token.")
            if len(ids) >= self.model.config.max_positions:
                raise CapacityError(
                    f"Prompt {index} has {len(ids)} tokens; the model's context is "
                    f"{self.model.config.max_positions}, the answer included. Shorten it."
                )
            session.read_tokens(ids)
        read_packed(
            self.model,
            [session.tokens[:-1] for session in sessions],
            [session.past for session in sessions],
            rows_per_pass=rows_per_pass,
            is_prompt=True,
        )
        return sessions

    # A text is a sequence of texts too, which the first form takes precedence over.
    @overload
    def score(  # type: ignore[overload-overlap]
        self, text: str, *, context: int | None = None, stride: int | None = None
    ) -> Score: ...

    @overload
    def score(
        self, text: Sequence[str], *, context: int | None = None, stride: int | None = None
    ) -> list[Score]: ...

    def score(
        self, text: str | Sequence[str], *, context: int | None = None, stride: int | None = None
    ) -> Score | list[Score]:
        """How well the model predicts a text, or each of several, read side by side without padding.

        A long text is read in windows of `context` tokens that start `stride` tokens apart; a token is
        scored in the first window that holds something before it.

        Args:
            text: at least two tokens long; or a sequence of such texts.
            context: tokens of a window; the model's context, at most 2,048, when left out.
            stride: tokens between the starts of windows; `context` when left out. A smaller one gives
                each token more context and takes longer.

        Raises:
            ConfigError: a window or stride outside its limits, or a text too short to score.
        """
        limit = self.model.config.max_positions
        context = min(limit, 2048) if context is None else context
        stride = context if stride is None else stride
        if not 2 <= context <= limit:
            raise ConfigError(f"context must be from 2 to {limit} tokens. Got {context}.")
        if not 1 <= stride <= context:
            raise ConfigError(f"stride must be from 1 to the context of {context} tokens. Got {stride}.")
        texts = _texts(text)
        windows = [windows_of(self.encode(one), context, stride) for one in texts]
        nats = iter(score_windows(self.model, [window for of_text in windows for window in of_text]))
        scores = [
            Score(
                sum(next(nats) for _ in of_text),
                sum(len(window.ids) - 1 - window.first for window in of_text),
                len(one.encode()),
            )
            for one, of_text in zip(texts, windows, strict=True)
        ]
        return scores[0] if isinstance(text, str) else scores

    @property
    def weights(self) -> ElasticWeights:
        """What makes a model from `plait quantize --format bitstack` smaller or larger while it runs.

        Example:
            >>> lm.weights.resize("48MB").nbytes  # doctest: +SKIP
        """
        return self.model.resizable()

    def _finish(self, requests: Sequence[Request]) -> list[Generation]:
        engine = self.new_engine()
        sequences: list[RunningSequence] = [engine.submit(request) for request in requests]
        for _ in engine.run():
            pass
        return [sequence.result() for sequence in sequences]


def _texts(given: str | Iterable[str], what: str = "A prompt") -> list[str]:
    """One text, or several, as a list.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return [given]
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"{what} must be a text, or a list of texts. Got {given!r}.")
    return list(given)


def _unknown_option(settings: Mapping[str, Any]) -> str:
    known = [
        "max_new_tokens",
        "stop",
        "ignore_end",
        "tenant",
        "branch",
        "constraint",
        "trace",
        "adapter",
        *(f.name for f in dataclasses.fields(Sampling)),
    ]
    name = next((name for name in settings if name not in known), "?")
    return f"generate has no option {name!r}.{suggestion(name, known)} It takes {', '.join(known)}."
