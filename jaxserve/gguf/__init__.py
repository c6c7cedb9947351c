"""A model in a GGUF file, told in Hugging Face's terms: config, tensors, tokenizer's data."""
