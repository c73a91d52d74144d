"""The `embedding` engine: sentence-transformers behind dynamic batching, for embeddings and reranking.

    app.py        its HTTP face: /v1/embeddings, /v1/rerank
    requests.py   the two formats: a body in, an answer out
    engine.py     EmbeddingEngine: one request from texts to vectors or scores
    arguments.py  what an operator may set, checked
    folder.py     what kind of model a folder holds, and whether loading it is safe
    loading.py    folder -> encoder, every refusal with its cause
    packing.py    no padding, where the model can do without
    tokens.py     texts and token ids -> pieces that fit the model
    batcher.py    pieces in, rows out: the threads that run the model

Importing this package imports no torch; importing `engine` does.
"""
