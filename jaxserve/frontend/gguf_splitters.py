"""How each kind of byte-level BPE in GGUF files splits text into words, as data.

The kinds are those of `tokenizer.ggml.pre`; the patterns are the ones of the models' own
tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitter:
    """What happens to text before byte-level BPE."""

    nfc: bool = False  # Unicode normal form C first
    punctuation: bool = False  # runs of punctuation by themselves
    digits: bool = False  # every digit by itself
    patterns: tuple[str, ...] = ()  # each match becomes a word, one pattern after the other
    gpt2: bool = True  # GPT-2's own pattern
    after: tuple[str, ...] = ()  # patterns on its words, whose bytes are characters by then
    ignore_merges: bool = False  # a word that is a token is not split
    add_bos: bool = False  # when the file does not say

    def install(self, tokenizer: Tokenizer) -> None:
        """Make a tokenizer split so."""
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.punctuation:
            steps.append(pre_tokenizers.Punctuation("contiguous"))
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(map(_isolated, self.patterns))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        steps.extend(map(_isolated, self.after))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _isolated(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _own(*patterns: str) -> Splitter:
    """Patterns in place of GPT-2's."""
    return Splitter(patterns=patterns, gpt2=False)


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
)
_SEED = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
# Words that begin with capitals, and words that end in small letters.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_GPT4O = f"{_CASED}{_SUFFIX}?|{_CAPITALS}{_SUFFIX}?" + r"|\p{N}{1,3}" + _SYMBOLS + _SPACES
_TEKKEN = f"{_CASED}|{_CAPITALS}" + r"|\p{N}" + _SYMBOLS + _SPACES
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # the second range is the models' own
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")
# The letters of scripts with capital and small ones, as DeepSeek LLM lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[" + _CASED_LETTERS + "]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002" + "]+",
    r"\s+$",
    _HAN,
    r"\p{N}+",
)

_GPT2 = Splitter()
_DIGITS = Splitter(digits=True)
_LLAMA3_SPLITTER = replace(_own(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_SPLITTER = replace(_own(_QWEN2), nfc=True)

# tokenizer.ggml.pre -> how to split
SPLITTERS: Mapping[str, Splitter] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "exaone4": _GPT2,
    "jais": _GPT2,
    "mpt": replace(_GPT2, nfc=True),
    "olmo": replace(_GPT2, nfc=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "command-r": replace(_DIGITS, nfc=True),
    "falcon": Splitter(punctuation=True, after=(r"[0-9][0-9][0-9]",)),
    "llama-bpe": _LLAMA3_SPLITTER,
    "llama-v3": _LLAMA3_SPLITTER,
    "llama3": _LLAMA3_SPLITTER,
    "falcon3": _LLAMA3_SPLITTER,
    "pixtral": _LLAMA3_SPLITTER,
    "lfm2": _LLAMA3_SPLITTER,
    "dbrx": _own(_LLAMA3),
    "smaug-bpe": _own(_LLAMA3),
    "chatglm-bpe": _own(_LLAMA3),
    "glm4": replace(_own(_LLAMA3), ignore_merges=True),
    "qwen2": _QWEN2_SPLITTER,
    "deepseek-r1-qwen": _QWEN2_SPLITTER,
    "megrez": _QWEN2_SPLITTER,
    "hunyuan": _own(_QWEN2),
    "stablelm2": _own(_QWEN2),
    "qwen35": _own(_QWEN35),
    "seed-coder": _own(_SEED),
    "gpt-4o": _own(_GPT4O),
    "llama4": _own(_GPT4O),
    "tekken": replace(_own(_TEKKEN), ignore_merges=True, add_bos=True),
    "deepseek-llm": _own(*_DEEPSEEK_LLM),
    "deepseek-coder": _own(*_DEEPSEEK_CODER),
    "deepseek-v3": _own(*_DEEPSEEK_V3),
    "hunyuan-dense": _own(*_DEEPSEEK_V3),
}
