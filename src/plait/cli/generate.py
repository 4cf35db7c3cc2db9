"""Commands that make a model speak: run, chat, score."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.common import (
    Adapter,
    Draft,
    Json,
    Memory,
    Model,
    Offline,
    SamplingSpec,
    Weights,
    load_model,
    print_json,
    read_file,
    read_sampling,
    read_text,
    say,
)
from plait.errors import ConfigError, PlaitError
from plait.files import write_text

if TYPE_CHECKING:
    from plait.decode import Sampling
    from plait.engine import Generation, Session

__all__ = ["chat", "run", "score"]

MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", min=1, help="Most tokens of the answer.", rich_help_panel="Answer"
    ),
]
System = Annotated[
    str | None, typer.Option("--system", help="System message of the conversation.", rich_help_panel="Answer")
]


def run(
    prompt: Annotated[list[str] | None, typer.Argument(help="The prompt; - is standard input.")] = None,
    model: Model = "smollm2",
    max_new_tokens: MaxNewTokens = 512,
    sampling: SamplingSpec = "",
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends the answer; may be repeated.", rich_help_panel="Answer"),
    ] = None,
    system: System = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Continue the prompt as text, without the chat template.",
            rich_help_panel="Answer",
        ),
    ] = False,
    prompt_boundary: Annotated[
        str,
        typer.Option(
            "--prompt-boundary",
            help="With --plain: token; exact to finish a last word that was cut anywhere in bytes; or healed.",
            rich_help_panel="Answer",
        ),
    ] = "token",
    weights: Weights = "auto",
    memory: Memory = "full",
    draft: Draft = "none",
    adapter: Adapter = None,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Answer one prompt. What is piped in comes before the argument.

    [bold]Examples[/bold]

      plait run "What is the capital of France?"

      cat report.txt | plait run "Summarise this report in one sentence."

      plait run --plain --prompt-boundary exact -n 20 "import nump"
    """
    from plait.text import StopStrings

    chosen = read_sampling(sampling)
    if plain and system is not None:
        raise ConfigError("--system needs a chat template, and --plain switches it off. Give one of them.")
    if prompt_boundary not in ("token", "exact", "healed"):
        raise ConfigError(f"--prompt-boundary must be token, exact or healed. Got {prompt_boundary!r}.")
    text = read_text(prompt or [], wait=True)
    lm = load_model(model, weights=weights, memory=memory, draft=draft, adapter=adapter, offline=offline)
    begun = None
    is_plain = plain or lm.chat_template is None
    if prompt_boundary != "token":
        if not is_plain:
            raise ConfigError(f"--prompt-boundary {prompt_boundary} continues a text. Give --plain too.")
        begun = lm.settle(text, chosen, "healed" if prompt_boundary == "healed" else "exact")
        ids = list(begun.ids)
    elif is_plain:
        ids = lm.encode(text)
    else:
        ids = lm.encode_chat([*_system_message(system), {"role": "user", "content": text}])
    session = lm.session()
    session.read_tokens(ids)

    def show(text: str) -> None:
        if not json_output:
            typer.echo(text, nl=False)

    # A stop text may begin in what finished the prompt's last word.
    stops = StopStrings(stop or ())
    show(stops.push("" if begun is None else begun.text)[0])
    answer = session.stream(max_new_tokens=max_new_tokens, stop=stop or (), sampling=chosen)
    for piece in answer:
        show(stops.push(piece.text)[0])
        if stops.found is not None:
            answer.close()
    show(stops.finish())
    assert session.last is not None
    if json_output:
        print_json(_to_json(session.last if begun is None else begun.before(session.last, stop or ())))
    else:
        typer.echo()


def chat(
    question: Annotated[str | None, typer.Argument(help="A first question.")] = None,
    model: Model = "smollm2",
    max_new_tokens: MaxNewTokens = 512,
    sampling: SamplingSpec = "",
    system: System = None,
    weights: Weights = "auto",
    memory: Memory = "full",
    draft: Draft = "none",
    adapter: Adapter = None,
    offline: Offline = False,
) -> None:
    """Talk with a model. Type /help inside for what else you can do.

    Ctrl-C stops an answer, Ctrl-D ends the conversation. Lines piped in are asked one by one; the exit status is 1 when
    one of them failed.

    [bold]Examples[/bold]

      plait chat "What is the capital of France?"

      plait chat --system "Answer in one word." --sampling temperature=0.7,seed=1
    """
    chosen = read_sampling(sampling)
    lm = load_model(model, weights=weights, memory=memory, draft=draft, adapter=adapter, offline=offline)
    if lm.chat_template is None:
        raise ConfigError(f"{lm.name} has no chat template. Let it continue a text: plait run --plain.")
    with lm.session() as session:
        conversation = Conversation(session, chosen, max_new_tokens, _system_message(system))
        interactive = sys.stdin.isatty()
        if interactive:
            say(f"{lm.name}. /help lists commands, Ctrl-D ends.")
        if question is not None:
            if interactive:
                say(f"> {question}")
            conversation.ask(question)
        while (line := _next_line(interactive)) is not None:
            if line.startswith("/"):
                if conversation.command(line) == "exit":
                    break
            elif line.strip():
                conversation.ask(line)
    if conversation.failed and not interactive:
        raise typer.Exit(1)


