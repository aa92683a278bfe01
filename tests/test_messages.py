"""What other programs write into records, and what becomes of it: `pytest tests/test_messages.py`, about 10 s"""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import CONFIG, prepared, stored
from helpers.tiny_tokenizers import SPECIAL, byte_level, write

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import render
from lit_gpt.data.read_files import csv_records, read_records
from lit_gpt.data.records import Keys, in_our_form

PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
TOOL = {"type": "function", "function": {"name": "get_rain", "description": "Rain", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "get_rain", "arguments": {"town": "Lugo"}}}
USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}
EVE = {"role": "assistant", "content": "Eve."}
SHOWS_ALL = (  # tools, thoughts and calls
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.thinking %}({{ m.thinking }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    files = dict(tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL, config_json=CONFIG)
    return write(tmp_path_factory.mktemp("checkpoint"), **files)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def read(record: dict, **keys: str) -> dict[str, Any]:
    return in_our_form(record, "Record 7", Keys(**keys))


def text_of(record: dict, tokenizer: Tokenizer) -> str:
    return render(SHOWS_ALL, read(record), tokenizer).text


# ---- prompt and completion


@pytest.mark.parametrize("beside", [{}, {"system": "Be brief."}])
def test_of_a_prompt_and_a_completion_the_completion_is_learned(checkpoint, tokenizer, tmp_path: Path, beside) -> None:
    pair = {"prompt": [USER, EVE, USER], "completion": [ANSWER]}
    asked_within = {"prompt": [USER, EVE], "completion": [ANSWER]}
    nothing = {"prompt": [USER, EVE, USER], "completion": []}
    records = [record | beside for record in (pair, asked_within, nothing)]
    train, _ = prepared(records, checkpoint, tmp_path / "data", val_fraction=0.0, prompt_style=SHOWS_ALL)
    learned = [tokenizer.decode(ids[trained]) for ids, trained in (train[0], train[1])]
    assert learned == ["Ada.", "Ada."]
    assert train.meta["left_out"] == {"without an answer that is to be learned": 1}

    # where the prompt is learned, so is all of it
    train, _ = prepared(records[:2], checkpoint, tmp_path / "all", val_fraction=0.0, mask_prompt=False)
    assert len(train) == 2 and all(trained.all() for _, trained in (train[0], train[1]))


# ---- roles


@pytest.mark.parametrize(
    "asks, answers",
    [("User", "ASSISTANT"), ("Human", "GPT"), ("USER ", "Bing"), ("prompter", "ChatGPT"), ("human", "bard")],
)
def test_names_of_roles(asks: str, answers: str) -> None:
    for role, content in (("role", "content"), ("from", "value")):
        talk = [{role: "System", content: "Be brief."}, {role: asks, content: "Who?"}, {role: answers, content: "Ada."}]
        assert read({"messages": talk})["messages"] == [{"role": "system", "content": "Be brief."}, USER, ANSWER]


@pytest.mark.parametrize("role", ["tool", "Function", "observation", "tool-response", "function response", "ipython"])
def test_names_of_the_role_of_a_tool(role: str) -> None:
    talk = [USER, {"role": role, "content": "42"}, ANSWER]
    assert read({"messages": talk})["messages"][1] == {"role": "tool", "content": "42"}


def test_a_role_that_nobody_knows() -> None:
    with pytest.raises(InputError, match="7: none of its messages is of the user or the assistant; .* Agent, Customer"):
        read({"messages": [{"role": "Customer", "content": "Who?"}, {"role": "Agent", "content": "Ada."}]})
    with pytest.raises(InputError, match="none of its messages is of the user; their roles are Customer, assistant"):
        read({"messages": [{"role": "Customer", "content": "Who?"}, ANSWER]})
    critic = {"role": "critic", "content": "Hm."}  # the template may know it
    assert read({"messages": [USER, critic, ANSWER]})["messages"] == [USER, critic, ANSWER]


# ---- what is not to be learned


@pytest.mark.parametrize("flag", ["weight", "loss_weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize("no", [False, 0, 0.0, "0", "false"])
def test_flags_of_an_answer(flag: str, no: Any) -> None:
    expected = [USER, EVE | {"weight": 0}, USER, ANSWER]
    assert read({"messages": [USER, EVE | {flag: no}, USER, ANSWER | {flag: 1}]})["messages"] == expected
    assert read({"messages": [USER, EVE | {"masked": True}, USER, ANSWER | {"masked": False}]})["messages"] == expected
    assert read({"messages": [USER | {flag: no}, EVE | {flag: no}, USER, ANSWER]})["messages"] == expected


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"weight": 0.5}, "weight of assistant is 0.5, expected 0 or 1, true or false: an answer is learned or not"),
        ({"weight": 2}, "weight of assistant is 2, expected 0 or 1"),
        ({"train": "some"}, "train of assistant is 'some', expected 0 or 1"),
        ({"mask": 1}, "a message with mask, which means opposite things to different programs. Write train: false"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail, which chooses parts of an answer"),
    ],
)
def test_flags_that_cannot_be_obeyed(flags: dict, said: str) -> None:
    with pytest.raises(InputError, match=f"Record 7.*{said}"):
        read({"messages": [USER, ANSWER | flags]})


def test_an_answer_that_is_not_to_be_learned_is_not_trained(checkpoint, tokenizer, tmp_path: Path, capsys) -> None:
    talk = [USER | {"train": True, "weight": 1}, EVE | {"train": False}, USER, ANSWER]
    train, _ = prepared([{"messages": talk}], checkpoint, tmp_path / "data", prompt_style="chatml", val_fraction=0.0)
    ((ids, marks),) = stored(train)
    said = tokenizer.decode([token for token, mark in zip(ids, marks) if mark])
    assert said.startswith("Ada.") and "Eve." not in said and "Eve." in tokenizer.decode(ids)
    # there is nothing here that trains what the user says
    assert (
        "though other programs give it a meaning: train of messages (1), weight of messages (1)."
        in capsys.readouterr().out
    )


def test_records_that_are_not_to_be_learned(checkpoint, tmp_path: Path) -> None:
    """A flag of the whole record; and a bad answer of KTO. A class is no such flag."""
    question = {"prompt": "a", "completion": "b"}
    records = [question | {"weight": 0}, question | {"label": False}, {"messages": [USER, ANSWER], "kto_tag": False}]
    records += [{"text": "once", "train": "false"}, {"messages": [USER, EVE | {"weight": 0}]}]
    learned = [question, question | {"label": True}, question | {"label": 0}, question | {"weight": 0.7}]
    learned += [{"text": "twice", "label": False}, question | {"label": "0"}]
    train, _ = prepared([*records, *learned], checkpoint, tmp_path / "data", val_fraction=0.0)
    assert len(train) == len(learned) and train.meta["left_out"] == {
        "not to be learned (weight 0)": 1,
        "not to be learned (label false)": 1,
        "not to be learned (kto_tag false)": 1,
        "not to be learned (train false)": 1,
        "without an answer that is to be learned": 1,
    }
    assert train.meta["not_read"] == {"label": 3, "weight": 1}


def test_an_answer_that_is_not_to_be_learned_where_all_is_trained(checkpoint, tmp_path: Path) -> None:
    args = DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", mask_prompt=False)
    with pytest.raises(InputError, match="Record 1 has an answer that is not to be learned .* --mask_prompt false"):
        prepare([{"messages": [USER, EVE | {"train": False}, USER, ANSWER]}], args)


# ---- thoughts


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thoughts_under_all_their_names(key: str, tokenizer) -> None:
    """A template has them under the name that it knows."""
    assert read({"messages": [USER, ANSWER | {key: "Hm."}]})["messages"][1] == ANSWER | {"reasoning_content": "Hm."}
    for template_key in ("reasoning_content", "reasoning", "thinking"):
        template = SHOWS_ALL.replace("m.thinking", f"m.{template_key}")
        rendered = render(template, read({"messages": [USER, ANSWER | {key: "Hm."}]}), tokenizer)
        assert rendered.text == "<user>Who?<assistant>(Hm.)Ada.</s>"
    assert text_of({"messages": [USER, ANSWER | {key: ""}]}, tokenizer) == "<user>Who?<assistant>Ada.</s>"


def test_thoughts_as_parts_of_a_content(tokenizer) -> None:
    for thought in ("Hm.", [{"type": "text", "text": "Hm."}]):
        part = {"type": "thinking", "thinking": thought}
        for parts, thoughts in (([part], "Hm."), ([part, part], "Hm.\nHm.")):
            record = {"messages": [USER, {"role": "assistant", "content": [*parts, {"type": "text", "text": "Ada."}]}]}
            assert text_of(record, tokenizer) == f"<user>Who?<assistant>({thoughts})Ada.</s>"


def test_two_different_thoughts(checkpoint, tmp_path: Path) -> None:
    talk = [USER, ANSWER | {"reasoning": "Hm.", "thinking": "Well."}]
    train, _ = prepared([{"messages": talk}], checkpoint, tmp_path / "data", prompt_style="chatml", val_fraction=0.0)
    assert train.meta["not_read"] == {"thinking of messages": 1}


# ---- tools


def as_in(form: str, tools: Any) -> dict:
    """A record of each form, with tools."""
    if form == "messages":
        return {"messages": [USER, ANSWER], "tools": tools}
    if form == "pair of lists":
        return {"prompt": [USER], "completion": [ANSWER], "tools": tools}
    if form == "pair":
        return {"prompt": "Who?", "completion": "Ada.", "tools": tools}
    return {"instruction": "Who?", "output": "Ada.", "tools": tools}


TEXT = json.dumps
TOOLS = {
    "a list": [TOOL],
    "JSON text": TEXT([TOOL]),
    "a list of JSON texts": [TEXT(TOOL)],
    "JSON text of JSON texts": TEXT([TEXT(TOOL)]),
    "parameters as JSON text": [{"type": "function", "function": TOOL["function"] | {"parameters": TEXT(PARAMETERS)}}],
    "JSON text, encoded twice": TEXT(TEXT([TOOL])),
    "Arrow's nulls": [
        TOOL | {"name": None, "function": TOOL["function"] | {"strict": None, "parameters": PARAMETERS | {"x": None}}}
    ],
}


@pytest.mark.parametrize("form", ["messages", "pair of lists", "pair", "instruction"])
@pytest.mark.parametrize("tools", TOOLS)
def test_tools(form: str, tools: str, tokenizer) -> None:
    assert text_of(as_in(form, TOOLS[tools]), tokenizer) == f"{TEXT(TOOL)}<user>Who?<assistant>Ada.</s>"


@pytest.mark.parametrize("nothing", [None, "", [], "[]", "null", " "])
def test_no_tools(nothing: Any) -> None:
    assert "tools" not in read({"messages": [USER, ANSWER], "tools": nothing})


NO_TOOLS = {
    "search": "tools is the text 'search', which is no JSON",
    '{"name": "f"}': "tools is a dict, expected a list of mappings",
    "3": "tools is a int, expected a list",
    '["f"]': "tools, entry 1, is the text 'f', which is no JSON",
    "[[1]]": "tools, entry 1, is a list, expected a mapping",
    '[{"function": "f"}]': "function of a tool is the text 'f', which is no JSON",
    '[{"function": {"parameters": [1]}}]': "parameters of a tool is a list, expected a mapping",
    '[{"function": {"description": "\\ud83d"}}]': "tools holds half a surrogate pair",
}


@pytest.mark.parametrize("text", NO_TOOLS)
def test_what_is_no_list_of_tools(text: str) -> None:
    for tools in [text] if text == "search" else [text, json.loads(text)]:
        with pytest.raises(InputError, match=f"Record 7: {NO_TOOLS[text]}"):
            read({"messages": [USER, ANSWER], "tools": tools})


def function(**parts: Any) -> dict:
    return {"type": "function", "function": {"name": "get_rain", **parts}}


CALLS = {
    "tool_calls": {"tool_calls": [CALL]},
    "tool_calls as JSON text": {"tool_calls": TEXT([CALL])},
    "arguments as JSON text": {"tool_calls": [function(arguments=TEXT({"town": "Lugo"}))]},
    "arguments encoded twice": {"tool_calls": [function(arguments=TEXT(TEXT({"town": "Lugo"})))]},
    "Arrow's nulls": {"tool_calls": [function(arguments={"town": "Lugo", "unit": None})], "function_call": None},
    "function_call": {"function_call": {"name": "get_rain", "arguments": TEXT({"town": "Lugo"})}},
    "the role of a call": {"role": "function_call", "content": TEXT(CALL["function"])},
    "the role of calls": {"role": "tool_calls", "content": TEXT([CALL["function"]])},
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call: str, tokenizer) -> None:
    """They are rendered once, as a mapping."""
    talk = [USER, {"role": "assistant", "content": None} | CALLS[call], {"role": "tool", "content": "12"}, ANSWER]
    expected = '<user>Who?<assistant>get_rain{"town": "Lugo"}</s><tool>12<assistant>Ada.</s>'
    assert text_of({"messages": talk}, tokenizer) == expected


def test_functions_of_before_there_were_tools(tokenizer) -> None:
    talk = [USER, {"role": "assistant", "function_call": {"name": "get_rain", "arguments": "{}"}}]
    talk += [{"role": "function", "name": "get_rain", "content": "12"}, ANSWER]
    text = text_of({"messages": talk, "functions": [TOOL["function"]]}, tokenizer)
    assert text == f"{TEXT(TOOL)}<user>Who?<assistant>get_rain{{}}</s><tool>12<assistant>Ada.</s>"


def test_calls_of_their_own_for_a_style_without_calls(checkpoint, tokenizer, tmp_path: Path) -> None:
    """They are trained as the text that they are."""
    call = {"from": "function_call", "value": TEXT(CALL["function"])}
    talk = [{"from": "human", "value": "Rain?"}, call, {"from": "observation", "value": "12"}, EVE]
    style = tmp_path / "all.jinja"
    style.write_text(SHOWS_ALL)
    for name, said in (("chatml", TEXT(CALL["function"])), (str(style), 'get_rain{"town": "Lugo"}')):
        data_dir = tmp_path / Path(name).stem
        train, _ = prepared([{"conversations": talk}], checkpoint, data_dir, prompt_style=name, val_fraction=0.0)
        ((ids, marks),) = stored(train)
        assert tokenizer.decode([token for token, mark in zip(ids, marks) if mark]).startswith(said)


def test_calls_after_a_text_of_the_same_answer(tokenizer) -> None:
    call = {"role": "tool_call", "content": TEXT(CALL["function"])}
    text = text_of({"messages": [USER, ANSWER, call, call, {"role": "tool", "content": "1"}, EVE]}, tokenizer)
    one = 'get_rain{"town": "Lugo"}'
    assert text == f"<user>Who?<assistant>Ada.{one}{one}</s><tool>1<assistant>Eve.</s>"
    said = {"role": "function_call", "content": "rain in Lugo"}  # no JSON: it is said so
    assert text_of({"messages": [USER, said]}, tokenizer) == "<user>Who?<assistant>rain in Lugo</s>"


@pytest.mark.parametrize(
    "calls, said",
    [
        ([CALL, "f"], "tool_calls, entry 2, is the text 'f', which is no JSON"),
        (CALL, "tool_calls is a dict, expected a list of mappings"),
        ([function(arguments="town=Lugo")], "arguments of a call is the text 'town=Lugo', which is no JSON"),
        ([function(arguments=[1])], "arguments of a call is a list, expected a mapping"),
        ([function(arguments='"Lugo"')], "arguments of a call is a str, expected a mapping"),
        ([{"function": "f"}], "function of a call is the text 'f', which is no JSON"),
        ([function(arguments='{"a": "\\ud83d"}')], "holds half a surrogate pair"),
    ],
)
def test_what_is_no_list_of_calls(calls: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"Record 7.*{said}"):
        read({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})


@pytest.mark.parametrize("nothing", [None, "", {}, "{}", "null"])
def test_a_call_without_arguments(nothing: Any, tokenizer) -> None:
    talk = [USER, {"role": "assistant", "tool_calls": [function(arguments=nothing)]}]
    assert text_of({"messages": talk}, tokenizer) == "<user>Who?<assistant>get_rain{}</s>"


def test_templates_that_print_arguments_as_they_are(tokenizer) -> None:
    """As DeepSeek's do, which add them to a text."""
    talk = read({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]})
    for spelled in ("{{ '<' + a + '>' }}", "{{ '<' ~ a ~ '>' }}", "<{{ a }}>"):
        template = f"{{% for m in messages %}}{{% set a = m.tool_calls[0].function.arguments %}}{spelled}{{% endfor %}}"
        rendered = render(template, talk | {"messages": talk["messages"][1:]}, tokenizer)
        assert rendered.text == '<{"town": "Lugo"}>'


