"""The README's diagrams are what docs/diagrams.py writes."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"


def test_committed_diagrams_are_current(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "diagrams.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=300)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in IMAGES.glob("*.svg")}, "run: python docs/diagrams.py"
    for text in written.values():
        ElementTree.fromstring(text)


def test_the_readme_shows_them_all() -> None:
    readme = (ROOT / "README.md").read_text()
    paths = sorted(IMAGES.iterdir())
    assert len(paths) > 2
    for path in paths:
        assert f"](docs/images/{path.name})" in readme
