import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.data.examples import Example
from expunge.data.sources import Source, read_documents, read_examples
from expunge.errors import DataError, ExpungeError

RECORDS = [
    {"id": '"a"sc1', "input": "The fox", "output": "ran,\naway", "task": "Task1", "split": "x"},
    {"id": '"a"qa0', "input": "Who?", "output": "Zoë \u2028 Ünal", "task": "Task1", "split": "x"},
    {"id": "7sc1", "input": "", "output": "plain", "task": "Task3", "split": "y"},
]


def as_parquet(records) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def as_lines(records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_columns(records, container) -> bytes:
    names = list(records[0])
    columns = {name: [record[name] for record in records] for name in names}
    if container is dict:
        columns = {name: {str(i): v for i, v in enumerate(c)} for name, c in columns.items()}
    return json.dumps(columns).encode()


def as_csv(records) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


FORMATS = {
    "parquet": ("set.parquet", as_parquet),
    "lines": ("set.jsonl", as_lines),
    "lines under .json": ("set.json", as_lines),
    "list": ("set.json", lambda records: json.dumps(records).encode()),
    "columns of lists": ("set.json", lambda records: as_columns(records, list)),
    "columns by label": ("set.json", lambda records: as_columns(records, dict)),
    "columns under .jsonl": ("set.jsonl", lambda records: as_columns(records, dict)),
    "csv": ("set.CSV", as_csv),
}


@pytest.fixture
def put(tmp_path):
    """Write a file and return a Source for it."""

    def write(name: str, content: bytes | str | list, **fields) -> Source:
        if isinstance(content, list):
            content = as_lines(content)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Source(path=str(path), **fields)

    return write


@pytest.mark.parametrize(("name", "write"), FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_examples(put, name, write):
    assert read_examples(put(name, write(RECORDS))) == [
        Example(record["id"], record["input"], record["output"], record["task"])
        for record in RECORDS
    ]


GOOD = {"id": "a", "input": "x", "output": "y"}
FAULTS = {
    "set.txt": ("hello", "ends in '.txt', which is no known format. Known: .csv, .json"),
    "empty.jsonl": ("", "holds no rows"),
    "empty.json": ("[]", "holds no rows"),
    "no_rows.json": ('{"id": [], "text": []}', "holds no rows"),
    "header.csv": ("id,input,output\n", "holds no rows"),
    "columns.jsonl": (
        [{"id": "a", "inptu": "x"}],
        "line 1 lacks the columns input + output or question + answer or prompt + completion or "
        "prompt + response or messages or text or document. "
        "Found: 'id', 'inptu'",
    ),
    "gap.jsonl": ([GOOD, {"id": "b", "input": "x"}], "line 2 lacks 'output', which the first row"),
    "null.jsonl": ([GOOD, {**GOOD, "output": None}], "line 2: 'output' must be text, but is null"),
    "number.json": (
        json.dumps([GOOD, {**GOOD, "input": 3}]),
        "row 2: 'input' must be text, but is int",
    ),
    "nan.json": ('[{"id": "a", "text": NaN}]', "row 1: 'text' must be text, but is float"),
    "id.jsonl": ([{**GOOD, "id": True}], "line 1: 'id' must be text, but is bool"),
    "no_id.jsonl": ([{**GOOD, "id": " "}], "line 1: 'id' is empty"),
    "no_answer.jsonl": ([{**GOOD, "output": " \n"}], "line 1: 'output' is empty"),
    "twice.jsonl": ([GOOD, GOOD], "holds the id 'a' twice; ids must be unique"),
    "half.jsonl": ('{"text": "\\ud800"}', "line 1: 'text' holds half a surrogate pair"),
    "broken.jsonl": ('{"text": "a"}\n\n{"text": "b"\n', "line 3: broken JSON (Expecting ','"),
    "broken.json": ('[\n{"text": "a"},\n{"text" "b"}]', "line 3: broken JSON (Expecting ':'"),
    "twins.jsonl": (
        '{"text": "a"}\n{"text": "a", "text": "b"}',
        "line 2: broken JSON (the key 'text' is given twice)",
    ),
    "deep.json": ("[" * 100_000, "line 1: broken JSON ("),
    "digits.json": ('[{"text": ' + "9" * 5000 + "}]", "line 1: broken JSON (Exceeds the limit"),
    "scalar.json": ("3", "expected named fields, found int"),
    "scalars.jsonl": ('{"text": "a"}\n"b"\n', "line 2: expected named fields, found str"),
    "uneven.json": (
        '{"id": {"0": "a", "1": "b"}, "text": {"0": "c"}}',
        "the columns 'id' (2 rows) and 'text' (1 rows) do not hold the same rows",
    ),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not valid UTF-8"),
    "ragged.csv": ("input,output\na,b\nc\n", "line 3: 1 values under 2 column names"),
    "quote.csv": ('input,output\n"a"b,c\n', "line 2: broken CSV ("),
    "twins.csv": ("text,text\na,b\n", "two columns called 'text'"),
    "torn.parquet": (as_parquet(RECORDS)[:-9], "is not readable as parquet: "),
    "text.parquet": ("hello", "is not readable as parquet: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_file_and_place(put, name):
    content, words = FAULTS[name]
    with pytest.raises(DataError) as raised:
        read_examples(put(name, content))
    message = str(raised.value)
    assert name in message
    assert words in message
    assert "\n" not in message


def test_invalid_text_inside_parquet_is_refused(put):
    column = pa.array([b"\xff\xfe"]).view(pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": column}), buffer)
    with pytest.raises(DataError, match="not readable as parquet"):
        read_examples(put("set.parquet", buffer.getvalue()))


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "text", "input", "output", "task"]), inner)
    ),
    max_leaves=12,
)


@st.composite
def damaged(draw) -> bytes:
    """A good file of some format with a few bytes changed, or the end torn off."""
    _, write = draw(st.sampled_from(list(FORMATS.values())))
    content = bytearray(write(RECORDS))
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(1, len(content)) | st.just(len(content)))])


CONTENT = st.binary(max_size=200) | JSON_LIKE.map(lambda v: json.dumps(v).encode()) | damaged()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=CONTENT, ending=st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_whatever_a_file_holds_it_is_read_or_refused_on_one_line(put, content, ending):
    source = put(f"fuzz.{ending}", content)
    for read in (read_examples, read_documents):
        try:
            assert isinstance(read(source), list)
        except ExpungeError as error:
            assert isinstance(error, DataError)
            assert "\n" not in str(error)
