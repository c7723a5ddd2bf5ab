#!/usr/bin/env bash
# Starts the learner role. Usage: launch/learner.sh RUN.toml [--set section.key=value]...
set -euo pipefail
PATH="$(dirname "$0")/../.venv/bin:$PATH"
exec understudy learner --config "${1:?usage: $0 RUN.toml [--set section.key=value]...}" "${@:2}"
