"""What pruning costs, saves and loses, measured: `adafv check`, `adafv bench`, `adafv analyze` and
`adafv eval`.

    questions.py        questions about pictures, read from JSON lines, CSV, a folder or a data set on disk
    answers.py          asks a model: every picture goes through the tower once for all questions, methods and budgets
    store.py            answers on disk, so that a run that was killed goes on
    matching.py         whether an answer is right
    statistics.py       paired differences that count pictures, and claims that hold with the confidence they state
    check.py            the result of `adafv check` as one JSON object
    words.py            the same in sentences, and as a table
    page.py             the same as one HTML file
    accuracy.py         every method at every budget, in one process or several: `adafv bench accuracy`
    accuracy_report.py  its tables, figure, CSV and JSON
    first_token.py      answers read off the logits of the first token
    world/              a generated world of simple scenes, with the pictures and the words that describe them
    drawn.py            that world as pictures and questions like all others
    places.py           where in a picture each visual token lies, whatever the processor does to it
    boxes.py            pictures with boxes around what can be asked for
    alignment.py        whether scores know where things are: the measurements behind figures 2 to 4 of the paper
    analysis.py         what is said of them: figures, tables, paragraphs, JSON
    chart.py            charts as SVG
    batched.py          a model that answers, and weighs answers, in batches
    lmms.py             the same as a model of lmms-eval
    registration.py     how lmms-eval finds it
    harness.py          benchmarks of lmms-eval at several budgets: `adafv eval`
    published.py        numbers as published, with their sources
    speed/              seconds, operations, bytes and memory of a call, stage by stage

It uses the engine of transformers, and nothing below the command line uses it.
"""
