"""The command line: what users type, what they see, how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plait.cli.main import app
from plait.engine import load

PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}


@pytest.fixture
def plait() -> Callable[..., Result]:
    def call(*arguments: str, input: str | None = None, **environment: str) -> Result:
        return CliRunner().invoke(app, list(arguments), input=input, env={**PLAIN, **environment})

    return call


COMMANDS = [
    "run",
    "chat",
    "score",
    "bytes",
    "serve",
    "pull",
    "models",
    "info",
    "quantize",
    "methods",
    "claims",
    "train",
    "watermark",
    "pac",
    "bench",
    "eval",
    "adapters",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(plait: Callable[..., Result], command: str) -> None:
    result = plait(command, "--help")
    assert result.exit_code == 0
    assert f"plait {command}" in result.stdout


def test_help_lists_every_command(plait: Callable[..., Result]) -> None:
    help_text = plait("--help").stdout
    assert all(command in help_text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "smolm2", "hi"], "Did you mean 'smollm2'"),
        (["run", "--weights", "q9", "hi"], "Unknown weight format 'q9'"),
        (["run", "--memory", "ful", "hi"], "Did you mean 'full'"),
        (["run", "--memory", "window:size=0", "hi"], "Window.size must be"),
        (["run", "--draft", "prompt", "hi"], "prompt-lookup"),
        (["run", "--sampling", "temperature=-1", "hi"], "Sampling.temperature must be"),
        (["run", "--sampling", "temperature", "hi"], "key=value"),
        (["run", "--sampling", "top_q=1", "hi"], "Did you mean 'top_"),
        (["run", "--prompt-boundary", "word", "hi"], "token, exact or healed"),
        (["bytes", "-m", "smollm2", "-m", "smollm2", "hi"], "twice"),
        (["score", "/no/such/file"], "could not be read"),
        (["info", "nothing-of-that-name"], "nothing-of-that-name"),
        (["methods", "codec"], "Did you mean 'codecs'"),
        (["claims", "show", "nonsense"], "nonsense"),
        (["train", "lm", "--out", "/no/such", "--resume"], "no token data"),
        (
            ["train", "lm", "/no/such.txt", "--out", "/no/such/folder", "--training", "step=3"],
            "Did you mean 'steps'",
        ),
        (["train", "lm", "/no/such.txt", "--out", "/no/such/folder"], "could not be read"),
        (
            ["train", "lm", "/no/such.txt", "--out", "/no/such/folder", "--shape", "heads=5"],
            "ModelShape.heads must cut",
        ),
        (["adapters", "info", "/no/such/folder"], "holds no adapter_model.safetensors"),
        (
            ["run", "--model", "smollm2", "--adapter", "/no/such/folder", "hi"],
            "holds no adapter_model.safetensors",
        ),
        (
            ["train", "adapter", "/no/such.txt", "--out", "/no/such/folder", "--method", "lorra"],
            "Did you mean 'lora'",
        ),
        (
            ["train", "weights", "--packed", "/no/such/folder", "--out", "/no/such/other"],
            "holds no packed model",
        ),
        (
            [
                "train",
                "weights",
                "--packed",
                "/no/such/folder",
                "--out",
                "/no/such/other",
                "--method",
                "valuse",
            ],
            "Did you mean 'values'",
        ),
        (["watermark", "detect", "/no/such/file", "--key-file", "/no/such/key"], "could not be read"),
        (["bench", "decode", "--draft", "nonsense"], "Unknown speculator 'nonsense'"),
        (["bench", "bibench", "--method", "recuu"], "Did you mean 'recu'"),
        (["bench", "bibench", "--track", "speed"], "Unknown track 'speed'"),
        (["bench", "bibench", "--plot", "radar.txt"], "Got 'radar.txt'"),
        (["pac", "complete", "/no/such/file", "--sets", "/no/such/sets"], "could not be read"),
        (["pac", "calibrate", "/no/such/file", "--output", "/tmp/x"], "could not be read"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_1(
    plait: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = plait(*arguments, PLAIT_OFFLINE="1")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["run", "--nonsense"], ["nonsense"], ["run", "-n", "0", "hi"], ["pull"]]
)
def test_wrong_usage_is_exit_2(plait: Callable[..., Result], arguments: list[str]) -> None:
    assert plait(*arguments).exit_code == 2


def test_models_and_methods_list_as_text_and_json(plait: Callable[..., Result]) -> None:
    names = {row["name"] for row in json.loads(plait("models", "--json").stdout)}
    assert {"smollm2", "gemma3-270m"} <= names
    assert "smollm2" in plait("models").stdout
    methods = json.loads(plait("methods", "--json").stdout)
    listed = {(row["axis"], row["method"]) for row in methods}
    assert {
        ("codecs", "dense"),
        ("policies", "full"),
        ("policies", "window"),
        ("weights", "q4_0"),
        ("drafts", "prompt-lookup"),
        ("mixers", "attention"),
        ("binary", "react"),
    } <= listed
    assert all(row["summary"] for row in methods)
    assert "prompt-lookup" in plait("methods", "drafts").stdout
    assert "window" not in plait("methods", "drafts").stdout


def test_version(plait: Callable[..., Result]) -> None:
    assert re.fullmatch(r"plait \d+\.\d+\.\d+\n", plait("--version").stdout)


@pytest.mark.model
def test_run_answers(plait: Callable[..., Result], smollm2_gguf: Path) -> None:
    result = plait("run", "-m", str(smollm2_gguf), "What is the capital of France?")
    assert result.exit_code == 0
    assert result.stdout == "The capital of France is Paris.\n"


@pytest.mark.model
def test_a_prompt_that_ends_inside_a_word_is_finished(
    plait: Callable[..., Result], smollm2_gguf: Path
) -> None:
    law = json.loads(plait("bytes", "-m", str(smollm2_gguf), "--json", "-k", "2", "import nump").stdout)[
        "next"
    ]
    assert law[0]["byte"] == ord("y")
    assert law[0]["probability"] > 0.9
    result = plait(
        "run", "-m", str(smollm2_gguf), "--plain", "--prompt-boundary", "exact", "-n", "3", "import nump"
    )
    assert result.stdout.startswith("y as np")
    for stop, text in (("y", ""), ("y as", ""), ("as", "y "), (" as np", "y"), ("never", "y as np")):
        arguments = ["--plain", "--prompt-boundary", "exact", "-n", "2", "--stop", stop, "import nump"]
        assert plait("run", "-m", str(smollm2_gguf), *arguments).stdout == f"{text}\n"
        told = json.loads(plait("run", "-m", str(smollm2_gguf), "--json", *arguments).stdout)
        assert (told["text"], told["finish_reason"]) == (text, "length" if stop == "never" else "stop")


@pytest.mark.model
def test_a_prompt_alone_runs(plait: Callable[..., Result], smollm2_gguf: Path) -> None:
    result = plait("What is the capital of France?", PLAIT_MODEL=str(smollm2_gguf))
    assert result.stdout == "The capital of France is Paris.\n"


@pytest.mark.model
def test_run_joins_what_is_piped_in_and_reports_json(
    plait: Callable[..., Result], smollm2_gguf: Path
) -> None:
    result = plait(
        "run", "-m", str(smollm2_gguf), "--plain", "-n", "4", "--json", "--sampling", "logprobs=2", "-",
        input="The capital of France is",
    )  # fmt: skip
    data = json.loads(result.stdout)
    assert "Paris" in data["text"]
    assert data["new_tokens"] == len(data["logprobs"]) == 4
    assert data["finish_reason"] == "length"


@pytest.mark.model
def test_chat_remembers_saves_and_loads(
    plait: Callable[..., Result], smollm2_gguf: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "And of Germany?",
        f"/save {saved}",
        "/memory",
        "/clear",
        f"/load {saved}",
        "And of Italy?",
        "/exit",
        "this is never asked",
    ]
    result = plait(
        "chat", "-m", str(smollm2_gguf), "-n", "40", "What is the capital of France?", input="\n".join(lines)
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("The capital of France is Paris.\n")
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    lm = load(smollm2_gguf)
    answer = lm.chat([*messages, {"role": "user", "content": "And of Italy?"}], max_new_tokens=40)
    assert result.stdout.endswith(answer.text + "\n")
    assert "never" not in result.stdout


@pytest.mark.model
def test_chat_says_when_a_file_cannot_be_saved_or_loaded(
    plait: Callable[..., Result], smollm2_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text('{"messages": [{"role": 3}]}')
    (tmp_path / "worse.json").write_text('{"messages": {}}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    bad = [f"/load {tmp_path}/{name}.json" for name in ("bad", "worse", "deep")]
    lines = [f"/save {tmp_path}/no/such/folder.json", *bad, "Hello?", "/load", "/nonsense", "/exit"]
    result = plait("chat", "-m", str(smollm2_gguf), "-n", "2", input="\n".join(lines))
    assert result.exit_code == 1
    assert "/nonsense is not a command" in result.stderr
    assert "was not written" in result.stderr
    assert result.stderr.count("not a conversation") == 3
    assert result.stdout.strip()
    assert "/load needs a file name" in result.stderr


@pytest.mark.model
def test_chat_needs_a_chat_template(plait: Callable[..., Result], gemma3_gguf: Path) -> None:
    result = plait("chat", "-m", str(gemma3_gguf), "Hello?")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr
    assert "plait run --plain" in result.stderr


@pytest.mark.model
def test_score_prints_perplexity_and_bits_per_byte(
    plait: Callable[..., Result], smollm2_gguf: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    data = json.loads(plait("score", "-m", str(smollm2_gguf), str(text), "--json").stdout)
    assert data["bytes"] == 225
    assert data["perplexity"] == pytest.approx(2.718281828 ** (data["nats"] / data["tokens"]), rel=1e-6)
    shown = plait("score", "-m", str(smollm2_gguf), str(text)).stdout
    assert f"{data['perplexity']:#.5g}" in shown
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8" in plait("score", str(tmp_path / "latin.txt")).stderr


@pytest.mark.model
def test_info_describes_the_model(plait: Callable[..., Result], smollm2_gguf: Path) -> None:
    facts = json.loads(plait("info", str(smollm2_gguf), "--json").stdout)
    assert facts["parameters"] == 134_515_008
    assert (facts["family"], facts["layers"], facts["context"]) == ("llama", 30, 8192)
    assert set(facts["bytes"]) == {"q4_1", "q8_0", "f32"}
    assert "134,515,008" in plait("info", str(smollm2_gguf)).stdout


@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_program(smollm2_gguf: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # Where the tests themselves run in the background, Ctrl-C is ignored.
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from plait.cli import main; main()",
            "chat",
            "-m",
            str(smollm2_gguf),
            "-n",
            "400",
        ],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, **PLAIN},
        start_new_session=True,
    )
    os.close(follower)
    screen = _Screen(leader)
    try:
        screen.wait_for("> ")
        os.write(leader, b"Write a long story about a river.\n")
        screen.wait_for_more(60)
        program.send_signal(signal.SIGINT)
        screen.wait_for("stopped")
        os.write(leader, b"What is the capital of France?\n")
        screen.wait_for("Paris")
        os.write(leader, b"/exit\n")
        assert program.wait(timeout=60) == 0
    finally:
        program.kill()
        os.close(leader)


class _Screen:
    """What a terminal program has written."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.text = ""

    def _read(self, condition: Callable[[], bool]) -> None:
        import select

        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.text
            ready, _, _ = select.select([self.handle], [], [], 1.0)
            if ready:
                self.text += os.read(self.handle, 4096).decode(errors="replace")

    def wait_for(self, wanted: str) -> None:
        start = len(self.text)
        self._read(lambda: wanted in self.text[start:] or (start == 0 and wanted in self.text))

    def wait_for_more(self, characters: int) -> None:
        start = len(self.text)
        self._read(lambda: len(self.text) > start + characters)


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    from plait.files import write_text

    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
