"""What pruning does to answers, asked of a model: what `adafv check` and `adafv bench accuracy` are made of.

questions.py   questions about pictures, read from JSON lines, CSV, a folder or a data set on disk
answers.py     asks a model: every picture goes through the tower once for all questions, methods and budgets
store.py       answers on disk, so that a run that was killed goes on
matching.py    whether an answer is right
statistics.py  paired differences that count pictures, and claims that hold with the confidence they state
"""
