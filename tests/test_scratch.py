"""The small bundle: tokenizer, chat template, weights."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from envserver.suites.practice.demonstrate import demonstrations
from learner.trainer.scratch import make_bundle
from understudy.chat import ChatFormat

NUM = 300


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    return list(demonstrations(NUM, seed=5))


@pytest.fixture(scope="module")
def bundle(conversations: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_bundle(conversations, folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def chat(bundle: Path) -> ChatFormat:
    return ChatFormat.load(bundle, "signatures")


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(bundle / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_demonstrations_survive_encoding(conversations: list[dict], chat: ChatFormat) -> None:
    for item in conversations[:50]:
        text = chat.render(item["messages"], item["tools"], add_generation_prompt=False)
        assert chat.decode(chat.encode(text)) == text


def test_episodes_are_short(conversations: list[dict], chat: ChatFormat) -> None:
    lengths = [
        len(chat.encode(chat.render(c["messages"], c["tools"], add_generation_prompt=False)))
        for c in conversations
    ]
    assert sum(lengths) / NUM < 110
    assert max(lengths) < 200


@pytest.mark.parametrize(
    "text", ["Mara", '\n{"name": "lookup", "arguments": {"entity": "', "<tool_call>", "7", "staff"]
)
def test_frequent_text_is_one_token(text: str, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1


def test_a_name_is_the_same_token_wherever_it_stands(tokenizer: Tokenizer) -> None:
    [name] = tokenizer.encode("Mara", add_special_tokens=False).ids
    for text in ("the age of Mara?", '{"entity": "Mara", "field": "age"}', "\nMara\n"):
        assert name in tokenizer.encode(text, add_special_tokens=False).ids


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2024", add_special_tokens=False).tokens == ["2", "0", "2", "4"]


@pytest.mark.parametrize("style", ["signatures", "schemas"])
def test_rendering_of_a_beginning_is_the_beginning_of_the_rendering(
    style: str, conversations: list[dict], bundle: Path
) -> None:
    chat = ChatFormat.load(bundle, style)
    for item in conversations[:30]:
        messages, tools = item["messages"], item["tools"]
        whole = chat.render(messages, tools, add_generation_prompt=False)
        for end in range(2, len(messages)):
            asked = messages[end]["role"] == "assistant"
            assert whole.startswith(chat.render(messages[:end], tools, add_generation_prompt=asked))


def test_tool_results_in_a_row_share_a_user_turn(chat: ChatFormat) -> None:
    calls = [
        {"name": "lookup", "arguments": {"entity": "Mara", "field": "age"}},
        {"function": {"name": "search", "arguments": '{"query": "chess"}'}},
    ]
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "Both.", "tool_calls": calls},
        {"role": "tool", "content": "42"},
        {"role": "tool", "content": "Lars"},
    ]
    assert chat.render(messages, add_generation_prompt=True) == (
        "<|im_start|>user\nGo.<|im_end|>\n"
        "<|im_start|>assistant\nBoth.\n"
        '<tool_call>\n{"name": "lookup", "arguments": {"entity": "Mara", "field": "age"}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "search", "arguments": {"query": "chess"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response>\n"
        "<tool_response>\nLars\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tools_are_listed_as_schemas_or_signatures(
    conversations: list[dict], chat: ChatFormat, bundle: Path
) -> None:
    tools, question = conversations[0]["tools"], [{"role": "user", "content": "?"}]
    short = chat.render(question, tools, add_generation_prompt=True)
    assert "lookup(entity, field)\nsearch(query)\n" in short
    long = ChatFormat.load(bundle, "schemas").render(question, tools, add_generation_prompt=True)
    listed = long.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"] for line in listed] == tools


def test_transformers_loads_the_bundle_and_renders_alike(
    conversations: list[dict], chat: ChatFormat, bundle: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bundle)
    assert 0.5e6 < model.num_parameters() < 1e6
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    item = conversations[0]
    text = chat.render(item["messages"], item["tools"], add_generation_prompt=False)
    theirs = tokenizer.apply_chat_template(
        item["messages"], item["tools"], tokenize=False, tool_style="signatures"
    )
    assert theirs == text
    assert tokenizer(text)["input_ids"] == chat.encode(text).tolist()


def test_a_seed_makes_the_same_bundle(
    conversations: list[dict], bundle: Path, tmp_path: Path
) -> None:
    make_bundle(conversations, tmp_path, seed=3)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (bundle / name).read_bytes()
