"""What needs `pip install 'fedsec[flower]'` says so and skips without it; `make test-flower` installs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.flower)


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages are stamped with the process's task, which Flower sets when it starts one."""
    if importlib.util.find_spec("flwr") is not None:
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