class Conversation:
    """The messages of a chat and the session that remembers them."""

    def __init__(
        self, session: Session, sampling: Sampling, max_new_tokens: int, messages: list[dict[str, str]]
    ) -> None:
        self.session = session
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.opening = messages
        self.messages = list(messages)
        self.failed = False

    def ask(self, text: str) -> None:
        """Ask, print the answer as it comes, and remember both. Ctrl-C keeps what was said so far."""
        self.messages.append({"role": "user", "content": text})
        answer = self.session.chat(self.messages, sampling=self.sampling, max_new_tokens=self.max_new_tokens)
        said: list[str] = []
        try:
            for piece in answer:
                said.append(piece.text)
                typer.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            answer.close()
            typer.echo()
            say("stopped")
        except PlaitError as error:
            self.messages.pop()
            typer.echo()
            self._fail(f"error: {error}")
            return
        else:
            typer.echo()
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def command(self, line: str) -> str | None:
        """Carry out a line that starts with a slash; returns `exit` when the chat should end."""
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            return "exit"
        if name == "/help":
            say("/save FILE  write the conversation as JSON\n/load FILE  go on from a saved conversation")
            say(
                "/undo  forget the last question and answer\n/clear  start again\n/memory  what is remembered"
            )
            say("/exit  end")
        elif name == "/save" and argument:
            self._save(Path(argument))
        elif name == "/load" and argument:
            self._load(Path(argument))
        elif name == "/undo":
            del self.messages[max(len(self.opening), len(self.messages) - 2) :]
        elif name == "/clear":
            self.messages = list(self.opening)
        elif name == "/memory":
            say(f"{len(self.session)} tokens, {self.session.nbytes() / 1e6:.1f} MB, {self.session.lm.plan}")
        elif name in ("/save", "/load"):
            self._fail(f"{name} needs a file name: {name} talk.json")
        else:
            self._fail(f"{name} is not a command. /help lists them.")
        return None

    def _fail(self, message: str) -> None:
        self.failed = True
        say(message)

    def _save(self, path: Path) -> None:
        try:
            write_text(path, json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._fail(f"error: {path} was not written: {error.strerror}")
        else:
            say(f"saved {len(self.messages)} messages: {path}")

    def _load(self, path: Path) -> None:
        try:
            messages = json.loads(path.read_text("utf-8"))["messages"]
            ok = isinstance(messages, list) and all(
                isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            ok = False
        if not ok:
            self._fail(f"error: {path} is not a conversation saved with /save")
            return
        self.messages = messages
        say(f"loaded {len(messages)} messages")


def score(
    file: Annotated[Path, typer.Argument(help="A text file in UTF-8; - is standard input.")],
    model: Model = "smollm2",
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Tokens of a window; at most 2048 when left out.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Tokens between the starts of windows.")
    ] = None,
    weights: Weights = "auto",
    adapter: Adapter = None,
    offline: Offline = False,
    json_output: Json = False,
) -> None:
    """Measure how well a model predicts a text: perplexity and bits per byte.

    [bold]Examples[/bold]

      plait score README.md

      plait score book.txt --context 1024 --stride 512 --json
    """
    from plait.engine import Score

    text = read_file(file)
    lm = load_model(model, weights=weights, adapter=adapter, offline=offline)
    result: Score = lm.score(text, context=context, stride=stride)
    if json_output:
        print_json(
            {
                "model": lm.name,
                "weights": weights,
                "tokens": result.tokens,
                "bytes": result.num_bytes,
                "nats": result.nats,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
            }
        )
        return
    typer.echo(f"perplexity     {result.perplexity:#.5g}")
    typer.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    typer.echo(f"tokens         {result.tokens:,} predicted, {result.num_bytes:,} bytes")


def _next_line(interactive: bool) -> str | None:
    """The next line typed or piped in; None at the end. Ctrl-C at the prompt clears the line."""
    while True:
        try:
            if not interactive:
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            import readline  # noqa: F401 - makes input() editable

            return input("> ")
        except EOFError:
            say("")
            return None
        except KeyboardInterrupt:
            say("\n(Ctrl-D ends the conversation)")


def _system_message(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _to_json(generation: Generation) -> dict[str, Any]:
    data: dict[str, Any] = {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": len(generation.tokens),
        "seconds_to_first_token": round(generation.seconds_to_first_token, 4),
        "seconds": round(generation.seconds, 4),
    }
    if any(choice.logprob is not None for choice in generation.choices):
        data["logprobs"] = [
            {
                "token": choice.token,
                "logprob": choice.logprob,
                "alternatives": [[other.token, other.logprob] for other in choice.alternatives],
            }
            for choice in generation.choices
        ]
    return data
