#!/usr/bin/env bash
# Install the missing Debian packages of the test cluster. Exit code 1, with the reason in one line, if no cluster can run
# here.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2)
PATH="$PATH:/usr/sbin:/sbin"

skip() {
    echo "test-slurm: skipped: $*"
    exit 1
}

if [ "$(id -u)" != 0 ]; then skip "not root, which namespaces and Slurm's daemons need"; fi
if ! unshare --mount --pid --uts --net --ipc --fork true 2>/dev/null; then skip "new namespaces are not allowed here"; fi
missing=''
for program in munged slurmctld slurmd sbatch ip; do
    command -v "$program" >/dev/null || missing+=" $program"
done
if [ -z "$missing" ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then skip "missing:$missing; there is no apt-get to install them"; fi
echo "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
if ! log=$(apt-get update -qq 2>&1 && apt-get install -y -qq --no-install-recommends "${packages[@]}" 2>&1); then
    skip "apt-get install ${packages[*]} failed: $(tail -n 1 <<<"$log")"
fi
