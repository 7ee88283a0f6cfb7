"""What all tests share: where Triton kernels run, process groups, and the outputs of the released architecture."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

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
    pools = _beside("ranks").Ranks()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def released_checkpoints():
    """The writers of tiny checkpoints in the released formats, released_checkpoints.py."""
    return _beside("released_checkpoints")


@pytest.fixture(scope="session")
def released_folder(released_checkpoints, tmp_path_factory):
    """released_folder("open-sora-v2" or "dcae"): a released folder, written once for all tests; copy it to change it.

    released_folder("diffusers-flux") is FLUX.1-dev as diffusers has it.
    """
    written: dict[str, Path] = {}

    def folder(what: str = "open-sora-v2") -> Path:
        if what not in written:
            place = tmp_path_factory.mktemp(what)
            if what == "diffusers-flux":
                written[what] = released_checkpoints.write_diffusers_flux(place)
            else:
                written[what] = released_checkpoints.write_released(place, what)
        return written[what]

    return folder


def _beside(name: str) -> ModuleType:
    """The module tests/NAME.py: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
