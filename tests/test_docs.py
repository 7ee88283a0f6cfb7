"""docs/released-weights.md: commands and code run as written, at sizes for a CPU; the table is what is predicted."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_fast.cli import main
from opensora_fast.memory_table import memory_markdown, memory_table
from opensora_fast.video_io import probe, write_image, write_video

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PAGE_FILE = ROOT / "docs" / "released-weights.md"
PAGE = PAGE_FILE.read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines() if line.strip()
]


def smaller(command: str) -> list[str]:
    """The words of a command; of `sample` with sizes for a CPU behind them, where the last of an option counts.

    A command that names a resolution gets the smallest in its place, and keeps the shape that it names.
    """
    words = shlex.split(command)
    if words[1] != "sample":
        return words[1:]
    dcae = "ckpts-dcae" in words
    frames = "8" if dcae else "41" if "--video" in words else "9"
    side = "64" if dcae else "32"
    sizes = ["--resolution", "256px"] if "--resolution" in words else ["--height", side, "--width", side]
    sizes += ["--flux-resolution", "256px"] if "--flux" in words else []
    return [*words[1:], "--steps", "2", "--frames", frames, *sizes]


@pytest.fixture(scope="module")
def desk(released_folder, tmp_path_factory) -> Path:
    """A working directory as the page has it after the download, with an image and a video of the user's."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(released_folder("open-sora-v2"), desk / "ckpts")
    shutil.copytree(released_folder("dcae"), desk / "ckpts-dcae")
    generator = torch.Generator().manual_seed(0)
    write_image(desk / "rabbit.png", torch.rand(3, 1, 40, 48, generator=generator) * 2 - 1)
    write_video(desk / "ride.mp4", torch.rand(3, 40, 40, 48, generator=generator) * 2 - 1, 24)
    [prompts] = re.findall(r"```csv\n(.*?)```", PAGE, flags=re.S)
    (desk / "prompts.csv").write_text(prompts)
    return desk


def check_video(path: Path, words: list[str]) -> None:
    """The file has the frames and the size that were asked for last."""

    def last(option: str, otherwise: str = "") -> str:
        return words[len(words) - words[::-1].index(option)] if option in words else otherwise

    found = probe(path)
    wanted = (last("--height"), last("--width"))
    if "--resolution" in words:
        long = "320" if "ckpts-dcae" in words else "336"  # of about 256 x 256 pixels
        wanted = {"16:9": ("192", long), "9:16": (long, "192")}[last("--aspect-ratio", "16:9")]
    assert (str(found.num_frames), str(found.height), str(found.width)) == (last("--frames"), *wanted), path


def test_every_command_runs(desk, monkeypatch):
    monkeypatch.chdir(desk)
    for command in COMMANDS:
        words = smaller(command)
        if "--nproc" in words:
            continue  # below
        assert command.startswith("opensora-fast "), command
        assert main(words) == 0, command
        out = Path(words[words.index("--out") + 1])
        if out.suffix == ".mp4":
            check_video(out, words)
    assert sorted(path.name for path in Path("videos/many").iterdir()) == ["rabbit.mp4", "rain.mp4"]
    before, after = load_file("ckpts/Open_Sora_v2.safetensors"), load_file("again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.slow
def test_the_command_for_several_gpus_runs_on_two_processes(desk, monkeypatch):
    monkeypatch.chdir(desk)
    [command] = [command for command in COMMANDS if "--nproc" in command]
    words = smaller(command.replace("--nproc 8", "--nproc 2"))
    assert main(words) == 0
    check_video(Path("videos/eight.mp4"), words)


def test_the_python_code_runs(desk, monkeypatch):
    monkeypatch.chdir(desk)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    for asked, small in {"num_frames=129": "num_frames=9, height=32, width=32", "steps=50": "steps=2"}.items():
        assert asked in code
        code = code.replace(asked, small)
    names: dict = {}
    exec(code, names)
    assert names["video"][0].shape == (9, 32, 32, 3)


def test_the_folders_are_those_of_the_releases(released_checkpoints):
    for folder, what in {"ckpts": "open-sora-v2", "ckpts-dcae": "dcae"}.items():
        for format in released_checkpoints.CONTENTS[what][:2]:
            assert re.search(rf"^{folder}/{released_checkpoints.PLACES[format]}( |$)", PAGE, flags=re.M)
    for format in released_checkpoints.CONTENTS["open-sora-v2"]:
        assert f"ckpts/{released_checkpoints.PLACES[format]}" in PAGE


def test_the_table_of_memory_is_what_is_predicted():
    [table] = re.findall(r"<!-- memory table -->\n(.*?)<!-- end of the memory table -->", PAGE, flags=re.S)
    assert table == memory_markdown(memory_table())


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert "://" in target or (PAGE_FILE.parent / target).exists(), target
