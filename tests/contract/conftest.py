"""Every backend of `subjects.SUBJECTS`, and how many lanes a session has."""

from __future__ import annotations

import pytest
from subjects import SUBJECTS, Subject

from deepen_ext.members.backend import Backend


@pytest.fixture(scope="session", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Shared by all tests: nobody closes its backend."""
    return SUBJECTS[request.param]()


@pytest.fixture(params=list(SUBJECTS))
def own(request: pytest.FixtureRequest) -> Subject:
    """A subject of the test's own."""
    return SUBJECTS[request.param]()


@pytest.fixture
def backend(subject: Subject) -> Backend:
    return subject.backend


@pytest.fixture(params=[1, 2, 5])
def lanes(request: pytest.FixtureRequest) -> int:
    return request.param
