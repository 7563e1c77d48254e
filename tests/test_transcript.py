"""Transcripts as prompts: what a line may hold, what is wrong with which line, and whose every token is."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.synthetic import synthetic_trace
from workbench import cli
from workbench.errors import InputError
from workbench.figures.text import text_view
from workbench.transcript import Transcript, parse_transcript, read_prompt, read_transcript

CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"key": "box"}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is in the box?"}, "Say שלום 👩‍👩‍👧 <b>too</b>"]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "look_up", "content": "seven\u2028keys"},
    {"role": "assistant", "content": "Seven keys."},
    {"role": "user", "content": "And now?"},
]


def lines(*messages: Any) -> str:
    return "\n".join(json.dumps(message, ensure_ascii=False) for message in messages)


def test_roles_parts_and_tool_calls_become_text_in_order():
    parsed = parse_transcript(lines(*CHAT))
    assert [role for role, _ in parsed.parts] == [
        *("system", "user", "assistant calls look_up", "tool look_up", "assistant", "user"),
    ]
    assert parsed.parts[1][1] == "What is in the box?\nSay שלום 👩‍👩‍👧 <b>too</b>"
    assert parsed.parts[2][1] == '{"key": "box"}' and parsed.parts[3][1] == "seven\u2028keys"
    assert parsed.text.startswith("system: Be brief.\nuser: What") and parsed.text.endswith("user: And now?\nassistant:")
    assert parse_transcript(lines(*CHAT[:5])).text.endswith("assistant: Seven keys.\n")
    assert parse_transcript(lines({"messages": CHAT[:3]}, CHAT[3], "").replace('""', "")).parts == parsed.parts[:4]


def test_arguments_may_be_an_object_and_content_may_stand_beside_calls():
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    parsed = parse_transcript(lines({"role": "assistant", "content": "Wait.", "tool_calls": [call, call]}))
    assert parsed.parts == (("assistant", "Wait."), ("assistant calls f", '{"a": "é"}'), ("assistant calls f", '{"a": "é"}'))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("7", "a message is an object"),
        ("{}", "a message is an object"),
        ('{"messages": [3]}', "got 3"),
        ('{"role": "robot", "content": "x"}', "role 'robot' is unknown"),
        ('{"role": ["user"], "content": "x"}', "is unknown"),
        ('{"role": "user"}', "neither content nor tool_calls"),
        ('{"role": "user", "content": 7}', "must be text"),
        ('{"role": "user", "content": [7]}', "a part must be text"),
        ('{"role": "user", "content": [{"type": "image_url"}]}', "part of type 'image_url'"),
        ('{"role": "user", "content": "x", "tool_calls": [{}]}', "only an assistant"),
        ('{"role": "assistant", "tool_calls": 7}', "tool_calls is a list"),
        ('{"role": "assistant", "tool_calls": [{"function": {}}]}', "names its function"),
        ('{"role": "tool", "name": 7, "content": "x"}', "name must be text"),
        ('{"role": "user", "content": "\\ud83d"}', "half a character"),
    ],
)
def test_each_bad_line_is_named_with_its_number(tmp_path, line, said):
    path = tmp_path / "chat.jsonl"
    good = lines(CHAT[0])
    path.write_text(f"{good}\n\n{line}\n{good}\nnonsense\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        wb.read_transcript(path)
    message = str(error.value)
    assert message.startswith("chat.jsonl: line 3: ") and said in message and "; line 5: no JSON" in message
    assert "line 1" not in message and "line 4" not in message and len(message) < 600


def test_many_bad_lines_are_told_in_part():
    with pytest.raises(InputError, match="and 990 more lines"):
        parse_transcript("x\n" * 1000)


def test_files_that_hold_no_transcript(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        wb.read_transcript(tmp_path / "no.jsonl")
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="no message"):
        read_prompt(tmp_path / "e.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(CHAT[0]).encode())
    assert isinstance(read_prompt(tmp_path / "b.jsonl"), Transcript)
    (tmp_path / "c.jsonl").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 2"):
        read_prompt(tmp_path / "c.jsonl")
    (tmp_path / "t.txt").write_text(lines(CHAT[0]))
    assert read_prompt(tmp_path / "t.txt") == lines(CHAT[0])


def test_every_token_belongs_to_the_part_it_ends_in():
    parsed, draw = parse_transcript(lines(*CHAT)), random.Random(3)
    text = parsed.text
    owner = [
        i for i, (role, part) in enumerate([*parsed.parts, ("", "")]) for _ in (f"{role}: {part}\n" if role else "assistant:")
    ]
    assert len(owner) == len(text)
    for _ in range(20):
        cuts = sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(40))})
        offsets = list(zip(cuts, cuts[1:], strict=False))
        offsets.insert(5, offsets[5])  # two tokens of one character
        roles = parsed.token_roles(offsets)
        assert [roles[0][1], roles[-1][2]] == [0, len(offsets)]
        assert all(a[2] == b[1] for a, b in zip(roles, roles[1:], strict=False))
        names = [*(role for role, _ in parsed.parts), "assistant"]
        for role, first, stop in roles:
            assert {names[owner[offsets[t][1] - 1]] for t in range(first, stop)} == {role}


def test_a_run_keeps_whose_each_token_is(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(lines(*CHAT), encoding="utf-8")
    model = wb.load("tiny-v4")
    run = wb.run(model, path, max_new_tokens=2)
    run.wait()
    trace, parsed = run.trace, wb.read_transcript(path)
    texts = ["".join(trace.token_texts[a:b]) for _, a, b in trace.notes["roles"]]
    expected = [f"{role}: {part}\n" for role, part in parsed.parts] + ["assistant:"]
    # pieces of one character show as U+FFFD each, so only the parts without such are compared letter by letter
    for shown, piece in zip(texts, expected, strict=True):
        if piece.isascii():
            assert shown == piece
    assert trace.notes["roles"][-1][2] == trace.prompt_length
    again = wb.Trace.load(trace.save(tmp_path / "trace"))
    assert again.notes["roles"] == trace.notes["roles"]
    page = text_view(again, 2, "max", trace.prompt_length - 1)
    assert "assistant calls look_up</span>" in page and "generated by the model</span>" in page


def test_the_command_line_takes_a_transcript(capsys, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(lines(CHAT[0], CHAT[5]), encoding="utf-8")
    arguments = ["run", "--model", "tiny-v4", "--prompt", f"@{path}", "--out", str(tmp_path / "t"), "--max-new-tokens", "1"]
    assert cli.main(arguments) == 0
    assert [role for role, _, _ in wb.Trace.load(tmp_path / "t").notes["roles"]] == ["system", "user", "assistant"]
    path.write_text("nonsense", encoding="utf-8")
    assert cli.main(arguments) == 2 and "chat.jsonl: line 1: no JSON" in capsys.readouterr().err


def noted(*roles: list[Any]) -> Any:
    return replace(synthetic_trace(97, seed=2), notes={"roles": list(roles)})


def marks(page: str) -> list[str]:
    return [piece.split("</span>")[0] for piece in page.split("<span class='role' dir='ltr'>")[1:]]


def test_the_text_view_marks_roles_and_escapes_them():
    trace = noted(["user", 0, 30], ["assistant calls <b>\u202e&", 30, 60], ["tool", 60, 73])
    page = text_view(trace, 1, "max", 50)
    assert marks(page) == ["user", "assistant calls &lt;b&gt;\ufffd&amp;", "tool", "generated by the model"]
    before = page.index('data-token="29"'), page.index("assistant calls"), page.index('data-token="30"')
    assert before == tuple(sorted(before))
    bare = "".join(piece.split("</span>", 1)[-1] for piece in page.split("<span class='role' dir='ltr'>"))
    assert bare == text_view(replace(trace, notes={}), 1, "max", 50)


def test_a_passage_that_begins_inside_a_message_says_whose_it_is():
    trace = replace(synthetic_trace(3000, seed=2, window=7), notes={"roles": [["user", 0, 2000], ["assistant", 2000, 2250]]})
    shown = marks(text_view(trace, 0, "max", 2900))
    assert shown[0] == "generated by the model, continued" or shown[0] == "assistant, continued"


@pytest.mark.parametrize("roles", [7, [7], [["user"]], [[1, 2, 3]], [["user", "0", 1]], None])
def test_foreign_notes_do_no_harm(roles):
    assert marks(text_view(replace(synthetic_trace(97, seed=2), notes={"roles": roles}), 1, "max", 50)) == []


def test_paths_are_prompts_too(tmp_path: Path):
    (tmp_path / "p.txt").write_text("The code of apple is")
    run = wb.run(wb.load("tiny-v4"), tmp_path / "p.txt", max_new_tokens=0)
    run.wait()
    assert "".join(run.trace.token_texts) == "The code of apple is" and "roles" not in run.trace.notes


def test_a_number_too_long_for_python_is_told_as_such_and_what_is_no_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: no JSON .*limit"):
        parse_transcript('{"role": "user", "content": ' + "9" * 6000 + "}")
    for read in (read_prompt, read_transcript):
        with pytest.raises(InputError, match="must be a path"):
            read(None)
