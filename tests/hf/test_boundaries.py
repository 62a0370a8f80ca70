"""`dla boundaries`: what the page and the picture say is what the model decides."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_dla.boundaries.collect import collect, tokenise
from megatron_dla.boundaries.page import choose, write_page
from megatron_dla.boundaries.picture import slot_history
from megatron_dla.cli import main
from megatron_dla.errors import UserError
from megatron_dla.hf.load import load_export_tokenizer
from megatron_dla.model.gpt import slot_mixers
from tests.support.chromium import needs_chromium, open_page

TEXT = "hello the quick brown fox </script><b>world</b> " * 6 + "caf\xe9 \U0001f600 12345\n"
MODELS = ["mamba2", "gdn_hybrid"]


@pytest.fixture(scope="module")
def recorded(exported):
    def record(name: str):
        one = exported(name)
        ids, pieces = tokenise(load_export_tokenizer(one.directory), TEXT, 120)
        return one, ids, collect(one.load(), ids, pieces)

    return record


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_training(recorded, name: str) -> None:
    one, ids, record = recorded(name)
    mixers = slot_mixers(one.megatron)
    for mixer in mixers:
        mixer.boundaries = None  # forget the forwards of other files in this process
    with torch.no_grad():
        one.megatron(torch.tensor([ids]), torch.arange(len(ids))[None], None)
    rates = torch.stack([mixer.take_boundary_rate() for mixer in mixers])
    found = torch.tensor([head.counts["boundaries"] for head in record.heads]).view_as(rates)
    torch.testing.assert_close(found / len(ids), rates)
    assert len(set(found.flatten().tolist())) > 1
    for head in record.heads:
        counts, final = head.counts, head.final
        assert len(head.start) == counts["boundaries"] == counts["merges"] + len(final)
        assert sum(final) == len(ids) and len(final) <= record.capacity and counts["newest"] <= counts["merges"]
        assert sum(m < len(ids) for m in head.merged) == counts["merges"] > 0
        # the picture's last column is what is left
        held = slot_history(head, len(ids))
        last, sizes = torch.tensor(held[:, -1]).unique_consecutive(return_counts=True)
        assert sizes.tolist() == final and (torch.tensor(held[0]) == 0).all() and len(last) == len(final)


def test_pieces_are_the_text(exported) -> None:
    tokenizer = load_export_tokenizer(exported("mamba2").directory)
    ids, pieces = tokenise(tokenizer, TEXT, 4096)
    assert "".join(pieces) == TEXT and len(pieces) == len(ids) > 60
    assert len(tokenise(tokenizer, TEXT, 17)[0]) == 17


def test_the_page_holds_the_record_and_nothing_of_the_text_runs(recorded, tmp_path: Path) -> None:
    _, _, record = recorded("mamba2")
    page = write_page(record, choose(record, None), tmp_path / "page.html", "a <model>", "b&c").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert "".join(data["tokens"]) == "".join(record.tokens) and "</script>" in "".join(record.tokens)
    assert [one["start"] for one in data["heads"]] == [one.start for one in record.heads]
    assert page.count("</script>") == 2 and "a &lt;model&gt;" in page and "b&amp;c" in page
    rows = re.findall(r'<tr data-head="\d+"><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td>', page)
    assert rows == [(str(o.layer), str(o.head), str(o.counts["boundaries"])) for o in record.heads]


@needs_chromium
def test_in_a_browser(exported, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "speech.txt").write_text(TEXT)
    out = tmp_path / "out.html"
    command = ["boundaries", str(exported("mamba2").directory), "--text", str(tmp_path / "speech.txt")]
    assert main([*command, "--tokens", "100", "--head", "1,2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".png"))]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    shown = data["heads"][data["shown"]]
    assert (shown["layer"], shown["head"]) == (1, 2)
    (tmp_path / "browser").mkdir()
    page = open_page(out, tmp_path / "browser")
    assert page.error is None and page.console == [] and page.requests == 0
    assert page.dom.count('class="open"') == shown["counts"]["boundaries"]
    assert f"Layer 1, head 2: {shown['counts']['boundaries']} boundaries" in page.dom
    assert page.dom.count("<i ") == 2 * data["capacity"]


@pytest.mark.parametrize(
    "options,words",
    [
        (["--head", "7,0"], "--head 7,0"),
        (["--tokens", "1"], "--tokens 1"),
        (["--text", "/nowhere/a.txt"], "'/nowhere/a.txt'"),
        (["--text", "{short}"], "--text: 1 tokens"),
        (["--out", "/nowhere/a.html"], "/nowhere"),
        (["--out", "."], "--out '.'"),
        (["--out", "/"], "--out '/'"),
        (["--out", ""], "--out '.'"),
        (["--out", "{place}/x.png"], "x.png'"),
        (["--out", "{place}/folder.html"], "folder.html' is not a file"),
        (["--out", "{place}/p.html"], "p.png' is not a file"),
    ],
)
def test_errors_are_one_line(exported, tmp_path: Path, capsys, options: list[str], words: str) -> None:
    (tmp_path / "speech.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("h")
    for name in ("folder.html", "p.png"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    given = [text.format(short=tmp_path / "short.txt", place=tmp_path) for text in options]
    out = [] if "--out" in given else ["--out", str(tmp_path / "page.html")]
    command = ["boundaries", str(exported("mamba2").directory), "--text", str(tmp_path / "speech.txt"), *out, *given]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("device", ["foo", "", "mps", "meta"])
def test_other_devices_are_refused(capsys, device: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["boundaries", "model", "--text", "a.txt", "--device", device])
    assert caught.value.code == 2 and f"--device: invalid choice: {device!r}" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_no_picture(exported, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(path: Path, *_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("megatron_dla.boundaries.page.write_text", full)
    command = ["boundaries", str(exported("mamba2").directory), "--text", str(tmp_path / "a.txt"), "--tokens", "9"]
    assert main([*command, "--out", str(tmp_path / "out/a.html")]) == 1
    assert "a.html" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_a_model_without_slots_is_named(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("mamba2").load()
    monkeypatch.setattr(model.config, "layer_letters", "GA")
    with pytest.raises(UserError, match="layer_letters = GA: no layer"):
        collect(model, [5, 6, 7], ["a", "b", "c"])
