"""Reasoning between tags, before everything else."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxserve.frontend.parsers.text_parser import SPACE, Steps, TextParser


class TagReasoningParser(TextParser):
    """Text up to `end_tag` is reasoning, if it or the end of the prompt has `start_tag` for it.

    A prompt that ends with `end_tag` has turned reasoning off. White space around the tags of the
    prompt and before `start_tag` does not matter; what follows a tag is kept, as in vLLM. Tags
    later in the text are content.

    Attributes:
        is_off: The prompt has turned reasoning off.
        label: Follows the start tag, and is dropped with it.
        always: Reasoning needs no `start_tag`.
    """

    start_tag: ClassVar[str] = "<think>"
    end_tag: ClassVar[str] = "</think>"
    label: ClassVar[str] = ""
    always: ClassVar[bool] = False

    def __init__(
        self, *, prompt_text: str = "", tool_schemas: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(prompt_text=prompt_text, tool_schemas=tool_schemas)
        prompt = prompt_text.rstrip()
        starts = (self.start_tag, (self.start_tag + self.label).rstrip())
        self.is_off = prompt.endswith(self.end_tag)
        self.in_reasoning = not self.is_off and (self.always or prompt.endswith(starts))

    @property
    def reasoning_ahead(self) -> tuple[str, tuple[str, ...]] | None:
        if self.is_off:
            return None
        return "" if self.in_reasoning else self.start_tag, (self.end_tag,)

    def _grammar(self) -> Steps[None]:
        if not self.is_off:
            self._hold()
            yield from self._read_run(SPACE)
            if (yield from self._find(self.start_tag)):
                self._read(len(self.start_tag))
                self._held = None
                self.in_reasoning = True
                if self.label and (yield from self._find(self.label)):
                    self._read(len(self.label))
        self._give_held()
        if self.in_reasoning:
            marker = yield from self._read_until(self._give_reasoning, self.end_tag)
            self._read(len(marker))
            self.in_reasoning = not marker
        yield from self._read_until(self._give_content)

    def _give_held(self) -> None:
        held, self._held = "".join(self._held or []), None
        if held:
            (self._give_reasoning if self.in_reasoning else self._give_content)(held)


class DeepSeekR1Parser(TagReasoningParser):
    """The model reasons unless the prompt turned it off; older templates leave `<think>` to it."""

    always = True


class Qwen3Parser(TagReasoningParser):
    """`<think>` comes from the model (Qwen3) or from the prompt (Qwen3-Thinking, Qwen3.5).

    Text without either is content: Qwen3-Instruct does not reason.
    """


class MistralReasoningParser(TagReasoningParser):
    """Magistral: `[THINK]` and `[/THINK]` are special tokens."""

    needs_special_tokens = True
    start_tag = "[THINK]"
    end_tag = "[/THINK]"


class Gemma4ReasoningParser(TagReasoningParser):
    """`<|channel>thought`, newline, the reasoning, `<channel|>`: its markers are special tokens."""

    needs_special_tokens = True
    start_tag = "<|channel>"
    end_tag = "<channel|>"
    label = "thought\n"
