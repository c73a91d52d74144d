"""The `transformers` engine: Hugging Face models behind continuous batching.

    engine.py     TransformersEngine: one request from messages to deltas
    arguments.py  what an operator may set, checked
    loading.py    folder -> model and tokenizer, every refusal with its cause
    prompt.py     messages -> token ids
    placing.py    on which devices the weights are, and in how many bits
    batcher.py    token ids in, token ids out: the thread that runs the model
    static.py     the same in static batches, for models that cannot do otherwise
    attention.py  how each request of a batch looks at its own tokens
    linear.py     how bfloat16 weights are multiplied by on processors
    choices.py    what a request asks of its tokens, checked
    sampling.py   how each request of a batch chooses its next token
    adjusting.py  what a request forbids, adds and takes off before that
    chance.py     the numbers that tokens are drawn with
    likely.py     how likely tokens were
    scoring.py    how likely a prompt's own tokens are
    text.py       token ids -> text
    forms.py      what an answer has beside text: thoughts, calls, structured output
    lark.py       the form that a request asks for -> a grammar
    grammar.py    grammars compiled within bounds, and followed token by token
    trial.py      the process in which they are compiled first
    answer.py     tokens -> deltas

Only `engine` is for callers. Importing this package imports no torch; importing `engine` does.
"""
