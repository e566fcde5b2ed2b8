"""What was found out of members that run in a server, when they were loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepen_ext.members.backend import Finding
from deepen_ext.members.member import Member, unique_names


@dataclass(frozen=True)
class ServerFindings:
    """The findings of one member.

    Attributes:
        member: its name.
        backend: what computes it.
        findings: in the order in which they were looked for.
    """

    member: str
    backend: str
    findings: tuple[Finding, ...]


def server_findings(members: Sequence[Member]) -> Iterator[ServerFindings]:
    """The findings of each member that has some."""
    for name, member in zip(unique_names(members), members, strict=True):
        described = member.backend.describe()
        if described.findings:
            yield ServerFindings(name, described.backend, described.findings)


def why_not_measured(members: Sequence[Member]) -> str | None:
    """Why the gain of fusing these members cannot be measured; None where it can."""
    if len(members) < 2:
        return "a gain takes two or more members"
    hidden = [member.name for member in members if not member.backend.capabilities.logits]
    if not hidden:
        return None
    return (
        f"a likelihood takes full logits, and of {' and '.join(hidden)} only the most probable tokens are "
        "known; run the same model in process to measure the gain"
    )
