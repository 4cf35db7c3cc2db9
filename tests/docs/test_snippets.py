"""Every snippet of every page runs and prints what the page says; every command is one that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docs_snippets
import pytest
from docs_snippets import Block, SnippetError, blocks_of, commands_of, pages, run_command, run_python


@pytest.mark.model
@pytest.mark.usefixtures("_world_of_snippets")
@pytest.mark.parametrize("page", pages())
def test_snippets_do_what_the_page_says(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(page, block, namespace)
        elif block.language == "console":
            for command in commands_of(block):
                run_command(page, command)


@pytest.mark.parametrize("page", pages())
def test_blocks_are_of_kinds_that_are_checked(page: str) -> None:
    assert {block.language for block in blocks_of(page)} <= {"python", "console", "text", "{eval-rst}"}


def test_there_are_snippets_of_both_kinds_to_run() -> None:
    readme = blocks_of("README.md")
    assert any(block.language == "python" and block.output for block in readme)
    assert any(command.words[0] == "make" for block in readme for command in commands_of(block))


PAGE = """\
# A page

```python
print("one")
print("two")
```

```text
one
...
```

- item

  ```console
  $ plait methods --json
  $ printf "a\\nb" | plait run \\
      --plain
  three
  ```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(docs_snippets, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(PAGE, "utf-8")
    return "page.md"


def test_a_page_is_cut_into_blocks_and_commands(page: str) -> None:
    python, text, console = blocks_of(page)
    assert (python.language, python.line, python.output) == ("python", 4, "one\n...\n")
    assert text.output is None
    first, second = commands_of(console)
    assert (first.line, first.words, first.output) == (16, ["plait", "methods", "--json"], "")
    assert (second.line, second.words, second.output) == (17, ["plait", "run", "--plain"], "three\n")
    assert second.piped_from == ["printf", "a\\nb"]
    run_python(page, python, {})


@pytest.mark.parametrize(
    ("source", "output"),
    [("print(1)", "2"), ("print(1)", None), ("", "1"), ("raise ValueError", None)],
    ids=["other output", "output that is not shown", "no output", "an error"],
)
def test_a_python_block_that_is_wrong_is_found(source: str, output: str | None) -> None:
    with pytest.raises(SnippetError, match=r"page\.md:7"):
        run_python("page.md", Block("python", 7, source, output), {})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("$ plait run --modle smollm2 hi\n", "--modle"),
        ("$ plait rum hi\n", "rum"),
        ("$ plait run -n 0 hi\n", "greater than or equal to 1"),
        ("$ plait run --memory everything hi\n", "everything"),
        ("$ plait run --memory window:width=4 hi\n", "width"),
        ("$ plait run --draft medusa hi\n", "medusa"),
        ("$ plait run --weights q1_0 hi\n", "q1_0"),
        ("$ plait run --sampling top_q=1 hi\n", "top_q"),
        ("$ plait claims rnu frames\n", "rnu"),
        ("$ plait --version\nplait 99.9.9\n", "99.9.9"),
        ("$ make rnu\n", "rnu"),
        ("$ sudo make run\n", "sudo"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, message: str) -> None:
    (parsed,) = commands_of(Block("console", 3, command, None))
    with pytest.raises(SnippetError, match=r"page\.md:3") as caught:
        run_command("page.md", parsed)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        'plait "Why is the sky blue?"',
        "plait run -m model.gguf -n 5 --sampling temperature=0.7,seed=1 -",
        "plait chat --memory window:size=512,dense:dtype=bf16 --draft prompt-lookup:tokens=4",
        "plait score book.txt --weights q8_0",
        "make run MODEL=gemma3-270m",
        "PLAIT_OFFLINE=1 plait run hello",
        "plait claims",
    ],
)
def test_a_command_that_is_right_is_accepted(command: str) -> None:
    (parsed,) = commands_of(Block("console", 3, f"$ {command}\n", None))
    run_command("page.md", parsed)
