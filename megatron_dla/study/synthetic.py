"""The synthetic tasks of a study: tasks x arms x learning rates x seeds, each a cell of a minute or two."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_dla.config import LETTERS, ModelSection, attention_head_dim, layer_letters
from megatron_dla.config.checks import check_model
from megatron_dla.config.load import fill
from megatron_dla.config.schema import Number, Share
from megatron_dla.errors import ConfigError
from megatron_dla.model.counts import recurrent_states
from megatron_dla.study.generators import NotBool, TaskSection, check_task, vocabulary
from megatron_dla.study.parameters import equal_width
from megatron_dla.study.rates import Rate, check_rates, rate_name, split_rates
from megatron_dla.study.variants import check_seeds

Seed = Annotated[int, NotBool, Field(ge=0, lt=2**31)]


@dataclass
class SyntheticTraining:
    """How a cell is trained: AdamW, linear warm-up over a tenth of the steps, cosine decay to a tenth of the rate."""

    steps: Number = 600
    """At most."""
    rows: Number = 32
    """Of a step."""
    stop_at: Share = 0.99
    """Accuracy at the training length that ends the training."""
    check_every: Number = 50
    """Steps from one look at the accuracy to the next."""
    check_rows: Number = 256
    test_rows: Number = 512
    """Of other rows, at each length, after the training."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1


def _small() -> ModelSection:
    return ModelSection(
        hidden_size=64, num_layers=2, backbone="gdn", num_heads=1, num_groups=1, key_dim=32, value_dim=64, capacity=8,
        tau=1.3, levels=8, ffn_hidden_size=64, attention_heads=1, attention_groups=1, rope_theta=10_000.0,
        vocab_multiple=1, init_std=0.08,
    )  # fmt: skip


@dataclass
class SyntheticSection:
    """Synthetic tasks of a study; none without `tasks`."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: keys of a task}; a name that is a kind needs no `kind`."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What differs from arm to arm: {name: {model.key, training.key or learning_rates: value}}."""
    reference: str = ""
    """The arm that the others are compared with; the first if not given."""
    model: ModelSection = field(default_factory=_small)
    training: SyntheticTraining = field(default_factory=SyntheticTraining)
    learning_rates: tuple[Rate, ...] = (3e-3,)
    seeds: tuple[Seed, ...] = (1,)
    """Of initialisation and rows; a seed gives all arms the same rows in the same order."""


@dataclass(frozen=True)
class CellConfig:
    """All that a cell depends on."""

    model: ModelSection
    task: TaskSection
    training: SyntheticTraining
    rate: float
    seed: int

    def plain(self) -> dict[str, Any]:
        """As a cell's JSON has it: sections of keys."""
        task = asdict(self.task) | {"eval_lengths": list(self.task.eval_lengths)}
        run = {"rate": self.rate, "seed": self.seed}
        return {"model": asdict(self.model), "task": task, "training": asdict(self.training), "run": run}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> CellConfig:
        kinds = {"model": ModelSection, "task": TaskSection, "training": SyntheticTraining}
        sections = {name: fill(kind, values[name], name) for name, kind in kinds.items()}
        return CellConfig(**sections, **values["run"])


