"""LoCoMo: the stemmer on Porter's own examples, the score, windows of turns, answers under every condition."""

import json

import numpy as np
import pytest

from megatron_dla.errors import DataError, UserError
from megatron_dla.evaluation import locomo
from megatron_dla.evaluation.locomo import answer_f1, locomo_table, read_locomo, stem, token_f1
from megatron_dla.evaluation.scoring import PLAIN, READ_ONLY, TokenRow, write_contexts
from megatron_dla.serving.decode import generate_batch, stop_tokens
from megatron_dla.serving.hf_model import select_states
from tests.support.tiny_eval import build_model, build_words

# examples of the 1980 paper, carried through all steps
STEMS = """caresses caress ponies poni ties ti cats cat feed feed agreed agre plastered plaster bled bled motoring motor
sing sing conflated conflat troubled troubl sized size hopping hop tanned tan falling fall hissing hiss fizzed fizz
failing fail filing file happy happi sky sky relational relat conditional condit rational ration valenci valenc
digitizer digit conformabli conform radicalli radic differentli differ vileli vile analogousli analog
vietnamization vietnam predication predic operator oper feudalism feudal decisiveness decis hopefulness hope
callousness callous formaliti formal sensitiviti sensit sensibiliti sensibl triplicate triplic formative form
formalize formal electriciti electr electrical electr hopeful hope goodness good revival reviv allowance allow
inference infer airliner airlin gyroscopic gyroscop adjustable adjust defensible defens irritant irrit
replacement replac adjustment adjust dependent depend adoption adopt homologou homolog communism commun
activate activ angulariti angular homologous homolog effective effect bowdlerize bowdler probate probat rate rate
cease ceas controll control roll roll is is as as us us by by"""


def test_stems():
    words = STEMS.split()
    assert {w: stem(w) for w in words[::2]} == dict(zip(words[::2], words[1::2], strict=True)) and len(words) > 140


def test_scores():
    assert token_f1("The adoption agencies!", "adoption agency") == 1.0
    assert token_f1("agency", "adoption agencies") == pytest.approx(2 / 3)
    assert token_f1("red red", "red") == pytest.approx(2 / 3) and token_f1("", "red") == 0.0
    assert answer_f1("cats, running", "run, cat, tea", 1) == pytest.approx(2 / 3)  # best match of each part
    assert answer_f1("cats", "cat; because", 3) == 1.0 and answer_f1("cats", "cat; because", 4) < 1.0


def sample(name: str, questions: list[dict]) -> dict:
    turns = [{"speaker": "Anna", "dia_id": f"D{s}:{t}", "text": f"word{s}{t} tea"} for s in (1, 2) for t in (1, 2, 3)]
    turns[4]["blip_caption"] = "a cat"
    conversation = {"speaker_a": "Anna", "session_1": turns[:3], "session_1_date_time": "1 May",
                    "session_2": turns[3:], "session_2_date_time": "2 May", "session_3_date_time": "later"}  # fmt: skip
    return {"sample_id": name, "conversation": conversation, "qa": questions}


def question(category: int, *evidence: str) -> dict:
    return {"question": "Who?", "answer": 7, "category": category, "evidence": list(evidence)}


@pytest.fixture
def file(tmp_path):
    asked = [question(4, "D1:2"), question(2, "D2:1; D2:2"), question(5, "D1:1"), question(1, "D1:1", "D2:3")]
    path = tmp_path / "locomo.json"
    path.write_text(json.dumps([sample("a", asked), sample("b", [question(3)])]))
    return path


class Letters:
    """One token a character."""

    def encode(self, text):
        return list(text)


