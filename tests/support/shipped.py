"""The configs that come with the package."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STUDIES = sorted(CONFIGS.glob("study_*.yaml"))
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path not in STUDIES]
