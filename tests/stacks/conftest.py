"""Two policies of one tiny model, for every stack."""

from __future__ import annotations

import pytest

from tools.models.policies import Policies


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("stacks"), "qwen2")
