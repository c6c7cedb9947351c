"""`RequestLimits`: what one HTTP request may ask for, checked before anything is allocated."""

from dataclasses import dataclass, fields

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Upper bounds of a request; each is a flag (`--max-body-bytes`), shown in /openapi.json."""

    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 64 << 10  # all of them together
    max_headers: int = 128
    header_timeout_s: float = 15.0  # for a request's headers to be complete
    body_timeout_s: float = 60.0  # for its body
    max_json_depth: int = 64
    max_prompts: int = 1024  # of one completion
    max_n: int = 128  # choices a prompt
    max_sequences: int = 2048  # prompts times n
    max_messages: int = 10_000
    max_stop_strings: int = 4
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_bad_words: int = 128
    max_tools: int = 128
    max_schema_bytes: int = 256 << 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name}={value!r} is too small; use more than 0")