def test_windows(file):
    each = len("Anna: word11 tea\n")
    options = {"questions": 0, "seed": 0}
    last = read_locomo(file, Letters(), tokens=2 * each + 20, window="last", **options)
    assert [item.category for item in last] == [4, 2, 1, 3] and last[0].answer == "7"
    assert last[0].window == ("(2 May) Anna: word22 tea [shares a cat]", "Anna: word23 tea")
    assert not last[0].covered
    around = read_locomo(file, Letters(), tokens=2 * each, window="evidence", **options)
    assert around[0].window == ("(1 May) Anna: word11 tea", "Anna: word12 tea") and around[0].covered
    assert [item.covered for item in around] == [True, False, False, False]
    three = read_locomo(file, Letters(), tokens=3 * each, window="evidence", **options)
    assert three[0].window[-1] == "Anna: word13 tea" and len(three[0].window) == 3
    wide = read_locomo(file, Letters(), tokens=9 * each, window="evidence", **options)
    assert wide[1].covered and wide[2].covered and len(wide[2].window) == 6
    assert [t for t in wide[2].window if t.startswith("(")] == [wide[2].window[0], wide[2].window[3]]
    few = read_locomo(file, Letters(), tokens=9, window="last", questions=2, seed=0)
    assert len(few) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '[{"qa": []}]'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_locomo(tmp_path / "x.json", Letters(), tokens=9, window="last", questions=0, seed=0)


def test_table(file, monkeypatch):
    """Answers of every condition against one question at a time; the score is replaced by the answer's length, so that
    a random model's answers differ in it."""
    monkeypatch.setattr(locomo, "NEW_TOKENS", 5)
    monkeypatch.setattr(locomo, "answer_f1", lambda text, answer, category: len(text) + category / 10)
    model, tokenizer = build_model(), build_words()
    items = read_locomo(file, tokenizer, tokens=30, window="evidence", questions=0, seed=0)
    table = locomo_table(model, tokenizer, items, batch=3)
    assert list(table.values) == ["full", "full_adapter", "kept", "zeroed", "shuffled", "scale_0"]
    assert table.groups.tolist() == [0, 0, 0, 1] and table.settings["evidence_in_window"] == 0.5
    told, prompts, full = locomo._encode(tokenizer, items, False)
    states, stop = write_contexts(model, told, 1), stop_tokens(model, tokenizer)
    order = locomo._from_others(items, 0)
    assert all(items[i].conversation != items[j].conversation for i, j in enumerate(order))
    for i, item in enumerate(items):
        runs = {
            "full": (full[i].ids, None, PLAIN), "full_adapter": (full[i].ids, None, None),
            "kept": (prompts[i], select_states(states, [i]), READ_ONLY), "zeroed": (prompts[i], None, READ_ONLY),
            "shuffled": (prompts[i], select_states(states, [order[i]]), READ_ONLY),
            "scale_0": (prompts[i], None, PLAIN),
        }  # fmt: skip
        for name, (ids, mine, control) in runs.items():
            (tokens,), _ = generate_batch(model, [ids], 5, stop=stop, states=mine, control=control)
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert table.values[name]["f1"][i] == len(text) + item.category / 10, name
    assert len({v["f1"].tobytes() for v in table.values.values()}) >= 4
    assert table.settings["f1_by_category"]["multi_hop"]["kept"] == table.values["kept"]["f1"][2]
    with pytest.raises(UserError, match="--questions 1"):
        locomo_table(model, tokenizer, items[:1])


def test_prompts(file):
    tokenizer = build_words()
    items = read_locomo(file, tokenizer, tokens=99, window="last", questions=0, seed=0)
    told, prompts, full = locomo._encode(tokenizer, items, True)
    assert max(told[0].messages) == 5 and len(full[0].ids) == len(full[0].messages)  # one message a turn
    one, _, _ = locomo._encode(tokenizer, items, False)
    assert set(one[0].messages) == {-1} and isinstance(one[0], TokenRow)
    assert len(prompts[1]) > len(prompts[0])  # a temporal question asks for a date
    assert np.isfinite(locomo_table(build_model(), tokenizer, items, controls=False).values["kept"]["f1"]).all()
