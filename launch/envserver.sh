#!/usr/bin/env bash
# Starts the envserver role. Usage: launch/envserver.sh RUN.toml [--set section.key=value]...
set -euo pipefail
PATH="$(dirname "$0")/../.venv/bin:$PATH"
exec understudy envserver --config "${1:?usage: $0 RUN.toml [--set section.key=value]...}" "${@:2}"
