"""Session files: what is saved comes back bit for bit, and damaged or foreign files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.errors import CheckpointError
from megatron_dla.serving.hf_model import attach
from megatron_dla.serving.session import Session
from megatron_dla.serving.session_file import load_session, save_session
from tests.support.sessions import CHAT, NUMBERS, ROW, fed, same_states
from tests.support.tiny_hf import CONFIGS, build_adapted, build_base, build_tokenizer


@pytest.mark.parametrize("cache", [True, False])
def test_a_saved_session_continues_bit_for_bit(model, tmp_path, cache):
    session = fed(model, ROW[:12], NUMBERS[:12], 5)
    session.forget_context()
    session.append(ROW, NUMBERS)
    session.history = CHAT
    save_session(session, tmp_path / "s", cache=cache)
    with safe_open(tmp_path / "s", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        assert file.get_tensor("state.S").dtype == torch.float32
    assert any(name.startswith("cache.") for name in names) == cache
    assert metadata["tokens_seen"] == "42" and json.loads(metadata["config"]) == json.loads(
        json.dumps(model.config.to_dict())
    )
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600  # a private conversation
    again = load_session(tmp_path / "s", model, build_tokenizer())
    assert same_states(again.states, session.states) and same_states(again.origin, session.origin)
    assert (again.ids, again.message_ids, again.tokens_seen) == (session.ids, session.message_ids, 42)
    assert again.history == CHAT and again.nbytes == session.nbytes
    got, want = again.append([5, 6], 3), session.append([5, 6], 3)
    assert torch.equal(got, want) if cache else torch.allclose(got, want, rtol=0, atol=3e-5)
    assert list(again.generate(4, stop=[])) == list(session.generate(4, stop=[]))


def test_a_new_session_and_a_model_without_adapter_are_saved_too(tmp_path):
    model = build_adapted(DeltaMemConfig(layers_to_transform=()))
    save_session(Session(model), tmp_path / "s")
    again = load_session(tmp_path / "s", model)
    assert again.tokens_seen == 0 and torch.equal(again.append(ROW), Session(model).append(ROW))


def test_sessions_of_others_are_refused(tsw, tmp_path):
    save_session(fed(tsw), tmp_path / "s")
    for other in (build_adapted(DeltaMemConfig(alpha=8.0)), build_adapted(CONFIGS["MSW"])):
        with pytest.raises(CheckpointError, match="another adapter"):
            load_session(tmp_path / "s", other)
    moved = build_adapted()
    with torch.no_grad():
        moved.memories["2"].beta_bias[3] += 1e-3
    with pytest.raises(CheckpointError, match="another adapter"):
        load_session(tmp_path / "s", moved)
    with pytest.raises(CheckpointError, match="belongs to the base model"):
        load_session(tmp_path / "s", build_adapted(base=build_base(seed=1)))


@pytest.mark.parametrize("name", ["TSW", "SSW"])
def test_every_byte_that_is_read_back_is_checked(tmp_path, name):
    """Flipped bytes at both ends and in the middle of every tensor, and every metadata field edited, added, removed."""
    path, model = tmp_path / "s", build_adapted(CONFIGS[name])
    session = fed(model)
    session.history = CHAT
    save_session(session, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    raw, tensors = path.read_bytes(), {key: x.clone() for key, x in load_file(path).items()}  # the file is mapped
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    places = [size + at for begin, end in
              (entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
              for at in (begin, (begin + end) // 2, end - 1)]  # fmt: skip
    assert len(places) == 3 * len(tensors) >= 30 and max(places) == len(raw) - 1
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum"):
            load_session(path, model)
    save_file(tensors, path, metadata=metadata)
    assert load_session(path, model).history == CHAT
    for key, value in metadata.items():
        for edited in ({key: value + " "}, {key: "7"}, {key + "_2": value}):
            save_file(tensors, path, metadata=metadata | edited)
            with pytest.raises(CheckpointError, match=r"checksum|of this version"):
                load_session(path, model)
        save_file(tensors, path, metadata={k: v for k, v in metadata.items() if k != key})
        with pytest.raises(CheckpointError, match=str(path)):
            load_session(path, model)


def test_a_bf16_cache_is_saved_checked_and_continued(tmp_path):
    base = build_base(dtype=torch.bfloat16)
    model = attach(base, DeltaMemConfig(), seed=1)
    session = fed(model)
    save_session(session, tmp_path / "s")
    again = load_session(tmp_path / "s", model)
    assert again.cache.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(again.append([5, 6]), session.append([5, 6]))


@pytest.mark.parametrize("damage", ["cut", "pickle", "other", "state", "ids", "cache", "gone", "missing"])
def test_damaged_sessions_are_refused(tsw, tmp_path, damage):
    path = tmp_path / "s"
    save_session(fed(tsw), path)
    tensors = {name: x.clone() for name, x in load_file(path).items()}  # the file is mapped
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "pickle":
        torch.save(tensors, path)
    elif damage == "other":
        save_file(tensors, path)
    elif damage == "missing":
        path.unlink()
    else:
        if damage == "state":
            tensors["state.S"][1, 0, 2, 3] += 1e-4
        elif damage == "ids":
            tensors["ids"] = tensors["ids"][:-1]
        elif damage == "cache":
            tensors["cache.1.keys"] = tensors["cache.1.keys"][:, :, 1:].contiguous()
        else:
            del tensors["origin.S"]
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=str(path)):
        load_session(path, tsw)
