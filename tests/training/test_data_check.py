"""`data check`: what it finds and what it does not, its figures, its page, and its exit codes."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster.harmony import Codec
from training.__main__ import main
from training.data.check import Options, Report, check
from training.data.figures import describe_lengths, measure_packing
from training.data.flags import DEMO_TOKENIZER
from training.data.page import render_page
from training.data.terminal import isolated, printable

THINKING = {
    "fr": "Je calcule deux plus trois pas à pas, et je trouve que la somme est cinq.",
    "de": "Ich rechne zwei plus drei Schritt für Schritt und finde, dass die Summe fünf ist.",
    "ja": "二足す三を順番に計算すると、合計は五になります。",
    "zh": "我一步一步地计算二加三，得到的总和是五。",
    "ar": "أحسب اثنين زائد ثلاثة خطوة بخطوة وأجد أن المجموع خمسة.",
}
QUESTION = "Combien font deux plus trois ?"
Write = Callable[..., str]


def record(
    question: str = QUESTION,
    thinking: str | None = THINKING["fr"],
    answer: str = "Cinq.",
    ask: str | None = "reasoning language: French",
    **fields: Any,
) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "developer", "content": ask}] if ask else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "thinking": thinking}]
    return {"messages": messages, **fields}


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    """A conversation of roles and contents; what the assistant thinks is the same each time."""
    thinking = {"thinking": THINKING["fr"]}
    return {
        "messages": [
            {"role": role, "content": content} | (thinking if role == "assistant" else {}) for role, content in pairs
        ]
    }


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_folder(DEMO_TOKENIZER)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(*records: Any) -> str:
        path = tmp_path / "data.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return to_file


@pytest.fixture
def find(write: Write, codec: Codec) -> Callable[..., Report]:
    def report(*records: Any, **options: Any) -> Report:
        return check(write(*records), codec, "demo", Options(**options))

    return report


def kinds(report: Report) -> dict[str, int]:
    return {kind.name: count for kind, count, _ in report.log.by_kind()}


@pytest.mark.parametrize("language", THINKING)
def test_clean_record_has_no_finding(find: Callable[..., Report], language: str) -> None:
    report = find(record(thinking=THINKING[language], ask=None, reasoning_language=language))
    assert kinds(report) == {}
    (pair,) = report.figures.agreement
    assert (pair.declared, pair.detected, pair.count) == (language, language, 1)


CASES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "unreadable": ('{"messages": [', "not valid JSON"),
    "no-question": (turns(("assistant", "Bonjour.")), r"messages\[0\] is an assistant turn with no user turn"),
    "control-token": (
        record(thinking=f"<|channel|>analysis<|message|>{THINKING['fr']}"),
        r"messages\[2\] has <\|channel\|>, <\|message\|> typed in its thinking",
    ),
    "wrong-language": (record(thinking=THINKING["de"]), "reads as German, though French is declared"),
    "repeated-role": (turns(("user", "a"), ("user", "b"), ("assistant", "c")), r"messages\[0\] and messages\[1\]"),
    "missing-thinking": (record(thinking=None), "has no `thinking`"),
    "short-thinking": (record(thinking="Bon."), "the thinking has 3 letters, fewer than 20"),
    "answer-is-thinking": (record(answer=f"{THINKING['fr'].upper()} \n"), "word for word"),
    "answer-language": (
        record("Pourquoi le ciel est-il bleu pendant la journée ?", answer="The sky is blue since air scatters light."),
        "the question reads as French, the answer as English",
    ),
    "thinking-language": (
        record(
            "Pourquoi le ciel est-il bleu ?", THINKING["de"], "C'est parce que l'air diffuse la lumière bleue.", None
        ),
        "the thinking reads as German, the answer as French, and no language is declared",
    ),
    "unknown-language": (record(ask="reasoning language: Klingon"), "'Klingon' is unknown"),
    "declarations-differ": (
        record(ask="reasoning language: German", reasoning_language="fr"),
        "`reasoning_language` says French, the instruction asks for German",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_found_alone(find: Callable[..., Report], kind: str) -> None:
    bad, message = CASES[kind]
    rome = record("Quelle est la capitale de l'Italie ?", "La question porte sur l'Italie, et c'est Rome.", "Rome.")
    report = find(rome, bad)
    assert kinds(report) == {kind: 1}
    ((_, _, (finding,)),) = report.log.by_kind()
    assert finding.place.endswith("data.jsonl:2")
    assert re.search(message, finding.message)
    assert "\n" not in finding.message


def test_longer_than_the_sequence(find: Callable[..., Report]) -> None:
    report = find(record(), sequence_length=40)
    assert kinds(report) == {"too-long": 1}
    assert report.errors == 0
    assert report.figures.packing is not None
    assert report.figures.packing.samples_over == 1


@pytest.mark.parametrize("form", ["reasoning language: French", "Be brief.\n推論言語: フランス語", "推論言語：French"])
def test_instruction_declares_the_language(find: Callable[..., Report], form: str) -> None:
    assert kinds(find(record(ask=form, thinking=THINKING["de"]))) == {"wrong-language": 1}


def test_field_goes_before_instruction(find: Callable[..., Report]) -> None:
    report = find(record(thinking=THINKING["de"], reasoning_language="German"))
    assert kinds(report) == {"declarations-differ": 1}


def test_too_few_letters_are_undetermined_and_no_error(find: Callable[..., Report]) -> None:
    report = find(record(thinking="Zwei plus drei: 2 + 3 = 5"))
    assert report.errors == 0
    assert report.figures.undetermined_thinking == 1


@pytest.mark.parametrize(
    ("question", "ask"),
    [
        ("Traduis « le ciel est bleu pendant la journée » en English.", "reasoning language: French"),
        ("Pourquoi le ciel est-il bleu pendant la journée ?", "reasoning language: French\nAnswer in English."),
    ],
)
def test_answer_may_be_in_a_language_that_is_named(find: Callable[..., Report], question: str, ask: str) -> None:
    report = find(record(question, answer="The sky is blue because the air scatters its light.", ask=ask))
    assert kinds(report) == {}


def test_text_that_only_looks_like_a_control_token(find: Callable[..., Report]) -> None:
    assert kinds(find(record(answer="Le tuyau <|truc|> et <| channel |>."))) == {}


def test_exact_duplicates_are_named_by_their_first(find: Callable[..., Report]) -> None:
    report = find(record(), record("Combien font dix moins six ?"), record(), record(answer="Cinq ! 5."), record())
    assert kinds(report) == {"exact-duplicate": 2}
    ((_, _, found),) = report.log.by_kind()
    assert [finding.place.rsplit(":", 1)[1] for finding in found] == ["3", "5"]
    assert all("data.jsonl:1, token by token" in finding.message for finding in found)


def test_figures_against_a_count_by_hand(find: Callable[..., Report], codec: Codec) -> None:
    two_turns = turns(("user", QUESTION), ("assistant", "Cinq."), ("user", "Et trois ?"), ("assistant", "Six."))
    two_turns["reasoning_language"] = "fr"
    figures = find(record(), two_turns, "{").figures
    assert (figures.records, figures.conversations, figures.messages, figures.samples) == (3, 2, 7, 3)
    thinking = len(codec.encode(THINKING["fr"]))
    around = len(codec.encode("analysis")) + 3
    assert figures.tokens_by_label["analysis"] == 3 * (thinking + around)
    answers = [len(codec.encode(answer)) for answer in ("Cinq.", "Cinq.", "Six.")]
    header = len(codec.encode("assistant")) + len(codec.encode("final")) + 4
    assert figures.tokens_by_label["final"] == sum(answers) + 3 * header
    assert figures.trained_tokens == figures.tokens_by_label["analysis"] + figures.tokens_by_label["final"]
    assert figures.lengths is not None
    assert figures.lengths.total == sum(figures.tokens_by_label.values())
    assert figures.trained_share == figures.trained_tokens / figures.lengths.total
    french = next(row for row in figures.languages if row.tag == "fr")
    assert (french.declared, french.thinking) == (3, 3)
    assert french.tokens_per_character == thinking / len(THINKING["fr"])


def test_tools_are_counted_and_a_result_needs_a_call(find: Callable[..., Report]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "thinking": THINKING["fr"], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "5"},
        {"role": "assistant", "thinking": "", "content": "Cinq."},
    ]
    report = find({"messages": conversation})
    assert kinds(report) == {}
    assert report.figures.tools == {"functions.add": 1}
    assert report.figures.samples == 1


def test_lengths() -> None:
    lengths = describe_lengths(array("I", range(1, 101)))
    assert (lengths.total, lengths.minimum, lengths.median, lengths.maximum) == (5050, 1, 50.5, 100)
    assert lengths.p95 == pytest.approx(95.05)
    assert lengths.p99 == pytest.approx(99.01)
    assert sum(bar.count for bar in lengths.histogram) == 100
    one = describe_lengths(array("I", [7]))
    assert [(bar.low, bar.high, bar.count) for bar in one.histogram] == [(7, 7, 1)]
    tail = describe_lengths(array("I", [*range(100, 300), 1_000_000]))
    assert tail.histogram[-1].high == 1_000_000
    assert len(tail.histogram) <= 21


def test_packing() -> None:
    packing = measure_packing(array("I", [6, 4, 5, 5, 10, 11]), 10)
    assert (packing.sequences, packing.efficiency, packing.samples_over) == (3, 1.0, 1)
    assert measure_packing(array("I", [11]), 10).sequences == 0


class Page(HTMLParser):
    """Collects tags and attributes, and sees that tags are closed in order."""

    VOID = ("meta", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID or (tag == "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


HOSTILE = "<script>alert('x')</script><img src=https://example.org/x onerror=\"alert(1)\">&amp;\x1b[31m"


def test_page_is_self_contained_and_escapes_data(find: Callable[..., Report]) -> None:
    report = find(
        record(question=HOSTILE, thinking=f"{HOSTILE} {THINKING['ar']}", answer=HOSTILE, ask=HOSTILE),
        record(thinking=f"{THINKING['de']} {HOSTILE}"),
        record(thinking=THINKING["ar"]),
        record(ask=f"reasoning language: {HOSTILE[:40]}"),
    )
    text = render_page(report)
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "base", "form", "a"} & {tag for tag, _ in page.seen}
    for _, attributes in page.seen:
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert "url(" not in text
    assert "@import" not in text
    assert "\x1b" not in text
    assert {"dir": "auto", "lang": "ar"} in [attributes for tag, attributes in page.seen if tag == "blockquote"]


def test_printing_data_moves_no_cursor_and_turns_no_line() -> None:
    assert printable("a\x1b[2Jb\u202ec\r") == "a\\x1b[2Jb\\u202ec\\r"
    assert isolated("plain 日本語") == "plain 日本語"
    assert isolated(THINKING["ar"]) == f"\u2068{THINKING['ar']}\u2069"


def test_json_alone_on_standard_output(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(record(), record(thinking=THINKING["de"]), "{", record())
    assert main(["data", "check", path, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["errors"], found["warnings"]) == (2, 1)
    assert found["counts"] == {"unreadable": 1, "wrong-language": 1, "exact-duplicate": 1}
    assert [(one["severity"], one["kind"], one["place"]) for one in found["findings"]] == [
        ("error", "unreadable", f"{path}:3"),
        ("error", "wrong-language", f"{path}:2"),
        ("warning", "exact-duplicate", f"{path}:4"),
    ]
    assert found["figures"]["conversations"] == 3


def test_report_in_words(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    path = write(*(record(f"{number} plus trois, s'il vous plaît ?", THINKING["de"]) for number in range(7)), "{")
    assert main(["data", "check", path, "--html", str(page)]) == 1
    out = capsys.readouterr().out
    assert "error  thinking is not in the declared language: 7" in out
    assert "… and 2 more" in out
    assert "8 errors" in out
    assert max(map(len, out.splitlines())) <= 120
    Page(page.read_text(encoding="utf-8"))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_exit_codes(write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(record(), record(thinking=None, question="Combien font six fois sept ?"), "{")
    assert main(["data", "check", path, "--limit", "2"]) == 0
    assert main(["data", "check", path]) == 1
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["data", "check", str(tmp_path / "empty.jsonl")]) == 1
    assert main(["data", "check", str(tmp_path / "missing.jsonl")]) == 2
    assert main(["data", "check", path, "--tokenizer", str(tmp_path)]) == 2
    assert main(["data", "check", path, "--column", "answers=x"]) == 2
    assert main(["data", "check", path, "--html", str(tmp_path)]) == 2
    assert main(["data", "check", path, "--html", str(tmp_path / "no" / "page.html")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert all(line.startswith("error: ") for line in errors)
    for wrong in ([], ["chek"], ["check"], ["check", path, "--limit", "0"], ["check", path, "--sequence-length", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["data", *wrong])
        assert caught.value.code == 2


def test_columns_by_name(write: Write) -> None:
    path = write({"frage": QUESTION, "gedanke": THINKING["fr"], "antwort": "Cinq."})
    named = ["--column", "question=frage", "--column", "reasoning=gedanke", "--column", "answer=antwort"]
    assert main(["data", "check", path]) == 1
    assert main(["data", "check", path, *named]) == 0


def test_shipped_data_is_clean(codec: Codec) -> None:
    report = check("training/demo/data/train.jsonl", codec, "demo", Options(limit=300))
    assert kinds(report) == {}
    assert report.figures.conversations == 300
