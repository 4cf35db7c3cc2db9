"""Hostile templates end in one TemplateError, within bounded time and memory, and nobody else notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from plait.errors import TemplateError
from plait.text.sandbox import Limits, Sandbox

_GROWING = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x | length }}"


def _growing(start: str, step: str) -> str:
    return _GROWING.replace("START", start).replace("STEP", step)


_HOSTILE = {
    "attribute chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute chain of a list": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd') }}",
    "attribute by filter": "{{ (raise_exception | attr('__globals__')).keys() }}",
    "bound method": "{{ messages.append.__self__.__class__.__name__ }}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "include a file": "{% include '/etc/passwd' %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "long range as list": "{{ range(10**9) | list | length }}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "much output": "{% for a in range(9999) %}{% for b in range(9999) %}"
    + "x" * 999
    + "{% endfor %}{% endfor %}",
    "output above the limit": "{{ 'x' * 5000000 }}",
    "captured output": "{% set x %}{% for a in range(90000) %}"
    + "x" * 9999
    + "{% endfor %}{% endset %}{{ x | length }}",
    "repeated string": "{{ ('a' * 10**10) | length }}",
    "repeated list": "{{ ([1] * 10**9) | length }}",
    "large power": "{{ 10 ** 10 ** 9 }}",
    "doubled string": _growing("'a'", "ns.x ~ ns.x"),
    "doubled by plus": _growing("'a'", "ns.x + ns.x"),
    "doubled list": _growing("[1]", "ns.x + ns.x"),
    "doubled in the source": "{% set s = 'a' %}" + "{% set s = s ~ s %}" * 60 + "{{ s | length }}",
    "doubled by join": _growing("'ab'", "[ns.x, ns.x] | join(ns.x)"),
    "doubled by replace": _growing("'aa'", "ns.x | replace('a', 'aa')"),
    "tree with shared branches": _growing("[]", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    "deep list": "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "padding": "{{ '%999999999d' | format(1) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "batches": "{{ [1] | batch(10**9, 0) | list | length }}",
    "slices": "{{ [1] | slice(10**9) | list | length }}",
    "joined by long text": "{{ range(9999) | join('a' * 99999) }}",
    "recursive macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "mutually recursive macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "deep brackets": "{{ " + "(" * 90_000 + "1" + ")" * 90_000 + " }}",
    "deep list in the source": "{{ " + "[" * 90_000 + "]" * 90_000 + " }}",
    "deep blocks": "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
    "many signs": "{{ " + "-" * 200_000 + "1 }}",
    "many negations": "{{ " + "not " * 60_000 + "1 }}",
    "many attributes": "{{ messages" + ".a" * 100_000 + " }}",
    "many sums": "{{ 1" + "+1" * 100_000 + "+ '' }}",
    "many filters": "{{ 1" + "|string" * 30_000 + "+ 1 }}",
    "unfinished": "{% for a in messages %}{{ a",
    "input grows": "{% for i in range(60) %}{{ messages.extend(messages) }}{% endfor %}",
}

_CHILD = """
import json, resource, sys, time
from plait.errors import TemplateError
from plait.text import ChatTemplate
from plait.text.sandbox import SANDBOX
def kibibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
resource.setrlimit(resource.RLIMIT_AS, ((kibibytes("VmSize") << 10) + (512 << 20),) * 2)
idle = kibibytes("VmHWM")
messages = [{"role": "user", "content": "hi"}]
results = {}
for name, source in json.load(sys.stdin).items():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    try:
        outcome = f"rendered {len(ChatTemplate(source).render(messages))} characters"
    except TemplateError as error:
        outcome = "TemplateError"
    seconds = time.monotonic() - start
    SANDBOX.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    good = ChatTemplate.plain().render(messages)
    results[name] = [outcome, cpu_seconds, seconds, good]
print(json.dumps({"results": results, "idle": idle, "own": kibibytes("VmHWM"), "child": after.ru_maxrss}))
"""


@pytest.fixture(scope="module")
def hostile_run() -> dict[str, Any]:
    """All hostile templates rendered by a process that may take 512 MiB more than it has."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(_HOSTILE),
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(_HOSTILE))
def test_a_hostile_template_ends_in_a_template_error(hostile_run: dict[str, Any], name: str) -> None:
    outcome, cpu_seconds, seconds, good = hostile_run["results"][name]
    assert outcome == "TemplateError"
    # CPU time, because the machine may be busy with other tests.
    assert cpu_seconds < 1
    assert seconds < 20
    assert good == "user: hi\nassistant:"


