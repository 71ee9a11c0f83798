import json
import sys
import types

import pytest
from pydantic import ValidationError

from expunge.data.examples import Document, Example
from expunge.data.sources import Source, locate, read_documents, read_examples, source_hash
from expunge.errors import DataError

RECORDS = [
    {"id": '"a"sc1', "input": "The fox", "output": "ran,\naway", "task": "Task1", "split": "x"},
    {"id": '"a"qa0', "input": "Who?", "output": "Zoë \u2028 Ünal", "task": "Task1", "split": "x"},
    {"id": "7sc1", "input": "", "output": "plain", "task": "Task3", "split": "y"},
]


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.fixture
def put(tmp_path):
    """Write records as JSON lines and return a Source for the file."""

    def write(name: str, records: list[dict], **fields) -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return Source(path=str(path), **fields)

    return write


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input": "Q", "output": "A", "junk": [1]}, Example("0", "Q", "A")),
        ({"question": "Q", "answer": "A", "paraphrased_answer": "B"}, Example("0", "Q", "A")),
        ({"prompt": "P", "completion": "C", "text": "PC"}, Example("0", "P", "C")),
        ({"prompt": "P", "response": "R"}, Example("0", "P", "R")),
        ({"messages": [USER, ASSISTANT], "text": "QA"}, Example("0", "Q", "A")),
        ({"messages": [USER, ASSISTANT]}, Example("0", "Q", "A")),  # no column of two rows
        ({"text": "All of it"}, Example("0", "", "All of it")),
        ({"id": 12, "document": "All of it"}, Example("12", "", "All of it")),
        ({"id": "q", "input": "Q", "output": "A", "task": None}, Example("q", "Q", "A")),
    ],
)
def test_other_column_names_are_understood(put, record, expected):
    assert read_examples(put("set.jsonl", [record])) == [expected]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([USER], "must be one message of the user and the assistant's answer. Found: user. Make"),
        ([USER, ASSISTANT] * 2, "Found: user, assistant, user, assistant. Make an item of each"),
        ([{"role": "system", "content": "S"}, USER, ASSISTANT], "Found: system, user, assistant"),
        ([], "Found: none"),
        ("Q", "'messages' must be a list, but is str"),
        (None, "'messages' must be a list, but is NoneType"),
        ([USER, {"role": "assistant", "content": " "}], "a message .* lacks its content, a text"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "lacks its content, a text"),
        ([USER, "A"], "lacks its role, a text"),
    ],
)
def test_a_conversation_of_another_form_is_refused_by_its_row(put, messages, error):
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": messages}]
    with pytest.raises(DataError, match=rf"set.jsonl, line 2: .*{error}"):
        read_examples(put("set.jsonl", rows))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file at .*gone.jsonl$"):
        read_examples(Source(path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        read_examples(Source(path=str(tmp_path)))
    with pytest.raises(DataError, match="For a Hub data set write hub:who/what"):
        read_examples(Source(path="who/what"))


def many(task_sizes: dict[str, int]) -> list[dict[str, str]]:
    """Documents of two items each, the tasks taking turns as far as they go."""
    names = [
        (task, f"{task}-{number}")
        for number in range(max(task_sizes.values()))
        for task, size in task_sizes.items()
        if number < size
    ]
    return [
        {"id": f"{name}{kind}", "input": kind, "output": name, "task": task}
        for task, name in names
        for kind in ("sc1", "qa0")
    ]


def documents_of(examples) -> list[str]:
    return list(dict.fromkeys(example.document for example in examples))


def test_documents_keeps_the_first_of_each_task_with_all_their_items(put):
    rows = many({"Task1": 3, "Task2": 3, "Task3": 1})
    examples = read_examples(put("set.jsonl", rows, documents={"Task2": 2, "Task1": 1}))
    assert documents_of(examples) == ["Task1-0", "Task2-0", "Task2-1"]
    assert len(examples) == 6


def test_ids_without_a_document_stand_for_one_each(put):
    rows = [{"id": f"qa{n}", "input": f"Q{n}?", "output": "A"} for n in range(3)]
    items = read_examples(put("set.jsonl", rows))
    assert [(item.document, item.kind) for item in items] == [(f"qa{n}", "qa") for n in range(3)]
    assert Example('"qa1"', "Q", "A").document == "qa1"
    assert Example("x_qa1", "Q", "A").document == "x_"  # control


def test_the_star_counts_documents_of_any_task(put):
    rows = many({"Task1": 2, "Task2": 2})
    examples = read_examples(put("set.jsonl", rows, documents={"*": 3}))
    assert documents_of(examples) == ["Task1-0", "Task2-0", "Task1-1"]


def test_first_puts_the_named_documents_before_the_cut(put):
    members = put("members.jsonl", [{"id": f"T-{n}", "document": "text"} for n in (9, 4, 2)])
    source = put("set.jsonl", many({"T": 10}), documents={"T": 4}, first=members.path)
    examples = read_examples(source)
    assert documents_of(examples) == ["T-0", "T-2", "T-4", "T-9"]  # taken first, in file order
    kept = read_documents(members, only=documents_of(examples))
    assert [document.id for document in kept] == ["T-9", "T-4", "T-2"]


def test_a_file_named_first_that_matches_nothing_is_refused(put):
    members = put("members.jsonl", [{"id": "other", "document": "text"}])
    with pytest.raises(DataError, match="ids do not match"):
        read_examples(put("set.jsonl", many({"T": 2}), documents={"T": 1}, first=members.path))


def test_more_documents_than_there_are_is_refused(put):
    rows = many({"Task1": 2, "Task2": 5})
    with pytest.raises(DataError, match="only 2 documents of Task1, but 3 are asked for"):
        read_examples(put("set.jsonl", rows, documents={"Task1": 3}))
    with pytest.raises(DataError, match="only 7 documents, but 8 are asked for"):
        read_examples(put("set.jsonl", rows, documents={"*": 8}))
    with pytest.raises(DataError, match=r"no task 'Tsak1'. Did you mean 'Task1'\?"):
        read_examples(put("set.jsonl", rows, documents={"Tsak1": 1}))


def test_documents_are_read_cut_and_restricted(put):
    rows = [{"id": str(number), "document": f"text {number}"} for number in range(5)]
    source = put("set.jsonl", rows)
    assert read_documents(source)[1] == Document("1", "text 1")
    some = source.model_copy(update={"documents": {"*": 2}})
    assert [document.id for document in read_documents(some)] == ["0", "1"]
    assert [document.id for document in read_documents(some, only={"1", "3", "4"})] == ["1", "3"]
    with pytest.raises(DataError, match="holds none of the 1 documents"):
        read_documents(source, only={"x"})


def test_split_keeps_the_rows_that_name_it(put):
    source = put("set.jsonl", RECORDS, split="y")
    assert [example.id for example in read_examples(source)] == ["7sc1"]
    with pytest.raises(DataError, match=r"no rows of the split 'z'. Its splits: 'x', 'y'"):
        read_examples(put("set.jsonl", RECORDS, split="z"))


@pytest.mark.parametrize(
    "fields",
    [
        {"subset": "a"},
        {"revision": "a"},
        {"documents": {}},
        {"documents": {"Task1": 0}},
        {"documents": {"*": 1, "Task1": 1}},
        {"first": "members.jsonl"},
        {"path": ""},
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields):
    with pytest.raises(ValidationError):
        Source(**{"path": "set.jsonl", **fields})


def test_data_paths_are_found_in_the_data_folder(put, tmp_path, monkeypatch):
    put("set.jsonl", RECORDS)
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    assert locate("data:set.jsonl") == tmp_path / "set.jsonl"
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"EXPUNGE_DATA names .*gone, which is no folder"):
        locate("data:set.jsonl")
    monkeypatch.delenv("EXPUNGE_DATA")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(DataError, match="EXPUNGE_DATA is not set and there is no folder"):
        locate("data:set.jsonl")


def test_the_hash_follows_content_and_choice_not_the_name(put):
    one = put("one.jsonl", many({"T": 3}))
    assert source_hash(one) == source_hash(put("two.jsonl", many({"T": 3})))
    chosen = one.model_copy(update={"documents": {"T": 1}})
    others = [put("three.jsonl", many({"T": 4})), chosen]
    others.append(chosen.model_copy(update={"first": others[0].path}))
    others += [Source(path="hub:a/b"), Source(path="hub:a/b", revision="1")]
    assert len({source_hash(source) for source in [one, *others]}) == 6


def test_a_hub_data_set_is_read_through_the_datasets_package(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        if path == "who/gone":
            raise FileNotFoundError("no such\ndata set")
        return [{"question": "Q", "answer": "A"}]

    class DatasetsError(Exception):
        pass

    fake = types.SimpleNamespace(
        load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=DatasetsError)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = Source(path="hub:who/what", subset="forget10", revision="abc")
    assert read_examples(source) == [Example("0", "Q", "A")]
    assert calls == [("who/what", {"name": "forget10", "split": "train", "revision": "abc"})]
    with pytest.raises(DataError, match="cannot load hub:who/gone from the Hub: no such data set"):
        read_examples(Source(path="hub:who/gone"))


def test_without_the_datasets_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'expunge\[hub\]'"):
        read_examples(Source(path="hub:who/what"))


def test_documents_may_name_their_task(put):
    given = put("d.jsonl", [{"id": "1", "text": "a", "task": "T"}, {"id": "2", "text": "b"}])
    assert [document.task for document in read_documents(given)] == ["T", ""]


def test_documents_of_each_task_are_counted_by_their_own_task(tmp_path):
    path = tmp_path / "members.jsonl"
    rows = [
        {"id": f"{task}{n}", "document": f"{task} {n}", "task": task}
        for task in "AB"
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_documents(
        Source.model_validate({"path": str(path), "documents": {"A": 2, "B": 1}})
    )
    assert sorted(document.task for document in found) == ["A", "A", "B"]


def test_a_path_that_names_no_place_is_refused_in_words(tmp_path):
    for path in ("~no-such-user/a.jsonl", "a" * 5000, "a\0b"):
        with pytest.raises(DataError, match=r"names no file|no data file"):
            locate(path)


def test_a_csv_field_may_be_a_long_document(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("id,document\nd1," + "word " * 40_000 + "\n")
    (found,) = read_documents(Source(path=str(path)))
    assert len(found.text.split()) == 40_000
