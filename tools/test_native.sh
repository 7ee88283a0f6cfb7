#!/usr/bin/env bash
# Build and run the C++ tests as they are, under ThreadSanitizer and under AddressSanitizer with UndefinedBehaviorSanitizer.
# Usage: tools/test_native.sh [plain|thread|address ...] (all three without an argument)
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
pybind11=$(python -P -m pybind11 --cmakedir)
[ $# -gt 0 ] || set -- plain thread address
scratch=
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT  # also when a test fails
for kind in "$@"; do
  folder=build/native-tests-$kind
  [ "$kind" = plain ] && sanitize= || sanitize=$kind
  cmake -G Ninja -S . -B "$folder" -DOSF_CUDA=OFF -DOSF_TESTS=ON -DOSF_SANITIZE="$sanitize" \
    -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$pybind11" >"$folder.log" || { cat "$folder.log"; exit 1; }
  cmake --build "$folder" --target osf_tests >"$folder.log" || { cat "$folder.log"; exit 1; }
  for test in "$folder"/test_*; do
    [ -x "$test" ] && [ -f "$test" ] || continue
    echo "$kind: $(basename "$test")"
    # GCC's ThreadSanitizer does not know the address layout of a kernel that randomises more bits than it did.
    scratch=$(mktemp -d "$folder/scratch-XXXXXX")
    setarch "$(uname -m)" -R "$test" "$scratch"
    rm -r "$scratch"
    scratch=
  done
done
