"""Exact duplicates among documents: 16-byte hashes in a table on disk, so that memory stays bounded however many there are.

Every hash is kept with the batch that brought it: after a kill, what came behind the last batch that is safely written is
forgotten again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

from gpt.data.config import BESIDE_FIELDS
from gpt.data.sources import Row

_CACHE_KIB = 32 << 10


class SeenDocuments:
    """Which documents there were already.

    Args:
        path: of the table; made if it is not there.
        batch: hashes of later batches are forgotten.
    """

    def __init__(self, path: Path, batch: int = -1) -> None:
        self._table = sqlite3.connect(path)
        self._table.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._table.execute("CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, batch INTEGER NOT NULL) WITHOUT ROWID")
        self._table.execute("DELETE FROM seen WHERE batch > ?", (batch,))
        self._table.commit()
        self._previous = b""

    def is_new(self, row: Row, batch: int) -> bool:
        """Whether no row before had the same values. Later pieces of a large text are told by themselves and all pieces before."""
        learned = {name: value for name, value in row.values.items() if name not in BESIDE_FIELDS}
        content = json.dumps(learned, sort_keys=True).encode()
        digest = hashlib.blake2b(content, digest_size=16, key=self._previous if row.piece else b"").digest()
        self._previous = digest
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, batch)).rowcount == 1

    def state_dict(self) -> dict[str, str]:
        """What decides about the next piece of a large text; JSON-able."""
        return {"previous": self._previous.hex()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on behind the row after which `state_dict` was taken."""
        self._previous = bytes.fromhex(state["previous"])

    def commit(self) -> None:
        """Bring the hashes to the disk."""
        self._table.commit()

    def close(self) -> None:
        """Close the table, leaving out what has not been committed."""
        self._table.close()
