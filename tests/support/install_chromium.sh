#!/usr/bin/env bash
# Install Debian's Chromium, for tests/report. Exit code 0 also where it cannot be: the tests say that they are skipped.
set -uo pipefail
command -v chromium >/dev/null && exit 0
skip() {
    echo "install_chromium: $*; the tests that open pages are skipped"
    exit 0
}
[ "$(id -u)" = 0 ] || skip "not root"
command -v apt-get >/dev/null || skip "no apt-get"
export DEBIAN_FRONTEND=noninteractive
echo "installing chromium"
if ! log=$(apt-get update -qq 2>&1 && apt-get install -y -qq --no-install-recommends chromium 2>&1); then
    skip "apt-get install chromium failed: $(tail -n 1 <<<"$log")"
fi
