"""The generated stories: seeds, splits, what is told and what is asked."""

import json

import pytest

from megatron_dla.errors import UserError
from megatron_dla.evaluation.recall import (
    ALL_CATEGORIES,
    CATEGORIES,
    FILLERS,
    for_tokenizer,
    make_task,
    stories,
    write_documents,
    write_stories,
)
from megatron_dla.evaluation.stories import PEOPLE, RELATIONS, TOPICS
from megatron_dla.tasks.adapter.episodes import read_episodes
from tests.support.tiny_eval import build_words
from tests.support.tiny_hf import MISTRAL, build_tokenizer

TASKS = [
    make_task("profile"),
    make_task("facts", style="chat"),
    make_task("facts", people=3, relations=1, messages="each"),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_stories(task):
    made = list(stories(task, 40, seed=1))
    assert made == list(stories(task, 40, seed=1))
    others = [*stories(task, 40, seed=2), *stories(task, 40, seed=1, split="test")]
    assert not {s.context for s in made} & {s.context for s in others}
    for story in made:
        told = " ".join(story.context).replace(".", " ").replace("<", " ").split()
        for question in story.questions:
            assert question.word in question.choices and question.word in told
            assert question.answer.split()[-1].rstrip(".") == question.word
            if task.kind == "facts":
                start = question.lead if story.system else question.text.strip()
                assert f"{start} {question.word}." in " ".join(story.context)
    words = [q.word for s in made for q in s.questions]
    assert max(words.count(word) for word in words) < len(words) / 4  # no favourite answer


@pytest.mark.parametrize("facts", [1, 4, 20, 32])
def test_profile(facts):
    task = make_task("profile", words=32, facts=facts)
    assert dict(list(CATEGORIES.items())[:facts]) == dict(list(task.categories.items())[:4])
    for story in stories(task, 20, seed=0):
        (told,) = (text.split() for text in story.context)
        assert len(told) == 32 and sorted(q.text for q in story.questions) == sorted(f" ? {c}" for c in task.categories)
        for words in task.categories.values():
            assert sum(word in words.split() for word in told) == 1


def test_no_word_belongs_to_two_categories():
    words = [word for words in ALL_CATEGORIES.values() for word in words.split()]
    assert len(words) == 32 * 16 == len({*words} - {*FILLERS} - {*ALL_CATEGORIES})


def test_facts():
    task = TASKS[-1]
    train, test = ({name for s in stories(task, 60, seed=0, split=split) for name in " ".join(s.context)
                    .replace("'s", "").replace(".", "").split()} for split in ("train", "test"))  # fmt: skip
    assert train & set(PEOPLE["train"].split()) and not train & set(PEOPLE["test"].split())
    assert test & set(PEOPLE["test"].split()) and not test & set(PEOPLE["train"].split())
    assert all(len(s.context) == len(s.questions) == 3 for s in stories(task, 5, seed=0))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_written_stories_are_episodes(task, tmp_path):
    write_stories(tmp_path / "a.jsonl", task, 12, seed=3)
    tokenizer = build_words()
    episodes = read_episodes(tmp_path / "a.jsonl", tokenizer, write_length=99, read_length=200)
    for episode, story in zip(episodes, stories(task, 12, seed=3), strict=True):
        answers = tokenizer.decode(episode.read_ids[episode.answer]).split()
        assert [w for w in answers if any(w == q.word for q in story.questions)] == [q.word for q in story.questions]
        assert all(q.word in tokenizer.decode(episode.write_ids).split() for q in story.questions)


def last_said(story, question):
    """Answers as a reader of the whole text does: the word after the last place where the question stands."""
    return " ".join(story.context).rsplit(question.text.strip(), 1)[1].split(".")[0].strip()


def label_of_kind(story, question):
    """The label of the examples that are of the same kind as the word that is asked for."""
    kind = next(words.split() for _, _, words in RELATIONS.values() if question.text.strip(" :") in words.split())
    told = dict(pair.split(": ") for pair in " ".join(story.context).rstrip(".").split(". "))
    assert question.text.strip(" :") not in told
    (label,) = {label for word, label in told.items() if word in kind}
    return label


def most_often(story, question):
    words = " ".join(story.context).replace(".", "").split()
    return max(question.choices, key=words.count)


READERS = [
    (make_task("facts", style="text", filler=20), last_said),
    (make_task("facts", style="text", people=3, updates=2, filler=5), last_said),
    (make_task("facts", style="text", shifts=5), last_said),
    (make_task("labels", style="text", kinds=3), label_of_kind),
    (make_task("most", style="text"), most_often),
]


@pytest.mark.parametrize(("task", "reader"), READERS, ids=["filler", "updates", "shifts", "labels", "most"])
def test_a_reader_answers_all_and_a_guesser_some(task, reader):
    asked = [(story, question) for story in stories(task, 300, seed=4, split="test") for question in story.questions]
    assert all(
        reader(story, question) == question.word and question.word in question.choices for story, question in asked
    )
    for place in (0, -1):  # the place among the candidates says nothing
        chance = sum(1 / len(question.choices) for _, question in asked) / len(asked)
        guessed = sum(question.choices[place] == question.word for _, question in asked) / len(asked)
        assert abs(guessed - chance) < 4 * (chance / len(asked)) ** 0.5
    made = list(stories(task, 20, seed=4))
    assert made == list(stories(task, 20, seed=4)) != list(stories(task, 20, seed=5))


def test_updates_tell_other_words_before_and_shifts_change_the_topic():
    for story in stories(make_task("facts", style="text", updates=2, people=2), 20, seed=0):
        text = story.context[0]
        for question in story.questions:
            words = [part.split(".")[0] for part in text.split(f"{question.text.strip()} ")[1:]]
            assert len(words) == 3 and words[-1] == question.word not in words[:-1]
    topic = {sentence: name for name, sentences in TOPICS.items() for sentence in sentences}
    for story in stories(make_task("facts", style="text", shifts=4, messages="each"), 20, seed=0):
        blocks = [{topic[f"{s}."] for s in text.strip().rstrip(".").split(". ")} for text in story.context[4:]]
        assert [len(block) for block in blocks] == [1] * 4
        assert all(one != other for one, other in zip(blocks, blocks[1:], strict=False))


def test_filler_says_nothing_about_the_answers():
    words = {word.lower() for _, _, words in RELATIONS.values() for word in words.split()}
    words |= {name.lower() for names in PEOPLE.values() for name in names.split()}
    told = " ".join(s for sentences in TOPICS.values() for s in sentences).lower().replace(".", "").split()
    assert not words & set(told) and len({s for sentences in TOPICS.values() for s in sentences}) == 36


def test_documents(tmp_path):
    task = make_task("profile")
    write_documents(tmp_path / "a.jsonl", task, 200, seed=0, bare=0.25)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").open()]
    bare = [text for text in texts if text.startswith(" ?")]
    assert 30 < len(bare) < 70 and len({*texts}) == 200
    for text in texts:
        told, *asked = text.split(" ? ")
        for pair in asked:
            category, word = pair.split()
            assert word in CATEGORIES[category].split() and (not told or word in told.split())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("maze", {}, "'maze'.*profile, facts, labels, most"),
        ("profile", {"people": 2}, "'profile'.*'people'.*words"),
        ("profile", {"words": 3}, "words = 3.*4"),
        ("profile", {"facts": 33}, "facts = 33.*32"),
        ("profile", {"facts": 0}, "facts = 0.*1 to 32"),
        ("facts", {"relations": 5}, "relations = 5.*1 to 4"),
        ("facts", {"people": 0}, "people = 0.*1 to"),
        ("facts", {"messages": "two"}, "messages = 'two'.*one, each"),
        ("facts", {"style": "song"}, "style = 'song'.*chat, text, turn, chatml"),
        ("facts", {"filler": -1}, "filler = -1.*0 to"),
        ("labels", {"kinds": 1}, "kinds = 1.*2 to 4"),
        ("labels", {"examples": 12}, "examples = 12.*1 to 11"),
        ("most", {"colours": 1}, "colours = 1.*2 to 12"),
        ("most", {"repeats": 0}, "repeats = 0.*1 to"),
        ("most", {"style": "chat"}, "style = 'chat'.*text, turn"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_task(name, **settings)


def test_the_default_style_writes_the_turns_of_the_model_s_template():
    tokenizer, facts = build_tokenizer(), make_task("facts")
    assert for_tokenizer(facts, tokenizer) == facts  # ChatML, without the system message that the template adds
    tokenizer.chat_template = MISTRAL
    task = for_tokenizer(facts, tokenizer)
    assert (task.user, task.assistant) == ("[INST] {} [/INST]", "")
    (story,) = stories(task, 1, seed=0)
    (plain,) = stories(make_task("facts", style="text"), 1, seed=0)
    assert story.context == (f"[INST] {plain.context[0]} [/INST]",)
    assert story.ask(story.questions[0]) == plain.questions[0].text
    for style in ("chat", "text", "chatml"):
        other = make_task("facts", style=style)
        assert for_tokenizer(other, tokenizer) == other
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper | replace('{}', '') }}{% endfor %}"
    with pytest.raises(UserError, match="style=text"):
        for_tokenizer(facts, tokenizer)
