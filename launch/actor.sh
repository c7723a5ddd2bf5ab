#!/usr/bin/env bash
# Starts the actor role. Usage: launch/actor.sh RUN.toml [--set section.key=value]...
set -euo pipefail
PATH="$(dirname "$0")/../.venv/bin:$PATH"
exec understudy actor --config "${1:?usage: $0 RUN.toml [--set section.key=value]...}" "${@:2}"
