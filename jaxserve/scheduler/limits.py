"""`Limits`: what an engine can hold, and so which requests could never run."""

from dataclasses import dataclass

from jaxserve.errors import ConfigError, RequestError
from jaxserve.kv_group import KVGroup, most_blocks
from jaxserve.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The fixed sizes that the scheduler keeps to.

    Raises:
        ConfigError: They do not go together.
    """

    groups: tuple[KVGroup, ...]
    block_size: int  # tokens
    max_num_seqs: int  # rows
    max_num_batched_tokens: int  # a step
    max_model_len: int  # tokens of a sequence, prompt and output
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.groups:
            problems.append("groups is empty; give one KVGroup for each kind of layer")
        for group in self.groups:
            if group.num_blocks < 2:
                problems.append(
                    f"num_blocks={group.num_blocks} leaves none to use, because block 0 is "
                    "padding; use at least 2"
                )
            if group.window is not None and group.window < 1:
                problems.append(f"window={group.window} is too small; use at least 1, or None")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} is too small; use at least 1")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            problems.append(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"max_model_len={self.max_model_len}, so without chunked prefill a long prompt "
                "would never run; raise max_num_batched_tokens, lower max_model_len, or leave "
                "enable_chunked_prefill on"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    def check(self, request: Request) -> None:
        """Refuses a request that could never run, even alone.

        Raises:
            RequestError: It is empty, or longer than the model's limit or than the KV cache.
        """
        num_prompt = len(request.prompt_token_ids)
        num_total = num_prompt + request.max_tokens
        asked = f"The prompt has {num_prompt} tokens and max_tokens is {request.max_tokens}"
        if num_prompt < 1:
            raise RequestError(f"{asked}; send a prompt of at least 1 token", param="prompt")
        if request.max_tokens < 1:
            raise RequestError(f"{asked}; use at least 1", param="max_tokens")
        # What pools stops at its last token, and the next one is thrown away.
        if num_total - request.pools > self.max_model_len:
            raise RequestError(
                f"{asked}: {num_total} together, but max_model_len is {self.max_model_len} "
                "tokens. Shorten the prompt or lower max_tokens",
                param="max_tokens" if num_prompt < self.max_model_len else "prompt",
                code="context_length_exceeded",
            )
        for group in self.groups:
            self._check_group(group, num_total - 1, asked)  # the last token is never computed

    def _check_group(self, group: KVGroup, num_tokens: int, asked: str) -> None:
        num_needed = most_blocks(
            group.window,
            num_tokens=num_tokens,
            step_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
        )
        if num_needed > group.num_blocks - 1:
            where = "" if group.window is None else f" of layers with a window of {group.window}"
            raise RequestError(
                f"{asked}: that needs {num_needed} KV blocks of {self.block_size} tokens, but the "
                f"cache{where} has {group.num_blocks - 1}. Shorten the prompt, lower max_tokens, "
                "or give the cache more memory (gpu_memory_utilization, num_gpu_blocks_override)",
                param="max_tokens",
                code="context_length_exceeded",
            )