def test_nulls_that_are_meant(tokenizer) -> None:
    """Those of a list, and those of JSON text, which Arrow does not touch."""
    parameters = {"properties": {"unit": {"enum": ["mm", None], "default": None}}}
    tool = function(parameters=parameters)
    bare = function(parameters={"properties": {"unit": {"enum": ["mm", None]}}})
    assert read({"messages": [USER, ANSWER], "tools": [tool]})["tools"] == [bare]
    assert read({"messages": [USER, ANSWER], "tools": TEXT([tool])})["tools"] == [tool]
    whole = function(parameters=TEXT(parameters))
    assert read({"messages": [USER, ANSWER], "tools": [whole]})["tools"] == [tool]


def test_tables_give_the_same_text(tokenizer, tmp_path: Path) -> None:
    """Arrow gives every mapping of a column the keys of all others; JSON lines do not."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    snow = {
        "type": "function",
        "function": {"name": "snow", "parameters": {"deep": {"type": "number"}}, "strict": True},
    }
    records = [
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "12"}, ANSWER],
            "tools": None,
        },
        {"messages": [USER, EVE | {"reasoning": "Hm."}], "tools": [TOOL, snow]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [function(arguments={"unit": "mm"})]}]},
    ]
    expected = [text_of(record, tokenizer) for record in records]
    assert "null" not in "".join(expected)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        assert [text_of(record, tokenizer) for record in read_records(tmp_path / source)] == expected


# ---- contents


def test_parts_of_a_content(tokenizer) -> None:
    """OpenAI's, and torchtune's."""
    for part in ({"type": "text", "text": "Who?"}, {"type": "text", "content": "Who?"}, {"text": "Who?"}, "Who?"):
        talk = [{"role": "user", "content": [part]}, ANSWER]
        assert text_of({"messages": talk}, tokenizer) == "<user>Who?<assistant>Ada.</s>"


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "user", "text": "Who?"}, "has a message without content; it has role, text"),
        ({"role": "assistant"}, "has a message without content; it has role"),
        ({"role": "user", "content": 3.5}, "content of user is a float, expected text"),
        ({"role": "user", "content": False}, "content of user is a bool, expected text"),
        ({"role": "tool", "content": {"rain": 12}}, "content of tool is a dict, expected text"),
        ({"from": "human", "value": ["a", 3]}, "a part of type 'int': only text can be read"),
        ({"role": "user", "content": [{"type": "tool_use", "id": 1}]}, "a part of type 'tool_use': only text"),
        ({"role": 1, "content": "a"}, "a message without a role; it has role, content"),
    ],
)
def test_what_is_no_content(message: dict, said: str) -> None:
    with pytest.raises(InputError, match=f"Record 7.*{said}"):
        read({"messages": [message, ANSWER]})


# ---- history


HISTORY = [["Peru?", "Lima."], ("Cuba?", "Havana.")]
EARLIER = [{"role": role, "content": text} for turn in HISTORY for role, text in zip(("user", "assistant"), turn)]


@pytest.mark.parametrize("history", [HISTORY, TEXT(HISTORY), EARLIER], ids=["pairs", "JSON text", "messages"])
def test_history_is_the_earlier_part_of_the_conversation(history: Any, checkpoint, tmp_path: Path) -> None:
    record = {"instruction": "And in", "input": "Chile?", "output": "Santiago.", "system": "Brief.", "history": history}
    messages = read(record)["messages"]
    assert messages[0] == {"role": "system", "content": "Brief."} and messages[1:5] == EARLIER
    assert messages[5]["content"] == "And in\n\nChile?" and "not_read" not in read(record)
    pair = {"prompt": "And in\n\nChile?", "completion": "Santiago.", "history": history}
    assert [message["content"] for message in read(pair)["messages"]] == [m["content"] for m in messages[1:]]

    # all of its answers are trained
    train, _ = prepared([record], checkpoint, tmp_path / "data", prompt_style="alpaca", val_fraction=0.0)
    ((ids, marks),) = stored(train)
    said = Tokenizer(checkpoint).decode_with_special([token for token, mark in zip(ids, marks) if mark])
    assert said == "Lima.</s>Havana.</s>Santiago.</s>"


@pytest.mark.parametrize(
    "history, said",
    [
        ([["Peru?"]], r"history holds .*Peru.*, expected \[question, answer\]"),
        (["Peru?", "Lima."], "history holds 'Peru\\?', expected"),
        ("Peru? Lima.", "history is the text 'Peru\\? Lima.', which is no JSON"),
        (3, "history is a int, expected a list"),
        ([[1, 2]], "history is a int, expected text"),
    ],
)
def test_what_is_no_history(history: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"Record 7: {said}"):
        read({"instruction": "a", "output": "b", "history": history})


def test_a_conversation_wins_over_history(checkpoint, tmp_path: Path, capsys) -> None:
    record = {"messages": [USER, ANSWER], "history": HISTORY, "instruction": "a", "id": 3}
    assert read(record)["messages"] == [USER, ANSWER] and read(record)["not_read"] == ["history", "instruction", "id"]
    prepare([record], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    said = capsys.readouterr().out
    assert "Not read, though other programs give it a meaning: history (1), instruction (1).\nNot read: id.\n" in said


# ---- what is not for this toolkit


@pytest.mark.parametrize("key", ["image", "images", "videos", "audio"])
def test_pictures_films_and_sounds_are_refused(key: str) -> None:
    assert read({"messages": [USER, ANSWER | {key: None}], key: []})["messages"] == [USER, ANSWER]
    with pytest.raises(InputError, match=f"Record 7 has {key}: only text can be read"):
        read({"messages": [USER, ANSWER], key: ["a.png"]})
    with pytest.raises(InputError, match=f"Record 7 has a message with {key}: only text can be read"):
        read({"messages": [USER | {key: ["a.png"]}, ANSWER]})


WORSE = {
    "--instruction_key prompt --output_key chosen": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "--instruction_key instruction --output_key chosen": {"instruction": "a", "chosen": "b", "rejected": "c"},
    "--messages_key chosen": {"chosen": [USER, ANSWER], "rejected": [USER, EVE]},
    "--text_key chosen": {"chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize("flags", WORSE)
def test_preferences_are_refused_with_the_flags_that_read_them(flags: str) -> None:
    with pytest.raises(InputError, match=f"Record 7 has chosen and rejected.*. {flags} learns the better one"):
        read(WORSE[flags])
    words = flags.split()
    keys = {words[i].removeprefix("--"): words[i + 1] for i in range(0, len(words), 2)}
    record = read(WORSE[flags], **keys)
    assert record["not_read"] == ["rejected"]
    assert record.get("text") == "b" or record["messages"][-1]["content"] in ("b", "Ada.")


def test_preferences_beside_a_conversation() -> None:
    record = {"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, EVE]}
    assert read(record)["not_read"] == ["chosen", "rejected"]
    with pytest.raises(InputError, match="Call chosen completion"):
        read({"prompt": [USER], "chosen": [ANSWER], "rejected": [EVE]})
    with pytest.raises(InputError, match="Record 7 has chosen and rejected"):  # LLaMA-Factory's
        read({"conversations": [USER], "chosen": ANSWER, "rejected": EVE})


# ---- one key, two parts


@pytest.mark.parametrize("keys", [{}, {"instruction_key": "input"}], ids=["", "--instruction_key input"])
def test_input_and_output_alone_are_a_question_and_its_answer(keys: dict, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("input,output\nWho?,Ada.\n")
    for record in ({"input": "Who?", "output": "Ada."}, next(csv_records(tmp_path / "a.csv"))):
        assert read(record, **keys)["messages"] == [USER | {"instruction": "Who?", "input": ""}, ANSWER]
    capitals = {"input_key": "Input", "output_key": "Output"}
    assert read({"Input": "Who?", "Output": "Ada."}, **capitals)["messages"][1] == ANSWER
    with pytest.raises(InputError, match="it has input, output, question. Did you mean --instruction_key input?"):
        read({"input": "Who?", "output": "Ada.", "question": "What?"})


@pytest.mark.parametrize(
    "keys, record, expected",
    [
        ({"system_key": "input"}, {"instruction": "Who?", "input": "S", "output": "Ada."}, ["S", "Who?", "Ada."]),
        (
            {"system_key": "instruction", "instruction_key": "input"},
            {"instruction": "S", "input": "Who?", "output": "Ada."},
            ["S", "Who?", "Ada."],
        ),
        ({"instruction_key": "output", "output_key": "input"}, {"input": "Ada.", "output": "Who?"}, ["Who?", "Ada."]),
        ({"messages_key": "output"}, {"output": [USER, ANSWER]}, ["Who?", "Ada."]),
        ({"split_key": "input"}, {"instruction": "Who?", "input": "train", "output": "Ada."}, ["Who?", "Ada."]),
    ],
)
def test_a_default_gives_way_to_a_flag(keys: dict, record: dict, expected: list[str]) -> None:
    assert [message["content"] for message in read(record, **keys)["messages"]] == expected


def test_a_text_may_take_the_key_of_the_answer() -> None:
    assert read({"output": "Once."}, text_key="output")["text"] == "Once."


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"instruction_key": "q", "output_key": "q"}, "--instruction_key and --output_key both name q"),
        ({"system_key": "s", "input_key": "s"}, "--input_key and --system_key both name s: a key is one part"),
        ({"instruction_key": "output"}, "--instruction_key output takes the key of the output.*, too: --output_key"),
        ({"output_key": "instruction"}, "takes the key of the instruction.*Name its key, too: --instruction_key"),
        ({"system_key": "output"}, "--system_key output takes the key of the output"),
    ],
)
def test_two_flags_for_one_key(keys: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DataArgs(**keys)


@pytest.mark.parametrize("flag", ["input_key", "system_key"])
def test_a_flag_that_names_the_question_of_another_form(flag: str) -> None:
    with pytest.raises(InputError, match=f"--{flag} names prompt, which is another part of these records"):
        read({"prompt": "Who?", "completion": "Ada."}, **{flag: "prompt"})


def test_a_text_in_a_table_of_questions() -> None:
    """Columns that are empty in a row do not decide its form."""
    for nothing in (None, ""):
        assert read({"prompt": nothing, "completion": nothing, "text": "Once."})["text"] == "Once."
        assert read({"instruction": nothing, "output": nothing, "text": "Once."})["text"] == "Once."
    assert read({"prompt": "Who?", "completion": "Ada.", "text": None})["messages"][1] == ANSWER
    assert read({"prompt": "Who?", "completion": "Ada.", "text": "Who? Ada."})["not_read"] == ["text"]
