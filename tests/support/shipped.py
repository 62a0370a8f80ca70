"""The configs that come with the package."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SYNTHETIC = sorted(path for path in CONFIGS.glob("study_*.yaml") if "\nsynthetic:" in path.read_text())
STUDIES = sorted(path for path in CONFIGS.glob("study_*.yaml") if "\narms:" in path.read_text())
ABLATIONS = sorted(CONFIGS.glob("ablation_*.yaml"))
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path not in STUDIES + SYNTHETIC + ABLATIONS]
