"""What pruning costs, saves and loses, measured: `adafv bench` and `adafv check`.

    questions.py   questions about pictures, read from JSON lines, CSV, a folder or a data set on disk
    answers.py     asks a model: every picture goes through the tower once for all questions, methods and budgets
    store.py       answers on disk, so that a run that was killed goes on
    matching.py    whether an answer is right
    statistics.py  paired differences that count pictures, and claims that hold with the confidence they state
    check.py       the result of `adafv check` as one JSON object
    words.py       the same in sentences, and as a table
    page.py        the same as one HTML file
    speed/         seconds, operations, bytes and memory of a call, stage by stage

It uses the engine of transformers, and nothing below the command line uses it.
"""
