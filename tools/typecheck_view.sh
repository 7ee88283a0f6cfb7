#!/usr/bin/env bash
# Rebuild .typecheck/opensora_fast: the package as it is when installed, as relative links, for tools that cannot follow the mapping.
# It is also an import root that needs no install: PYTHONPATH=.typecheck
set -euo pipefail
cd "$(dirname "$0")/.."
view=.typecheck/opensora_fast
rm -rf "$view"
mkdir -p "$view"
for file in opensora_fast/*.py opensora_fast/py.typed; do ln -s "../../$file" "$view/"; done
for folder in kernels train profiling; do ln -s "../../$folder" "$view/$folder"; done
