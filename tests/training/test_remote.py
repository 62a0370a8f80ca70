"""A run on shards at a URL."""

from pathlib import Path

import pytest

from tests.support import tiny, train_workers
from tests.support.http_faults import FaultyServer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


def test_training_from_a_url_equals_training_from_the_disk_and_resumes_with_an_empty_cache(ranks, data, tmp_path):
    training = {"steps": 4, "eval_every": 4, "eval_rows": 2}
    values = tiny.config_dict(data, tmp_path / "disk", training=training)
    disk = ranks(1).run(train_workers.train, values)[0]
    server = FaultyServer(data)
    try:
        values["run"]["dir"] = str(tmp_path / "url")
        values["data"] |= {"dir": server.url, "cache_gb": 0.01}
        for steps in (2, 4):
            values["training"]["steps"] = steps
            values["data"]["cache_dir"] = str(tmp_path / f"cache{steps}")
            server.faults["train/train-000000.tar"].append("drop")
            metrics = ranks(1).run(train_workers.train, values)[0]
    finally:
        server.close()
    same = ("step", "loss", "grad_norm", "data_crc32", "epoch")
    assert [[m.get(key) for key in same] for m in metrics] == [[m.get(key) for key in same] for m in disk]
    assert disk[-1]["data_crc32"] and metrics[-1]["val_loss"] == disk[-1]["val_loss"]
    assert metrics[-1]["shards_fetched"] > 0
