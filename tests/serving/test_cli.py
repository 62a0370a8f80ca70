"""`dla generate --adapter`, `dla chat`, `dla convert adapter`: what is printed, saved and refused."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_dla import cli
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter, read_adapter, write_adapter
from megatron_dla.hf.directory import fingerprint
from megatron_dla.serving.chat import render_chat
from megatron_dla.serving.session import Session
from megatron_dla.serving.session_file import load_session
from tests.support.tiny_hf import CONFIGS, build_adapted, build_tokenizer, save_base

SIZES = re.compile(r"\[state (\d+) bytes after (\d+) tokens, KV cache (\d+) bytes of (\d+) tokens\]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base, other (another model), adapter (writes by token), messages (writes by message)."""
    root = tmp_path_factory.mktemp("models")
    save_base(root / "base")
    save_base(root / "other", seed=1)
    for name, config in (("adapter", DeltaMemConfig()), ("messages", CONFIGS["SSW"])):
        model = build_adapted(config)
        write_adapter(root / name, Adapter(config, model.tensors(), fingerprint(root / "base")))
    return root


@pytest.fixture
def dla(place, monkeypatch, tmp_path, capsys):
    """`dla(*arguments, lines=...)` -> exit code, standard output, standard error; {names} of `place` are filled in."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        names = {path.name: path for path in place.iterdir()}
        code = cli.main([text.format(**names) for text in arguments])
        return code, *capsys.readouterr()

    return run


def generate(prompt: str, *more: str) -> list[str]:
    return ["generate", "{base}", "--prompt", prompt, "--adapter", "{adapter}", "--max-new-tokens", "7", *more]


def chat(*more: str) -> list[str]:
    return ["chat", "{base}", "--adapter", "{adapter}", "--max-new-tokens", "5", *more]


# ---- generate


def test_text_is_that_of_the_adapted_model(dla):
    model, tokenizer = build_adapted(), build_tokenizer()
    session = Session(model, tokenizer)
    session.append(tokenizer("Hello")["input_ids"])
    want = tokenizer.decode(list(session.generate(7)))
    code, out, error = dla(*generate("Hello"))
    assert (code, out) == (0, f"Hello{want}\n")
    assert re.search(r"tokens/s, cache .* MB, state 768 bytes after \d+ tokens, KV cache", error)


def test_a_session_file_goes_on_where_the_last_call_stopped(dla, tmp_path):
    """Two calls with a file = one session fed twice."""
    session, tokenizer, texts = Session(build_adapted(), build_tokenizer()), build_tokenizer(), []
    for prompt in ("Hello", " and"):
        session.append(tokenizer(prompt)["input_ids"])
        texts.append(prompt + tokenizer.decode(list(session.generate(7))) + "\n")
    for text, prompt in zip(texts, ("Hello", " and"), strict=True):
        assert dla(*generate(prompt, "--session", "s.safetensors"))[:2] == (0, text)
    again = load_session(tmp_path / "s.safetensors", build_adapted())
    assert again.ids == session.ids and all(torch.equal(again.states[i].S, session.states[i].S) for i in range(3))
    assert dla(*generate(" and"))[1] != texts[1]


def test_sampling_follows_the_seed(dla):
    runs = [dla(*generate("Hello", "--temperature", "1", "--seed", seed))[1] for seed in ("1", "1", "2")]
    assert runs[0] == runs[1] != runs[2]


def test_adapters_that_write_by_message_generate_too(dla):
    code, out, _ = dla("generate", "{base}", "--prompt", "Hello", "--adapter", "{messages}", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("Hello") and len(out) > 6


# ---- chat


def test_chat_shows_a_constant_state_beside_a_growing_cache(dla):
    code, out, _ = dla(*chat(), lines="hello\nhow are you\n\n/state\n")
    assert code == 0
    sizes = [tuple(map(int, found)) for found in SIZES.findall(out)]
    assert len(sizes) == 3 and {size[0] for size in sizes} == {3 * 8 * 8 * 4}
    assert sizes[0][2] < sizes[1][2] == sizes[2][2] and all(size[2] == size[3] * 3 * 2 * 12 * 4 for size in sizes)
    assert len(re.findall(r"layer \d: norm \d", out)) == 3


def test_forget_keeps_the_state_and_reset_drops_it(dla):
    lines = ["hello", "/forget", "/state", "/reset", "/state", "hello", "/quit", "never reached"]
    code, out, _ = dla(*chat(), lines="\n".join(lines) + "\n")
    sizes = [tuple(map(int, found)) for found in SIZES.findall(out)]
    norms = [float(x) for x in re.findall(r"layer 0: norm (\S+)", out)]
    assert code == 0 and len(sizes) == 6  # hello, forget, state, reset, state, hello
    assert sizes[1][2:] == (0, 0) and sizes[1][1] > sizes[0][1] and norms[0] > 0
    assert sizes[3][1:] == (0, 0, 0) and norms[1] == 0
    answers = SIZES.split(out)
    assert sizes[5] == sizes[0] and answers[0] == answers[-6].lstrip("\n").rpartition("norm 0\n")[2]


def test_a_chat_goes_on_from_its_file(dla, tmp_path):
    together = dla(*chat(), lines="one\ntwo\n")[1]
    first = dla(*chat("--session", "s"), lines="one\n/save other\n")[1]
    second = dla(*chat("--session", "s"), lines="two\n")[1]
    assert first.startswith(together[: first.index("saved other")]) and together.endswith(second.lstrip("\n"))
    history = load_session(tmp_path / "s", build_adapted()).history
    assert [m["role"] for m in history] == ["user", "assistant"] * 2 and history[2]["content"] == "two"
    assert len(load_session(tmp_path / "other", build_adapted()).history) == 2


def test_chat_works_without_an_adapter_and_by_message(dla):
    code, out, _ = dla("chat", "{base}", "--max-new-tokens", "3", lines="hello\n")
    assert code == 0 and SIZES.search(out)[1] == "0"
    code, out, _ = dla("chat", "{base}", "--adapter", "{messages}", "--max-new-tokens", "3", lines="hello\n/forget\n")
    assert code == 0 and len(SIZES.findall(out)) == 2


def test_a_command_that_fails_is_reported_and_the_chat_continues(dla):
    code, out, _ = dla(*chat(), lines="/what\n/save\n/save no/such/place\nhello\n")
    assert code == 0 and re.search(r"/what: .*/reset, /forget", out) and "/save: give a file" in out
    assert "'no/such/place' cannot be written" in out and len(SIZES.findall(out)) == 1


def test_a_line_that_is_no_text_is_refused_and_the_chat_goes_on(dla):
    code, out, _ = dla(*chat(), lines=b"hi\xff\nhello\n".decode(errors="surrogateescape"))
    assert code == 0 and out.startswith("this line is not valid UTF-8 text") and len(SIZES.findall(out)) == 1


def test_an_interrupted_answer_stays_in_the_history(dla, monkeypatch, tmp_path):
    count = [0]
    append = Session.append

    def interrupt(self, *args):
        count[0] += 1
        if count[0] == 4:  # the third token of the first answer
            raise KeyboardInterrupt
        return append(self, *args)

    monkeypatch.setattr(Session, "append", interrupt)
    code, out, _ = dla(*chat("--session", "s"), lines="one\ntwo\n")
    assert code == 0 and "[stopped]" in out and len(SIZES.findall(out)) == 1
    history = load_session(tmp_path / "s", build_adapted()).history
    assert [m["role"] for m in history] == ["user", "assistant"] * 2


# ---- refused: one line, exit code 2, nothing written


@pytest.fixture
def broken(place, tmp_path_factory, monkeypatch):
    """`broken(config={}, ...)`: a copy of the base with changes; loading its weights fails the test."""

    def copy(**config) -> str:
        path = tmp_path_factory.mktemp("broken") / "hf"
        shutil.copytree(place / "base", path)
        values = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(values | config))
        return str(path)

    def weights(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("megatron_dla.serving.terminal.load_backbone", weights)
    return copy


def test_a_chat_without_template_ends_before_the_weights_are_read(dla, broken):
    path = broken()
    Path(path, "chat_template.jinja").unlink()
    code, out, error = dla("chat", path, "--adapter", "{adapter}", lines="hi\n")
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert all(part in error for part in (f"'{path}'", "chat_template.jinja", "dla generate"))
    Path(path, "chat_template.jinja").write_text("{% for m in messages %}{{ loop.last }}{% endfor %}x{{ messages }}")
    code, out, error = dla("chat", path, "--adapter", "{messages}", lines="hi\n")
    assert (code, out) == (2, "") and "differently when others" in error


@pytest.mark.parametrize("command", [["generate", "--prompt", "x", "--any-base"], ["chat", "--any-base"]])
def test_a_tokenizer_larger_than_the_embedding_is_refused(dla, broken, command):
    path = broken(vocab_size=258)
    code, out, error = dla(*command, path, "--adapter", "{adapter}", lines="hi\n")
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert all(part in error for part in (f"'{path}/config.json'", "vocab_size = 258", "259 tokens", "embedding"))


@pytest.mark.parametrize("arguments, message", [
    (["generate", "nowhere", "--prompt", "x", "--adapter", "{adapter}"], r"'nowhere' is not a Hugging Face model"),
    (["generate", "{base}", "--prompt", "x", "--adapter", "nowhere"], r"'nowhere' is not a δ-mem adapter"),
    (["generate", "{other}", "--prompt", "x", "--adapter", "{adapter}"], r"the adapter belongs to the base model"),
    (["generate", "{base}", "--prompt", "x", "--session", "new"], r"are for --adapter DIR"),
    (["chat", "{gpt}", "--adapter", "{adapter}"], r"gpt/config.json': model_type = gpt2 .*: use a model of .* Qwen3"),
    (["chat", "{base}", "--session", "no/place"], r"--session 'no/place'"),
    (["chat", "{base}", "--adapter", "{adapter}", "--temperature", "-1"], r"--temperature -1"),
    (generate("x", "--temperature", "1e-300"), r"--temperature 1e-300"),
    (generate("", "--session", "new"), r"--prompt is empty"),
    (generate("x", "--session", "{damaged}"), r"damaged' is missing, damaged or not a session"),
    (generate("x", "--session", "{session}", "--adapter", "{messages}"), r"session' belongs to another adapter"),
    (["convert", "adapter", "{messages}", "new", "--format", "upstream"], r"'streaming' has no published form"),
])  # fmt: skip
def test_mistakes_are_named(dla, place, tmp_path, arguments, message):
    (place / "gpt").mkdir(exist_ok=True)
    (place / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (place / "damaged").write_bytes(b"\x80\x04junk")
    if not (place / "session").exists():
        assert dla(*generate("x", "--session", str(place / "session")))[0] == 0
    code, out, error = dla(*arguments)
    assert code == 2 and out == "" and re.fullmatch(rf"dla {arguments[0]}: .*{message}.*\n", error)
    assert list(tmp_path.iterdir()) == []


def test_no_cuda_device_is_said(dla):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, _, error = dla(*generate("x", "--device", "cuda"))
    assert code == 2 and "no CUDA device" in error


def test_any_base_accepts_another_base_model(dla):
    code, out, _ = dla(
        "generate", "{other}", "--prompt", "Hello", "--adapter", "{adapter}", "--any-base", "--max-new-tokens", "3"
    )
    assert code == 0 and out.startswith("Hello")


# ---- convert


def test_adapters_change_format_and_precision(dla, place, tmp_path):
    assert dla("convert", "adapter", "{adapter}", "up", "--format", "upstream", "--dtype", "bf16")[:2] == (
        0,
        "wrote up\n",
    )
    assert dla("convert", "adapter", "up", "back")[0] == 0
    want, got = read_adapter(place / "adapter"), read_adapter(tmp_path / "back")
    assert got.config == want.config and got.base is None
    for layer, named in want.tensors.items():
        assert all(torch.equal(got.tensors[layer][name], x.bfloat16()) for name, x in named.items())
    assert json.loads((tmp_path / "up" / "delta_mem_config.json").read_text())["rank"] == 8
    assert dla("convert", "adapter", "up", "back")[0] == 2


def test_a_chat_message_is_a_message(dla, tmp_path):
    """Writes by message: the user's text, the template around it, and the answer have their numbers."""
    assert (
        dla("chat", "{base}", "--adapter", "{messages}", "--session", "s", "--max-new-tokens", "3", lines="hi\n")[0]
        == 0
    )
    session = load_session(tmp_path / "s", build_adapted(CONFIGS["SSW"]))
    ids, numbers = render_chat(build_tokenizer(), session.history[:1])
    assert session.ids[: len(ids)] == ids and session.message_ids[: len(ids)] == numbers
    assert set(session.message_ids[len(ids) :]) == {1}
