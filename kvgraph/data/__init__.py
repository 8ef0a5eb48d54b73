"""Everything about text before tokenization: corpora, chat templates, prompts, and the records and items of tasks."""
