"""Shared fixtures: a model bundle without weights, and real servers on free ports."""

import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from understudy.chat import ChatFormat
from understudy.config import NetworkConfig
from understudy.rpc import RoleControl, RoleServer, Service

ROOT = Path(__file__).parents[1]
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of bytes and Qwen3's special tokens; ids 0..8 are the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tokenizer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer, chat template and configuration, but no weights."""
    folder = tmp_path_factory.mktemp("bundle")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 265}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    shutil.copy(ROOT / "learner" / "trainer" / "chat_template.jinja", folder)
    return folder


@pytest.fixture(scope="session")
def chat(bundle: Path) -> ChatFormat:
    """The bundle's chat format with one line a tool."""
    return ChatFormat.load(bundle, "signatures")


@asynccontextmanager
async def serving(*services: Service, role: str = "envserver") -> AsyncIterator[str]:
    """Serve services on a free loopback port and yield the address."""
    server = RoleServer(role, "127.0.0.1:0", NetworkConfig(), services, RoleControl(role))
    port = await server.bind()
    await server.set_serving()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0.2)


@pytest.fixture
def write_toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a TOML text to a file of its own."""

    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write
