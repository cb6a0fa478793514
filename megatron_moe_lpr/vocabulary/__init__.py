"""New tokens for new languages: learned, added to a tokenizer, and measured."""
