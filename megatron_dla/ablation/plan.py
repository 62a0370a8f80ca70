"""An ablation as a YAML file: recipes x seeds of one adapter's config, and how they are evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_dla.config import AdapterRunConfig
from megatron_dla.config.load import fill
from megatron_dla.config.schema import Directory, Number, Ranks
from megatron_dla.errors import ConfigError
from megatron_dla.evaluation.recall import make_task
from megatron_dla.study.synthetic import Seed
from megatron_dla.study.variants import check_names, check_seeds, load_variant, read_file


@dataclass
class Evaluation:
    """Options of `dla eval`, under their names."""

    recall_task: str = ""
    """Empty: that of `dla eval`."""
    set: dict[str, int | str] = field(default_factory=dict)
    episodes: Annotated[int, Field(ge=2, lt=2**31)] = 200
    text: tuple[str, ...] = ()
    """Ordinary text; without it the perplexity is left out."""
    window: Annotated[int, Field(ge=2, lt=2**31)] = 512
    windows: Number = 64
    seed: Seed = 0

    def check(self) -> None:
        """Raises UserError where `dla eval` would refuse a task, a setting or a file."""
        if self.recall_task:
            make_task(self.recall_task, **self.set)
        for file in self.text:
            if not Path(file).is_file():
                raise ConfigError(f"evaluate.text: {file!r} is no file")

    def options(self) -> list[str]:
        """The command line, but for the model, the adapters and --out."""
        found = ["--controls", "--tasks", "recall,ppl" if self.text else "recall", "--episodes", str(self.episodes)]
        found += ["--seed", str(self.seed)] + (["--recall-task", self.recall_task] if self.recall_task else [])
        found += ["--set", *(f"{key}={value}" for key, value in self.set.items())] if self.set else []
        if self.text:
            found += ["--text", *self.text, "--window", str(self.window), "--windows", str(self.windows)]
        return found


@dataclass
class AblationConfig:
    """One ablation; each default is here."""

    name: str = "ablation"
    """Directory under `dir`."""
    dir: Directory = "runs/ablations"
    base: str = ""
    """The adapter config of all recipes: a file, or the name of a shipped one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of it for all recipes: {section.key: value}."""
    nproc: Ranks = 1
    """Processes of a run on this machine."""
    seeds: tuple[Seed, ...] = (1,)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What differs: {name: {section.key: value}}."""
    evaluate: Evaluation = field(default_factory=Evaluation)


class Ablation:
    """An ablation with the configs of its recipes.

    Attributes:
        config. root: its directory. recipes: {name: AdapterRunConfig}, with the seed of the base.

    Raises:
        ConfigError: a wrong key or value.
    """

    def __init__(self, config: AblationConfig) -> None:
        self.config, self.root = config, Path(config.dir) / config.name
        if not config.base:
            raise ConfigError("base = '': name the adapter config that all recipes share")
        if not config.recipes:
            raise ConfigError("recipes = {}: give at least one, {name: {section.key: value}}")
        check_seeds("seeds", config.seeds)
        check_names({"name": [config.name], "recipes": config.recipes})
        self.recipes = {
            name: load_variant(AdapterRunConfig, config.base, config.overrides, changes, f"recipes.{name}")
            for name, changes in config.recipes.items()
        }

    def place(self, recipe: str, seed: int) -> Path:
        """The run directory."""
        return self.root / recipe / f"seed_{seed}"

    def run_config(self, recipe: str, seed: int) -> AdapterRunConfig:
        place, config = self.place(recipe, seed), self.recipes[recipe]
        return replace(config, run=replace(config.run, dir=str(place.parent), name=place.name, seed=seed))


def load_ablation(path: str | Path) -> Ablation:
    """Read an ablation's YAML file, or a shipped one by its name. Raises ConfigError."""
    return Ablation(fill(AblationConfig, read_file(path, "ablation")))
