#!/usr/bin/env bash
# Starts all roles of a run on this machine. Usage: launch/local.sh RUN.toml [--set section.key=value]...
set -euo pipefail
PATH="$(dirname "$0")/../.venv/bin:$PATH"
exec understudy run --config "${1:?usage: $0 RUN.toml [--set section.key=value]...}" "${@:2}"