@dataclass(frozen=True)
class SyntheticCell:
    """One run of a synthetic task."""

    task: str
    arm: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Its directory below that of the synthetic tasks."""
        return Path(self.task) / self.arm / rate_name(self.rate) / f"seed_{self.seed}"


class SyntheticStudy:
    """The synthetic tasks of a study, checked.

    Attributes:
        config: its section. root: the directory of its cells. tasks: {name: task}.
        arms: {name: (model, training)}, before their parameters are made equal. rates: {name: learning rates}.

    Raises:
        ConfigError: a wrong key or value, or an arm whose parameters cannot be made equal.
    """

    def __init__(self, config: SyntheticSection, root: Path) -> None:
        self.config, self.root = config, root / "synthetic"
        if not config.arms:
            raise ConfigError("synthetic.arms = {}: give at least one arm, {name: {model.key: value}}")
        if config.reference and config.reference not in config.arms:
            raise ConfigError(f"synthetic.reference = {config.reference!r}: not one of {', '.join(config.arms)}")
        check_seeds("synthetic.seeds", config.seeds)
        if not config.learning_rates:
            raise ConfigError("synthetic.learning_rates = []: give at least one")
        check_rates("synthetic.learning_rates", config.learning_rates)
        self.tasks = {name: _task(name, values) for name, values in config.tasks.items()}
        arms = {name: split_rates(f"synthetic.arms.{name}", keys) for name, keys in config.arms.items()}
        self.arms = {name: self._arm(name, changes) for name, (_, changes) in arms.items()}
        self.rates = {name: own or config.learning_rates for name, (own, _) in arms.items()}
        for task, arm in self.groups():
            self.cell_config(SyntheticCell(task, arm, self.rates[arm][0], config.seeds[0]))

    @property
    def reference(self) -> str:
        return self.config.reference or next(iter(self.arms))

    def _arm(self, name: str, values: dict[str, Any]) -> tuple[ModelSection, SyntheticTraining]:
        where = f"synthetic.arms.{name}"
        found: dict[str, dict[str, Any]] = {"model": {}, "training": {}}
        for key, value in values.items():
            section, _, rest = key.partition(".")
            if section not in found or not rest:
                raise ConfigError(f"{where}: unknown key {key!r}: write model.key, training.key or learning_rates")
            found[section][rest] = value
        model = fill(ModelSection, found["model"], f"{where}.model", self.config.model)
        try:
            check_model(model)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        return model, fill(SyntheticTraining, found["training"], f"{where}.training", self.config.training)

    def groups(self) -> list[tuple[str, str]]:
        """(task, arm): the cells of one are run by one task of an array."""
        return [(task, arm) for task in self.tasks for arm in self.arms]

    def first_cells(self, task: str, arm: str) -> list[SyntheticCell]:
        """Those that decide on the learning rate."""
        return [SyntheticCell(task, arm, rate, self.config.seeds[0]) for rate in self.rates[arm]]

    def later_cells(self, task: str, arm: str, rate: float) -> list[SyntheticCell]:
        """The other seeds, with the best learning rate."""
        return [SyntheticCell(task, arm, rate, seed) for seed in self.config.seeds[1:]]

    def count_cells(self, arm: str) -> int:
        """Of a task."""
        return len(self.rates[arm]) + len(self.config.seeds) - 1

    def cell_config(self, cell: SyntheticCell) -> CellConfig:
        """With as many parameters as the reference has, within 1 %."""
        task, (model, training) = self.tasks[cell.task], self.arms[cell.arm]
        where, vocab = f"synthetic.arms.{cell.arm}", vocabulary(task).size
        fix = "change its widths or its number of layers"
        model = equal_width(model, self.arms[self.reference][0], vocab, where, multiple=1, fix=fix)
        return CellConfig(model, task, training, cell.rate, cell.seed)


def _task(name: str, values: dict[str, Any]) -> TaskSection:
    where = f"synthetic.tasks.{name}"
    task = fill(TaskSection, values, where)
    task = task if task.kind else replace(task, kind=name)
    check_task(task, where)
    return task


def memory_size(m: ModelSection, length: int) -> int:
    """Numbers that all layers keep of a row of `length` tokens: states, or keys and values; convolutions aside."""
    total = 0
    for letter in layer_letters(m):
        if LETTERS[letter].softmax:
            seen = min(length, m.sliding_window) if LETTERS[letter].window else length
            total += 2 * m.attention_groups * attention_head_dim(m) * seen
        else:
            total += m.num_heads * m.key_dim * m.value_dim * recurrent_states(m, letter)
    return total
