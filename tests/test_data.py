"""Rows, labels, splits and batches of the command line's data, with every error it can meet."""

import json
from pathlib import Path

import pytest
import torch

from dropbp_kernels.cli import corpus
from dropbp_kernels.cli.builtin import ByteTokenizer
from dropbp_kernels.cli.data import IGNORED, Data, Row, _num_shared, encode, load_data
from dropbp_kernels.cli.documents import Document, check_data_path, read_documents
from dropbp_kernels.cli.errors import UserError

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id
BEGIN = TOKENIZER.bos_token_id


class Plain(ByteTokenizer):
    """Without a first token of its own, and without one at the end."""

    bos_token_id = eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


class ChatTokenizer(ByteTokenizer):
    """Renders <role>content| for each message; optionally forgets earlier thoughts, as templates of thinkers do."""

    chat_template = "yes"

    def __init__(self, forgets=False, opens_thought=False, marks_question=False):
        self.forgets = forgets
        self.marks_question = marks_question
        self.opens_thought = opens_thought

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert tokenize is False
        if messages and messages[0]["role"] == "nobody":
            raise ValueError("unknown role nobody")
        parts = []
        for index, message in enumerate(messages):
            content = message["content"]
            if self.forgets and message["role"] == "assistant" and index < len(messages) - 1:
                content = content.replace("(thought)", "")
            if self.marks_question and message["role"] == "user" and index == len(messages) - 1:
                content += "?"
            parts.append(f"<{message['role']}>{content}|")
        prompt = "<assistant>" + ("(open)" if self.opens_thought else "")
        return "".join(parts) + (prompt if add_generation_prompt else "")


def write_lines(path, *entries):
    path.write_text(
        "\n".join(entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries)
    )
    return str(path)


def rows_of(kind, content, seq_len=32, tokenizer=TOKENIZER):
    return list(encode([Document(kind, content, "here")], tokenizer, seq_len))


def labelled(row):
    return TOKENIZER.decode([label for label in row.labels.tolist() if label != IGNORED])


def test_pair_has_its_loss_on_the_completion_and_the_end():
    (row,) = rows_of("pair", ("ab", "cd"))
    assert row.ids.tolist() == [BEGIN, 97, 98, 99, 100, END]
    assert row.labels.tolist() == [IGNORED, IGNORED, IGNORED, 99, 100, END]


def test_long_pair_keeps_the_begin_token_the_end_of_the_prompt_and_half_a_row_of_completion():
    (row,) = rows_of("pair", ("x" * 50 + "end:", "y" * 50), seq_len=16)
    assert len(row.ids) == 16
    assert row.ids[0] == BEGIN
    assert TOKENIZER.decode(row.ids.tolist()) == "xxxend:" + "y" * 8
    assert labelled(row) == "y" * 8


def test_a_pair_of_one_token_too_many_loses_one():
    (row,) = rows_of("pair", ("abcdef", "vwxyz"), seq_len=12)  # 13 with the first token and the end
    assert TOKENIZER.decode(row.ids.tolist()) == "bcdefvwxyz"
    assert row.ids.tolist()[::11] == [BEGIN, END]
    (row,) = rows_of("pair", ("abcdef", "vwxyz"), seq_len=10, tokenizer=Plain())
    assert TOKENIZER.decode(row.ids.tolist()) == "bcdefvwxyz"


def test_a_first_token_alone_is_nothing_to_train_on():
    assert rows_of("pair", ("", "a"), tokenizer=Plain()) == []
    assert len(rows_of("pair", ("", "ab"), tokenizer=Plain())) == 1


def test_a_token_that_would_reach_over_the_border_is_not_made():
    class Merging(Plain):
        def encode(self, text, add_special_tokens=True):
            return list(text.replace("bc", "*").encode())

    (row,) = rows_of("pair", ("ab", "cd"), tokenizer=Merging())
    assert row.ids.tolist() == [97, 98, 99, 100]
    assert labelled(row) == "cd"


def test_long_completion_may_use_what_a_short_prompt_leaves():
    (row,) = rows_of("pair", ("ab", "y" * 50), seq_len=16)
    assert labelled(row) == "y" * 13


def test_texts_are_packed_across_documents_and_a_rest_is_left_out():
    documents = [Document("text", text, "") for text in ("abc", "defgh", "i")]
    rows = list(encode(documents, TOKENIZER, 4))
    assert [row.ids.tolist() for row in rows] == [[BEGIN, 97, 98, 99], [END, BEGIN, 100, 101], [102, 103, 104, END]]
    assert all(torch.equal(row.ids, row.labels) for row in rows)


CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "(thought)two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (ChatTokenizer(), "(thought)two|four|"),
        (ChatTokenizer(forgets=True), "four|"),
        (ChatTokenizer(opens_thought=True), "(thought)two|four|".replace("(", "", 1)),
    ],
    ids=["plain", "forgets", "opens_thought"],
)
def test_chat_has_its_loss_on_what_the_assistant_says(tokenizer, expected):
    (row,) = rows_of("chat", CHAT, 200, tokenizer)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert TOKENIZER.decode(row.ids.tolist()) == whole
    assert labelled(row) == expected


def test_what_stands_behind_something_is_not_given_the_space_of_a_text():
    """SentencePiece puts one in front of all it is given; a model would learn to begin its answers with it."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pieces = ["<unk>", "\u2581", *"abdeginorstuwy:\n<>/"]
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
    by_pieces = tokenizers.Tokenizer(model)
    by_pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=by_pieces, unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in [("user", "say"), ("assistant", "no"), ("user", "b")]]
    turns.append({"role": "assistant", "content": "do no go"})
    (row,) = rows_of("chat", turns, 200, tokenizer)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert row.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)
    spoken = [label for label in row.labels.tolist() if label != IGNORED]
    assert "".join(tokenizer.convert_ids_to_tokens(spoken)) == "no\ndo\u2581no\u2581go\n"
    (row,) = rows_of("pair", ("say:", "no"), 200, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(row.ids.tolist())) == "\u2581say:no"


def test_chat_that_is_cut_before_the_assistant_speaks_is_left_out():
    assert rows_of("chat", CHAT, 8, ChatTokenizer()) == []


def test_turn_whose_start_cannot_be_told_has_no_loss():
    assert rows_of("chat", CHAT, 200, ChatTokenizer(marks_question=True)) == []


def test_turns_behind_the_last_of_the_assistant_stay_without_a_loss():
    (row,) = rows_of("chat", CHAT[:3], 200, ChatTokenizer())
    assert TOKENIZER.decode(row.ids.tolist()) == ChatTokenizer().apply_chat_template(CHAT[:3], tokenize=False)
    assert labelled(row) == "(thought)two|"


@pytest.mark.parametrize(("first", "second", "shared"), [("abc", "abd", 2), ("ab", "abc", 2), ("abc", "ab", 2)])
def test_shared_starts(first, second, shared):
    assert _num_shared(first, second) == shared


def test_chat_template_errors_name_the_line(monkeypatch):
    with pytest.raises(UserError, match=r"here: the chat template refuses .* unknown role nobody"):
        rows_of("chat", [{"role": "nobody", "content": ""}, CHAT[1]], 200, ChatTokenizer())

    def refuse(self, *args, **kwargs):
        raise pytest.importorskip("jinja2").TemplateError("turns must alternate")

    with pytest.raises(UserError, match="here: messages need a tokenizer with a chat template"):
        rows_of("chat", CHAT)
    monkeypatch.setattr(ChatTokenizer, "apply_chat_template", refuse)
    with pytest.raises(UserError, match=r"here: the chat template refuses .* turns must alternate"):
        rows_of("chat", CHAT, 200, ChatTokenizer())


def numbered(num, seed=0):
    return Data([Row(torch.tensor([i, i]), torch.tensor([i, i])) for i in range(num)], 7, seed, "numbers")


def test_split_is_fixed_and_without_overlap():
    data = numbered(100)
    validation = [int(row.ids[0]) for row in data.validation]
    assert validation == [0, 20, 40, 60, 80]
    assert sorted([int(row.ids[0]) for row in data.train] + validation) == list(range(100))
    assert [len(numbered(n).validation) for n in (2, 19, 20_000)] == [1, 1, 64]


def test_validation_rows_come_shortest_first_and_count_for_ids_and_the_fingerprint():
    def of(last_id=9, last_label=2):
        rows = [Row(torch.full((n,), 1), torch.full((n,), 2)) for n in [5] + [1] * 39]
        rows[20] = Row(torch.tensor([1, 1, last_id]), torch.tensor([2, 2, last_label]))
        return Data(rows, 0, 0, "")

    data = of()
    assert [len(row.ids) for row in data.validation] == [3, 5]
    assert data.max_id() == 9
    assert data.fingerprint() == of().fingerprint()
    assert len({each.fingerprint() for each in (data, of(last_id=8), of(last_label=3))}) == 3


def test_summary_counts_the_tokens_whose_logits_enter_the_loss():
    texts = [Row(torch.arange(6), torch.arange(6)) for _ in range(3)]
    pair = Row(torch.arange(4), torch.tensor([IGNORED, IGNORED, 2, 3]))
    facts = Data([*texts, pair], 0, 0, "").summary()
    assert (facts["train_rows"], facts["validation_rows"]) == (3, 1)
    assert (facts["train_tokens"], facts["train_tokens_with_loss"]) == (16, 5 + 5 + 2)


def stream(data, batch_size, num):
    return torch.cat([data.batch(step, batch_size)[0][:, 0] for step in range(-(-num // batch_size))])[:num].tolist()


def test_batches_of_any_size_cut_the_same_stream_and_an_epoch_holds_every_row_once():
    data = numbered(20)
    assert stream(data, 4, 38) == stream(data, 3, 38) == stream(numbered(20), 5, 38)
    first, second = stream(data, 1, 19), stream(data, 1, 38)[19:]
    assert sorted(first) == sorted(second) == [int(row.ids[0]) for row in data.train]
    assert first != second
    assert first != stream(numbered(20, seed=1), 1, 19)


def test_padding_has_no_labels():
    rows = [Row(torch.arange(n), torch.arange(n)) for n in (3, 17, 5)]
    data = Data(rows, 9, 0, "")
    ids, labels = data.batch(0, 2)
    assert ids.shape == labels.shape == (2, 32)  # the next multiple of 16
    for row_ids, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        length = row_labels.index(IGNORED)
        assert row_ids == [*range(length), *[9] * (32 - length)]
        assert row_labels == [*range(length), *[IGNORED] * (32 - length)]


def test_jsonl_of_all_forms_and_a_folder(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd", "id": 3}, "", {"text": "\u2028" + "x" * 40})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("y" * 64)
    (tmp_path / "c.md").write_text("not read")
    (tmp_path / "d.txt").mkdir()
    notes = []
    data = load_data(str(tmp_path), TOKENIZER, 16, 0, notes.append)
    text = "".join(TOKENIZER.decode(row.ids.tolist()) for row in (*data.validation, *data.train))
    assert "abcd" in text
    assert text.count("x") == 40
    assert text.count("y") == 50  # a rest is left out
    assert "not read" not in text
    assert len(notes) == 1
    assert "keys not used: id" in notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"txt": "a"}, r"line 2: expected the keys text, or prompt and completion, or messages, got txt"),
        ({"prompt": "a"}, r"line 2: expected the keys .* got prompt"),
        ({"text": "a", "prompt": "a", "completion": "b"}, r"line 2: expected the keys"),
        ({"text": 3}, "line 2: expected text to be a string, got int"),
        ("[1]", "line 2: expected an object"),
        ("{", "line 2: not JSON: Expecting property name enclosed in double quotes at character 2"),
        ('{"text": ' + 5000 * "1" + "}", "line 2: not JSON that Python reads"),
        (200_000 * "[", "line 2: not JSON that Python reads"),
        (r'{"text": "half of \ud83d"}', "line 2: expected text, got half of a character"),
        ({"messages": []}, "line 2: expected messages to be a list"),
        ({"messages": [{"role": "user"}]}, "line 2: expected messages to be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: expected a message with the role assistant"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(UserError, match=message):
        load_data(path, TOKENIZER, 16, 0)


def test_a_folder_is_read_in_the_order_of_names_whatever_the_system_says(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.txt" for name in "cab"]
    for path in paths:
        path.write_text(path.stem)
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(paths))
    assert [document.content for document in read_documents(str(tmp_path), 16)] == ["a", "b", "c"]


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    def fail(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=r"a\.txt: Permission denied"):
        load_data(str(tmp_path / "a.txt"), TOKENIZER, 16, 0)


def test_a_path_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x" * 40)
    assert len(load_data("~/a.txt", TOKENIZER, 16, 0).train) == 1


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        check_data_path(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"expected .txt or .jsonl files in this folder, found none"):
        check_data_path(str(tmp_path))
    with pytest.raises(UserError, match="expected builtin:docstrings or builtin:docs"):
        check_data_path("builtin:poems")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(UserError, match=r"expected a .txt file, or .jsonl with an object a line, got .csv"):
        check_data_path(str(tmp_path / "a.csv"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="the file is empty"):
        load_data(str(tmp_path / "empty.txt"), TOKENIZER, 16, 0)
    (tmp_path / "none").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "none" / name).write_text("")
    with pytest.raises(UserError, match="none: expected text, found none"):
        load_data(str(tmp_path / "none"), TOKENIZER, 16, 0)
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    with pytest.raises(UserError, match="expected UTF-8 text, byte 2 is not"):
        load_data(str(tmp_path / "latin.txt"), TOKENIZER, 16, 0)
    for order in ("utf-16-le", "utf-16-be"):
        (tmp_path / "wide.txt").write_text("\ufeffWindows calls this Unicode", encoding=order)
        with pytest.raises(UserError, match="expected UTF-8 text, got UTF-16"):
            load_data(str(tmp_path / "wide.txt"), TOKENIZER, 16, 0)
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(UserError, match=r"at least two rows \(sequences of 16 tokens\).* got 1 \(16 tokens\)"):
        load_data(str(tmp_path / "short.txt"), TOKENIZER, 16, 0)
    path = write_lines(tmp_path / "one.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match="expected at least two examples"):
        load_data(path, TOKENIZER, 16, 0)


def test_files_as_editors_leave_them(tmp_path):
    """A mark of UTF-8 at the start, line ends of Windows, empty lines, characters by escapes; an empty file too."""
    lines = [json.dumps({"prompt": "a \U0001f600", "completion": letter}) for letter in "bcd"]
    (tmp_path / "a.jsonl").write_bytes(("\r\n".join(["", *lines, " ", ""])).encode("utf-8-sig"))
    (tmp_path / "c.jsonl").write_text("\r".join(lines), newline="")  # as Macintosh had them
    (tmp_path / "b.txt").write_text("")
    notes = []
    data = load_data(str(tmp_path), TOKENIZER, 32, 0, notes.append)
    texts = sorted(TOKENIZER.decode(row.ids.tolist()) for row in (*data.train, *data.validation))
    assert texts == [f"a \U0001f600{letter}" for letter in "bbccdd"]
    assert notes == [f"{tmp_path / 'b.txt'}: left out, since it is empty"]


def test_examples_without_a_prompt_are_not_said_to_be_left_out(tmp_path):
    """A tokenizer without a first token of its own: then the first token of a row has a label."""
    path = write_lines(tmp_path / "a.jsonl", *[{"prompt": "", "completion": word} for word in ("one", "two", "three")])
    notes = []
    data = load_data(path, Plain(), 16, 0, notes.append)
    assert (len(data.train) + len(data.validation), notes) == (3, [])


def test_examples_without_a_token_to_train_on_are_counted(tmp_path):
    entries = [{"text": "x" * 48}, {"messages": CHAT[:2]}, {"messages": [{**CHAT[0], "content": "long" * 8}, CHAT[1]]}]
    notes = []
    path = write_lines(tmp_path / "a.jsonl", *entries)
    load_data(path, ChatTokenizer(), 24, 0, notes.append)
    assert notes == [f"{path}: 1 of 2 examples left out, without a token to train on"]
    notes.clear()
    path = write_lines(tmp_path / "b.jsonl", *entries[1:])
    with pytest.raises(UserError, match="expected at least two examples"):
        load_data(path, ChatTokenizer(), 24, 0, notes.append)
    assert not notes  # the error says as much


def test_rows_are_filled_up_with_the_token_for_it_else_with_the_end(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *[{"prompt": "a", "completion": "b"}] * 2)

    def filled_with(pad, end):
        tokenizer = Plain()
        tokenizer.pad_token_id, tokenizer.eos_token_id = pad, end
        return load_data(path, tokenizer, 16, 0).pad_id

    assert [filled_with(*ids) for ids in ((0, 5), (7, 5), (None, 5), (None, None))] == [0, 7, 5, 0]


def test_halves_of_the_library_share_no_module():
    pretraining, finetuning = (dict(corpus.modules(half)) for half in (corpus.PRETRAINING, corpus.FINETUNING))
    assert not pretraining.keys() & finetuning.keys()
    sizes = [sum(map(len, half.values())) for half in (pretraining, finetuning)]
    assert min(sizes) > 1_000_000
    assert corpus.fingerprint(corpus.PRETRAINING) != corpus.fingerprint(corpus.FINETUNING)


def test_docstring_pairs_are_source_without_docstring_and_the_docstring(monkeypatch):
    source = '''class A:
    """What A is."""

    def f(self):
        """Add.

        More.
        """
        return 1 + 1


def g(): "one line"
def h():
    return 2
'''
    monkeypatch.setattr(corpus, "modules", lambda half: (("a.py", source),))
    pairs = corpus.docstring_pairs.__wrapped__(1000)
    assert [completion for _, completion in pairs] == ['What A is."""', 'Add.\n\nMore.\n"""'.replace('\n"', '"')]
    assert pairs[1][0] == 'def f(self):\n    return 1 + 1\n"""'
    assert "What A is" not in pairs[0][0]


def test_docstring_pairs_fit():
    pairs = corpus.docstring_pairs(126)
    assert len(pairs) > 1000
    assert max(len((prompt + completion).encode()) for prompt, completion in pairs) <= 126
    data = load_data("builtin:docstrings", TOKENIZER, 128, 0)
    assert max(len(row.ids) for row in data.train) <= 128
    texts = {TOKENIZER.decode(row.ids.tolist()) for row in (*data.train, *data.validation)}
    assert texts == {prompt + completion for prompt, completion in pairs}  # whole, with a token before and one behind


def test_docs_are_english_text():
    data = load_data("builtin:docs", TOKENIZER, 256, 0)
    assert len(data.train) > 500
    assert "statement" in TOKENIZER.decode(torch.cat([row.ids for row in data.train]).tolist())
