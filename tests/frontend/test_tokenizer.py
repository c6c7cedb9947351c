"""The tokenizer's methods, and folders of all kinds, against transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxserve.checkpoint import Checkpoint, TokenizerSource
from jaxserve.errors import CheckpointError, RequestError
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer

EOS = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
TEXTS = ["Hello, world!", " a  b\n\tc", "你好 🙂 né", "<|im_start|>user\nx<|im_end|>", ""]


def write_folder(folder: Path, tokenizer: Tokenizer, **config: Any) -> Checkpoint:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": EOS} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Checkpoint(name="m", config={}, tokenizer=TokenizerSource(folder=folder))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"pad_token": "<|pad|>"},
    ],
)
def test_a_folder_gives_the_tokens_of_transformers(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    mine = load_tokenizer(write_folder(tmp_path, tokenizer, **config))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    write_folder(tmp_path, tokenizer, **config)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        for special in (True, False):
            ids = mine.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert mine.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert len(mine) == len(theirs)
    assert mine.vocab_size == theirs.vocab_size
    assert set(mine.all_special_ids) >= set(theirs.all_special_ids)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(mine, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(mine, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert mine.convert_ids_to_tokens([19556, 28]) == theirs.convert_ids_to_tokens([19556, 28])


def test_methods_that_users_expect(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello world")
    assert tokenizer("Hello world") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert tokenizer(["Hello world"])["input_ids"] == [ids]
    assert tokenizer.batch_decode([ids]) == ["Hello world"]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Hello world")) == ids
    assert tokenizer.decode(ids[0]) == "Hello"
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 49_152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "<|im_end|>" in tokenizer.all_special_tokens


def test_a_lone_surrogate_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="Unicode"):
        tokenizer.encode("\ud800")


def test_truncation_and_padding_saved_in_a_file_have_no_effect(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    checkpoint = write_folder(tmp_path, tokenizer)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    saved["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    file.write_text(json.dumps(saved))
    assert len(load_tokenizer(checkpoint).encode("one two three four")) == 4


def test_chat_templates_are_found_where_folders_keep_them(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    chat = [{"role": "user", "content": "x"}]
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    found = load_tokenizer(write_folder(tmp_path, tokenizer, chat_template=named))
    assert found.apply_chat_template(chat, tokenize=False) == "D"
    assert found.apply_chat_template(chat, tools=[{}], tokenize=False) == "T"
    (tmp_path / "chat_template.jinja").write_text("J")
    found = load_tokenizer(write_folder(tmp_path, tokenizer, chat_template="C"))
    assert found.apply_chat_template(chat, tokenize=False) == "J"


@pytest.mark.parametrize("content", ["", "{}", "[1", '{"model": 5}'])
def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    source = TokenizerSource(folder=tmp_path)
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_tokenizer(Checkpoint(name="m", config={}, tokenizer=source))


def test_a_model_without_tokenizer_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="skip_tokenizer_init"):
        load_tokenizer(Checkpoint(name="m", config={}))


def test_the_fast_path_imports_neither_transformers_nor_jax() -> None:
    code = (
        "import sys\n"
        "from jaxserve.checkpoint import open_checkpoint\n"
        "from jaxserve.frontend.tokenizer_files import load_tokenizer\n"
        "import jaxserve.llm, jaxserve.async_llm\n"
        "load_tokenizer(open_checkpoint('demo', load_format='dummy')).encode('x')\n"
        "print(sorted({'jax', 'torch', 'transformers', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
