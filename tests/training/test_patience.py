"""A run ends early once its held-out loss does not fall any more, also across resumes."""

import json
import math

import pytest

from megatron_dla.cli import main
from megatron_dla.training.patience import Patience
from tests.support import tiny, train_workers


@pytest.mark.parametrize(
    ("losses", "over"),
    [([3, 2, 1, 0], False), ([3, 2, 2, 2], True), ([3, 4, 2, 3], False), ([3, math.nan, math.nan], True), ([3], False)],
)
def test_validations_since_the_lowest_are_counted_also_from_a_state(losses, over) -> None:
    whole = Patience(2)
    for at, loss in enumerate(losses):
        moved = Patience(2)
        moved.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        for one in (whole, moved):
            one.see(loss)
        assert moved.over == whole.over == (over and at == len(losses) - 1)
    none = Patience(0)
    for loss in losses:
        none.see(loss)
    assert not none.over and not none.state_dict()


def test_a_run_ends_early_with_a_checkpoint_and_goes_on_with_more_patience(ranks, tmp_path, capfd) -> None:
    training = {"steps": 12, "eval_every": 2, "eval_rows": 4, "patience": 2, "save_every": 3}
    data = tiny.build_data(tmp_path / "corpus")
    values = tiny.config_dict(data, tmp_path, training=training, optimizer={"lr": 1e-30})  # no weight moves

    def steps() -> tuple[list[int], set[str]]:
        metrics = ranks(2).run(train_workers.train, values)[0]
        return [m["step"] for m in metrics], {p.name for p in (tmp_path / "tiny/checkpoints").glob("step_*")}

    found, saved = steps()
    assert max(found) == 4 and "step_4" in saved
    assert json.loads((tmp_path / "tiny/done").read_text())["step"] == 4
    assert steps()[0] == found  # a finished run that is started again
    values["training"]["patience"] = 3
    found, saved = steps()
    assert max(found) == 6 and "step_6" in saved
    assert json.loads((tmp_path / "tiny/done").read_text())["step"] == 6


def test_without_validation_there_is_nothing_to_wait_for(tmp_path, capsys) -> None:
    options = ["training.patience=2", "training.eval_every=0", "--dry-run", "--world-size", "2"]
    assert main(["train", "configs/demo_cpu.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "training.patience = 2" in error and "training.eval_every" in error
