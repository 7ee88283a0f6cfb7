"""What all tests share: where Triton kernels run, process groups, and the outputs of the released architecture."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open

# Without a GPU Triton kernels run in Triton's interpreter, which is decided when the first of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("project", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("project")


@pytest.fixture(scope="session")
def golden():
    """golden(name): the configuration of a golden file, and copies of its tensors by group (input, weight, ...)."""

    def read(name: str) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
        groups: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                group, _, rest = key.partition("/")
                groups.setdefault(group, {})[rest] = file.get_tensor(key)
            return json.loads(file.metadata()["config"]), groups

    return read


@pytest.fixture(scope="session")
def ranks():
    """ranks(P).run("kernels/test_x.py:function", *args): the function's results on P gloo ranks; see ranks.py."""
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).parent / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pools = module.Ranks()
    yield pools
    pools.close()
