"""The `transformers` engine: Hugging Face models behind continuous batching.

    engine.py     TransformersEngine: one request from messages to deltas
    arguments.py  what an operator may set, checked
    loading.py    folder -> model and tokenizer, every refusal with its cause
    prompt.py     messages -> token ids
    batcher.py    token ids in, token ids out: the thread that runs the model
    attention.py  how each request of a batch looks at its own tokens
    sampling.py   how each request of a batch chooses its next token
    text.py       token ids -> text

Only `engine` is for callers. Importing this package imports no torch; importing `engine` does.
"""
