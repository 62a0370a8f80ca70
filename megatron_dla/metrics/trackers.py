"""TensorBoard and Weights & Biases beside metrics.jsonl: nothing that goes wrong with them ends a run."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_dla.config import LoggingSection
from megatron_dla.errors import ConfigError
from megatron_dla.files import parse_json, write_json
from megatron_dla.masking import mask_text, mask_values
from megatron_dla.metrics.names import shown
from megatron_dla.metrics.sinks import JsonlSink

WANDB_RUN = "wandb_run.json"
FINISH_S = 30.0  # an upload that takes longer at the end is left to `wandb sync`


class Sink(Protocol):
    """Where metrics go; each call may raise anything."""

    name: str

    def write(self, metrics: dict[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class Sinks:
    """All sinks of rank 0 (other ranks have none), as a context manager that closes them.

    A sink that raises is a warning with the number of its failures so far, printed at 1, 2, 4, 8 ...; the run and the
    other sinks go on, and the next log step tries it again.

    Attributes:
        last_step: the last one that earlier starts have logged; -1 without any.
    """

    def __init__(self, sinks: Sequence[Sink] = (), warn: Callable[[str], None] = print, last_step: int = -1) -> None:
        self.sinks, self._warn, self.last_step = list(sinks), warn, last_step
        self.failures = dict.fromkeys((sink.name for sink in sinks), 0)

    def write(self, metrics: dict[str, Any]) -> None:
        """Of one log step."""
        self._each(lambda sink: sink.write(metrics))

    def rewind(self, step: int) -> None:
        """Steps after `step` will be repeated."""
        self._each(lambda sink: sink.rewind(step))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            try:
                call(sink)
            except Exception as error:
                self._failed(sink, error)

    def _failed(self, sink: Sink, error: Exception) -> None:
        self.failures[sink.name] = count = self.failures[sink.name] + 1
        if count & (count - 1) == 0:
            times = "once" if count == 1 else f"{count} times"
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"warning: writing metrics to {sink.name} failed ({times} so far), training goes on: {reason}")

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each(lambda sink: sink.close(kind is not None))


class TensorBoardSink:
    """Event files in `directory`. Steps from `first_step` on that earlier files have are void: they are repeated."""

    name = "TensorBoard"

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory, self._purge = directory, first_step
        self._writer: Any = None

    def write(self, metrics: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self.directory), purge_step=self._purge)
        try:
            for name, value in shown(metrics).items():
                self._writer.add_scalar(name, value, metrics["step"], walltime=metrics.get("time"))
            self._writer.flush()
        except Exception:
            writer, self._writer, self._purge = self._writer, None, metrics["step"]  # a new file the next time
            writer.close()
            raise

    def rewind(self, step: int) -> None:
        self.close()
        self._writer, self._purge = None, step + 1

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """One W&B run for all starts of a run: its id is kept in wandb_run.json.

    W&B cannot take steps back: those up to `last_step`, which earlier starts have logged, are not sent again.
    """

    name = "W&B"

    def __init__(
        self, run_dir: Path, section: LoggingSection, name: str, config: dict[str, Any], last_step: int
    ) -> None:
        import wandb

        kept, known = run_dir / WANDB_RUN, _read_run(run_dir / WANDB_RUN)
        self.last_step = max(last_step, known["last_step"]) if known else -1
        asked = section.wandb
        try:
            with _masked_arguments():
                self._run = wandb.init(
                    project=asked.project, entity=asked.entity or None, tags=list(asked.tags) or None, name=name,
                    mode=asked.mode, dir=str(run_dir), config=mask_values(config), resume="allow",
                    id=known["id"] if known else None, settings=wandb.Settings(console="off", silent=True),
                )  # fmt: skip
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(
                f"logging.wandb.mode = {asked.mode}: W&B refuses the run ({error}): set WANDB_API_KEY or run `wandb "
                "login`, or use logging.wandb.mode=offline"
            ) from error
        write_json(kept, {"id": self._run.id, "project": asked.project, "last_step": self.last_step})

    def write(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] > self.last_step:
            self._run.log(shown(metrics), step=metrics["step"], commit=True)
            self.last_step = metrics["step"]

    def rewind(self, step: int) -> None:
        """Nothing to take back."""

    def close(self, failed: bool = False) -> None:
        """Upload what is left, for FINISH_S at most."""
        thread = threading.Thread(target=self._run.finish, args=(int(failed),), daemon=True)
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            raise TimeoutError(f"the upload is not done after {FINISH_S:g} s; `wandb sync` finishes it")


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """W&B records the command line."""
    before = sys.argv
    sys.argv = [mask_text(word) for word in before]
    try:
        yield
    finally:
        sys.argv = before


def _read_run(path: Path) -> dict[str, Any] | None:
    """What an earlier start wrote; None where there is none, or it is damaged."""
    try:
        found = parse_json(path.read_bytes())
        return {"id": str(found["id"]), "last_step": int(found["last_step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_packages(section: LoggingSection) -> None:
    """ConfigError where a package that `logging` asks for is not installed."""
    if section.tensorboard:
        _check_package("tensorboard", "logging.tensorboard = true", "logging.tensorboard=false")
    if section.wandb.used:
        key = f"logging.wandb.project = {section.wandb.project!r}"
        _check_package("wandb", key, "logging.wandb.mode=disabled")


def _check_package(package: str, key: str, without: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{key} needs the package {package}: pip install {package}, or set {without}")


def open_sinks(
    run_dir: Path, section: LoggingSection, name: str, config: dict[str, Any], resumed_step: int | None,
    warn: Callable[[str], None],
) -> Sinks:  # fmt: skip
    """metrics.jsonl and what `logging` asks for.

    Args:
        config: the resolved one, of the whole run. resumed_step: None = the run begins at step 0.

    Raises:
        ConfigError: W&B has no key, or another one.
    """
    jsonl = JsonlSink(run_dir / "metrics.jsonl", resumed_step)
    sinks: list[Sink] = [jsonl]
    if section.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", 0 if resumed_step is None else resumed_step + 1))
    if section.wandb.used:
        try:
            sinks.append(WandbSink(run_dir, section, name, config, jsonl.last_step))
        except ConfigError:
            raise
        except Exception as error:  # the server is away, and a run that is resumed at night goes on
            warn(f"warning: this start logs nothing to W&B, training goes on: {' '.join(str(error).split())}")
    return Sinks(sinks, warn, jsonl.last_step)