def test_hostile_templates_take_bounded_memory(hostile_run: dict[str, Any]) -> None:
    # Kibibytes. A child counts what its parent held when it was started.
    assert hostile_run["child"] < hostile_run["own"] + (300 << 10)
    assert hostile_run["own"] < hostile_run["idle"] + (64 << 10)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with closing(Sandbox()) as sandbox:
        yield sandbox


def _pid(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_serves_many_renderings(sandbox: Sandbox) -> None:
    assert sandbox.render("{{ a }}", {"a": 1}) == "1"
    first = _pid(sandbox)
    with pytest.raises(TemplateError):
        sandbox.render("{{ a.b.c }}", {})
    assert sandbox.render("{{ a }}", {"a": "é\u2028\r\n"}) == "é\u2028\r\n"
    assert _pid(sandbox) == first


def test_the_process_is_started_again_after_it_died(sandbox: Sandbox) -> None:
    sandbox.render("", {})
    first = _pid(sandbox)
    os.kill(first, signal.SIGKILL)
    while sandbox._process is not None and sandbox._process.poll() is None:
        time.sleep(0.01)
    assert sandbox.render("{{ 1 + 1 }}", {}) == "2"
    assert _pid(sandbox) != first


def test_one_template_does_not_see_another(sandbox: Sandbox) -> None:
    sandbox.render("{% set secret = 'x' %}{% macro m() %}y{% endmacro %}", {"password": "z"})
    assert sandbox.render("{{ secret }}{{ m }}{{ password }}", {}) == ""


def test_closing_leaves_no_process(sandbox: Sandbox) -> None:
    sandbox.render("", {})
    pid = _pid(sandbox)
    sandbox.close()
    assert not _is_running(pid)
    sandbox.close()


def test_threads_share_the_process(sandbox: Sandbox) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = sandbox.render("{{ number * number }}", {"number": number})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: str(number * number) for number in range(8)}


@pytest.mark.parametrize(
    ("limits", "source", "message"),
    [
        (Limits(fuel=100), "{% for i in range(1000) %}{% endfor %}", "ran out of fuel"),
        (Limits(output=10), "{{ 'x' * 11 }}", "it wrote 11 characters, above the limit of 10"),
        (Limits(cpu_seconds=0.1), _HOSTILE["tree with shared branches"], "took too much time"),
        (Limits(cpu_seconds=60, seconds=0.5), _HOSTILE["tree with shared branches"], "took too much time"),
        (Limits(cpu_seconds=60), _HOSTILE["doubled string"], "took too much memory"),
    ],
)
def test_limits_are_told_apart(limits: Limits, source: str, message: str) -> None:
    with closing(Sandbox(limits)) as sandbox:
        with pytest.raises(TemplateError, match=message):
            sandbox.render(source, {})
        assert sandbox.render("{{ 'x' * 10 }}", {}) == "x" * 10


@pytest.mark.parametrize("executable", ["/nonexistent/python", "/bin/false"])
def test_a_process_that_does_not_start_is_an_error(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        with pytest.raises(TemplateError, match="Python process of their own"):
            sandbox.render("", {})
    assert sandbox.render("{{ 3 }}", {}) == "3"


def test_a_forked_process_has_a_sandbox_of_its_own() -> None:
    script = """
import os, sys
from plait.text.sandbox import SANDBOX
assert SANDBOX.render("{{ 1 }}", {}) == "1"
worker = SANDBOX._process.pid
child = os.fork()
if not child:
    assert SANDBOX.render("{{ 2 }}", {}) == "2"
    assert SANDBOX._process.pid != worker
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert SANDBOX.render("{{ 3 }}", {}) == "3"
assert SANDBOX._process.pid == worker
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_process_ends_with_its_parent() -> None:
    script = """
import os, signal
from plait.text.sandbox import SANDBOX
SANDBOX.render("", {})
print(SANDBOX._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)
