"""A study as a YAML file, and the runs (cells) that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_dla.config import RunConfig
from megatron_dla.config.load import fill
from megatron_dla.config.schema import Directory, Ranks
from megatron_dla.errors import ConfigError
from megatron_dla.study.parameters import equal_width
from megatron_dla.study.rates import Rate, check_rates, rate_name, split_rates
from megatron_dla.study.synthetic import Seed, SyntheticSection, SyntheticStudy
from megatron_dla.study.variants import check_names, check_seeds, load_variant, read_file
from megatron_dla.tasks.run import make_task

_WIDTHS = 8  # the MLP width that equalises parameters is a multiple of it
_FIX = "change its widths, or set parameters: as_given"


@dataclass
class StudyConfig:
    """One study; each default is here."""

    name: str = "study"
    """Directory under `dir`."""
    dir: Directory = "runs/studies"
    base: str = ""
    """The config of all arms: a file, or the name of a shipped one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of it for all arms: {section.key: value}."""
    nproc: Ranks = 1
    """Processes of a run on this machine."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What differs from arm to arm: {name: {section.key: value}}; learning_rates: of this arm instead of all."""
    reference: str = ""
    """The arm that the others are compared with; the first if not given."""
    questions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Arms to compare beside that: {question: [arm, control]}."""
    learning_rates: tuple[Rate, ...] = ()
    """Tried for each arm with the first seed; the others run with the best. Empty: that of the config."""
    seeds: tuple[Seed, ...] = (1234,)
    """Of initialisation and data order; a seed gives all arms the same batches in the same order."""
    parameters: Literal["equal", "as_given"] = "equal"
    """equal: model.ffn_hidden_size of each arm is set so that it has the reference's parameters within 1 %."""
    synthetic: SyntheticSection = field(default_factory=SyntheticSection)
    """Recall tasks for small models, with arms of their own."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Its directory below that of the study."""
        return Path(self.arm) / rate_name(self.rate) / f"seed_{self.seed}"


class Study:
    """A study with the configs of its arms.

    Attributes:
        config: of the study. root: its directory. arms: {name: RunConfig}, with learning rate and seed of the base.
        changes: {name: {section.key: value}}, what differs from the base.
        synthetic: its synthetic tasks, or None.

    Raises:
        ConfigError: a wrong key or value, an unknown arm, or an arm whose parameters cannot be made equal.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        _check(config)
        self.root = Path(config.dir) / config.name
        own = {name: split_rates(f"arms.{name}", keys) for name, keys in config.arms.items()}
        self.changes = {name: changes for name, (_, changes) in own.items()}
        self.arms = {
            name: load_variant(RunConfig, config.base, config.overrides, changes, f"arms.{name}")
            for name, changes in self.changes.items()
        }
        self._rates = {name: rates or config.learning_rates for name, (rates, _) in own.items()}
        for name, rates in self._rates.items():
            if rates and "optimizer.lr" in self.changes[name]:
                raise ConfigError(f"arms.{name}: has optimizer.lr and learning_rates too; give one of the two")
        self.synthetic = SyntheticStudy(config.synthetic, self.root) if config.synthetic.tasks else None
        if self.arms and config.parameters == "equal":
            vocab = make_task(self.arms[self.reference]).layout().vocab_size
            reference = self.arms[self.reference].model
            self.arms = {
                name: replace(arm, model=equal_width(arm.model, reference, vocab, f"arms.{name}", _WIDTHS, _FIX))
                for name, arm in self.arms.items()
            }

    @property
    def reference(self) -> str:
        return self.config.reference or next(iter(self.config.arms))

    def rates(self, arm: str) -> tuple[float, ...]:
        return self._rates[arm] or (self.arms[arm].optimizer.lr,)

    def first_cells(self, arm: str) -> list[Cell]:
        """Those that decide on the arm's learning rate."""
        return [Cell(arm, rate, self.config.seeds[0]) for rate in self.rates(arm)]

    def later_cells(self, arm: str, rate: float) -> list[Cell]:
        """The other seeds, with the best learning rate."""
        return [Cell(arm, rate, seed) for seed in self.config.seeds[1:]]

    def run_config(self, cell: Cell) -> RunConfig:
        arm, place = self.arms[cell.arm], self.root / cell.path
        return replace(
            arm,
            run=replace(arm.run, dir=str(place.parent), name=place.name, seed=cell.seed),
            optimizer=replace(arm.optimizer, lr=cell.rate),
        )


def load_study(path: str | Path) -> Study:
    """Read a study's YAML file, or a shipped one by its name. Raises ConfigError."""
    return Study(fill(StudyConfig, read_file(path, "study")))


def _check(config: StudyConfig) -> None:
    if not config.synthetic.tasks and config.synthetic != SyntheticSection():
        raise ConfigError("synthetic.tasks = {}: give at least one, {name: keys of the task}, or leave the section out")
    text = config.base or config.arms or not config.synthetic.tasks  # else a study of synthetic tasks alone
    if text and not config.base:
        raise ConfigError("base = '': name the config that all arms share")
    if text and not config.arms:
        raise ConfigError("arms = {}: give at least one arm, {name: {section.key: value}}")
    if config.reference and config.reference not in config.arms:
        raise ConfigError(f"reference = {config.reference!r}: not one of the arms {', '.join(config.arms)}")
    for question, pair in config.questions.items():
        for name in (name for name in pair if name not in config.arms):
            known = ", ".join(config.arms)
            raise ConfigError(f"questions.{question} = {list(pair)}: {name!r} is not one of the arms {known}")
    tasks = config.synthetic
    check_names(
        {"name": [config.name], "arms": config.arms, "synthetic.arms": tasks.arms, "synthetic.tasks": tasks.tasks}
    )
    check_seeds("seeds", config.seeds)
    check_rates("learning_rates", config.learning_rates)
