"""Text to tokens and back: tokenizer, chat template, request checks, detokenizer, parsers."""
