"""`LLM`: the synchronous Python interface, with vLLM's names and signatures."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from jaxserve.client import Client, open_client, read_template, shut_down_with
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.frontend.beam_search import beam_search
from jaxserve.frontend.engine_args import engine_config
from jaxserve.frontend.pooling import check_dimensions, embedding, pooling_params
from jaxserve.frontend.progress import Progress
from jaxserve.frontend.prompts import ParsedPrompt, Prompt, is_token_ids
from jaxserve.frontend.request_state import RequestState
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.outputs import (
    BeamSearchOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from jaxserve.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from jaxserve.step import StepStats

type Messages = Sequence[Mapping[str, Any]]


class LLM:
    """Loads a model and generates from it.

    Works inside a running event loop (notebooks), and as a context manager. Calls from several
    threads take turns.

    Args:
        model: "demo", a Hugging Face folder, or a .gguf file.
        arguments: Fields of `EngineConfig`; vLLM's other names are accepted where they have no
            effect here.

    Raises:
        ConfigError: An argument is unknown, or its value cannot work.
        CheckpointError: The model is missing or damaged.
        UnsupportedError: The model or an argument asks for something that is not implemented.
    """

    def __init__(self, model: str = "demo", **arguments: Any) -> None:
        # Statistics are for servers' logs.
        self._open(engine_config(model, arguments, disable_log_stats=True))

    @classmethod
    def from_engine_args(cls, config: EngineConfig) -> Self:
        """The same from an `EngineConfig`."""
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    @classmethod
    def from_client(cls, client: Client) -> Self:
        """The same over a client that runs already; `shutdown` stops it."""
        llm = cls.__new__(cls)
        llm._bind(client)
        return llm

    def _open(self, config: EngineConfig) -> None:
        self._bind(open_client(config))

    def _bind(self, client: Client) -> None:
        self.client = client
        shut_down_with(self, client)
        self.config = client.config
        self.vocab_size = client.vocab_size
        self.max_model_len = client.max_model_len
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: object | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; all run at once, as far as memory allows.

        Args:
            prompts: One or several; each a string, token ids, or {"prompt" or "prompt_token_ids",
                "cache_salt"}.
            sampling_params: For all, or one for each prompt. None: the model's generation config.
            use_tqdm: Show progress; or what to call instead of tqdm.
            priority: One for each prompt; lower runs first under the priority policy.

        Returns:
            One output a prompt, in the prompts' order.

        Raises:
            RequestError: A prompt or its parameters are refused; none of them runs then.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm, lora_request, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: object | None = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], or a list of such lists.
            chat_template: Jinja source or a file, instead of the model's.
            chat_template_content_format: Accepted; the form is found from the template.
            continue_final_message: Go on with the last message; needs add_generation_prompt=False.
            chat_template_kwargs: Variables for the template, e.g. {"enable_thinking": False}.

        Raises:
            RequestError: As for `generate`; or the model has no template, or it refuses.
        """
        template = None if chat_template is None else read_template(chat_template)
        prompts = [
            self.render_chat(
                conversation,
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in _conversations(messages)
        ]
        return self._generate(prompts, sampling_params, use_tqdm, lora_request, priority)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[EmbeddingRequestOutput]:
        """Each prompt as a vector of length 1: the hidden state of its last token.

        Args:
            dimensions: Only the first so many, for models that are trained for it.

        Raises:
            RequestError: A prompt is refused, or `dimensions` is; none of them runs then.
        """
        check_dimensions(dimensions, self.client.hidden_size)
        outputs = self._generate(
            _as_list(prompts), pooling_params(), use_tqdm, None, None, pools=True
        )
        return [_embedded(output, dimensions) for output in outputs]

    def render_chat(
        self,
        messages: Messages,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ParsedPrompt:
        """A conversation as a prompt; `options` are `Tokenizer.apply_chat_template`'s."""
        return self.client.render_chat(messages, chat_template_kwargs, **options)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of each prompt; see `jaxserve.frontend.beam_search`.

        Raises:
            RequestError: A prompt is refused, or 2 * beam_width is above max_logprobs.
        """
        tokenizer = self.get_tokenizer()
        step = SamplingParams(
            logprobs=2 * params.beam_width,
            max_tokens=1,
            temperature=params.temperature,
            allowed_token_ids=params.allowed_token_ids,
            ignore_eos=params.ignore_eos,
            detokenize=False,
        )

        def next_tokens(sequences: list[list[int]]) -> list[dict[int, Logprob]]:
            outputs = self._generate(sequences, step, False, None, None)
            return [(output.outputs[0].logprobs or [{}])[0] for output in outputs]

        parsed = [self.client.processor.parse(prompt) for prompt in _as_list(prompts)]
        results = beam_search(
            [prompt.token_ids for prompt in parsed],
            params,
            next_tokens,
            eos_token_id=self.client.processor.end_tokens.eos_token_id,
            max_model_len=self.max_model_len,
        )
        for result in results:
            for beam in result.sequences:
                beam.text = tokenizer.decode(beam.tokens, params.skip_special_tokens)
        return results

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with skip_tokenizer_init."""
        return self.client.require_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """A fresh copy of what `generate` uses without sampling_params."""
        return self.client.processor.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        return self.client.engine.reset_prefix_cache()

    def summary(self) -> dict[str, object]:
        """Facts about the engine: model, device, memory, sizes."""
        return self.client.engine.summary()

    def engine_stats(self) -> list[StepStats]:
        """Figures of the engine's latest steps (10,000 at most), oldest first."""
        return list(self.client.recent_stats)

    def shutdown(self) -> None:
        """Stop the engine and free the device's memory. May be called again."""
        self.client.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    # How it runs

    def _generate(
        self,
        prompts: Sequence[Prompt | ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Callable[..., Any],
        lora_request: object | None,
        priority: Sequence[int] | None,
        *,
        pools: bool = False,
    ) -> list[RequestOutput]:
        params = self._params_for(sampling_params, len(prompts))
        if priority is not None and len(priority) != len(prompts):
            raise RequestError(
                f"there are {len(prompts)} prompts and {len(priority)} priorities; give one each",
                param="priority",
            )
        states: list[RequestState] = []
        with self._lock, Progress(len(prompts), use_tqdm) as progress:
            try:
                for i, prompt in enumerate(prompts):
                    state = self.client.submit(
                        prompt,
                        params[i],
                        priority=priority[i] if priority is not None else 0,
                        lora_request=lora_request,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                        pools=pools,
                    )
                    states.append(state)
                return self._wait(states, progress)
            except BaseException:  # KeyboardInterrupt, too
                for state in states:
                    self.client.cancel(state)
                raise

    def _wait(self, states: list[RequestState], progress: Progress) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        mine = {id(state) for state in states}
        while len(outputs) < len(states):
            # A limit, because on some platforms an endless wait cannot be interrupted.
            message = self.client.next_message(timeout_s=5.0)
            if message is None:
                continue
            for state in self.client.handle(message):
                output = state.take()  # raises when the engine is dead
                if output is not None and id(state) in mine:
                    outputs[id(state)] = output
                    progress.add(output)
            if message.error is not None:
                self.client.check_health()
        return [outputs[id(state)] for state in states]

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if not isinstance(given, Sequence):
            return [given] * num_prompts
        if len(given) != num_prompts:
            raise RequestError(
                f"there are {num_prompts} prompts and {len(given)} sampling_params; give one for "
                "all, or one each",
                param="sampling_params",
            )
        return given


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or is_token_ids(prompts):
        return [prompts]
    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; use a string, token ids, an object with "
            "prompt or prompt_token_ids, or a list of these",
            param="prompts",
        )
    return list(prompts)


def _conversations(messages: Any) -> list[Messages]:
    """A list of conversations, also from a single one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestError(
            f"messages is a {type(messages).__name__}; use a list of objects with role and "
            "content, or a list of such lists",
            param="messages",
        )
    is_one = not messages or not isinstance(messages[0], Sequence)
    return [messages] if is_one else list(messages)


def _embedded(output: RequestOutput, dimensions: int | None) -> EmbeddingRequestOutput:
    if output.pooled is None:
        raise EngineDeadError(f"request {output.request_id} ended without a hidden state")
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(embedding(output.pooled, dimensions).tolist()),
        prompt_token_ids=output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
    )
