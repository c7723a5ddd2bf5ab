#!/usr/bin/env bash
# Starts the inference role. Usage: launch/inference.sh RUN.toml [--set section.key=value]...
set -euo pipefail
PATH="$(dirname "$0")/../.venv/bin:$PATH"
exec understudy inference --config "${1:?usage: $0 RUN.toml [--set section.key=value]...}" "${@:2}"
