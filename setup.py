"""Drives CMakeLists.txt, which lists all native sources and flags; everything else is in pyproject.toml.

The build folder is kept, so that a second build compiles only what changed. CMAKE_ARGS passes options on, for example
CMAKE_ARGS="-DOSF_CUDA=OFF".
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def announce(text: str) -> None:
    """Print to the build's output and to the terminal: pip hides the output of a build that succeeds."""
    print(text, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{text}\n")
    except OSError:  # no terminal: a CI job or a container
        pass


def run(step: str, *command: str | Path) -> None:
    if subprocess.run(command).returncode:
        sys.exit(
            f"opensora-fast: {step} the native extension failed, see the messages above. It needs a working C++17 "
            f"compiler (apt-get install g++, or set CXX, now {os.environ.get('CXX', 'unset')}) and the headers of "
            f"{sys.executable} (apt-get install python3-dev)."
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import cmake
        import ninja
        import pybind11

        built = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        # --fresh: a cached configuration may point to the tools of an earlier isolated build, which are gone.
        configure = [program, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", folder]
        configure += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DOSF_VERSION={self.distribution.get_version()}"]
        run("configuring", *configure, *shlex.split(os.environ.get("CMAKE_ARGS", "")))
        run("compiling", program, "--build", folder)
        built.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / built.name, built)
        announce((folder / "summary.txt").read_text().rstrip())


setup(ext_modules=[Extension("opensora_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
