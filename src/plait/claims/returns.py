"""Return statements of the standard library, each with what stands before it and what a model predicts."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["ReturnStatement", "return_statements"]

_MODULES = [
    "argparse",
    "ast",
    "base64",
    "bisect",
    "calendar",
    "cmd",
    "code",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "doctest",
    "email.message",
    "email.utils",
    "enum",
    "fileinput",
    "fnmatch",
    "fractions",
    "ftplib",
    "functools",
    "getopt",
    "gettext",
    "glob",
    "gzip",
    "heapq",
    "html.parser",
    "http.client",
    "http.cookies",
    "imaplib",
    "inspect",
    "ipaddress",
    "json.decoder",
    "json.encoder",
    "locale",
    "logging",
    "logging.config",
    "mailbox",
    "mimetypes",
    "ntpath",
    "numbers",
    "optparse",
    "os",
    "pathlib",
    "pdb",
    "pickletools",
    "pkgutil",
    "platform",
    "plistlib",
    "poplib",
    "posixpath",
    "pprint",
    "profile",
    "pstats",
    "pyclbr",
    "queue",
    "quopri",
    "random",
    "reprlib",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "sqlite3.dbapi2",
    "ssl",
    "stat",
    "statistics",
    "string",
    "subprocess",
    "symtable",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "turtle",
    "types",
    "typing",
    "unittest.case",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "webbrowser",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax.saxutils",
    "zipfile",
    "zipimport",
]


_MOST_BEFORE = 150


class ReturnStatement(NamedTuple):
    """The first return statement with a value of a function.

    Attributes:
        before: the function up to the statement, its indentation included.
        statement: the statement, `return` included, dedented.
    """

    before: str
    statement: str

    @property
    def prompt(self) -> str:
        """The function's first line and the 150 characters, whole lines, before the statement, with `return`."""
        lines = self.before.splitlines(keepends=True)
        rest = "".join(lines[1:])
        if len(rest) > _MOST_BEFORE:
            rest = rest[-_MOST_BEFORE:].partition("\n")[2]
        return lines[0] + rest + "return"


def return_statements() -> Iterator[ReturnStatement]:
    """One of each function that has one, of at most three lines, in a fixed order."""
    seen: set[str] = set()
    for name in _MODULES:
        source = inspect.getsource(importlib.import_module(name))
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            found = next(
                (one for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None), None
            )
            if found is None or found.end_lineno is None or found.end_lineno - found.lineno > 2:
                continue
            statement = textwrap.dedent("".join(lines[found.lineno - 1 : found.end_lineno])).strip()
            before = "".join(lines[node.lineno - 1 : found.lineno - 1])
            # A statement that shares its line with another would not begin the line.
            if not statement.startswith("return") or statement in seen:
                continue
            seen.add(statement)
            indent = " " * found.col_offset
            yield ReturnStatement(textwrap.dedent(before + indent + "|").rstrip("|"), statement)
