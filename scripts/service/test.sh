#!/usr/bin/env bash
# Tests the service with other people's clients, and its page in a real browser.
#
# usage: scripts/service/test.sh
#
# Needs Python 3.10 with venv, Node.js 20 with npm, and Chromium (on Debian: apt-get install python3-venv nodejs npm chromium).
# RETOUCH names the binary; the default is the one that `cargo test` builds.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    echo "test.sh: $1" >&2
    exit 1
}

command -v node >/dev/null || fail "Node.js is missing; on Debian: apt-get install nodejs npm"
chromium=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
[ -n "$chromium" ] || fail "Chromium is missing; on Debian: apt-get install chromium"
if [ -z "${RETOUCH:-}" ]; then
    cargo test --workspace --no-run --quiet
    RETOUCH=$PWD/${CARGO_TARGET_DIR:-target}/debug/retouch
fi
export RETOUCH CHROMIUM=$chromium

venv=${CARGO_TARGET_DIR:-target}/service-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r scripts/service/requirements.txt
"$venv/bin/python" scripts/service/clients.py "$RETOUCH"

cd crates/server/web
npm ci --silent --no-audit --no-fund
npm run check
npm run build
git diff --exit-code --stat -- dist || fail "dist is not what the sources give; commit what npm run build made"
npm test
