"""What /openapi.json says of a request's fields beyond their types: meaning and bounds.

The bounds are those of `RequestLimits` and of the model; types come from the structs.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from jaxserve.server.context import Context


class TextPart(Struct, kw_only=True):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class InputMessage(Struct, kw_only=True):
    """A message of a conversation; the model's chat template may read further fields."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None  # null beside tool_calls only
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None  # of an assistant
    tool_call_id: str | None = None  # of a tool: which call it answers
    reasoning: str | None = None
    reasoning_content: str | None = None


class AnthropicText(Struct, kw_only=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A block of a message's content; tool_use, tool_result and thinking are known, too."""

    text: Annotated[str, Meta(min_length=1)]


class AnthropicMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation, in Anthropic's form."""

    role: Literal["user", "assistant", "system"]
    content: str | list[AnthropicText]


class AnthropicTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call, in Anthropic's form."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]


MEANING: Mapping[str, str] = {
    "add_generation_prompt": "End the prompt where the model begins to answer.",
    "add_special_tokens": "Let the tokenizer add its own, such as the beginning of a text.",
    "allowed_token_ids": "Only these tokens may be sampled.",
    "bad_words": "Texts that are never sampled.",
    "best_of": "Nothing but n itself is supported.",
    "cache_control": "No effect: every prefix is cached.",
    "cache_salt": "Only requests with the same salt share cached prefixes.",
    "chat_template_kwargs": "Variables of the model's chat template.",
    "continue_final_message": "Continue the last message instead of answering it.",
    "dimensions": "Only the first so many numbers of each vector, scaled to length 1 again.",
    "documents": "Texts for templates that know retrieval.",
    "echo": "Repeat the prompt in front of the output.",
    "encoding_format": "float: a list of numbers; base64: of little-endian float32.",
    "frequency_penalty": "Lowers tokens by how often they came; negative values raise them.",
    "ignore_eos": "Do not end at the model's end token.",
    "image": "No effect.",
    "include": "What to tell besides: message.output_text.logprobs.",
    "include_reasoning": "false: leave the reasoning out of the answer.",
    "include_stop_str_in_output": "Keep the stop string that ended the output.",
    "input": "What to answer, or what to embed.",
    "instructions": "What the model is told first.",
    "logit_bias": "Added to the logits of tokens, by token id.",
    "logprobs": "Return log-probabilities: a number of them (completions), or true (chat).",
    "max_completion_tokens": "The same as max_tokens.",
    "max_output_tokens": "Tokens of the answer and its reasoning, at most.",
    "max_tokens": "Tokens of an output, at most. Chat: the rest of the context by default.",
    "max_tool_calls": "No effect: there are no built-in tools.",
    "messages": "The conversation so far.",
    "metadata": "No effect.",
    "min_p": "Only tokens at least this share as likely as the likeliest; 0: off.",
    "min_tokens": "No end before so many tokens.",
    "model": "The name of the model, as GET /v1/models lists it.",
    "n": "Outputs a prompt.",
    "output_config": "How much to think, and the form of the output.",
    "parallel_tool_calls": "false: at most one call.",
    "presence_penalty": "Lowers tokens that came already; negative values raise them.",
    "priority": "Smaller is served sooner, with the priority scheduling policy.",
    "prompt": "The text; completions also take a list of texts, of token ids, or of such lists.",
    "prompt_cache_key": "No effect.",
    "prompt_cache_options": "No effect.",
    "prompt_cache_retention": "No effect.",
    "prompt_logprobs": "Return so many log-probabilities of each token of the prompt; -1: all.",
    "reasoning": "How much to think.",
    "reasoning_effort": "Handed to the chat template; none turns thinking off.",
    "repetition_penalty": "Divides the logits of tokens that came already; 1: off.",
    "request_id": "Becomes part of the answer's id.",
    "response_format": "The form of the output: text, any JSON, or JSON by a schema.",
    "return_prompt_text": "Return the prompt as the template wrote it.",
    "return_token_ids": "Return token ids beside the text.",
    "return_token_strs": "Return each token's text.",
    "return_tokens_as_token_ids": "Write token_id:N for tokens in log-probabilities.",
    "safety_identifier": "No effect.",
    "seed": "The same seed and request give the same output.",
    "service_tier": "No effect.",
    "session_id": "No effect.",
    "skip_special_tokens": "false: show special tokens in the text.",
    "spaces_between_special_tokens": "Put spaces between special tokens that are shown.",
    "stop": "Texts that end the output.",
    "stop_sequences": "Texts that end the output.",
    "stop_token_ids": "Tokens that end the output.",
    "store": "No effect: nothing is stored.",
    "stream": "Answer with server-sent events as tokens come, and data: [DONE] at the end.",
    "stream_interval": "Tokens an event, at least.",
    "stream_options": "With stream only.",
    "structured_outputs": "A constraint on the output: exactly one of its first six fields.",
    "system": "What the model is told first.",
    "temperature": "0: the likeliest token always; higher: more random.",
    "text": "The form of the text.",
    "thinking": "Whether to think.",
    "tokens": "Token ids.",
    "tool_choice": "Which functions may be called: none, auto, required, or one by name.",
    "tools": "Functions that the model may call.",
    "top_k": "Only the likeliest so many tokens; 0 or -1: all.",
    "top_logprobs": "Log-probabilities a token, with logprobs; -1: all.",
    "top_p": "Only the likeliest tokens that make up this probability together.",
    "truncate_prompt_tokens": "Keep so many tokens of the prompt; -1: as many as fit.",
    "truncation": "auto: leave out the oldest when the input is too long.",
    "truncation_side": "Where truncate_prompt_tokens cuts.",
    "user": "No effect.",
    "user_profile_id": "No effect.",
    "verbosity": "No effect.",
    "workspace_id": "No effect.",
}


def bounds(context: Context) -> dict[str, dict[str, dict[str, Any]]]:
    """JSON schema keywords for each field, by the JSON type they belong to."""
    limits = context.config.limits
    token = {"type": "integer", "minimum": 0, "maximum": context.llm.vocab_size - 1}
    stop = {"minLength": 1, "maxLength": limits.max_stop_chars}
    context_length = {"integer": {"maximum": context.llm.max_model_len}}
    return {
        "max_tokens": context_length,
        "max_completion_tokens": context_length,
        "max_output_tokens": context_length,
        "truncate_prompt_tokens": context_length,
        "model": {"string": {"enum": list(context.names)}},
        "n": {"integer": {"maximum": limits.max_n}},
        "messages": {"array": {"minItems": 1, "maxItems": limits.max_messages}},
        "tools": {"array": {"minItems": 1, "maxItems": limits.max_tools}},
        "stop": {
            "string": stop,
            "array": {
                "maxItems": limits.max_stop_strings,
                "items": {"type": "string", **stop},
            },
        },
        "stop_token_ids": {"array": {"maxItems": limits.max_stop_token_ids, "items": token}},
        "allowed_token_ids": {"array": {"items": token}},
        "tokens": {"array": {"items": token}},
        "bad_words": {
            "array": {
                "maxItems": limits.max_bad_words,
                "items": {"type": "string", "minLength": 1},
            }
        },
        "logit_bias": {
            "object": {
                "maxProperties": limits.max_logit_bias,
                "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            }
        },
        "prompt": {
            "array": {
                "minItems": 1,
                "anyOf": [
                    {"items": {"type": "string"}, "maxItems": limits.max_prompts},
                    {"items": token},
                    {
                        "items": {"type": "array", "items": token, "minItems": 1},
                        "maxItems": limits.max_prompts,
                    },
                ],
            }
        },
    }
