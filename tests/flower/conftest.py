"""These tests need `pip install 'fedsec[flower]'`; without it they say so and skip. `make test-flower` installs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("flwr") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.flower)
            if missing:
                item.add_marker(pytest.mark.skip(reason="flwr is not installed: pip install 'fedsec[flower]'"))


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages are stamped with the process's task, which Flower sets when it starts one."""
    if importlib.util.find_spec("flwr") is not None:
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
