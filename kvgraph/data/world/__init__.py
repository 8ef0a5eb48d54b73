"""The synthetic world: corpora and questions made from a seed, the names in them, and a tokenizer for them."""
