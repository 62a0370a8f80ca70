"""Run tests/hf, and the tests of hooks in transformers' models, on several releases of transformers, each in an
environment of its own (`make test-hf`).

usage: python -m tests.hf.releases [minimum] [pinned] [newest] [clients]

The newest is what the package index has at the time; `clients` runs tests/clients on it, beside the newest trl, peft,
accelerate, lm_eval and datasets (`make test-clients`). An environment takes all packages but these, and what they
require in other versions, from the environment that runs this. A failure on the newest release alone is a warning: it
is not in our hands when it changes; any other is exit code 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import distribution, distributions
from pathlib import Path

from megatron_dla.hf.releases import MINIMUM, NEWEST, PINNED

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ("tests/serving/test_hf_model.py", "tests/evaluation/test_lm_adapter.py")  # run beside tests/hf
CLIENTS = ("trl", "peft", "accelerate", "lm_eval", "datasets")
PIP = [sys.executable, "-m", "pip"]


def newest_release() -> str:
    """What the index has; the newest known where it does not answer."""
    command = [*PIP, "index", "versions", "transformers"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if found := re.match(r"transformers \((\S+)\)", done.stdout):
        return found[1]
    print(f"test-hf: the package index does not answer: {NEWEST} is taken for the newest", flush=True)
    return NEWEST


def environment(version: str, packages: Sequence[str] = ()) -> Path:
    """The Python of an environment with that release (and the newest `packages`), made where it is missing."""
    home = Path(f"{sys.prefix}-{'clients' if packages else 'hf'}-{version}")
    python, ready = home / "bin/python", home / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", home], check=True)
        site = next(home.glob("lib/python*/site-packages"))
        (site / "first.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pins = [f"torch=={distribution('torch').version.split('+')[0]}"] if packages else []  # and not gigabytes
        install = [*PIP, "--python", python, "install", "-qq", f"transformers=={version}", *packages, *pins]
        subprocess.run(install, check=True)
        ready.touch()
    return python


def differences(python: Path) -> str:
    """The packages of that environment that are not those of this one."""
    code = "from importlib.metadata import distributions as d; print(*{x.name + ' ' + x.version for x in d(path=[%r])})"
    site = next(python.parents[1].glob("lib/python*/site-packages"))
    words = subprocess.run([python, "-c", code % str(site)], capture_output=True, text=True, check=True).stdout.split()
    here = {x.name.lower(): x.version for x in distributions()}
    changed = [
        f"{name} {here.get(name.lower(), 'none')} -> {version}"
        for name, version in zip(words[::2], words[1::2], strict=True)
        if here.get(name.lower()) != version
    ]
    return ", ".join(sorted(changed)) or "nothing"


def run_tests(version: str, folder: str = "tests/hf") -> tuple[bool, str]:
    """Whether the tests pass with that release, and the failures."""
    python = environment(version, CLIENTS if folder == "tests/clients" else ())
    print(f"\n== {folder} on transformers {version} (other than here: {differences(python)})", flush=True)
    jobs = os.environ.get("JOBS", "2")
    command = [python, "-m", "pytest", "-q", "-n", jobs, "--dist", "loadfile", "-p", "no:cacheprovider", folder]
    command += HOOKS if folder == "tests/hf" else ()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.returncode == 0, "\n".join(x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR")))


def main(names: list[str]) -> int:
    releases = {"minimum": MINIMUM, "pinned": PINNED}
    if {"newest", "clients"} & set(names):
        releases["newest"] = releases["clients"] = newest_release()
    folders = {"clients": "tests/clients"}
    results = {name: run_tests(releases[name], folders.get(name, "tests/hf")) for name in names}
    for name, (passed, _) in results.items():
        print(f"test-hf: {name}, transformers {releases[name]}: {'passed' if passed else 'FAILED'}")
    if releases.get("newest", NEWEST) != NEWEST:
        print(f"test-hf: {releases['newest']} is newer than {NEWEST} of megatron_dla/hf/releases.py: enter it there")
    passed, failures = results.pop("newest", (True, ""))
    if not passed:
        print(f"{'!' * 88}\nWARNING: exports break on transformers {releases['newest']}, which users install today:")
        print(
            f"{failures}\nWhat is newer than in the pinned environment: {differences(environment(releases['newest']))}"
        )
        print("!" * 88)
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["minimum", "pinned", "newest"]))
