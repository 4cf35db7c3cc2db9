"""The engine: many requests, one packed forward pass a step, no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from plait.decode import Sampler, token_ids
from plait.decode.speculate import Account, Context, DraftBudget, Proposal, Speculator, Step, Tree, verify
from plait.engine.adapters import Adapters
from plait.engine.budget import MemoryBudget
from plait.engine.feed import Drafting, Feed, Guesser
from plait.engine.metrics import Metrics
from plait.engine.passes import Timer, forward, one_torch_thread, restored_on_failure
from plait.engine.prefix_tree import Namespace, PrefixTree, common_prefix
from plait.engine.request import Piece, Request
from plait.engine.scheduler import Scheduler
from plait.engine.sequence import RunningSequence
from plait.engine.trace import Tracer
from plait.errors import CapacityError, ConfigError, IncompatibleError
from plait.memory import MemoryPlan, Past, Rows
from plait.nn import Transformer
from plait.text import Tokenizer

__all__ = ["Engine"]


class Engine:
    """Continues many sequences at once.

    Every step is one forward pass over packed rows: one row, or a small draft tree, for each sequence
    that is generating, and as much of the waiting prompts as `rows_per_step` allows. Tenants get equal
    shares of rows and places. Sequences of one tenant share what they remember of a common beginning,
    where the memory allows it. An engine belongs to one thread; `AsyncEngine` is for many.

    Args:
        model: the transformer.
        tokenizer: for the text of answers.
        plan: how each sequence's past is kept.
        new_speculator: makes the speculator of a new sequence.
        budget: chooses which guesses are scored; all of them when left out.
        rows_per_step: most rows of one forward pass.
        max_sequences: most sequences that generate at the same time; others wait in order of arrival.
        memory_bytes: most bytes of keys, values and states between steps. As long as there is room, what
            finished requests have read is kept for later ones. When there is none, that is forgotten
            first; then the youngest sequences give their past back, wait, and read again. None for no
            limit: then only requests that run at the same time share.
        share_prefixes: whether sequences share what they remember of a common beginning. Sequences with different
            adapters never do.
        adapters: of `model`; looked up when a request comes.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        *,
        new_speculator: Callable[[], Speculator],
        budget: DraftBudget | None = None,
        rows_per_step: int = 512,
        max_sequences: int = 64,
        memory_bytes: int | None = None,
        share_prefixes: bool = True,
        adapters: Adapters | None = None,
    ) -> None:
        if rows_per_step < 1 or max_sequences < 1:
            raise ConfigError(
                f"Engine needs rows_per_step and max_sequences of at least 1. Got {rows_per_step} and {max_sequences}."
            )
        if memory_bytes is not None and memory_bytes < 1:
            raise ConfigError(f"Engine.memory_bytes must be at least 1, or None. Got {memory_bytes}.")
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.new_speculator = new_speculator
        self.draft_budget = DraftBudget("off") if budget is None else budget
        self.rows_per_step = rows_per_step
        self.adapters = Adapters(model) if adapters is None else adapters
        self._longest = plan.longest(model.config.max_positions)
        self._empty = model.new_past(plan)
        # A memory that keeps every token as it is: its bytes can be told beforehand.
        self._is_plain = self._empty.is_shareable
        self._shares = share_prefixes and self._is_plain
        self._tree = PrefixTree()
        self._budget = MemoryBudget(memory_bytes, self._tree)
        self._scheduler = Scheduler(max_sequences)
        self._guessers: dict[RunningSequence, Guesser] = {}
        self._unreturned: list[tuple[RunningSequence, Piece]] = []
        self._counts = Metrics()
        self._tracer = Tracer(model)
        self._drafting = Drafting()
        self._timer = Timer(model, self.draft_budget.clock)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not len(self._scheduler)

    @property
    def metrics(self) -> Metrics:
        """What the engine does now, and what it has done since it was made."""
        if self._budget.limit is None:
            for sequence in self._scheduler.everyone:
                self._budget.update(sequence)
        return self._counts._replace(
            waiting=self._scheduler.num_waiting,
            running=len(self._scheduler.running),
            memory_bytes=self._budget.used,
            prefix_bytes=self._tree.nbytes,
        )

    def check(self, request: Request) -> None:
        """Raise what `submit` would raise; may be called from any thread.

        Raises:
            ConfigError: a prompt id or a biased id is outside the vocabulary, or no adapter has the name asked for.
            IncompatibleError: the memory cannot keep what the adapter puts before every text.
            CapacityError: the prompt fills the model's context, or prompt and answer could not be
                remembered within `memory_bytes`.
        """
        self._checked(request)

    def _checked(self, request: Request) -> Sampler:
        """The sampler of a request that `check` has nothing to say against."""
        vocab_size, limit = self.model.config.vocab_size, self._longest
        if (adapter := self.adapters.find(request.adapter)) is not None:
            adapter.check_plan(self.plan)
        token_ids(request.prompt, vocab_size)
        if len(request.prompt) >= limit:
            raise CapacityError(
                f"The prompt has {len(request.prompt)} tokens; the model's context is {limit}, the answer included. "
                "Shorten the prompt."
            )
        length = min(len(request.prompt) + request.max_new_tokens, limit)
        # Storage grows by a quarter at a time; behind a shared beginning it starts with room for some tokens.
        most = self._empty.growth(length + length // 4) + self._empty.growth(1) if self._is_plain else 0
        if self._budget.limit is not None and most > self._budget.limit:
            raise CapacityError(
                f"The prompt of {len(request.prompt)} tokens and an answer of up to {length - len(request.prompt)} "
                f"may need {most} bytes of memory; the engine has {self._budget.limit}. "
                "Shorten the prompt or ask for fewer new tokens."
            )
        guide = None if request.constraint is None else request.constraint.start()
        return Sampler(request.sampling, vocab_size, branch=request.branch, guide=guide)

    def submit(self, request: Request, past: Past | None = None) -> RunningSequence:
        """Queue a request.

        Args:
            request: what to continue.
            past: what is remembered of the first tokens of the prompt; it is used in place, and at
                least the last token of the prompt is read again. It is neither shared nor dropped.

        Raises:
            ConfigError, CapacityError: see `check`.
            IncompatibleError: the past was computed with another adapter than the request asks for.
        """
        sampler = self._checked(request)
        adapter = self.adapters.find(request.adapter)
        if past is not None and request.adapter and past.adapter is not adapter:
            raise IncompatibleError(
                f"The past was read with another adapter than {request.adapter!r}. Open a session with that adapter."
            )
        if past is not None and len(past) >= len(request.prompt):
            past.truncate(len(request.prompt) - 1)
        sequence = RunningSequence(request, past, self.tokenizer, sampler, self._longest, adapter)
        self._scheduler.add(sequence)
        self._account(sequence)
        return sequence

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], past: Past) -> None:
        """Feed the tokens that a past does not hold yet, without choosing anything."""
        while len(past) < len(tokens):
            piece = torch.tensor(tokens[len(past) : len(past) + self.rows_per_step], dtype=torch.int64)
            with restored_on_failure([past]):
                self.model(piece, Rows([(len(piece), len(past))]), [past])
            past.commit(is_prompt=len(past) < len(tokens))

    def cancel(self, sequence: RunningSequence) -> Piece:
        """End a sequence now; what it remembered is freed unless it is shared or the caller holds it."""
        self._retire(sequence)
        return sequence.cancel()

    def run(self) -> Iterator[tuple[RunningSequence, Piece]]:
        """Step until every request is finished, yielding what each step added."""
        while not self.is_idle or self._unreturned:
            yield from self.step()

    def step(self) -> list[tuple[RunningSequence, Piece]]:
        """One forward pass: read, choose, and return what was added to each sequence.

        A sequence that fails is cancelled alone, and its error raised; what the others were given is
        returned by the next call.
        """
        pieces = [*self._unreturned, *(self.advance() if not self._unreturned else ())]
        self._unreturned = []
        for place, (sequence, _) in enumerate(pieces):
            if sequence.error is not None:
                self._unreturned = pieces[:place] + pieces[place + 1 :]
                raise sequence.error
        return pieces

    @torch.inference_mode()
    def advance(self) -> list[tuple[RunningSequence, Piece]]:
        """As `step`, but nothing is raised for a sequence that fails: its `error` says what went wrong."""
        pieces: list[tuple[RunningSequence, Piece]] = []
        self._admit()
        with one_torch_thread(self.model):
            feeds = self._make_room(self._plan_rows(pieces), pieces)
        step = Step(sum(len(feed.tokens) for feed in feeds), sum(feed.tree is not None for feed in feeds))
        if feeds:
            self._counts = self._counts.after_step(step.rows)
        for feed in feeds:
            if feed.sequence.request.trace:
                self._tracer.watch(feed.past)
        working = self._working_ahead(feeds)
        start = self.draft_budget.clock()
        with self._drafting.beside(working) as drafts:
            computed = self._compute(feeds, is_alone=not working)
        if working:
            step = step._replace(seconds=self.draft_budget.clock() - start)
        with one_torch_thread(self.model):
            for feed, logits in computed:
                self._finish(feed, logits, drafts, step, pieces)
        return pieces

    def _finish(
        self,
        feed: Feed,
        logits: Tensor | Exception,
        drafts: Mapping[RunningSequence, Future[Tree]],
        step: Step,
        pieces: list[tuple[RunningSequence, Piece]],
    ) -> None:
        """Choose what a sequence goes on with; an error ends that sequence alone."""
        try:
            if isinstance(logits, Exception):
                raise logits
            if feed.sequence in drafts:
                feed = feed._replace(tree=drafts[feed.sequence].result())
            piece = self._settle(feed, logits, step)
        except Exception as error:  # noqa: BLE001 - one bad sequence must not stop the others
            piece = self._fail(feed.sequence, error)
        if piece is not None:
            pieces.append((feed.sequence, piece))
        if feed.sequence.is_finished:
            self._retire(feed.sequence)
        elif feed.growth or not self._is_plain:
            self._account(feed.sequence)

    def check_integrity(self) -> None:
        """Assert that queues, shared strands and counted bytes agree with each other; for tests."""
        self._scheduler.check_integrity()
        self._tree.check_integrity()
        if self._budget.limit is not None:
            self._budget.check_integrity(self._scheduler.everyone)

    def _admit(self) -> None:
        """Give places to waiting sequences for which there is memory."""
        scheduler = self._scheduler
        while (sequence := scheduler.next_waiting()) is not None:
            if sequence.past is None:
                self._open(sequence)
            if not self._has_memory_for(sequence):
                if not sequence.is_pinned:
                    self._drop_past(sequence)
                return
            scheduler.place(sequence)
            if sequence not in self._guessers:
                self._guessers[sequence] = Guesser(self.new_speculator(), Account(self.draft_budget))

    def _open(self, sequence: RunningSequence) -> None:
        """Give a sequence a past, which begins with what is stored of its tokens."""
        sequence.past = self.model.new_past(self.plan, sequence.adapter)
        if self._shares:
            self._begin_with_stored(sequence)
        self._account(sequence)

    def _begin_with_stored(self, sequence: RunningSequence) -> None:
        assert sequence.past is not None
        # The last token is always read again, because the answer begins with what the model says to it.
        self._tree.adopt(self._namespace(sequence), sequence.tokens[:-1], sequence.past)

    def _has_memory_for(self, sequence: RunningSequence) -> bool:
        """Whether what all running sequences have still to read fits; one alone gets its try."""
        if self._budget.limit is None or not self._scheduler.running:
            return True
        needed = 0
        for one in (*self._scheduler.running, sequence):
            assert one.past is not None
            rows = len(one.unread)
            # What a policy or codec will leave of a long prompt is not known beforehand.
            needed += one.past.growth(rows if self._is_plain else min(rows, self.rows_per_step))
        return self._budget.fits(needed)

    def _plan_rows(self, pieces: list[tuple[RunningSequence, Piece]]) -> list[Feed]:
        """Rows for this step: generating sequences first, then prompts, tenant by tenant."""
        feeds: list[Feed] = []
        proposals: dict[RunningSequence, Proposal] = {}
        room = self.rows_per_step
        order = self._scheduler.in_order()
        # Guesses take what is left when every sequence that generates has the row of its last token.
        roots = sum(not sequence.is_reading for sequence in order)
        for place, sequence in enumerate(order):
            if room == 0:
                break
            try:
                if not sequence.has_begun and not self._begin(sequence):
                    continue
                later = max(min(roots - place - 1, room - 1), 0)
                feed = self._feed(sequence, room - later, proposals)
            except Exception as error:  # noqa: BLE001 - one bad sequence must not stop the others
                pieces.append((sequence, self._fail(sequence, error)))
                continue
            feeds.append(feed)
            room -= len(feed.tokens)
        feeds = self._spend(feeds, proposals)
        for feed in feeds:
            self._scheduler.charge(feed.sequence, len(feed.tokens))
        return feeds

    def _spend(self, feeds: list[Feed], proposals: dict[RunningSequence, Proposal]) -> list[Feed]:
        """The feeds with those guesses alone that are worth their rows."""
        plain = sum(len(feed.tokens) for feed in feeds) - sum(
            feed.tree.num_scored - 1 for feed in feeds if feed.tree is not None
        )
        chosen = self.draft_budget.choose(list(proposals.values()), plain, self._timer)
        trees = dict(zip(proposals, chosen, strict=True))
        spent = []
        for feed in feeds:
            if feed.tree is not None and (tree := trees[feed.sequence]) is not feed.tree:
                tokens = feed.tokens[: feed.lead] + tree.only_scored().tokens
                feed = feed._replace(tokens=tokens, tree=tree)
            spent.append(feed)
        return spent

    def _working_ahead(self, feeds: Sequence[Feed]) -> dict[RunningSequence, tuple[Speculator, Tree]]:
        """What is being scored for each sequence whose speculator guesses on meanwhile."""
        return {
            feed.sequence: (self._guessers[feed.sequence].speculator, feed.tree)
            for feed in feeds
            if feed.tree is not None and self._guessers[feed.sequence].account.is_beside
        }

    def _begin(self, sequence: RunningSequence) -> bool:
        """Start from what others have computed; False while another is just computing more of it."""
        if self._shares and not sequence.is_pinned:
            if not self._publish_for(sequence):
                return False
            # More may be stored than when the sequence got its place.
            self._begin_with_stored(sequence)
            self._account(sequence)
        sequence.has_begun = True
        if not sequence.choices:
            sequence.shared_tokens = sequence.held
        self._counts = self._counts.after_start(len(sequence.tokens), sequence.held)
        return True

    def _publish_for(self, newcomer: RunningSequence) -> bool:
        """Store the longest beginning that a running sequence has in common with a newcomer.

        Returns:
            False if it is not all computed yet, so that waiting is cheaper than computing it twice.
        """
        wanted = newcomer.tokens[:-1]
        ready = coming = newcomer.held
        source: RunningSequence | None = None
        for other in self._scheduler.running:
            if self._namespace(other) != self._namespace(newcomer) or other.is_pinned or not other.has_begun:
                continue
            common = self._tree.whole(common_prefix(wanted, other.tokens))
            if other.is_reading:
                coming = max(coming, common)
            computed = min(common, self._tree.whole(other.held))
            if computed > ready:
                ready, source = computed, other
        if coming > ready:
            return False
        if source is not None and source.past is not None:
            self._tree.insert(self._namespace(source), wanted[:ready], source.past)
            self._account(source)
        return True

    def _feed(self, sequence: RunningSequence, room: int, proposals: dict[RunningSequence, Proposal]) -> Feed:
        unread, tree = sequence.unread, None
        if len(unread) > room:
            tokens = unread[:room]
        else:
            proposals[sequence] = self._propose(sequence, room - len(unread))
            tree = proposals[sequence].tree
            tokens = unread[:-1] + tree.only_scored().tokens
        assert sequence.past is not None
        return Feed(sequence, sequence.past, tokens, tree)

    def _propose(self, sequence: RunningSequence, room: int) -> Proposal:
        # Tokens up to the end of the answer or of the model's context; the last of them is never fed.
        remaining = min(
            sequence.request.max_new_tokens - len(sequence.choices),
            sequence.max_positions - len(sequence.tokens),
        )
        context = Context(
            sequence.tokens,
            budget=min(room, remaining - 1),
            positions=sequence.max_positions,
            sampler=sequence.sampler,
            history=sequence.history,
        )
        speculator, account = self._guessers[sequence]
        proposal = account.propose(speculator, context)
        proposal.tree.check(context, self.model.config.vocab_size)
        return proposal

    def _make_room(self, feeds: list[Feed], pieces: list[tuple[RunningSequence, Piece]]) -> list[Feed]:
        """The feeds that there is memory for, once others have given back what is needed."""
        if self._budget.limit is None:
            return feeds
        # A traced request is asked once more where its last token looks.
        feeds = [
            feed._replace(growth=feed.past.growth(len(feed.tokens) + feed.sequence.request.trace))
            for feed in feeds
        ]
        while feeds and not self._budget.fits(sum(feed.growth for feed in feeds)):
            victim = self._budget.victim(self._scheduler.everyone, self._scheduler.oldest)
            if victim is not None:
                self._preempt(victim)
            else:
                victim = max((feed.sequence for feed in feeds), key=lambda sequence: sequence.arrival)
                error = CapacityError(
                    f"{victim.held} tokens and what follows do not fit in the {self._budget.limit} bytes of memory "
                    "that the engine has. Shorten the prompt or ask for fewer new tokens."
                )
                pieces.append((victim, self._fail(victim, error)))
            feeds = [feed for feed in feeds if feed.sequence is not victim]
        return feeds

    def _preempt(self, sequence: RunningSequence) -> None:
        """Let a sequence give its past back, and wait to read everything again."""
        self._drop_past(sequence)
        if sequence in self._scheduler.running:
            self._scheduler.set_aside(sequence)
        self._counts = self._counts.after_preemption()

    def _compute(self, feeds: list[Feed], *, is_alone: bool = True) -> list[tuple[Feed, Tensor | Exception]]:
        """Logits of every feed; where a forward pass fails, it is made again for each sequence alone."""
        if not feeds:
            return []
        try:
            with restored_on_failure([feed.past for feed in feeds]):
                logits = forward(self.model, feeds, self.draft_budget, is_alone=is_alone)
        except Exception as error:  # noqa: BLE001 - one bad sequence must not stop the others
            if len(feeds) == 1:
                return [(feeds[0], error)]
            return [result for feed in feeds for result in self._compute([feed], is_alone=is_alone)]
        except BaseException:
            for feed in feeds:
                self._account(feed.sequence)
            raise
        counts = [feed.tree.num_scored if feed.tree is not None else 0 for feed in feeds]
        return list(zip(feeds, logits.split(counts), strict=True))

    def _settle(self, feed: Feed, logits: Tensor, step: Step) -> Piece | None:
        sequence, past = feed.sequence, feed.past
        if feed.tree is None:
            past.commit(is_prompt=True)
            return None
        path, choices = verify(feed.tree, logits, sequence.sampler, sequence.history)
        prompt_rows = feed.lead
        # Where the codec stores tokens on the way, the guesses behind that place are made anew.
        count = past.rows_at_once(prompt_rows + 1, prompt_rows + len(path)) - prompt_rows
        # A stop inside the accepted path leaves rows of tokens that are not part of the answer.
        piece = sequence.accept(choices[:count])
        path = path[: len(piece.choices)]
        row_of = {node: row for row, node in enumerate(feed.tree.scored, start=prompt_rows)}
        kept = [*range(prompt_rows), *(row_of[node] for node in path)]
        past.commit(None if len(kept) == len(feed.tokens) else kept)
        speculator, account = self._guessers[sequence]
        account.observe(speculator, sequence.tokens, feed.tree, path, logits)
        self.draft_budget.settle(account, feed.tree, path, sequence.tokens[-len(path) :], step)
        self._counts = self._counts.after_draft(feed.tree.num_scored - 1, len(path) - 1)
        if sequence.request.trace:
            self._scheduler.charge(sequence, 1)
            scored = [row_of[node] - prompt_rows for node in path]
            trace = self._tracer.trace(
                past, sequence.tokens, feed.tree.only_scored(), scored, row_of[path[-1]]
            )
            piece = piece._replace(trace=trace)
        return piece

    def _fail(self, sequence: RunningSequence, error: Exception) -> Piece:
        sequence.error = error
        return self.cancel(sequence)

    def _retire(self, sequence: RunningSequence) -> None:
        """Forget a sequence; what it has read stays for later ones where there is a budget for it."""
        self._scheduler.remove(sequence)
        self._guessers.pop(sequence, None)
        is_kept = sequence.is_finished and self._shares and self._budget.limit is not None
        if is_kept and not sequence.is_pinned and sequence.past is not None:
            self._tree.insert(self._namespace(sequence), sequence.tokens[: sequence.held], sequence.past)
        if sequence.is_pinned:
            self._budget.release(sequence)
        else:
            self._drop_past(sequence)

    def _drop_past(self, sequence: RunningSequence) -> None:
        if sequence.past is not None:
            self._tree.release(sequence.past)
        sequence.past, sequence.has_begun = None, False
        self._budget.release(sequence)
        while self._budget.limit is None and self._tree.evict():
            # Without a budget nothing is kept that no sequence reads.
            pass

    def _account(self, sequence: RunningSequence) -> None:
        if self._budget.limit is not None:
            self._budget.update(sequence)

    def _namespace(self, sequence: RunningSequence) -> Namespace:
        return Namespace(sequence.tenant, self.plan, sequence.adapter)
