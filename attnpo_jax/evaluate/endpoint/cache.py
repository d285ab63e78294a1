"""What was asked and answered, and what it took: a SQLite file that survives being killed."""

import contextlib
import pathlib
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Self

from attnpo_jax.runtime.errors import UserError

# Kept in the file's header, so that no other program's file is taken for one of these.
_APPLICATION, _VERSION = 0x41545045, 1
_TABLES = """
CREATE TABLE answers (key TEXT PRIMARY KEY, request TEXT NOT NULL, answer BLOB NOT NULL);
CREATE TABLE attempts (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, began TEXT DEFAULT CURRENT_TIMESTAMP,
  tokens INTEGER NOT NULL, outcome TEXT NOT NULL
);
"""
# The longest that another process' write is waited for.
_BUSY_SECONDS = 30


class Cache:
    """Answers by the key of their request, and every request that was sent.

    Each change is on the disk when its method returns. One thread at a time may use it.

    Raises:
      UserError: what is at the path is no such file, is damaged, or can't be written; methods too.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        with self._told():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._open()
            except BaseException:
                self._database.close()
                raise

    def _open(self) -> None:
        run = self._database.execute
        run("PRAGMA synchronous = FULL")
        with self._change():
            (application,), (version,) = (
                run(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
            )
            if (application, version) != (_APPLICATION, _VERSION):
                if application or version or run("SELECT 1 FROM sqlite_master").fetchone():
                    raise sqlite3.DatabaseError("other tables than this version's are in it")
                for statement in _TABLES.split(";"):
                    run(statement)
                run(f"PRAGMA application_id = {_APPLICATION}")
                run(f"PRAGMA user_version = {_VERSION}")
        run("PRAGMA journal_mode = WAL")  # where the file system can't, it stays as it was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def answers(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The bodies of the answers that are there, of those with some keys."""
        with self._told():
            found = (
                self._database.execute("SELECT key, answer FROM answers WHERE key = ?", (key,))
                for key in keys
            )
            return {row[0]: bytes(row[1]) for rows in found for row in rows}

    def spent(self) -> tuple[int, int]:
        """Requests that were sent, and what they took, in tokens."""
        with self._told():
            query = "SELECT COUNT(*), COALESCE(SUM(tokens), 0) FROM attempts"
            return self._database.execute(query).fetchone()

    def begin(self, key: str, tokens: int) -> int:
        """Notes that a request is sent, which may take so many tokens; the attempt's number."""
        with self._told(), self._change():
            entry = self._database.execute(
                "INSERT INTO attempts (key, tokens, outcome) VALUES (?, ?, 'sent')", (key, tokens)
            )
            return entry.lastrowid

    def fail(self, attempt: int, tokens: int, reason: str) -> None:
        """Notes that nothing came of an attempt, and what it took."""
        with self._told(), self._change():
            self._end(attempt, tokens, reason)

    def keep(self, attempt: int, tokens: int, key: str, request: str, answer: bytes) -> None:
        """Keeps an answer, in place of what was there under its key, and what it took.

        Args:
          request, answer: the two bodies.
        """
        with self._told(), self._change():
            self._end(attempt, tokens, "answered")
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, request, answer)
            )

    def _end(self, attempt: int, tokens: int, outcome: str) -> None:
        self._database.execute(
            "UPDATE attempts SET tokens = ?, outcome = ? WHERE id = ?", (tokens, outcome, attempt)
        )

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self.file}: {error}; accepted: a file of answers that this version wrote, in a "
                "folder that can be written, or none (what it holds would be asked, and paid, "
                "again)"
            ) from error
