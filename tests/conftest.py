"""Set before anything loads: no network, one thread a process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CASEHARD_CHECK_BORROWED"] = "1"  # who borrows a model changes nothing that it did not name

import pytest
import torch
from toy import save_toy_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model with random weights and the sandbox's tokenizer: two layers of 32, 36 thousand parameters."""
    return save_toy_checkpoint(tmp_path_factory.mktemp("toy") / "model")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is marked gpu is skipped where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
