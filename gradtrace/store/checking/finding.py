"""What is wrong with a store, or left over in it: one sentence each, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

DAMAGE, LEFTOVER, NOTE = "damage", "leftover", "note"
SEVERITIES = (DAMAGE, LEFTOVER, NOTE)

RESTORE = "Restore it from a copy."
REPAIR = "`gradtrace verify --repair` removes it."
CUT = "Restore it from a copy, or let `gradtrace verify --repair` keep the rows before it."
GIVE_UP = "Restore it from a copy, or let `gradtrace verify --repair` give it up and keep the rest."


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    stream: the group of the stream, "steps" or "probes/<name>"; empty where it is about the whole store. array: the
    path below it. steps: the first and the last step that are concerned, as 12:63. row: the position of the first,
    where rows before it are right. key: the one key that is concerned, if it is one.
    """

    severity: str
    what: str
    remedy: str
    stream: str = ""
    array: str = ""
    steps: str = ""
    row: int | None = None
    key: str = ""

    def __str__(self) -> str:
        where = "/".join(part for part in (self.stream, self.array) if part) or "the store"
        return f"{self.severity}: {where}{f', steps {self.steps}' if self.steps else ''}: {self.what}. {self.remedy}"


def in_order(findings: list[Finding]) -> list[Finding]:
    """Damage first, then what is left over, then notes."""
    return sorted(findings, key=lambda one: SEVERITIES.index(one.severity))
