"""`llmpipe serve`: an artifact behind the interface of OpenAI, by the server of transformers,
or of llama-cpp-python for a GGUF file.

    serve.py      the story from top to bottom
    named.py      what the command line names: an artifact and what it said, a key, an address
    server.py     the server's process: started, asked for its health, stopped
    host.py       that process
    gate.py       what stands before the application: the key, and nobody before the probe
    asking.py     questions by HTTP
    agree.py      the probe: what the server answers, held against the manifest

Nobody is let in before the server has answered as the model did when it was published.
"""
