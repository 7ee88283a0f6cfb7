"""doctor on this machine, on one without the native module, and with a setting that cannot be obeyed."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from opensora_fast import doctor
from opensora_fast.kernels import backend, extension


@pytest.fixture(autouse=True)
def fresh_caches():
    """Each test reads the environment and the native module anew, and leaves nothing of that behind."""
    yield
    extension.load.cache_clear()
    backend.overrides.cache_clear()


def test_names_every_op_and_its_reason(capsys):
    assert doctor.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__
    assert told["ops"].keys() == {path.stem for path in _op_files()}
    for devices in told["ops"].values():
        assert all(of["backend"] in backend.NAMES and of["reason"] for of in devices.values())
    assert told["attention"]["cpu"]["cpu_flash"] == ""
    assert told["runtime"].keys() == {"checksums", "io_uring", "registered buffers", "clips are decoded by"}
    assert {"text", "gpu", "demo", "dev"} <= told["extras"].keys()
    assert all(of["command"] == f"pip install -e '.[{extra}]'" for extra, of in told["extras"].items())


def test_without_the_native_module_tells_how_to_build_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "opensora_fast._C", None)
    extension.load.cache_clear()
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert extension.BUILD_COMMAND in shown
    assert "reference: opensora_fast._C cannot be imported" in shown


def test_a_backend_that_cannot_run_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv(backend.VARIABLE, "pixel_shuffle:cudnn")
    backend.overrides.cache_clear()
    assert doctor.main([]) == 1
    assert "error: OPENSORA_FAST_BACKEND=pixel_shuffle:cudnn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "cuda", "told"),
    [
        (None, None, None),
        (8907, "12.1", None),
        (90700, "12.8", None),
        (90800, "12.8", "cuDNN 9.8.0 does not run .* 'nvidia-cudnn-cu12>=9.15'"),
        (91401, "13.0", "cuDNN 9.14.1 does not run .* 'nvidia-cudnn-cu13>=9.15'"),
        (91501, "13.0", None),
    ],
)
def test_cudnn_that_leaves_convolutions_out_is_told(version, cuda, told):
    error = doctor.cudnn_error(version, cuda)
    assert error is None if told is None else re.search(told, error)


def test_an_error_is_shown_and_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_errors", lambda: ["cuDNN 9.10.2 does not do"])
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert "cuDNN 9.10.2 does not do" in shown
    assert doctor.examine()["versions"]["cuDNN"] == "9.10.2"


def _op_files():
    return [path for path in Path(backend.__file__).parent.glob("*.py") if "\ndef choose(" in path.read_text()]
