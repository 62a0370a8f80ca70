"""`dla generate` on exported models: options, batches, stop strings, streams, and what is refused."""

import io
import json
import sys

import pytest
import torch

from megatron_dla import cli
from megatron_dla.errors import UserError
from megatron_dla.serving.generate import generate, read_prompts
from megatron_dla.serving.sampling import Sampling, cpu_threads
from megatron_dla.serving.stream import TextStream


@pytest.fixture
def dla(exported, capsys, monkeypatch):
    """`dla(*options, stdin=...)` -> exit code, standard output, standard error of `dla generate`."""

    def run(*options: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = cli.main(["generate", str(exported("gdn").directory), *options])
        return code, *capsys.readouterr()

    return run


def texts(directory, prompts, **options) -> list[str]:
    batch = options.pop("batch_size", 8)
    return [x.text for done, _ in generate(directory, prompts, Sampling(**options), batch_size=batch) for x in done]


def test_a_seed_decides_what_is_sampled(exported):
    directory = exported("mamba2").directory
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    one, two, three = (texts(directory, ["hello"], seed=seed, **options) for seed in (1, 1, 2))
    assert one == two != three


def test_one_prompt_is_streamed_and_its_rates_are_printed(dla):
    code, out, error = dla("--prompt", "hello", "--max-new-tokens", "5")
    assert code == 0 and out.startswith("hello")
    assert error.startswith("5 tokens, prefill ") and "decode " in error and error.endswith(" MB\n")


@pytest.mark.parametrize("backbone", ["mamba2", "gdn"])
def test_a_batch_gives_each_prompt_its_own_continuation(exported, backbone):
    directory, prompts = exported(backbone).directory, ["hello", "a longer prompt than that", "hello", "ten"]
    alone = [texts(directory, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert texts(directory, prompts, max_new_tokens=8, batch_size=3) == alone


def test_prompts_come_from_a_file_or_standard_input(dla, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hello"}\n\n{"prompt": "two\\nlines"}\n')
    code, out, _ = dla("--prompts", str(path), "--max-new-tokens", "3", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [x["prompt"] for x in found] == ["hello", "two\nlines"]
    assert {x["finish_reason"] for x in found} <= {"stop", "length"} and all(x["tokens"] <= 3 for x in found)
    code, out, _ = dla("--prompts", "-", "--max-new-tokens", "3", stdin="hello\n\nsecond\n")
    assert code == 0 and out.startswith("hello" + found[0]["text"] + "\nsecond")


def test_generation_ends_before_a_stop_string(dla):
    (whole,) = (
        json.loads(line) for line in dla("--prompt", "hello", "--json", "--max-new-tokens", "20")[1].splitlines()
    )
    assert whole["finish_reason"] == "length"
    stop = whole["text"][4:7]
    _, out, _ = dla("--prompt", "hello", "--json", "--max-new-tokens", "20", "--stop", stop, "--stop", "never\0")
    cut = json.loads(out)
    assert cut["finish_reason"] == "stop" and cut["tokens"] < whole["tokens"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert dla("--prompt", "hello", "--max-new-tokens", "20", "--stop", stop)[1] == "hello" + cut["text"] + "\n"


class Letters:
    """A tokenizer of which a token is a byte."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def test_a_stream_holds_back_what_may_become_a_stop_string_or_a_character():
    out = io.StringIO()
    stream = TextStream(Letters(), out, ["abc", "xy"])
    printed = []
    for byte in "1ab2é".encode():
        stream.put(byte)
        printed.append(out.getvalue())
    assert printed == ["1", "1", "1", "1ab2", "1ab2", "1ab2é"]
    for byte in b"abc3":
        stream.put(byte)
    stream.end()
    assert stream.stopped and stream.text == out.getvalue() == "1ab2é"
    ends = TextStream(Letters(), io.StringIO(), ["abc"])
    for byte in b"1ab":
        ends.put(byte)
    ends.end()
    assert (ends.text, ends.stopped) == ("1ab", False)


def test_a_repetition_penalty_and_top_k_change_the_text(exported):
    directory = exported("mamba2").directory
    greedy = texts(directory, ["hello"], max_new_tokens=12)
    assert texts(directory, ["hello"], max_new_tokens=12, temperature=2.0, top_k=1) == greedy
    assert texts(directory, ["hello"], max_new_tokens=12, repetition_penalty=1e-6) != greedy  # repeats what it saw


def test_a_small_model_decodes_with_one_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    for threads in (None, 3):
        with cpu_threads(torch.nn.Linear(2, 2), threads):
            pass
    assert seen == [1, 4, 3, 4]
    with cpu_threads(torch.nn.Linear(20_000, 5_001, device="meta")):
        pass
    assert seen[4:] == [4, 4]
    with pytest.raises(UserError, match="--threads 0"), cpu_threads(torch.nn.Linear(2, 2), 0):
        pass


@pytest.mark.parametrize("options, named", [
    (["--prompt", ""], "--prompt"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0"),
    (["--prompt", "a", "--temperature", "nan"], "--temperature nan"),
    (["--prompt", "a", "--temperature", "1e-300"], "--temperature 1e-300"),
    (["--prompt", "a", "--temperature", "1e300"], "--temperature 1e+300"),
    (["--prompt", "a", "--top-p", "0"], "--top-p 0.0"),
    (["--prompt", "a", "--top-k", "-1"], "--top-k -1"),
    (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
    (["--prompt", "a", "--stop", ""], "--stop"),
    (["--prompt", "a", "--seed", "-1"], "--seed -1"),
    (["--prompt", "a", "--threads", "0"], "--threads 0"),
    (["--prompts", "nowhere"], "--prompts nowhere"),
    (["--prompts", "-"], "--prompts -"),
    (["--prompts", "-", "--batch-size", "0"], "--batch-size 0"),
    (["--prompts", "-", "--adapter", "x"], "--prompts"),
])  # fmt: skip
def test_a_bad_option_is_named(dla, options, named):
    code, out, error = dla(*options, stdin="a\n" if "--batch-size" in options else "")
    assert code == 2 and out == "" and named in error and error.count("\n") == 1


def test_skipped_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("one\n\n  \ntwo\n")
    assert read_prompts(str(path)) == ["one", "two"] and "2 blank" in capsys.readouterr().err
    path.write_text("one\ntwo\n")
    assert read_prompts(str(path)) == ["one", "two"] and not capsys.readouterr().err


def test_a_line_that_is_no_prompt_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    for line in ("not json", "{}", '{"prompt": 5}', '["prompt"]'):
        path.write_text('{"prompt": "good"}\n' + line + "\n")
        with pytest.raises(UserError, match=r"p\.jsonl:2"):
            read_prompts(str(path))


def test_no_cuda_device_is_said(exported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        next(generate(exported("mamba2").directory, ["hello"], device="cuda"))


def test_a_model_of_another_kind_is_refused_before_it_is_loaded(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "gpt2" in error and error.count("\n") == 1
